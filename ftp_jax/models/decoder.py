"""The decoder: Flax Linen modules used functionally, block weights stacked on a leading axis.

`Block` offers its parts as methods (`queries`, `keys_values`, `attention_out`, `mlp`), so that an execution which
skips tokens can put its own gather, mask or cache between them; `forward` is the plain dense
composition and the reference for all others. This module knows nothing of routing.

Every parameter is declared once, in the module that uses it, with its logical axes
("vocab", "embed", "heads", "kv_heads", "mlp", "norm"; stacked ones get "blocks" in front).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ftp_jax import hardware, sharding
from ftp_jax.models.attention import attend
from ftp_jax.models.config import ModelConfig
from ftp_jax.models.rope import apply_rope, rope_frequencies
from ftp_jax.sharding import constrain

REMAT = ("none", "full", "dots")
# On a CPU: up to how many rows are few, in how many parts their sums are, and in how many all are under `highest`.
_FEW_ROWS, _PARTS_OF_FEW, _PARTS = 8, 16, 4
_HIGHEST = ("highest", "float32")  # JAX's names for one precision


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x (..., D) @ kernel (D, F).

  XLA on a CPU adds up all D in one chain, whose rounding grows with its length. There fp32 products of few rows, as in
  decode steps, are sums of parts, which is as fast, and under `jax.default_matmul_precision("highest")` all are.
  """
  rows, size = math.prod(x.shape[:-1]), x.shape[-1]
  if hardware.platform() == "tpu":
    return jnp.matmul(hardware.whole_rows(x, rows // _batch_parts()), kernel)[..., : x.shape[-2], :]
  if rows > _FEW_ROWS or not _can_split(x, _PARTS_OF_FEW):
    return in_parts(jnp.matmul, x, kernel, 0)

  def few(x, kernel):
    part = size // _PARTS_OF_FEW
    x, kernel = x.reshape(rows, _PARTS_OF_FEW, part), kernel.reshape(_PARTS_OF_FEW, part, kernel.shape[1])
    return jnp.sum(jnp.einsum("rpd,pdf->prf", x, kernel), axis=0)

  y = jax.lax.platform_dependent(x.reshape(rows, size), kernel, cpu=few, default=jnp.matmul)
  return y.reshape(x.shape[:-1] + kernel.shape[1:])


def in_parts(multiply: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, kernel: jax.Array, axis: int):
  """multiply(x, kernel), a sum over the last axis of x and `axis` of the kernel; in parts where all products are."""
  asked = jax.config.jax_default_matmul_precision in _HIGHEST and hardware.platform() == "cpu"
  if not asked or not _can_split(x, _PARTS):
    return multiply(x, kernel)
  return sum(map(multiply, jnp.split(x, _PARTS, -1), jnp.split(kernel, _PARTS, axis)))


def _batch_parts() -> int:
  """In how many parts the mesh of this trace has a batch."""
  return sharding.context().get("data", 1) * sharding.context().get("fsdp", 1)


def _can_split(x: jax.Array, parts: int) -> bool:
  """Not bf16, whose parts would be rounded, nor on a mesh, which may have split the axis already."""
  return x.dtype == jnp.float32 and x.shape[-1] % parts == 0 and math.prod(sharding.context().values()) == 1


def apart(y: Any) -> Any:
  """y, which on a TPU is computed as it stands, once, before anything is made of it.

  Of a projection and the transposition that takes the heads out of it the compiler would make one product, which takes
  twice as long, of copies of the weights in another order; norms and angles it would compute anew for all that read
  them.
  """
  return jax.lax.optimization_barrier(y) if hardware.platform() == "tpu" else y


class RMSNorm(nn.Module):
  """Root-mean-square norm over the last axis, computed in fp32."""

  eps: float
  axis: str = "norm"

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (self.axis,)), (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
    return (scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,)) * x32).astype(x.dtype)


class Dense(nn.Module):
  """x @ kernel (+ bias); kernel (in, out)."""

  features: int
  axes: tuple[str, str]
  use_bias: bool = False

  @nn.compact
  def __call__(self, x):
    kernel = self.param(
        "kernel", nn.with_logical_partitioning(nn.initializers.normal(0.02), self.axes), (x.shape[-1], self.features)
    )
    y = product(x, kernel.astype(x.dtype))
    if self.use_bias:
      bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:]), (self.features,))
      y = y + bias.astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return y


class Block(nn.Module):
  """One transformer block: x + attention(norm(x)), then + mlp(norm(.))."""

  config: ModelConfig

  def setup(self):
    c = self.config
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    self.attn_norm = RMSNorm(c.norm_eps)
    self.q = Dense(heads, ("embed", "heads"), c.qkv_bias)
    self.k = Dense(kv_heads, ("embed", "kv_heads"), c.qkv_bias)
    self.v = Dense(kv_heads, ("embed", "kv_heads"), c.qkv_bias)
    self.o = Dense(c.hidden_size, ("heads", "embed"))
    if c.qk_norm:
      self.q_norm = RMSNorm(c.norm_eps, "head_dim")
      self.k_norm = RMSNorm(c.norm_eps, "head_dim")
    self.mlp_norm = RMSNorm(c.norm_eps)
    self.gate = Dense(c.intermediate_size, ("embed", "mlp"))
    self.up = Dense(c.intermediate_size, ("embed", "mlp"))
    self.down = Dense(c.hidden_size, ("mlp", "embed"))

  def queries(self, x_BxTxD, sin_BxTxN, cos_BxTxN):
    """Queries (B,T,H,N) of the block's input, rope applied."""
    c = self.config
    q = apart(self.q(apart(self.attn_norm(x_BxTxD)))).reshape(x_BxTxD.shape[:-1] + (c.num_heads, c.head_dim))
    q = constrain(q, "batch", None, "heads", None)
    return apply_rope(self.q_norm(q) if c.qk_norm else q, sin_BxTxN, cos_BxTxN)

  def keys_values(self, x_BxTxD, sin_BxTxN, cos_BxTxN):
    """Keys, rope applied, and values, each (B,T,G,N), of the block's input."""
    c, y = self.config, apart(self.attn_norm(x_BxTxD))
    shape = x_BxTxD.shape[:-1] + (c.num_kv_heads, c.head_dim)
    k, v = (constrain(apart(a).reshape(shape), "batch", None, "kv_heads", None) for a in (self.k(y), self.v(y)))
    return apply_rope(self.k_norm(k) if c.qk_norm else k, sin_BxTxN, cos_BxTxN), v

  def qkv(self, x_BxTxD, sin_BxTxN, cos_BxTxN):
    """Queries (B,T,H,N), keys and values (B,T,G,N) of the block's input, rope applied."""
    return self.queries(x_BxTxD, sin_BxTxN, cos_BxTxN), *self.keys_values(x_BxTxD, sin_BxTxN, cos_BxTxN)

  def attention_out(self, x_BxTxD, attended_BxTxHxN):
    """Adds the output projection of the attended values to the residual stream."""
    attended = constrain(attended_BxTxHxN, "batch", None, "heads", None)
    return constrain(x_BxTxD + self.o(attended.reshape(attended.shape[:-2] + (-1,))), "batch", None, None)

  def mlp(self, x_BxTxD):
    """Adds the gated MLP to the residual stream."""
    y = apart(self.mlp_norm(x_BxTxD))
    inner = constrain(nn.silu(self.gate(y)) * self.up(y), "batch", None, "mlp")
    return constrain(x_BxTxD + self.down(inner), "batch", None, None)

  def __call__(self, x_BxTxD, sin_BxTxN, cos_BxTxN, mask_BxTxT):
    q, k, v = self.qkv(x_BxTxD, sin_BxTxN, cos_BxTxN)
    return self.mlp(self.attention_out(x_BxTxD, attend(q, k, v, mask_BxTxT)))


class Embedding(nn.Module):
  """Token embedding and, when the weights are tied, the output head."""

  config: ModelConfig

  def setup(self):
    shape = (self.config.vocab_size, self.config.hidden_size)
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
    self.embedding = self.param("embedding", init, shape)
    if not self.config.tie_embeddings:
      self.lm_head = self.param("lm_head", init, shape)
    self.final_norm = RMSNorm(self.config.norm_eps)

  def encode(self, tokens_BxT, dtype):
    # Each part of the width is looked up for the tokens of all that share it; then rows change places with widths.
    return constrain(sharding.look_up(self.embedding, tokens_BxT).astype(dtype), "batch", None, None)

  def decode(self, x):
    """Logits (..., V) in fp32 of final hidden states (..., D)."""
    head = self.embedding if self.config.tie_embeddings else self.lm_head
    y, inner = self.final_norm(x), (None,) * (x.ndim - 2)
    vocab, width = self.config.vocab_size, self.config.hidden_size
    parts = sharding.context().get("fsdp", 1)
    if vocab % (parts * sharding.context().get("tensor", 1)):
      rows, columns = "batch", "vocab"
    else:
      # Instead of gathering the head: sums over parts of the width change places, or for many rows parts of the head,
      # once for all that is unembedded.
      rows, columns = "replica", "logits"
      few = 8 * math.prod(x.shape[:-1]) < width * sharding.context().get("data", 1) // parts
      y = constrain(y, "replica", *inner, "embed" if few else None)
      head = head if few else constrain(head, "logits", None)
    multiply = functools.partial(jnp.einsum, "...d,vd->...v", preferred_element_type=jnp.float32)
    # One row, which XLA does not add up in one chain here, would not be worth the copies of the head.
    num_rows = math.prod(y.shape[:-1])
    apply = multiply if num_rows == 1 else functools.partial(in_parts, multiply, axis=1)
    own = num_rows // (_batch_parts() if rows == "batch" else sharding.context().get("data", 1))
    y = hardware.whole_rows(y[..., None, :], own)
    logits = apply(y, head.astype(y.dtype))[..., 0, :]
    return constrain(logits, rows, *inner, columns)

  def __call__(self, tokens_BxT):
    return self.decode(self.encode(tokens_BxT, jnp.float32))


def init_params(config: ModelConfig, key: jax.Array) -> Any:
  """Random parameters, a plain pytree: {"embed": {...}, "blocks": {... with a leading L axis}}."""
  embed_key, block_key = jax.random.split(key)
  init_embed, init_block = _initialisers(config)
  return {
      "embed": nn.unbox(init_embed(embed_key)),
      "blocks": jax.vmap(lambda k: nn.unbox(init_block(k)))(jax.random.split(block_key, config.num_blocks)),
  }


def _initialisers(config: ModelConfig):
  x, angle = jnp.zeros((1, 1, config.hidden_size)), jnp.zeros((1, 1, config.head_dim // 2))
  mask, token = jnp.ones((1, 1, 1), bool), jnp.zeros((1, 1), jnp.int32)
  return (
      lambda key: Embedding(config).init(key, token)["params"],
      lambda key: Block(config).init(key, x, angle, angle, mask)["params"],
  )


@functools.lru_cache(maxsize=None)
def _boxed_shapes(config: ModelConfig):
  return tuple(jax.eval_shape(init, jax.random.key(0)) for init in _initialisers(config))


def logical_axes(config: ModelConfig) -> Any:
  """The tree of parameters with, at each leaf, the tuple of its logical axis names."""
  embed, block = _boxed_shapes(config)
  is_box = lambda p: isinstance(p, nn.LogicallyPartitioned)
  return {
      "embed": jax.tree.map(lambda p: tuple(p.names), embed, is_leaf=is_box),
      "blocks": jax.tree.map(lambda p: ("blocks",) + tuple(p.names), block, is_leaf=is_box),
  }


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> Any:
  """The tree of parameters as `jax.ShapeDtypeStruct`s; allocates nothing."""
  embed, block = nn.unbox(_boxed_shapes(config))
  stack = lambda p: jax.ShapeDtypeStruct((config.num_blocks,) + p.shape, dtype)
  return {
      "embed": jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), embed),
      "blocks": jax.tree.map(stack, block),
  }


def param_shardings(mesh: jax.sharding.Mesh, config: ModelConfig) -> Any:
  """The tree of parameters as shardings over a mesh; heads are never split between devices."""
  whole = {"heads": config.num_heads, "kv_heads": config.num_kv_heads}

  def one(abstract, names):
    return sharding.named(mesh, names, [whole.get(name, size) for name, size in zip(names, abstract.shape)])

  return jax.tree.map(one, abstract_params(config), logical_axes(config))


def block_at(blocks: Any, index: jax.Array) -> Any:
  """One block's part of arrays stacked on a leading axis; `index` is in range."""
  # Without the handling of negative indices the slice is a plain copy, on a CPU three times as fast.
  return jax.tree.map(
      lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False, allow_negative_indices=False), blocks
  )


def remat(body, policy: str):
  """Wraps a scanned block body in the rematerialisation that the config names."""
  if policy == "none":
    return body
  saveable = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}[policy]
  return jax.checkpoint(body, policy=saveable, prevent_cse=False)


def causal_mask(config: ModelConfig, length_B: jax.Array, num_positions: int) -> jax.Array:
  """(B,T,T) boolean: query row sees key column (causal, in the window, not padding)."""
  query, key = jnp.arange(num_positions)[:, None], jnp.arange(num_positions)[None, :]
  mask = key <= query
  if config.sliding_window:
    mask &= query - key < config.sliding_window
  return mask[None] & (key[None] < length_B[:, None, None])


def angles(config: ModelConfig, positions_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """sin and cos (B,T,N/2) of the rotary angles, fp32."""
  angle = positions_BxT[..., None].astype(jnp.float32) * rope_frequencies(config).reshape(1, 1, -1)
  return jnp.sin(angle), jnp.cos(angle)


def embed(config: ModelConfig, params: Any, tokens_BxT: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
  """Hidden states (B,T,D) that enter block 0."""
  return Embedding(config).apply({"params": params["embed"]}, tokens_BxT, dtype, method=Embedding.encode)


def unembed(config: ModelConfig, params: Any, hidden: jax.Array) -> jax.Array:
  """Logits (..., V) in fp32 of the hidden states (..., D) that leave the last block."""
  return Embedding(config).apply({"params": params["embed"]}, hidden, method=Embedding.decode)


def forward(
    config: ModelConfig,
    params: Any,
    tokens_BxT: jax.Array,
    length_B: jax.Array,
    *,
    dtype: Any = jnp.float32,
    collect: bool = False,
    visible_TxT: jax.Array | None = None,
) -> jax.Array:
  """Dense forward pass.

  Args:
    collect: return the states at every block.
    visible_TxT: further restriction of which keys a query sees, boolean.

  Returns:
    Hidden states (B,T,D) that leave the last block, before the final norm; with `collect` the
    states that enter every block and leave the last, (L+1,B,T,D). Rows beyond their length are
    meaningless.
  """
  num_positions = tokens_BxT.shape[1]
  sin, cos = angles(config, jnp.arange(num_positions)[None])
  mask = causal_mask(config, length_B, num_positions)
  if visible_TxT is not None:
    mask &= visible_TxT[None]
  block = Block(config)

  def body(x, block_params):
    y = block.apply({"params": block_params}, x, sin, cos, mask)
    return y, (x if collect else None)

  x, states = jax.lax.scan(body, embed(config, params, tokens_BxT, dtype), params["blocks"])
  return jnp.concatenate([states, x[None]]) if collect else x
