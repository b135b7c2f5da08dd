"""What a baseline is: an engine, what it costs, and its perplexity; kinds share how they run.

Each is run by `inference.Engine`, so that all are evaluated and timed by what evaluates and times FTP.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax.data.prompts import Prompts, batches
from ftp_jax.errors import UserError
from ftp_jax.evaluation import flops
from ftp_jax.evaluation.baselines import subblock_inference, subblocks
from ftp_jax.evaluation.judge import Frozen
from ftp_jax.evaluation.methods import truncated
from ftp_jax.evaluation.perplexity import perplexity_of, routed_perplexity, summed_nll, truncated_perplexity
from ftp_jax.export.artifact import Artifact
from ftp_jax.inference.engine import Engine, Prefix
from ftp_jax.inference.padding import FINE, Padding
from ftp_jax.inference.programs import Execution, Spec, Weights
from ftp_jax.models.huggingface import fingerprint
from ftp_jax.models.sources import Model
from ftp_jax.routing import routers, stand_in
from ftp_jax.routing.config import RoutingConfig
from ftp_jax.routing.selection import capacity


class Costs(NamedTuple):
  """Of one prefilled prompt.

  Attributes:
    skipped: share of (token, block) pairs of the whole prompt that were not computed. An attention or MLP sub-block
      counts as its share of the block's parameters, which is its share of the FLOPs but for attention's products.
    flops: done.
  """

  skipped: float
  flops: float


@dataclasses.dataclass(frozen=True, eq=False)
class Baseline:
  """A pruned model.

  Attributes:
    name, sparsity, seed: the method, the S asked of it, and the seed of what is random in it.
    model: the base model.
    facts: JSON values from which, with the arrays, the baseline is made again.
    arrays: nested dicts of arrays, empty where nothing was trained.
    options: of the engine: dtype, attention, max_buckets, buckets.
  """

  name: str
  sparsity: float
  seed: int
  model: Model
  facts: dict[str, Any]
  arrays: Any = dataclasses.field(default_factory=dict)
  options: dict[str, Any] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def engine(self) -> Engine:
    """Runs it."""
    raise NotImplementedError

  @property
  def frozen(self) -> Frozen:
    """The model that the engine runs, as the masked executions take it."""
    return Frozen(self.engine.model.config, self.engine.model.params, self.engine.execution.spec.dtype)

  def prompt(self, tokens: Sequence[int]) -> Sequence[int]:
    """The tokens that the model sees of a prompt."""
    return tokens

  def routes(self, cache: Any) -> jax.Array:
    """What was computed in a prefill, (...,B,T) boolean: the leading axes are blocks, or blocks and sub-blocks."""
    return cache.keep_LxBxT

  @property
  def skipped_after(self) -> float:
    """Share of (token, block) pairs of the continuation that are not computed."""
    return 0.0

  def costs(self, keep: np.ndarray, context: int) -> Costs:
    """Of a prompt of `context` tokens.

    Args:
      keep: its `routes`, (...,T).
    """
    raise NotImplementedError

  def perplexity(self, windows: Prompts, batch: int) -> tuple[float | None, float | None]:
    """Perplexity over all positions, everything causal, and the sparsity achieved there; None where it says nothing."""
    raise NotImplementedError


class TruncatingEngine(Engine):
  """A dense engine that reads the sink and the latest tokens of a prompt only, positions counted anew."""

  def __init__(self, model: Model, sparsity: float, **options):
    super().__init__(model, **options)
    self.sparsity = sparsity

  def prefill(self, prompts: Sequence[Sequence[int]], padding: Padding = FINE) -> Prefix:
    self.check(prompts)
    return super().prefill([[prompt[t] for t in truncated(len(prompt), self.sparsity)] for prompt in prompts], padding)


class Truncation(Baseline):
  """Facts: none but the sparsity."""

  @functools.cached_property
  def engine(self) -> Engine:
    return TruncatingEngine(self.model, self.sparsity, **self.options)

  def prompt(self, tokens):
    return [tokens[t] for t in truncated(len(tokens), self.sparsity)]

  def costs(self, keep, context) -> Costs:
    kept, config = len(truncated(context, self.sparsity)), self.model.config
    return Costs(1 - kept / context, flops.prefill_flops(config, np.ones((config.num_blocks, kept)), kept))

  def perplexity(self, windows, batch):
    return truncated_perplexity(self.frozen, self.sparsity, windows, batch), self.sparsity


class Smaller(Baseline):
  """Whole blocks left out for all tokens. Facts: `removed`, their indices; none of them: the dense model."""

  @functools.cached_property
  def engine(self) -> Engine:
    config = self.model.config
    left = np.setdiff1d(np.arange(config.num_blocks), self.facts["removed"])
    params = self.model.params
    if len(left) < config.num_blocks:
      params = params | {"blocks": jax.tree.map(lambda a: a[left], params["blocks"])}
    smaller = dataclasses.replace(config, num_blocks=len(left))
    return Engine(dataclasses.replace(self.model, config=smaller, params=params), **self.options)

  @property
  def skipped_after(self) -> float:
    return len(self.facts["removed"]) / self.model.config.num_blocks

  def costs(self, keep, context) -> Costs:
    smaller = self.engine.model.config
    done = flops.prefill_flops(smaller, np.ones((smaller.num_blocks, context)), context)
    return Costs(self.skipped_after, done)

  def perplexity(self, windows, batch):
    return truncated_perplexity(self.frozen, 0.0, windows, batch), self.skipped_after


class Routed(Baseline):
  """Tokens skip blocks in the prefill.

  Facts: `routing`, `schedule`, and `router`, a kind or a RouterConfig. Arrays: a router's, and maps for skipped blocks
  beside its layers (`stand_in.join`).
  """

  @functools.cached_property
  def routing(self) -> RoutingConfig:
    return RoutingConfig(**self.facts["routing"])

  @functools.cached_property
  def router(self) -> routers.Router:
    kind = self.facts["router"]
    if isinstance(kind, str):
      return routers.STATIC if kind == "static" else routers.Router(kind, None, jax.random.key(self.seed))
    config = routers.RouterConfig(**(kind | {"factors": tuple(kind["factors"])}))
    return routers.Router("dynamic", config, jax.tree.map(jnp.asarray, stand_in.split(self.arrays)[0]))

  @functools.cached_property
  def engine(self) -> Engine:
    maps = jax.tree.map(jnp.asarray, stand_in.split(self.arrays)[1])
    model = dataclasses.replace(self.model, params=stand_in.attach(self.model.params, maps))
    weights = Weights(model.params, self.router, jnp.asarray(self.facts["schedule"], jnp.float32))
    return Engine(model, execution=Execution(Spec(model.config, self.routing), weights), **self.options)

  def costs(self, keep, context) -> Costs:
    keep = np.asarray(keep)[:, :context]
    rank = stand_in.rank(self.engine.model.params)
    done = flops.prefill_flops(self.model.config, keep, context, self.routing, self.router.config, rank)
    return Costs(float(1 - keep.mean()), done)

  def perplexity(self, windows, batch):
    if self.router.kind == "static" or self.name == "fastv":  # skips no newest token: dense figures
      return None, None
    return routed_perplexity(self.frozen, self.routing, self.router, self.facts["schedule"], windows, batch)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _causal_subblocks(config, params, removed, router, rows, threshold_Lx2, *, dtype):
  """Summed NLL, and how many tokens each sub-block computes, (L,2)."""
  hidden, keep = subblocks.causal_forward(
      config, removed, params, router, rows.tokens, rows.length, threshold_Lx2, dtype=dtype
  )
  return summed_nll(config, params, rows.tokens, rows.length, hidden), jnp.sum(keep, axis=(2, 3))


class Subblocks(Baseline):
  """Attention and MLP of a block removed for all tokens, or skipped by some in the prefill.

  Facts: `removed`, `schedule` and `threshold`, each one pair (attention, MLP) a block: what no token computes, the
  sparsity asked of context tokens, and the least margin with which a token computes it when each decides for itself.
  Arrays: the router of `subblocks`, or nothing.
  """

  @functools.cached_property
  def removed(self) -> np.ndarray:
    """(L,2) boolean."""
    return np.array(self.facts["removed"], bool)

  @functools.cached_property
  def router(self) -> Any:
    return jax.tree.map(jnp.asarray, self.arrays) if self.arrays else None

  @functools.cached_property
  def engine(self) -> Engine:
    spec = subblock_inference.spec(self.model.config, self.removed)
    weights = Weights(self.model.params, self.router, jnp.asarray(self.facts["schedule"], jnp.float32))
    return Engine(self.model, execution=Execution(spec, weights), **self.options)

  def routes(self, cache):
    return cache.keep_Lx2xBxT

  @property
  def skipped_after(self) -> float:
    return float((self.removed @ subblocks.shares(self.model.config)).mean())

  def costs(self, keep, context) -> Costs:
    config, schedule = self.model.config, np.asarray(self.facts["schedule"], np.float32)
    kept = np.asarray(capacity(schedule, np.full(schedule.shape, context, np.int32))) / context
    kept = np.where(self.removed, 0, np.where(schedule > 0, kept, 1))
    keep = np.asarray(keep)[:, :, :context]
    key = np.broadcast_to(~self.removed[:, :1], keep[:, 0].shape)
    done = flops.computed_flops(config, keep[:, 0], keep[:, 1], key)
    before = np.arange(config.num_blocks) < np.flatnonzero(~self.removed[:, 0])[-1]  # the last attention
    asks = (schedule > 0) & ~self.removed & before[:, None]
    done += 2.0 * context * config.hidden_size * asks.sum()
    return Costs(float(1 - (kept @ subblocks.shares(config)).mean()), done)

  def perplexity(self, windows, batch):
    model, total, computed = self.frozen, 0.0, np.zeros((self.model.config.num_blocks, 2))
    threshold_Lx2 = jnp.asarray(self.facts["threshold"], jnp.float32)
    for rows in batches(windows, batch):
      nll, count = _causal_subblocks(
          model.config, model.params, self.removed, self.router, rows.counted, threshold_Lx2, dtype=model.dtype
      )
      # The token that a filling row is left with is always computed.
      total, computed = total + float(nll), computed + np.asarray(count) - (rows.weight == 0).sum() * ~self.removed
    share = computed / np.sum(windows.length) @ subblocks.shares(model.config)
    return perplexity_of(total, windows), float(1 - share.mean())


def from_artifact(model: Model, artifact: Artifact, **options) -> Routed:
  """FTP itself as one of the methods; all prompts are pruned, whatever crossover was measured."""
  facts = {
      "routing": dataclasses.asdict(artifact.routing), "router": dataclasses.asdict(artifact.router),
      "schedule": list(artifact.schedule),
  }
  sparsity = round(float(np.mean(artifact.schedule)), 6)
  return Routed("ftp", sparsity, 0, model, facts, stand_in.join(artifact.params, artifact.stand_in), options)


def to_artifact(baseline: Baseline, base_model: str, figures: dict[str, Any]) -> Artifact:
  """A baseline that skips tokens as an artifact that `Engine` and PyTorch run as they run FTP's.

  Args:
    base_model: what the artifact names as the source of the baseline's model.

  Raises:
    UserError: the baseline is of another kind, or its router is the random one.
  """
  if not isinstance(baseline, Routed) or baseline.facts["router"] == "random":
    raise UserError(
        f"The baseline {baseline.name!r} cannot be an artifact, which has a router and skips tokens; choose static, "
        "late, late_maps, fastv or mod."
    )
  params, maps = stand_in.split(baseline.arrays)
  config = baseline.router.config
  if baseline.router.kind == "static":
    config, params = routers.of_factor("position")
  return Artifact(
      base_model=base_model, fingerprint=fingerprint(baseline.model.directory), family=baseline.model.config.family,
      schedule=tuple(baseline.facts["schedule"]), routing=baseline.routing, router=config, params=params,
      figures=figures, stand_in=maps,
  )
