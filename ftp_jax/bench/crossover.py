"""From which context on an artifact's prefill is faster than a dense one; the engine reads it from the artifact."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ftp_jax.bench.settings import Settings
from ftp_jax.export import artifact as artifacts


def crossover(measured: Sequence[Sequence[float]]) -> int | None:
  """The shortest context from which on pruning was faster at every longer one too, or None.

  Args:
    measured: (context, speedup) pairs.
  """
  found = None
  for context, speedup in sorted(measured, reverse=True):
    if speedup <= 1:
      break
    found = context
  return found


def write(records: Sequence[dict[str, Any]], settings: Settings, machine: dict[str, Any]) -> int | None:
  """Finds the crossover in the records of a prefill bench and writes it into the artifact."""
  measured = [[r["context"], round(r["speedup"], 4)] for r in records if r["method"] == "ftp"]
  found = crossover(measured)
  described = {
      "context": found, "batch": settings.batch[0], "dtype": settings.dtype, "machine": machine, "measured": measured,
  }
  directory, = settings.artifact
  artifact = dataclasses.replace(artifacts.load(directory), crossover=described)
  artifacts.save(artifact, directory, artifacts.read_config(directory)["layout"])
  return found
