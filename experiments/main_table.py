"""The main table: every method x S x seed on tasks it was never tuned on, with measured latency, and the Pareto plot.

  ftp-jax run --config=smollm2_135m --workdir=runs/smollm2_135m        # trains what the rows `ftp` load
  python experiments/main_table.py --run=runs/smollm2_135m --data=DIR --out=runs/table --limit=50

`--data` holds arc_easy.jsonl, arc_challenge.jsonl, hellaswag.jsonl, winogrande.jsonl and mmlu.jsonl. Calibration,
validation and test prompts of all methods are those of --run. Each cell (method, S, seed) is a directory below --out
and is computed once: its baseline, quality.json (KL, perplexity, FLOPs, cache) and tasks.json (a record an item). A
run that was interrupted goes on where it was; `--stages=report` makes the table of what is there. Latency is measured
last, all methods of an S in turn, so that its ratios are of one run.
"""

import logging
import pathlib
import statistics
import sys
from typing import Any

import matplotlib
import numpy as np
import tqdm
from absl import app, flags

from ftp_jax.bench.baselines import BaselinePrefill
from ftp_jax.bench.cases import random_tokens
from ftp_jax.bench.timing import interleave, speedup
from ftp_jax.data.prompts import Prompts, take
from ftp_jax.errors import UserError
from ftp_jax.evaluation import baselines
from ftp_jax.evaluation.baselines.cells import baseline_at
from ftp_jax.evaluation.harness import suite
from ftp_jax.evaluation.harness.adapter import EngineLM
from ftp_jax.evaluation.harness.files import read_items
from ftp_jax.export.artifact import load as load_artifact
from ftp_jax.machine import describe_machine
from ftp_jax.models.sources import Model, load_model
from ftp_jax.stages import load_arrays, read_json, write_json

TASKS = ("arc_easy", "arc_challenge", "hellaswag", "winogrande", "mmlu")
METRIC = dict.fromkeys(TASKS[:3], "acc_norm") | dict.fromkeys(TASKS[3:], "acc")
METHODS = ("truncation", "late", "static", "random", "shortgpt", "blockpruner", "mod", "skipgpt", "ftp")
SEEDED = ("random", "mod", "skipgpt", "ftp")  # differ from seed to seed
_TASK_BUCKETS = 2  # most of the time of short prompts goes into compilation
STAGES = ("quality", "tasks", "latency", "report")

_RUN = flags.DEFINE_string("run", None, "Run directory of `ftp-jax run`.", required=True)
_DATA = flags.DEFINE_string("data", None, "Directory of the task files.", required=True)
_OUT = flags.DEFINE_string("out", None, "Directory of the table.", required=True)
_METHODS = flags.DEFINE_list("methods", list(METHODS), "Rows.")
_SPARSITIES = flags.DEFINE_list("sparsities", ["0.22", "0.30", "0.40"], "S of the rows.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of methods that have any.")
_TASKS = flags.DEFINE_list("tasks", list(TASKS), "Tasks with choices; none: leave them out.")
_LIMIT = flags.DEFINE_integer("limit", 100, "Items of each task, the same for all methods.")
_RETRIEVAL = flags.DEFINE_integer("retrieval", 10, "Retrieval items of each length and depth; 0: none.")
_LENGTHS = flags.DEFINE_list("lengths", ["256", "512"], "Tokens of retrieval contexts.")
_CONTEXTS = flags.DEFINE_list("contexts", ["512", "2048"], "Prompt lengths whose latency is measured.")
_RUNS = flags.DEFINE_integer("runs", 5, "Latency measurements of each method.")
_STEPS = flags.DEFINE_integer("steps", 100, "Training steps of the methods `mod` and `skipgpt`.")
_CALIBRATION = flags.DEFINE_integer("calibration", 64, "Calibration prompts of the baselines.")
_STAGES = flags.DEFINE_list("stages", list(STAGES), "Which stages to run.")


class Table:
  """All cells of one table; what they share is made on first use."""

  def __init__(self):
    self.run, self.out = pathlib.Path(_RUN.value), pathlib.Path(_OUT.value)
    self.config = read_json(self.run / "config.json")
    self.model: Model = load_model(self.config["model"]["source"], self.config["model"]["dtype"])
    prompts = lambda split: Prompts(**load_arrays(self.run / "data" / f"{split}.npz"))
    self.test, self.windows, train = prompts("test"), prompts("windows"), prompts("train")
    chosen = take(train, np.arange(min(_CALIBRATION.value, len(train.tokens))))
    self.calibration = lambda where: baselines.Calibration(
        chosen, prompts("validation"), steps=_STEPS.value, directory=where / "calibration"
    )
    self.cells = [("dense", 0.0, 0)]
    for sparsity in map(float, _SPARSITIES.value):
      for method in _METHODS.value:
        seeded = method in SEEDED
        self.cells += [(method, sparsity, int(seed)) for seed in (_SEEDS.value if seeded else ["0"])]

  def directory(self, method: str, sparsity: float, seed: int) -> pathlib.Path:
    return self.out / f"S{sparsity:.2f}" / f"{method}-seed{seed}"

  def baseline(self, method: str, sparsity: float, seed: int) -> baselines.Baseline:
    if method == "ftp":
      where = self.run / f"S{sparsity:.2f}" / f"seed{seed}" / "artifact"
      return baselines.from_artifact(self.model, load_artifact(where))
    where = self.directory(method, sparsity, seed)
    where.mkdir(parents=True, exist_ok=True)
    return baseline_at(where, method, self.model, sparsity, self.calibration(where), seed)

  # --- stages ------------------------------------------------------------------------------------

  def quality(self) -> None:
    missing = [cell for cell in self.cells if not (self.directory(*cell) / "quality.json").exists()]
    if not missing:
      return
    yardstick = baselines.Yardstick(self.model, self.test, 8)
    with tqdm.tqdm(missing, desc="quality") as bar:
      for method, sparsity, seed in bar:
        bar.set_postfix_str(f"{method} S={sparsity:.2f} seed {seed}")
        record = yardstick.record(self.baseline(method, sparsity, seed), self.windows)
        write_json(self.directory(method, sparsity, seed) / "quality.json", record | {"asked": sparsity, "seed": seed})

  def tasks(self) -> None:
    jobs = jobs_of(_TASKS.value, _DATA.value, _LIMIT.value, _RETRIEVAL.value, list(map(int, _LENGTHS.value)))
    with tqdm.tqdm(self.cells, desc="tasks") as bar:
      for method, sparsity, seed in bar:
        bar.set_postfix_str(f"{method} S={sparsity:.2f} seed {seed}")
        path = self.directory(method, sparsity, seed) / "tasks.json"
        settings = {"method": method, "sparsity": sparsity, "seed": seed, "run": str(self.run)}
        done = suite.read_results(path, settings, jobs)
        if any(job.name not in done for job in jobs):
          engine = self.baseline(method, sparsity, seed).engine
          engine.max_buckets = _TASK_BUCKETS
          lm = EngineLM(engine, progress=False)
          suite.run(lm, jobs, settings, describe_machine(), path)

  def latency(self) -> None:
    for sparsity in map(float, _SPARSITIES.value):
      for context in map(int, _CONTEXTS.value):
        path = self.out / f"S{sparsity:.2f}" / f"latency{context}.json"
        if path.exists():
          continue
        tokens = random_tokens(self.model, 1, context)
        first: dict[str, tuple[str, float, int]] = {}  # of each method the first seed
        for cell in self.cells:
          if cell[1] in (0.0, sparsity):
            first.setdefault(cell[0], cell)
        methods = [BaselinePrefill(self.baseline(*cell), tokens) for cell in first.values()]
        seconds = interleave(methods, _RUNS.value, f"latency S={sparsity:.2f} context {context}")
        write_json(path, {
            "machine": describe_machine(),
            "records": [
                {**method.describe(), "seconds": own, "speedup": speedup(own, seconds[0])}
                for method, own in zip(methods, seconds)
            ],
        })  # fmt: skip

  def report(self) -> None:
    rows = list(filter(None, (self._row(cell) for cell in self.cells)))
    table = summarise(rows, {task: chance(task, _DATA.value) for task in _TASKS.value}, _CONTEXTS.value)
    write_json(self.out / "table.json", {"machine": describe_machine(), "cells": rows, "table": table})
    text = markdown(table, _CONTEXTS.value)
    (self.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    plot(table, _CONTEXTS.value[-1], self.out / "pareto.png")
    print(f"written {self.out / 'table.json'}, table.md and pareto.png")

  def _row(self, cell: tuple[str, float, int]) -> dict[str, Any] | None:
    """One cell's figures; None where they are not there yet."""
    method, sparsity, seed = cell
    where = self.directory(*cell)
    if not (where / "quality.json").exists():
      return None
    tasks = read_json(where / "tasks.json")["tasks"] if (where / "tasks.json").exists() else {}
    if not set(_TASKS.value) <= set(tasks):
      return None
    row = {"method": method, "asked": sparsity, "seed": seed, "quality": read_json(where / "quality.json")}
    row["accuracy"] = {task: tasks[task]["figures"][METRIC[task]]["value"] for task in _TASKS.value}
    row["items"] = {task: tasks[task]["items"] for task in _TASKS.value}
    if "retrieval" in tasks:
      row["retrieval"] = tasks["retrieval"]["figures"]["acc"]["value"]
    row["speedup"] = {}
    for context in _CONTEXTS.value:
      path = self.out / f"S{sparsity:.2f}" / f"latency{context}.json"
      if method == "dense":
        row["speedup"][context] = 1.0
      elif path.exists():
        found = {record["method"]: record["speedup"] for record in read_json(path)["records"]}
        row["speedup"][context] = found.get(method)
    return row


def jobs_of(tasks: list[str], data: str, limit: int, retrieval: int, lengths: list[int]) -> list[suite.Job]:
  """What every cell is evaluated on; `retrieval` items of each length and depth, 0: none."""
  jobs = suite.plan(suite.Suite(tuple(tasks), data, limit)) if tasks else []
  return jobs + (suite.plan(suite.Suite(("retrieval",), limit=retrieval, lengths=tuple(lengths))) if retrieval else [])


def chance(task: str, data: str) -> float:
  """Accuracy of a guess: the mean of one over the number of choices."""
  known = {"hellaswag": 1 / 4, "winogrande": 1 / 2}
  if task in known:
    return known[task]
  items = read_items(str(pathlib.Path(data) / f"{task}.jsonl")).items
  return statistics.fmean(1 / len(item["choices"]) for item in items)


def summarise(rows: list[dict[str, Any]], guess: dict[str, float], contexts: list[str]) -> list[dict[str, Any]]:
  """Means and sample standard deviations over seeds, one entry a method and S; nothing without the dense row.

  Args:
    guess: chance of every task of the rows; "retained" figures compare averages over these tasks with the dense one.
  """
  dense = next((row for row in rows if row["method"] == "dense"), None)
  if dense is None:
    return []
  average = lambda row: statistics.fmean(row["accuracy"].values()) if guess else None
  base = statistics.fmean(guess.values()) if guess else None
  share = lambda row, floor: (average(row) - floor) / (average(dense) - floor) if guess else None
  figures = {
      **{task: lambda row, task=task: row["accuracy"][task] for task in guess},
      "average": average,
      "retained": lambda row: share(row, 0.0),
      "retained_above_chance": lambda row: share(row, base),
      **{name: lambda row, name=name: row["quality"][name] for name in (
          "kl", "agreement", "perplexity", "achieved", "flops_saved", "cache_ratio",
      )},
      "retrieval": lambda row: row.get("retrieval"),
      **{f"speedup_{context}": lambda row, context=context: row["speedup"].get(context) for context in contexts},
  }  # fmt: skip
  table = []
  for method, asked in dict.fromkeys((row["method"], row["asked"]) for row in rows):
    own = [row for row in rows if (row["method"], row["asked"]) == (method, asked)]
    entry: dict[str, Any] = {"method": method, "asked": asked, "seeds": len(own)}
    for name, figure in figures.items():
      values = [figure(row) for row in own]
      known = not any(value is None for value in values)
      entry[name] = statistics.fmean(values) if known else None
      entry[f"{name}_spread"] = statistics.stdev(values) if known and len(values) > 1 else None
    table.append(entry)
  return table


_COLUMNS = (  # heading, key, factor, digits
    ("S", "asked", 1, 2), ("ARC-e", "arc_easy", 100, 1), ("ARC-c", "arc_challenge", 100, 1),
    ("HellaSwag", "hellaswag", 100, 1), ("WinoGrande", "winogrande", 100, 1), ("MMLU", "mmlu", 100, 1),
    ("average", "average", 100, 1), ("retained %", "retained", 100, 1),
    ("above chance %", "retained_above_chance", 100, 1), ("retrieval", "retrieval", 100, 1), ("KL", "kl", 1, 3),
    ("agreement %", "agreement", 100, 1), ("perplexity", "perplexity", 1, 1), ("achieved %", "achieved", 100, 1),
    ("FLOPs saved %", "flops_saved", 100, 1), ("KV bytes", "cache_ratio", 1, 2),
)  # fmt: skip


def markdown(table: list[dict[str, Any]], contexts: list[str]) -> str:
  """The table without the columns that nothing fills; behind ± the sample standard deviation over seeds."""
  columns = _COLUMNS + tuple((f"speedup at {context}", f"speedup_{context}", 1, 2) for context in contexts)
  columns = [how for how in columns if any(entry.get(how[1]) is not None for entry in table)]

  def cell(entry, key, factor, digits):
    if entry[key] is None:
      return "-"
    value = entry[key] * factor
    text = f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.1e}"
    spread = entry.get(f"{key}_spread")
    return text if spread is None else f"{text} ± {spread * factor:.{digits}f}"

  lines = [["method", *(heading for heading, *_ in columns)], ["---"] * (len(columns) + 1)]
  lines += [[entry["method"], *(cell(entry, *how) for _, *how in columns)] for entry in table]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(table: list[dict[str, Any]], context: str, path: pathlib.Path) -> None:
  """Retained accuracy and KL against the measured time of a prefill of `context` tokens, one line a method."""
  matplotlib.use("Agg")
  from matplotlib import pyplot

  known = [entry for entry in table if entry[f"speedup_{context}"]]
  shown = [("kl", 1, "KL to the dense model (nats a token)")]
  if any(entry["retained_above_chance"] is not None for entry in known):
    shown.append(("retained_above_chance", 100, "accuracy retained above chance (%)"))
  figure, panels = pyplot.subplots(1, len(shown), figsize=(6 * len(shown), 5), squeeze=False)
  for panel, (key, factor, label) in zip(panels[0], shown):
    for method in dict.fromkeys(entry["method"] for entry in known):
      own = sorted((entry for entry in known if entry["method"] == method), key=lambda entry: entry["asked"])
      panel.plot(
          [1 / entry[f"speedup_{context}"] for entry in own], [entry[key] * factor for entry in own], "o-", label=method
      )
    panel.set_xlabel(f"prefill time at {context} tokens, dense = 1")
    panel.set_ylabel(label)
    panel.grid(alpha=0.3)
  panels[0, 0].set_yscale("symlog", linthresh=0.1)
  panels[0, 0].legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"The argument {argv[1]!r} is not understood.")
  unknown = set(_METHODS.value) - set(METHODS) or set(_STAGES.value) - set(STAGES)
  if unknown:
    known = f"methods are {', '.join(METHODS)}, stages {', '.join(STAGES)}"
    raise UserError(f"{', '.join(sorted(unknown))} is unknown; {known}.")
  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  table = Table()
  for stage in STAGES:
    if stage in _STAGES.value:
      getattr(table, stage)()


if __name__ == "__main__":
  try:
    app.run(main)
  except UserError as error:
    sys.exit(f"main_table: {error}")
