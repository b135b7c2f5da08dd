"""Attention: softmax in fp32, grouped-query heads; two forms behind one meaning.

`attend` takes any boolean mask and materialises all scores: the reference, and the form through
which gradients reach a gate. `attend_positions` is told where queries and keys stand and works in
tiles, with memory independent of the product of their numbers: the form of every prefill that has
to be fast. Its implementations are XLA here and, in `kernels`, cuDNN on GPU and splash on TPU.
`attention_rows` gives the probabilities of a few query rows, which no fused kernel returns, `attention_paid` their
weighted sum.
`attend_cached` is the form of a few new tokens over a cache.
"""

import functools
import math

import jax
import jax.numpy as jnp

from ftp_jax import hardware, sharding

_LOWEST = -1e30
# Position of an empty key slot: no query sees it.
EMPTY = 2**30
# Tile sizes of the XLA implementation: the fastest of those tried on a CPU with 1 MiB of L2 cache a core. A tile of
# queries takes its keys in parts, of which the last is cut to a multiple of the grain; each such size is a branch.
_QUERY_TILE, _KEY_PART, _KEY_GRAIN = 128, 1024, 128
_CHUNK_BYTES = 2**28  # of the scores that `attend_chunks` holds


def _scores(q_BxTxHxN, k_BxSxGxN):
  """Scaled scores (B,G,H/G,T,S) in fp32."""
  batch, rows, heads, dim = q_BxTxHxN.shape
  groups = k_BxSxGxN.shape[2]
  # One plain matrix product for each group, which a CPU computes faster than the contraction as it stands.
  q = q_BxTxHxN.reshape(batch, rows, groups, -1, dim).transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, dim)
  k = k_BxSxGxN.transpose(0, 2, 3, 1)
  scores = jnp.einsum("bgqn,bgns->bgqs", q, k, preferred_element_type=jnp.float32) * dim**-0.5
  return scores.reshape(batch, groups, heads // groups, rows, -1)


def _weights(scores, mask_BxTxS, key_gate_BxS):
  """Attention weights (B,G,H/G,T,S); rows that see no key are all zero.

  `key_gate` lets gradients reach the decision to keep a key: it multiplies the exponentiated
  scores, so 0 removes a key exactly as masking it does, and the derivative at 0 is finite.
  """
  mask = mask_BxTxS[:, None, None]
  if key_gate_BxS is None:
    seen = mask
  else:
    gate = key_gate_BxS[:, None, None, None]
    seen = mask & (jax.lax.stop_gradient(gate) > 0)
  top = jax.lax.stop_gradient(jnp.max(jnp.where(seen, scores, _LOWEST), axis=-1, keepdims=True))
  # Removed keys may exceed the largest kept one; bounded, their derivative stays finite.
  powers = jnp.where(mask, jnp.exp(jnp.minimum(scores - top, 20.0)), 0.0)
  if key_gate_BxS is not None:
    powers = powers * gate
  total = jnp.sum(powers, axis=-1, keepdims=True)
  return powers / jnp.where(total == 0, 1.0, total)


def attend(
    q_BxTxHxN: jax.Array,
    k_BxSxGxN: jax.Array,
    v_BxSxGxN: jax.Array,
    mask_BxTxS: jax.Array,
    key_gate_BxS: jax.Array | None = None,
) -> jax.Array:
  """Attended values (B,T,H,N); a query that sees no key gets zeros."""
  weights = _weights(_scores(q_BxTxHxN, k_BxSxGxN), mask_BxTxS, key_gate_BxS).astype(v_BxSxGxN.dtype)
  out = jnp.einsum("bghts,bsgn->btghn", weights, v_BxSxGxN)
  return out.reshape(q_BxTxHxN.shape)


def attention_rows(q_BxTxHxN, k_BxSxGxN, mask_BxTxS) -> jax.Array:
  """Attention probabilities (B,T,S), averaged over query heads, of a few query rows."""
  return jnp.mean(_weights(_scores(q_BxTxHxN, k_BxSxGxN), mask_BxTxS, None), axis=(1, 2))


def attention_paid(q_BxTxHxN, k_BxSxGxN, mask_BxTxS, weight_BxT) -> jax.Array:
  """The probabilities of `attention_rows`, times the rows' weights, summed over the rows, (B,S)."""
  scores = jnp.where(mask_BxTxS[:, None, None], _scores(q_BxTxHxN, k_BxSxGxN), _LOWEST)
  top = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
  powers = jnp.exp(scores - top[..., None])  # 0 where a key is not seen, but in rows that see none
  weight = jnp.where(top > _LOWEST, weight_BxT[:, None, None], 0.0)
  paid_BxS = jnp.einsum("bghts,bght->bs", powers, weight / jnp.sum(powers, axis=-1))
  return paid_BxS / q_BxTxHxN.shape[2]


def visible(query_BxT: jax.Array, key_BxS: jax.Array, window: int | None) -> jax.Array:
  """(B,T,S) boolean: the key stands at or before the query, and in its window of that many positions."""
  mask = key_BxS[:, None, :] <= query_BxT[:, :, None]
  if window:
    mask &= query_BxT[:, :, None] - key_BxS[:, None, :] < window
  return mask


def attend_cached(
    q_BxCxHxN: jax.Array,
    k_BxGxNxS: jax.Array,
    v_BxGxSxN: jax.Array,
    mask_BxCxS: jax.Array,
    k_BxGxMxN: jax.Array,
    v_BxGxMxN: jax.Array,
    mask_BxCxM: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Attention of few queries to two sets of keys, without joining them: the context's and the recent tokens'.

  Returns:
    Attended values (B,C,H,N), and the probabilities of both sets, mean over heads, (B,C,S) and (B,C,M) in fp32.
  """
  batch, num_queries, heads, dim = q_BxCxHxN.shape
  groups = k_BxGxNxS.shape[1]
  per_group = heads // groups
  q = q_BxCxHxN.reshape(batch, num_queries, groups, per_group, dim).transpose(0, 2, 1, 3, 4)
  rows = num_queries * per_group
  whole = functools.partial(hardware.whole_rows, rows=rows)
  q = whole(q.reshape(batch, groups, rows, dim) * dim**-0.5)
  product = lambda spec, a, b: jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
  masked = lambda scores, mask: jnp.where(whole(jnp.repeat(mask, per_group, axis=1))[:, None], scores, _LOWEST)
  old = masked(product("bgqn,bgns->bgqs", q, k_BxGxNxS), mask_BxCxS)
  new = masked(product("bgqn,bgmn->bgqm", q, k_BxGxMxN), mask_BxCxM)
  top = jnp.maximum(jnp.max(old, axis=-1, keepdims=True), jnp.max(new, axis=-1, keepdims=True))
  old, new = jnp.exp(old - top), jnp.exp(new - top)
  total = jnp.sum(old, axis=-1, keepdims=True) + jnp.sum(new, axis=-1, keepdims=True)
  out = product("bgqs,bgsn->bgqn", old.astype(v_BxGxSxN.dtype), v_BxGxSxN)
  out = (out + product("bgqm,bgmn->bgqn", new.astype(v_BxGxMxN.dtype), v_BxGxMxN)) / total
  out = out[:, :, :rows].reshape(batch, groups, num_queries, per_group, dim).transpose(0, 2, 1, 3, 4)
  out = out.reshape(q_BxCxHxN.shape).astype(q_BxCxHxN.dtype)
  mean = lambda a: (a / total)[:, :, :rows].reshape(batch, groups, num_queries, per_group, -1).mean(axis=(1, 3))
  return out, mean(old), mean(new)


def attend_positions(
    q_BxTxHxN: jax.Array,
    k_BxSxGxN: jax.Array,
    v_BxSxGxN: jax.Array,
    query_BxT: jax.Array,
    key_BxS: jax.Array,
    window: int | None = None,
) -> jax.Array:
  """Attended values (B,T,H,N) of queries and keys that stand at given positions.

  Args:
    query_BxT: positions of the queries, ascending in each row; -1 at padding slots, which come last
      and whose results are meaningless but finite. Tiles in which no row has a query cost nothing.
    key_BxS: positions of the keys, ascending in each row; EMPTY at padding slots. Every query sees a key.
    window: sliding window, or None.
  """
  batch, num_queries, heads, dim = q_BxTxHxN.shape
  num_keys, groups = k_BxSxGxN.shape[1:3]
  per_group = heads // groups
  tile = min(num_queries, _QUERY_TILE)
  tiles = -(-num_queries // tile)
  # Few queries take as many more keys at once, but in a window, outside of which whole grains are left out.
  wider = 1 if window else _QUERY_TILE // tile
  grain = min(num_keys, _KEY_GRAIN * wider)
  parts = -(-num_keys // (_KEY_PART * wider))
  part = -(-num_keys // (parts * grain)) * grain
  # The last query ends the last tile, and what does not fill one is in the first, whose keys are few. Its other slots
  # hold queries of the second, or padding, which do not count there.
  num_valid = jnp.max(jnp.sum(query_BxT >= 0, axis=1))
  busy = -(-num_valid // tile)
  stop = num_valid - (busy - 1 - jnp.arange(tiles)) * tile
  start = jnp.clip(stop - tile, 0, num_queries - tile)
  slot = start[:, None] + jnp.arange(tile)[None]
  query = jnp.where(slot < stop[:, None], query_BxT[:, slot], -1).transpose(1, 0, 2)

  key = _pad(key_BxS, parts * part, EMPTY)
  k = _pad(k_BxSxGxN, parts * part).transpose(0, 2, 3, 1)
  # A column of ones gives the sum of the weights from the same matrix product.
  v = jnp.concatenate([v_BxSxGxN, jnp.ones_like(v_BxSxGxN[..., :1])], axis=-1)
  v = _pad(v, parts * part).transpose(0, 2, 1, 3)

  # Of the keys, a tile of queries sees none outside of the slots [begin, end), and without a window all in [0, clear).
  # A row without a query in the tile does not limit what the others leave out.
  newest = jnp.max(query, axis=-1)
  oldest = jnp.min(jnp.where(query < 0, 2 * EMPTY - 1, query), axis=-1)
  count = lambda position: jnp.sum(key_BxS[None] <= position[:, :, None], axis=-1)
  end = jnp.max(count(newest), axis=1)
  begin, clear = jnp.zeros_like(end), jnp.min(count(oldest), axis=1)
  if window:
    begin, clear = jnp.min(count(oldest - window), axis=1) // grain * grain, jnp.zeros_like(end)
  # Keys are taken in whole parts, and at last in the smallest multiple of the grain that holds the rest.
  whole = jnp.maximum(end - begin - 1, 0) // part
  whole_clear = jnp.minimum(clear // part, whole)
  rest = begin + whole * part
  sizes = range(grain, part + 1, grain)
  last = jnp.maximum(end - rest - 1, 0) // grain

  def rows(i, out):
    q = jax.lax.dynamic_slice_in_dim(q_BxTxHxN, start[i], tile, axis=1) * dim**-0.5
    q = q.reshape(batch, tile, groups, per_group, dim).transpose(0, 2, 1, 3, 4)
    q = q.reshape(batch, groups, tile * per_group, dim)
    row_position = jnp.repeat(query[i], per_group, axis=1)

    def accumulate(size, masked, first, carry):
      top, out = carry
      slice_of = lambda a, axis: jax.lax.dynamic_slice_in_dim(a, first, size, axis)
      scores = jnp.einsum("bgqn,bgns->bgqs", q, slice_of(k, 3), preferred_element_type=jnp.float32)
      if masked:
        mask = visible(row_position, slice_of(key, 1), window)
        scores = jnp.where(mask[:, None], scores, _LOWEST)
      higher = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
      # Rows that have seen nothing yet gather weights of 1; the first key they see wipes them out.
      weights = jnp.exp(scores - higher).astype(v.dtype)
      added = jnp.einsum("bgqs,bgsn->bgqn", weights, slice_of(v, 2), preferred_element_type=jnp.float32)
      return higher, out * jnp.exp(top - higher) + added

    def part_at(masked):
      return lambda j, carry: accumulate(part, masked, begin[i] + j * part, carry)

    zero = jnp.zeros(q.shape[:-1] + (dim + 1,), jnp.float32)
    carry = jnp.full_like(zero[..., :1], _LOWEST), zero
    if parts > 1:
      if not window:
        carry = jax.lax.fori_loop(0, whole_clear[i], part_at(False), carry)
      carry = jax.lax.fori_loop(whole_clear[i], whole[i], part_at(True), carry)
    branches = [functools.partial(accumulate, size, True) for size in sizes]
    _, sums = jax.lax.switch(last[i], branches, rest[i], carry)
    attended = (sums[..., :-1] / sums[..., -1:]).astype(q.dtype)
    attended = attended.reshape(batch, groups, tile, per_group, dim).transpose(0, 2, 1, 3, 4)
    return jax.lax.dynamic_update_slice_in_dim(out, attended.reshape(batch, tile, heads, dim), start[i], axis=1)

  # Tiles without a query are not computed.
  return jax.lax.fori_loop(0, busy, rows, jnp.zeros_like(q_BxTxHxN))


def attend_chunks(
    q_BxTxHxN: jax.Array,
    k_BxSxGxN: jax.Array,
    v_BxSxGxN: jax.Array,
    query_BxT: jax.Array,
    key_BxS: jax.Array,
    window: int | None = None,
) -> jax.Array:
  """`attend_positions` for a TPU, where its many small steps, of which data say how many, are slow.

  Made for few queries: it computes all pairs. All scores of a chunk of queries are there at once, as many queries as
  keep them within 256 MiB on each device.
  """
  batch, num_queries, heads, _ = q_BxTxHxN.shape
  num_keys, groups = k_BxSxGxN.shape[1:3]
  devices = math.prod(sharding.context().get(axis, 1) for axis in ("data", "fsdp", "tensor"))
  chunks = -(-num_queries // max(_CHUNK_BYTES * devices // (4 * batch * heads * num_keys), 1))
  # A group of heads has at least the rows of `hardware.whole_rows`.
  size = max(-(-num_queries // chunks), -(-hardware.SUBLANES // (heads // groups)))
  chunks = -(-num_queries // size)
  spare = (0, chunks * size - num_queries)
  q = jnp.pad(q_BxTxHxN, ((0, 0), spare, (0, 0), (0, 0))).reshape(batch, chunks, size, heads, -1)
  query = jnp.pad(query_BxT, ((0, 0), spare), constant_values=-1).reshape(batch, chunks, size)
  v_BxGxSxN = v_BxSxGxN.swapaxes(1, 2)

  def chunk(part):
    q_BxCxHxN, query_BxC = part
    weights = _weights(_scores(q_BxCxHxN, k_BxSxGxN), visible(query_BxC, key_BxS, window), None)
    weights = weights.astype(v_BxSxGxN.dtype).reshape(batch, groups, -1, num_keys)
    out = jnp.einsum("bgqs,bgsn->bgqn", weights, v_BxGxSxN)
    return out.reshape(batch, heads, size, -1).swapaxes(1, 2)

  out = jax.lax.map(chunk, (q.swapaxes(0, 1), query.swapaxes(0, 1))).swapaxes(0, 1)
  return out.reshape((batch, chunks * size) + q_BxTxHxN.shape[2:])[:, :num_queries]


def _pad(a: jax.Array, size: int, value: int = 0) -> jax.Array:
  """Pads axis 1 to `size`."""
  return jnp.pad(a, [(0, 0), (0, size - a.shape[1])] + [(0, 0)] * (a.ndim - 2), constant_values=value)
