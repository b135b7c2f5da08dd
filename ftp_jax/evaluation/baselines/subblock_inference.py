"""Fast execution of sub-blocks that are removed, or that tokens skip: prefill, cache and decoding.

One scan runs over the blocks and branches twice in each, to the body of the attention's bucket and to that of the
MLP's; a removed sub-block is a branch that does nothing. From the last attention on only the last token's output is
used, so that nothing else is computed there. Removed attention has no cache. Continuation tokens are computed.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax.evaluation.baselines.subblocks import ROUTING, margin
from ftp_jax.inference.programs import Spec
from ftp_jax.models import decoder
from ftp_jax.models.attention import attend_cached, visible
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing.bucketed import Prefilled
from ftp_jax.routing.cache import Recent
from ftp_jax.routing.contexts import Contexts
from ftp_jax.routing.decode import Extended
from ftp_jax.routing.plan import MAX_BUCKETS, Plan, make_plan
from ftp_jax.routing.selection import keep_context
from ftp_jax.routing.slots import fill_slots, gather


class SubCache(NamedTuple):
  """Keys and values of the context; A attentions that are not removed.

  Attributes:
    k_AxBxGxNxT, v_AxBxGxTxN: keys, rope applied, and values of all tokens.
    position_BxT: of each token, EMPTY at padding.
    keep_Lx2xBxT: which tokens each sub-block really computed.
    context_B: context lengths.
  """

  k_AxBxGxNxT: jax.Array
  v_AxBxGxTxN: jax.Array
  position_BxT: jax.Array
  keep_Lx2xBxT: jax.Array
  context_B: jax.Array

  def rows(self, index_R: jax.Array) -> "SubCache":
    """The cache of the chosen rows, repeated where an index is."""
    take = lambda a, axis: jnp.take(a, index_R, axis=axis)
    return SubCache(*(take(a, axis) for a, axis in zip(self, (1, 1, 0, 2, 0))))


@dataclasses.dataclass(frozen=True)
class SubPlan:
  """Static shapes of one compiled program: a plan of the attentions and one of the MLPs."""

  attention: Plan
  mlp: Plan


@dataclasses.dataclass(frozen=True)
class SubSpec(Spec):
  """A model whose sub-blocks are removed or skipped; its weights hold a router of `subblocks` and schedule (L,2).

  Attributes:
    removed: (attention, MLP) of each block, True: no token computes it. At least one attention stays.
  """

  removed: tuple[tuple[bool, bool], ...] = ()

  def plan(self, weights, num_positions, max_buckets=MAX_BUCKETS, buckets=None) -> SubPlan:
    schedule_2xL = np.asarray(weights.schedule_L).T
    return SubPlan(*(make_plan(row, num_positions, self.routing, max_buckets, buckets) for row in schedule_2xL))

  def prefill(self, plan, weights, tokens_BxT, context_B) -> Prefilled:
    return prefill(
        self.model, self.removed, plan, *weights[:2], tokens_BxT, context_B, weights.schedule_L, dtype=self.dtype,
        attention=self.attention,
    )

  def extend(self, plan, weights, cache, recent, tokens_BxC) -> Extended:
    return extend(self.model, self.removed, weights.params, cache, recent, tokens_BxC, dtype=self.dtype)

  def continuing(self, plan, weights):
    return self, None, weights._replace(router=None)  # every continuation token is computed, whatever the plan


def spec(config: ModelConfig, removed: np.ndarray) -> SubSpec:
  """For (L,2) boolean `removed`."""
  return SubSpec(config, ROUTING, removed=tuple((bool(a), bool(m)) for a, m in removed))


def _slots(removed) -> list[int]:
  """For each block the index of its attention's cache; that of the next one where it has none, within range."""
  has = np.array([not attention for attention, _ in removed])
  return np.minimum(np.cumsum(has) - has, has.sum() - 1).tolist()


def prefill(
    config: ModelConfig,
    removed: tuple[tuple[bool, bool], ...],
    plan: SubPlan,
    params: Any,
    router: Any,
    tokens_BxT: jax.Array,
    context_B: jax.Array,
    schedule_Lx2: jax.Array,
    *,
    dtype: Any = jnp.float32,
    attention: str = "auto",
) -> Prefilled:
  """Equal to `subblocks.routed_forward` for the last context token; its `cache` is a SubCache.

  Args:
    plan: made of the very `schedule_Lx2`; T of the tokens is its `num_positions`.
  """
  batch, num_positions = tokens_BxT.shape
  contexts = Contexts(config, params, tokens_BxT, context_B, attention)
  nothing = jnp.zeros_like(contexts.in_context_BxT)
  last_BxT = contexts.position_BxT == contexts.last_position()
  final = max(i for i, (gone, _) in enumerate(removed) if not gone)  # the last attention

  def keys_values(apply, x):
    k, v = apply(decoder.Block.keys_values, x, *contexts.angles)
    return k, v, (k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))

  def computing(sub, slots, routed, compute):
    """A body (x, inputs) -> (x, keep, what `compute` returns) of which `slots` tokens are computed.

    Args:
      compute: (apply, x, chosen, angles, query positions, aligned) -> (what becomes of the chosen tokens, anything).
    """

    def body(x, inputs):
      apply = contexts.block(inputs["index"])
      if not routed:
        y, more = compute(apply, x, x, contexts.angles, contexts.query_positions(), True)
        return y, contexts.in_context_BxT, more
      keep = keep_context(margin(inputs["router"], sub, x), inputs["sparsity"][sub], context_B, ROUTING)
      filled = fill_slots(keep, slots)
      query = jnp.where(filled.filled_BxK, filled.position_BxK, -1)
      y, more = compute(apply, x, gather(x, filled.position_BxK), contexts.rope(filled.position_BxK), query, False)
      return jnp.where(keep[:, :, None], gather(y, filled.slot_BxT), x), keep, more

    return body

  def attended(apply, x, chosen, angles, query, aligned):
    k, v, tiles = keys_values(apply, x)
    q = apply(decoder.Block.queries, chosen, *angles)
    values = contexts.attend(q, k, v, query, contexts.key_BxT, aligned=aligned)
    return apply(decoder.Block.attention_out, chosen, values), tiles

  def through_mlp(apply, x, chosen, angles, query, aligned):
    return apply(decoder.Block.mlp, chosen), ()

  shape = (batch, config.num_kv_heads, config.head_dim, num_positions)
  tile_shapes = shape, (shape[0], shape[1], shape[3], shape[2])
  absent = lambda more: lambda x, inputs: (x, nothing, more())
  no_tiles = lambda: tuple(jnp.zeros(s, dtype) for s in tile_shapes)

  def branches(sub, own: Plan, compute, more):
    """The bodies that blocks before `final` need, and which each of them takes."""
    wanted = [None if removed[i][sub] else own.bodies[own.body_of[i]] for i in range(final)]
    distinct = list(dict.fromkeys(wanted))
    bodies = [absent(more) if pair is None else computing(sub, *pair, compute) for pair in distinct]
    return bodies, jnp.asarray([distinct.index(pair) for pair in wanted], jnp.int32)

  attention_bodies, attention_of = branches(0, plan.attention, attended, no_tiles)
  mlp_bodies, mlp_of = branches(1, plan.mlp, through_mlp, tuple)
  some_gone = any(gone for gone, _ in removed[:final])

  def step(carry, inputs):
    x, *buffers = carry
    x, keep_attention, tiles = jax.lax.switch(inputs["attention"], attention_bodies, x, inputs)
    if some_gone:  # puts back what it finds: a branch around the write would copy the buffer
      tiles = [jnp.where(inputs["gone"], decoder.block_at(b, inputs["slot"]), tile) for b, tile in zip(buffers, tiles)]
    buffers = [jax.lax.dynamic_update_index_in_dim(b, tile, inputs["slot"], 0) for b, tile in zip(buffers, tiles)]
    x, keep_mlp, _ = jax.lax.switch(inputs["mlp"], mlp_bodies, x, inputs)
    return (x, *buffers), jnp.stack([keep_attention, keep_mlp])

  slots = _slots(removed)
  buffers = [jnp.zeros((slots[final] + 1,) + s, dtype) for s in tile_shapes]
  carry, keep = (decoder.embed(config, params, tokens_BxT, dtype), *buffers), []
  if final:
    inputs = {
        "index": jnp.arange(final),
        "attention": attention_of,
        "mlp": mlp_of,
        "gone": jnp.asarray([gone for gone, _ in removed[:final]]),
        "slot": jnp.asarray(slots[:final], jnp.int32),
        "sparsity": jnp.asarray(schedule_Lx2, jnp.float32)[:final],
        "router": jax.tree.map(lambda a: a[:final], router),
    }
    carry, decided = jax.lax.scan(step, carry, inputs)
    keep.append(decided)
  x, *buffers = carry
  apply, at = contexts.block(jnp.int32(final)), contexts.last_position()
  k, v, tiles = keys_values(apply, x)
  buffers = [b.at[slots[final]].set(tile) for b, tile in zip(buffers, tiles)]
  x = gather(x, at)
  q = apply(decoder.Block.queries, x, *contexts.rope(at))
  x = apply(decoder.Block.attention_out, x, contexts.attend(q, k, v, at, contexts.key_BxT, aligned=False))
  tail = [i for i in range(final, config.num_blocks) if not removed[i][1]]
  if tail:
    x, _ = jax.lax.scan(lambda x, i: (contexts.block(i)(decoder.Block.mlp, x), None), x, jnp.asarray(tail))
  for i in range(final, config.num_blocks):
    computed = [last_BxT if i == final else nothing, nothing if removed[i][1] else last_BxT]
    keep.append(jnp.stack(computed)[None])
  cache = SubCache(*buffers, contexts.key_BxT, jnp.concatenate(keep), context_B)
  return Prefilled(decoder.unembed(config, params, x[:, 0]), cache)


def extend(
    config: ModelConfig,
    removed: tuple[tuple[bool, bool], ...],
    params: Any,
    cache: SubCache,
    recent: Recent,
    tokens_BxC: jax.Array,
    *,
    dtype: Any = jnp.float32,
) -> Extended:
  """Runs C further tokens of every row through all sub-blocks that are not removed; `recent` must have room."""
  batch, num_new = tokens_BxC.shape
  room, count = recent.computed_LxBxM.shape[2], recent.count
  steps_C = count + jnp.arange(num_new)
  position_BxC = cache.context_B[:, None] + steps_C[None]
  sin, cos = decoder.angles(config, position_BxC)
  mask_BxCxS = visible(position_BxC, cache.position_BxT, config.sliding_window)
  # Recent tokens stand at context + slot, so that their distance to a new token is that of the slots.
  mask_CxM = visible(steps_C[None], jnp.arange(room)[None], config.sliding_window)
  mask_BxCxM = jnp.broadcast_to(mask_CxM, (batch, num_new, room))
  block = decoder.Block(config)
  has_2xL = ~np.asarray(removed).T
  swap = lambda a: a.transpose(0, 2, 1, 3)

  def body(x, inputs):
    # Indexed where they are used: inside the branch that a removed sub-block does not take.
    apply = lambda method, *args: block.apply(
        {"params": decoder.block_at(params["blocks"], inputs["index"])}, *args, method=method
    )

    def attended(x):
      k, v = map(swap, apply(decoder.Block.keys_values, x, sin, cos))
      appended = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, count, 2)
      out, _, _ = attend_cached(
          apply(decoder.Block.queries, x, sin, cos), *(decoder.block_at(a, inputs["slot"]) for a in cache[:2]),
          mask_BxCxS, appended(inputs["k"], k), appended(inputs["v"], v), mask_BxCxM,
      )
      return apply(decoder.Block.attention_out, x, out), k, v

    def without(x):
      zeros = jnp.zeros((batch, config.num_kv_heads, num_new, config.head_dim), x.dtype)
      return x, zeros, zeros

    through_mlp = lambda x: apply(decoder.Block.mlp, x)
    x, k, v = attended(x) if has_2xL[0].all() else jax.lax.cond(inputs["attention"], attended, without, x)
    x = through_mlp(x) if has_2xL[1].all() else jax.lax.cond(inputs["mlp"], through_mlp, lambda x: x, x)
    return x, (k, v)

  inputs = {
      "index": jnp.arange(config.num_blocks),
      "attention": jnp.asarray(has_2xL[0]),
      "mlp": jnp.asarray(has_2xL[1]),
      "slot": jnp.asarray(_slots(removed), jnp.int32),
      "k": recent.k_LxBxGxMxN,
      "v": recent.v_LxBxGxMxN,
  }
  x, (k, v) = jax.lax.scan(body, decoder.embed(config, params, tokens_BxC, dtype), inputs)
  put = lambda buffer, new: jax.lax.dynamic_update_slice_in_dim(buffer, new, count, 3)
  keep = jnp.ones((config.num_blocks, batch, num_new), bool)
  computed = jax.lax.dynamic_update_slice_in_dim(recent.computed_LxBxM, keep, count, 2)
  appended = Recent(put(recent.k_LxBxGxMxN, k), put(recent.v_LxBxGxMxN, v), computed, count + num_new)
  return Extended(x, keep, appended)
