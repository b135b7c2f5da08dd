"""FLOPs of a prefill, from the routes really taken.

A multiply-add counts two. Per block and computed token: query and output projections and the MLP; per
token with a key: key and value projections; per (query, visible key) pair: 4 H N. In the last block only
the last token's output is used, so dense and pruned prefill alike compute nothing but keys and values
for the others there. The output head runs for the last token. The router is counted where a block skips (a recurrent
one in every block), and in the blocks whose attention scores it reads the queries of the score window and their
products with the keys. Maps that stand in for skipped blocks (`routing.stand_in`) are counted for all context
tokens of a block that skips, as they are computed for all, but for the last block. A block whose routes keep
every token counts as one without gates, even where something was asked of it, as of a short prompt.
"""

import numpy as np

from ftp_jax.models.config import ModelConfig
from ftp_jax.routing.config import SCORE_FACTORS, RouterConfig, RoutingConfig


def computed_flops(config: ModelConfig, query_LxT: np.ndarray, mlp_LxT: np.ndarray, key_LxT: np.ndarray) -> float:
  """FLOPs of a prefill that computes just these tokens, and the output head for one.

  Args:
    query_LxT, mlp_LxT, key_LxT: tokens of the context with a query (and an attended value), with an MLP, and with a
      key and value in each block, boolean.
  """
  width, head = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  total = 2.0 * config.hidden_size * config.vocab_size
  total += 4 * config.hidden_size * width * np.sum(query_LxT) + 4 * config.hidden_size * head * np.sum(key_LxT)
  total += 6 * config.hidden_size * config.intermediate_size * np.sum(mlp_LxT)
  for query, key in zip(np.asarray(query_LxT, bool), key_LxT):
    total += 4 * width * _visible(config, key)[query].sum()
  return float(total)


def _visible(config: ModelConfig, key_T: np.ndarray) -> np.ndarray:
  """How many keys (T,) a query at each position sees of those in a block."""
  visible = np.cumsum(key_T)
  if config.sliding_window:
    first = np.maximum(np.arange(len(key_T)) + 1 - config.sliding_window, 0)
    visible = visible - np.concatenate([[0], visible])[first]
  return visible


def prefill_flops(
    config: ModelConfig,
    keep_LxT: np.ndarray,
    context: int,
    routing: RoutingConfig = RoutingConfig(),
    router: RouterConfig | None = None,
    stand_in_rank: int = 0,
) -> float:
  """FLOPs to prefill one context of `context` tokens under the routes keep_LxT (boolean).

  Args:
    router: what decides them, where that costs anything.
    stand_in_rank: R of the maps that stand in for skipped blocks, 0 for none.
  """
  keep_LxT = np.asarray(keep_LxT, bool)[:, :context]
  computed = keep_LxT.copy()
  computed[-1, : context - 1] = False
  key_LxT = np.ones_like(keep_LxT)
  evicting = slice(routing.first_evicting(config.num_blocks), None)
  key_LxT[evicting] = keep_LxT[evicting]
  total, routed_L = computed_flops(config, computed, computed, key_LxT), ~keep_LxT.all(axis=1)
  total += 4.0 * context * config.hidden_size * stand_in_rank * routed_L[:-1].sum()
  if router is None or not routed_L.any():
    return total
  recurrent = router.kind == "recurrent"
  inputs = len(router.factors) + router.hidden_states * config.hidden_size + recurrent * router.hidden_size
  asked = len(keep_LxT) if recurrent else routed_L.sum()
  total += 2.0 * context * router.hidden_size * (inputs + 2) * asked
  if not SCORE_FACTORS.isdisjoint(router.factors):
    width, rows = config.num_heads * config.head_dim, min(routing.score_window, context)
    for key in key_LxT[routing.scored_blocks(routed_L, recurrent)]:
      total += 2.0 * width * (config.hidden_size * rows + _visible(config, key)[context - rows :].sum())
  return total


def saved_share(config, keep_LxNxT, context_N, routing: RoutingConfig, router=None, stand_in_rank: int = 0) -> float:
  """Share of dense prefill FLOPs that the routes save, over all prompts; arguments as `prefill_flops`."""
  dense = pruned = 0.0
  for n, context in enumerate(context_N):
    dense += prefill_flops(config, np.ones((config.num_blocks, context), bool), context, routing)
    pruned += prefill_flops(config, keep_LxNxT[:, n], context, routing, router, stand_in_rank)
  return 1 - pruned / dense


def skipped_share(keep_LxNxT, end_N, begin_N=None) -> float:
  """Achieved sparsity: share of (token, block) pairs that were skipped, of tokens from `begin_N`, or the first, on."""
  begin_N = np.zeros_like(end_N) if begin_N is None else begin_N
  computed = sum(keep_LxNxT[:, n, begin:end].sum() for n, (begin, end) in enumerate(zip(begin_N, end_N)))
  pairs = len(keep_LxNxT) * np.sum(end_N - begin_N)
  return float(1 - computed / pairs) if pairs else 0.0
