"""Per-token skipping in the way of SkipGPT (Zhao et al. 2025, arXiv 2506.04179): each token decides in every attention
and every MLP by itself, by a linear router of the normed state; a token that skips attention keeps its key and value.

Training is the paper's first stage, the model frozen: hard gates of a Gumbel-softmax in the forward pass, its gradient
in the backward pass, and one penalty on the sparsity of all sub-blocks together. (Two logits under Gumbel noise are one
margin under logistic noise, so that the router has one output.) Deviations: the loss is the KL to the dense model on
the continuation, as in FTP's training, not that of language modelling; attention and MLP count as their shares of the
parameters; the second stage, LoRA on the model, is left out. After training one threshold for all sub-blocks is set so
that S is met on the calibration prompts, and a static capacity for each sub-block is read off; a prefill then computes
the K tokens of largest margin. Generated tokens are computed, as by FTP; all-position perplexity uses the threshold.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from ftp_jax.data.prompts import Prompts, batches, indices_at, take
from ftp_jax.errors import UserError
from ftp_jax.evaluation.baselines import subblocks
from ftp_jax.evaluation.baselines.calibration import Calibration, fingerprint
from ftp_jax.evaluation.judge import Frozen
from ftp_jax.models import decoder, scoring
from ftp_jax.routing.selection import forced_tokens
from ftp_jax.training import losses
from ftp_jax.training.checkpoint import Checkpoints, Progress, to_host

LEARNING_RATE, CLIP = 1e-3, 1.0
PENALTY = 4.0  # nats for skipping a share of 1 too little or too much
_FIRST_BIAS = 2.0  # sigmoid(-2): the share that skips before the first step, 12 %
_MOST = 0.999  # sparsity of a sub-block: the forced tokens stay
_ROUNDS = 2  # of setting the threshold; margins move when routes do
_VALIDATIONS, _VALIDATION_PROMPTS = 4, 192  # prompts: those on which a validation sets the threshold


class TrainState(NamedTuple):
  """The router's parameters and the state of their optimizer."""

  router: Any
  optimizer: Any


def calibrate(model: Frozen, sparsity: float, calibration: Calibration, seed: int) -> tuple[dict[str, Any], Any]:
  """Facts of a `Subblocks` and the router's parameters: those of the best of four validations.

  An interrupted training goes on from its last checkpoint.
  """
  shape, steps = (model.config.num_blocks, 2), calibration.steps
  router = {"kernel": jnp.zeros(shape + (model.config.hidden_size,)), "bias": jnp.full(shape, _FIRST_BIAS)}
  state = TrainState(router, _optimizer(steps).init(router))
  prompts, num_scored = calibration.prompts, calibration.num_scored
  step = functools.partial(_step, model.config, steps, num_scored, model.dtype)
  validate_every, save_every = max(1, steps // _VALIDATIONS), max(1, steps // 8)
  first = take(prompts, np.arange(min(_VALIDATION_PROMPTS, len(prompts.tokens))))
  with (
      calibration.working_directory(f"skipgpt-S{sparsity:.2f}-seed{seed}", model) as directory,
      Checkpoints(directory, _identity(model, sparsity, calibration, seed)) as checkpoints,
  ):
    at = checkpoints.restore(state) or Progress(0, state, to_host(router), 0, math.inf)
    bar = tqdm.tqdm(range(at.step, steps), "SkipGPT: training", initial=at.step, total=steps, mininterval=0.5)
    for number in bar:
      rows = take(prompts, indices_at(len(prompts.tokens), calibration.batch, number, seed))
      key = jax.random.fold_in(jax.random.key(seed), number)
      router, optimizer_state, distill, skipped = step(model.params, *at.state, rows, sparsity, key)
      at = at._replace(step=number + 1, state=TrainState(router, optimizer_state))
      bar.set_postfix(kl=f"{float(distill):.3f}", skipped=f"{float(skipped):.1%}", refresh=False)
      if not np.isfinite(float(distill)):
        raise UserError(f"SkipGPT's loss is not finite at step {number}; check the calibration prompts.")
      if at.step % validate_every == 0 or at.step == steps:
        schedule, _ = capacities(model, router, sparsity, first, calibration.batch)
        kl = _validation_kl(model, router, schedule, calibration)
        if kl < at.best_validation:
          at = at._replace(best_router=to_host(router), best_step=at.step, best_validation=kl)
      if at.step % save_every == 0 or at.step == steps:
        checkpoints.save(at)
  schedule, threshold = capacities(model, at.best_router, sparsity, prompts, calibration.batch)
  removed = np.zeros(shape, bool).tolist()
  return {
      "removed": removed, "schedule": schedule.tolist(), "threshold": threshold.tolist(),
      "validation_kl": at.best_validation, "step": at.best_step,
  }, at.best_router


def _identity(model: Frozen, sparsity: float, calibration: Calibration, seed: int) -> dict[str, Any]:
  """What makes a training what it is."""
  return {
      "the model": dataclasses.asdict(model.config), "model.dtype": jnp.dtype(model.dtype).name, "S": sparsity,
      "the seed": seed, "the number of steps": calibration.steps, "the batch": calibration.batch,
      "the fingerprint of model and prompts": fingerprint(model, *calibration.prompts, *calibration.validation),
      "the learning rate": LEARNING_RATE, "validations": (_VALIDATIONS, _VALIDATION_PROMPTS),
  }


def _optimizer(steps: int) -> optax.GradientTransformation:
  rate = optax.cosine_decay_schedule(LEARNING_RATE, steps, 0.1)
  return optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(rate))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _step(config, steps, num_scored, dtype, params, router, state, rows: Prompts, sparsity, key):
  grads, (distill, skipped) = jax.grad(_loss, argnums=3, has_aux=True)(
      config, num_scored, params, router, rows, sparsity, key, dtype
  )
  updates, state = _optimizer(steps).update(grads, state, router)
  return optax.apply_updates(router, updates), state, distill, skipped


def _loss(config, num_scored, params, router, rows: Prompts, sparsity, key, dtype):
  """KL on the continuation and the penalty; its parts are that KL and the share skipped."""
  tokens, context, length = rows
  t = jnp.arange(tokens.shape[1])[None]
  in_context = t < context[:, None]
  free = in_context & ~forced_tokens(context, tokens.shape[1])

  def decide(sub, x, own):
    margin = subblocks.margin(own["router"], sub, x) + jax.random.logistic(own["key"][sub], tokens.shape)
    soft = jax.nn.sigmoid(margin)
    hard = (margin > 0).astype(jnp.float32) + soft - jax.lax.stop_gradient(soft)
    return jnp.where(free, hard, 1.0), ()

  own = {"router": router, "key": jax.random.split(key, (config.num_blocks, 2))}
  hidden, (gate, _) = subblocks.forward(config, params, tokens, length, decide, own, dtype=dtype)
  source, _, weight = scoring.continuation(tokens, context, length, num_scored)
  teacher = scoring.log_probs(config, params, decoder.forward(config, params, tokens, length, dtype=dtype), source)
  student = scoring.log_probs(config, params, hidden, source)
  distill = losses.distill_kl(jax.lax.stop_gradient(teacher), student, weight)
  kept = jnp.sum(gate * in_context[None, None], axis=(2, 3)) / jnp.sum(in_context)
  skipped = 1 - jnp.mean(kept @ jnp.asarray(subblocks.shares(config), jnp.float32))
  return distill + PENALTY * jnp.abs(skipped - sparsity), (distill, skipped)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _margins(config, params, router, tokens, context, length, threshold, *, dtype):
  """Margins (L,2,B,T) when context tokens are routed by a threshold."""
  free = (jnp.arange(tokens.shape[1])[None] < context[:, None]) & ~forced_tokens(context, tokens.shape[1])

  def decide(sub, x, own):
    margin = subblocks.margin(own, sub, x)
    return ~free | (margin >= threshold), margin

  return subblocks.forward(config, params, tokens, length, decide, router, dtype=dtype)[1][1]


def capacities(
    model: Frozen, router: Any, sparsity: float, prompts: Prompts, batch: int
) -> tuple[np.ndarray, np.ndarray]:
  """Sparsity of every sub-block and threshold of its margin, each (L,2), with which S is met on these prompts.

  The forced tokens count as computed, and one threshold serves all sub-blocks.
  """
  share_2, threshold = subblocks.shares(model.config), 0.0
  t = np.arange(prompts.tokens.shape[1])[None]
  free_NxT = (t > 0) & (t < prompts.context[:, None] - 1)
  goal = sparsity * model.config.num_blocks * prompts.context.sum()
  for _ in range(_ROUNDS):
    parts = [
        np.asarray(_margins(model.config, model.params, router, *rows, np.float32(threshold), dtype=model.dtype))
        for rows, _, _ in batches(prompts, batch)
    ]
    margin_Lx2xM = np.concatenate(parts, axis=2)[:, :, : len(prompts.tokens)][:, :, free_NxT]
    weight_Lx2xM = np.broadcast_to(share_2[None, :, None], margin_Lx2xM.shape)
    order = np.argsort(margin_Lx2xM, axis=None, kind="stable")
    count = min(np.searchsorted(np.cumsum(weight_Lx2xM.ravel()[order]), goal - 1e-6) + 1, order.size - 1)
    threshold = float(margin_Lx2xM.ravel()[order[count]])  # the smallest that is kept
  skip = np.zeros(order.size, bool)
  skip[order[:count]] = True
  skipped_Lx2 = skip.reshape(margin_Lx2xM.shape).sum(axis=2) / prompts.context.sum()
  return np.minimum(skipped_Lx2, _MOST).round(6), np.full(skipped_Lx2.shape, threshold)


@functools.partial(jax.jit, static_argnames=("config", "num_scored", "dtype"))
def _kl(config, num_scored, params, router, rows: Prompts, schedule_Lx2, removed, *, dtype):
  hidden, _ = subblocks.routed_forward(config, removed, params, router, *rows, schedule_Lx2, dtype=dtype)
  source, _, weight = scoring.continuation(*rows, num_scored)
  dense = decoder.forward(config, params, rows.tokens, rows.length, dtype=dtype)
  teacher, student = (scoring.log_probs(config, params, x, source) for x in (dense, hidden))
  return scoring.row_mean(scoring.kl_divergence(teacher, student), weight)


def _validation_kl(model: Frozen, router: Any, schedule_Lx2: np.ndarray, calibration: Calibration) -> float:
  total, removed = 0.0, np.zeros(schedule_Lx2.shape, bool)
  for rows, weight, _ in batches(calibration.validation, calibration.batch):
    kl = _kl(
        model.config, calibration.num_scored, model.params, router, rows, jnp.asarray(schedule_Lx2, jnp.float32),
        removed, dtype=model.dtype,
    )
    total += float(np.asarray(kl) @ weight)
  return total / len(calibration.validation.tokens)
