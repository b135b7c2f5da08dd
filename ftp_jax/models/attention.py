"""Attention: one interface; softmax in fp32, grouped-query heads, a boolean mask.

`key_gate` lets gradients reach the decision to keep a key: it multiplies the exponentiated
scores, so 0 removes a key exactly as masking it does, and the derivative at 0 is finite.
"""

import jax
import jax.numpy as jnp

_LOWEST = -1e30


def _scores(q_BxTxHxN, k_BxSxGxN):
  """Scaled scores (B,G,H/G,T,S) in fp32."""
  batch, rows, heads, dim = q_BxTxHxN.shape
  q = q_BxTxHxN.reshape(batch, rows, k_BxSxGxN.shape[2], -1, dim)
  return jnp.einsum("btghn,bsgn->bghts", q, k_BxSxGxN, preferred_element_type=jnp.float32) * dim**-0.5


def _weights(scores, mask_BxTxS, key_gate_BxS):
  """Attention weights (B,G,H/G,T,S); rows that see no key are all zero."""
  mask = mask_BxTxS[:, None, None]
  if key_gate_BxS is None:
    seen = mask
  else:
    gate = key_gate_BxS[:, None, None, None]
    seen = mask & (jax.lax.stop_gradient(gate) > 0)
  top = jax.lax.stop_gradient(jnp.max(jnp.where(seen, scores, _LOWEST), axis=-1, keepdims=True))
  # Removed keys may exceed the largest kept one; bounded, their derivative stays finite.
  powers = jnp.where(mask, jnp.exp(jnp.minimum(scores - top, 20.0)), 0.0)
  if key_gate_BxS is not None:
    powers = powers * gate
  total = jnp.sum(powers, axis=-1, keepdims=True)
  return powers / jnp.where(total == 0, 1.0, total)


def attend(
    q_BxTxHxN: jax.Array,
    k_BxSxGxN: jax.Array,
    v_BxSxGxN: jax.Array,
    mask_BxTxS: jax.Array,
    key_gate_BxS: jax.Array | None = None,
) -> jax.Array:
  """Attended values (B,T,H,N); a query that sees no key gets zeros."""
  weights = _weights(_scores(q_BxTxHxN, k_BxSxGxN), mask_BxTxS, key_gate_BxS).astype(v_BxSxGxN.dtype)
  out = jnp.einsum("bghts,bsgn->btghn", weights, v_BxSxGxN)
  return out.reshape(q_BxTxHxN.shape)


def attention_rows(q_BxTxHxN, k_BxSxGxN, mask_BxTxS) -> jax.Array:
  """Attention probabilities (B,T,S), averaged over query heads, of a few query rows."""
  return jnp.mean(_weights(_scores(q_BxTxHxN, k_BxSxGxN), mask_BxTxS, None), axis=(1, 2))
