"""The ways to run a model that a bench compares, and their prefill."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax.bench.settings import Settings
from ftp_jax.bench.timing import seconds_of
from ftp_jax.config import get_config
from ftp_jax.data.records import read_documents
from ftp_jax.data.windows import running_text
from ftp_jax.errors import UserError
from ftp_jax.evaluation.flops import prefill_flops
from ftp_jax.export.artifact import Artifact
from ftp_jax.inference import programs
from ftp_jax.inference.engine import Engine
from ftp_jax.inference.programs import Spec, Weights
from ftp_jax.models.sources import DTYPES, Model
from ftp_jax.routing import stand_in
from ftp_jax.routing.bucketed import Prefilled
from ftp_jax.routing.config import RouterConfig, RoutingConfig
from ftp_jax.routing.plan import MAX_BUCKETS, Plan
from ftp_jax.routing.routers import STATIC, Router, init_router
from ftp_jax.search import schedule as schedules


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """A model with a schedule, a router and a kv mode; dense where nothing is asked.

  Attributes:
    method: its name in records.
    labels: what records say of it: sparsity, shape, kv, router.
  """

  method: str
  spec: Spec
  weights: Weights
  labels: dict[str, Any]

  @property
  def name(self) -> str:
    """In words, for progress bars and plots."""
    labels = self.labels
    return " ".join([self.method] + [labels[k] for k in ("shape", "kv") if labels[k]]) + (
        f" S={labels['sparsity']:g}" if labels["shape"] else ""
    )

  def plan(self, num_positions: int, max_buckets: int = MAX_BUCKETS) -> Plan:
    return self.spec.plan(self.weights, num_positions, max_buckets)

  def replace(self, method: str, schedule_L, **labels) -> "Case":
    """The same under another name, with another schedule."""
    weights = self.weights._replace(schedule_L=jnp.asarray(schedule_L, jnp.float32))
    return Case(method, self.spec, weights, self.labels | labels)


def dense(model: Model, dtype: str) -> Case:
  """Our own dense path: nothing is asked of any block."""
  spec = Spec(model.config, RoutingConfig(), DTYPES[dtype])
  labels = {"sparsity": 0.0, "shape": None, "kv": None, "router": None}
  return Case("dense", spec, Weights(model.params, STATIC, jnp.zeros(model.config.num_blocks)), labels)


def pruned(model: Model, settings: Settings, artifacts: Sequence[Artifact]) -> list[Case]:
  """The cases that settings ask for: the artifacts, numbered where there are several, or built-in schedules.

  Raises:
    UserError: an artifact belongs to another model.
  """
  base = dense(model, settings.dtype)
  found = []
  for number, artifact in enumerate(artifacts, 1):
    _, weights = Engine(model, artifact, dtype=settings.dtype).execution
    shape = "artifact" if len(artifacts) == 1 else f"artifact {number}"
    found.append(_pruned(base, weights, artifact.routing, shape, np.mean(artifact.schedule)))
  if found:
    return found
  router = STATIC if settings.router == "static" else untrained_router(model, settings.router)
  for shape, kv, sparsity in itertools.product(settings.shape, settings.kv, settings.sparsity):
    schedule_L = builtin(shape, model.config.num_blocks, sparsity)
    weights = Weights(model.params, router, jnp.asarray(schedule_L, jnp.float32))
    case = _pruned(base, weights, RoutingConfig(kv_mode=kv), shape, sparsity)
    found.append(dataclasses.replace(case, labels=case.labels | {"router": settings.router}))
  return found


def _pruned(base: Case, weights: Weights, routing: RoutingConfig, shape: str, sparsity) -> Case:
  labels = {"sparsity": round(float(sparsity), 6), "shape": shape, "kv": routing.kv, "router": weights.router.kind}
  return Case("ftp", dataclasses.replace(base.spec, routing=routing), weights, labels)


def untrained_router(model: Model, kind: str) -> Router:
  """`dynamic`, as the base config trains, or `factors`, as in the paper: good for nothing but its time."""
  config = RouterConfig() if kind == "factors" else RouterConfig.from_config(get_config().router)
  params = init_router(config, jax.random.key(0), model.config.num_blocks, model.config.hidden_size)
  return Router("dynamic", config, params)


def builtin(shape: str, num_blocks: int, sparsity: float) -> np.ndarray:
  """A schedule (L,) of mean `sparsity`: `middle`, `late`, or `ramp`, which asks something else of every block."""
  if shape == "ramp":
    grid = 1000
    units = schedules.to_units(np.linspace(0, 2 * sparsity, num_blocks), sparsity, grid, schedules.MAX_SPARSITY)
    return schedules.to_sparsity(units, grid)
  make = {"middle": schedules.middle, "late": schedules.late}[shape]
  return make(num_blocks, sparsity, schedules.MAX_SPARSITY)


def context_tokens(model: Model, settings: Settings, batch: int, context: int) -> np.ndarray:
  """Contexts (B,T) int32: `random_tokens`, or one after another of the text that settings name.

  Raises:
    UserError: the text cannot be read or is too short.
  """
  if not settings.text:
    return random_tokens(model, batch, context)
  ids = running_text(read_documents(settings.text), model.tokenizer)
  if len(ids) < batch * context:
    raise UserError(
        f"--text={settings.text} has {len(ids)} tokens, fewer than {batch} rows of {context}; name a longer text, or "
        "lower --batch or --context."
    )
  return np.array(ids[: batch * context], np.int32).reshape(batch, context)


def random_tokens(model: Model, batch: int, context: int) -> np.ndarray:
  """Token ids (B,T) int32, the same in every run."""
  return np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, context), dtype=np.int32)


class Prefill:
  """Time to first token of a case: KV cache and next-token logits of full rows; a timing.Method.

  Attributes:
    keep_LxBxT: the routes of the last measurement.
  """

  def __init__(self, case: Case, tokens_BxT: np.ndarray):
    self.case, self.name, self.keep_LxBxT = case, case.name, None
    batch, context = tokens_BxT.shape
    self.plan = case.plan(context)
    self.arguments = case.weights, jnp.asarray(tokens_BxT), jnp.full(batch, context, jnp.int32)

  def run(self) -> Prefilled:
    return programs.prefill(self.case.spec, self.plan, *self.arguments)

  def measure(self) -> float:
    seconds, out = seconds_of(self.run)
    self.keep_LxBxT = out.cache.keep_LxBxT
    return seconds

  def describe(self) -> dict[str, Any]:
    """For its record: method, labels, achieved sparsity and the ideal speedup by the FLOPs of the routes taken."""
    keep_LxBxT = np.asarray(self.keep_LxBxT)
    spec, router = self.case.spec, self.case.weights.router
    batch, context = keep_LxBxT.shape[1:]
    rank = stand_in.rank(self.case.weights.params)
    flops = lambda keep_LxT: prefill_flops(spec.model, keep_LxT, context, spec.routing, router.config, rank)
    taken = sum(flops(keep_LxBxT[:, b]) for b in range(batch))
    ideal = batch * flops(np.ones_like(keep_LxBxT[:, 0])) / taken
    achieved = float(1 - keep_LxBxT.mean())
    return {"method": self.case.method, **self.case.labels, "achieved_sparsity": achieved, "ideal_speedup": ideal}
