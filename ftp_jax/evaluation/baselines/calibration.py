"""What methods may look at before they are tested: calibration prompts, never a benchmark item or a test prompt."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from ftp_jax.data.prompts import Prompts
from ftp_jax.evaluation.judge import Frozen


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Prompts and sizes of the work.

  Attributes:
    prompts: contexts with continuations.
    validation: others, that choose among the states of a training.
    batch: rows at once.
    steps: of training, for methods that train.
    directory: where slow methods keep what an interrupted run goes on from; None: nowhere.
  """

  prompts: Prompts
  validation: Prompts
  batch: int = 8
  steps: int = 100
  directory: str | os.PathLike | None = None

  @property
  def num_scored(self) -> int:
    """Longest continuation."""
    return int(max((p.length - p.context).max() for p in (self.prompts, self.validation)))

  @contextlib.contextmanager
  def working_directory(self, name: str, model: Frozen) -> Iterator[str]:
    """Where the training `name` of a model keeps its checkpoints; one that vanishes where there is no `directory`."""
    if self.directory is not None:
      yield str(pathlib.Path(self.directory) / f"{name}-{fingerprint(model)[:8]}")
      return
    with tempfile.TemporaryDirectory() as directory:
      yield directory


def fingerprint(model: Frozen, *arrays: np.ndarray) -> str:
  """Of the model's config and dtype, a sample of its weights, and arrays: 16 hexadecimal digits."""
  sample = np.asarray(model.params["blocks"]["down"]["kernel"][:, 0], np.float32)
  digest = hashlib.sha256(f"{model.config} {jnp.dtype(model.dtype).name}".encode())
  for array in (sample, *arrays):
    digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()[:16]
