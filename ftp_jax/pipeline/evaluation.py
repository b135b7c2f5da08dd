"""What is measured of a run: the stages `evaluate`, which writes the artifacts with their figures, and `report`."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import tqdm

from ftp_jax import distributed
from ftp_jax.errors import UserError
from ftp_jax.evaluation import methods
from ftp_jax.evaluation.judge import Frozen
from ftp_jax.export import artifact as artifact_lib
from ftp_jax.machine import describe_machine
from ftp_jax.models.huggingface import fingerprint
from ftp_jax.pipeline.directory import RunDirectory
from ftp_jax.routing import routers, stand_in
from ftp_jax.stages import read_json, write_json

_MAPPED_PROMPTS = 4  # prompts whose kept tokens the report shows


def evaluate(run: RunDirectory) -> None:
  """Writes figures of all methods on the test prompts, and an artifact for every cell."""
  run.drop_judges()
  c = run.config

  def bench(model: Frozen) -> methods.Bench:
    judge = run.judge("test", c.evaluation.batch, model)
    return methods.Bench(judge, run.prompts("windows"), c.evaluation.batch)

  records = []
  for asked in tqdm.tqdm((0.0, *c.sparsities), desc="evaluate dense, truncation, static + uniform"):

    def shared(directory):
      plain = bench(run.dense)  # what other methods skip has no map that stands in for it
      rows = [plain.truncation(asked), plain.static_uniform(asked)] if asked else [plain.dense()]
      write_json(run.workdir / "evaluate" / "machine.json", describe_machine())
      write_json(directory / "records.json", rows)

    here = run.workdir / "evaluate" / f"S{asked:.2f}"
    run.run_stage(here, "evaluate", shared, sparsity=asked)
    records += read_json(here / "records.json")
  for sparsity, seed in tqdm.tqdm(run.cells, desc="evaluate cells"):
    cell = run.cell(sparsity, seed)

    def work(directory):
      found, tuned = run.schedule(cell / "search"), run.schedule(cell / "finetune")
      (first, of_first), (final, model) = map(run.load_trained, (cell / "train", cell / "finetune"))
      rows = [
          bench(run.dense).random(sparsity, seed),
          bench(run.frozen).routed("static_ga", sparsity, seed, routers.STATIC, found),
          bench(of_first).routed("dynamic_ga", sparsity, seed, first, found),
      ]
      if c.finetune.rounds:
        rows.append(bench(model).routed("dynamic_finetuned", sparsity, seed, final, tuned))
      for row in rows[1:]:
        row["schedule"] = c.search.schedule
      write_json(run.workdir / "evaluate" / "machine.json", describe_machine())
      write_json(directory / "records.json", rows)
      write_json(directory / "routes.json", route_maps(run, final, model, tuned))
      maps = model.params["blocks"].get(stand_in.NAME)
      write_artifact(run, cell / "artifact", final, maps, tuned, rows[-1])

    run.run_stage(cell / "evaluate", "evaluate", work, sparsity=sparsity, seed=seed)
    records += read_json(cell / "evaluate" / "records.json")
  write_json(run.workdir / "evaluate" / "records.json", records)


def report(run: RunDirectory) -> None:
  """Writes tables and plots (ftp_jax.report), and prints the table."""
  from ftp_jax.report import write_report  # matplotlib loads slowly, and only this stage needs it

  distributed.on_first(lambda: print(write_report(str(run.workdir), run.config)))


def route_maps(run: RunDirectory, router: routers.Router, model: Frozen, schedule: np.ndarray) -> dict[str, Any]:
  """Kept tokens of the first few test prompts."""
  judge = run.judge("test", run.config.evaluation.batch, model)
  keep, prompts = judge.quality(router, schedule).keep_LxNxT, []
  for n in range(min(_MAPPED_PROMPTS, len(judge.prompts.tokens))):
    m = int(judge.prompts.context[n])
    tokens = [run.model.tokenizer.decode([t]) for t in judge.prompts.tokens[n, :m]]
    prompts.append({"tokens": tokens, "context": m, "keep": keep[:, n, :m].astype(int).tolist()})
  return {"prompts": prompts}


def write_artifact(
    run: RunDirectory, directory, router: routers.Router, maps: Any, schedule: np.ndarray, record: dict[str, Any]
) -> None:
  """Writes the artifact of a cell; `record` holds the figures that it is published with."""
  made = artifact_lib.Artifact(
      base_model=run.config.model.source,
      fingerprint=fingerprint(run.model.directory),
      family=run.model.config.family,
      schedule=tuple(float(str(s)) for s in schedule),
      routing=run.routing,
      router=run.router_config,
      params=jax.device_get(router.params),
      figures=record,
      stand_in=jax.device_get(maps),
  )

  def write():
    before = _loaded(directory)
    same = before is not None and before.digest == made.digest
    if not same:  # an equal one stays loadable, and keeps its crossover, if this process ends here
      artifact_lib.withdraw(directory)
    artifact_lib.save(dataclasses.replace(made, crossover=before.crossover) if same else made, directory)

  distributed.on_first(write)


def _loaded(artifact: pathlib.Path) -> artifact_lib.Artifact | None:
  """The artifact; None where there is none that can be read."""
  try:
    return artifact_lib.load(artifact)
  except UserError:
    return None
