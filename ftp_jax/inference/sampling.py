"""Choosing the next token: greedy, temperature, top-p; every row has its own stream of random numbers."""

import dataclasses

import jax
import jax.numpy as jnp

from ftp_jax.errors import UserError

_TINY = float(jnp.finfo(jnp.float32).tiny)  # what is smaller counts as 0 on some devices


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn; hashable.

  Attributes:
    temperature: divides the logits; 0 takes the most likely token.
    top_p: only the fewest most likely tokens with at least this probability together.
  """

  temperature: float = 0.0
  top_p: float = 1.0

  def __post_init__(self):
    if not 0 <= self.temperature < float("inf"):
      raise UserError(f"temperature={self.temperature} must be at least 0 (0 takes the most likely token).")
    if not 0 < self.top_p <= 1:
      raise UserError(f"top_p={self.top_p} must be above 0 and at most 1.")


def sample(sampling: Sampling, logits_BxV: jax.Array, seed_B: jax.Array, step: jax.Array) -> jax.Array:
  """Token ids (B,) int32. A row's draw depends on its logits, its seed and the step alone."""
  if sampling.temperature == 0:
    return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
  logits = logits_BxV.astype(jnp.float32)
  # Of the difference to the largest, as a tiny temperature would take the logits themselves to infinity.
  logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / max(sampling.temperature, _TINY)
  if sampling.top_p < 1:
    logits = jnp.where(nucleus(logits, sampling.top_p), logits, -jnp.inf)
  draw = lambda seed, row: jax.random.categorical(jax.random.fold_in(jax.random.key(seed), step), row)
  return jax.vmap(draw)(seed_B, logits).astype(jnp.int32)


def nucleus(logits_BxV: jax.Array, top_p: float) -> jax.Array:
  """(B,V) boolean: the fewest most likely tokens with at least `top_p` together; tokens tied with the last too."""
  descending = -jnp.sort(-logits_BxV, axis=-1)
  before = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1) - jax.nn.softmax(descending, axis=-1)
  smallest = jnp.min(jnp.where(before < max(top_p, _TINY), descending, jnp.inf), axis=-1, keepdims=True)
  return logits_BxV >= smallest
