"""Eight CPU devices, quick compilation and strict ranks for every test, set before jax is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
_FLAGS = " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + _FLAGS
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
