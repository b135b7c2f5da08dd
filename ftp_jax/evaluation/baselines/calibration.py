"""What methods may look at before they are tested: calibration prompts, never a benchmark item or a test prompt."""

import contextlib
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Iterator

from ftp_jax.data.prompts import Prompts


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
  def working_directory(self, name: str) -> Iterator[str]:
    """Where the training `name` keeps its checkpoints; one that vanishes where there is no `directory`."""
    if self.directory is not None:
      yield str(pathlib.Path(self.directory) / name)
      return
    with tempfile.TemporaryDirectory() as directory:
      yield directory
