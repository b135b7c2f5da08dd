"""The contexts of one prefill, as every execution that skips tokens sees them: positions, keys, angles, blocks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ftp_jax.models import decoder, kernels
from ftp_jax.models.attention import EMPTY
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import stand_in
from ftp_jax.routing.slots import gather


class Contexts:
  """The right-padded contexts of one prefill, and how the parts of a block are applied to them.

  Attributes:
    config: of the model.
    context_B: lengths m >= 1.
    batch, num_positions: B and T.
    position_BxT, in_context_BxT: of every position, padding included.
    key_BxT: positions as attention reads those of keys, EMPTY beyond the context.
    angles: sin and cos (1,T,N/2) of all positions.
    in_xla: attention is XLA's own, not a kernel.
  """

  def __init__(
      self, config: ModelConfig, params: Any, tokens_BxT: jax.Array, context_B: jax.Array, attention: str
  ):
    self.config, self.context_B = config, context_B
    self.batch, self.num_positions = tokens_BxT.shape
    self._t = jnp.arange(self.num_positions)[None]
    self.position_BxT = jnp.broadcast_to(self._t, tokens_BxT.shape)
    self.in_context_BxT = self._t < context_B[:, None]
    self.key_BxT = jnp.where(self.in_context_BxT, self._t, EMPTY)
    self.angles = decoder.apart(decoder.angles(config, self._t))
    self._block, self._blocks = decoder.Block(config), params["blocks"]
    window = config.sliding_window
    self._window = window if window and window < self.num_positions else None  # a wider one hides no key
    self._attention, self.in_xla = attention, kernels.resolve(attention) == "xla"

  def block(self, index: jax.Array) -> Callable[..., Any]:
    """apply(method, *args) for the methods of `decoder.Block`, with the weights of block `index`.

    Weights are taken out of their stack within each call, so that a branch that does not run reads none.
    """
    return lambda method, *args: self._block.apply(
        {"params": decoder.block_at(self._blocks, index)}, *args, method=method
    )

  def moved(self, index: jax.Array, x_BxTxD: jax.Array) -> jax.Array:
    """The states of tokens that skip block `index`."""
    return stand_in.moved(decoder.block_at(self._blocks, index), x_BxTxD)

  def attend(self, q_BxKxHxN, k_BxSxGxN, v_BxSxGxN, query_BxK, key_BxS, *, aligned: bool) -> jax.Array:
    """`kernels.attend` as the model has it, (B,K,H,N)."""
    return kernels.attend(
        q_BxKxHxN, k_BxSxGxN, v_BxSxGxN, query_BxK, key_BxS, self._window, aligned=aligned,
        implementation=self._attention,
    )

  def causal_kernel(self, q_BxKxHxN: jax.Array, k_BxSxGxN: jax.Array) -> str:
    """The kernel of `attend` that computes such queries, aligned with the keys, without a mask; "" where none does."""
    if self._window:
      return ""
    chosen = kernels.chosen(q_BxKxHxN, k_BxSxGxN, None, aligned=True, implementation=self._attention)
    return "" if chosen == "xla" else chosen

  def rope(self, position_BxK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """sin and cos (B,K,N/2) of some positions of each row."""
    of_rows = lambda a: gather(jnp.broadcast_to(a, (self.batch,) + a.shape[1:]), position_BxK)
    sin, cos = self.angles
    return of_rows(sin), of_rows(cos)

  def query_positions(self) -> jax.Array:
    """Positions of all queries (B,T), -1 beyond the context."""
    return jnp.where(self.in_context_BxT, self._t, -1)

  def last_position(self) -> jax.Array:
    """Position of each row's last token, (B,1)."""
    return self.context_B[:, None] - 1
