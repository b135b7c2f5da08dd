"""Perplexity over all positions of a text, every token routed by the causal view (context length 1)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax import sharding
from ftp_jax.data.prompts import Prompts, batches
from ftp_jax.evaluation.judge import Frozen
from ftp_jax.models import decoder, scoring
from ftp_jax.routing import masked, routers
from ftp_jax.routing.config import RoutingConfig

_CHUNK = 64  # positions whose logits exist at once


def summed_nll(config, params, tokens, length, hidden):
  """Sum over rows of the negative log-likelihoods (nats) of their tokens 1..n-1, a chunk of positions at a time.

  Args:
    tokens: (B,T); length: n of every row (B,); hidden: what the last block leaves (B,T,D).
  """
  batch, num_positions = tokens.shape
  chunks = -(-(num_positions - 1) // _CHUNK)
  at = jnp.minimum(jnp.arange(chunks * _CHUNK), num_positions - 2).reshape(chunks, _CHUNK)
  inside = (jnp.arange(chunks * _CHUNK) < num_positions - 1).reshape(chunks, _CHUNK)

  def one(xs):
    position, inside = xs
    position = jnp.broadcast_to(position[None], (batch, _CHUNK))
    log_probs = scoring.log_probs(config, params, hidden, position)
    target = jnp.take_along_axis(tokens, position + 1, axis=1)
    weight = inside[None] & (position + 1 < length[:, None])
    return -jnp.sum(scoring.pick(log_probs, target) * weight)

  return jnp.sum(jax.lax.map(one, (at, inside)))


@functools.partial(jax.jit, static_argnames=("config", "routing", "dtype"))
def _routed(config, routing, params, router, rows, schedule, *, dtype):
  out = masked.forward(config, routing, params, router, *rows, schedule, dtype=dtype)
  computed = jnp.sum(out.keep_LxBxT)
  return sharding.replicate((summed_nll(config, params, rows.tokens, rows.length, out.hidden_BxTxD), computed))


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _truncated(config, params, rows, sparsity, *, dtype):
  t = jnp.arange(rows.tokens.shape[1])
  window = jnp.ceil((1 - sparsity) * (t + 1) - 1e-3)[:, None]
  recent = (t[:, None] - t[None, :] < window - 1) | (t[None, :] == t[:, None]) | (t[None, :] == 0)
  hidden = decoder.forward(config, params, rows.tokens, rows.length, dtype=dtype, visible_TxT=recent)
  return sharding.replicate(summed_nll(config, params, rows.tokens, rows.length, hidden))


def perplexity_of(total: float, windows: Prompts) -> float:
  """Of a `summed_nll` over all windows."""
  return float(np.exp(total / np.sum(windows.length - 1)))


def routed_perplexity(
    model: Frozen, routing: RoutingConfig, router: routers.Router, schedule_L: Any, windows: Prompts, batch: int
) -> tuple[float, float]:
  """(perplexity, achieved sparsity) when every token after the first may skip.

  The static order ranks the newest token right behind the sink, so it never skips: its figure is dense.
  """
  # Every position is a continuation token here; where these are all computed, the schedule's own sparsity is asked.
  if not routing.decode_sparsity:
    routing = dataclasses.replace(routing, decode_sparsity=round(float(np.mean(schedule_L)), 6))
  total, computed = 0.0, 0
  for rows in batches(windows, batch):
    with sharding.over(model.params):
      nll, kept = _routed(
          model.config, routing, model.params, sharding.place(model.params, router),
          sharding.place(model.params, rows.counted, "batch"), np.asarray(schedule_L, np.float32), dtype=model.dtype,
      )
    total, computed = total + float(nll), computed + int(kept) - int((rows.weight == 0).sum()) * model.config.num_blocks
  return perplexity_of(total, windows), 1 - computed / (model.config.num_blocks * int(np.sum(windows.length)))


def truncated_perplexity(model: Frozen, sparsity: float, windows: Prompts, batch: int) -> float:
  """Perplexity when token t sees the sink and the latest tokens, ceil((1 - S)(t + 1)) in all."""
  total = 0.0
  for rows in batches(windows, batch):
    with sharding.over(model.params):
      placed = sharding.place(model.params, rows.counted, "batch")
      total += float(_truncated(model.config, model.params, placed, np.float32(sparsity), dtype=model.dtype))
  return perplexity_of(total, windows)
