"""One training step of the router: the frozen model is an argument, the state holds the router only.

The maps that stand in for skipped blocks are trained with it where they are kept beside its layers (`stand_in.join`);
elsewhere those of the frozen parameters stay as they are.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ftp_jax import sharding
from ftp_jax.errors import UserError
from ftp_jax.models import scoring
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import masked, routers, selection, stand_in
from ftp_jax.routing.config import RouterConfig, RoutingConfig
from ftp_jax.training import losses

GUIDES = ("static", "fisher")
DISTILL = ("kl", "mse")
DECAYS = ("cosine", "linear", "none")


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """The keys of `config.train` that shape a step; see config.py for each."""

  steps: int
  learning_rate: float
  warmup: int
  clip: float
  distill: str
  distill_weight: float
  sparsity_weight: float
  sparsity_two_sided: bool
  guide: str
  guide_weight: float
  guide_decay: str
  input_gradient: bool = True
  stand_in_learning_rate: float = 0.0
  guide_stakes: float = 0.0

  def __post_init__(self):
    for name, allowed in (("distill", DISTILL), ("guide", GUIDES), ("guide_decay", DECAYS)):
      if getattr(self, name) not in allowed:
        raise UserError(f"train.{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}.")
    if self.steps < 1 or self.learning_rate <= 0 or self.clip <= 0:
      raise UserError("train.steps, train.learning_rate and train.clip must be positive.")
    if self.stand_in_learning_rate < 0:
      raise UserError(f"train.stand_in_learning_rate={self.stand_in_learning_rate} must be at least 0.")
    if not 0 <= self.guide_stakes <= 1:
      raise UserError(f"train.guide_stakes={self.guide_stakes} must lie between 0 and 1.")
    if self.guide_stakes and self.guide != "fisher":
      raise UserError(
          f"train.guide_stakes={self.guide_stakes} is about gate scores; set train.guide='fisher', or leave it at 0."
      )

  @classmethod
  def from_config(cls, train_config) -> "TrainSettings":
    return cls(**{field.name: train_config[field.name] for field in dataclasses.fields(cls)})


class TrainState(flax.struct.PyTreeNode):
  """All that training changes: the router, with maps where they are trained, and the optimizer's moments.

  step: steps done; the position in the data and the guide's weight follow from it.
  """

  step: jax.Array
  router: Any
  optimizer: Any


class Batch(flax.struct.PyTreeNode):
  """Prompts of one step. fisher_LxBxT: gate scores (`guide.with_new_tokens`), None when the guide is static."""

  tokens_BxT: jax.Array
  context_B: jax.Array
  length_B: jax.Array
  fisher_LxBxT: jax.Array | None


@dataclasses.dataclass(frozen=True)
class StepSpec:
  """Everything static about a step; hashable.

  router: None: tokens skip in the static order, and maps for skipped blocks are all that is trained.
  """

  model: ModelConfig
  routing: RoutingConfig
  router: RouterConfig | None
  train: TrainSettings
  num_scored: int
  start: int = 0  # blocks before it are dense under the schedule; the pass below them has no gradient
  dtype: Any = jnp.float32
  remat: str = "none"
  attention: str = "auto"  # one of masked.ATTENTIONS


def make_optimizer(settings: TrainSettings) -> optax.GradientTransformation:
  """AdamW with warm-up, cosine decay and a bound on the global gradient norm; maps have a rate of their own."""
  warmup = min(settings.warmup, settings.steps - 1)
  peak = settings.learning_rate
  rate = optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, settings.steps)
  steps = [optax.clip_by_global_norm(settings.clip), optax.adamw(rate, weight_decay=1e-4)]
  if settings.stand_in_learning_rate:

    def scale(updates, _):
      router, maps = stand_in.split(updates)
      return stand_in.join(router, jax.tree.map(lambda u: settings.stand_in_learning_rate / peak * u, maps))

    steps.append(optax.stateless(scale))
  return optax.chain(*steps)


def init_state(settings: TrainSettings, router_params: Any) -> TrainState:
  """The state before the first step, of the parameters to start from."""
  return TrainState(jnp.zeros((), jnp.int32), router_params, make_optimizer(settings).init(router_params))


def guide_weight(settings: TrainSettings, step: jax.Array) -> jax.Array:
  """w_g at a step: decays from `guide_weight` to 0 at the last step."""
  left = 1 - step / settings.steps
  shape = {"none": 1.0, "linear": left, "cosine": 0.5 * (1 - jnp.cos(jnp.pi * left))}[settings.guide_decay]
  return settings.guide_weight * shape


def guide_scores(spec: StepSpec, batch: Batch) -> jax.Array:
  """Scores (L,B,T) whose largest fill each block: recency (static order, which computes new tokens) or Fisher."""
  if spec.train.guide == "fisher":
    return batch.fisher_LxBxT
  recency = jnp.arange(batch.tokens_BxT.shape[1], dtype=jnp.float32)[None, None]
  return jnp.broadcast_to(recency, (spec.model.num_blocks,) + batch.tokens_BxT.shape)


def loss_fn(spec: StepSpec, params: Any, router: Any, batch: Batch, schedule_L, step) -> tuple[jax.Array, dict]:
  """w_d L_d + w_s L_s + w_g L_g and its parts."""
  router, maps = stand_in.split(router)
  params = stand_in.attach(params, maps)
  tokens, context, length = batch.tokens_BxT, batch.context_B, batch.length_B
  routed = routers.Router("dynamic", spec.router, router) if spec.router else routers.STATIC
  start = masked.late_start(spec.routing, routed, spec.start)
  (entry,), dense = jax.lax.stop_gradient(
      masked.dense_entries(
          spec.model, spec.routing, params, tokens, context, length, (start,), dtype=spec.dtype,
          attention=spec.attention,
      )
  )
  out = masked.forward(
      spec.model, spec.routing, params, routed, tokens, context, length, schedule_L, start=start,
      entry=entry if start else None,
      straight_through=True, input_gradient=spec.train.input_gradient, dtype=spec.dtype, remat_policy=spec.remat,
      attention=spec.attention,
  )
  source, _, weight = scoring.continuation(tokens, context, length, spec.num_scored)
  if spec.train.distill == "kl":
    teacher = scoring.log_probs(spec.model, params, dense, source)
    distill = losses.distill_kl(teacher, scoring.log_probs(spec.model, params, out.hidden_BxTxD, source), weight)
  else:
    states = lambda x: scoring.gather_positions(x, source)
    distill = losses.distill_mse(states(dense), states(out.hidden_BxTxD), weight)
  in_context = jnp.arange(tokens.shape[1])[None] < context[:, None]
  guided = losses.guided_tokens(context, length, tokens.shape[1], spec.routing)
  skipping = (schedule_L > 0).astype(jnp.float32)
  recent = selection.recent_tokens(context, tokens.shape[1], spec.routing)  # their margins decide nothing
  soft = jnp.where(recent, out.keep_LxBxT.astype(jnp.float32), jax.nn.sigmoid(out.margin_LxBxT))
  soft_share = lambda tokens: losses.skipped_share(soft, tokens) * skipping
  sparsity = losses.sparsity_loss(schedule_L * skipping, soft_share(in_context), spec.train.sparsity_two_sided)
  after = losses.new_tokens(context, length, tokens.shape[1])
  if spec.routing.trains_continuation:  # no capacity bounds what they skip, so that too much costs as well
    sparsity += jnp.abs(spec.routing.decode_sparsity - jnp.mean(soft_share(after)))
  scores = guide_scores(spec, batch)
  target = losses.targets(scores, schedule_L, context, spec.routing)
  stakes = spec.train.guide_stakes
  stake = losses.stakes(scores, target, context, spec.routing, stakes) if stakes else 1.0
  guide = losses.guide_loss(out.margin_LxBxT, target, schedule_L, guided, stake)
  weight_g = guide_weight(spec.train, step)
  total = spec.train.distill_weight * distill + spec.train.sparsity_weight * sparsity + weight_g * guide
  return total, {
      "loss": total,
      "distill": distill,
      "sparsity": sparsity,
      "guide": guide,
      "guide_weight": weight_g,
      "asked": schedule_L,
      "achieved": losses.skipped_share(out.keep_LxBxT.astype(jnp.float32), in_context),
      "decode_achieved": jnp.mean(losses.skipped_share(out.keep_LxBxT.astype(jnp.float32), after)),
  }


def train_step(spec: StepSpec, params: Any, state: TrainState, batch: Batch, schedule_L) -> tuple[TrainState, dict]:
  """One optimizer step; gradients with respect to the router alone, and maps beside it."""
  grad = jax.grad(lambda router: loss_fn(spec, params, router, batch, schedule_L, state.step), has_aux=True)
  grads, metrics = grad(state.router)
  updates, optimizer = make_optimizer(spec.train).update(grads, state.optimizer, state.router)
  router = optax.apply_updates(state.router, updates)
  return TrainState(state.step + 1, router, optimizer), metrics | {"grad_norm": optax.tree.norm(grads)}


@functools.lru_cache(maxsize=None)
def compiled_step(spec: StepSpec, mesh: jax.sharding.Mesh | None) -> Any:
  """`train_step` jitted: (params, state, batch, schedule_L) -> (state, metrics); gives its state's memory away.

  On a mesh the weights lie where they are, the batch over data x fsdp, all else is replicated.
  """
  step = functools.partial(train_step, spec)
  if mesh is None:
    return jax.jit(step, donate_argnums=1)
  whole = sharding.named(mesh, (), ())
  rows = jax.sharding.NamedSharding(mesh, jax.P(sharding.RULES.mesh_axes["batch"]))
  fisher = jax.sharding.NamedSharding(mesh, jax.P(None, sharding.RULES.mesh_axes["batch"]))
  batch = Batch(rows, rows, rows, fisher if spec.train.guide == "fisher" else None)
  return jax.jit(step, donate_argnums=1, in_shardings=(None, whole, batch, whole), out_shardings=whole)


def jitted_step(spec: StepSpec, params: Any, state: TrainState, batch: Batch, schedule_L) -> tuple[TrainState, dict]:
  """`train_step` where the parameters are; the batch and the schedule are host arrays."""
  rows = sharding.place(params, (batch.tokens_BxT, batch.context_B, batch.length_B), "batch")
  fisher = sharding.place(params, batch.fisher_LxBxT, None, "batch")
  with sharding.over(params):
    return compiled_step(spec, sharding.mesh_of(params))(params, state, Batch(*rows, fisher), schedule_L)
