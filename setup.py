"""Packaging of ftp_jax. The run configs of experiments/ are installed as ftp_jax/experiments/."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent


def requirements() -> list[str]:
  lines = (ROOT / "requirements.txt").read_text().splitlines()
  return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def version() -> str:
  return re.search(r'^__version__ = "(.+)"$', (ROOT / "ftp_jax" / "__init__.py").read_text(), re.MULTILINE).group(1)


setup(
    name="ftp-jax",
    version=version(),
    description="Fine-grained token-wise pruning (FTP) of frozen LLMs in JAX and Flax",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    # Mapped below ftp_jax, so that `ftp-jax run --config=NAME` finds them from any directory and no
    # top-level package called `experiments` is left in site-packages.
    packages=find_packages(include=["ftp_jax", "ftp_jax.*"]) + ["ftp_jax.experiments", "ftp_jax.experiments.configs"],
    package_dir={"ftp_jax.experiments": "experiments", "ftp_jax.experiments.configs": "experiments/configs"},
    install_requires=requirements(),
    package_data={"ftp_jax.evaluation.harness": ["ftp_jax.yaml"]},
    extras_require={
        "eval": ["lm-eval==0.4.13"],
        # To run an exported artifact. `generate` of transformers changes between minor versions: the last one tested.
        "torch": ["torch>=2.8,<3", "transformers<5.25"],
        # To compile for TPUs on a machine without one: `ftp-jax compile-check`.
        "tpu-check": ["jax[tpu]"],
        "test": [
            "accelerate>=1.0,<2",  # lm-eval's Hugging Face model class
            "hypothesis>=6.100,<7",
            "jax[tpu]",
            "lm-eval==0.4.13",
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "torch>=2.8,<3",
            "transformers<5.25",
        ],
    },
    entry_points={"console_scripts": ["ftp-jax = ftp_jax.cli:main"]},
)
