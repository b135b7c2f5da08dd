"""Fisher scores of the gates: what skipping one (token, block) pair would cost.

F = E_y[(d log p(y) / d g)^2] at g = 1, with y drawn from the dense model at the scored positions.
Half of F is the second-order estimate of KL(dense || pruned) when that one gate closes. One
backward pass scores every gate of every row: random signs over positions make the cross terms of
the squared sum vanish on average, so a few draws are enough.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ftp_jax import sharding
from ftp_jax.models import scoring
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import masked, routers
from ftp_jax.routing.config import RoutingConfig


@functools.partial(
    jax.jit, static_argnames=("config", "routing", "num_scored", "draws", "dtype", "remat_policy")
)
def gate_fisher(
    config: ModelConfig,
    routing: RoutingConfig,
    params: Any,
    tokens_BxT,
    context_B,
    length_B,
    key,
    *,
    num_scored: int,
    draws: int,
    dtype: Any = jnp.float32,
    remat_policy: str = "none",
) -> jax.Array:
  """Fisher scores (L,B,T) in squared nats; zero at padding.

  Under `evict` the gate also enters attention as a factor on the token's key.
  """
  shape = (config.num_blocks,) + tokens_BxT.shape
  schedule = jnp.zeros(config.num_blocks)
  source, _, weight = scoring.continuation(tokens_BxT, context_B, length_B, num_scored)
  valid = jnp.arange(tokens_BxT.shape[1])[None] < length_B[:, None]

  def log_probs(gate):
    out = masked.forward(
        config, routing, params, routers.Router("given", None, gate), tokens_BxT, context_B, length_B, schedule,
        dtype=dtype, remat_policy=remat_policy,
    )
    return scoring.log_probs(config, params, out.hidden_BxTxD, source)

  # One linearisation point serves all draws: only the cotangent changes.
  student, pull = jax.vjp(log_probs, jnp.ones(shape))

  def draw(key):
    token_key, sign_key = jax.random.split(key)
    sampled = jax.random.categorical(token_key, student)
    sign = jax.random.rademacher(sign_key, weight.shape, jnp.float32) * weight
    cotangent = jax.nn.one_hot(sampled, student.shape[-1]) * sign[:, :, None]
    return jnp.square(pull(cotangent)[0])

  scores = jnp.mean(jax.lax.map(draw, jax.random.split(key, draws)), axis=0)
  return sharding.replicate(jnp.where(valid[None], scores, 0.0))
