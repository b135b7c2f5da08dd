"""Rotary position embeddings, in the half-split layout of Hugging Face checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax import hardware
from ftp_jax.models.config import ModelConfig


def rope_frequencies(config: ModelConfig) -> np.ndarray:
  """Angular frequencies (N/2,) in radians a position, fp32, with the config's scaling."""
  half = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
  # The power is rounded once, as torch does: an ulp here is an angle far off at late positions.
  frequencies = np.float32(1.0) / np.power(float(config.rope_theta), half.astype(np.float64)).astype(np.float32)
  scaling = config.rope_scaling
  if scaling.kind == "none":
    return frequencies
  slowed = frequencies / np.float32(scaling.factor)
  if scaling.kind == "linear":
    return slowed
  # llama3: full speed below the short wavelength, slowed beyond the long one, a ramp between.
  turns = scaling.original_max_position * frequencies / np.float32(2 * np.pi)
  ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
  ramp = np.clip(ramp, 0.0, 1.0).astype(np.float32)
  return ((1 - ramp) * slowed + ramp * frequencies).astype(np.float32)


def apply_rope(x_BxTxHxN: jax.Array, sin_BxTxN: jax.Array, cos_BxTxN: jax.Array) -> jax.Array:
  """Rotates (x[:N/2], x[N/2:]) pairs by their angles; sin and cos are (B or 1, T, N/2)."""
  sin, cos = sin_BxTxN[:, :, None], cos_BxTxN[:, :, None]
  if hardware.platform() == "tpu":
    whole = lambda a: jnp.concatenate([a, a], axis=-1)
    x32 = x_BxTxHxN.astype(jnp.float32)
    return (x32 * whole(cos) + _quarter_turn(x_BxTxHxN) * whole(sin)).astype(x_BxTxHxN.dtype)
  first, second = jnp.split(x_BxTxHxN.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BxTxHxN.dtype)


def _quarter_turn(x_BxTxHxN: jax.Array) -> jax.Array:
  """(-x[N/2:], x[:N/2]) in fp32, as a product with a matrix of 0, 1 and -1, which rounds nothing.

  A TPU computes that in a fraction of the time that it takes to cut its rows of 128 numbers in halves.
  """
  size = x_BxTxHxN.shape[-1]
  half = np.eye(size // 2, dtype=np.float32)
  turn = jnp.asarray(np.block([[np.zeros_like(half), half], [-half, np.zeros_like(half)]]), x_BxTxHxN.dtype)
  precision = None if x_BxTxHxN.dtype == jnp.bfloat16 else "highest"
  # With an axis of rows, or the remat policy `dots` would keep it.
  turn = jnp.broadcast_to(turn[None], (len(x_BxTxHxN), size, size))
  return jnp.einsum("bthn,bnm->bthm", x_BxTxHxN, turn, precision=precision, preferred_element_type=jnp.float32)
