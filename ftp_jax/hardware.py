"""The hardware that programs are traced for. What is fast on one is slow on another, so some have a form for each.

Forms compute the same: tests run prefill, decoding and their parts in all of them on CPUs, against the reference.
"""

from typing import Any

import jax
import jax.numpy as jnp

SUBLANES, LANES = 8, 128  # rows and columns of a TPU's vectors
_PLATFORM = jax.make_user_context(default_value=None)  # a part of the keys of jit's caches


def tracing_for(platform: str) -> Any:
  """A context in which programs are traced for "cpu", "gpu" or "tpu", wherever they may run or be compiled."""
  return _PLATFORM(platform)


def platform() -> str:
  """"cpu", "gpu" or "tpu": that of `tracing_for`, else the backend that this process computes on."""
  return _PLATFORM.value or jax.default_backend()


def whole_rows(x: jax.Array, rows: int) -> jax.Array:
  """x (..., T, D), on a TPU with zeros in place of tokens that are missing for a product of at least 8 rows.

  Its matrix unit takes no fewer. What has fewer goes to the vector unit, which reads weights at less than half of that
  rate.

  Args:
    rows: that the product has on each device.
  """
  if platform() != "tpu" or rows >= SUBLANES:
    return x
  missing = x.shape[-2] * (-(-SUBLANES // max(rows, 1)) - 1)
  return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)])
