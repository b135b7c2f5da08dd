"""Makes an artifact that needs no trained router: the last blocks skip all tokens, trained maps stand in for them.

  ftp-jax run --config=smollm2_135m_stand_in --workdir=runs/stand_in
  python experiments/late_maps.py --run=runs/stand_in --sparsity=0.3 --out=late_maps
  ftp-jax generate --artifact=late_maps --prompt="The capital of France is"

It is the baseline `late_maps` (docs/baselines.md) on the prompts of --run (passages said twice are among those of
training, where it has any), all that is read of it: the first seconds of `ftp-jax run` make them. Engine, harness,
`ftp-jax bench` and PyTorch run it as any artifact. A killed run goes on where it was, from what it keeps in the folder
`training` of --out.

Wall time: about 10 minutes with --steps=48 --prompts=192, on 2 CPU cores (AMD EPYC) that did other work beside it.
Result: at S = 0.30 these have a KL of 0.034 nats a token on 64 test chats. The cell of main_table.py, which trains the
same way, has 0.031 with the steps and prompts that are the defaults here.
"""

import pathlib

import numpy as np
from absl import flags
from absl import logging as absl_logging

from ftp_jax import launch
from ftp_jax.data.prompts import Prompts, take
from ftp_jax.errors import UserError
from ftp_jax.evaluation import baselines
from ftp_jax.export import artifact as artifacts
from ftp_jax.launch import run_config
from ftp_jax.models.sources import load_model
from ftp_jax.pipeline.checks import digest
from ftp_jax.stages import SETTINGS, check_stage, load_arrays, write_json

_RUN = flags.DEFINE_string("run", None, "Run directory of `ftp-jax run`.", required=True)
_OUT = flags.DEFINE_string("out", None, "Directory of the artifact.", required=True)
_SPARSITY = flags.DEFINE_float("sparsity", 0.3, "S, the share of the blocks that skip.")
_STEPS = flags.DEFINE_integer("steps", 64, "Training steps.", lower_bound=1)
_PROMPTS = flags.DEFINE_integer("prompts", 640, "Training prompts, the first of the run's.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 8, "Prompts of a step.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Order of the prompts.", lower_bound=0)


def make(run: pathlib.Path, out: pathlib.Path) -> dict:
  """Trains the maps and writes the artifact; its figures, of the run's test prompts.

  Raises:
    UserError: the run has no data, S is out of reach, `out` cannot be written or was begun with other flags.
  """
  if not 0 < _SPARSITY.value < 1:
    raise UserError(f"--sparsity={_SPARSITY.value} must lie between 0 and 1.")
  config = run_config(run)
  for split in ("train", "validation", "test"):
    if not (run / "data" / f"{split}.npz").exists():
      raise UserError(f"{run} has no prompts yet; begin `ftp-jax run` with --workdir={run}, which makes them first.")
  training = out / "training"
  try:
    training.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--out={out} cannot be made or written ({error.strerror}); name another directory.") from None
  model = load_model(config["model"]["source"], config["model"]["dtype"])
  train, validation, test = (
      Prompts(**load_arrays(run / "data" / f"{split}.npz")) for split in ("train", "validation", "test")
  )
  settings = {
      "sparsity": _SPARSITY.value, "steps": _STEPS.value, "prompts": _PROMPTS.value, "batch": _BATCH.value,
      "seed": _SEED.value, "model": config["model"]["source"],
      "data": [digest(str(run / "data" / f"{split}.npz")) for split in ("train", "validation")],
  }
  check_stage(training, settings, advice="name another --out, or delete that folder")
  write_json(training / SETTINGS, settings)
  calibration = baselines.Calibration(
      take(train, np.arange(min(_PROMPTS.value, len(train.tokens)))), validation, batch=_BATCH.value,
      steps=_STEPS.value, directory=training,
  )
  baseline = baselines.build("late_maps", model, _SPARSITY.value, calibration, _SEED.value)
  record = baselines.Yardstick(model, test, _BATCH.value).record(baseline)
  figures = {name: value for name, value in record.items() if value is not None}
  artifacts.withdraw(out)
  artifacts.save(baselines.to_artifact(baseline, config["model"]["source"], figures), out)
  return figures


def main() -> None:
  absl_logging.set_verbosity(absl_logging.WARNING)  # below it orbax tells of every step of a save
  figures = make(pathlib.Path(_RUN.value), pathlib.Path(_OUT.value))
  found = f"KL {figures['kl']:.4f}, {figures['achieved']:.1%} skipped, on {figures['prompts']} test prompts"
  print(f"written {_OUT.value}: {found}")


if __name__ == "__main__":
  launch.script(main)
