"""The three losses of router training (docs/method.md section 3): distillation, sparsity, guide."""

import jax
import jax.numpy as jnp

from ftp_jax.models import scoring
from ftp_jax.routing.config import RoutingConfig
from ftp_jax.routing.selection import capacity, descending_rank, first_to_keep, forced_tokens, recent_tokens


def distill_kl(teacher_BxCxV, student_BxCxV, weight_BxC) -> jax.Array:
  """L_d: mean KL(dense || pruned) over the scored positions, in nats."""
  return scoring.weighted_mean(scoring.kl_divergence(teacher_BxCxV, student_BxCxV), weight_BxC)


def distill_mse(teacher_BxCxD, student_BxCxD, weight_BxC) -> jax.Array:
  """L_d, option mse: mean squared error of the final hidden states at the scored positions."""
  error = jnp.mean(jnp.square(teacher_BxCxD.astype(jnp.float32) - student_BxCxD.astype(jnp.float32)), axis=-1)
  return scoring.weighted_mean(error, weight_BxC)


def skipped_share(gate_LxBxT, tokens_BxT) -> jax.Array:
  """Share (L,) of these tokens that each block skips; gates may be soft."""
  mask = tokens_BxT[None].astype(jnp.float32)
  return jnp.sum((1 - gate_LxBxT) * mask, axis=(1, 2)) / jnp.maximum(jnp.sum(mask), 1.0)


def sparsity_loss(asked_L, achieved_L, two_sided: bool) -> jax.Array:
  """L_s = sum_i max(asked_i - achieved_i, 0); two-sided: sum_i |asked_i - achieved_i|."""
  short = asked_L - achieved_L
  return jnp.sum(jnp.abs(short) if two_sided else jnp.maximum(short, 0.0))


def new_tokens(context_B, length_B, num_positions: int) -> jax.Array:
  """Continuation tokens (B,T) but for the last, which leads to no scored prediction: nothing is known of its gates."""
  t = jnp.arange(num_positions)[None]
  return (t >= context_B[:, None]) & (t < length_B[:, None] - 1)


def guided_tokens(context_B, length_B, num_positions: int, routing: RoutingConfig) -> jax.Array:
  """Tokens (B,T) whose gates the guide knows of: the context's but recent ones, if they are trained `new_tokens`."""
  in_context = jnp.arange(num_positions)[None] < context_B[:, None]
  decided = in_context & ~recent_tokens(context_B, num_positions, routing)
  return decided | new_tokens(context_B, length_B, num_positions) if routing.trains_continuation else decided


def targets(score_LxBxT, schedule_L, context_B, routing: RoutingConfig) -> jax.Array:
  """Guide targets (L,B,T): 1 for the context tokens of highest score that fill each block's capacity.

  Forced and recent tokens fill it first. Of tokens that are no context: 1 where the score is above 0.
  """
  num_positions = score_LxBxT.shape[-1]
  in_context = jnp.arange(num_positions)[None] < context_B[:, None]
  forced = forced_tokens(context_B, num_positions)

  def one(score_BxT, sparsity):
    rank = descending_rank(jnp.where(forced, jnp.inf, first_to_keep(score_BxT, context_B, routing)), in_context)
    fits = rank < capacity(sparsity, context_B, routing.bucket_multiple)[:, None]
    return jnp.where(in_context, fits, score_BxT > 0).astype(jnp.float32)

  return jax.vmap(one)(score_LxBxT, schedule_L)


def stakes(score_LxBxT, target_LxBxT, context_B, routing: RoutingConfig, share: float) -> jax.Array:
  """Weights (L,B,T) of tokens in the guide loss, by what is lost where the router decides otherwise; 1 on average.

  A `share` of each context token's weight is in proportion to the distance of its score from the highest one that
  skips in its row, the rest is alike. Forced and recent tokens, which no router decides about, have nothing at stake.
  Tokens that are no context have weight 1.
  """
  num_positions = score_LxBxT.shape[2]
  in_context = (jnp.arange(num_positions)[None] < context_B[:, None])[None]
  settled = forced_tokens(context_B, num_positions) | recent_tokens(context_B, num_positions, routing)
  skips = in_context & ~settled[None] & (target_LxBxT == 0)
  cut = jnp.max(jnp.where(skips, score_LxBxT, -jnp.inf), axis=2, keepdims=True)
  decided = in_context & ~settled[None] & jnp.isfinite(cut)
  apart = jnp.where(decided, jnp.abs(score_LxBxT - jnp.where(decided, cut, 0.0)), 0.0)
  mean = jnp.sum(apart, axis=(1, 2), keepdims=True) / jnp.sum(in_context)
  relative = jnp.where(mean > 0, apart / jnp.where(mean > 0, mean, 1.0), 1.0)
  return jnp.where(in_context, 1 - share + share * relative, 1.0)


def guide_loss(margin_LxBxT, target_LxBxT, schedule_L, guided_BxT, stake_LxBxT=1.0) -> jax.Array:
  """L_g: cross-entropy (nats a token and block) towards target decisions, over blocks that skip.

  Args:
    stake_LxBxT: `stakes`; 1: all tokens count alike.
  """
  cross_entropy = jnp.logaddexp(0.0, margin_LxBxT) - margin_LxBxT * target_LxBxT
  weight = guided_BxT[None] * (schedule_L > 0)[:, None, None] * stake_LxBxT
  return scoring.weighted_mean(cross_entropy, weight.astype(jnp.float32))
