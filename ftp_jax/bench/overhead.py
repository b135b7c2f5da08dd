"""What routing costs by itself: the bucketed path when nothing is skipped, decisions, gathering and scattering."""

import functools
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax.bench import records
from ftp_jax.bench.cases import Case, Prefill, context_tokens, dense
from ftp_jax.bench.settings import Settings
from ftp_jax.bench.timing import interleave, seconds_of
from ftp_jax.inference.programs import Spec, Weights
from ftp_jax.models import decoder
from ftp_jax.models.attention import visible
from ftp_jax.models.sources import Model
from ftp_jax.routing import factors, routers
from ftp_jax.routing.bucketed import block_inputs, decide_context
from ftp_jax.routing.plan import Plan
from ftp_jax.routing.slots import fill_slots, gather


@functools.partial(jax.jit, static_argnames="plan")
def gather_scatter(plan: Plan, x_BxTxD: jax.Array, keep_LxBxT: jax.Array) -> jax.Array:
  """The moving of tokens in a prefill without its blocks: slots filled, tokens gathered, put back, (B,T,D)."""

  def block(x, keep, slots):
    filled = fill_slots(keep, slots)
    y = gather(x, filled.position_BxK) + 1  # something that XLA cannot take for the tokens themselves
    return jnp.where(keep[:, :, None], gather(y, filled.slot_BxT), x), None

  for body, (slots, routed) in enumerate(plan.bodies):
    blocks = np.array([i for i, b in enumerate(plan.body_of) if b == body and routed], int)
    if len(blocks):
      x_BxTxD, _ = jax.lax.scan(functools.partial(block, slots=slots), x_BxTxD, keep_LxBxT[blocks])
  return x_BxTxD


@functools.partial(jax.jit, static_argnames=("spec", "plan"))
def decide(spec: Spec, plan: Plan, weights: Weights, x_BxTxD, k_BxTxGxN, context_B) -> tuple[jax.Array, jax.Array]:
  """The decisions of a prefill without its blocks: scores, factors, router and selection.

  Args:
    x_BxTxD, k_BxTxGxN: states that stand for those entering every block, and keys for those of every block; of all
      tokens, though where a block evicts it scores fewer.

  Returns:
    Gates (decided blocks,B,T), and the margins that the decode rule `quantile` reads (decided blocks,B).
  """
  config, routing, router = spec.model, spec.routing, weights.router
  batch, num_positions = x_BxTxD.shape[:2]
  position = jnp.broadcast_to(jnp.arange(num_positions), (batch, num_positions))
  row_B, rows_BxW = jnp.zeros(batch, int), factors.window_rows(context_B, routing.score_window)
  at = jnp.maximum(rows_BxW, 0)
  inputs = block_inputs(routing, router, weights.schedule_L)
  routed = plan.routed
  scored = routing.scored_blocks(routed, router.recurrent)

  def scores_of(x, index):
    of_block = {"params": decoder.block_at(weights.params["blocks"], index)}
    angles = decoder.angles(config, at)
    q = decoder.Block(config).apply(of_block, gather(x, at), *angles, method=decoder.Block.queries)
    return factors.window_scores(q, k_BxTxGxN, visible(at, position, config.sliding_window), rows_BxW >= 0)

  def step(carry, inputs, decides, scores, planned):
    x, score, state = carry
    decided = None
    if decides:
      *decided, state = decide_context(routing, router, inputs, x, score, state, position, context_B, row_B)
    if scores:
      score = scores_of(x, inputs["index"])
    if not planned:  # nothing may be the same in the next block, or XLA computes it once
      x = jax.lax.optimization_barrier(x)
    return (x, score, state), decided

  carry = x_BxTxD, jnp.zeros(position.shape), routers.init_state(router, batch, num_positions)
  found = [[jnp.zeros((0, batch, num_positions), bool), jnp.zeros((0, batch))]]

  def what(i):  # a block does
    planned = 0 <= routing.one_pass_block <= i and any(routed[routing.one_pass_block :])
    return routed[i] or router.recurrent or planned, router.reads_scores and scored[i], planned

  for (decides, scores, planned), run in itertools.groupby(range(len(routed)), what):
    run = np.array(list(run))
    same = functools.partial(step, decides=decides, scores=scores, planned=planned)
    carry, decided = jax.lax.scan(same, carry, jax.tree.map(lambda a: a[run], inputs))
    found += [decided] if decides else []
  keep, least = map(jnp.concatenate, zip(*found))
  return keep, least


class _Alone:
  """A part of a prefill by itself, with random states and the routes that the prefill took."""

  def __init__(self, prefill: Prefill):
    self.prefill, spec = prefill, prefill.case.spec
    random = lambda *shape: jnp.asarray(np.random.default_rng(0).standard_normal(shape), spec.dtype)
    batch, context = prefill.arguments[1].shape
    self.x = random(batch, context, spec.model.hidden_size)
    self.k = random(batch, context, spec.model.num_kv_heads, spec.model.head_dim)

  def measure(self) -> float:
    return seconds_of(self.run)[0]


class _Decide(_Alone):
  name = "decide"

  def run(self) -> tuple[jax.Array, jax.Array]:
    weights, _, context_B = self.prefill.arguments
    return decide(self.prefill.case.spec, self.prefill.plan, weights, self.x, self.k, context_B)

  def describe(self) -> dict[str, Any]:
    return {"method": self.name, **self.prefill.case.labels}


class _GatherScatter(_Alone):
  name = "gather_scatter"

  def run(self) -> jax.Array:
    return gather_scatter(self.prefill.plan, self.x, self.prefill.keep_LxBxT)

  def describe(self) -> dict[str, Any]:
    plan = self.prefill.plan
    slots = [size for size, routed in zip(plan.slots, plan.routed) if routed]
    return {"method": self.name, **self.prefill.case.labels, "router": None, "slots": slots}


def bench(model: Model, cases: Sequence[Case], settings: Settings, torch: None = None) -> list[dict[str, Any]]:
  """Records of every batch and context.

  Beside the usual figures: `extra_seconds`, what the named part adds (s0: over dense; decide and gather_scatter: their
  own time without the rest), as `share` of the prefill it is part of and as `share_of_dense`, of a dense prefill.
  """
  del torch
  found = []
  for batch, context in itertools.product(settings.batch, settings.context):
    found += _measure(model, cases, settings, context_tokens(model, settings, batch, context))
  return found


def _measure(model: Model, cases: Sequence[Case], settings: Settings, tokens_BxT: np.ndarray) -> list[dict[str, Any]]:
  batch, context = tokens_BxT.shape
  nothing_asked = cases[0].replace("s0", np.zeros(model.config.num_blocks), sparsity=0.0, shape=None)
  methods: list[Any] = [Prefill(case, tokens_BxT) for case in (dense(model, settings.dtype), nothing_asked)]
  for case in cases:
    whole = Prefill(case, tokens_BxT)
    methods += [whole, _Decide(whole), _GatherScatter(whole)]
  seconds = interleave(methods, settings.runs, f"overhead context {context} batch {batch}")
  medians = list(map(statistics.median, seconds))

  found = []
  for i, (method, own) in enumerate(zip(methods, seconds)):
    alone, extra, whole = isinstance(method, _Alone), None, medians[i]
    if alone:
      extra, whole = medians[i], medians[methods.index(method.prefill)]
    elif method is methods[1]:
      extra = medians[1] - medians[0]
    shares = {} if extra is None else {"share": extra / whole, "share_of_dense": extra / medians[0]}
    reference = None if alone else seconds[0]
    found.append(records.make(
        "overhead", context=context, batch=batch, seconds=own, dense=reference, dtype=settings.dtype,
        extra_seconds=extra, **shares, **method.describe(),
    ))
  return found
