"""Blocks of a bucketed prefill: a body for each bucket, and what the bodies of a program share.

A body gathers the tokens that a block keeps into its slots, computes them, and puts what becomes of them back. Every
function here takes as `inputs` the slices that belong to one block: its `index`, its `offset` in the cache, whether its
attention is `scored`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftp_jax.models import decoder, kernels
from ftp_jax.models.attention import EMPTY, visible
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import factors as factor_lib
from ftp_jax.routing import routers
from ftp_jax.routing.cache import as_tiles, put
from ftp_jax.routing.config import RoutingConfig
from ftp_jax.routing.slots import Slots, gather, in_parts

# Where XLA computes attention, as on a CPU: the MLP in parts of this many slots, which is no slower there and needs
# less memory; and an attention of small tiles for the bodies of so few slots, apart from that of all others.
_MLP_SLOTS = 768
_FEW_SLOTS = 64


class Gate(NamedTuple):
  """What a block decided: the context tokens it keeps (B,T), and their slots where any body of its program gathers."""

  keep_BxT: jax.Array
  slots: Slots | None


class Contexts:
  """The right-padded contexts of one prefill, T positions, and what every block does with them.

  Attributes:
    position_BxT, in_context_BxT: of every slot of the padded contexts.
    key_BxT: positions as attention reads those of keys, EMPTY beyond the context.
    row_B: what seeds the random router.
    in_xla: attention is XLA's own, not a kernel.
  """

  def __init__(
      self, config: ModelConfig, routing: RoutingConfig, params: Any, tokens_BxT: jax.Array, context_B: jax.Array,
      attention: str,
  ):  # fmt: skip
    self.config, self.context_B = config, context_B
    self.batch, self.num_positions = tokens_BxT.shape
    self._t = jnp.arange(self.num_positions)[None]
    self.position_BxT = jnp.broadcast_to(self._t, tokens_BxT.shape)
    self.in_context_BxT = self._t < context_B[:, None]
    self.key_BxT = jnp.where(self.in_context_BxT, self._t, EMPTY)
    self.angles = decoder.angles(config, self._t)
    self.row_B = routers.row_seed(tokens_BxT, context_B)
    self._block, self._blocks = decoder.Block(config), params["blocks"]
    self._window_BxW = factor_lib.window_rows(context_B, routing.score_window)
    self._attention, self.in_xla = attention, kernels.resolve(attention) == "xla"

  def block(self, index: jax.Array) -> Callable[..., Any]:
    """Applies methods of `decoder.Block` with one block's weights: apply(method, *args)."""
    return lambda method, *args: self._block.apply(
        {"params": decoder.block_at(self._blocks, index)}, *args, method=method
    )

  def attend(self, q, k, v, query, key, *, aligned: bool) -> jax.Array:
    return kernels.attend(
        q, k, v, query, key, self.config.sliding_window, aligned=aligned, implementation=self._attention
    )

  def rope(self, position_BxK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """sin and cos (B,K,N/2) of some positions of each row."""
    of_rows = lambda a: gather(jnp.broadcast_to(a, (self.batch,) + a.shape[1:]), position_BxK)
    sin, cos = self.angles
    return of_rows(sin), of_rows(cos)

  def query_positions(self) -> jax.Array:
    """Positions of all queries (B,T), -1 beyond the context."""
    return jnp.where(self.in_context_BxT, self._t, -1)

  def last(self) -> jax.Array:
    """Position of each row's last token, (B,1)."""
    return self.context_B[:, None] - 1

  def scores(self, apply, x_BxTxD, k, key, keep_BxT, score_BxT, inputs, to_positions) -> jax.Array:
    """The score table after a block whose keys `k` stand at positions `key`; the old one where no router reads it."""

    def new():
      at = jnp.maximum(self._window_BxW, 0)
      q = apply(decoder.Block.queries, gather(x_BxTxD, at), *self.rope(at))
      counts = (self._window_BxW >= 0) & jnp.take_along_axis(keep_BxT, at, axis=1)
      own = factor_lib.window_scores(q, k, visible(at, key, self.config.sliding_window), counts)
      return jnp.where(keep_BxT, to_positions(own), score_BxT)

    return jax.lax.cond(inputs["scored"], new, lambda: score_BxT)

  def project(self, x_BxTxD, score_BxT, gate: Gate, buffers, inputs, scores: bool):
    """Keys and values of all tokens, alike in every body: the score table, the cache, and where bodies find them."""
    apply = self.block(inputs["index"])
    k, v = apply(decoder.Block.keys_values, x_BxTxD, *self.angles)
    if scores:
      score_BxT = self.scores(apply, x_BxTxD, k, self.key_BxT, gate.keep_BxT, score_BxT, inputs, lambda a: a)
    buffers = put(buffers, as_tiles(k, v, self.key_BxT, self.num_positions), inputs["offset"])
    return score_BxT, buffers, buffers[:2] if self.in_xla else (k, v)

  def projected(self, held, inputs) -> tuple[jax.Array, jax.Array]:
    """The keys and values of all tokens, (B,T,G,N), from where `project` says.

    A CPU takes them from the cache, or would hold them twice. A TPU's compiler copies the whole cache for branches that
    read it.
    """
    if not self.in_xla:
      return held
    part = lambda a, axis: jax.lax.dynamic_slice_in_dim(a, inputs["offset"], self.num_positions, axis)
    return part(held[0], 3).transpose(0, 3, 1, 2), part(held[1], 2).transpose(0, 2, 1, 3)


class Body:
  """A block at one bucket: what comes before its attention, and after it.

  Attributes:
    slots, routed: the bucket, see `plan.Plan.bodies`.
    evict: keys and values are those of the kept tokens alone.
    last: the model's last block, whose output is computed for the last token alone.
    gathers: the tokens that it computes are not all, or not where they stand.
  """

  def __init__(
      self, contexts: Contexts, slots: int, routed: bool, evict: bool, last: bool = False, scores: bool = False
  ):
    self._contexts, self.slots, self.routed, self.evict, self.last = contexts, slots, routed, evict, last
    self._scores = scores
    self.gathers = routed and (slots < contexts.num_positions or evict)

  def _chosen(self, x, slots: Slots | None):
    """The tokens that the block computes, where they stand (-1: nowhere), and their angles."""
    if not self.gathers:
      return x, self._contexts.query_positions(), self._contexts.angles
    at = slots.position_BxK[:, : self.slots]
    return gather(x, at), jnp.where(slots.filled_BxK[:, : self.slots], at, -1), self._contexts.rope(at)

  def before(self, x, score, gate: Gate, held, inputs):
    """Queries, keys, values and their positions; score table; tiles for the cache where the body makes its own."""
    contexts = self._contexts
    apply = contexts.block(inputs["index"])
    chosen, query, angles = self._chosen(x, gate.slots)
    key, tiles = contexts.key_BxT, None
    if self.evict:
      k, v = apply(decoder.Block.keys_values, chosen, *angles)
      key = jnp.where(query < 0, EMPTY, query)
      if self._scores:
        of_tokens = lambda a: jnp.take_along_axis(a, gate.slots.slot_BxT, axis=1) if self.gathers else a
        score = contexts.scores(apply, x, k, key, gate.keep_BxT, score, inputs, of_tokens)
      tiles = as_tiles(k, v, key, key.shape[1] if self.last else contexts.num_positions)
    else:
      k, v = contexts.projected(held, inputs)
    if self.last:
      query = contexts.last()
      chosen, angles = gather(x, query), contexts.rope(query)
    q = apply(decoder.Block.queries, chosen, *angles)
    return (q, k, v, query, key), score, tiles

  def after(self, x, gate: Gate, attended, inputs):
    """The states after the block."""
    contexts, index = self._contexts, inputs["index"]
    if contexts.in_xla:  # or it takes the tokens and these weights out of their arrays before attention, and holds them
      x, attended, index = jax.lax.optimization_barrier((x, attended, index))
    apply = contexts.block(index)
    chosen = gather(x, contexts.last()) if self.last else self._chosen(x, gate.slots)[0]
    y = apply(decoder.Block.attention_out, chosen, attended)
    mlp = functools.partial(apply, decoder.Block.mlp)
    y = in_parts(mlp, y, _MLP_SLOTS) if contexts.in_xla else mlp(y)
    if self.gathers and not self.last:
      y = gather(y, gate.slots.slot_BxT)
    return y if self.last or not self.routed else jnp.where(gate.keep_BxT[:, :, None], y, x)

  def whole(self, x, score, gate: Gate, held, inputs):
    """The block with its attention: (x, score, tiles)."""
    operands, score, tiles = self.before(x, score, gate, held, inputs)
    attended = self._contexts.attend(*operands, aligned=not self.last and (self.evict or not self.gathers))
    return self.after(x, gate, attended, inputs), score, tiles


def run_body(contexts: Contexts, bodies: Sequence[Body], which, x, score, gate: Gate, held, inputs):
  """A block with one of the bodies, which come in the order of their slots: (x, score, tiles)."""
  operands = x, score, gate, held, inputs
  if not contexts.in_xla:
    return jax.lax.switch(which, [body.whole for body in bodies], *operands)
  # In an attention with large tiles, few queries would cost a whole one.
  few = sum(body.slots <= _FEW_SLOTS for body in bodies)
  groups = [group for group in (bodies[:few], bodies[few:]) if group]
  branches = [functools.partial(_around_attention, contexts, group) for group in groups]
  local = which - few * (which >= few)
  return jax.lax.switch((which >= few).astype(int), branches, local, *operands)


def _around_attention(contexts: Contexts, bodies: Sequence[Body], which, x, score, gate: Gate, held, inputs):
  """`run_body` with one attention between the two parts of all bodies."""
  operands = x, score, gate, held, inputs
  if len(bodies) == 1:
    return bodies[0].whole(*operands)
  width, evict = max(body.slots for body in bodies), bodies[0].evict

  def padded_before(body, *operands):
    (q, _, _, query, _), score, tiles = body.before(*operands)
    spare = (0, width - q.shape[1])
    return (
        jnp.pad(q, ((0, 0), spare, (0, 0), (0, 0))), jnp.pad(query, ((0, 0), spare), constant_values=-1), score, tiles
    )

  def cut_after(body, x, gate, attended, inputs):
    return body.after(x, gate, attended[:, : body.slots], inputs)

  # Padding slots have no query, and XLA's attention leaves out tiles without one.
  branches = lambda part: [functools.partial(part, body) for body in bodies]
  q, query, score, tiles = jax.lax.switch(which, branches(padded_before), *operands)
  if evict:
    k, v, key = tiles[0].transpose(0, 3, 1, 2), tiles[1].transpose(0, 2, 1, 3), tiles[2]
    k, v, key = k[:, :width], v[:, :width], key[:, :width]
  else:
    (k, v), key = contexts.projected(held, inputs), contexts.key_BxT
  attended = contexts.attend(q, k, v, query, key, aligned=evict)
  return jax.lax.switch(which, branches(cut_after), x, gate, attended, inputs), score, tiles
