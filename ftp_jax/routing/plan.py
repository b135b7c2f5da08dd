"""The plan of a bucketed execution: which static number of token slots each block computes.

Routes never depend on the plan: how many tokens of a row a block keeps follows from the schedule and
the row's own context (`selection.capacity`). A bucket is the room that the compiled program reserves,
at least what the longest context it takes can need; each phase of a program has one block body for each distinct one.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ftp_jax import hardware
from ftp_jax.errors import UserError
from ftp_jax.routing.config import RoutingConfig
from ftp_jax.routing.selection import capacity

MAX_BUCKETS = 8  # fine-tuned schedules ask something else of nearly every block; see docs/performance.md
_TILE = 16  # rows of bf16 that a TPU keeps together; other numbers of slots it pads and cuts


@dataclasses.dataclass(frozen=True)
class Plan:
  """Static shapes of one compiled program; hashable.

  Attributes:
    num_positions: T, slots of the padded context.
    bodies: distinct (slots, routed) pairs; a block of which nothing is asked has T slots and is not routed.
    body_of: for each block the index of its body.
    evict_from: the first block whose cache has the block's own slots; those before have T, and so have all where it is
      the number of blocks.
  """

  num_positions: int
  bodies: tuple[tuple[int, bool], ...]
  body_of: tuple[int, ...]
  evict_from: int

  @property
  def routed(self) -> tuple[bool, ...]:
    """Whether anything is asked of each block, (L)."""
    return tuple(self.bodies[i][1] for i in self.body_of)

  @property
  def slots(self) -> tuple[int, ...]:
    """Token slots each block computes, (L)."""
    return tuple(self.bodies[i][0] for i in self.body_of)

  @property
  def cache_slots(self) -> tuple[int, ...]:
    """Key and value slots of each block's cache, (L)."""
    return (self.num_positions,) * self.evict_from + self.slots[self.evict_from :]

  @property
  def offsets(self) -> tuple[int, ...]:
    """Where each block's slots begin in the one cache buffer, (L)."""
    return tuple(itertools.accumulate((0, *self.cache_slots[:-1])))

  @property
  def tiles_fit(self) -> bool:
    """Tiles of T slots fit into the cache at every block's offset but the last one's, whose tile has its own size."""
    return all(offset + self.num_positions <= sum(self.cache_slots) for offset in self.offsets[:-1])

  def phases(self, routing: RoutingConfig, alike: Sequence[Any] | None = None) -> list[tuple[int, int]]:
    """Those of `routing`, with the dense blocks before and after all routed ones in phases of their own.

    A phase of one body branches nowhere; for a single block, or the last one, which stands apart anyway, that is not
    worth one more body to compile.

    Args:
      alike: something of each block, (L). Where it is given, all blocks of a phase are alike in it and in their body,
        so that none branches; or in their body alone, or neither, where that takes too many phases (`changes`). The
        last block stands apart.
    """
    cuts = (changes(list(zip(self.body_of, alike))[:-1]) or changes(self.body_of[:-1])) if alike else []
    if cuts:
      return routing.phases(len(self.body_of), more=cuts)
    routed, end = [block for block, routed in enumerate(self.routed) if routed], len(self.body_of) - 1
    cuts = (routed[0] if routed[0] > 1 else 0, routed[-1] + 1 if routed[-1] + 2 < end else 0) if routed else ()
    return routing.phases(len(self.body_of), more=cuts)


def changes(kinds: Sequence[Any]) -> list[int]:
  """The blocks of another kind than the one before; none where they are as many as MAX_BUCKETS or more.

  Every phase is a body to compile, and a compiler that sees blocks one by one may hold copies of all their weights.
  """
  found = [block for block in range(1, len(kinds)) if kinds[block] != kinds[block - 1]]
  return found if len(found) < MAX_BUCKETS else []


def make_plan(
    schedule_L: Sequence[float],
    num_positions: int,
    routing: RoutingConfig,
    max_buckets: int = MAX_BUCKETS,
    buckets: Sequence[int] | None = None,
) -> Plan:
  """Chooses the buckets of a schedule for contexts of up to `num_positions` tokens.

  Args:
    schedule_L: sparsity asked of each block.
    max_buckets: most distinct capacities; those needed are merged upwards at the least cost in slots.
    buckets: the capacities to choose from instead; every block takes the smallest that holds it.

  Raises:
    UserError: `buckets` cannot hold the prompt, or `routing` names a block that the schedule has not.
  """
  routing.check_blocks(len(schedule_L))
  routed = [float(s) > 0 for s in schedule_L]
  asked = np.asarray(schedule_L, np.float32)  # the longest context needs most
  needed = np.asarray(capacity(asked, np.full(len(asked), num_positions, np.int32), routing.bucket_multiple))
  if buckets is None and hardware.platform() == "tpu":
    needed = np.minimum(-(-needed // _TILE) * _TILE, num_positions)
  needed = [int(n) if r else num_positions for n, r in zip(needed, routed)]
  if buckets is not None:
    rooms = sorted(buckets)
    if not rooms or max(needed) > rooms[-1]:
      raise UserError(
          f"The largest of buckets={tuple(buckets)} holds fewer than the {max(needed)} tokens that a block computes of "
          f"a prompt of {num_positions}; add a bucket of at least that size or shorten the prompt."
      )
  else:
    rooms = merge(sorted({n for n, r in zip(needed, routed) if r}), np.bincount(needed), max_buckets) + [num_positions]
  room = [min(next(size for size in rooms if size >= n), num_positions) if r else n for n, r in zip(needed, routed)]
  bodies = sorted(set(zip(room, routed)))
  body_of = tuple(bodies.index(pair) for pair in zip(room, routed))
  return Plan(num_positions, tuple(bodies), body_of, routing.first_evicting(len(body_of)))


def merge(sizes: Sequence[int], count, most: int) -> list[int]:
  """At most `most` of the ascending `sizes`, such that rounding each up to one of them costs the fewest slots.

  Args:
    count: how many blocks need each size, indexed by size.
  """
  if len(sizes) <= most:
    return list(sizes)
  # best[i]: the cheapest choice for sizes[:i + 1] whose largest is sizes[i], as (cost, chosen).
  best = [(float(sum(count[s] * (size - s) for s in sizes[: i + 1])), [size]) for i, size in enumerate(sizes)]
  for _ in range(most - 1):
    longer = list(best)
    for i, size in enumerate(sizes):
      for j in range(i):
        cost = best[j][0] + sum(count[s] * (size - s) for s in sizes[j + 1 : i + 1])
        longer[i] = min(longer[i], (cost, best[j][1] + [size]))
    best = longer
  return best[-1][1]
