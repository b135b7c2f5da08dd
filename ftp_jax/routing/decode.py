"""Continuation tokens on top of a prefilled cache: one at a time when generating, many when scoring.

Gates of continuation tokens take the causal view: each is decided by what is known when the token is the
newest. Teacher forcing many tokens at once therefore gives what decoding them one by one gives.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftp_jax.models import decoder
from ftp_jax.models.attention import attend_cached, visible
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import factors as factor_lib
from ftp_jax.routing import routers, stand_in
from ftp_jax.routing.cache import Cache, Recent
from ftp_jax.routing.config import RoutingConfig
from ftp_jax.routing.plan import Plan
from ftp_jax.routing.routers import Router
from ftp_jax.routing.selection import decode_schedule, keep_continuation


class Extended(NamedTuple):
  """Result of `extend`.

  Attributes:
    hidden_BxCxD: states of the new tokens that leave the last block, before the final norm.
    keep_LxBxC: their routes.
    recent: with the new tokens appended.
  """

  hidden_BxCxD: jax.Array
  keep_LxBxC: jax.Array
  recent: Recent


def extend(
    config: ModelConfig,
    routing: RoutingConfig,
    plan: Plan,
    params: Any,
    router: Router,
    cache: Cache,
    recent: Recent,
    tokens_BxC: jax.Array,
    schedule_L: jax.Array,
    *,
    dtype: Any = jnp.float32,
) -> Extended:
  """Runs C further tokens of every row; `recent` must have room for them.

  A block that all of the new tokens skip is not computed: its weights are not even read.
  """
  batch, num_new = tokens_BxC.shape
  groups, dim = config.num_kv_heads, config.head_dim
  num_context, room = cache.keep_LxBxT.shape[2], recent.computed_LxBxM.shape[2]
  count = recent.count
  steps_C = count + jnp.arange(num_new)  # slots of the new tokens in `recent`
  position_BxC = cache.context_B[:, None] + steps_C[None]
  sin, cos = decoder.angles(config, position_BxC)
  block = decoder.Block(config)
  routes = bool(routing.decode_sparsity) and router.kind != "static"
  scored = routes and router.reads_scores
  room_M = jnp.arange(room)
  # Recent tokens stand at context + slot, so that their distance to a new token is that of the slots.
  recent_CxM = visible(steps_C[None], room_M[None], config.sliding_window)[0]
  before_BxCxP = jnp.concatenate([
      jnp.broadcast_to((jnp.arange(num_context)[None] < cache.context_B[:, None])[:, None],
                       (batch, num_new, num_context)),
      jnp.broadcast_to(room_M[None, None] < steps_C[None, :, None], (batch, num_new, room)),
  ], axis=2)  # fmt: skip

  def attend_to(slots: int):
    """Attention of a block whose cache has `slots` slots: values (B,C,H,N) and, if scored, rows (B,C,P)."""

    part = functools.partial(jax.lax.dynamic_slice_in_dim, allow_negative_indices=False)

    def attend(q_BxCxHxN, offset, k_recent, v_recent, seen_BxCxM):
      k = part(cache.k_BxGxNxS, offset, slots, 3)
      v = part(cache.v_BxGxSxN, offset, slots, 2)
      key = part(cache.position_BxS, offset, slots, 1)
      out, old, new = attend_cached(
          q_BxCxHxN, k, v, visible(position_BxC, key, config.sliding_window), k_recent, v_recent, seen_BxCxM
      )
      if not scored:
        return out, None
      rows = jnp.zeros((batch, num_new, num_context)).at[
          jnp.arange(batch)[:, None, None], jnp.arange(num_new)[None, :, None], key[:, None, :]
      ].set(old, mode="drop")  # empty slots stand beyond every position
      return out, jnp.concatenate([rows, new], axis=2)

    return attend

  sizes = sorted(set(plan.cache_slots))
  branches = [attend_to(slots) for slots in sizes]

  def body(plan_from, evict, carry, inputs):
    x, seen, state = carry
    index = inputs["index"]
    # Indexed where they are used: inside the branch that a skipped block does not take.
    apply = lambda method, *args: block.apply(
        {"params": decoder.block_at(params["blocks"], index)}, *args, method=method
    )
    skipping = lambda x: stand_in.moved(decoder.block_at(params["blocks"], index), x)
    swap = lambda a: a.transpose(0, 2, 1, 3)
    keep = jnp.ones((batch, num_new), bool)
    if routes:
      features, (deciding_x, deciding_seen) = None, plan_from or (x, seen)
      if router.factors:
        features = factor_lib.newest_factors(
            router.factors, deciding_seen, num_context + steps_C, before_BxCxP, position_BxC, inputs["sparsity"]
        )
      margin, state = routers.margin(
          router, inputs["router"] if router.per_block else router.params, features, deciding_x, state,
          position_BxC,
          cache.row_B, index,
      )
      keep = keep_continuation(router.kind, margin, inputs["sparsity"], inputs["least"], routing)
    computed = jax.lax.dynamic_update_slice_in_dim(inputs["computed"], keep, count, 1)
    mask = jnp.broadcast_to(recent_CxM[None], (batch, num_new, room))
    projected = None if evict else tuple(map(swap, apply(decoder.Block.keys_values, x, sin, cos)))

    def compute(x, seen):
      k, v = projected or map(swap, apply(decoder.Block.keys_values, x, sin, cos))
      appended = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, count, 2)
      q = apply(decoder.Block.queries, x, sin, cos)
      attended, rows = jax.lax.switch(
          inputs["size"], branches, q, inputs["offset"], appended(inputs["k"], k), appended(inputs["v"], v),
          mask & computed[:, None, :] if evict else mask,
      )
      y = apply(decoder.Block.mlp, apply(decoder.Block.attention_out, x, attended))
      if scored:
        known = jnp.concatenate([inputs["keep"], computed], axis=1)
        seen = jnp.where(keep[:, :, None] & known[:, None, :], rows, seen)
      return jnp.where(keep[:, :, None], y, skipping(x)) if routes else y, seen, k, v

    def skip(x, seen):
      k, v = projected or (jnp.zeros((batch, groups, num_new, dim), x.dtype),) * 2
      return skipping(x), seen, k, v

    x, seen, k, v = jax.lax.cond(jnp.any(keep), compute, skip, x, seen) if routes else compute(x, seen)
    return (x, seen, state), (keep, k, v)

  inputs = {
      "index": jnp.arange(config.num_blocks),
      "sparsity": decode_schedule(jnp.asarray(schedule_L, jnp.float32), routing.decode_sparsity),
      "router": router.params if router.per_block else None,
      "size": jnp.asarray([sizes.index(s) for s in plan.cache_slots], jnp.int32),
      "offset": jnp.asarray(plan.offsets, jnp.int32),
      "keep": cache.keep_LxBxT if scored else None,
      "least": cache.least_LxB,
      "k": recent.k_LxBxGxMxN,
      "v": recent.v_LxBxGxMxN,
      "computed": recent.computed_LxBxM,
  }
  carry = (
      decoder.embed(config, params, tokens_BxC, dtype),
      jnp.zeros((batch, num_new, num_context + room if scored else 0)),
      routers.init_state(router, batch, num_new),
  )
  plan_from, parts = None, []
  for begin, end in routing.phases(config.num_blocks):
    if begin == routing.one_pass_block:
      plan_from = carry[:2]
    some, evict = jax.tree.map(lambda a: a[begin:end], inputs), begin >= routing.first_evicting(config.num_blocks)
    carry, part = jax.lax.scan(functools.partial(body, plan_from, evict), carry, some)
    parts.append(part)
  x = carry[0]
  keep, k, v = jax.tree.map(lambda *a: jnp.concatenate(a), *parts) if len(parts) > 1 else parts[0]
  # All blocks at once, after the loop: an update inside it would copy the buffers for every block.
  put = lambda buffer, new, axis: jax.lax.dynamic_update_slice_in_dim(buffer, new, count, axis)
  appended = Recent(
      put(recent.k_LxBxGxMxN, k, 3), put(recent.v_LxBxGxMxN, v, 3), put(recent.computed_LxBxM, keep, 2), count + num_new
  )
  return Extended(x, keep, appended)
