"""What a figure was measured on."""

import os
import pathlib
import platform
import re

import jax


def describe_machine() -> dict[str, str | int | float]:
  """CPU model, usable cores, memory in GB, Python and jax versions, kind and number of devices."""
  devices = jax.devices()
  return {
      "cpu": _cpu_model(),
      "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
      "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
      "python": platform.python_version(),
      "jax": jax.__version__,
      "device": devices[0].device_kind,
      "devices": len(devices),
  }


def _cpu_model() -> str:
  info = pathlib.Path("/proc/cpuinfo")
  found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
  return found.group(1) if found else platform.processor() or platform.machine()
