"""The four low-dimensional factors that feed the dynamic router, each in [0, 1].

Two views (docs/method.md section 4). Prefill view, context tokens: attention paid by the last
`score_window` context queries; rank among the context tokens. Causal view, continuation tokens:
everything as it stands when the token is the newest one, so its own attention row decides.

A table holds every token's latest score: a token skipped in a block keeps the score it had.
The causal view of token t needs the scores of all tokens as t saw them, hence a (B,T,T) table,
which only exists when continuation tokens may skip.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftp_jax.models.attention import attention_rows
from ftp_jax.routing.selection import descending_rank


class ScoreTables(NamedTuple):
  """Latest attention scores, probabilities averaged over heads.

  Attributes:
    prefill_BxT: paid to each context token by the score window.
    causal_BxTxT: [b, t, j]: paid to token j by token t; None when no continuation token skips.
  """

  prefill_BxT: jax.Array
  causal_BxTxT: jax.Array | None


def init_tables(batch: int, num_positions: int, causal: bool) -> ScoreTables:
  """Tables before block 0: all zero."""
  return ScoreTables(
      jnp.zeros((batch, num_positions)), jnp.zeros((batch, num_positions, num_positions)) if causal else None
  )


def update_tables(tables, q_BxTxHxN, k_BxTxGxN, mask_BxTxT, keep_BxT, context_B, window: int) -> ScoreTables:
  """Writes the scores of one block; skipped tokens neither give nor receive one.

  Args:
    mask_BxTxT: visibility in this block (causal, padding, and evicted keys).
    keep_BxT: tokens computed in this block, boolean.
  """
  rows_BxW = context_B[:, None] - window + jnp.arange(window)[None]
  at = jnp.maximum(rows_BxW, 0)
  pick = lambda a: jnp.take_along_axis(a, at.reshape(at.shape + (1,) * (a.ndim - 2)), axis=1)
  row_scores_BxWxT = attention_rows(pick(q_BxTxHxN), k_BxTxGxN, pick(mask_BxTxT))
  counts_BxW = ((rows_BxW >= 0) & jnp.take_along_axis(keep_BxT, at, axis=1)).astype(jnp.float32)
  score_BxT = jnp.einsum("bwt,bw->bt", row_scores_BxWxT, counts_BxW)
  # The last context token is always computed, so the window is never empty.
  score_BxT /= jnp.maximum(jnp.sum(counts_BxW, axis=1, keepdims=True), 1.0)
  prefill = jnp.where(keep_BxT, score_BxT, tables.prefill_BxT)
  causal = tables.causal_BxTxT
  if causal is not None:
    own_BxTxT = attention_rows(q_BxTxHxN, k_BxTxGxN, mask_BxTxT)
    causal = jnp.where(keep_BxT[:, :, None] & keep_BxT[:, None, :], own_BxTxT, causal)
  return ScoreTables(prefill, causal)


def factors(names, tables: ScoreTables, sparsity_B2xT: jax.Array, context_B: jax.Array) -> jax.Array:
  """The named factors (B,T,len(names)), fp32.

  position: t / (n - 1), with n the number of tokens the view knows.
  score: a n / (1 + a n); 0.5 is the score of uniform attention whatever n is.
  rank: rank of the score / (n - 1), 0 the highest.
  sparsity: asked of this block, (B or 1, T).
  """
  batch, num_positions = tables.prefill_BxT.shape
  t = jnp.arange(num_positions)[None]
  in_context = t < context_B[:, None]
  known = jnp.where(in_context, context_B[:, None], t + 1).astype(jnp.float32)
  last = jnp.maximum(known - 1, 1.0)
  score = tables.prefill_BxT
  rank = descending_rank(score, in_context)
  if tables.causal_BxTxT is not None:
    own = jnp.diagonal(tables.causal_BxTxT, axis1=1, axis2=2)
    above = (tables.causal_BxTxT > own[:, :, None]) & (t[:, None] < t[:, :, None])
    score = jnp.where(in_context, score, own)
    rank = jnp.where(in_context, rank, jnp.sum(above, axis=-1))
  values = {
      "position": jnp.where(in_context, t / last, 1.0),
      "score": score * known / (1 + score * known),
      "rank": rank / last,
      "sparsity": jnp.broadcast_to(sparsity_B2xT, (batch, num_positions)),
  }
  return jnp.stack([values[name] for name in names], axis=-1).astype(jnp.float32)
