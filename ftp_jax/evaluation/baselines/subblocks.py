"""Sub-blocks: the attention and the MLP of a block skipped apart from each other. Masked execution.

Every sub-block adds to the residual stream, so that a token that skips one leaves it as it entered. A sub-block may
also be removed for all tokens. A token that skips attention keeps its key and value there, from its unchanged state.
A pair (L,2) holds attention first. All is computed here, and gates choose: what calibration and training differentiate,
and the reference of the fast execution in `subblock_inference`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax.models import decoder
from ftp_jax.models.attention import attend
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import routers
from ftp_jax.routing.config import RoutingConfig
from ftp_jax.routing.selection import forced_tokens, keep_context

# Selection of context tokens; continuation tokens are computed.
ROUTING = RoutingConfig(kv_mode="project", selection="topk")


def shares(config: ModelConfig) -> np.ndarray:
  """Share (2,) of a block's parameters, and of its FLOPs but for attention's products, in attention and MLP."""
  attention = 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
  mlp = 3 * config.hidden_size * config.intermediate_size
  return np.array([attention, mlp]) / (attention + mlp)


def margin(router_2: Any, sub: int, x_BxTxD: jax.Array) -> jax.Array:
  """Margins (B,T) in fp32 of one sub-block (0 attention, 1 MLP): a linear function of the normed state.

  Args:
    router_2: {"kernel": (2,D), "bias": (2,)} of the block.
  """
  return routers.normed(x_BxTxD) @ router_2["kernel"][sub] + router_2["bias"][sub]


def forward(
    config: ModelConfig,
    params: Any,
    tokens_BxT: jax.Array,
    length_B: jax.Array,
    decide: Callable[[int, jax.Array, Any], jax.Array],
    per_block: Any,
    *,
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, Any]:
  """Masked pass over all tokens.

  Args:
    decide: (sub, states (B,T,D) that enter it, slice of `per_block`) -> (gate (B,T), anything to return).
    per_block: arrays with a leading L axis.

  Returns:
    Hidden states (B,T,D) that leave the last block, and (gates, anything), each with leading axes (L,2).
  """
  sin, cos = decoder.angles(config, jnp.arange(tokens_BxT.shape[1])[None])
  mask = decoder.causal_mask(config, length_B, tokens_BxT.shape[1])
  block = decoder.Block(config)

  def body(x, xs):
    block_params, own = xs
    apply = lambda method, *args: block.apply({"params": block_params}, *args, method=method)

    def choose(gate_BxT, y, x):
      g = gate_BxT[:, :, None].astype(x.dtype)
      return g * y + (1 - g) * x

    of_attention = decide(0, x, own)
    y = apply(decoder.Block.attention_out, x, attend(*apply(decoder.Block.qkv, x, sin, cos), mask))
    x = choose(of_attention[0], y, x)
    of_mlp = decide(1, x, own)
    x = choose(of_mlp[0], apply(decoder.Block.mlp, x), x)
    return x, jax.tree.map(lambda *a: jnp.stack(a), of_attention, of_mlp)

  return jax.lax.scan(body, decoder.embed(config, params, tokens_BxT, dtype), (params["blocks"], per_block))


def routed_forward(
    config: ModelConfig, removed: np.ndarray, params: Any, router: Any, tokens_BxT, context_B, length_B, schedule_Lx2,
    *, dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
  """The reference of a routed prefill with a teacher-forced continuation: (hidden (B,T,D), keep (L,2,B,T)).

  Args:
    removed: (L,2) boolean, sub-blocks that no token computes.
    router: None where nothing is asked.
  """
  t = jnp.arange(tokens_BxT.shape[1])[None]
  valid, in_context = t < length_B[:, None], t < context_B[:, None]

  def decide(sub, x, own):
    keep = in_context
    if router is not None:
      keep = keep_context(margin(own["router"], sub, x), own["sparsity"][sub], context_B, ROUTING)
    keep = (keep | (valid & ~in_context)) & ~own["removed"][sub]
    return keep, ()

  own = {"router": router, "sparsity": schedule_Lx2, "removed": jnp.asarray(removed)}
  hidden, (keep, _) = forward(config, params, tokens_BxT, length_B, decide, own, dtype=dtype)
  return hidden, keep


def causal_forward(
    config: ModelConfig, removed: np.ndarray, params: Any, router: Any, tokens_BxT, length_B, threshold_Lx2,
    *, dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
  """As `routed_forward` when every token decides for itself, by a threshold of its margin; the first is computed."""
  first = forced_tokens(jnp.ones_like(length_B), tokens_BxT.shape[1])
  valid = jnp.arange(tokens_BxT.shape[1])[None] < length_B[:, None]

  def decide(sub, x, own):
    keep = valid
    if router is not None:
      keep = valid & (first | (margin(own["router"], sub, x) >= own["threshold"][sub]))
    return keep & ~own["removed"][sub], ()

  own = {"router": router, "threshold": threshold_Lx2, "removed": jnp.asarray(removed)}
  hidden, (keep, _) = forward(config, params, tokens_BxT, length_B, decide, own, dtype=dtype)
  return hidden, keep
