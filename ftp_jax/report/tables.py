"""Records of the evaluation -> mean and spread over seeds -> plain text and CSV."""

import csv
import io
import math
import os
import statistics
from typing import Any

from ftp_jax.errors import UserError
from ftp_jax.files import replacing
from ftp_jax.report.rundir import read_json

METHODS = {
    "dense": "dense",
    "truncation": "truncation",
    "random": "random",
    "static_uniform": "static + uniform",
    "static_ga": "static + GA",
    "dynamic_ga": "dynamic + GA",
    "dynamic_finetuned": "dynamic + fine-tuned",
}
FIGURES = ("achieved", "flops_saved", "kl", "nll", "agreement", "perplexity")

HEADINGS = (
    "method", "S asked", "achieved", "FLOPs saved", "KL (nats)", "NLL (nats)", "agreement", "perplexity", "seeds"
)
NOTE = (
    "mean ± sample standard deviation over seeds; KL to the dense model, NLL and next-token agreement on the "
    "continuation, perplexity over all positions with the causal view, of which routers are asked to skip "
    "routing.decode_sparsity, or S where that is 0; time saved is not measured here"
)


def read_records(workdir: str) -> list[dict[str, Any]]:
  """Records of the stage `evaluate`; UserError if it has not run or left something else."""
  path = os.path.join(workdir, "evaluate", "records.json")
  records = read_json(path, "evaluate")
  if not records or any(record["method"] not in METHODS for record in records):
    raise UserError(f"{path} holds no records of known methods; delete its folder and run the stage 'evaluate' again.")
  return records


def aggregate(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """One row for each method and asked sparsity, by sparsity and then in the order of METHODS.

  Returns:
    Dicts of method, asked, seeds (number of records), prompts, kl_stderr (over prompts, mean over
    seeds) and, for each of FIGURES, its mean and `<figure>_std`, the sample standard deviation over
    seeds; None where there is nothing to average or fewer than two seeds.
  """
  groups: dict[tuple[float, int], list[dict]] = {}
  order = list(METHODS)
  for record in records:
    groups.setdefault((record["asked"], order.index(record["method"])), []).append(record)
  rows = []
  for (asked, method), group in sorted(groups.items()):
    row = {"method": order[method], "asked": asked, "seeds": len(group)}
    row |= {name: group[0][name] for name in ("prompts", "schedule")}
    row["kl_stderr"] = statistics.fmean(record["kl_stderr"] for record in group)
    for figure in FIGURES:
      values = [record[figure] for record in group if record[figure] is not None]
      row[figure] = statistics.fmean(values) if values else None
      # A NaN has no spread, and `statistics.stdev` refuses it.
      spread = len(values) > 1 and all(map(math.isfinite, values))
      row[f"{figure}_std"] = statistics.stdev(values) if spread else None
    rows.append(row)
  return rows


def method_label(row: dict[str, Any]) -> str:
  """Name of a row's method; a schedule that the GA did not find is named instead."""
  return METHODS[row["method"]].replace("GA", row["schedule"] if row["schedule"] not in (None, "ga") else "GA")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
  """The text of one aggregated row, one string for each of HEADINGS."""
  percent = lambda name: _with_spread(row, name, 100, 1, " %")
  return (
      method_label(row),
      f"{row['asked']:.2f}",
      percent("achieved"),
      percent("flops_saved"),
      _with_spread(row, "kl", 1, 4),
      _with_spread(row, "nll", 1, 4),
      percent("agreement"),
      _with_spread(row, "perplexity", 1, 2),
      str(row["seeds"]),
  )


def _with_spread(row, name, scale, digits, unit="") -> str:
  if row[name] is None:
    return "-"
  spread = row[f"{name}_std"]
  # A spread that rounds to nothing is noise to the reader: sparsities are the same for all seeds.
  visible = spread is not None and round(spread * scale, digits) > 0
  return f"{row[name] * scale:.{digits}f}" + (f" ± {spread * scale:.{digits}f}" if visible else "") + unit


def format_table(rows: list[dict[str, Any]]) -> str:
  """Aggregated rows as aligned plain text, with a rule between sparsities and a note below."""
  lines = [HEADINGS] + [cells(row) for row in rows]
  widths = [max(map(len, column)) for column in zip(*lines)]
  layout = lambda line: "  ".join(
      text.ljust(width) if i == 0 else text.rjust(width) for i, (text, width) in enumerate(zip(line, widths))
  ).rstrip()
  rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
  text = [layout(HEADINGS)]
  previous = None
  for row, line in zip(rows, lines[1:]):
    if row["asked"] != previous:
      text.append(rule)
      previous = row["asked"]
    text.append(layout(line))
  return "\n".join([*text, rule, NOTE])


REDUNDANCY_HEADINGS = ("block", "mean similarity", "share above 0.8")


def redundancy_cells(redundancy: dict[str, Any]) -> list[tuple[str, ...]]:
  """Rows of the redundancy table: one a block, then all, the first and last three, and those between."""
  blocks = zip(redundancy["similarity_mean"], redundancy["share_above_0.8"])
  rows = [(str(i), f"{mean:.4f}", f"{share:.2%}") for i, (mean, share) in enumerate(blocks)]
  parts = (("all", "all"), ("first and last three", "edge"), ("between", "middle"))
  return rows + [(name, "", f"{redundancy[f'share_above_0.8_{key}']:.2%}") for name, key in parts]


def write_redundancy(redundancy: dict[str, Any], path: str) -> None:
  """Writes the redundancy table as CSV."""
  text = io.StringIO()
  csv.writer(text).writerows([REDUNDANCY_HEADINGS, *redundancy_cells(redundancy)])
  _write(text, path)


def write_csv(rows: list[dict[str, Any]], path: str) -> None:
  """Aggregated rows, one a line; empty where there is no figure."""
  text = io.StringIO()
  writer = csv.DictWriter(text, fieldnames=list(rows[0]))
  writer.writeheader()
  writer.writerows(rows)
  _write(text, path)


def _write(text: io.StringIO, path: str) -> None:
  with replacing(path) as file:
    file.write(text.getvalue().encode())
