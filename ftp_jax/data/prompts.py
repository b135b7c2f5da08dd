"""Prompts as arrays of one fixed shape, and the batches drawn from them.

A row is a context followed by its continuation, right padded with 0. With length buckets a batch holds
prompts of similar length and is only as wide as that: less padding, and a program a width. Everything
here is a pure function of its arguments: the order of training data depends on (seed, step) alone, so a
resumed run needs no iterator state besides its step.
"""

import itertools
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


class Bucket(NamedTuple):
  """Prompts of similar length: the width W that holds them all, in tokens, and their rows (K,), in order."""

  width: int
  rows: np.ndarray


class Batch(NamedTuple):
  """B prompts, (B, W); their weights (B,) float32; the rows (B,) they were taken from."""

  prompts: Prompts
  weight: np.ndarray
  rows: np.ndarray

  @property
  def counted(self) -> Prompts:
    """The prompts, of those of weight 0 one token alone: nothing in them is predicted."""
    return self.prompts._replace(length=np.where(self.weight > 0, self.prompts.length, 1).astype(np.int32))


def take(prompts: Prompts, indices, width: int | None = None) -> Prompts:
  """The rows at `indices` (K,), in that order, cut to `width`, which must hold them."""
  indices = np.asarray(indices, np.int64)
  return Prompts(prompts.tokens[indices, :width], prompts.context[indices], prompts.length[indices])


def buckets_of(prompts: Prompts, widths: Sequence[int], least: int) -> list[Bucket]:
  """The buckets of random batches, the widest first: each row in the narrowest of `widths` that holds it, else in T.

  One of fewer than `least` rows is filled up with the longest ones of the next, so that a batch seldom repeats a row.

  Args:
    widths: ascending, in tokens.
    least: rows of the smallest bucket, unless there are fewer in all.
  """
  longest_first, buckets = np.argsort(-prompts.length, kind="stable"), []
  lengths = prompts.length[longest_first]
  for narrower, width in reversed(list(itertools.pairwise([0, *_below(prompts, widths), prompts.tokens.shape[1]]))):
    begin = sum(len(bucket.rows) for bucket in buckets)
    count = np.count_nonzero(lengths[begin:] > narrower)
    if not count:
      continue
    count = max(count, least)
    if len(lengths) - begin - count < least:  # too few would be left
      count = len(lengths) - begin
    buckets.append(Bucket(width, np.sort(longest_first[begin : begin + count])))
  return buckets


def batches(prompts: Prompts, batch_size: int, widths: Sequence[int] = ()) -> Iterator[Batch]:
  """Yields batches of exactly B = `batch_size` rows over all rows in order; with `widths` in that of their lengths.

  A batch is as wide as the narrowest of `widths` (ascending) that holds it, else T. The last one is filled up
  with its last row at weight 0; the weights of all batches sum to N, so weighted means are exact.
  """
  count = len(prompts.tokens)
  order = np.argsort(prompts.length, kind="stable") if widths else np.arange(count)
  widths = np.array([*_below(prompts, widths), prompts.tokens.shape[1]])
  for start in range(0, count, batch_size):
    at = np.arange(start, start + batch_size)
    rows = order[np.minimum(at, count - 1)]
    width = int(widths[np.searchsorted(widths, prompts.length[rows].max())])
    yield Batch(take(prompts, rows, width), (at < count).astype(np.float32), rows)


def _below(prompts: Prompts, widths: Sequence[int]) -> list[int]:
  return [width for width in widths if width < prompts.tokens.shape[1]]


def put_back(result: np.ndarray, part: np.ndarray, batch: Batch, axis: int) -> None:
  """Writes what was made of a batch to where its prompts are in `result`, as long as T or W on the axes behind `axis`.

  Args:
    axis: that of the prompts, N in `result` and B in `part`.
  """
  real = np.flatnonzero(batch.weight)
  at = [slice(size) for size in part.shape]
  at[axis] = batch.rows[real]
  result[tuple(at)] = np.take(part, real, axis)


def turns(buckets: Sequence[Bucket], steps: int) -> Iterator[tuple[Bucket, int]]:
  """Yields for each of `steps` the bucket whose turn it is, and how many turns that had before.

  Turns are spread evenly, as many for a bucket as it has of the rows: whatever `steps`, the order begins alike.
  """
  share = np.array([len(bucket.rows) for bucket in buckets])
  share = share / share.sum()
  most = np.ceil((steps + len(buckets)) * share).astype(int) + 1
  which = np.repeat(np.arange(len(buckets)), most)
  number = np.concatenate([np.arange(count) for count in most])
  order = np.argsort((number + 0.5) / share[which], kind="stable")[:steps]
  for i in order:
    yield buckets[which[i]], int(number[i])


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
