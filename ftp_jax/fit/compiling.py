"""Compiles a case for a topology and says what it holds, moves and computes: one record."""

import contextlib
import dataclasses
import os
import re
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from ftp_jax.errors import UserError, brief
from ftp_jax.fit import counts, expected, hlo, programs, topologies

_EXHAUSTED = re.compile(r"RESOURCE_EXHAUSTED|[Rr]an out of memory")
_REMATERIALIZED = "nvoluntary full rematerialization"
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one chip.

  Attributes:
    beside: what lies there without being an argument: the weights, during the warm-up.
    peak: all at once.
    limit: what the chip has.
  """

  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  code: int
  beside: int
  peak: int
  limit: int


def compile_case(case: programs.Case, mesh: Mesh, topology: str) -> dict[str, Any]:
  """The record of a case.

  Returns:
    Plain values: `fits`, `memory` (where it fits, else `needs` and `limit` in bytes), `flops`, `collectives`,
    `expected` (see there; not of a program compiled at `O0`), `largest`, `weight_gradients`,
    `involuntary_rematerializations` and `seconds`.

  Raises:
    UserError: the compiler ran out of something else than the chip's memory.
  """
  chip, begin = topologies.chip(topology), time.perf_counter()
  traced = programs.trace(case, mesh)
  record = {"flops": flops(traced, case.program, mesh), "weight_gradients": gradients(traced, case, mesh)}
  lowered = traced.trace.lower()
  record["seconds"] = {"trace": time.perf_counter() - begin}
  begin = time.perf_counter()
  with captured() as log:
    try:
      compiled = lowered.compile()
    except Exception as error:  # jax reports memory by the text of its error alone
      if not _EXHAUSTED.search(str(error)):
        raise
      if "hbm" not in str(error).lower():
        raise UserError(
            f"The compiler had no room for a part of the program ({brief(error, 300)}); try --attention=full, or "
            "another --context or --batch."
        ) from error
      needs, limit = exhausted(str(error))
      return record | {"fits": False, "needs": needs, "limit": limit or chip.hbm}
  record["seconds"]["compile"] = time.perf_counter() - begin
  held = memory(compiled.memory_analysis(), chip.hbm, traced.beside)
  program = hlo.Program(compiled.as_text())
  return record | {
      "fits": held.peak <= held.limit,
      "memory": dataclasses.asdict(held),
      **({"expected": expected.expected(program, chip)} if jax.config.jax_optimization_level != "O0" else {}),
      "collectives": program.collectives(),
      "unknown_loops": program.unknown_loops,
      "largest": program.largest(8),
      "involuntary_rematerializations": "".join(log).count(_REMATERIALIZED),
  }


def flops(traced: programs.Traced, program: str, mesh: Mesh) -> dict[str, float]:
  """FLOPs of a step on all chips and on each, and as a multiple of what it is compared with."""
  total = traced.flops
  if total is None:
    total = counts.flops(traced.trace.jaxpr, unknown_trips=1 if program == "decode" else None)
  found = {"step": total, "chip": total / mesh.size}
  if traced.forward is not None:
    found["forward"] = counts.flops(traced.forward)
    found["forwards"] = total / traced.passes / found["forward"]
  return found


def gradients(traced: programs.Traced, case: programs.Case, mesh: Mesh) -> list[tuple[int, ...]]:
  """See `counts.weight_gradients`; of the model's own weights: a router of width R reads shapes like those of maps."""
  own = programs.params_of(dataclasses.replace(case, stand_in=0), mesh)
  return counts.weight_gradients(traced.trace.jaxpr, counts.weight_shapes(own))


def memory(stats: Any, limit: int, beside: int = 0) -> Memory:
  """From XLA's analysis of a compiled program."""
  sizes = dict(
      arguments=stats.argument_size_in_bytes, outputs=stats.output_size_in_bytes, aliased=stats.alias_size_in_bytes,
      temporaries=stats.temp_size_in_bytes, code=stats.generated_code_size_in_bytes,
  )
  peak = sum(sizes.values()) - 2 * sizes["aliased"] + beside
  return Memory(**sizes, beside=beside, peak=peak, limit=limit)


def exhausted(message: str) -> tuple[int | None, int | None]:
  """Bytes (needed, available) from a compiler's error; None where it does not say."""
  number = r"([\d.]+) ?([KMGT]?)i?B?"
  used = re.search(rf"[Uu]sed {number} of {number}", message)
  if used is None:
    used = re.search(rf"\({number}\) exceeds available HBM \({number}\)", message)
  if used is None:
    return None, None
  need, need_unit, have, have_unit = used.groups()
  return int(float(need) * _UNITS[need_unit]), int(float(have) * _UNITS[have_unit])


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
  """Keeps what the compiler writes to the process's stderr: afterwards the list holds it."""
  log = []
  with tempfile.TemporaryFile() as file:
    before = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
      yield log
    finally:
      os.dup2(before, 2)
      os.close(before)
      file.seek(0)
      log.append(file.read().decode(errors="replace"))
