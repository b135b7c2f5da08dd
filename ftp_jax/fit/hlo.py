"""What the compiled program of one chip does, read from its text: collectives, largest arrays, trips of loops.

The text is XLA's: computations in braces, one instruction a line. Loops count how often they run where their
condition compares a counter with a constant; `unknown_loops` counts those where it does not. Of a conditional all
branches count, which for a prefill is more than any chip does.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2} | {
    f"{kind}{bits}": bits // 8 for kind in "suf" for bits in (8, 16, 32, 64)
}
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*?)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
# Instructions that name memory of another one, or are no memory at all.
_NAMES = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "iota", "while", "conditional", "after-all"}


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line. operands: names; text: all after the operation's bracket, attributes included."""

  name: str
  shape: str
  operation: str
  text: str
  root: bool

  @property
  def operands(self) -> list[str]:
    return re.findall(r"%([\w.-]+)", self.text.split(")")[0])

  @property
  def called(self) -> Iterator[tuple[str, str]]:
    """(role, computation) of every computation it names."""
    yield from _CALLED.findall(self.text)
    for names in _BRANCHES.findall(self.text):
      yield from (("branch", name) for name in re.findall(r"[\w.-]+", names))

  @property
  def origin(self) -> str:
    found = re.search(r'op_name="([^"]*)"', self.text)
    return found.group(1) if found else ""


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
  """(dtype, sizes) of the arrays of a shape, which may be a tuple."""
  found = _ARRAY.findall(shape)
  return [(kind, tuple(map(int, filter(None, sizes.split(","))))) for kind, sizes in found if kind in _BYTES]


def size(shape: str) -> int:
  """Bytes of all arrays of a shape, without the padding of tiles."""
  return int(sum(_BYTES[kind] * math.prod(sizes) for kind, sizes in arrays(shape)))


class Program:
  """A parsed program; see the module."""

  def __init__(self, text: str):
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.unknown_loops = 0
    self.trips: dict[tuple[str, str], int] = {}  # of the loop of that name in a computation
    current, entry = None, None
    for line in text.splitlines():
      if line.endswith("{") and " = " not in line.split("(")[0]:
        name = line.split("(")[0].split()[-1].lstrip("%")
        current = self.computations.setdefault(name, {})
        entry = name if line.startswith("ENTRY") else entry
      elif current is not None and (found := _INSTRUCTION.match(line)):
        root, name, shape, operation, rest = found.groups()
        current[name] = Instruction(name, shape, operation, rest, bool(root))
    assert entry, "the text has no entry computation"
    self.entry = entry
    self.times = self._times()

  def _times(self) -> dict[str, float]:
    """How often each computation runs."""
    callers = collections.defaultdict(list)  # computation -> (caller, trips)
    for name, body in self.computations.items():
      for instruction in body.values():
        trips = 1
        if instruction.operation == "while":
          trips = self.trips[name, instruction.name] = self._trips(name, instruction)
        for role, called in instruction.called:
          callers[called].append((name, trips if role == "body" else 1))

    @functools.cache
    def times(name: str) -> float:
      return 1 if name == self.entry else sum(trips * times(caller) for caller, trips in callers[name])

    return {name: times(name) for name in self.computations}

  def _trips(self, computation: str, loop: Instruction) -> int:
    """Trips of a while loop: (limit - start) / step of the counter its condition compares with a constant."""
    if known := re.search(r'known_trip_count"?\s*[:=]\s*\{"?n"?\s*[:=]\s*"?(\d+)', loop.text):
      return int(known.group(1))
    roles = dict(loop.called)
    condition, body = self.computations[roles["condition"]], self.computations[roles["body"]]
    root = next(i for i in condition.values() if i.root)
    operands = [condition.get(name) for name in root.operands]
    index = [_index(i) for i in operands if i and i.operation == "get-tuple-element"]
    limit = [_constant(i) for i in operands if i and i.operation == "constant"]
    start = step = None
    if root.operation == "compare" and "direction=LT" in root.text and len(index) == len(limit) == 1:
      initial = self.computations[computation][loop.operands[0]]
      start = self._value(computation, initial, index[0])
      tuple_ = next(i for i in body.values() if i.root)
      if tuple_.operation == "tuple":
        step = self._step(body, body.get(tuple_.operands[index[0]]))
    if start is None or not step:
      self.unknown_loops += 1
      return 1
    return max(-(-(limit[0] - start) // step), 0)

  def _value(self, computation: str, tuple_: Instruction, index: int) -> int | None:
    """The constant at a place of a tuple."""
    if tuple_.operation != "tuple":
      return None
    body = self.computations[computation]
    found = body.get(tuple_.operands[index])
    while found is not None and found.operation in ("copy", "bitcast"):
      found = body.get(found.operands[0])
    return _constant(found) if found is not None and found.operation == "constant" else None

  def _step(self, body: dict[str, Instruction], found: Instruction | None) -> int | None:
    """What a loop's body adds to its counter, looking into fusions and through several additions."""
    total = 0
    while found is not None and found.operation != "get-tuple-element":
      if found.operation == "fusion":
        inner = self.computations[dict(found.called)["calls"]]
        added = [_constant(i) for i in inner.values() if i.operation == "constant"]
        root = next(i for i in inner.values() if i.root)
        if root.operation != "add" or len(added) != 1:
          return None
        total, found = total + added[0], body.get(found.operands[0])
      elif found.operation == "add":
        operands = [body[name] for name in found.operands]
        added = [_constant(i) for i in operands if i.operation == "constant"]
        if len(added) != 1:
          return None
        total, found = total + added[0], next(i for i in operands if i.operation != "constant")
      elif found.operation in ("copy", "bitcast"):
        found = body.get(found.operands[0])
      else:
        return None
    return total if found is not None else None

  def collectives(self) -> dict[str, dict[str, float]]:
    """By kind: how often, and the bytes that the chip receives."""
    seen: dict[tuple[str, str], tuple[float, float]] = {}
    for name, body in self.computations.items():
      for instruction in body.values():
        kind = instruction.operation.removesuffix("-start")
        if kind not in COLLECTIVES:
          continue
        # One collective may be spread over several fusions, which overlap it with other work: one channel.
        channel = re.search(r"channel_id=(\d+)", instruction.text)
        key = (kind, channel.group(1) if channel else instruction.name)
        found = (self.times[name], received(instruction, kind))
        seen[key] = max(seen.get(key, (0.0, 0.0)), found)
    total = {}
    for (kind, _), (times, moved) in seen.items():
      so_far = total.setdefault(kind, {"count": 0.0, "bytes": 0.0})
      so_far["count"] += times
      so_far["bytes"] += times * moved
    return total

  def largest(self, count: int) -> list[dict]:
    """The largest arrays that instructions outside of fusions make, one of each shape: shape, bytes, origin."""
    fused = {c for body in self.computations.values() for i in body.values() if i.operation == "fusion"
             for _, c in i.called}
    found = {}
    for name, body in self.computations.items():
      if name in fused:
        continue
      for instruction in body.values():
        if instruction.operation in _NAMES or instruction.operation.endswith("-done"):
          continue
        for kind, sizes in arrays(instruction.shape):
          shape = f"{kind}[{','.join(map(str, sizes))}]"
          found.setdefault(shape, {"shape": shape, "bytes": size(shape), "origin": instruction.origin})
    return sorted(found.values(), key=lambda array: -array["bytes"])[:count]


def _index(instruction: Instruction) -> int:
  return int(re.search(r"index=(\d+)", instruction.text).group(1))


def _constant(instruction: Instruction) -> int | None:
  found = re.match(r"(-?\d+)\)", instruction.text)
  return int(found.group(1)) if found else None


def received(instruction: Instruction, kind: str) -> float:
  """Bytes a chip receives in one collective, by the ring algorithms: the least that the links must carry."""
  shape = instruction.shape
  if instruction.operation.endswith("-start"):  # a tuple of what goes in, what comes out, and handles
    parts = arrays(shape)
    kind_, sizes = max(parts, key=lambda part: _BYTES[part[0]] * math.prod(part[1]))
    moved = _BYTES[kind_] * math.prod(sizes)
  else:
    moved = size(shape)
  if kind == "collective-permute":
    return moved
  group = group_size(instruction.text)
  share = (group - 1) / group
  if kind == "reduce-scatter" and not instruction.operation.endswith("-start"):
    moved *= group  # the shape is that of the part that is left
  return {"all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "all-reduce": 2}[kind] * share * moved


def group_size(text: str) -> int:
  """Chips that take part in one collective."""
  if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", text):
    sizes = {name.strip("' "): int(n) for name, n in (pair.split("=") for pair in mesh.group(1).split(","))}
    return math.prod(sizes[name.strip("' ")] for name in mesh.group(2).split(","))
  if tiles := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
    return int(tiles.group(2))
  if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
    return len(groups.group(1).split(","))
  return 1
