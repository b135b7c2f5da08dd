"""Continuation tokens on top of a prefilled cache: one at a time when generating, many when scoring.

Gates of continuation tokens take the causal view: each is decided by what is known when the token is the
newest. Teacher forcing many tokens at once therefore gives what decoding them one by one gives.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax import hardware
from ftp_jax.models import decoder
from ftp_jax.models.attention import attend_cached, visible
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import factors as factor_lib
from ftp_jax.routing import routers, stand_in
from ftp_jax.routing.cache import Cache, Recent
from ftp_jax.routing.config import RoutingConfig
from ftp_jax.routing.plan import Plan, changes
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


class Continuation:
  """New tokens of every row on top of a cache, and how the parts of a block are applied to them.

  Attributes:
    routes: tokens may skip: some gate is to be decided.
    scored: the router reads what tokens have paid to those before them.
    position_BxC: of the new tokens.
  """

  def __init__(
      self, config: ModelConfig, routing: RoutingConfig, params: Any, router: Router, cache: Cache, recent: Recent,
      num_new: int,
  ):
    self._config, self._routing, self._params, self._router, self._cache = config, routing, params, router, cache
    self._block, self._recent, self._count = decoder.Block(config), recent, recent.count
    self.batch, self.num_new = len(cache.context_B), num_new
    self.num_context, self.room = cache.keep_LxBxT.shape[2], recent.computed_LxBxM.shape[2]
    self.routes = bool(routing.decode_sparsity) and router.kind != "static"
    self.scored = self.routes and router.reads_scores
    self._steps_C = self._count + jnp.arange(num_new)  # slots of the new tokens in `recent`
    self.position_BxC = cache.context_B[:, None] + self._steps_C[None]
    self._angles = decoder.angles(config, self.position_BxC)
    # Recent tokens stand at context + slot, so that their distance to a new token is that of the slots.
    self._recent_CxM = visible(self._steps_C[None], jnp.arange(self.room)[None], config.sliding_window)[0]
    # Which positions of the context, and which slots behind it, come before each new token.
    in_context = jnp.arange(self.num_context)[None, None] < cache.context_B[:, None, None]
    earlier = jnp.arange(self.room)[None, None] < self._steps_C[None, :, None]
    over = lambda a: jnp.broadcast_to(a, (self.batch, num_new, a.shape[2]))
    self._before_BxCxP = jnp.concatenate([over(in_context), over(earlier)], axis=2)

  def decide(self, x_BxCxD, seen_BxCxP, state, inputs) -> tuple[jax.Array, Any]:
    """One block's gates (B,C), and the router's state."""
    router, features = self._router, None
    if router.factors:
      features = factor_lib.newest_factors(
          router.factors, seen_BxCxP, self.num_context + self._steps_C, self._before_BxCxP, self.position_BxC,
          inputs["sparsity"],
      )
    margin, state = routers.margin(
        router, inputs["router"] if router.per_block else router.params, features, x_BxCxD, state, self.position_BxC,
        self._cache.row_B, inputs["index"],
    )
    return keep_continuation(router.kind, margin, inputs["sparsity"], inputs["least"], self._routing), state

  def apply(self, index: jax.Array, method: Any, *args: Any) -> Any:
    """A method of `decoder.Block` with the weights of a block, which a branch that does not run does not read."""
    return self._block.apply({"params": decoder.block_at(self._params["blocks"], index)}, *args, method=method)

  def moved(self, index: jax.Array, x_BxCxD: jax.Array) -> jax.Array:
    """The states of tokens that skip a block."""
    return stand_in.moved(decoder.block_at(self._params["blocks"], index), x_BxCxD)

  def keys_values(self, index: jax.Array, x_BxCxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values as `Recent` has them, (B,G,C,N)."""
    k, v = self.apply(index, decoder.Block.keys_values, x_BxCxD, *self._angles)
    return k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

  def computed(
      self, x_BxCxD, k_BxGxCxN, v_BxGxCxN, computed_BxM, evict: bool, sizes: Sequence[int], inputs
  ) -> tuple[jax.Array, Any]:
    """The states after a block that computes all of them, and what they paid (B,C,P) if that is read.

    Args:
      sizes: numbers of slots in the cache; the block has the one that `size` of its inputs says.
    """
    index = inputs["index"]

    def append(recent_LxBxGxMxN, new_BxGxCxN):
      old = decoder.block_at(recent_LxBxGxMxN, index)  # not of the scan's inputs: a phase would copy its part
      return jax.lax.dynamic_update_slice_in_dim(old, new_BxGxCxN, self._count, 2)

    mask = jnp.broadcast_to(self._recent_CxM[None], (self.batch, self.num_new, self.room))
    q = self.apply(index, decoder.Block.queries, x_BxCxD, *self._angles)
    attended, paid = jax.lax.switch(
        inputs["size"], [functools.partial(self._attend, slots) for slots in sizes], q, inputs["offset"],
        append(self._recent.k_LxBxGxMxN, k_BxGxCxN), append(self._recent.v_LxBxGxMxN, v_BxGxCxN),
        mask & computed_BxM[:, None, :] if evict else mask,
    )
    return self.apply(index, decoder.Block.mlp, self.apply(index, decoder.Block.attention_out, x_BxCxD, attended)), paid

  def _attend(self, slots: int, q_BxCxHxN, offset, k_BxGxMxN, v_BxGxMxN, seen_BxCxM):
    """Attention of a block with `slots` slots in the cache: values (B,C,H,N) and, if scored, rows (B,C,P)."""
    part = functools.partial(jax.lax.dynamic_slice_in_dim, allow_negative_indices=False)
    k, v = part(self._cache.k_BxGxNxS, offset, slots, 3), part(self._cache.v_BxGxSxN, offset, slots, 2)
    key = part(self._cache.position_BxS, offset, slots, 1)
    seen_BxCxS = visible(self.position_BxC, key, self._config.sliding_window)
    out, old, new = attend_cached(q_BxCxHxN, k, v, seen_BxCxS, k_BxGxMxN, v_BxGxMxN, seen_BxCxM)
    if not self.scored:
      return out, None
    rows = jnp.zeros((self.batch, self.num_new, self.num_context)).at[
        jnp.arange(self.batch)[:, None, None], jnp.arange(self.num_new)[None, :, None], key[:, None, :]
    ].set(old, mode="drop")  # empty slots stand beyond every position
    return out, jnp.concatenate([rows, new], axis=2)


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

  A block that all of the new tokens skip is not computed: its weights are not even read. Blocks before and after all of
  which the schedule asks anything ask no router.
  """
  batch, num_new = tokens_BxC.shape
  new = Continuation(config, routing, params, router, cache, recent, num_new)

  def body(routes, plan_from, evict, sizes, carry, inputs):
    x, seen, state = carry
    index, keep = inputs["index"], jnp.ones((batch, num_new), bool)
    if routes:
      keep, state = new.decide(*(plan_from or (x, seen)), state, inputs)
    computed = jax.lax.dynamic_update_slice_in_dim(inputs["computed"], keep, recent.count, 1)
    projected = None if evict else new.keys_values(index, x)

    def compute(x, seen):
      k, v = projected or new.keys_values(index, x)
      y, paid = new.computed(x, k, v, computed, evict, sizes, inputs)
      if new.scored:
        known = jnp.concatenate([inputs["keep"], computed], axis=1)
        seen = jnp.where(keep[:, :, None] & known[:, None, :], paid, seen)
      if routes and batch * num_new > 1:  # a single one is computed here
        y = jnp.where(keep[:, :, None], y, new.moved(index, x))
      return y, seen, k, v

    def skip(x, seen):
      k, v = projected or (jnp.zeros((batch, config.num_kv_heads, num_new, config.head_dim), x.dtype),) * 2
      return new.moved(index, x), seen, k, v

    x, seen, k, v = jax.lax.cond(jnp.any(keep), compute, skip, x, seen) if routes else compute(x, seen)
    return (x, seen, state), (keep, k, v)

  inputs = {
      "index": jnp.arange(config.num_blocks),
      "sparsity": decode_schedule(jnp.asarray(schedule_L, jnp.float32), routing.decode_sparsity),
      "router": router.params if router.per_block else None,
      "offset": jnp.asarray(plan.offsets, jnp.int32),
      "keep": cache.keep_LxBxT if new.scored else None,
      "least": cache.least_LxB,
      "computed": recent.computed_LxBxM,
  }
  carry = (
      decoder.embed(config, params, tokens_BxC, dtype),
      jnp.zeros((batch, num_new, new.num_context + new.room if new.scored else 0)),
      routers.init_state(router, batch, num_new),
  )
  plan_from, parts = None, []
  slots = plan.cache_slots
  cuts = [] if hardware.platform() == "cpu" else changes(slots)
  routed = np.array(plan.routed) | router.recurrent  # whose state goes through all blocks
  if new.routes and routed.any():
    cuts = [*cuts, np.flatnonzero(routed)[0], np.flatnonzero(routed)[-1] + 1]
  for begin, end in routing.phases(config.num_blocks, more=cuts):
    if begin == routing.one_pass_block:
      plan_from = carry[:2]
    some, evict = jax.tree.map(lambda a: a[begin:end], inputs), begin >= routing.first_evicting(config.num_blocks)
    sizes = sorted(set(slots[begin:end]))
    some["size"] = jnp.asarray([sizes.index(s) for s in slots[begin:end]], jnp.int32)
    routes = new.routes and routed[begin:end].any()
    carry, part = jax.lax.scan(functools.partial(body, routes, plan_from, evict, sizes), carry, some)
    parts.append(part)
  x = carry[0]
  keep, k, v = jax.tree.map(lambda *a: jnp.concatenate(a), *parts) if len(parts) > 1 else parts[0]
  # All blocks at once, after the loop: an update inside it would copy the buffers for every block.
  put = lambda buffer, value, axis: jax.lax.dynamic_update_slice_in_dim(buffer, value, recent.count, axis)
  appended = Recent(
      put(recent.k_LxBxGxMxN, k, 3), put(recent.v_LxBxGxMxN, v, 3), put(recent.computed_LxBxM, keep, 2),
      recent.count + num_new,
  )
  return Extended(x, keep, appended)
