"""Serving a pruned model: prefill with real skipping, generation, scores of continuations."""

from ftp_jax.inference.engine import Engine, Generation, Prefix, Score
from ftp_jax.inference.sampling import Sampling

__all__ = ["Engine", "Generation", "Prefix", "Sampling", "Score"]
