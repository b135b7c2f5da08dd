"""`ftp-jax bench KIND`: reads flags, measures, prints a table and writes JSON and plot."""

import argparse
import contextlib
from typing import Any

import jax

from ftp_jax.bench import compiling, crossover, decode, overhead, plot, prefill, records
from ftp_jax.bench.cases import pruned
from ftp_jax.bench.settings import Settings, read
from ftp_jax.bench.torch_dense import TorchDense, TorchMissing
from ftp_jax.errors import short_of_memory
from ftp_jax.export.artifact import base_model
from ftp_jax.export.artifact import load as load_artifact
from ftp_jax.machine import describe_machine
from ftp_jax.models.sources import Model, load_model

_BENCHES = {
    "prefill": prefill.bench,
    "decode": decode.bench,
    "overhead": overhead.bench,
    "compile": compiling.bench,
    "crossover": prefill.bench,
}


def run(arguments: argparse.Namespace) -> None:
  """Runs the command.

  Raises:
    UserError: a flag is wrong, the model or artifact unusable, or memory too small.
  """
  settings = read(arguments)
  artifacts = [load_artifact(directory) for directory in settings.artifact]
  with short_of_memory("set --dtype=bfloat16 or name a smaller --model"):
    model = load_model(settings.model or base_model(next(iter(settings.artifact), None)), settings.dtype)
  settings.check_positions(model.config.max_positions)
  cases = pruned(model, settings, artifacts)
  machine = describe_machine()
  with short_of_memory("lower --batch or --context"), _torch(model, settings) as torch:
    if torch:
      machine |= {name: torch.info[name] for name in ("torch", "torch_threads")}
    found = _BENCHES[settings.kind](model, cases, settings, torch)
  if settings.text:
    found = [record | {"text": settings.text} for record in found]
  print(records.format_table(found))
  _write(machine, found, settings)
  if settings.kind == "crossover":
    _report_crossover(crossover.write(found, settings, machine), settings)


def _torch(model: Model, settings: Settings) -> contextlib.AbstractContextManager[TorchDense | None]:
  if settings.torch:
    try:
      return TorchDense(model.directory, settings.dtype, gpu=jax.default_backend() == "gpu")
    except TorchMissing as error:
      print(f"No torch_dense rows: {error} (pip install torch).")
  return contextlib.nullcontext()


def _report_crossover(context: int | None, settings: Settings) -> None:
  if context is None:
    print(f"Never faster than dense at the longest context measured; {settings.artifact[0]} says so now.")
  else:
    print(f"Faster than dense from {context} tokens on; {settings.artifact[0]} says so now.")


def _write(machine: dict[str, Any], found: list[dict[str, Any]], settings: Settings) -> None:
  if settings.json:
    records.write_json(machine, found, settings.json)
    print(f"written {settings.json}")
  if settings.plot:
    plot.write(found, settings.plot)
    print(f"written {settings.plot}")
