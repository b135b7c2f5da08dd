"""How much each block changes a token: cosine similarity of its states before and after (docs/method.md)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax import sharding
from ftp_jax.data.prompts import Prompts, batches
from ftp_jax.evaluation.judge import Frozen
from ftp_jax.models import decoder

_HIGH = 0.8
_EDGE = 3


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _similarity(config, params, tokens, length, *, dtype):
  states = decoder.forward(config, params, tokens, length, dtype=dtype, collect=True).astype(jnp.float32)
  norm = jnp.linalg.norm(states, axis=-1)
  return sharding.replicate(jnp.sum(states[1:] * states[:-1], axis=-1) / jnp.maximum(norm[1:] * norm[:-1], 1e-12))


def token_similarity(model: Frozen, prompts: Prompts, batch: int) -> np.ndarray:
  """Cosine similarity (L, tokens) of every valid token before and after every block."""
  parts = []
  for rows, weight, _ in batches(prompts, batch):
    with sharding.over(model.params):
      placed = sharding.place(model.params, (rows.tokens, rows.length), "batch")
      similarity = np.asarray(_similarity(model.config, model.params, *placed, dtype=model.dtype))
    valid = (np.arange(rows.tokens.shape[1])[None] < rows.length[:, None]) & (weight[:, None] > 0)
    parts.append(similarity[:, valid])
  return np.concatenate(parts, axis=1)


def block_influence(similarity_LxN: np.ndarray) -> np.ndarray:
  """BI_i = 1 - mean cosine similarity, (L,): ShortGPT's measure of what a block changes."""
  return np.maximum(1 - similarity_LxN.mean(axis=1), 0.0)


def summary(similarity_LxN: np.ndarray, prompts: Prompts) -> dict[str, Any]:
  """The redundancy table: shares of (token, block) pairs with similarity above 0.8."""
  high = similarity_LxN > _HIGH
  edge = np.zeros(len(high), bool)
  edge[:_EDGE] = edge[-_EDGE:] = True
  return {
      "num_sequences": len(prompts.tokens),
      "length": float(np.mean(prompts.length)),
      "similarity_mean": similarity_LxN.mean(axis=1).tolist(),
      "share_above_0.8": high.mean(axis=1).tolist(),
      "share_above_0.8_all": float(high.mean()),
      "share_above_0.8_edge": float(high[edge].mean()),
      "share_above_0.8_middle": float(high[~edge].mean()) if (~edge).any() else float(high.mean()),
  }
