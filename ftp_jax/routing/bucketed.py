"""Bucketed execution of a prefill: kept tokens are gathered, in order, into the block's bucket of slots.

The routes are those of `masked.forward`, by the same functions; only kept tokens are computed. One scan runs over the
blocks of each of `Plan.phases` and branches to the body of the block's bucket, so that it holds as many block bodies as
its blocks have distinct buckets; where XLA computes attention, bodies share it: the scan branches before and after.
Branches make a GPU's host wait and a TPU copy what they read: there plans have more phases, and most need no branch.
The last block computes the last token's output alone, as nothing else is read.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftp_jax import hardware
from ftp_jax.models import decoder
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import factors as factor_lib
from ftp_jax.routing import routers
from ftp_jax.routing.bodies import Body, Gate, ScoreTable, project, run_body
from ftp_jax.routing.cache import Cache, empty_cache, put_tiles
from ftp_jax.routing.config import RoutingConfig
from ftp_jax.routing.contexts import Contexts
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
) -> tuple[jax.Array, jax.Array, jax.Array]:
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
  )
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
  contexts = Contexts(config, params, tokens_BxT, context_B, attention)
  row_B = routers.row_seed(tokens_BxT, context_B)
  tables = {always: ScoreTable(contexts, routing.score_window, always) for always in (False, True)}
  scored = [router.reads_scores and some for some in routing.scored_blocks(plan.routed, router.recurrent)]

  def decide(x, score, state, inputs):
    return decide_context(routing, router, inputs, x, score, state, contexts.position_BxT, context_B, row_B)

  def one_block(bodies, carry, inputs):
    """A block that has one of the bodies: what the next one gets, and its routes as `Cache` keeps them."""
    x, score, state, buffers = carry
    gate, least_B, state = _gate(contexts, bodies, decide, router.recurrent, x, score, state, inputs)
    held = None
    if not bodies[0].evict:
      score, buffers, held = project(contexts, bodies[0].table, x, score, gate, buffers, inputs)
    x, score, tiles = run_body(contexts, bodies, inputs["body"], x, score, gate, held, inputs)
    if tiles:
      buffers = put_tiles(buffers, tiles, inputs["offset"], plan.tiles_fit or bodies[0].alone)
    return (x, score, state, buffers), (gate.keep_BxT, least_B)

  def run(carry, inputs, begin, end):
    """Blocks [begin, end), with bodies for the buckets they have."""
    used, some = sorted(set(plan.body_of[begin:end])), scored[begin:end]
    own = tables[all(some)] if any(some) else None
    bodies = [Body(contexts, *plan.bodies[i], begin >= plan.evict_from, own, alone=len(used) == 1) for i in used]
    inputs = inputs | {"body": jnp.asarray([used.index(i) for i in plan.body_of[begin:end]], jnp.int32)}
    return jax.lax.scan(lambda carry, inputs: one_block(bodies, carry, inputs), carry, inputs)

  inputs = block_inputs(routing, router, schedule_L) | {
      "routed": jnp.asarray(plan.routed),
      "scored": jnp.asarray(scored),
      "offset": jnp.asarray(plan.offsets, jnp.int32),
  }
  carry = (
      decoder.embed(config, params, tokens_BxT, dtype),
      jnp.zeros((batch, num_positions)),
      routers.init_state(router, batch, num_positions),
      empty_cache(config, plan, batch, dtype),
  )
  last, start, routes, planned = config.num_blocks - 1, routing.one_pass_block, [], None
  for begin, end in plan.phases(routing, None if hardware.platform() == "cpu" else scored):
    of_phase, stop = jax.tree.map(lambda a: a[begin:end], inputs), min(end, last)
    if begin == start and any(plan.routed[begin:]):
      planned = _decide_ahead(decide, carry, jax.tree.map(lambda a: a[begin:], inputs))
    if planned:
      of_phase["decided"] = jax.tree.map(lambda a: a[begin - start : end - start], planned)
    if begin < stop:
      carry, found = run(carry, jax.tree.map(lambda a: a[: last - begin], of_phase), begin, stop)
      routes.append(found)
  body = Body(contexts, *plan.bodies[plan.body_of[-1]], last >= plan.evict_from, alone=True, last=True)
  (x, _, _, buffers), found = one_block([body], carry, jax.tree.map(lambda a: a[-1], of_phase) | {"body": 0})
  routes.append(jax.tree.map(lambda a: a[None], found))
  keep, least = jax.tree.map(lambda *a: jnp.concatenate(a), *routes)
  return Prefilled(decoder.unembed(config, params, x[:, 0]), Cache(*buffers, keep, context_B, row_B, least))


def _decide_ahead(decide, carry, inputs) -> tuple[jax.Array, jax.Array]:
  """Gates (L,B,T) and margins (L,B), see `decide_context`, of blocks of which none is computed yet."""
  x, score, state, _ = carry

  def one(state, inputs):
    keep, least, state = decide(x, score, state, inputs)
    return state, (keep, least)

  return jax.lax.scan(one, state, inputs)[1]


def _gate(
    contexts: Contexts, bodies: Sequence[Body], decide, recurrent: bool, x, score, state, inputs
) -> tuple[Gate, jax.Array, jax.Array]:
  """What a block that has one of these bodies decides: the gate, and margin (B) and state as of `decide_context`.

  Args:
    decide: `decide_context` of (x, score, state, inputs).
    recurrent: the router is asked in every block, for the sake of its state.
    inputs: of them it reads `routed`, whether anything is asked of the block, and `decided`, which is there if the gate
      was decided ahead; decide reads the others.
  """
  routed = [body.routed for body in bodies]
  most = max((body.num_slots for body in bodies if body.gathers), default=0)

  def decided(x, score, state, inputs):
    keep, least, state = (*inputs["decided"], state) if "decided" in inputs else decide(x, score, state, inputs)
    return keep, fill_slots(keep, most) if most else None, least, state

  def undecided(x, score, state, inputs):
    """All tokens; slots that no body reads, as both branches must have the same shapes."""
    del x, score, inputs
    zeros = lambda width: jnp.zeros((contexts.batch, width), int)
    none = Slots(zeros(most), zeros(most) > 0, zeros(contexts.num_positions))
    return contexts.in_context_BxT, none if most else None, jnp.zeros(contexts.batch), state

  operands = x, score, state, inputs
  if recurrent or all(routed):
    keep, filled, least, state = decided(*operands)
  elif not any(routed):
    keep, filled, least, state = undecided(*operands)
  else:
    keep, filled, least, state = jax.lax.cond(inputs["routed"], decided, undecided, *operands)
  return Gate(keep, filled), least, state
