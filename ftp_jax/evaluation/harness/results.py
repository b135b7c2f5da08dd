"""lm-eval's samples -> one record an item, figures with standard errors, and the table.

A record keeps what two models are compared by, item by item: log-likelihoods, the choice, the metrics.
"""

import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate

Record = dict[str, Any]


def run(lm: Any, tasks: dict[str, Task], indices: dict[str, list[int]] | None = None) -> tuple[dict, dict]:
  """Runs lm-eval tasks.

  Args:
    indices: which documents of each task; None: all.

  Returns:
    (samples, results) of lm-eval, each by the name of the task.
  """
  # No bootstrap: it forks processes, and records hold what a standard error needs.
  done = evaluate(
      lm, {"tasks": tasks, "groups": {}, "group_map": {}}, samples=indices, bootstrap_iters=0, log_samples=True
  )
  return done["samples"], done["results"]


def record_items(kind: str, samples: Sequence[dict], lm: Any) -> list[Record]:
  """Records of the samples of one of our own tasks. Log-likelihoods are in nats."""
  make = {"target": _target, "text": lambda sample: _text(sample, lm)}.get(kind, _choice)
  return [make(sample) for sample in samples]


def _choice(sample: dict) -> Record:
  doc, answers = sample["doc"], sample["filtered_resps"]
  likelihoods = [total for total, _ in answers]
  record = {name: doc[name] for name in ("id", "group", "label") if name in doc}
  return record | {
      "choice": max(range(len(answers)), key=likelihoods.__getitem__),
      "loglikelihoods": likelihoods,
      "greedy": bool(answers[doc["label"]][1]),
      **{name: sample[name] for name in sample["metrics"]},
  }


def _target(sample: dict) -> Record:
  ((total, greedy),) = sample["filtered_resps"]
  return {"id": sample["doc"]["id"], "loglikelihood": total, "acc": float(greedy)}


def _text(sample: dict, lm: Any) -> Record:
  text, (total,) = sample["doc"]["text"], sample["filtered_resps"]
  return {
      "id": sample["doc"]["id"], "loglikelihood": total, "tokens": len(lm.tok_encode(text)),
      "words": len(re.split(r"\s+", text)), "bytes": len(text.encode("utf-8")),
  }


def summarise(kind: str, records: Sequence[Record]) -> dict[str, Any]:
  """{metric: {"value", "stderr"}} over records; stderr is None where it is not known."""
  if kind == "text":
    total = sum(record["loglikelihood"] for record in records)
    count = lambda unit: sum(record[unit] for record in records)
    return {f"{unit[:-1]}_perplexity": _figure(_exp(-total / count(unit))) for unit in ("tokens", "words", "bytes")}
  figures = {name: mean(record[name] for record in records) for name in ("acc", "acc_norm") if name in records[0]}
  if kind == "retrieval":
    figures["greedy"] = mean(float(record["greedy"]) for record in records)
  if kind == "target":
    nll = mean(-record["loglikelihood"] for record in records)
    value = _exp(nll["value"])
    figures["perplexity"] = _figure(value, None if nll["stderr"] is None else value * nll["stderr"])
  return figures


def summarise_groups(kind: str, records: Sequence[Record]) -> dict[str, Any]:
  """Figures of each group of records, by its name; empty where they have none."""
  groups: dict[str, list[Record]] = {}
  for record in records:
    if "group" in record:
      groups.setdefault(record["group"], []).append(record)
  return {name: {"items": len(part), "figures": summarise(kind, part)} for name, part in groups.items()}


def mean(values: Any) -> dict[str, float | None]:
  """Mean and its standard error, from the sample standard deviation; None of fewer than two values."""
  values = list(values)
  return _figure(
      statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
  )


def _figure(value: float, stderr: float | None = None) -> dict[str, float | None]:
  return {"value": value, "stderr": stderr}


def _exp(x: float) -> float:
  return math.exp(x) if x < 700 else math.inf


def record_foreign(samples: Sequence[dict]) -> list[Record]:
  """Records of the samples of a task of lm-eval's own: its documents have fields that we do not know."""
  return [
      {
          "id": str(sample["doc_id"]), "filter": sample["filter"], "target": str(sample["target"]),
          "responses": _plain(sample["filtered_resps"]),
          **{name: _plain(sample[name]) for name in sample["metrics"]},
      }
      for sample in samples
  ]


def _plain(value: Any) -> Any:
  """A value as JSON can hold it: metrics over all items, as f1, keep numpy's numbers and arrays of each."""
  if isinstance(value, (np.generic, np.ndarray)):
    return value.tolist()
  if isinstance(value, (list, tuple)):
    return [_plain(part) for part in value]
  return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def summarise_foreign(results: dict[str, Any], records: Sequence[Record]) -> dict[str, Any]:
  """Figures that lm-eval has aggregated; a standard error where the figure is the mean of numbers of the items."""
  figures = {}
  for key, value in results.items():
    metric, _, filter_name = key.partition(",")
    if not filter_name or metric.endswith("_stderr") or not isinstance(value, (int, float, np.number)):
      continue
    own = [record.get(metric) for record in records if record["filter"] == filter_name]
    numbers = all(isinstance(v, (int, float)) for v in own)
    plain = mean(own) if own and numbers else _figure(math.nan)
    name = metric if filter_name == "none" else f"{metric} ({filter_name})"
    figures[name] = plain if math.isclose(plain["value"], value) else _figure(float(value))
  return figures


def format_table(tasks: dict[str, dict[str, Any]]) -> str:
  """Finished tasks as aligned plain text: one line a metric, those of groups below their task."""
  lines = [("task", "items", "metric", "value", "±")]
  for name, task in tasks.items():
    lines += _lines(name, task["items"], task["figures"])
    if task["settings"]["kind"] == "retrieval":
      for group, part in task["groups"].items():
        lines += _lines(f"  {group}", part["items"], part["figures"])
  widths = [max(map(len, column)) for column in zip(*lines)]
  left = (True, False, True, False, False)
  fill = lambda line: [t.ljust(w) if to_left else t.rjust(w) for t, w, to_left in zip(line, widths, left)]
  return "\n".join("  ".join(fill(line)).rstrip() for line in lines)


def _lines(name: str, items: int, figures: dict[str, Any]) -> list[tuple[str, ...]]:
  rows = []
  for metric, figure in figures.items():
    stderr = "" if figure["stderr"] is None else f"{figure['stderr']:.4f}"
    first = not rows
    rows.append((name if first else "", str(items) if first else "", metric, f"{figure['value']:.4f}", stderr))
  return rows
