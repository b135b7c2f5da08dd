"""Sharded arrays that are filled piece by piece where they live, so that a host never holds more than it must.

Where devices compute in the host's own memory (CPU), a shard is one buffer, filled in place and taken over without a
copy. Elsewhere a shard is allocated on its device and pieces are written into it: the host holds two of them at
most, one that is read and one on its way. Every process makes its own shards and waits for no other.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

IN_PLACE = ("cpu",)  # platforms whose devices compute in the host's memory

Part = tuple[tuple[int, int], ...]  # (start, stop) along each axis of an array


def make_array(
    shape: tuple[int, ...],
    dtype: Any,
    sharding: jax.sharding.Sharding | None,
    cut: Callable[[Part], list[Part]],
    read: Callable[[Part, np.ndarray], None],
) -> jax.Array:
  """An array of `read` values; devices that hold the same part share one reading.

  Args:
    shape: of the whole array.
    dtype: of the array.
    sharding: of the array; None: on the default device, uncommitted.
    cut: gives the pieces, of one shape and covering all, in which a part is to be read.
    read: writes a piece into an array of the piece's shape and `dtype`.
  """
  whole = (slice(None),) * len(shape)
  indices = {None: whole} if sharding is None else sharding.addressable_devices_indices_map(shape)
  holders: dict[Part, list] = {}
  for device, index in indices.items():
    part = tuple(s.indices(size)[:2] for s, size in zip(index, shape))
    holders.setdefault(part, []).append(device)
  arrays = {}
  for part, devices in holders.items():
    platform = devices[0].platform if devices[0] else jax.default_backend()
    fill = _fill_host if platform in IN_PLACE else _fill_devices
    arrays |= zip(devices, fill(part, dtype, cut(part), read, devices))
  if sharding is None:
    return arrays[None]
  return jax.make_array_from_single_device_arrays(shape, sharding, [arrays[d] for d in indices], dtype=dtype)


def shape_of(part: Part) -> tuple[int, ...]:
  return tuple(stop - start for start, stop in part)


def _fill_host(part: Part, dtype: Any, pieces: list[Part], read, devices: list) -> list[jax.Array]:
  """The part on each device, in one buffer of the host."""
  size = math.prod(shape_of(part)) * np.dtype(dtype).itemsize
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64  # the backend copies what does not begin at a multiple of 64
  array = memory[start : start + size].view(dtype).reshape(shape_of(part))
  for piece in pieces:
    read(piece, array[tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(piece, part))])
  return jax.block_until_ready([jax.device_put(array, device) for device in devices])


def _fill_devices(part: Part, dtype: Any, pieces: list[Part], read, devices: list) -> list[jax.Array]:
  """The part on each device, in the device's memory."""
  arrays = []
  if len(pieces) > 1:
    arrays = [jnp.zeros(shape_of(part), dtype, device=device) for device in devices]
  for piece in pieces:
    host = np.empty(shape_of(piece), dtype)
    read(piece, host)
    jax.block_until_ready(arrays)  # the piece before has left the host
    sent = [jax.device_put(host, device) for device in devices]
    at = np.array([start - first for (start, _), (first, _) in zip(piece, part)], np.int32)
    arrays = [_write(array, new, at) for array, new in zip(arrays, sent)] if arrays else sent
  return jax.block_until_ready(arrays)


@functools.partial(jax.jit, donate_argnums=0)
def _write(array: jax.Array, piece: jax.Array, at: jax.Array) -> jax.Array:
  """`array` with `piece` at the indices `at`, in place."""
  return jax.lax.dynamic_update_slice(array, piece, tuple(at), allow_negative_indices=False)
