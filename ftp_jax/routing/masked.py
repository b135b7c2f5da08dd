"""Masked execution: every token is computed and the gate selects the result.

Shapes do not depend on the schedule, which is data: one compiled program serves training, the
search over schedules and, as the reference, the tests of every faster execution.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftp_jax.models import decoder
from ftp_jax.models.attention import attend
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import factors as factor_lib
from ftp_jax.routing import routers
from ftp_jax.routing.config import FACTORS, RouterConfig, RoutingConfig
from ftp_jax.routing.selection import forced_tokens, keep_context


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


jax.tree_util.register_pytree_node(
    Router, lambda r: ((r.params,), (r.kind, r.config)), lambda aux, leaves: Router(*aux, *leaves)
)

STATIC = Router("static")


class Entry(NamedTuple):
  """What enters a block after a dense prefix of blocks: where routed execution can start.

  Attributes:
    x_BxTxD: hidden states.
    score_BxT: prefill scores of the block before; zeros at block 0.
  """

  x_BxTxD: jax.Array
  score_BxT: jax.Array


def can_start_late(routing: RoutingConfig, router: Router) -> bool:
  """Whether nothing but the states and the score table passes from block to block."""
  recurrent = router.kind == "dynamic" and router.config.kind == "recurrent"
  return router.kind != "given" and not recurrent and not routing.decode_sparsity


def decode_schedule(schedule_L: jax.Array, decode_sparsity: float) -> jax.Array:
  """The schedule scaled to mean `decode_sparsity` (below 1 in every block), for continuation tokens."""
  mean = jnp.mean(schedule_L)
  return jnp.clip(schedule_L * decode_sparsity / jnp.where(mean > 0, mean, 1.0), 0.0, 0.99)


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
) -> tuple[Any, jax.Array]:
  """One dense pass: what enters blocks, and the states (B,T,D) that leave the last.

  Schedules that compute the first blocks densely share that part of the work.

  Args:
    depths: ascending blocks whose entries are kept; None keeps all.

  Returns:
    A list of Entry, one a depth, or one Entry with a leading L axis; and the last states.
  """
  batch, num_positions = tokens_BxT.shape
  t = jnp.arange(num_positions)[None]
  valid = t < length_B[:, None]
  sin, cos = decoder.angles(config, t)
  mask = decoder.causal_mask(config, length_B, num_positions)
  block = decoder.Block(config)

  def body(carry, block_params):
    x, tables = carry
    apply = lambda method, *args: block.apply({"params": block_params}, *args, method=method)
    q, k, v = apply(decoder.Block.qkv, x, sin, cos)
    y = apply(decoder.Block.mlp, apply(decoder.Block.attention_out, x, attend(q, k, v, mask)))
    after = factor_lib.update_tables(tables, q, k, mask, valid, context_B, routing.score_window)
    return (y, after), Entry(x, tables.prefill_BxT) if depths is None else None

  carry = (decoder.embed(config, params, tokens_BxT, dtype), factor_lib.init_tables(batch, num_positions, False))
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
    factors_LxBxTxF: the four factors, in the order of FACTORS; None unless collected.
  """

  hidden_BxTxD: jax.Array
  keep_LxBxT: jax.Array
  margin_LxBxT: jax.Array
  factors_LxBxTxF: jax.Array | None


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
    collect_factors: bool = False,
    dtype: Any = jnp.float32,
    remat_policy: str = "none",
) -> Routed:
  """Runs a batch of context + continuation through routed blocks.

  Args:
    tokens_BxT: right-padded tokens.
    context_B: context lengths m >= 1; positions t < m take the prefill view.
    length_B: valid lengths n >= m.
    schedule_L: sparsity asked of each block, for context tokens.
    start: blocks before this one are dense and not run: `entry` is what enters block `start`; see
      `can_start_late`.
    straight_through: let gradients reach the router through the hard gates, as if each gate
      were the sigmoid of its margin.
    collect_factors: also return the factors of every block.

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
  forced = forced_tokens(context_B, num_positions)
  block = decoder.Block(config)
  dynamic = router.kind == "dynamic"
  need_factors = dynamic or collect_factors

  def route(x, tables, state, sparsity, decode_sparsity, index, router_slice):
    """Gates (B,T) of one block: hard decisions and, for training, their differentiable values."""
    asked = jnp.where(in_context, sparsity, decode_sparsity)
    features = None
    if need_factors:
      features = factor_lib.factors(FACTORS, tables, asked, context_B)
    if router.kind == "given":
      return router_slice > 0, router_slice, router_slice, state, features
    if router.kind == "static":
      margin = routers.static_margin(batch, num_positions)
    elif router.kind == "random":
      margin = routers.random_margin(router.params, tokens_BxT, length_B, index)
    else:
      chosen = features[..., [FACTORS.index(name) for name in router.config.factors]]
      margin, state = routers.dynamic_margin(router.config, router_slice, chosen, x, state)
    keep = keep_context(margin, sparsity, context_B, routing)
    newest = valid & ~in_context
    if causal_view and router.kind == "dynamic":
      newest &= (decode_sparsity <= 0) | (jax.nn.sigmoid(-margin) <= routing.decode_threshold)
    elif causal_view and router.kind == "random":
      newest &= margin >= decode_sparsity
    keep |= newest  # The static order ranks the newest token right behind the sink: always kept.
    gate = keep.astype(jnp.float32)
    if straight_through:
      soft = jax.nn.sigmoid(margin)
      decided = valid & ~forced & (asked > 0)
      gate += jnp.where(decided, soft - jax.lax.stop_gradient(soft), 0.0)
    return keep, gate, margin, state, features

  def body(carry, xs):
    x, tables, state = carry
    block_params, sparsity, decode_sparsity, index, router_slice = xs
    keep, gate, margin, state, features = route(x, tables, state, sparsity, decode_sparsity, index, router_slice)
    apply = lambda method, *args: block.apply({"params": block_params}, *args, method=method)
    q, k, v = apply(decoder.Block.qkv, x, sin, cos)
    evict = routing.kv_mode == "evict"
    attended = attend(q, k, v, mask, gate if evict else None)
    y = apply(decoder.Block.mlp, apply(decoder.Block.attention_out, x, attended))
    if need_factors:
      visible = mask & keep[:, None, :] if evict else mask
      tables = jax.lax.stop_gradient(
          factor_lib.update_tables(tables, q, k, visible, keep, context_B, routing.score_window)
      )
    if straight_through or router.kind == "given":
      g = gate[:, :, None].astype(x.dtype)
      x = g * y + (1 - g) * x
    else:
      x = jnp.where(keep[:, :, None], y, x)
    return (x, tables, state), (keep, margin, features if collect_factors else None)

  num_blocks = config.num_blocks
  per_block = router.kind == "given" or (dynamic and router.config.kind == "per_block")
  tables = factor_lib.init_tables(batch, num_positions, causal_view)
  if entry is None:
    x = decoder.embed(config, params, tokens_BxT, dtype)
  else:
    assert can_start_late(routing, router)
    x, tables = entry.x_BxTxD, tables._replace(prefill_BxT=entry.score_BxT)
  state = routers.init_state(router.config, batch, num_positions) if dynamic else None
  xs = (
      params["blocks"],
      schedule_L,
      decode_schedule(schedule_L, routing.decode_sparsity),
      jnp.arange(num_blocks),
      router.params if per_block else None,
  )

  def scanned(carry, xs):
    *rest, router_slice = xs
    return body(carry, (*rest, router_slice if per_block else router.params))

  xs = jax.tree.map(lambda a: a[start:], xs)
  (x, _, _), (keep, margin, features) = jax.lax.scan(decoder.remat(scanned, remat_policy), (x, tables, state), xs)
  if start:
    prefix = lambda value, like: jnp.broadcast_to(value, (start,) + like.shape[1:]).astype(like.dtype)
    keep = jnp.concatenate([prefix(valid, keep), keep])
    margin = jnp.concatenate([prefix(0.0, margin), margin])
    features = None if features is None else jnp.concatenate([prefix(0.0, features), features])
  return Routed(x, keep, margin, features)
