"""One cell of a table, (method, S, seed), to a record; what is there already is not computed again."""

import pathlib
from typing import Any

from ftp_jax.data.prompts import Prompts
from ftp_jax.evaluation.baselines.calibration import Calibration
from ftp_jax.evaluation.baselines.kinds import Baseline
from ftp_jax.evaluation.baselines.measure import Yardstick
from ftp_jax.evaluation.baselines.registry import CONFIG_FILE, build, load, save
from ftp_jax.models.sources import Model


def baseline_at(
    directory: pathlib.Path, name: str, model: Model, sparsity: float, calibration: Calibration | None, seed: int = 0,
    **options,
) -> Baseline:  # fmt: skip
  """The baseline saved in `directory`, or else built and saved there; options are those of the engine.

  Whatever it was made with is what it stays: give every setting its own directory.
  """
  if not (directory / CONFIG_FILE).exists():
    save(build(name, model, sparsity, calibration, seed, **options), directory)
  return load(directory, model, **options)


def evaluate(
    directory: pathlib.Path, name: str, yardstick: Yardstick, sparsity: float, calibration: Calibration | None,
    windows: Prompts | None, seed: int = 0, **options,
) -> dict[str, Any]:  # fmt: skip
  """`Yardstick.record` of `baseline_at`."""
  baseline = baseline_at(directory, name, yardstick.model, sparsity, calibration, seed, **options)
  return yardstick.record(baseline, windows)
