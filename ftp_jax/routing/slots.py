"""Slots of the tokens that a block computes: which token stands where, and taking tokens there and back."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftp_jax import hardware


class Slots(NamedTuple):
  """The kept tokens of one block, in order, in K slots.

  Attributes:
    position_BxK: which token; the last position of the padded context in padding slots.
    filled_BxK: the slot holds a token.
    slot_BxT: the slot of each kept token; in range, but meaningless, for the others.
  """

  position_BxK: jax.Array
  filled_BxK: jax.Array
  slot_BxT: jax.Array


def fill_slots(keep_BxT: jax.Array, num_slots: int) -> Slots:
  """Slots of the kept tokens, of which no row has more than `num_slots`."""
  num_positions = keep_BxT.shape[1]
  kept_so_far = jnp.cumsum(keep_BxT, axis=1)
  platform = hardware.platform()
  if platform == "gpu":
    # Its compiler would add up the counts anew for every element of whatever is taken by them.
    kept_so_far = jax.lax.optimization_barrier(kept_so_far)
    position = jax.vmap(functools.partial(_scattered, num_slots))(keep_BxT, kept_so_far)
  else:
    # Slot k holds the first position up to which k + 1 tokens are kept. A TPU, which takes single numbers out of an
    # array one by one, compares whole vectors with all positions instead of searching.
    lanes, method = (hardware.LANES, "compare_all") if platform == "tpu" else (1, "scan")
    slot = jnp.arange(1, num_slots + 1 + -num_slots % lanes)
    position = jax.vmap(lambda count: jnp.searchsorted(count, slot, method=method)[:num_slots])(kept_so_far)
  slot = jnp.clip(kept_so_far - 1, 0, num_slots - 1)
  return Slots(jnp.minimum(position, num_positions - 1), position < num_positions, slot)


def _scattered(num_slots: int, keep_T: jax.Array, kept_so_far_T: jax.Array) -> jax.Array:
  """Positions (K,) of the kept tokens, T in slots without one: one small program, where a search has one a step."""
  size = len(keep_T)
  at = jnp.where(keep_T, kept_so_far_T - 1, num_slots + jnp.arange(size))
  return jnp.full(num_slots, size).at[at].set(jnp.arange(size), mode="drop", unique_indices=True)


def gather(x_BxTxD: jax.Array, index_BxK: jax.Array) -> jax.Array:
  """Rows (B,K,...) of x; every index is in range."""
  return jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(x_BxTxD, index_BxK)


def in_chunks(function: Callable[[jax.Array], jax.Array], x_BxKxD: jax.Array, largest: int) -> jax.Array:
  """A function of single tokens, computed in chunks of at most `largest` slots and nearly equal size, one by one."""
  num_slots = x_BxKxD.shape[1]
  chunks = -(-num_slots // largest)
  if chunks == 1:
    return function(x_BxKxD)
  size = -(-num_slots // chunks)
  x = jnp.pad(x_BxKxD, ((0, 0), (0, chunks * size - num_slots), (0, 0)))
  x = jnp.swapaxes(x.reshape(x.shape[0], chunks, size, -1), 0, 1)
  y = jnp.swapaxes(jax.lax.map(function, x), 0, 1)
  return y.reshape(y.shape[0], chunks * size, -1)[:, :num_slots]
