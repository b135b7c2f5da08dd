"""Bucketed execution of a prefill: kept tokens are gathered, in order, into the block's bucket of slots.

The routes are those of `masked.forward`, by the same functions; only kept tokens are computed. One scan runs over the
blocks of each of `RoutingConfig.phases` and branches to the body of the block's bucket, so that it holds as many block
bodies as there are distinct buckets; where XLA computes attention, bodies share it: the scan branches before and after.
The last block computes the last token's output alone, as nothing else is read.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftp_jax.models import decoder
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import factors as factor_lib
from ftp_jax.routing import routers
from ftp_jax.routing.bodies import Body, Contexts, Gate, run_body
from ftp_jax.routing.cache import Cache, empty_cache, put
from ftp_jax.routing.config import RoutingConfig
from ftp_jax.routing.plan import Plan
from ftp_jax.routing.routers import Router
from ftp_jax.routing.selection import decode_schedule, keep_context, least_kept_margin
from ftp_jax.routing.slots import Slots, fill_slots


class Prefilled(NamedTuple):
  """Result of a prefill: next-token logits (B,V) in fp32 after each row's context, and its cache."""

  logits_BxV: jax.Array
  cache: Cache


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
  contexts = Contexts(config, routing, params, tokens_BxT, context_B, attention)
  scored = routing.scored_blocks([plan.bodies[i][1] for i in plan.body_of], router.recurrent)
  scored = [router.reads_scores and some for some in scored]
  fits = all(offset + num_positions <= sum(plan.cache_slots) for offset in plan.offsets[:-1])

  def decide(x, score, state, inputs):
    return decide_context(
        routing, router, inputs, x, score, state, contexts.position_BxT, context_B, contexts.row_B
    )

  def run(carry, inputs, begin, end, planned):
    """Blocks [begin, end), with bodies for the buckets they have."""
    used = sorted(set(plan.body_of[begin:end]))
    scores, evict = any(scored[begin:end]), begin >= plan.evict_from
    bodies = [Body(contexts, *plan.bodies[i], evict, scores=scores) for i in used]
    inputs = inputs | {"body": jnp.asarray([used.index(i) for i in plan.body_of[begin:end]], jnp.int32)}

    def step(carry, inputs):
      x, score, state, buffers = carry
      gate, least, state = _gate(contexts, bodies, decide, x, score, state, inputs, planned, router.recurrent)
      held = None
      if not evict:
        score, buffers, held = contexts.project(x, score, gate, buffers, inputs, scores)
      x, score, tiles = run_body(contexts, bodies, inputs["body"], x, score, gate, held, inputs)
      buffers = put(buffers, tiles, inputs["offset"], fits) if tiles else buffers
      return (x, score, state, buffers), (gate.keep_BxT, least)

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
  body, held = Body(contexts, *plan.bodies[plan.body_of[-1]], last >= plan.evict_from, last=True), None
  gate, least, _ = _gate(contexts, [body], decide, x, score, state, some, bool(planned), router.recurrent)
  if not body.evict:
    score, buffers, held = contexts.project(x, score, gate, buffers, some, False)
  x, _, tiles = body.whole(x, score, gate, held, some)
  buffers = put(buffers, tiles, some["offset"]) if tiles else buffers
  decided.append((gate.keep_BxT[None], least[None]))
  keep, least = jax.tree.map(lambda *a: jnp.concatenate(a), *decided)
  cache = Cache(*buffers, keep, context_B, contexts.row_B, least)
  return Prefilled(decoder.unembed(config, params, x[:, 0]), cache)


def _gate(
    contexts: Contexts, bodies: Sequence[Body], decide, x, score, state, inputs, planned: bool, recurrent: bool
) -> tuple[Gate, jax.Array, jax.Array]:
  """What a block that may have any of these bodies decides, what `decide_context` says of its margins, and the state.

  Args:
    planned: it was decided before, see `RoutingConfig.one_pass_block`.
    recurrent: a router is asked in every block, for the sake of its state.
  """
  routed = [body.routed for body in bodies]
  most = max((body.slots for body in bodies if body.gathers), default=0)

  def decided(x, score, state, inputs):
    keep, least, state = (*inputs["decided"], state) if planned else decide(x, score, state, inputs)
    return keep, fill_slots(keep, most) if most else None, least, state

  def undecided(x, score, state, inputs):
    del x, score, inputs
    whole = lambda width: jnp.zeros((contexts.batch, width), int)
    none = Slots(whole(most), whole(most) > 0, whole(contexts.num_positions))
    return contexts.in_context_BxT, none if most else None, jnp.zeros(contexts.batch), state

  operands = x, score, state, inputs
  if recurrent or all(routed):
    keep, slots, least, state = decided(*operands)
  elif not any(routed):
    keep, slots, least, state = undecided(*operands)
  else:
    keep, slots, least, state = jax.lax.cond(inputs["routed"], decided, undecided, *operands)
  return Gate(keep, slots), least, state
