"""The main table: every method x S x seed on tasks it was never tuned on, with measured latency, and the Pareto plot.

  ftp-jax run --config=smollm2_135m_stand_in --workdir=runs/maps       # trains what the rows `ftp` load
  ftp-jax run --config=smollm2_135m_late --workdir=runs/no_maps
  python experiments/main_table.py --run=runs/maps --others=ftp_no_maps=runs/no_maps --data=DIR --out=runs/table

`--data` holds arc_easy.jsonl, arc_challenge.jsonl, hellaswag.jsonl, winogrande.jsonl and mmlu.jsonl. Calibration,
validation and test prompts of all methods are those of --run; `--others` names runs of other configs on the same
prompts, a row each; `--long` names files of further, longer test prompts, of texts that --run has not seen
(experiments/long_chats.py makes some). Each cell (method, S, seed) is a directory below --out and is computed once: its
baseline, quality.json (KL, perplexity, FLOPs, cache), long-NAME.json (the same, without perplexity, of the file NAME of
--long), tasks.json (a record an item, and how much was skipped there). What a cell depends on is kept beside it, and a
call with other settings is refused. A run that was interrupted goes on where it was; `--stages=report` makes table and
plot of the cells that it names, as far as they are there. Latency is measured for all cells of an S in turn, so that
its ratios are of one run, and again where a cell was added.
"""

import contextlib
import itertools
import logging
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import table_figures
import tqdm
from absl import flags
from absl import logging as absl_logging
from ml_collections import config_dict

from ftp_jax import launch
from ftp_jax.bench.baselines import BaselinePrefill
from ftp_jax.bench.cases import random_tokens
from ftp_jax.bench.timing import interleave, speedup
from ftp_jax.data.prompts import Prompts, take
from ftp_jax.data.sources import load_prompts
from ftp_jax.errors import UserError
from ftp_jax.evaluation import baselines
from ftp_jax.evaluation.baselines.registry import CONFIG_FILE as BASELINE_FILE
from ftp_jax.evaluation.baselines.registry import baseline_at
from ftp_jax.evaluation.harness import suite
from ftp_jax.evaluation.harness.adapter import EngineLM
from ftp_jax.evaluation.harness.files import read_items
from ftp_jax.export.artifact import CONFIG_FILE
from ftp_jax.export.artifact import load as load_artifact
from ftp_jax.files import replacing
from ftp_jax.inference import Prefix
from ftp_jax.inference.padding import FINE, Padding
from ftp_jax.launch import run_config
from ftp_jax.machine import describe_machine
from ftp_jax.models.sources import Model, load_model
from ftp_jax.pipeline.checks import digest
from ftp_jax.stages import SETTINGS, describe_changes, load_arrays, read_json, write_json

TASKS = ("arc_easy", "arc_challenge", "hellaswag", "winogrande", "mmlu")
METRIC = dict.fromkeys(TASKS[:3], "acc_norm") | dict.fromkeys(TASKS[3:], "acc")
METHODS = (
    "truncation", "late", "late_maps", "static", "random", "fastv", "shortgpt", "blockpruner", "mod", "skipgpt", "ftp",
)
TRAINED = ("mod", "skipgpt", "late_maps")
VALIDATED = (*TRAINED, "fastv")  # look at the validation prompts, fastv at no others
SEEDED = ("random", "ftp", *TRAINED)  # differ from seed to seed
STAGES = ("quality", "long", "tasks", "latency", "report")
_TRAINING = ("--steps", "calibration prompts")  # settings that nothing but the making of a cell depends on
_TASK_BUCKETS = 2  # most of the time of short prompts goes into compilation
_LONG_BATCH = 4

Cell = tuple[str, float, int]  # method, S, seed

_RUN = flags.DEFINE_string("run", None, "Run directory of `ftp-jax run`.", required=True)
_OTHERS = flags.DEFINE_list("others", [], "Further rows, NAME=RUN: run directories of the same prompts.")
_DATA = flags.DEFINE_string("data", None, "Directory of the task files.", required=True)
_OUT = flags.DEFINE_string("out", None, "Directory of the table.", required=True)
_METHODS = flags.DEFINE_list("methods", None, "Rows; all, unless they are named.")
_SPARSITIES = flags.DEFINE_list("sparsities", ["0.22", "0.30", "0.40"], "S of the rows.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of methods that have any.")
_TASKS = flags.DEFINE_list("tasks", list(TASKS), "Tasks with choices; none: leave them out.")
_LIMIT = flags.DEFINE_integer("limit", 100, "Items of each task, the same for all methods.", lower_bound=1)
_RETRIEVAL = flags.DEFINE_integer("retrieval", 10, "Retrieval items of each length and depth; 0: none.", lower_bound=0)
_LENGTHS = flags.DEFINE_list("lengths", ["256", "512"], "Tokens of retrieval contexts.")
_CONTEXTS = flags.DEFINE_list("contexts", ["512", "2048"], "Prompt lengths whose latency is measured.")
_RUNS = flags.DEFINE_integer("runs", 5, "Latency measurements of each method.", lower_bound=1)
_LONG = flags.DEFINE_list("long", [], "Prompts files for the KL of long contexts; none: leave it out.")
_STEPS = flags.DEFINE_integer("steps", 100, "Training steps of `mod`, `skipgpt` and `late_maps`.", lower_bound=1)
_CALIBRATION = flags.DEFINE_integer(
    "calibration", 192, "Calibration prompts of the baselines, of those FTP trains on.", lower_bound=1
)
_REMOVAL = flags.DEFINE_integer("removal_prompts", 32, "Those of blockpruner, slow as it is.", lower_bound=1)
_STAGES = flags.DEFINE_list("stages", list(STAGES), "Which stages to run.")


class Table:
  """All cells of one table; what they share is made on first use."""

  def __init__(self):
    self.run, self.out = pathlib.Path(_RUN.value), pathlib.Path(_OUT.value)
    self.contexts = numbers("contexts", _CONTEXTS.value, int)
    self.sparsities = numbers("sparsities", _SPARSITIES.value, float)
    if any(round(s, 2) != s for s in self.sparsities):
      raise UserError("--sparsities must have two decimals: they name the directories of the cells.")
    self.runs = {"ftp": self.run} | other_runs()
    self.methods = (*METHODS, *(name for name in self.runs if name != "ftp"))
    rows = _METHODS.value or self.methods
    check_known("methods", rows, self.methods)
    self.config = run_config(self.run)
    for run in self.runs.values():
      self.check_new_tokens(run)
      self.check_same_prompts(run)
    self.dtype = self.config["model"]["dtype"]
    self.model: Model = load_model(self.config["model"]["source"], self.dtype)
    prompts = lambda split: Prompts(**load_arrays(self.run / "data" / f"{split}.npz"))
    positions = self.model.config.max_positions
    if "latency" in _STAGES.value and not all(1 <= context <= positions for context in self.contexts):
      raise UserError(f"--contexts={','.join(_CONTEXTS.value)} must be from 1 to the model's {positions} positions.")
    self.test, self.windows, train = prompts("test"), prompts("windows"), prompts("train")
    self.calibration = lambda method, where: baselines.Calibration(
        take(train, np.arange(min(calibration_prompts(method), len(train.tokens)))), prompts("validation"),
        # One of blockpruner goes on where that of a smaller S ended.
        steps=_STEPS.value, directory=self.out / method if method == "blockpruner" else where / "calibration",
    )
    self.cells = self.named_cells(rows)
    for cell in self.cells:
      self.check_artifact(*cell)
    for cell in self.cells:
      self.claim(cell)

  def named_cells(self, rows: Sequence[str]) -> list[Cell]:
    """Those of the flags; where nothing but the report is asked for, as far as they were begun."""
    cells: list[Cell] = [("dense", 0.0, 0)]
    for sparsity in self.sparsities:
      for method in rows:
        seeds = numbers("seeds", _SEEDS.value, int) if method in SEEDED or method in self.runs else [0]
        cells += [(method, sparsity, seed) for seed in seeds]
    begun = lambda cell: (self.directory(*cell) / SETTINGS).exists()
    only_report = set(_STAGES.value) == {"report"}
    found = [cell for cell in dict.fromkeys(cells) if begun(cell) or not only_report]
    if not found:
      raise UserError(f"{self.out} has none of the cells that are named; run their other --stages first.")
    return found

  def directory(self, method: str, sparsity: float, seed: int) -> pathlib.Path:
    return self.out / f"S{sparsity:.2f}" / f"{method}-seed{seed}"

  @staticmethod
  def check_new_tokens(run: pathlib.Path) -> None:
    """UserError if a run trained routers for new tokens: rows compare contexts, and new tokens count as computed."""
    if run_config(run)["routing"]["decode_sparsity"]:
      raise UserError(f"New tokens of {run} may skip, those of other rows may not; name a run of decode_sparsity=0.")

  def check_same_prompts(self, run: pathlib.Path) -> None:
    """UserError unless a run has the test prompts, windows and model of --run."""
    own, model = run_config(run), lambda config: (config["model"]["source"], config["model"]["dtype"])
    same = all(self._split(self.run, name) == self._split(run, name) for name in ("test", "windows"))
    if not same or model(own) != model(self.config):
      raise UserError(f"{run} of --others has other test prompts or another model than --run; name a run of the same.")

  @staticmethod
  def _split(run: pathlib.Path, name: str) -> str:
    return digest(str(run / "data" / f"{name}.npz"))

  def artifact(self, method: str, sparsity: float, seed: int) -> pathlib.Path:
    return self.runs[method] / f"S{sparsity:.2f}" / f"seed{seed}" / "artifact"

  def check_artifact(self, method: str, sparsity: float, seed: int) -> None:
    """UserError where a cell of a run has no artifact yet: what it depends on would be written down without."""
    if method in self.runs and not (self.artifact(method, sparsity, seed) / CONFIG_FILE).exists():
      where = self.artifact(method, sparsity, seed)
      raise UserError(f"{where} is not there; let its run end, or name other --methods, --sparsities or --seeds.")

  def settings(self, method: str, sparsity: float, seed: int) -> dict[str, Any]:
    """Everything that the figures of a cell depend on but the task files."""
    of_split = lambda name: self._split(self.run, name)
    found = {
        "method": method, "sparsity": sparsity, "seed": seed, "model": self.config["model"]["source"],
        "dtype": self.dtype, "test prompts": of_split("test"), "windows": of_split("windows"),
    }
    if method in self.runs:
      found["artifact"] = load_artifact(self.artifact(method, sparsity, seed)).digest
    elif method != "dense" and baselines.METHODS[method].calibrated:
      if method != "fastv":
        found |= {"calibration prompts": calibration_prompts(method), "training prompts": of_split("train")}
      found |= {"--steps": _STEPS.value} if method in TRAINED else {}
      found |= {"validation": of_split("validation")} if method in VALIDATED else {}
    return found

  def claim(self, cell: Cell) -> None:
    """Writes a cell's settings; UserError where it was made with others, or begun at least.

    Latency and report take a cell that was trained in another way as it is.
    """
    path, settings = self.directory(*cell) / SETTINGS, self.settings(*cell)
    begun = path.parent.is_dir() and any(found.name != SETTINGS for found in path.parent.iterdir())
    if path.exists() and begun:
      stored = read_json(path)
      if not set(_STAGES.value) - {"latency", "report"} and (path.parent / BASELINE_FILE).exists():
        stored, settings = ({k: v for k, v in some.items() if k not in _TRAINING} for some in (stored, settings))
      changes = describe_changes(stored, settings)
      if changes:
        raise UserError(f"{path.parent} was made with {changes}; name another --out, or delete that folder.")
    else:
      if any((path.parent / name).exists() for name in ("quality.json", "tasks.json")) or long_files(path.parent):
        raise UserError(f"{path.parent} has figures but no {SETTINGS}; name another --out, or delete that folder.")
      path.parent.mkdir(parents=True, exist_ok=True)
      write_json(path, settings)

  def made_with(self, cell: Cell) -> dict[str, Any]:
    """The settings that a cell has; UserError where it was not begun, or the artifact of a run is gone."""
    return self.settings(*cell) if cell[0] in self.runs else read_json(self.directory(*cell) / SETTINGS)

  def baseline(self, method: str, sparsity: float, seed: int) -> baselines.Baseline:
    if method in self.runs:
      artifact = load_artifact(self.artifact(method, sparsity, seed))
      return baselines.from_artifact(self.model, artifact, dtype=self.dtype)
    where = self.directory(method, sparsity, seed)
    return baseline_at(where, method, self.model, sparsity, self.calibration(method, where), seed, dtype=self.dtype)

  # --- stages ------------------------------------------------------------------------------------

  def quality(self) -> None:
    missing = [cell for cell in self.cells if not (self.directory(*cell) / "quality.json").exists()]
    self._measure("quality", missing, self.test, 8, {}, self.windows)

  def long(self) -> None:
    prompts = {file: self.long_prompts(file) for file in _LONG.value}  # all are looked at before any is measured
    for file in prompts:
      name, made_of, missing = f"long-{pathlib.Path(file).stem}", {"prompts": digest(file)}, []
      for cell in self.cells:
        path = self.directory(*cell) / f"{name}.json"
        if not path.exists():
          missing.append(cell)
        elif read_json(path)["made of"] != made_of:
          raise UserError(f"{path} was measured on another file than {file} of --long; name another --out.")
      self._measure(name, missing, prompts[file], _LONG_BATCH, {"made of": made_of})

  def _measure(
      self, name: str, missing: list[Cell], prompts: Prompts, batch: int, extra: dict[str, Any],
      windows: Prompts | None = None,
  ) -> None:
    """Writes NAME.json, a Yardstick's record, of the cells that miss it."""
    if not missing:
      return
    yardstick = baselines.Yardstick(self.model, prompts, batch, dtype=self.dtype)
    with tqdm.tqdm(missing, desc=name) as bar:
      for method, sparsity, seed in bar:
        bar.set_postfix_str(f"{method} S={sparsity:.2f} seed {seed}")
        record = yardstick.record(self.baseline(method, sparsity, seed), windows)
        path = self.directory(method, sparsity, seed) / f"{name}.json"
        write_json(path, record | {"asked": sparsity, "seed": seed} | extra)

  def long_prompts(self, file: str) -> Prompts:
    """All distinct prompts of a file of --long that fit the model, wrapped as those of the run, answers cut as there.

    Raises:
      UserError: there is none, or the run has one of them outside its test set.
    """
    data = config_dict.ConfigDict(self.config["data"])
    data.source, data.path = "prompts", file
    data.min_context, data.min_continuation = 1, 1
    data.max_context = self.model.config.max_positions - data.continuation
    prompts, _, found = load_prompts(data, self.model.tokenizer)
    if not len(prompts.tokens):
      raise UserError(f"--long={file} has no prompt that fits the model ({found}).")
    contexts = lambda rows: {row[:m].tobytes() for row, m in zip(rows.tokens, rows.context)}
    for run, split in itertools.product(self.runs.values(), ("search", "train", "validation")):
      if contexts(prompts) & contexts(Prompts(**load_arrays(run / "data" / f"{split}.npz"))):
        raise UserError(f"--long={file} holds prompts of the {split} set of {run}; name a file of other texts.")
    width = int(prompts.length.max())
    return Prompts(prompts.tokens[:, :width], prompts.context, prompts.length)

  def tasks(self) -> None:
    jobs = planned_jobs()
    with tqdm.tqdm(self.cells, desc="tasks") as bar:
      for cell in bar:
        bar.set_postfix_str(f"{cell[0]} S={cell[1]:.2f} seed {cell[2]}")
        where, settings = self.directory(*cell), self.settings(*cell)
        done = suite.read_results(where / "tasks.json", settings, jobs, "name another --out")
        missing = [job for job in jobs if job.name not in done]
        if not missing:
          continue
        engine = Counted(self.baseline(*cell))
        lm = EngineLM(engine, progress=False)
        for job in missing:
          engine.skipped = engine.pairs = 0.0
          done |= suite.run(lm, [job], settings, describe_machine())
          done[job.name]["skipped"] = engine.skipped / engine.pairs
          write_json(where / "tasks.json", {"machine": describe_machine(), "settings": settings, "tasks": done})

  def latency(self) -> None:
    for sparsity in self.sparsities:
      for context in self.contexts:
        path = self.out / f"S{sparsity:.2f}" / f"latency{context}.json"
        wanted = {cell: self.made_with(cell) for cell in self.cells if cell[1] in (0.0, sparsity)}
        stored = read_json(path) if path.exists() else {"settings": [], "runs": 0}
        if stored["runs"] == _RUNS.value and all(own in stored["settings"] for own in wanted.values()):
          continue
        # The cells of earlier calls as well, or they would lose their times.
        for own in stored["settings"]:
          cell = own["method"], own["sparsity"], own["seed"]
          with contextlib.suppress(UserError):  # its artifact is gone, or being made anew
            if cell not in wanted and self.made_with(cell) == own:
              wanted[cell] = own
        unknown = {cell[0] for cell in wanted} - {"dense", *self.methods}
        if unknown:
          raise UserError(f"{path} has times of {', '.join(sorted(unknown))}; name their runs with --others as well.")
        tokens = random_tokens(self.model, 1, context)
        methods = [BaselinePrefill(self.baseline(*cell), tokens) for cell in wanted]
        seconds = interleave(methods, _RUNS.value, f"latency S={sparsity:.2f} context {context}")
        write_json(path, {
            "machine": describe_machine(), "runs": _RUNS.value, "settings": list(wanted.values()),
            "records": [
                {**method.describe(), "seed": cell[2], "seconds": own, "speedup": speedup(own, seconds[0])}
                for cell, method, own in zip(wanted, methods, seconds)
            ],
        })

  def report(self) -> None:
    rows = [self._row(cell) for cell in self.cells]
    known = lambda row: (
        row["quality"], row["long"], row["correct"], any(row["speedup"].values()), row["retrieval"] is not None
    )
    rows = [row for row in rows if any(known(row))]
    table = table_figures.summarise(rows, {task: chance(task, _DATA.value) for task in _TASKS.value}, self.contexts)
    means = lambda of_tasks: {task: statistics.fmean(items.values()) for task, items in of_tasks.items()}
    cells = [row | {name: means(row[name]) for name in ("same_choice", "choice_kl")} for row in rows]
    write_json(self.out / "table.json", {"machine": describe_machine(), "cells": cells, "table": table})
    files = table_figures.long_names(cells)
    compared = "kl", "choice_kl", *map(table_figures.of_file, files)
    equal = [table_figures.equal_latency(table, self.contexts[-1], figure) for figure in compared]
    parts = table_figures.markdown(table, self.contexts, files), table_figures.differences_to_ftp(table), *equal
    text = "\n\n".join(filter(None, parts))
    with replacing(self.out / "table.md") as file:
      file.write((text + "\n").encode())
    print(text)
    table_figures.plot(table, self.contexts[-1], self.out / "pareto.png", files)
    print(f"written to {self.out}")

  def _row(self, cell: Cell) -> dict[str, Any]:
    """One cell's figures, as far as they are there: every part may be missing."""
    method, sparsity, seed = cell
    read = lambda name: read_json(self.directory(*cell) / name) if (self.directory(*cell) / name).exists() else {}
    tasks = read("tasks.json").get("tasks", {})
    row = {"method": method, "asked": sparsity, "seed": seed, "speedup": {}}
    row |= {"quality": read("quality.json"), "long": {}}
    for path in long_files(self.directory(*cell)):
      row["long"][path.stem.removeprefix("long-")] = read_json(path)
    records = {task: tasks[task]["records"] for task in _TASKS.value if task in tasks}
    row["correct"] = {
        task: {str(record["id"]): float(record[METRIC[task]]) for record in own} for task, own in records.items()
    }
    dense = self.directory("dense", 0.0, 0) / "tasks.json"
    of_dense = read_json(dense)["tasks"] if dense.exists() else {}
    row["same_choice"], row["choice_kl"] = {}, {}
    for task in records.keys() & of_dense.keys():
      theirs = of_dense[task]["records"]
      if {record["id"] for record in records[task]} != {record["id"] for record in theirs}:
        raise UserError(
            f"{self.directory(*cell)} has other items of {task} than the dense cell; run --stages=tasks with one "
            "--limit for all cells, or name another --out."
        )
      row["same_choice"][task], row["choice_kl"][task] = table_figures.choices(records[task], theirs)
    known = [tasks[task]["skipped"] for task in records]
    row["skipped"] = statistics.fmean(known) if known and len(known) == len(_TASKS.value) else None
    row["retrieval"] = tasks["retrieval"]["figures"]["acc"]["value"] if "retrieval" in tasks else None
    for context in self.contexts:
      path = self.out / f"S{sparsity:.2f}" / f"latency{context}.json"
      if method == "dense":
        row["speedup"][context] = 1.0
      elif path.exists():
        stored, own = read_json(path), self.made_with(cell)  # a time of the cell as it was before is none of it
        found = [record["speedup"] for made, record in zip(stored["settings"], stored["records"]) if made == own]
        row["speedup"][context] = found[0] if found else None
    return row


class Counted:
  """A baseline's engine as the adapter uses it, which counts the (token, block) pairs of all it is asked for.

  A call's repeated rows fill it up and count once.

  Attributes:
    pairs, skipped: in tokens, each standing for all blocks; contexts and continuations.
  """

  def __init__(self, baseline: baselines.Baseline):
    self.baseline, self.engine, self.model = baseline, baseline.engine, baseline.engine.model
    self.engine.max_buckets = _TASK_BUCKETS
    self.skipped = self.pairs = 0.0

  def prefill(self, prompts: Sequence[Sequence[int]], padding: Padding = FINE) -> Prefix:
    prefix = self.engine.prefill(prompts, padding)
    for group in prefix.groups:
      keep = np.asarray(self.baseline.routes(group.prefilled.cache))
      distinct = {tuple(prompts[at]): row for row, at in enumerate(group.index)}
      for prompt, row in distinct.items():
        length = len(prompt)
        self.pairs += length
        self.skipped += length * self.baseline.costs(keep[..., row, :], length).skipped
    return prefix

  def score(self, prefix: Prefix, continuations: Sequence[Sequence[int]], rows: Sequence[int]):
    distinct = {(row, *continuation) for row, continuation in zip(rows, continuations)}
    tokens = sum(len(key) - 2 for key in distinct)  # the last one is scored, not run
    self.pairs += tokens
    self.skipped += tokens * self.baseline.skipped_after
    return self.engine.score(prefix, continuations, rows)


def other_runs() -> dict[str, pathlib.Path]:
  """Rows and run directories of --others."""
  found = {}
  for entry in _OTHERS.value:
    name, is_pair, run = entry.partition("=")
    if not is_pair or not name.isidentifier() or name in {"dense", *METHODS, *found}:
      raise UserError(f"--others={entry} must be NAME=RUN, NAME a word that no other row has.")
    found[name] = pathlib.Path(run)
  return found


def check_known(flag: str, names: Sequence[str], known: Sequence[str]) -> None:
  """UserError where a list flag names what there is not."""
  unknown = sorted(set(names) - set(known))
  if unknown:
    raise UserError(f"--{flag}={','.join(unknown)} is unknown; choose among {', '.join(known)}.")


def long_files(directory: pathlib.Path) -> list[pathlib.Path]:
  """What was measured on files of --long in one cell, by name."""
  return sorted(directory.glob("long-*.json"))


def calibration_prompts(method: str) -> int:
  return min(_CALIBRATION.value, _REMOVAL.value) if method == "blockpruner" else _CALIBRATION.value


def numbers(flag: str, values: list[str], kind: type) -> list[Any]:
  """The numbers of a list flag, one or more."""
  try:
    found = [kind(value) for value in values]
  except ValueError:
    found = []
  if not found:
    raise UserError(f"--{flag}={','.join(values)} must be numbers, separated by commas.")
  return found


def planned_jobs() -> list[suite.Job]:
  """What every cell is evaluated on."""
  lengths = numbers("lengths", _LENGTHS.value, int)
  return jobs_of(_TASKS.value, _DATA.value, _LIMIT.value, _RETRIEVAL.value, lengths)


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


def main() -> None:
  absl_logging.set_verbosity(absl_logging.WARNING)  # below it orbax tells of every step of a save
  check_known("stages", _STAGES.value, STAGES)
  check_known("tasks", _TASKS.value, TASKS)
  if _STAGES.present and "long" in _STAGES.value and not _LONG.value:
    raise UserError("--stages names long, which measures the prompts of a file; name it with --long=FILE.")
  for file in _LONG.value:
    if not pathlib.Path(file).is_file():
      raise UserError(f"--long={file} is no file; name a prompts file.")
  if len({pathlib.Path(file).stem for file in _LONG.value}) < len(_LONG.value):
    raise UserError(f"--long={','.join(_LONG.value)} has two files of one name; rename one.")
  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  if "tasks" in _STAGES.value:
    planned_jobs()  # what is wrong with the files of tasks shows before hours of other stages
  table = Table()
  for stage in STAGES:
    if stage in _STAGES.value:
      getattr(table, stage)()


if __name__ == "__main__":
  launch.script(main)
