"""Routers: static (paper's priority order), random, and the learned dynamic router.

All of them give margins (compute logit minus skip logit); `selection` does the rest. `margin` is the one
way in for every execution, for the context tokens of a prefill as for continuation tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax.routing.config import SCORE_FACTORS, RouterConfig

_PRECISION = jax.lax.Precision.HIGHEST  # TPUs and GPUs round the factors of fp32 products by default


class Router(NamedTuple):
  """Who decides. `kind`: static, random, dynamic or given (static under jit).

  Attributes:
    config: of the dynamic router, else None.
    params: of the dynamic router; the seed key of the random one; the gates (L,B,T) of `given`,
      floats through which gradients pass.
  """

  kind: str
  config: RouterConfig | None = None
  params: Any = None

  @property
  def per_block(self) -> bool:
    """Whether every block has its own slice of `params`."""
    return self.kind == "given" or (self.kind == "dynamic" and self.config.kind == "per_block")

  @property
  def recurrent(self) -> bool:
    return self.kind == "dynamic" and self.config.kind == "recurrent"

  @property
  def factors(self) -> tuple[str, ...]:
    """The factors it reads."""
    return self.config.factors if self.kind == "dynamic" else ()

  @property
  def reads_scores(self) -> bool:
    return not SCORE_FACTORS.isdisjoint(self.factors)


jax.tree_util.register_pytree_node(
    Router, lambda r: ((r.params,), (r.kind, r.config)), lambda aux, leaves: Router(*aux, *leaves)
)

STATIC = Router("static")


def margin(router: Router, params, features_BxTxF, x_BxTxD, state_BxTxR, position_BxT, row_B, block):
  """Margins (B,T) in fp32 of tokens in one block, and the state carried to the next.

  Args:
    params: the router's, of this block where it has its own.
    features_BxTxF: the factors the router reads; None if it reads none.
    x_BxTxD: states that enter the block.
    position_BxT: the tokens' positions.
    row_B: `row_seed` of each row, read by the random router.
    block: index of the block.
  """
  if router.kind == "static":
    return static_margin(position_BxT), state_BxTxR
  if router.kind == "random":
    return random_margin(params, row_B, position_BxT, block), state_BxTxR
  return dynamic_margin(router.config, params, features_BxTxF, x_BxTxD, state_BxTxR)


def static_margin(position_BxT: jax.Array) -> jax.Array:
  """Margins (B,T) of the order {x_0, x_{n-1}, ..., x_1}: recency; the sink is a forced token."""
  return 1.0 + position_BxT.astype(jnp.float32)


def row_seed(tokens_BxT: jax.Array, context_B: jax.Array) -> jax.Array:
  """A number (B,) made of the row's context tokens alone: padding, neighbours and continuation do not matter."""
  return jnp.sum(jnp.where(jnp.arange(tokens_BxT.shape[1])[None] < context_B[:, None], tokens_BxT, 0), axis=1)


def random_margin(key: jax.Array, row_B: jax.Array, position_BxT: jax.Array, block: jax.Array) -> jax.Array:
  """Uniform margins (B,T) in [0, 1), a function of seed, row, position and block."""
  key = jax.random.fold_in(key, block)
  draw = lambda row, t: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row), t))
  return jax.vmap(jax.vmap(draw, in_axes=(None, 0)))(row_B, position_BxT)


class PartsDense(nn.Module):
  """`nn.Dense` of several inputs side by side, without the copy that joining the arrays would be.

  An input may come as (array (B,T,D), factor (B,T,1)); the factor is applied to the products, which are fewer numbers.
  Arrays are taken to fp32.
  """

  features: int

  @nn.compact
  def __call__(self, parts: Sequence[jax.Array | tuple[jax.Array, jax.Array]]):
    parts = [part if isinstance(part, tuple) else (part, 1.0) for part in parts]
    sizes = [part.shape[-1] for part, _ in parts]
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (sum(sizes), self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    kernels = jnp.split(kernel, np.cumsum(sizes)[:-1])
    product = lambda part, k: jnp.matmul(part.astype(jnp.float32), k, precision=_PRECISION)
    products = [factor * product(part, k) for (part, factor), k in zip(parts, kernels)]
    return sum(products) + bias.reshape((1,) * (products[0].ndim - 1) + (-1,))


class RouterMLP(nn.Module):
  """Two layers; the recurrent kind adds a projection of the hidden layer one block earlier."""

  config: RouterConfig

  @nn.compact
  def __call__(self, parts, state_BxTxR):
    hidden = PartsDense(self.config.hidden_size, name="hidden")(parts)
    if self.config.kind == "recurrent":
      recurrent = nn.Dense(self.config.hidden_size, use_bias=False, precision=_PRECISION, name="recurrent")
      hidden += recurrent(state_BxTxR)
    hidden = nn.silu(hidden)
    logits = nn.Dense(2, precision=_PRECISION, name="out")(hidden)
    return logits, (hidden if self.config.kind == "recurrent" else state_BxTxR)


def init_router(config: RouterConfig, key: jax.Array, num_blocks: int, model_size: int) -> Any:
  """Router parameters in fp32; kind `per_block` has a leading L axis on every leaf."""
  inputs = jnp.zeros((1, 1, len(config.factors) + config.hidden_states * model_size))
  init = lambda k: RouterMLP(config).init(k, [inputs], jnp.zeros((1, 1, config.hidden_size)))["params"]
  if config.kind == "per_block":
    return jax.vmap(init)(jax.random.split(key, num_blocks))
  return init(key)


def of_factor(name: str) -> tuple[RouterConfig, Any]:
  """Config and parameters of a dynamic router that keeps the tokens with the most of one factor.

  With "position" these are the latest, as the static router has it, in the form in which artifacts hold a router.
  """
  config = RouterConfig(factors=(name,), hidden_states=False, hidden_size=1)
  layer = lambda *kernel: {"kernel": np.array([kernel], np.float32), "bias": np.zeros(len(kernel), np.float32)}
  return config, {"hidden": layer(1.0), "out": layer(0.0, 1.0)}  # silu of a factor, none of which is negative, grows


def init_state(router: Router, batch: int, num_positions: int) -> jax.Array:
  """What the router carries from block to block, (B,T,R); empty unless recurrent."""
  return jnp.zeros((batch, num_positions, router.config.hidden_size if router.recurrent else 0))


def norm_factor(x_BxTxD: jax.Array) -> jax.Array:
  """What fp32 states have to be multiplied with to have root mean square 1, (B,T,1)."""
  return jax.lax.rsqrt(jnp.mean(jnp.square(x_BxTxD), axis=-1, keepdims=True) + 1e-6)


def normed(x_BxTxD: jax.Array) -> jax.Array:
  """Hidden states with root mean square 1, fp32."""
  x = x_BxTxD.astype(jnp.float32)
  return x * norm_factor(x)


def margin_of_inputs(config, params, factors_BxTxF, hidden, state_BxTxR) -> tuple[jax.Array, jax.Array]:
  """Margins (B,T) in fp32 and the carried state; factors and hidden states are read only where the config asks.

  Args:
    hidden: `normed` states (B,T,D), or a pair of states and their factors (see `PartsDense`).
  """
  parts = [factors_BxTxF] if config.factors else []
  if config.hidden_states:
    parts.append(hidden)
  logits, state = RouterMLP(config).apply({"params": params}, parts, state_BxTxR)
  return logits[..., 1] - logits[..., 0], state


def dynamic_margin(config, params, factors_BxTxF, x_BxTxD, state_BxTxR) -> tuple[jax.Array, jax.Array]:
  """As `margin_of_inputs`, for the states (B,T,D) that enter one block."""
  x = x_BxTxD.astype(jnp.float32)
  return margin_of_inputs(config, params, factors_BxTxF, (x, norm_factor(x)), state_BxTxR)
