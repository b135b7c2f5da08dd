"""The four low-dimensional factors that feed the dynamic router, each in [0, 1].

Two views (docs/method.md section 4). Prefill view, context tokens: attention paid by the last
`score_window` context queries; rank among the context tokens. Causal view, continuation tokens:
everything as it stands when the token is the newest one, so its own attention row decides.

A table holds every token's latest score: a token skipped in a block keeps the score it had.
The causal view of a continuation token needs the scores of all tokens as it saw them, hence a
row of scores for each, which only exists when continuation tokens may skip and the router reads scores.
"""

import jax
import jax.numpy as jnp

from ftp_jax.models.attention import attention_paid
from ftp_jax.routing.selection import descending_rank


def window_rows(context_B: jax.Array, window: int) -> jax.Array:
  """Positions (B,W) of the score window, the last context queries; negative where the context is shorter."""
  return context_B[:, None] - window + jnp.arange(window)[None]


def window_scores(q_BxWxHxN, k_BxSxGxN, mask_BxWxS, counts_BxW) -> jax.Array:
  """Scores (B,S) of the keys: attention probability, mean over heads and the window's queries that count.

  Args:
    mask_BxWxS: which keys each query sees in this block (causal, padding, and evicted keys).
    counts_BxW: the query exists and was computed in this block, boolean; the last always is.
  """
  weight_BxW = counts_BxW.astype(jnp.float32)
  paid_BxS = attention_paid(q_BxWxHxN, k_BxSxGxN, mask_BxWxS, weight_BxW)
  return paid_BxS / jnp.maximum(jnp.sum(weight_BxW, axis=1, keepdims=True), 1.0)


def context_factors(names, score_BxT: jax.Array, sparsity: jax.Array, context_B: jax.Array) -> jax.Array:
  """The named factors (B,T,len(names)) of context tokens, fp32; meaningless elsewhere.

  position: t / (m - 1), with m the number of context tokens.
  score: a m / (1 + a m); 0.5 is the score of uniform attention whatever m is.
  rank: rank of the score / (m - 1), 0 the highest.
  sparsity: asked of this block.
  """
  t = jnp.arange(score_BxT.shape[1])[None]
  known = context_B[:, None].astype(jnp.float32)
  make = {
      "position": lambda: jnp.broadcast_to(t, score_BxT.shape) / jnp.maximum(known - 1, 1.0),
      "score": lambda: score_BxT * known / (1 + score_BxT * known),
      "rank": lambda: descending_rank(score_BxT, t < context_B[:, None]) / jnp.maximum(known - 1, 1.0),
      "sparsity": lambda: jnp.broadcast_to(sparsity, score_BxT.shape),
  }
  return jnp.stack([make[name]() for name in names], axis=-1).astype(jnp.float32)


def newest_factors(names, seen_BxCxP, column_C, before_BxCxP, position_BxC, sparsity: jax.Array) -> jax.Array:
  """The named factors (B,C,len(names)) of continuation tokens, each as the newest of its sequence.

  As `context_factors`, with the position + 1 tokens known when the token is the newest.

  Args:
    seen_BxCxP: latest score each token has paid to the tokens of its sequence, in any order P.
    column_C: where along P the token itself stands.
    before_BxCxP: which entries of P are tokens before it, boolean.
  """
  known = position_BxC.astype(jnp.float32) + 1
  own = lambda: jnp.take_along_axis(seen_BxCxP, column_C[None, :, None], axis=2)
  make = {
      "position": lambda: jnp.ones(known.shape),
      "score": lambda: own()[..., 0] * known / (1 + own()[..., 0] * known),
      "rank": lambda: jnp.sum((seen_BxCxP > own()) & before_BxCxP, axis=-1) / jnp.maximum(known - 1, 1.0),
      "sparsity": lambda: jnp.broadcast_to(sparsity, known.shape),
  }
  return jnp.stack([make[name]() for name in names], axis=-1).astype(jnp.float32)
