"""BlockPruner (Zhong et al. 2024, arXiv 2406.10594): attentions and MLPs leave the model one by one, for all tokens.

At each step the sub-block goes without which the perplexity of the calibration text is lowest. Deviations: the text is
the calibration prompts with their continuations; a sub-block counts as its share of a block's parameters, and only
those are taken that bring what is removed nearer to S, so that the share comes out as near to S as it can; one
attention stays.
"""

import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from ftp_jax.data.prompts import batches
from ftp_jax.evaluation.baselines.calibration import Calibration, fingerprint
from ftp_jax.evaluation.baselines.subblocks import shares
from ftp_jax.evaluation.judge import Frozen
from ftp_jax.evaluation.perplexity import summed_nll
from ftp_jax.files import replacing
from ftp_jax.models import decoder
from ftp_jax.models.attention import attend

STATE_FILE = "blockpruner.json"


def calibrate(model: Frozen, sparsity: float, calibration: Calibration, seed: int) -> tuple[dict[str, Any], Any]:
  """Facts of a `Subblocks`, with the `order` of removal and the calibration `perplexity` after each; no arrays."""
  del seed
  tables = _Tables(model, calibration)
  share_2, blocks = shares(model.config), model.config.num_blocks
  removed, order, perplexity, gone = np.zeros((blocks, 2), bool), [], [], 0.0
  bar = tqdm.tqdm(total=round(sparsity * blocks, 2), desc="BlockPruner: blocks removed", mininterval=0.5)
  with bar:
    while True:
      nearer = np.abs(gone + share_2 - sparsity * blocks) < abs(gone - sparsity * blocks) - 1e-9
      allowed = ~removed & nearer[None]
      if removed[:, 0].sum() == blocks - 1:
        allowed[:, 0] = False
      if not allowed.any():
        break
      table = np.where(allowed, tables.of(removed, bar), np.inf)
      block, sub = (int(i) for i in np.unravel_index(np.argmin(table), table.shape))
      removed[block, sub] = True
      gone += share_2[sub]
      order.append([block, sub])
      perplexity.append(float(np.exp(table[block, sub])))
      bar.update(share_2[sub])
      bar.set_postfix(perplexity=f"{perplexity[-1]:.3f}", refresh=False)
  zeros = np.zeros((blocks, 2)).tolist()
  return {
      "removed": removed.tolist(), "schedule": zeros, "threshold": zeros, "order": order, "perplexity": perplexity,
  }, {}


class _Tables:
  """Mean NLL (L,2) of the calibration text without one further sub-block, for any set of removed ones.

  Kept in the calibration's directory: an interrupted calibration goes on, and one for more sparsity starts there.
  """

  def __init__(self, model: Frozen, calibration: Calibration):
    self._model, self._prompts, self._batch = model, calibration.prompts, calibration.batch
    self._path = None if calibration.directory is None else pathlib.Path(calibration.directory) / STATE_FILE
    self._identity = fingerprint(model, calibration.prompts.tokens, calibration.prompts.length)
    self._known = {}
    if self._path and self._path.exists():
      saved = json.loads(self._path.read_text(encoding="utf-8"))
      self._known = saved["tables"] if saved["identity"] == self._identity else {}

  def of(self, removed: np.ndarray, bar: tqdm.tqdm) -> np.ndarray:
    """Those of one set (L,2); infinite at what is removed already."""
    name = " ".join(f"{block}{'am'[sub]}" for block, sub in np.argwhere(removed))
    if name not in self._known:
      self._known[name] = self._evaluate(removed, bar).tolist()
      if self._path:
        with replacing(self._path) as file:
          file.write(json.dumps({"identity": self._identity, "tables": self._known}).encode())
    return np.array(self._known[name])

  def _evaluate(self, removed: np.ndarray, bar: tqdm.tqdm) -> np.ndarray:
    model, total = self._model, np.zeros(removed.shape)
    for batch in batches(self._prompts, self._batch):
      tokens, _, length = batch.counted
      states = _entries(model.config, model.params, tokens, length, removed, dtype=model.dtype)
      for block, sub in np.argwhere(~removed):
        without = removed.copy()
        without[block, sub] = True
        total[block, sub] += float(_nll_from(model.config, model.params, tokens, length, without, states, block))
        bar.set_postfix_str(f"tries block {block}", refresh=False)
    return np.where(removed, np.inf, total / np.sum(self._prompts.length - 1))


class _Parts(NamedTuple):
  """What every block of one pass over fixed rows shares."""

  sin: jax.Array
  cos: jax.Array
  mask: jax.Array


def _parts(config, tokens, length) -> _Parts:
  sin, cos = decoder.angles(config, jnp.arange(tokens.shape[1])[None])
  return _Parts(sin, cos, decoder.causal_mask(config, length, tokens.shape[1]))


def _block(config, params, parts: _Parts, x, removed_Lx2, index):
  """A block without its removed sub-blocks, which cost nothing."""
  apply = lambda method, *args: decoder.Block(config).apply(
      {"params": decoder.block_at(params["blocks"], index)}, *args, method=method
  )

  def attended(x):
    q, k, v = apply(decoder.Block.qkv, x, parts.sin, parts.cos)
    return apply(decoder.Block.attention_out, x, attend(q, k, v, parts.mask))

  x = jax.lax.cond(removed_Lx2[index, 0], lambda x: x, attended, x)
  return jax.lax.cond(removed_Lx2[index, 1], lambda x: x, lambda x: apply(decoder.Block.mlp, x), x)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _entries(config, params, tokens, length, removed_Lx2, *, dtype):
  """States (L,B,T,D) that enter each block."""
  parts = _parts(config, tokens, length)
  step = lambda x, index: (_block(config, params, parts, x, removed_Lx2, index), x)
  return jax.lax.scan(step, decoder.embed(config, params, tokens, dtype), jnp.arange(config.num_blocks))[1]


@functools.partial(jax.jit, static_argnames="config")
def _nll_from(config, params, tokens, length, removed_Lx2, states_LxBxTxD, start):
  """Summed NLL of a pass that begins at block `start`: what comes before is the same for all candidates there."""
  parts = _parts(config, tokens, length)
  step = lambda index, x: _block(config, params, parts, x, removed_Lx2, index)
  x = jax.lax.fori_loop(start, config.num_blocks, step, decoder.block_at(states_LxBxTxD, start))
  return summed_nll(config, params, tokens, length, x)
