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
import scipy.linalg

from ftp_jax import sharding
from ftp_jax.data.prompts import Prompts, batches
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import masked, routers
from ftp_jax.routing.config import RoutingConfig


@functools.partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames="sums")
def _add(config: ModelConfig, params: Any, sums: Any, tokens, context, length, weight, *, dtype: Any):
  """Adds a batch to the sums over tokens of n n^T and n u^T (L,D,D), n and u (L,D), u what a block adds."""
  entries, last = masked.dense_entries(config, RoutingConfig(), params, tokens, context, length, dtype=dtype)
  chosen = (jnp.arange(tokens.shape[1])[None] < context[:, None]) * weight[:, None]

  def products(states):
    x, y = (a.astype(jnp.float32) for a in states)
    n, u = (a * chosen[:, :, None] for a in (routers.normed(x), y - x))
    dot = lambda a: sharding.constrain(
        jnp.einsum("btd,bte->de", n, a, precision=jax.lax.Precision.HIGHEST), "embed", None
    )
    return dot(n), dot(u), jnp.sum(n, axis=(0, 1)), jnp.sum(u, axis=(0, 1))

  states = jnp.concatenate([entries.x_BxTxD, last[None]])

  def block(i, sums):  # in place, or the largest of them would be held twice
    return tuple(a.at[i].add(more) for a, more in zip(sums, products((states[i], states[i + 1]))))

  *square, n, u = jax.lax.fori_loop(0, config.num_blocks, block, sums)
  return *(sharding.constrain(a, None, "embed", None) for a in square), *sharding.replicate((n, u))


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
    progress: wraps the list of batches, then that of blocks.
  """
  size = config.num_blocks, config.hidden_size
  zeros = lambda shape, *logical: sharding.place(params, np.zeros(shape, np.float32), *logical)
  with sharding.over(params):
    sums = *(zeros((*size, size[1]), None, "embed") for _ in range(2)), zeros(size), zeros(size)
    for rows in progress(list(batches(prompts, batch, length_buckets))):
      placed = sharding.place(params, (*rows.prompts, rows.weight), "batch")
      sums = _add(config, params, sums, *placed, dtype=dtype)
    sums = [sharding.fetch(params, a) for a in sums]
  count = int(np.sum(prompts.context))
  maps = [_solve(*of_block, count, rank, ridge) for of_block in progress(list(zip(*sums)))]
  return {name: np.stack([of_block[name] for of_block in maps]) for name in maps[0]}


def _solve(gram, cross, n_sum, u_sum, count: int, rank: int, ridge: float) -> dict[str, np.ndarray]:
  """One block's map from the sums over its tokens, see `_add`."""
  gram, cross, n_sum, u_sum = (a.astype(np.float64) for a in (gram, cross, n_sum, u_sum))
  gram = gram - np.outer(n_sum, n_sum) / count
  cross = cross - np.outer(n_sum, u_sum) / count
  weight = np.linalg.solve(gram + ridge * count * np.eye(len(gram)), cross)
  largest = len(gram) - rank, len(gram) - 1  # of ascending eigenvalues
  up = scipy.linalg.eigh(weight.T @ gram @ weight, subset_by_index=largest)[1][:, ::-1].T
  down = weight @ up.T
  bias = (u_sum - n_sum @ down @ up) / count
  return {name: a.astype(np.float32) for name, a in (("bias", bias), ("down", down), ("up", up))}
