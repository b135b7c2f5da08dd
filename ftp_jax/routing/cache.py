"""The KV cache of a routed prefill, and the room for tokens generated after it.

The context cache is one buffer for all blocks: block i owns the slots [offset_i, offset_i + size_i) of the
plan. A block that evicts has slots for the tokens it keeps only, so the buffer is really smaller. It is
read-only after the prefill, so decode loops carry the small `Recent` alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from ftp_jax import hardware
from ftp_jax.models.attention import EMPTY
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing.plan import Plan
from ftp_jax.sharding import constrain, map_devices, replicate


class Cache(NamedTuple):
  """Keys and values of the context, S slots in all blocks together.

  Attributes:
    k_BxGxNxS: keys, rope applied, slots last: the layout of the product with a query.
    v_BxGxSxN: values.
    position_BxS: position of the token in each slot, EMPTY where there is none, ascending inside a block.
    keep_LxBxT: routes of the context tokens.
    context_B: context lengths.
    row_B: what seeds the random router.
    least_LxB: `selection.least_kept_margin` of the context, for the decode rule `quantile`.
  """

  k_BxGxNxS: jax.Array
  v_BxGxSxN: jax.Array
  position_BxS: jax.Array
  keep_LxBxT: jax.Array
  context_B: jax.Array
  row_B: jax.Array
  least_LxB: jax.Array

  def rows(self, index_R: jax.Array) -> "Cache":
    """The cache of the chosen rows, repeated where an index is: one prefill, several continuations."""
    take = lambda a: jnp.take(a, index_R, axis=0)
    of_blocks = lambda a: jnp.take(a, index_R, axis=1)
    return Cache(
        *map(take, self[:3]), of_blocks(self.keep_LxBxT), take(self.context_B), take(self.row_B),
        of_blocks(self.least_LxB),
    )


class Recent(NamedTuple):
  """Keys and values of continuation tokens, M slots in every block; token j of each row has slot j.

  Attributes:
    computed_LxBxM: the token computed the block, so that under `evict` it can be seen there.
    count: tokens so far.
  """

  k_LxBxGxMxN: jax.Array
  v_LxBxGxMxN: jax.Array
  computed_LxBxM: jax.Array
  count: jax.Array


def empty_cache(config: ModelConfig, plan: Plan, batch: int, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Buffers (k_BxGxNxS, v_BxGxSxN, position_BxS) before a prefill, which writes every slot of theirs."""
  slots = sum(plan.cache_slots)
  shape = (batch, config.num_kv_heads, config.head_dim, slots)
  position = constrain(jnp.full((batch, slots), EMPTY, jnp.int32), "batch", None)
  of_heads = lambda *shape: constrain(jax.lax.empty(shape, dtype), "batch", "kv_heads", None, None)
  return of_heads(*shape), of_heads(*shape[:2], slots, config.head_dim), position


def empty_recent(config: ModelConfig, batch: int, room: int, dtype) -> Recent:
  """Room for M = `room` new tokens of every row, none of them taken."""
  shape = (config.num_blocks, batch, config.num_kv_heads, room, config.head_dim)
  k, v = (constrain(jnp.zeros(shape, dtype), None, "batch", "kv_heads", None, None) for _ in range(2))
  computed = constrain(jnp.zeros((config.num_blocks, batch, room), bool), None, "batch", None)
  return Recent(k, v, computed, replicate(jnp.zeros((), jnp.int32)))


def write(buffer: jax.Array, tile: jax.Array, offset: jax.Array, axis: int, fits: bool) -> jax.Array:
  """Writes a tile at `offset` along `axis`.

  Blocks write tiles of one size in their order, and what a tile has beyond its block's slots is overwritten
  by the next: the write needs no branch, which would copy the buffer. Near the end the buffer may be shorter
  than a tile; there the write starts earlier and puts back what it finds.

  Args:
    fits: no tile reaches beyond the buffer (static).
  """
  if fits:
    return jax.lax.dynamic_update_slice_in_dim(buffer, tile, offset, axis)
  room = buffer.shape[axis]
  size = min(tile.shape[axis], room)
  start = jnp.minimum(offset, room - size)

  def moved(tile):
    shift = offset - start
    old = jax.lax.dynamic_slice_in_dim(buffer, start, size, axis)
    doubled = jnp.concatenate([tile, tile], axis=axis)
    at = jax.lax.broadcasted_iota(jnp.int32, tile.shape, axis)
    return jnp.where(at < shift, old, jax.lax.dynamic_slice_in_dim(doubled, size - shift, size, axis))

  tile = jax.lax.slice_in_dim(tile, 0, size, axis=axis)
  tile = jax.lax.cond(offset > start, moved, lambda tile: tile, tile)
  return jax.lax.dynamic_update_slice_in_dim(buffer, tile, start, axis)


def as_tiles(k_BxKxGxN, v_BxKxGxN, key_BxK, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Keys, values and positions as the cache holds them, (B,G,N,size), (B,G,size,N) and (B,size); size >= K.

  Slots beyond K are empty.
  """
  spare = size - key_BxK.shape[1]
  pad = lambda a, axis, value: jnp.pad(
      a, [(0, spare if i == axis else 0) for i in range(a.ndim)], constant_values=value
  )
  return (
      pad(k_BxKxGxN.transpose(0, 2, 3, 1), 3, 0), pad(v_BxKxGxN.transpose(0, 2, 1, 3), 2, 0), pad(key_BxK, 1, EMPTY)
  )


def from_tiles(k_BxGxNxS: jax.Array, v_BxGxSxN: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Keys and values (B,S,G,N) of parts of the cache."""
  return k_BxGxNxS.transpose(0, 3, 1, 2), v_BxGxSxN.transpose(0, 2, 1, 3)


def put_tiles(buffers, tiles, offset: jax.Array, fits: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The buffers of `empty_cache` with a block's tiles written at its offset; `fits` as in `write`."""
  written = tuple(
      write(_in_order(buffer), tile, offset, axis, fits) for buffer, tile, axis in zip(buffers, tiles, (3, 2, 1))
  )
  return tuple(map(_in_order, written))


def _in_order(buffer: jax.Array) -> jax.Array:
  """A buffer that a TPU keeps in the order that the prefill returns, or else all of it would be copied at the end."""
  if hardware.platform() != "tpu":
    return buffer
  names = ("batch", "kv_heads", None, None) if buffer.ndim == 4 else ("batch", None)
  in_order = lambda a: with_layout_constraint(a, Layout(tuple(range(a.ndim))))
  return map_devices(in_order, (buffer,), [names], names)  # XLA would gather what it cannot partition
