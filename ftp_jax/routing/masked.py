"""Masked execution: every token is computed and the gate selects the result.

Shapes do not depend on the schedule, which is data: one compiled program serves training, the
search over schedules and, as the reference, the tests of every faster execution.

Attention is `full` (any mask and key gates; all scores in memory) or `splash` (a TPU kernel; causal only).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftp_jax.errors import UserError
from ftp_jax.models import decoder, kernels
from ftp_jax.models.attention import attend, attention_rows
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import factors as factor_lib
from ftp_jax.routing import routers, selection, stand_in
from ftp_jax.routing.config import SCORE_FACTORS, RoutingConfig
from ftp_jax.routing.routers import Router
from ftp_jax.sharding import constrain

ATTENTIONS = ("auto", "full", "splash")


class Entry(NamedTuple):
  """What enters a block after a dense prefix of blocks: where routed execution can start.

  Attributes:
    x_BxTxD: hidden states.
    score_BxT: prefill scores of the block before; zeros at block 0.
  """

  x_BxTxD: jax.Array
  score_BxT: jax.Array


class Scores(NamedTuple):
  """Latest attention scores, probabilities averaged over heads.

  Attributes:
    prefill_BxT: paid to each context token by the score window.
    seen_BxTxT: [b, t, j]: paid to token j by token t; None when no continuation token skips by a score.
  """

  prefill_BxT: jax.Array
  seen_BxTxT: jax.Array | None


def init_scores(batch: int, num_positions: int, causal: bool) -> Scores:
  """Tables before block 0: all zero."""
  return Scores(jnp.zeros((batch, num_positions)), jnp.zeros((batch, num_positions, num_positions)) if causal else None)


def update_scores(scores: Scores, q_BxTxHxN, k_BxTxGxN, mask_BxTxT, keep_BxT, context_B, window: int) -> Scores:
  """Writes the scores of one block; skipped tokens neither give nor receive one.

  Args:
    mask_BxTxT: visibility in this block (causal, padding, and evicted keys).
    keep_BxT: tokens computed in this block, boolean.
  """
  rows_BxW = factor_lib.window_rows(context_B, min(window, keep_BxT.shape[1]))
  at = jnp.maximum(rows_BxW, 0)
  pick = lambda a: jnp.take_along_axis(a, at.reshape(at.shape + (1,) * (a.ndim - 2)), axis=1)
  counts_BxW = (rows_BxW >= 0) & jnp.take_along_axis(keep_BxT, at, axis=1)
  score_BxT = factor_lib.window_scores(pick(q_BxTxHxN), k_BxTxGxN, pick(mask_BxTxT), counts_BxW)
  seen = scores.seen_BxTxT
  if seen is not None:
    own_BxTxT = attention_rows(q_BxTxHxN, k_BxTxGxN, mask_BxTxT)
    seen = jnp.where(keep_BxT[:, :, None] & keep_BxT[:, None, :], own_BxTxT, seen)
  return Scores(jnp.where(keep_BxT, score_BxT, scores.prefill_BxT), seen)


def factors(names, scores: Scores, sparsity, decode_sparsity, context_B: jax.Array) -> jax.Array:
  """The named factors (B,T,len(names)): prefill view of context tokens, causal view of the others.

  Without rows of scores those of continuation tokens are meaningless if any of them is made of scores.
  """
  context = factor_lib.context_factors(names, scores.prefill_BxT, sparsity, context_B)
  if scores.seen_BxTxT is None and not SCORE_FACTORS.isdisjoint(names):
    return context
  batch, num_positions = scores.prefill_BxT.shape
  t = jnp.arange(num_positions)
  before = jnp.broadcast_to(t[None, None, :] < t[None, :, None], (batch, num_positions, num_positions))
  position = jnp.broadcast_to(t[None], (batch, num_positions))
  newest = factor_lib.newest_factors(names, scores.seen_BxTxT, t, before, position, decode_sparsity)
  return jnp.where((t[None] < context_B[:, None])[:, :, None], context, newest)


def choose_attention(
    attention: str, config: ModelConfig, routing: RoutingConfig, num_positions: int, backend: str | None = None
) -> str:
  """"full" or "splash": what `auto` means on this mesh and on a backend ("tpu", ...), the other names checked.

  Args:
    backend: None: the one that jax runs on.

  Raises:
    UserError: the name is unknown, or splash cannot compute this.
  """
  if attention not in ATTENTIONS:
    raise UserError(f"There is no attention={attention}; choose one of {', '.join(ATTENTIONS)}.")
  obstacles = (
      (routing.kv_mode == "evict", "cannot leave out the keys of skipped tokens", "routing.kv_mode=project"),
      (config.sliding_window, "has no sliding window", "another model"),
      (num_positions % kernels.LANES, f"needs a multiple of {kernels.LANES} positions, not {num_positions}",
       f"{-(-num_positions // kernels.LANES) * kernels.LANES}"),
      (not kernels.divides(config.num_heads, config.num_kv_heads),
       f"needs whole heads on every device, but the mesh divides {config.num_heads} heads and {config.num_kv_heads} "
       "of keys and values in neither way", "another mesh.tensor"),
  )
  found = [words for obstacle, *words in obstacles if obstacle]
  if attention == "splash" and found:
    raise UserError(f"attention=splash {found[0][0]}; choose {found[0][1]} or attention=full.")
  if attention == "auto":
    return "splash" if (backend or kernels.backend_name()) == "tpu" and not found else "full"
  return attention


def late_start(routing: RoutingConfig, router: Router, first: int) -> int:
  """The latest block up to `first` at which a pass can start from a dense `Entry`.

  It is 0 for a recurrent router, given gates and scores in the causal view: an entry lacks their state, gates and rows.
  Under one-pass routing the block that decides must be run.
  """
  if router.kind == "given" or router.recurrent or (routing.decode_sparsity and router.reads_scores):
    return 0
  return first if routing.one_pass_block < 0 else min(first, routing.one_pass_block)


def dense_entries(
    config: ModelConfig,
    routing: RoutingConfig,
    params: Any,
    tokens_BxT: jax.Array,
    context_B: jax.Array,
    length_B: jax.Array,
    depths: tuple[int, ...] | None = None,
    *,
    dtype: Any = jnp.float32,
    attention: str = "auto",
) -> tuple[Any, jax.Array]:
  """One dense pass: what enters blocks, and the states (B,T,D) that leave the last.

  Schedules that compute the first blocks densely share that part of the work.

  Args:
    depths: ascending blocks whose entries are kept; None keeps all.
    attention: one of ATTENTIONS.

  Returns:
    A list of Entry, one a depth, or one Entry with a leading L axis; and the last states.
  """
  batch, num_positions = tokens_BxT.shape
  t = jnp.arange(num_positions)[None]
  valid = t < length_B[:, None]
  sin, cos = decoder.angles(config, t)
  mask = decoder.causal_mask(config, length_B, num_positions)
  block = decoder.Block(config)
  splash = choose_attention(attention, config, routing, num_positions) == "splash"

  def body(carry, block_params):
    x, scores = carry
    apply = lambda method, *args: block.apply({"params": block_params}, *args, method=method)
    q, k, v = apply(decoder.Block.qkv, x, sin, cos)
    attended = kernels.on_mesh(kernels.splash, q, k, v) if splash else attend(q, k, v, mask)
    y = apply(decoder.Block.mlp, apply(decoder.Block.attention_out, x, attended))
    after = update_scores(scores, q, k, mask, valid, context_B, routing.score_window)
    return (y, after), Entry(x, scores.prefill_BxT) if depths is None else None

  carry = (decoder.embed(config, params, tokens_BxT, dtype), init_scores(batch, num_positions, False))
  if depths is None:
    (x, _), entries = jax.lax.scan(body, carry, params["blocks"])
    return entries, x
  entries = []
  for begin, end in zip((0, *depths), (*depths, config.num_blocks)):
    if begin < end:
      carry, _ = jax.lax.scan(body, carry, jax.tree.map(lambda a: a[begin:end], params["blocks"]))
    if len(entries) < len(depths):
      entries.append(Entry(carry[0], carry[1].prefill_BxT))
  return entries, carry[0]


class Routed(NamedTuple):
  """Result of a masked pass.

  Attributes:
    hidden_BxTxD: states that leave the last block, before the final norm.
    keep_LxBxT: routes, boolean; False at padding.
    margin_LxBxT: compute minus skip logit of the router.
  """

  hidden_BxTxD: jax.Array
  keep_LxBxT: jax.Array
  margin_LxBxT: jax.Array


def forward(
    config: ModelConfig,
    routing: RoutingConfig,
    params: Any,
    router: Router,
    tokens_BxT: jax.Array,
    context_B: jax.Array,
    length_B: jax.Array,
    schedule_L: jax.Array,
    *,
    start: int = 0,
    entry: Entry | None = None,
    straight_through: bool = False,
    input_gradient: bool = True,
    dtype: Any = jnp.float32,
    remat_policy: str = "none",
    attention: str = "auto",
) -> Routed:
  """Runs a batch of context + continuation through routed blocks.

  Args:
    tokens_BxT: right-padded tokens.
    context_B: context lengths m >= 1; positions t < m take the prefill view.
    length_B: valid lengths n >= m.
    schedule_L: sparsity asked of each block, for context tokens.
    start: blocks before this one are dense and not run: `entry` is what enters block `start`; see
      `late_start`.
    straight_through: let gradients reach the router through the hard gates, as if each gate
      were the sigmoid of its margin.
    input_gradient: let them pass through the states that routers read as well. From block to block these
      multiply, and where routes are bad they overflow.
    attention: one of ATTENTIONS.

  Returns:
    Routed. A gate of a context token depends on context tokens alone, a gate of a continuation
    token on nothing after it.
  """
  batch, num_positions = tokens_BxT.shape
  t = jnp.arange(num_positions)[None]
  valid = t < length_B[:, None]
  in_context = t < context_B[:, None]
  causal_view = routing.decode_sparsity > 0
  sin, cos = decoder.angles(config, t)
  mask = decoder.causal_mask(config, length_B, num_positions)
  settled = selection.forced_tokens(context_B, num_positions)  # of which no router decides
  settled |= selection.recent_tokens(context_B, num_positions, routing)
  block = decoder.Block(config)
  dynamic = router.kind == "dynamic"
  splash = choose_attention(attention, config, routing, num_positions) == "splash"
  scored = not SCORE_FACTORS.isdisjoint(router.factors)
  position = jnp.broadcast_to(t, tokens_BxT.shape)
  row_B = routers.row_seed(tokens_BxT, context_B)

  def route(x, scores, state, sparsity, decode_sparsity, index, router_slice):
    """Gates (B,T) of one block: hard decisions and, for training, their differentiable values."""
    if router.kind == "given":
      return router_slice > 0, router_slice, router_slice, state
    read = factors(router.factors, scores, sparsity, decode_sparsity, context_B) if router.factors else None
    x = x if input_gradient else jax.lax.stop_gradient(x)
    margin, state = routers.margin(router, router_slice, read, x, state, position, row_B, index)
    keep = selection.keep_context(margin, sparsity, context_B, routing)
    least = selection.least_kept_margin(margin, decode_sparsity, context_B) if causal_view else None
    keep |= valid & ~in_context & selection.keep_continuation(router.kind, margin, decode_sparsity, least, routing)
    gate = keep.astype(jnp.float32)
    if straight_through:
      soft = jax.nn.sigmoid(margin)
      decided = valid & ~settled & (jnp.where(in_context, sparsity, decode_sparsity) > 0)
      gate += jnp.where(decided, soft - jax.lax.stop_gradient(soft), 0.0)
    return keep, gate, margin, state

  def body(plan_from, evict, carry, xs):
    x, scores, state = carry
    block_params, sparsity, decode_sparsity, index, router_slice = xs
    keep, gate, margin, state = route(
        *(plan_from or (x, scores)), state, sparsity, decode_sparsity, index, router_slice
    )
    apply = lambda method, *args: block.apply({"params": block_params}, *args, method=method)
    q, k, v = apply(decoder.Block.qkv, x, sin, cos)
    attended = kernels.on_mesh(kernels.splash, q, k, v) if splash else attend(q, k, v, mask, gate if evict else None)
    y = apply(decoder.Block.mlp, apply(decoder.Block.attention_out, x, attended))
    if scored:
      visible = mask & keep[:, None, :] if evict else mask
      scores = jax.lax.stop_gradient(update_scores(scores, q, k, visible, keep, context_B, routing.score_window))
    skipping = stand_in.moved(block_params, x)
    if straight_through or router.kind == "given":
      g = gate[:, :, None].astype(x.dtype)
      x = g * y + (1 - g) * skipping
    else:
      x = jnp.where(keep[:, :, None], y, skipping)
    return (constrain(x, "batch", None, None), scores, state), (keep, margin)

  num_blocks = config.num_blocks
  scores = init_scores(batch, num_positions, causal_view and scored)
  if entry is None:
    x = decoder.embed(config, params, tokens_BxT, dtype)
  else:
    assert start == late_start(routing, router, start) and not (start and causal_view and scored)
    x, scores = entry.x_BxTxD, scores._replace(prefill_BxT=entry.score_BxT)
  state = routers.init_state(router, batch, num_positions) if dynamic else None
  xs = (
      params["blocks"],
      schedule_L,
      selection.decode_schedule(schedule_L, routing.decode_sparsity),
      jnp.arange(num_blocks),
      router.params if router.per_block else None,
  )

  def run(plan_from, carry, begin, end):
    evict = begin >= routing.first_evicting(num_blocks)

    def scanned(carry, xs):
      *rest, router_slice = xs
      return body(plan_from, evict, carry, (*rest, router_slice if router.per_block else router.params))

    return jax.lax.scan(decoder.remat(scanned, remat_policy), carry, jax.tree.map(lambda a: a[begin:end], xs))

  plan_from, carry, parts = None, (x, scores, state), []
  for begin, end in routing.phases(num_blocks, start):
    if begin == routing.one_pass_block:
      plan_from = carry[:2]
    carry, out = run(plan_from, carry, begin, end)
    parts.append(out)
  x = carry[0]
  keep, margin = jax.tree.map(lambda *a: jnp.concatenate(a), *parts) if len(parts) > 1 else parts[0]
  if start:
    prefix = lambda value, like: jnp.broadcast_to(value, (start,) + like.shape[1:]).astype(like.dtype)
    keep = jnp.concatenate([prefix(valid, keep), keep])
    margin = jnp.concatenate([prefix(0.0, margin), margin])
  return Routed(x, keep, margin)
