"""FLOPs of a prefill, from the routes really taken.

A multiply-add counts two. Per block and computed token: query and output projections and the MLP; per
token with a key: key and value projections; per (query, visible key) pair: 4 H N. In the last block only
the last token's output is used, so dense and pruned prefill alike compute nothing but keys and values
for the others there. The output head runs for the last token. The router is counted where a block skips.
"""

import numpy as np

from ftp_jax.models.config import ModelConfig
from ftp_jax.routing.config import RouterConfig


def prefill_flops(
    config: ModelConfig, keep_LxT: np.ndarray, context: int, kv_mode: str, router: RouterConfig | None = None
) -> float:
  """FLOPs to prefill one context of `context` tokens under the routes keep_LxT (boolean)."""
  width, head = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  per_token = 4 * config.hidden_size * width + 6 * config.hidden_size * config.intermediate_size
  per_key = 4 * config.hidden_size * head
  per_pair = 4 * width
  total = 2.0 * config.hidden_size * config.vocab_size
  for i, keep in enumerate(np.asarray(keep_LxT)[:, :context]):
    has_key = keep if kv_mode == "evict" else np.ones_like(keep)
    visible = np.cumsum(has_key)
    if config.sliding_window:
      before = np.concatenate([[0], visible])[np.maximum(np.arange(context) + 1 - config.sliding_window, 0)]
      visible = visible - before
    computed = keep.copy()
    if i == config.num_blocks - 1:
      computed[: context - 1] = False
    total += per_token * computed.sum() + per_key * has_key.sum() + per_pair * visible[computed].sum()
    if router is not None and not keep.all():
      inputs = len(router.factors) + router.hidden_states * config.hidden_size
      inputs += router.hidden_size * (router.kind == "recurrent")
      total += 2.0 * context * router.hidden_size * (inputs + 2)
  return total


def saved_share(config, keep_LxNxT, context_N, kv_mode, router=None) -> float:
  """Share of dense prefill FLOPs that the routes save, over all prompts."""
  dense = pruned = 0.0
  for n, context in enumerate(context_N):
    dense += prefill_flops(config, np.ones((config.num_blocks, context), bool), context, kv_mode)
    pruned += prefill_flops(config, keep_LxNxT[:, n], context, kv_mode, router)
  return 1 - pruned / dense


def skipped_share(keep_LxNxT, context_N) -> float:
  """Achieved sparsity: share of (context token, block) pairs that were skipped."""
  computed = sum(keep_LxNxT[:, n, :m].sum() for n, m in enumerate(context_N))
  return float(1 - computed / (len(keep_LxNxT) * np.sum(context_N)))
