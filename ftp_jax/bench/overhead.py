"""What routing costs by itself: the bucketed path when nothing is skipped, the router, gathering and scattering."""

import functools
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax.bench import records
from ftp_jax.bench.cases import Case, Prefill, dense, random_tokens, untrained_router
from ftp_jax.bench.settings import Settings
from ftp_jax.bench.timing import interleave, seconds_of
from ftp_jax.models.sources import Model
from ftp_jax.routing.bucketed import fill_slots, gather
from ftp_jax.routing.plan import Plan
from ftp_jax.routing.routers import STATIC


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


class _GatherScatter:
  name = "gather_scatter"

  def __init__(self, prefill: Prefill):
    self.prefill, spec = prefill, prefill.case.spec
    self.x = jnp.zeros((*prefill.arguments[1].shape, spec.model.hidden_size), spec.dtype)

  def measure(self) -> float:
    keep = self.prefill.keep_LxBxT
    return seconds_of(lambda: gather_scatter(self.prefill.plan, self.x, keep))[0]

  def describe(self) -> dict[str, Any]:
    plan = self.prefill.plan
    slots = [plan.bodies[i][0] for i in plan.body_of if plan.bodies[i][1]]
    return {"method": self.name, **self.prefill.case.labels, "router": None, "slots": slots}


def bench(model: Model, cases: Sequence[Case], settings: Settings, torch: None = None) -> list[dict[str, Any]]:
  """Records of every batch and context.

  Beside the usual figures: `extra_seconds`, what the named part adds (s0: over dense; dynamic_router: over the static
  router under the same schedule; gather_scatter: its own time), as `share` of the prefill it is part of (for
  gather_scatter that with the dynamic router) and as `share_of_dense`, of a dense prefill.
  """
  del torch
  found = []
  for batch, context in itertools.product(settings.batch, settings.context):
    found += _measure(model, cases, settings, random_tokens(model, batch, context))
  return found


def _measure(model: Model, cases: Sequence[Case], settings: Settings, tokens_BxT: np.ndarray) -> list[dict[str, Any]]:
  batch, context = tokens_BxT.shape
  router = cases[0].weights.router if settings.artifact else untrained_router(model)
  nothing_asked = cases[0].replace("s0", router, np.zeros(model.config.num_blocks), sparsity=0.0, shape=None)
  methods: list[Any] = [Prefill(case, tokens_BxT) for case in (dense(model, settings.dtype), nothing_asked)]
  for case in cases:
    dynamic = Prefill(case.replace("dynamic_router", router), tokens_BxT)
    methods += [dynamic, Prefill(case.replace("static_router", STATIC), tokens_BxT), _GatherScatter(dynamic)]
  seconds = interleave(methods, settings.runs, f"overhead context {context} batch {batch}")
  medians = list(map(statistics.median, seconds))

  found = []
  for i, (method, own) in enumerate(zip(methods, seconds)):
    extra, whole = None, medians[i]
    if method.name == "gather_scatter":
      extra, whole = medians[i], medians[i - 2]
    elif method.case.method == "dynamic_router":
      extra = medians[i] - medians[i + 1]
    elif method is methods[1]:
      extra = medians[1] - medians[0]
    shares = {} if extra is None else {"share": extra / whole, "share_of_dense": extra / medians[0]}
    reference = None if method.name == "gather_scatter" else seconds[0]
    found.append(records.make(
        "overhead", context=context, batch=batch, seconds=own, dense=reference, dtype=settings.dtype,
        extra_seconds=extra, **shares, **method.describe(),
    ))  # fmt: skip
  return found
