"""Tiny random models and batches for tests."""

import jax
import numpy as np

from ftp_jax.models import decoder
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import masked

# Compiled whole: op by op, compiling every primitive takes longer than the tests themselves.
forward = jax.jit(
    masked.forward,
    static_argnames=("config", "routing", "start", "straight_through", "dtype", "remat_policy"),
)


def config(**changes) -> ModelConfig:
  values = dict(
      family="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_blocks=4, num_heads=4, num_kv_heads=2,
      head_dim=8, tie_embeddings=True,
  )
  return ModelConfig(**{**values, **changes})


_init = jax.jit(decoder.init_params, static_argnums=0)


def params(model_config: ModelConfig, seed: int = 0):
  """Weights large enough that blocks matter and attention is not uniform."""
  return jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, _init(model_config, jax.random.key(seed)))


def batch(model_config: ModelConfig, context, length, num_positions: int, seed: int = 0):
  """(tokens_BxT, context_B, length_B), right padded with zeros."""
  rng = np.random.default_rng(seed)
  context, length = np.asarray(context, np.int32), np.asarray(length, np.int32)
  tokens = rng.integers(1, model_config.vocab_size, (len(length), num_positions)).astype(np.int32)
  tokens[np.arange(num_positions)[None] >= length[:, None]] = 0
  return tokens, context, length
