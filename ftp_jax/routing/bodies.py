"""Blocks of a bucketed prefill: a body for each bucket, and what the bodies of one program share.

A body gathers the tokens that a block keeps into its slots, computes them, and puts what becomes of them back.

  x (B,T,D)      states before the block
  score (B,T)    the score table that routers read
  inputs         the block's own: `index`, `offset` of its slots in the cache, whether its attention is `scored`
  query (B,K)    positions of queries, -1 in padding
  key (B,S)      positions of keys, EMPTY in padding
  buffers        the cache, as `cache.empty_cache` makes it
  tiles          what a block writes there, as `cache.as_tiles` makes it; None where `project` has written
  held           where bodies find the keys and values of all tokens: None under `evict`, else see `project`
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftp_jax.models import decoder
from ftp_jax.models.attention import EMPTY, visible
from ftp_jax.routing import factors as factor_lib
from ftp_jax.routing.cache import as_tiles, from_tiles, put_tiles
from ftp_jax.routing.contexts import Contexts
from ftp_jax.routing.slots import Slots, gather, in_chunks

# Where XLA computes attention, as on a CPU: the MLP in parts of this many slots, which is no slower there and needs
# less memory; and an attention of small tiles for the bodies of so few slots, apart from that of all others.
_MLP_SLOTS = 768
_FEW_SLOTS = 64
# Kept queries before all keys are few below one in this many positions. With cuDNN measured, on an H200; with splash
# unknown, and chosen by what the compiler expects of XLA's attention (docs/performance.md).
_FEW_QUERIES = {"cudnn": 3, "splash": 8}


class Gate(NamedTuple):
  """What a block decided: the context tokens it keeps (B,T), and their slots where any body of its program gathers.

  Slots are filled for the largest of these bodies; each body takes the first ones, as many as it has.
  """

  keep_BxT: jax.Array
  filled: Slots | None


class ScoreTable:
  """Attention scores of the contexts' last queries, which routers of the next block read."""

  def __init__(self, contexts: Contexts, score_window: int, always: bool):
    """
    Args:
      always: every block that it is given to is scored; otherwise inputs say which.
    """
    self._contexts, self._always = contexts, always
    self._window_BxW = factor_lib.window_rows(contexts.context_B, min(score_window, contexts.num_positions))

  def after(
      self, apply, x, k_BxSxGxN, key, keep_BxT, score, inputs, to_positions: Callable[[jax.Array], jax.Array]
  ) -> jax.Array:
    """The table (B,T) after a block with these keys; the old one where no router reads it.

    Args:
      to_positions: scores (B,S) of the keys -> (B,T), meaningful at kept tokens.
    """

    def new():
      at = jnp.maximum(self._window_BxW, 0)
      q = apply(decoder.Block.queries, gather(x, at), *self._contexts.rope(at))
      counts = (self._window_BxW >= 0) & jnp.take_along_axis(keep_BxT, at, axis=1)
      seen = visible(at, key, self._contexts.config.sliding_window)
      return jnp.where(keep_BxT, to_positions(factor_lib.window_scores(q, k_BxSxGxN, seen, counts)), score)

    return new() if self._always else jax.lax.cond(inputs["scored"], new, lambda: score)


def project(contexts: Contexts, table: ScoreTable | None, x, score, gate: Gate, buffers, inputs):
  """Keys and values of all tokens, alike in every body: (score, buffers, held).

  `held` are the buffers of keys and values where XLA computes attention, which would otherwise hold the block's own
  beside them, and the keys and values themselves, (B,T,G,N), for a kernel: a TPU's compiler copies the whole cache for
  branches that read it.
  """
  apply = contexts.block(inputs["index"])
  k, v = apply(decoder.Block.keys_values, x, *contexts.angles)
  if table:
    score = table.after(apply, x, k, contexts.key_BxT, gate.keep_BxT, score, inputs, lambda a: a)
  buffers = put_tiles(buffers, as_tiles(k, v, contexts.key_BxT, contexts.num_positions), inputs["offset"], fits=True)
  return score, buffers, buffers[:2] if contexts.in_xla else (k, v)


def _projected(contexts: Contexts, held, inputs) -> tuple[jax.Array, jax.Array]:
  """The keys and values (B,T,G,N) that `project` made."""
  if not contexts.in_xla:
    return held
  part = lambda a, axis: jax.lax.dynamic_slice_in_dim(a, inputs["offset"], contexts.num_positions, axis)
  return from_tiles(part(held[0], 3), part(held[1], 2))


class Body:
  """A block at one bucket: what comes before its attention, and after it.

  Attributes:
    num_slots, routed: the bucket, see `Plan.bodies`.
    evict: keys and values are those of the kept tokens alone.
    table: the score table, if a router reads that of any block with this body.
    alone: no other body is where this one is, so that its tiles have its own slots; else all have as many, T.
    last: the model's last block, whose output is computed for the last token alone.
    gathers: kept tokens are gathered into slots; otherwise all are computed where they stand.
  """

  def __init__(
      self, contexts: Contexts, num_slots: int, routed: bool, evict: bool, table: ScoreTable | None = None,
      alone: bool = False, last: bool = False,
  ):
    self._contexts, self.num_slots, self.routed, self.evict = contexts, num_slots, routed, evict
    self.table, self.alone, self.last = table, alone, last
    self.gathers = routed and (num_slots < contexts.num_positions or evict)

  def _chosen(self, x, filled: Slots | None):
    """The tokens (B,K,D) that the block computes, their positions as queries, and their angles."""
    if not self.gathers:
      return x, self._contexts.query_positions(), self._contexts.angles
    at = filled.position_BxK[:, : self.num_slots]
    return gather(x, at), jnp.where(filled.filled_BxK[:, : self.num_slots], at, -1), self._contexts.rope(at)

  def before(self, x, score, gate: Gate, held, inputs):
    """(queries (B,K,H,N), keys (B,S,G,N), values, query, key), score, tiles."""
    contexts = self._contexts
    apply = contexts.block(inputs["index"])
    chosen, query, angles = self._chosen(x, gate.filled)
    key, tiles = contexts.key_BxT, None
    if self.evict:
      k, v = apply(decoder.Block.keys_values, chosen, *angles)
      key = jnp.where(query < 0, EMPTY, query)
      if self.table:
        of_tokens = lambda a: jnp.take_along_axis(a, gate.filled.slot_BxT, axis=1) if self.gathers else a
        score = self.table.after(apply, x, k, key, gate.keep_BxT, score, inputs, of_tokens)
      tiles = as_tiles(k, v, key, key.shape[1] if self.alone else contexts.num_positions)
    else:
      k, v = _projected(contexts, held, inputs)
    if self.last:
      query = contexts.last_position()
      chosen, angles = gather(x, query), contexts.rope(query)
    q = apply(decoder.Block.queries, chosen, *angles)
    return (q, k, v, query, key), score, tiles

  def after(self, x, gate: Gate, attended_BxKxHxN, inputs):
    """The states after the block, (B,T,D); (B,1,D) after the last."""
    contexts, index = self._contexts, inputs["index"]
    attended = attended_BxKxHxN
    if contexts.in_xla:  # XLA would take tokens and weights out of their arrays before attention, and hold them
      x, attended, index = jax.lax.optimization_barrier((x, attended, index))
    apply = contexts.block(index)
    chosen = gather(x, contexts.last_position()) if self.last else self._chosen(x, gate.filled)[0]
    y = apply(decoder.Block.attention_out, chosen, attended)
    mlp = functools.partial(apply, decoder.Block.mlp)
    y = in_chunks(mlp, y, _MLP_SLOTS) if contexts.in_xla else mlp(y)
    if self.gathers and not self.last:
      y = gather(y, gate.filled.slot_BxT)
    if self.last or not self.routed:
      return y
    return jnp.where(gate.keep_BxT[:, :, None], y, contexts.moved(index, x))

  def whole(self, x, score, gate: Gate, held, inputs):
    """The block with its attention: (x, score, tiles)."""
    (q, k, v, query, key), score, tiles = self.before(x, score, gate, held, inputs)
    contexts = self._contexts
    # The queries are the keys, slot by slot, but for the last token's alone and for kept ones before all keys.
    aligned = not self.last and (self.evict or not self.gathers)
    kernel = "" if self.last or aligned else contexts.causal_kernel(q, k)
    if kernel and _FEW_QUERIES[kernel] * self.num_slots >= contexts.num_positions:
      # At their positions, beside what stands there for the others: a kernel computes all pairs of a causal mask faster
      # than cuDNN those of any other mask, or XLA on a TPU, with a good part of the queries.
      q = gather(q, gate.filled.slot_BxT)
      attended = contexts.attend(q, k, v, contexts.query_positions(), key, aligned=True)
      attended = gather(attended, gate.filled.position_BxK[:, : self.num_slots])
    else:
      attended = contexts.attend(q, k, v, query, key, aligned=aligned)
    return self.after(x, gate, attended, inputs), score, tiles


def run_body(contexts: Contexts, bodies: Sequence[Body], which, x, score, gate: Gate, held, inputs):
  """A block with the body `which` of those given, in the order of their slots: (x, score, tiles)."""
  operands = x, score, gate, held, inputs
  if len(bodies) == 1:
    return bodies[0].whole(*operands)
  if not contexts.in_xla:
    return jax.lax.switch(which, [body.whole for body in bodies], *operands)
  # In an attention with large tiles, few queries would cost a whole one.
  few = sum(body.num_slots <= _FEW_SLOTS for body in bodies)
  groups = [group for group in (bodies[:few], bodies[few:]) if group]
  branches = [functools.partial(_around_attention, contexts, group) for group in groups]
  local = which - few * (which >= few)
  return jax.lax.switch((which >= few).astype(int), branches, local, *operands)


def _around_attention(contexts: Contexts, bodies: Sequence[Body], which, x, score, gate: Gate, held, inputs):
  """`run_body` with one attention between the two parts of all bodies."""
  operands = x, score, gate, held, inputs
  if len(bodies) == 1:
    return bodies[0].whole(*operands)
  width, evict = max(body.num_slots for body in bodies), bodies[0].evict

  def padded_before(body, *operands):
    (q, _, _, query, _), score, tiles = body.before(*operands)
    spare = (0, width - q.shape[1])
    return (
        jnp.pad(q, ((0, 0), spare, (0, 0), (0, 0))), jnp.pad(query, ((0, 0), spare), constant_values=-1), score, tiles
    )

  def cut_after(body, x, gate, attended, inputs):
    return body.after(x, gate, attended[:, : body.num_slots], inputs)

  # Padding slots have no query, and XLA's attention leaves out tiles without one, but on a TPU, which has a kernel.
  branches = lambda part: [functools.partial(part, body) for body in bodies]
  q, query, score, tiles = jax.lax.switch(which, branches(padded_before), *operands)
  if evict:
    k, v = from_tiles(*tiles[:2])
    k, v, key = k[:, :width], v[:, :width], tiles[2][:, :width]
  else:
    (k, v), key = _projected(contexts, held, inputs), contexts.key_BxT
  attended = contexts.attend(q, k, v, query, key, aligned=evict)
  return jax.lax.switch(which, branches(cut_after), x, gate, attended, inputs), score, tiles
