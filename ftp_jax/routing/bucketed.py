"""Bucketed execution of a prefill: kept tokens are gathered, in order, into the block's bucket of slots.

The routes are those of `masked.forward`, by the same functions; only kept tokens are computed. One scan runs over the
blocks of each of `RoutingConfig.phases` and branches to the body of the block's bucket, so that it holds as many block
bodies as there are distinct buckets; where XLA computes attention, bodies share it: the scan branches before and after.
The last block computes the last token's output alone, as nothing else is read.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftp_jax.models import decoder, kernels
from ftp_jax.models.attention import EMPTY, visible
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import factors as factor_lib
from ftp_jax.routing import routers
from ftp_jax.routing.cache import Cache, empty_cache, write
from ftp_jax.routing.config import RoutingConfig
from ftp_jax.routing.plan import Plan
from ftp_jax.routing.routers import Router
from ftp_jax.routing.selection import decode_schedule, keep_context, least_kept_margin

# Where XLA computes attention, as on a CPU: the MLP in parts of this many slots, which is no slower there and needs
# less memory; and an attention of small tiles for the bodies of so few slots, apart from that of all others.
_MLP_SLOTS = 768
_FEW_SLOTS = 64


class Prefilled(NamedTuple):
  """Result of a prefill: next-token logits (B,V) in fp32 after each row's context, and its cache."""

  logits_BxV: jax.Array
  cache: Cache


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
  # Slot k holds the first position up to which k + 1 tokens are kept.
  position = jax.vmap(lambda count: jnp.searchsorted(count, jnp.arange(1, num_slots + 1)))(kept_so_far)
  slot = jnp.clip(kept_so_far - 1, 0, num_slots - 1)
  return Slots(jnp.minimum(position, num_positions - 1), position < num_positions, slot)


def gather(x_BxTxD: jax.Array, index_BxK: jax.Array) -> jax.Array:
  """Rows (B,K,...) of x; every index is in range."""
  return jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(x_BxTxD, index_BxK)


def in_parts(function: Callable[[jax.Array], jax.Array], x_BxKxD: jax.Array, largest: int) -> jax.Array:
  """A function of single tokens, computed in parts of at most `largest` slots and nearly equal size, one by one."""
  num_slots = x_BxKxD.shape[1]
  parts = -(-num_slots // largest)
  if parts == 1:
    return function(x_BxKxD)
  size = -(-num_slots // parts)
  x = jnp.pad(x_BxKxD, ((0, 0), (0, parts * size - num_slots), (0, 0)))
  x = jnp.swapaxes(x.reshape(x.shape[0], parts, size, -1), 0, 1)
  y = jnp.swapaxes(jax.lax.map(function, x), 0, 1)
  return y.reshape(y.shape[0], parts * size, -1)[:, :num_slots]


def block_inputs(routing: RoutingConfig, router: Router, schedule_L: jax.Array) -> dict[str, Any]:
  """What `decide_context` reads of every block, each with a leading L axis."""
  schedule_L = jnp.asarray(schedule_L, jnp.float32)
  return {
      "sparsity": schedule_L,
      "decode_sparsity": decode_schedule(schedule_L, routing.decode_sparsity),
      "index": jnp.arange(len(schedule_L)),
      "router": router.params if router.per_block else None,
  }


def decide_context(
    routing: RoutingConfig, router: Router, inputs: dict[str, Any], x_BxTxD, score_BxT, state_BxTxR, position_BxT,
    context_B, row_B,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
  """One block's gates (B,T) of the context tokens, the margin (B) that the decode rule `quantile` reads, and the state.

  Args:
    inputs: the block's slice of `block_inputs`.
    x_BxTxD, score_BxT: states and score table that it is decided from.
    state_BxTxR, row_B: as `routers.margin` takes them.
  """
  features = None
  if router.factors:
    features = factor_lib.context_factors(router.factors, score_BxT, inputs["sparsity"], context_B)
  margin_BxT, state_BxTxR = routers.margin(
      router, inputs["router"] if router.per_block else router.params, features, x_BxTxD, state_BxTxR, position_BxT,
      row_B, inputs["index"],
  )  # fmt: skip
  least_B = jnp.zeros(len(context_B))
  if routing.decode_sparsity and routing.decode_rule == "quantile":
    least_B = least_kept_margin(margin_BxT, inputs["decode_sparsity"], context_B)
  return keep_context(margin_BxT, inputs["sparsity"], context_B, routing), least_B, state_BxTxR


def prefill(
    config: ModelConfig,
    routing: RoutingConfig,
    plan: Plan,
    params: Any,
    router: Router,
    tokens_BxT: jax.Array,
    context_B: jax.Array,
    schedule_L: jax.Array,
    *,
    dtype: Any = jnp.float32,
    attention: str = "auto",
) -> Prefilled:
  """Runs the contexts of a batch through routed blocks.

  Args:
    plan: made of the very `schedule_L`; T of the tokens is its `num_positions`.
    tokens_BxT: right-padded context tokens.
    context_B: their lengths m >= 1.
    attention: implementation, see `kernels.IMPLEMENTATIONS`.

  Returns:
    Prefilled; equal to what the masked execution gives for the last context token.
  """
  batch, num_positions = tokens_BxT.shape
  assert num_positions == plan.num_positions and router.kind != "given"
  t = jnp.arange(num_positions)[None]
  position_BxT = jnp.broadcast_to(t, tokens_BxT.shape)
  in_context = t < context_B[:, None]
  key_BxT = jnp.where(in_context, t, EMPTY)
  sin, cos = decoder.angles(config, t)
  row_B = routers.row_seed(tokens_BxT, context_B)
  block, blocks = decoder.Block(config), params["blocks"]
  window_BxW = factor_lib.window_rows(context_B, routing.score_window)

  def attend(q, k, v, query, key, *, aligned):
    return kernels.attend(
        q, k, v, query, key, config.sliding_window, aligned=aligned, implementation=attention
    )

  def rope(position):
    return gather(jnp.broadcast_to(sin, (batch,) + sin.shape[1:]), position), gather(
        jnp.broadcast_to(cos, (batch,) + cos.shape[1:]), position
    )

  scored = routing.scored_blocks([plan.bodies[i][1] for i in plan.body_of], router.recurrent)
  scored = [router.reads_scores and some for some in scored]

  def decide(x, score, state, inputs):
    return decide_context(routing, router, inputs, x, score, state, position_BxT, context_B, row_B)

  def scores_of(apply, x, k, key, keep, score, inputs, to_positions):
    """The score table after a block whose keys `k` stand at positions `key`; the old one where no router reads it."""

    def new():
      at = jnp.maximum(window_BxW, 0)
      q = apply(decoder.Block.queries, gather(x, at), *rope(at))
      counts = (window_BxW >= 0) & jnp.take_along_axis(keep, at, axis=1)
      own = factor_lib.window_scores(q, k, visible(at, key, config.sliding_window), counts)
      return jnp.where(keep, to_positions(own), score)

    return jax.lax.cond(inputs["scored"], new, lambda: score)

  def gates(x, score, state, inputs, bodies, planned):
    """What blocks with these bodies share: (keep, slots of the kept tokens), (keep, least), state."""
    routed = [body.routed for body in bodies]
    most = max((body.slots for body in bodies if body.gathers), default=0)

    def decided(x, score, state, inputs):
      keep, least, state = (*inputs["decided"], state) if planned else decide(x, score, state, inputs)
      return keep, fill_slots(keep, most) if most else None, least, state

    def undecided(x, score, state, inputs):
      del x, score, inputs
      whole = lambda width: jnp.zeros((batch, width), int)
      none = Slots(whole(most), whole(most) > 0, whole(num_positions))
      return in_context, none if most else None, jnp.zeros(batch), state

    if router.recurrent or all(routed):
      keep, filled, least, state = decided(x, score, state, inputs)
    elif not any(routed):
      keep, filled, least, state = undecided(x, score, state, inputs)
    else:
      keep, filled, least, state = jax.lax.cond(inputs["routed"], decided, undecided, x, score, state, inputs)
    return (keep, filled), (keep, least), state

  in_xla = kernels.resolve(attention) == "xla"
  part_of = lambda index: lambda method, *args: block.apply(
      {"params": decoder.block_at(blocks, index)}, *args, method=method
  )

  def as_tiles(k, v, key, size):
    """Keys, values and positions as the cache holds them, `size` slots."""
    spare = size - key.shape[1]
    pad = lambda a, axis, value: jnp.pad(
        a, [(0, spare if i == axis else 0) for i in range(a.ndim)], constant_values=value
    )
    return pad(k.transpose(0, 2, 3, 1), 3, 0), pad(v.transpose(0, 2, 1, 3), 2, 0), pad(key, 1, EMPTY)

  def put(buffers, tiles, inputs, fits=True):
    return tuple(write(b, tile, inputs["offset"], axis, fits) for b, tile, axis in zip(buffers, tiles, (3, 2, 1)))

  def project(x, score, gate, buffers, inputs, evict, scores):
    """Keys and values of all tokens, alike in every body: the score table, the cache, and where bodies find them."""
    if evict:
      return score, buffers, None
    apply, (keep, _) = part_of(inputs["index"]), gate
    k, v = apply(decoder.Block.keys_values, x, sin, cos)
    score = scores_of(apply, x, k, key_BxT, keep, score, inputs, lambda a: a) if scores else score
    buffers = put(buffers, as_tiles(k, v, key_BxT, num_positions), inputs)
    return score, buffers, buffers[:2] if in_xla else (k, v)

  def projected(held, inputs):
    """Keys and values of all tokens. A CPU takes them from the cache, or would hold them twice.

    A TPU's compiler copies the whole cache for branches that read it.
    """
    if not in_xla:
      return held
    part = lambda a, axis: jax.lax.dynamic_slice_in_dim(a, inputs["offset"], num_positions, axis)
    return part(held[0], 3).transpose(0, 3, 1, 2), part(held[1], 2).transpose(0, 2, 1, 3)

  class Body:
    """A block at one bucket: what comes before attention, and after it."""

    def __init__(self, slots: int, routed: bool, evict: bool, last: bool = False, scores: bool = False):
      self.slots, self.routed, self.evict, self.last, self.scores = slots, routed, evict, last, scores
      self.gathers = routed and (slots < num_positions or evict)

    def chosen(self, x, filled):
      """The tokens that the block computes, where they stand (-1: nowhere), and their angles."""
      if not self.gathers:
        return x, jnp.where(in_context, t, -1), (sin, cos)
      at = filled.position_BxK[:, : self.slots]
      return gather(x, at), jnp.where(filled.filled_BxK[:, : self.slots], at, -1), rope(at)

    def before(self, x, score, gate, held, inputs):
      """Queries, keys, values and their positions; score table; tiles for the cache where the body makes its own."""
      apply, (keep, filled) = part_of(inputs["index"]), gate
      chosen, query, angles = self.chosen(x, filled)
      key, tiles = key_BxT, None
      if self.evict:
        k, v = apply(decoder.Block.keys_values, chosen, *angles)
        key = jnp.where(query < 0, EMPTY, query)
        if self.scores:
          spread = (lambda a: jnp.take_along_axis(a, filled.slot_BxT, axis=1)) if self.gathers else (lambda a: a)
          score = scores_of(apply, x, k, key, keep, score, inputs, spread)
        tiles = as_tiles(k, v, key, key.shape[1] if self.last else num_positions)
      else:
        k, v = projected(held, inputs)
      if self.last:
        query = context_B[:, None] - 1
        chosen, angles = gather(x, query), rope(query)
      q = apply(decoder.Block.queries, chosen, *angles)
      return (q, k, v, query, key), score, tiles

    def after(self, x, gate, attended, inputs):
      """The states after the block."""
      index = inputs["index"]
      if in_xla:  # or it takes the tokens and these weights out of their arrays before attention, and holds them
        x, attended, index = jax.lax.optimization_barrier((x, attended, index))
      apply, (keep, filled) = part_of(index), gate
      chosen = gather(x, context_B[:, None] - 1) if self.last else self.chosen(x, filled)[0]
      y = apply(decoder.Block.attention_out, chosen, attended)
      mlp = functools.partial(apply, decoder.Block.mlp)
      y = in_parts(mlp, y, _MLP_SLOTS) if in_xla else mlp(y)
      if self.gathers and not self.last:
        y = gather(y, filled.slot_BxT)
      return y if self.last or not self.routed else jnp.where(keep[:, :, None], y, x)

    def whole(self, x, score, gate, held, inputs):
      """The block with its attention: (x, score, tiles)."""
      operands, score, tiles = self.before(x, score, gate, held, inputs)
      attended = attend(*operands, aligned=not self.last and (self.evict or not self.gathers))
      return self.after(x, gate, attended, inputs), score, tiles

  def run_body(bodies, which, x, score, gate, held, inputs):
    """The block with one of the bodies: (x, score, tiles)."""
    operands = x, score, gate, held, inputs
    if not in_xla:
      return jax.lax.switch(which, [body.whole for body in bodies], *operands)
    # In an attention with large tiles, few queries would cost a whole one. Bodies come in the order of their slots.
    few = sum(body.slots <= _FEW_SLOTS for body in bodies)
    groups = [group for group in (bodies[:few], bodies[few:]) if group]
    branches = [functools.partial(around_attention, group) for group in groups]
    local = which - few * (which >= few)
    return jax.lax.switch((which >= few).astype(int), branches, local, *operands)

  def around_attention(bodies, which, x, score, gate, held, inputs):
    """`run_body` with one attention between the two parts of all bodies."""
    operands = x, score, gate, held, inputs
    if len(bodies) == 1:
      return bodies[0].whole(*operands)
    width, evict = max(body.slots for body in bodies), bodies[0].evict

    def padded_before(body, *operands):
      (q, _, _, query, _), score, tiles = body.before(*operands)
      spare = (0, width - q.shape[1])
      return (
          jnp.pad(q, ((0, 0), spare, (0, 0), (0, 0))), jnp.pad(query, ((0, 0), spare), constant_values=-1), score, tiles
      )

    def cut_after(body, x, gate, attended, inputs):
      return body.after(x, gate, attended[:, : body.slots], inputs)

    # Padding slots have no query, and XLA's attention leaves out tiles without one.
    branches = lambda part: [functools.partial(part, body) for body in bodies]
    q, query, score, tiles = jax.lax.switch(which, branches(padded_before), *operands)
    if evict:
      k, v, key = tiles[0].transpose(0, 3, 1, 2), tiles[1].transpose(0, 2, 1, 3), tiles[2]
      k, v, key = k[:, :width], v[:, :width], key[:, :width]
    else:
      (k, v), key = projected(held, inputs), key_BxT
    attended = attend(q, k, v, query, key, aligned=evict)
    return jax.lax.switch(which, branches(cut_after), x, gate, attended, inputs), score, tiles

  fits = all(offset + num_positions <= sum(plan.cache_slots) for offset in plan.offsets[:-1])

  def run(carry, inputs, begin, end, planned):
    """Blocks [begin, end), with bodies for the buckets they have."""
    used = sorted(set(plan.body_of[begin:end]))
    scores, evict = any(scored[begin:end]), begin >= plan.evict_from
    bodies = [Body(*plan.bodies[i], evict, scores=scores) for i in used]
    inputs = inputs | {"body": jnp.asarray([used.index(i) for i in plan.body_of[begin:end]], jnp.int32)}

    def step(carry, inputs):
      x, score, state, buffers = carry
      gate, decided, state = gates(x, score, state, inputs, bodies, planned)
      score, buffers, held = project(x, score, gate, buffers, inputs, evict, scores)
      x, score, tiles = run_body(bodies, inputs["body"], x, score, gate, held, inputs)
      return (x, score, state, put(buffers, tiles, inputs, fits) if tiles else buffers), decided

    return jax.lax.scan(step, carry, inputs)

  inputs = block_inputs(routing, router, schedule_L) | {
      "routed": jnp.asarray([plan.bodies[i][1] for i in plan.body_of]),
      "scored": jnp.asarray(scored),
      "offset": jnp.asarray(plan.offsets, jnp.int32),
  }
  carry = (
      decoder.embed(config, params, tokens_BxT, dtype),
      jnp.zeros((batch, num_positions)),
      routers.init_state(router, batch, num_positions),
      empty_cache(config, plan, batch, dtype),
  )
  last, decided, planned = config.num_blocks - 1, [], None
  for begin, end in routing.phases(config.num_blocks):
    some = jax.tree.map(lambda a: a[begin:end], inputs)
    if begin == routing.one_pass_block and any(plan.bodies[i][1] for i in plan.body_of[begin:]):
      x, score, state, _ = carry  # all gates from here on, before any of these blocks is computed

      def plan_block(state, inputs):
        keep, least, state = decide(x, score, state, inputs)
        return state, (keep, least)

      _, planned = jax.lax.scan(plan_block, state, jax.tree.map(lambda a: a[begin:], inputs))
    if planned:
      first = begin - routing.one_pass_block
      some["decided"] = jax.tree.map(lambda a: a[first : first + end - begin], planned)
    if begin < min(end, last):
      carry, out = run(carry, jax.tree.map(lambda a: a[: last - begin], some), begin, min(end, last), bool(planned))
      decided.append(out)
  x, score, state, buffers = carry
  some = jax.tree.map(lambda a: a[-1], some)
  body = Body(*plan.bodies[plan.body_of[-1]], last >= plan.evict_from, last=True)
  gate, out, _ = gates(x, score, state, some, [body], bool(planned))
  score, buffers, held = project(x, score, gate, buffers, some, body.evict, False)
  x, _, tiles = body.whole(x, score, gate, held, some)
  buffers = put(buffers, tiles, some) if tiles else buffers
  decided.append(jax.tree.map(lambda a: a[None], out))
  keep, least = jax.tree.map(lambda *a: jnp.concatenate(a), *decided)
  return Prefilled(decoder.unembed(config, params, x[:, 0]), Cache(*buffers, keep, context_B, row_B, least))
