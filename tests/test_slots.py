"""Slots of kept tokens, and where their keys and values go in the cache, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from ftp_jax import hardware
from ftp_jax.models.attention import EMPTY
from ftp_jax.routing.cache import as_tiles, from_tiles, put_tiles, write
from ftp_jax.routing.slots import fill_slots, gather, in_chunks


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_slots_of_kept_tokens_by_hand(platform):
  keep = jnp.array([[1, 0, 1, 0, 1], [1, 0, 0, 1, 0], [1, 1, 1, 0, 0]], bool)
  with hardware.tracing_for(platform):
    out = fill_slots(keep, 4)
  np.testing.assert_array_equal(out.position_BxK, [[0, 2, 4, 4], [0, 3, 4, 4], [0, 1, 2, 4]])
  np.testing.assert_array_equal(out.filled_BxK, [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
  slot = np.asarray(out.slot_BxT)
  for row, slots in enumerate([[0, 1, 2], [0, 1], [0, 1, 2]]):
    assert slot[row][np.asarray(keep[row])].tolist() == slots
  assert 0 <= slot.min() and slot.max() <= 3


@pytest.mark.parametrize(
    "offset,tile,expected",
    [
        (2, [1, 2, 3], [-1, -2, 1, 2, 3, -6]),
        (3, [1, 2, 3], [-1, -2, -3, 1, 2, 3]),
        (4, [1, 2, 3], [-1, -2, -3, -4, 1, 2]),
        (5, [1, 2, 3], [-1, -2, -3, -4, -5, 1]),
        (0, [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6]),
        (4, [1, 2, 3, 4, 5, 6, 7, 8], [-1, -2, -3, -4, 1, 2]),
    ],
)
@pytest.mark.parametrize("axis", [1, 2])
def test_a_tile_is_written_where_it_belongs(offset, tile, expected, axis):
  """Also one that is longer than what is left of the buffer, or than the buffer."""
  shaped = lambda a: jnp.asarray(a).reshape((1, -1, 1) if axis == 1 else (1, 1, -1))
  for fits in (False, True) if offset + len(tile) <= 6 else (False,):
    out = write(shaped([-1, -2, -3, -4, -5, -6]), shaped(tile), jnp.int32(offset), axis, fits)
    assert out.ravel().tolist() == expected


def test_tiles_go_into_the_cache_and_come_back():
  """Two blocks of three and two slots in a cache of five: what the first writes too much, the second overwrites."""
  k, v = (jnp.arange(12.0).reshape(2, 3, 1, 2) + start for start in (0, 100))  # B, K, G, N
  key = jnp.array([[0, 4, 7], [1, 2, EMPTY]])
  first, second = as_tiles(k, v, key, 4), as_tiles(k[:, :2] + 50, v[:, :2] + 50, key[:, :2], 4)
  assert [a.shape for a in first] == [(2, 1, 2, 4), (2, 1, 4, 2), (2, 4)]
  assert first[0][0, 0].tolist() == [[0, 2, 4, 0], [1, 3, 5, 0]] and first[2][0].tolist() == [0, 4, 7, EMPTY]
  buffers = jnp.zeros((2, 1, 2, 5)), jnp.zeros((2, 1, 5, 2)), jnp.full((2, 5), EMPTY)
  buffers = put_tiles(buffers, first, jnp.int32(0), fits=False)
  buffers = put_tiles(buffers, second, jnp.int32(3), fits=False)
  np.testing.assert_array_equal(buffers[2], [[0, 4, 7, 0, 4], [1, 2, EMPTY, 1, 2]])
  held = from_tiles(*buffers[:2])
  np.testing.assert_array_equal(held[0], jnp.concatenate([k, k[:, :2] + 50], axis=1))
  np.testing.assert_array_equal(held[1], jnp.concatenate([v, v[:, :2] + 50], axis=1))


@pytest.mark.parametrize("num_slots, largest, seen", [(4, 4, [4]), (5, 4, [3]), (9, 4, [3]), (10, 4, [4]), (1, 4, [1])])
def test_chunks_are_of_nearly_equal_size(num_slots, largest, seen):
  """One traced size for all chunks; slots that fill the last one are cut off again."""
  sizes = []

  def double(x_BxKxD):
    sizes.append(x_BxKxD.shape[1])
    return jnp.concatenate([x_BxKxD, x_BxKxD], axis=-1) * 2

  x = jnp.arange(2.0 * num_slots * 3).reshape(2, num_slots, 3)
  out = in_chunks(double, x, largest)
  assert sizes == seen
  np.testing.assert_array_equal(out, jnp.concatenate([x, x], axis=-1) * 2)


def test_gathered_tokens_are_those_of_their_row():
  x = jnp.arange(12).reshape(2, 3, 2)
  out = gather(x, jnp.array([[2, 0, 2, 1], [1, 1, 0, 2]]))
  assert out[:, :, 0].tolist() == [[4, 0, 4, 2], [8, 8, 6, 10]]
