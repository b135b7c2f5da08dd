"""Fits the linear maps that stand in for skipped blocks (`routing.stand_in`), in closed form.

For each block the ridge regression from the normed states n that enter it to what it adds to them, over the context
tokens of the training prompts in the dense model; then the map of rank R that is nearest to it on those tokens
(reduced-rank regression): the R directions of the block's predicted updates in which these vary most.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax import sharding
from ftp_jax.data.prompts import Prompts, batches
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import masked, routers
from ftp_jax.routing.config import RoutingConfig


@functools.partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames="sums")
def _add(config: ModelConfig, params: Any, sums: Any, tokens, context, length, weight, *, dtype: Any):
  """Adds a batch to the sums over tokens of n n^T (L,E,E) and n u^T (L,E,D), n with a constant, u a block's update."""
  entries, last = masked.dense_entries(config, RoutingConfig(), params, tokens, context, length, dtype=dtype)
  chosen = (jnp.arange(tokens.shape[1])[None] < context[:, None]) * weight[:, None]

  def products(states):
    x, y = (a.astype(jnp.float32) for a in states)
    n = jnp.concatenate([routers.normed(x), jnp.ones_like(x[..., :1])], axis=-1) * chosen[:, :, None]
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return dot("bte,btf->ef", n, n), dot("bte,btd->ed", n, y - x)

  after = jnp.concatenate([entries.x_BxTxD[1:], last[None]])
  return jax.tree.map(jnp.add, sums, jax.lax.map(products, (entries.x_BxTxD, after)))


def fit(
    config: ModelConfig,
    params: Any,
    prompts: Prompts,
    batch: int,
    *,
    rank: int,
    ridge: float,
    dtype: Any,
    length_buckets: Sequence[int] = (),
    progress: Any = lambda rows: rows,
) -> dict[str, np.ndarray]:
  """The maps of all blocks, as `routing.stand_in.attach` takes them, fp32.

  Args:
    params: of the dense model.
    rank: R, at most the hidden size.
    ridge: penalty on the squared weights, a token; states have the root mean square 1.
    progress: wraps the list of batches.
  """
  blocks, size = config.num_blocks, config.hidden_size
  shapes = (blocks, size + 1, size + 1), (blocks, size + 1, size)
  with sharding.over(params):
    sums = sharding.place(params, tuple(np.zeros(shape, np.float32) for shape in shapes))
    for rows in progress(list(batches(prompts, batch, length_buckets))):
      placed = sharding.place(params, (*rows.prompts, rows.weight), "batch")
      sums = _add(config, params, sums, *placed, dtype=dtype)
  maps = [_solve(*jax.device_get(jax.tree.map(lambda a: a[block], sums)), rank, ridge) for block in range(blocks)]
  return {name: np.stack([of_block[name] for of_block in maps]) for name in maps[0]}


def _solve(gram_ExE: np.ndarray, cross_ExD: np.ndarray, rank: int, ridge: float) -> dict[str, np.ndarray]:
  """One block's map from the sums over its tokens, of which the constant's row holds those of n and u."""
  gram, cross = gram_ExE.astype(np.float64), cross_ExD.astype(np.float64)
  count, n_sum, u_sum = gram[-1, -1], gram[-1, :-1], cross[-1]
  gram = gram[:-1, :-1] - np.outer(n_sum, n_sum) / count
  cross = cross[:-1] - np.outer(n_sum, u_sum) / count
  weight = np.linalg.solve(gram + ridge * count * np.eye(len(gram)), cross)
  up = np.linalg.eigh(weight.T @ gram @ weight)[1][:, ::-1][:, :rank].T  # largest eigenvalues first
  down = weight @ up.T
  bias = (u_sum - n_sum @ down @ up) / count
  return {name: a.astype(np.float32) for name, a in (("bias", bias), ("down", down), ("up", up))}
