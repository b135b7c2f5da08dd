"""How long a compiled program takes by what the TPU compiler expects of each instruction, in cycles of the chip.

The compiler writes an estimate beside most instructions. Loops count as often as they run, of a conditional the dearest
branch. What has none is told apart and counted

  splash      by the products of its tiles at the peak of the matrix units
  copies      by twice their bytes at the rate of HBM, where the estimate is less: it takes none for a transposition
  the others  by twice the bytes of the result at that rate, or of what is written into a larger array

Collectives are left out. Nothing of this is a measurement: instructions overlap, some arrays never reach HBM, gathers
take longer than their bytes, and a chip may do otherwise. Forms of one program can be compared by it, and what is dear
in it can be found.
"""

import collections
import functools
import re
from typing import Any

from ftp_jax.fit import counts, hlo
from ftp_jax.fit.topologies import Chip

_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
# What names memory, moves between memories beside other work, or is a scalar's.
_FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "iota", "after-all", "copy-start", "copy-done",
    "slice-start", "slice-done", "async-start", "async-done", *hlo.COLLECTIVES,
    *(f"{name}-{end}" for name in hlo.COLLECTIVES for end in ("start", "done")),
}
_ABSURD = 1e12  # as the compiler expects of some sorts that it does not optimise
_FREE_TOO = re.compile(r'^async-collective|custom_call_target="(AllocateBuffer|ConcatBitcast|LayoutConstraint)"')


def expected(program: hlo.Program, chip: Chip) -> dict[str, Any]:
  """{"cycles", "seconds", "without_estimate", "dearest"} of one run on one chip.

  `without_estimate` is the share of the cycles that are not the compiler's, `dearest` the eight kinds of instructions
  that take most, each with its share and how often it runs.
  """
  found = _of_computation(program, chip)(program.entry)
  total = sum(cycles for cycles, _, _ in found.values())
  dearest = sorted(found.items(), key=lambda item: -item[1][0])[:8]
  return {
      "cycles": total,
      "seconds": total / chip.clock,
      "without_estimate": sum(other for _, other, _ in found.values()) / max(total, 1),
      "dearest": [
          {"origin": origin, "share": cycles / max(total, 1), "count": count} for origin, (cycles, _, count) in dearest
      ],
  }


def _of_computation(program: hlo.Program, chip: Chip):
  """A function of a computation's name: by origin (cycles, those without an estimate, how often)."""

  @functools.cache
  def of(name: str) -> dict[str, tuple[float, float, float]]:
    total: dict[str, tuple[float, float, float]] = collections.defaultdict(lambda: (0.0, 0.0, 0.0))

    def add(found, times=1):
      for origin, figures in found.items():
        total[origin] = tuple(a + times * b for a, b in zip(total[origin], figures))

    body = program.computations[name]
    for instruction in body.values():
      called = list(instruction.called)
      if instruction.operation == "while":
        trips = program.trips[name, instruction.name]
        for role, inner in called:
          add(of(inner), trips if role == "body" else trips + 1)
      elif instruction.operation == "conditional":
        add(max((of(inner) for _, inner in called), key=lambda found: sum(figures[0] for figures in found.values())))
      elif instruction.operation == "call":
        add(of(dict(called)["to_apply"]))
      elif instruction.operation not in _FREE and not _FREE_TOO.search(f"{instruction.name} {instruction.text}"):
        estimate, other = _cycles(instruction, body, chip)
        cycles = max(estimate, other)
        add({_label(instruction): (cycles, cycles if other > estimate else 0.0, 1.0)})
    return dict(total)

  return of


def _cycles(instruction: hlo.Instruction, body: dict[str, hlo.Instruction], chip: Chip) -> tuple[float, float]:
  """The compiler's estimate, 0 where there is none, and what is counted where it is missing or too small."""
  found = _ESTIMATE.search(instruction.text)
  estimate = float(found.group(1)) if found else 0.0
  estimate = estimate if estimate < _ABSURD else 0.0
  if estimate and instruction.operation != "copy":
    return estimate, 0.0
  name = f"{instruction.name} {instruction.origin}"
  if instruction.operation == "custom-call" and "splash" in name:
    shapes = [sizes for operand in instruction.operands if operand in body for _, sizes in
              hlo.arrays(body[operand].shape) if len(sizes) > 2]
    return 0.0, counts.splash_flops(name, max(shapes, key=lambda sizes: (len(sizes), sizes))) / chip.peak * chip.clock
  written = instruction
  if instruction.operation == "dynamic-update-slice":
    written = body.get(instruction.operands[1], instruction)
  return estimate, 2.0 * hlo.size(written.shape) / chip.hbm_rate * chip.clock


def _label(instruction: hlo.Instruction) -> str:
  """Where it comes from, without the loops and branches around it, or its name; and its shape."""
  parts = re.sub(r"\w*\(|\)", "", re.sub(r"^jit\(\w+\)/", "", instruction.origin)).split("/")
  named = [part for part in parts if part and part not in ("while", "body", "closed_call", "cond", "jit")]
  named = [part for part in named if not re.fullmatch(r"branch_\d+_fun", part)][-3:]
  shape = instruction.shape.split("{")[0].lstrip("(")
  kind = "" if instruction.operation == "fusion" else instruction.operation
  return f"{kind} {'/'.join(named) or instruction.name.rstrip('.0123456789')} {shape}".strip()
