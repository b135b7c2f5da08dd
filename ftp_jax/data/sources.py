"""The four disjoint sets of prompts of a run: search, train, validation and test.

Who goes where is decided by whole documents (all prompts that name one `document`; else a prompt with
all its answers), drawn in an order that `data.seed` fixes:
  1. test, validation and search, in this order, take document after document until they have their
     number, at most a quarter of it from one document (half or all of it where documents run out
     otherwise); train draws from all documents left, and where they run out from prompts of at least
     `data.train_min_context` tokens whose documents are in no other set. So while documents suffice,
     the test prompts change neither with the sizes of the other sets nor with that.
  2. Where even that runs out of documents (a single book), the windows of all documents lie in a
     line that is cut into test, validation, search and train; one window between two sets is
     dropped, so that no two sets hold neighbouring text.
"""

import numpy as np

from ftp_jax.data.encoding import encode_pairs, encode_windows
from ftp_jax.data.prompts import Prompts, pack, shuffled, take
from ftp_jax.data.records import Pair, read_source
from ftp_jax.data.repeats import repeated_passages
from ftp_jax.errors import UserError

SPLITS = ("search", "train", "validation", "test")
_DRAWN = ("test", "validation", "search", "train")  # the order in which the sets draw their documents
_SPREADS = (4, 2, 1)  # documents, at least, behind a held set; tried in this order


def load_splits(data, tokenizer) -> dict[str, Prompts]:
  """Reads, tokenises and divides the data of `config.data`.

  A document gives non-overlapping windows of full length: max_context context tokens and
  `continuation` continuation tokens. Pairs outside [min_context, max_context], or with an answer
  shorter than min_continuation, are dropped; longer answers are cut at `continuation`.

  Args:
    data: the `data` part of a config (ftp_jax.config).
    tokenizer: a transformers fast tokenizer.

  Returns:
    Prompts (num_<split>, max_context + continuation) for each of SPLITS: no two equal rows, no document in two of them
    unless the second rule above had to be used. The training set has num_repeats more, of `repeats`, among the others.

  Raises:
    UserError: a setting is out of range, the data cannot be read, or there is too little of it.
  """
  check_lengths(data)
  prompts, documents, found = load_prompts(data, tokenizer, data.train_min_context or data.min_context)
  # Windows are all of one length; prompts that only the training set may have come last.
  held = np.count_nonzero(prompts.context >= data.min_context)
  counts = {split: getattr(data, f"num_{split}") for split in _DRAWN}
  attempts = (_by_document(documents, held, counts, data.seed, spread) for spread in _SPREADS)
  indices = next(filter(None, attempts), None) or _by_position(documents[:held], counts, data.seed)
  if indices is None:
    if held < len(documents):
      found += f"; {held} of these prompts are long enough for the held sets"
    wanted = " + ".join(f"{counts[split]} {split}" for split in SPLITS)
    raise UserError(
        f"{sum(counts.values())} prompts are needed ({wanted}; up to 3 more where two sets share a document), but "
        f"data.source={data.source!r} gives {len(documents)} distinct ones ({found}); "
        "lower the data.num_* settings, relax the lengths or give more data."
    )
  splits = {split: take(prompts, indices[split]) for split in SPLITS}
  if data.num_repeats:
    both = Prompts(*map(np.concatenate, zip(splits["train"], repeated_passages(data, tokenizer))))
    splits["train"] = take(both, shuffled(len(both.tokens), data.seed, len(_DRAWN) + 1))
  return splits


def load_prompts(data, tokenizer, shortest: int | None = None) -> tuple[Prompts, np.ndarray, str]:
  """All distinct prompts (N, T) of the source, the document (N,) of each, and a count in words.

  With `shortest` contexts may be that short; those below data.min_context come last.
  """
  records = read_source(data)
  width = data.max_context + data.continuation
  if isinstance(records[0], Pair):
    keyed, found = _pair_rows(records, encode_pairs(records, tokenizer, data.chat), data, shortest or data.min_context)
    keyed.sort(key=lambda row: row[2] < data.min_context)
  else:
    windows = encode_windows(records, tokenizer, width)
    keyed = [(number, window, data.max_context) for number, rows in enumerate(windows) for window in rows]
    long_enough = sum(map(bool, windows))
    found = f"{len(records)} documents, of which {long_enough} have at least one window of {width} tokens"
  distinct = {}
  for key, ids, context in keyed:
    distinct.setdefault((tuple(ids), context), key)
  numbers = {key: number for number, key in enumerate(dict.fromkeys(distinct.values()))}
  return pack(list(distinct), width), np.array([numbers[key] for key in distinct.values()], np.int64), found


def _pair_rows(pairs, encoded, data, shortest):
  """Rows (document key, ids, context length) of the pairs whose lengths fit, and a count in words."""
  rows, outside, short = [], 0, 0
  # Answers to one prompt go together, however their documents are named, and so do all prompts of these documents.
  joined = {}
  for pair, (context, _) in zip(pairs, encoded):
    joined[_first(joined, pair.document or tuple(context))] = _first(joined, tuple(context))
  for pair, (context, answer) in zip(pairs, encoded):
    answer, document = answer[: data.continuation], _first(joined, tuple(context))
    if not shortest <= len(context) <= data.max_context:
      outside += 1
    elif len(answer) < data.min_continuation:
      short += 1
    else:
      rows.append((document, context + answer, len(context)))
  found = (
      f"{len(encoded)} records, of which {outside} have a context outside {shortest}..{data.max_context} "
      f"tokens and {short} an answer below {data.min_continuation}"
  )
  return rows, found


def _first(joined: dict, key):
  """The key that stands for all that are joined with it."""
  while joined.setdefault(key, key) != key:
    joined[key] = joined[joined[key]]  # half the way for whoever asks next
    key = joined[key]
  return key


def _by_document(
    documents: np.ndarray, held: int, counts: dict[str, int], seed: int, spread: int
) -> dict[str, np.ndarray] | None:
  """Rule 1 of the module: row indices of each split, or None if there are too few documents.

  The rows from `held` on are for training alone.
  """
  numbers = shuffled(documents[:held].max(initial=-1) + 1, seed)
  left, taken = [np.flatnonzero(documents[:held] == number) for number in numbers], []
  indices = {}
  for stream, split in enumerate(_DRAWN, start=1):
    count = counts[split]
    most = len(documents) if split == "train" else -(-count // spread)
    pool = []
    while left and (split == "train" or len(pool) < count):
      rows = left.pop(0)
      if split != "train":
        taken.append(documents[rows[0]])
      pool.extend(rows[shuffled(len(rows), seed, stream)][:most])
    order = np.array(pool, np.int64)[shuffled(len(pool), seed, stream)]
    if split == "train":
      shorter = held + np.flatnonzero(~np.isin(documents[held:], taken))
      order = np.concatenate([order, shorter[shuffled(len(shorter), seed, stream)]])
    if len(order) < count:
      return None
    indices[split] = order[:count]
  return indices


def _by_position(documents: np.ndarray, counts: dict[str, int], seed: int) -> dict[str, np.ndarray] | None:
  """Rule 2 of the module: row indices of each split, or None if there are too few rows."""
  order = np.argsort(shuffled(documents.max(initial=-1) + 1, seed)[documents], kind="stable")
  start, indices = 0, {}
  for stream, split in enumerate(_DRAWN, start=1):
    rows = order[start : start + counts[split]]
    if len(rows) < counts[split]:
      return None
    indices[split] = rows[shuffled(len(rows), seed, stream)]
    start += len(rows) + bool(len(rows))
  return indices


def check_lengths(data) -> None:
  """Raises UserError for numbers of `config.data` that no data could meet."""
  numbers = data.num_search, data.num_train, data.num_validation, data.num_test, data.num_repeats
  if data.seed < 0 or min(numbers) < 0:
    raise UserError("data.seed or a data.num_* setting is negative; use 0 or more.")
  if data.num_repeats and not data.repeats_path:
    raise UserError(
        f"data.num_repeats={data.num_repeats} passages are to be said twice, of no text; set data.repeats_path, or "
        "data.num_repeats=0."
    )
  if not 1 <= data.min_context <= data.max_context:
    raise UserError(
        f"data.min_context={data.min_context} and data.max_context={data.max_context} are not in order; "
        "use 1 <= min_context <= max_context."
    )
  if not 0 <= data.train_min_context <= data.min_context:
    raise UserError(
        f"data.train_min_context={data.train_min_context} must be at most data.min_context={data.min_context}; 0 means "
        "that."
    )
  widths, longest = list(data.length_buckets), data.max_context + data.continuation
  if not all(isinstance(width, int) and 2 <= width < longest for width in widths) or widths != sorted(set(widths)):
    raise UserError(
        f"data.length_buckets={tuple(widths)} must be whole numbers in ascending order, from 2 to less than "
        f"data.max_context + data.continuation = {longest}, which is always the last bucket."
    )
  if not 1 <= data.min_continuation <= data.continuation:
    raise UserError(
        f"data.min_continuation={data.min_continuation} and data.continuation={data.continuation} are not in order; "
        "use 1 <= min_continuation <= continuation."
    )
