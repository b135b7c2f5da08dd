"""TPU topologies without a TPU: chips with their public figures, and the devices that libtpu describes."""

import dataclasses
import math
import os
from collections.abc import MutableMapping
from typing import Any

from ftp_jax.errors import UserError

# Without these libtpu waits for a cloud's metadata server, refuses to be loaded by two processes, or logs a lot.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Chip:
  """One TPU chip.

  Attributes:
    hbm: bytes a program may use, as its compiler has it: what is sold, less a reserve.
    peak: bf16 FLOP/s.
    hbm_rate: bytes/s from and to HBM.
    ici_rate: bytes/s that all links of the chip receive together.
    clock: cycles/s: the peak over the products that its matrix units do in a cycle.
  """

  hbm: int
  peak: float
  hbm_rate: float
  ici_rate: float
  clock: float


_GIB = 2**30
CHIPS = {
    "v5e": Chip(int(15.75 * _GIB), 197e12, 819e9, 200e9, 1.5e9),  # 4 units of 128 x 128
    "v5p": Chip(int(95.74 * _GIB), 459e12, 2765e9, 600e9, 1.75e9),  # 8 units of 128 x 128
    "v6e": Chip(int(31.25 * _GIB), 918e12, 1600e9, 400e9, 1.75e9),  # 4 units of 256 x 256
}


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
  """Sets what libtpu reads, where it is not set; to be called before jax is imported."""
  for name, value in _ENVIRONMENT.items():
    environment.setdefault(name, value)


def chip(topology: str) -> Chip:
  """The chip of a topology such as "v5e:4x4".

  Raises:
    UserError: the generation is unknown.
  """
  kind = topology.partition(":")[0]
  if kind not in CHIPS:
    raise UserError(f"No topology is known as {topology!r}; write for instance v5e:4x4, v5p:2x2x1 or v6e:4x4.")
  return CHIPS[kind]


def devices(topology: str) -> list[Any]:
  """The devices of a topology, one a chip: nothing can run on them, but programs can be compiled for them.

  Raises:
    UserError: libtpu is missing, or there is no such topology.
  """
  from jax.experimental import topologies

  chip(topology)
  try:
    import libtpu  # noqa: F401
  except ImportError:
    raise UserError("libtpu is missing; install it with: pip install 'jax[tpu]' (210 MB; no TPU is needed).") from None
  sizes = topology.partition(":")[2].split("x")
  single = all(size == "1" for size in sizes)  # a host of one chip has to be asked for
  options = {"chips_per_host_bounds": (1, 1, 1)} if single else {}
  try:
    found = list(topologies.get_topology_desc(topology, "tpu", **options).devices)
  except Exception as error:  # libtpu's errors have no type of their own
    raise UserError(
        f"libtpu describes no topology {topology!r} ({str(error).splitlines()[0]}); "
        "write for instance v5e:4x4, v5p:2x2x1 or v6e:4x4."
    ) from None
  assert len(found) == math.prod(map(int, sizes)), f"{topology} has {len(found)} devices"
  return found
