"""Scored positions: the continuation tokens, each predicted from the position before it."""

from typing import Any

import jax
import jax.numpy as jnp

from ftp_jax.models import decoder
from ftp_jax.models.config import ModelConfig


def continuation(tokens_BxT, context_B, length_B, num_scored: int):
  """Where and what is scored.

  Returns:
    (source_BxC, target_BxC, weight_BxC): positions whose logits predict the continuation, the
    tokens to predict, and 1.0 where that token exists. C = num_scored, counted from the context's end.
  """
  offsets = jnp.arange(num_scored)[None]
  source = jnp.minimum(context_B[:, None] - 1 + offsets, tokens_BxT.shape[1] - 2)
  weight = (context_B[:, None] + offsets < length_B[:, None]).astype(jnp.float32)
  return source, jnp.take_along_axis(tokens_BxT, source + 1, axis=1), weight


def gather_positions(x_BxTxD: jax.Array, position_BxC: jax.Array) -> jax.Array:
  """x at the given positions, (B,C,D)."""
  return jnp.take_along_axis(x_BxTxD, position_BxC[:, :, None], axis=1)


def log_probs(config: ModelConfig, params: Any, hidden_BxTxD: jax.Array, position_BxC: jax.Array) -> jax.Array:
  """Next-token log-probabilities (B,C,V), fp32, at the given positions."""
  return jax.nn.log_softmax(decoder.unembed(config, params, gather_positions(hidden_BxTxD, position_BxC)))


def pick(log_probs_BxCxV: jax.Array, token_BxC: jax.Array) -> jax.Array:
  """The log-probability (B,C) of one token at each position."""
  # A sum over the vocabulary, as this axis may be partitioned; a gather along it would collect it.
  ids = jnp.arange(log_probs_BxCxV.shape[-1])[None, None]
  return jnp.sum(jnp.where(ids == token_BxC[:, :, None], log_probs_BxCxV, 0.0), axis=-1)


def kl_divergence(teacher_BxCxV: jax.Array, student_BxCxV: jax.Array) -> jax.Array:
  """KL(teacher || student) in nats, (B,C)."""
  return jnp.sum(jnp.exp(teacher_BxCxV) * (teacher_BxCxV - student_BxCxV), axis=-1)


def row_mean(values_BxC: jax.Array, weight_BxC: jax.Array) -> jax.Array:
  """Mean (B,) of each row where `weight` is 1; 0 where it is nowhere."""
  return jnp.sum(values_BxC * weight_BxC, axis=1) / jnp.maximum(jnp.sum(weight_BxC, axis=1), 1.0)


def weighted_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
  """Mean of `values` by `weight`, which is 0 and 1 or anything between and above; 0 where it is nowhere."""
  return jnp.sum(values * weight) / jnp.maximum(jnp.sum(weight), 1.0)
