"""Prompts as arrays of one fixed shape, and the batches drawn from them.

A row is a context followed by its continuation, right padded with 0. Everything here is a pure
function of its arguments: the order of training data depends on (seed, step) alone, so a resumed
run needs no iterator state besides its step.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Prompts(NamedTuple):
  """N prompts of at most T tokens, as numpy arrays.

  tokens: (N, T) int32 ids, 0 beyond `length`.
  context: (N,) int32 m_b, number of context tokens.
  length: (N,) int32 n_b, number of valid tokens; positions m_b <= t < n_b are the continuation.
  """

  tokens: np.ndarray
  context: np.ndarray
  length: np.ndarray


def pack(rows: Sequence[tuple[Sequence[int], int]], width: int) -> Prompts:
  """Prompts (N, width) of rows (ids, context length), none longer than `width`."""
  tokens = np.zeros((len(rows), width), np.int32)
  for row, (ids, _) in zip(tokens, rows):
    row[: len(ids)] = ids
  context = np.array([context for _, context in rows], np.int32)
  length = np.array([len(ids) for ids, _ in rows], np.int32)
  return Prompts(tokens, context, length)


def take(prompts: Prompts, indices) -> Prompts:
  """The rows at `indices` (K,), in that order."""
  indices = np.asarray(indices, np.int64)
  return Prompts(*(array[indices] for array in prompts))


def batches(prompts: Prompts, batch_size: int) -> Iterator[tuple[Prompts, np.ndarray]]:
  """Yields (prompts of exactly B = `batch_size` rows, weight (B,) float32) over all rows in order.

  The last batch is filled up with its last row at weight 0; the weights of all batches sum to N,
  so weighted means are exact.
  """
  count = len(prompts.tokens)
  for start in range(0, count, batch_size):
    rows = np.arange(start, start + batch_size)
    yield take(prompts, np.minimum(rows, count - 1)), (rows < count).astype(np.float32)


def indices_at(count: int, batch_size: int, step: int, seed: int) -> np.ndarray:
  """Rows (B,) of training step `step`: places step * B ... of an endless sequence of shuffled epochs over `count` rows.

  Every epoch holds each row once, in an order of its own; a batch may straddle two epochs.
  """
  epochs, offsets = np.divmod(int(step) * batch_size + np.arange(batch_size), count)
  orders = {epoch: shuffled(count, seed, epoch) for epoch in set(epochs.tolist())}
  return np.array([orders[epoch][offset] for epoch, offset in zip(epochs.tolist(), offsets)], np.int64)


def shuffled(count: int, *seed: int) -> np.ndarray:
  """A permutation (count,) of 0 .. count - 1 that depends on the non-negative integers `seed` alone."""
  # numpy keeps the raw bits of a generator fixed across its versions, but not Generator.permutation.
  bits = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
  return np.argsort(bits, kind="stable")
