"""Time to compile a prefill, and the memory it needs, against the number of buckets."""

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from ftp_jax.bench import records
from ftp_jax.bench.cases import Case, builtin, dense
from ftp_jax.bench.settings import Settings
from ftp_jax.bench.timing import interleave
from ftp_jax.inference import programs
from ftp_jax.models.sources import Model
from ftp_jax.routing.plan import Plan

_MOST_BUCKETS = 4


class _Compile:
  """Traces, lowers and compiles a prefill as if for the first time; a timing.Method."""

  def __init__(self, case: Case, plan: Plan, batch: int):
    self.case, self.plan, self.name = case, plan, f"{case.name} buckets={buckets(plan)}"
    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    self.arguments = case.weights, int32(batch, plan.num_positions), int32(batch)

  def measure(self) -> float:
    jax.clear_caches()
    start = time.perf_counter()
    self.compiled = programs.prefill.lower(self.case.spec, self.plan, *self.arguments).compile()
    return time.perf_counter() - start

  def describe(self) -> dict[str, Any]:
    """For its record: method, labels, size of the plan, and bytes beside the weights, None if the backend is silent."""
    found = self.compiled.memory_analysis()
    temp, output = (found.temp_size_in_bytes, found.output_size_in_bytes) if found else (None, None)
    return {
        "method": self.case.method, **self.case.labels, "buckets": buckets(self.plan), "bodies": len(self.plan.bodies),
        "temp_bytes": temp, "output_bytes": output, "peak_bytes": temp + output if found else None,
    }


def buckets(plan: Plan) -> int:
  """Distinct capacities of the routed blocks."""
  return len({slots for slots, routed in plan.bodies if routed})


def bench(model: Model, cases: Sequence[Case], settings: Settings, torch: None = None) -> list[dict[str, Any]]:
  """Records of every batch and context: dense, the cases, and plans of 1 to 4 buckets.

  Built-in schedules need one or two buckets; those of more come from the schedule `ramp`. The artifact's schedule is
  given every number of buckets that it can use. `peak_bytes` is the sum of temporaries and outputs.
  """
  del torch
  found = []
  with _no_persistent_cache():
    for batch, context in itertools.product(settings.batch, settings.context):
      methods = [_Compile(case, plan, batch) for case, plan in _plans(model, cases, settings, context)]
      show = lambda speedup: f"{1 / speedup:.2f}x the time of dense"
      seconds = interleave(methods, settings.runs, f"compile context {context} batch {batch}", show)
      for method, own in zip(methods, seconds):
        ratio = statistics.median(own) / statistics.median(seconds[0])
        found.append(records.make(
            "compile", context=context, batch=batch, seconds=own, dtype=settings.dtype, compile_ratio=ratio,
            **method.describe(),
        ))
  return found


def _plans(model: Model, cases: Sequence[Case], settings: Settings, context: int) -> list[tuple[Case, Plan]]:
  plain = dense(model, settings.dtype)
  found, varied = [(plain, plain.plan(context))], list(cases)
  if not settings.artifact:
    found += [(case, case.plan(context)) for case in cases]
    varied = [  # one ramp for each kv mode and sparsity
        case.replace("ftp", builtin("ramp", model.config.num_blocks, case.labels["sparsity"]), shape="ramp")
        for case in cases if case.labels["shape"] == settings.shape[0]
    ]
  for case in varied:
    plans = dict.fromkeys(case.plan(context, most) for most in range(1, _MOST_BUCKETS + 1))  # distinct ones
    found += [(case, plan) for plan in plans]
  return found


@contextlib.contextmanager
def _no_persistent_cache() -> Iterator[None]:
  """Nothing is read from disk instead of being compiled."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # or an earlier look at the setting holds
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()
