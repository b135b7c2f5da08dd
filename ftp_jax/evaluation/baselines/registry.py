"""The methods by name: calibrated and built, written to a directory, read from one.

A baseline is two files, `baseline.json` (what it is, and which model it belongs to) and `weights.safetensors` (what
was trained, often nothing), and is built from these without calibration.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from ftp_jax.errors import UserError
from ftp_jax.evaluation.baselines import blockpruner, fastv, late_maps, mod, shortgpt, skipgpt
from ftp_jax.evaluation.baselines.calibration import Calibration
from ftp_jax.evaluation.baselines.kinds import Baseline, Routed, Smaller, Subblocks, Truncation
from ftp_jax.evaluation.judge import Frozen
from ftp_jax.export.artifact import load_weights, save_weights
from ftp_jax.files import replacing
from ftp_jax.models.huggingface import fingerprint
from ftp_jax.models.sources import DTYPES, Model
from ftp_jax.routing.config import RoutingConfig
from ftp_jax.search import schedule as schedules

FORMAT_VERSION = 1
CONFIG_FILE, WEIGHTS_FILE = "baseline.json", "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Method:
  """kind: how it runs; calibrate: (Frozen, S, Calibration, seed) -> (facts, arrays); calibrated: reads the prompts."""

  kind: type[Baseline]
  calibrate: Callable[[Frozen, float, Calibration | None, int], tuple[dict[str, Any], Any]]
  calibrated: bool = False


def _uniform(router: str):
  """The same sparsity in every block, evicting: the paper's reading."""

  def facts(model: Frozen, sparsity: float, calibration, seed):
    schedule = schedules.uniform(model.config.num_blocks, sparsity).tolist()
    return {"router": router, "routing": dataclasses.asdict(RoutingConfig("evict")), "schedule": schedule}, {}

  return facts


def _late(model: Frozen, sparsity: float, calibration, seed):
  schedule = late_maps.schedule(model.config.num_blocks, sparsity).tolist()
  return {"router": "static", "routing": dataclasses.asdict(late_maps.ROUTING), "schedule": schedule}, {}


METHODS = {
    "dense": Method(Smaller, lambda *_: ({"removed": []}, {})),
    "truncation": Method(Truncation, lambda *_: ({}, {})),
    "random": Method(Routed, _uniform("random")),
    "static": Method(Routed, _uniform("static")),
    "late": Method(Routed, _late),
    "late_maps": Method(Routed, late_maps.calibrate, calibrated=True),
    "fastv": Method(Routed, fastv.calibrate, calibrated=True),
    "shortgpt": Method(Smaller, shortgpt.calibrate, calibrated=True),
    "blockpruner": Method(Subblocks, blockpruner.calibrate, calibrated=True),
    "mod": Method(Routed, mod.calibrate, calibrated=True),
    "skipgpt": Method(Subblocks, skipgpt.calibrate, calibrated=True),
}


def build(
    name: str, model: Model, sparsity: float, calibration: Calibration | None = None, seed: int = 0, **options
) -> Baseline:
  """Makes a baseline.

  Args:
    name: one of METHODS; docs/baselines.md describes them.
    sparsity: S in [0, 1), share of (token, block) pairs to be skipped.
    calibration: for methods that look at prompts.
    seed: of what is random.
    options: of the engine: dtype, attention, max_buckets, buckets.

  Raises:
    UserError: the name is unknown, the sparsity out of reach, or calibration prompts are missing.
  """
  method = _method(name)
  if not 0 <= sparsity < 1 or (name == "dense" and sparsity):
    raise UserError(f"sparsity={sparsity} cannot be asked of {name!r}; choose one in [0, 1), and 0 for dense.")
  if method.calibrated and calibration is None:
    raise UserError(f"The baseline {name!r} is calibrated; pass a Calibration with prompts.")
  frozen = Frozen(model.config, model.params, DTYPES[options.get("dtype") or model.dtype])
  facts, arrays = method.calibrate(frozen, sparsity, calibration, seed)
  return method.kind(name, sparsity, seed, model, facts, jax.device_get(arrays), options)


def save(baseline: Baseline, directory: str | os.PathLike) -> None:
  """Writes both files; the description last, so that a half-written baseline does not load."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  save_weights(baseline.arrays, directory / WEIGHTS_FILE)
  described = {
      "format_version": FORMAT_VERSION,
      "name": baseline.name,
      "sparsity": baseline.sparsity,
      "seed": baseline.seed,
      "fingerprint": fingerprint(baseline.model.directory),
      "facts": baseline.facts,
  }
  with replacing(directory / CONFIG_FILE) as file:
    file.write((json.dumps(described, indent=1) + "\n").encode())


def load(directory: str | os.PathLike, model: Model, **options) -> Baseline:
  """Reads a baseline of this model; options are those of the engine.

  Raises:
    UserError: a file is missing or damaged, or the baseline belongs to another model.
  """
  path = pathlib.Path(directory) / CONFIG_FILE
  try:
    described = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error}); point at a directory that `baselines.save` wrote.") from None
  version = described.get("format_version") if isinstance(described, dict) else None
  if version != FORMAT_VERSION:
    raise UserError(f"{path} has format {version!r}, but {FORMAT_VERSION} is read here; build the baseline again.")
  arrays = load_weights(path.with_name(WEIGHTS_FILE))
  try:
    name, made_for = described["name"], described["fingerprint"]
    found = fingerprint(model.directory)
    if made_for != found:
      raise UserError(
          f"{directory} was made for a model with fingerprint {made_for}, but this one has {found}; load the base "
          "model it belongs to."
      )
    own = described["sparsity"], described["seed"], model, described["facts"]
    return _method(name).kind(name, *own, arrays, options)
  except KeyError as error:
    raise UserError(f"{path} is incomplete ({error}); build the baseline again.") from None


def baseline_at(
    directory: pathlib.Path, name: str, model: Model, sparsity: float, calibration: Calibration | None, seed: int = 0,
    **options,
) -> Baseline:
  """The baseline saved in `directory`, or else built and saved there; options are those of the engine.

  Whatever it was made with is what it stays: give every setting its own directory.
  """
  if not (directory / CONFIG_FILE).exists():
    save(build(name, model, sparsity, calibration, seed, **options), directory)
  return load(directory, model, **options)


def _method(name: str) -> Method:
  if name not in METHODS:
    raise UserError(f"The baseline {name!r} is unknown; choose one of {', '.join(METHODS)}.")
  return METHODS[name]
