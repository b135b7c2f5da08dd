"""The stages of a run, in their order: what each computes is in `preparation`, `cells` and `evaluation`."""

import json
import pathlib
from typing import Any

from ftp_jax import distributed, sharding
from ftp_jax.errors import UserError
from ftp_jax.pipeline import cells, checks, evaluation, preparation
from ftp_jax.pipeline.directory import STAGES, RunDirectory
from ftp_jax.stages import alone_in, write_json

_WORK = {
    "data": preparation.data,
    "importance": preparation.importance,
    "search": cells.search,
    "train": cells.train,
    "finetune": cells.finetune,
    "evaluate": evaluation.evaluate,
    "report": evaluation.report,
}


def run(config: Any, workdir: str, stages: tuple[str, ...] = STAGES) -> None:
  """Runs the named stages of a config in `workdir`; finished ones are skipped.

  Raises:
    UserError: anything the user can mend, in one sentence.
  """
  here = RunDirectory(config, pathlib.Path(workdir))
  if stages == ("report",):
    if not here.workdir.is_dir():
      raise UserError(f"{workdir} does not exist; give the --workdir of an evaluated run.")
    distributed.on_first(here.check)
    evaluation.report(here)
    return
  # All processes meet where the devices are found.
  checks.check_alike(config, stages)
  checks.check_batches(config, sharding.batch_parts(here.mesh))
  distributed.on_first(here.check)
  distributed.on_first(lambda: here.check_files(stages))
  with alone_in(here.workdir):
    write_json(here.workdir / "config.json", json.loads(config.to_json()))
    distributed.barrier()
    checks.check_shared(here.workdir / "config.json")
    here.check_memory(stages)
    for stage in STAGES:
      if stage in stages:
        _WORK[stage](here)
