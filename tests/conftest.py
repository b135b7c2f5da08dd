"""Eight CPU devices, quick compilation and strict ranks for every test, set before jax is imported."""

import functools
import importlib.metadata
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
# Compilation is most of the suite: half as long without fusion emitters and with one module a program.
QUICK_COMPILATION = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
DEFAULT_COMPILATION = {"xla_backend_optimization_level": 3}  # as users have it
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones know no other way
  QUICK_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
  DEFAULT_COMPILATION["xla_cpu_use_fusion_emitters"] = True
_FLAGS = f" --xla_force_host_platform_device_count=8 {QUICK_COMPILATION}"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + _FLAGS
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# Shrinking a failure would compile for minutes, and the drawn inputs are small as they are.
drawn = functools.partial(
    hypothesis.settings, deadline=None, derandomize=True, database=None, phases=[hypothesis.Phase.generate]
)


# Files that take longest, which two workers should begin with.
_LONG = (
    "bucketed", "pipeline", "processes", "distributed", "sharding", "routing", "training", "baselines", "inference",
    "harness", "export_torch", "fit", "bench", "loading", "evaluation", "kernels", "subblocks",
)


def pytest_collection_modifyitems(items):
  place = {f"test_{name}": number for number, name in enumerate(_LONG)}
  items.sort(key=lambda item: place.get(item.path.stem, len(place)))


_MANY_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_of_one_module():
  """A process may hold 65,530 memory maps, a compiled program holds dozens: beyond that the compiler crashes."""
  yield
  maps = pathlib.Path("/proc/self/maps")
  if not maps.exists() or maps.read_bytes().count(b"\n") > _MANY_MAPS:
    jax.clear_caches()
