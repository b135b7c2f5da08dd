"""Routers: static (paper's priority order), random, and the learned dynamic router.

All of them give margins (compute logit minus skip logit); `selection.select` does the rest.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ftp_jax.routing.config import RouterConfig


def static_margin(batch: int, num_positions: int) -> jax.Array:
  """Margins (B,T) of the order {x_0, x_{n-1}, ..., x_1}: recency; the sink is a forced token."""
  return jnp.broadcast_to(1.0 + jnp.arange(num_positions, dtype=jnp.float32)[None], (batch, num_positions))


def random_margin(key: jax.Array, tokens_BxT: jax.Array, length_B: jax.Array, block: jax.Array) -> jax.Array:
  """Uniform margins (B,T) in [0, 1), seeded by the row's own tokens: neighbours and padding do not matter."""
  valid = jnp.arange(tokens_BxT.shape[1])[None] < length_B[:, None]
  row_B = jnp.sum(jnp.where(valid, tokens_BxT, 0), axis=1)
  key = jax.random.fold_in(key, block)
  position_keys = lambda row: jax.vmap(lambda t: jax.random.fold_in(jax.random.fold_in(key, row), t))(
      jnp.arange(tokens_BxT.shape[1])
  )
  return jax.vmap(lambda row: jax.vmap(lambda k: jax.random.uniform(k))(position_keys(row)))(row_B)


class RouterMLP(nn.Module):
  """Two layers; the recurrent kind adds a projection of the hidden layer one block earlier."""

  config: RouterConfig

  @nn.compact
  def __call__(self, inputs_BxTxF, state_BxTxR):
    hidden = nn.Dense(self.config.hidden_size, name="hidden")(inputs_BxTxF)
    if self.config.kind == "recurrent":
      hidden += nn.Dense(self.config.hidden_size, use_bias=False, name="recurrent")(state_BxTxR)
    hidden = nn.silu(hidden)
    return nn.Dense(2, name="out")(hidden), (hidden if self.config.kind == "recurrent" else state_BxTxR)


def init_router(config: RouterConfig, key: jax.Array, num_blocks: int, model_size: int) -> Any:
  """Router parameters in fp32; kind `per_block` has a leading L axis on every leaf."""
  inputs = jnp.zeros((1, 1, len(config.factors) + config.hidden_states * model_size))
  init = lambda k: RouterMLP(config).init(k, inputs, jnp.zeros((1, 1, config.hidden_size)))["params"]
  if config.kind == "per_block":
    return jax.vmap(init)(jax.random.split(key, num_blocks))
  return init(key)


def init_state(config: RouterConfig, batch: int, num_positions: int) -> jax.Array:
  """What the router carries from block to block, (B,T,R); empty unless recurrent."""
  return jnp.zeros((batch, num_positions, config.hidden_size if config.kind == "recurrent" else 0))


def normed(x_BxTxD: jax.Array) -> jax.Array:
  """Hidden states with root mean square 1, fp32."""
  x = x_BxTxD.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def margin_of_inputs(config, params, factors_BxTxF, normed_BxTxD, state_BxTxR) -> tuple[jax.Array, jax.Array]:
  """Margins (B,T) in fp32 and the carried state; `normed_BxTxD` is read only if the config asks for it."""
  inputs = factors_BxTxF
  if config.hidden_states:
    inputs = jnp.concatenate([inputs, normed_BxTxD.astype(jnp.float32)], axis=-1)
  logits, state = RouterMLP(config).apply({"params": params}, inputs, state_BxTxR)
  return logits[..., 1] - logits[..., 0], state


def dynamic_margin(config, params, factors_BxTxF, x_BxTxD, state_BxTxR) -> tuple[jax.Array, jax.Array]:
  """As `margin_of_inputs`, for the states (B,T,D) that enter one block."""
  hidden = normed(x_BxTxD) if config.hidden_states else None
  return margin_of_inputs(config, params, factors_BxTxF, hidden, state_BxTxR)
