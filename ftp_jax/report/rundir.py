"""Reads a run directory back: what the stages left for the report.

    importance/redundancy.json and, where gates were scored, importance/fisher.json
    S0.30/seed0/search/schedule.json and, where it was searched, metrics.jsonl
    S0.30/seed0/train/metrics.jsonl
    S0.30/seed0/finetune/schedule.json, round<r>/metrics.jsonl
    S0.30/seed0/evaluate/routes.json
"""

import json
import os
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ftp_jax.errors import UserError


class Cell(NamedTuple):
  """One sparsity target with one seed.

  Attributes:
    search_schedule, schedule: sparsities (L,) before and after fine-tuning, lists.
    search_history: metrics of the search, one dict a generation; empty where the schedule was not
      searched but computed or given.
    histories: the same of every round of fine-tuning.
    training: metrics of the router training, one dict a line.
    prompts: kept-token maps: dicts of tokens, context and keep (L, context).
  """

  sparsity: float
  seed: int
  search_schedule: list[float]
  schedule: list[float]
  search_history: list[dict]
  histories: list[list[dict]]
  training: list[dict]
  prompts: list[dict]


class Run(NamedTuple):
  """What the report shows beside the table.

  Attributes:
    redundancy: figures of the redundancy analysis.
    fisher: mean Fisher score of a gate by block, (L,); None where the run scored no gates.
    cells: by S, then seed.
  """

  redundancy: dict
  fisher: list[float] | None
  cells: list[Cell]

  def by_sparsity(self) -> dict[float, list[Cell]]:
    """Cells of every S, in the order of the config."""
    sparsities = dict.fromkeys(cell.sparsity for cell in self.cells)
    return {s: [cell for cell in self.cells if cell.sparsity == s] for s in sparsities}


def cell_directory(workdir: str, sparsity: float, seed: int) -> str:
  """Where the stages of one sparsity target and seed live."""
  return os.path.join(workdir, f"S{sparsity:.2f}", f"seed{seed}")


def read_run(workdir: str, config: ConfigDict) -> Run:
  """Reads a run directory.

  Raises:
    UserError: a file is missing or unreadable; names the stage that writes it.
  """
  cells = []
  for sparsity in config.sparsities:
    for seed in config.seeds:
      at = lambda *parts, d=cell_directory(workdir, sparsity, seed): os.path.join(d, *parts)
      searched = config.search.schedule == "ga"
      cells.append(
          Cell(
              sparsity=sparsity,
              seed=seed,
              search_schedule=read_json(at("search", "schedule.json"), "search"),
              schedule=read_json(at("finetune", "schedule.json"), "finetune"),
              search_history=_read_lines(at("search", "metrics.jsonl"), "search") if searched else [],
              histories=[
                  _read_lines(at("finetune", f"round{r}", "metrics.jsonl"), "finetune")
                  for r in range(config.finetune.rounds)
              ],
              training=_read_lines(at("train", "metrics.jsonl"), "train"),
              prompts=read_json(at("evaluate", "routes.json"), "evaluate")["prompts"],
          )
      )
  importance = lambda name: os.path.join(workdir, "importance", name)
  scored = os.path.exists(importance("fisher.json"))
  return Run(
      read_json(importance("redundancy.json"), "importance"),
      read_json(importance("fisher.json"), "importance") if scored else None,
      cells,
  )


def read_json(path: str, stage: str) -> Any:
  """Contents of a JSON file that `stage` writes; UserError if it is missing or damaged."""
  return _read(path, stage, json.loads)


def _read_lines(path: str, stage: str) -> list[dict]:
  return _read(path, stage, lambda text: [json.loads(line) for line in text.splitlines()])


def _read(path: str, stage: str, parse) -> Any:
  try:
    with open(path, encoding="utf-8") as file:
      return parse(file.read())
  except OSError:
    raise UserError(f"{path} is missing; run the stage {stage!r} first.") from None
  except ValueError:
    raise UserError(f"{path} is damaged; delete its folder and run the stage {stage!r} again.") from None
