"""What a bench reports: one flat record a method and setting, as JSON and as a table."""

import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from ftp_jax.bench.timing import speedup
from ftp_jax.files import replacing

_LABELS = {"sparsity": 0.0, "shape": None, "kv": None, "router": None}
_COLUMNS = (  # heading, key, factor, digits (None: text)
    ("method", "method", 1, None),
    ("schedule", "shape", 1, None),
    ("kv", "kv", 1, None),
    ("router", "router", 1, None),
    ("context", "context", 1, 0),
    ("batch", "batch", 1, 0),
    ("S", "sparsity", 1, 2),
    ("median ms", "seconds_median", 1e3, 2),
    ("min", "seconds_min", 1e3, 2),
    ("max", "seconds_max", 1e3, 2),
    ("speedup", "speedup", 1, 2),
    ("ideal", "ideal_speedup", 1, 2),
    ("efficiency", "efficiency", 1, 2),
    ("skipped %", "decode_achieved", 100, 1),
    ("tokens/s", "tokens_per_second", 1, 1),
    ("cache MB", "cache_bytes", 1e-6, 2),
    ("cache ratio", "cache_ratio", 1, 3),
    ("extra ms", "extra_seconds", 1e3, 2),
    ("share %", "share", 100, 1),
    ("of dense %", "share_of_dense", 100, 1),
    ("buckets", "buckets", 1, 0),
    ("compile ratio", "compile_ratio", 1, 2),
    ("peak MB", "peak_bytes", 1e-6, 1),
)


def make(
    bench: str,
    method: str,
    context: int,
    batch: int,
    seconds: Sequence[float],
    dense: Sequence[float] | None = None,
    ideal_speedup: float | None = None,
    **extras: Any,
) -> dict[str, Any]:
  """One record; what has no meaning is None.

  Args:
    seconds, dense: measured times of this method and of our dense path; the speedup is the ratio of their medians.
    extras: further figures, and the labels of a `cases.Case`.
  """
  faster = None if dense is None else speedup(seconds, dense)
  return {
      "bench": bench,
      "method": method,
      "context": context,
      "batch": batch,
      "seconds_median": statistics.median(seconds),
      "seconds_min": min(seconds),
      "seconds_max": max(seconds),
      "runs": len(seconds),
      "speedup": faster,
      "ideal_speedup": ideal_speedup,
      "efficiency": faster / ideal_speedup if faster and ideal_speedup else None,
      **(_LABELS | extras),
  }


def write_json(machine: dict[str, Any], records: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Writes machine and records, atomically."""
  with replacing(path) as file:
    file.write((json.dumps({"machine": machine, "records": list(records)}, indent=1) + "\n").encode())


def format_table(records: Sequence[dict[str, Any]]) -> str:
  """Records as aligned plain text, without the columns that no record fills."""

  def cell(record, key, factor, digits):
    value = record.get(key)
    if value is None:
      return "-"
    return str(value) if digits is None else f"{value * factor:.{digits}f}"

  columns = [
      [heading, *(cell(record, *how) for record in records)]
      for heading, *how in _COLUMNS
      if any(record.get(how[0]) is not None for record in records)
  ]
  widths = [max(map(len, column)) for column in columns]
  return "\n".join(
      "  ".join(text.ljust(width) if not i else text.rjust(width) for i, (text, width) in enumerate(zip(line, widths)))
      for line in zip(*columns)
  )
