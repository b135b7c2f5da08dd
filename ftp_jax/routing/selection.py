"""Capacity and selection: margins -> keep mask. Every execution calls these functions.

Source: docs/method.md section 4. Ties break by position, the later token first, so that routes
are reproducible in every execution and framework.
"""

import jax
import jax.numpy as jnp

from ftp_jax import hardware
from ftp_jax.routing.config import RoutingConfig

# Sparsities count in steps of 1 / _STEPS: integers round alike in every compiler, on every machine and in every
# framework, where (1 - s) * m in fp32 does not. 2^6 5^4 holds the usual grids; its square fits into 32 bits.
_STEPS = 40_000
# Margins that differ by less than this share of the larger of 1 and the second count as equal where a new token's is
# compared with a context token's: equal inputs give equal margins, but for the rounding of programs of other shapes.
_ROUNDING = 1e-5
_MOST_RECENT = 4  # recent tokens are at most the 4th part of a context: a shorter one has none


def capacity(sparsity: jax.Array, context_B: jax.Array, bucket_multiple: int = 1) -> jax.Array:
  """Token slots (B,) a block computes for each row's context.

  ceil((1 - s) m) rounded up to a multiple of `bucket_multiple`, at least the forced tokens
  (the first and the last), at most m; s is taken to the nearest 1 / 40000.
  """
  steps = jnp.round(sparsity * _STEPS).astype(jnp.int32)
  # floor(s m), in two parts so that long contexts stay within 32 bits.
  skipped = steps * (context_B // _STEPS) + steps * (context_B % _STEPS) // _STEPS
  wanted = context_B - skipped
  wanted = -(-jnp.maximum(wanted, 2) // bucket_multiple) * bucket_multiple
  return jnp.minimum(wanted, context_B)


def descending_rank(values_BxT: jax.Array, valid_BxT: jax.Array) -> jax.Array:
  """Rank (B,T) of each value in its row, 0 = largest; equal values rank the later one first.

  Invalid positions rank behind all valid ones.
  """
  last = values_BxT.shape[1] - 1
  keys_BxT = _order_keys(jnp.where(valid_BxT, values_BxT, -jnp.inf))
  if hardware.platform() == "tpu":  # which sorts pairs, but takes single numbers one by one
    return last - jnp.argsort(jnp.argsort(keys_BxT, axis=1, stable=True), axis=1)
  # Positions by rank; scattering their ranks back is cheaper than another sort.
  order = last - _ascending_order(~keys_BxT[:, ::-1])
  rank = jnp.broadcast_to(jnp.arange(last + 1, dtype=jnp.int32)[None], order.shape)
  return jax.vmap(lambda at, r: jnp.zeros_like(r).at[at].set(r, unique_indices=True))(order, rank)


def _ascending_order(keys_BxT: jax.Array) -> jax.Array:
  """Indices (B,T) that sort each row's int32 keys, equal ones in their order.

  By their halves, with the index in the other half: a CPU sorts single integers several times as fast as pairs.
  """
  size = keys_BxT.shape[1]
  if size > 1 << 16:
    return jnp.argsort(keys_BxT, axis=1, stable=True)
  unsigned = jax.lax.bitcast_convert_type(keys_BxT, jnp.uint32) ^ jnp.uint32(1 << 31)
  index = jnp.arange(size, dtype=jnp.uint32)[None]
  order = jnp.broadcast_to(index, keys_BxT.shape).astype(jnp.int32)
  for half_BxT in (unsigned & 0xFFFF, unsigned >> 16):  # the lower one first: the second sort leaves equals as they are
    packed = jnp.take_along_axis(half_BxT, order, axis=1) * jnp.uint32(size) + index
    packed = jax.lax.sort(packed, dimension=1, is_stable=False)
    order = jnp.take_along_axis(order, (packed % jnp.uint32(size)).astype(jnp.int32), axis=1)
  return order


def _order_keys(values: jax.Array) -> jax.Array:
  """int32 in the order of fp32 values, which are not NaN; -0 counts as 0. A CPU sorts them several times as fast."""
  return _fold(jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values).astype(jnp.float32), jnp.int32))


def _fold(bits: jax.Array) -> jax.Array:
  """The bits of fp32 values to integers of the same order, and back."""
  return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _kth_largest(keys_BxT: jax.Array, k_B: jax.Array) -> jax.Array:
  """The k-th largest of each row's integers, (B,1); 1 <= k <= T."""
  ascending = jax.lax.sort(keys_BxT, dimension=1, is_stable=False)
  return jnp.take_along_axis(ascending, keys_BxT.shape[1] - k_B[:, None], axis=1)


def forced_tokens(context_B: jax.Array, num_positions: int) -> jax.Array:
  """(B,T) boolean: the first (attention sink) and the last context token, always computed."""
  t = jnp.arange(num_positions)[None]
  return (t == 0) | (t == context_B[:, None] - 1)


def recent_tokens(context_B: jax.Array, num_positions: int, routing: RoutingConfig) -> jax.Array:
  """(B,T) boolean: the last `routing.recent_tokens` of contexts of at least four times as many, first to be kept."""
  t, m, count = jnp.arange(num_positions)[None], context_B[:, None], routing.recent_tokens
  return (t >= m - count) & (t < m) & (m >= _MOST_RECENT * count)


def first_to_keep(value: jax.Array, context_B: jax.Array, routing: RoutingConfig) -> jax.Array:
  """Values (...,B,T) that tokens are ranked by, with those of recent ones above all others but infinite ones."""
  if not routing.recent_tokens:
    return value
  recent_BxT = recent_tokens(context_B, value.shape[-1], routing)
  return jnp.where(jnp.broadcast_to(recent_BxT, value.shape), jnp.finfo(jnp.float32).max, value)


def select(margin_BxT, capacity_B, forced_BxT, valid_BxT, selection: str) -> jax.Array:
  """Which context tokens are computed.

  Args:
    margin_BxT: what tokens are ranked by, fp32: compute logit minus skip logit but as `first_to_keep` changes it.
    capacity_B: slots of each row, at least its number of forced tokens.
    forced_BxT: tokens computed whatever their margin; they take slots first.
    valid_BxT: the context tokens.
    selection: `topk` or `argmax`.

  Returns:
    keep_BxT, boolean; False outside `valid_BxT`.
  """
  forced_BxT &= valid_BxT
  key_BxT = _order_keys(jnp.where(valid_BxT, jnp.where(forced_BxT, jnp.inf, margin_BxT), -jnp.inf))
  least_B1 = _kth_largest(key_BxT, capacity_B)
  # Tokens with a larger margin than the last that gets a slot are kept, and of its equals the later ones.
  larger, equal = key_BxT > least_B1, key_BxT == least_B1
  slots_B1 = capacity_B[:, None] - jnp.sum(larger, axis=1, keepdims=True)
  later = jnp.cumsum(equal[:, ::-1], axis=1)[:, ::-1]  # equals from here on
  keep = valid_BxT & (larger | (equal & (later <= slots_B1)))
  if selection == "argmax":
    keep &= (margin_BxT > 0) | forced_BxT
  return keep


def keep_context(margin_BxT: jax.Array, sparsity: jax.Array, context_B: jax.Array, routing: RoutingConfig) -> jax.Array:
  """Gates (B,T) of the context tokens in a block of which `sparsity` is asked; all of them where it is 0."""
  num_positions = margin_BxT.shape[1]
  in_context = jnp.arange(num_positions)[None] < context_B[:, None]
  slots = capacity(sparsity, context_B, routing.bucket_multiple)
  margin_BxT = first_to_keep(margin_BxT, context_B, routing)
  keep = select(margin_BxT, slots, forced_tokens(context_B, num_positions), in_context, routing.selection)
  return jnp.where(sparsity > 0, keep, in_context)


def decode_schedule(schedule_L: jax.Array, decode_sparsity: float) -> jax.Array:
  """The schedule scaled to mean `decode_sparsity` (below 1 in every block), for continuation tokens."""
  mean = jnp.mean(schedule_L)
  return jnp.clip(schedule_L * decode_sparsity / jnp.where(mean > 0, mean, 1.0), 0.0, 0.99)


def least_kept_margin(margin_BxT: jax.Array, sparsity: jax.Array, context_B: jax.Array) -> jax.Array:
  """The smallest margin (B,) among the ceil((1 - s) m) context tokens with the largest ones."""
  in_context = jnp.arange(margin_BxT.shape[1])[None] < context_B[:, None]
  keys = _order_keys(jnp.where(in_context, margin_BxT, -jnp.inf))
  least_B = _kth_largest(keys, capacity(sparsity, context_B))[:, 0]
  return jax.lax.bitcast_convert_type(_fold(least_B), jnp.float32)


def keep_continuation(
    kind: str, margin_BxT: jax.Array, sparsity: jax.Array, least_B: jax.Array | None, routing: RoutingConfig
) -> jax.Array:
  """Gates (B,T) of continuation tokens in a block of which `sparsity` is asked at decode.

  Each is decided when its token is the newest: the static order ranks that one right behind the sink,
  so it always computes it; the random router skips with probability `sparsity`; the dynamic router
  follows `decode_rule`. No token skips where nothing is asked.

  Args:
    least_B: `least_kept_margin` of each row's context; read by the rule `quantile`, which computes equals.
  """
  if kind == "static" or not routing.decode_sparsity:
    return jnp.ones(margin_BxT.shape, bool)
  if kind == "random":
    return margin_BxT >= sparsity
  if routing.decode_rule == "quantile":
    slack_B = _ROUNDING * jnp.maximum(jnp.abs(least_B), 1.0)
    return (sparsity <= 0) | (margin_BxT >= (least_B - slack_B)[:, None])
  return (sparsity <= 0) | (jax.nn.sigmoid(-margin_BxT) <= routing.decode_threshold)
