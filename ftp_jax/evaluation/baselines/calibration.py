"""What methods may look at before they are tested: calibration prompts, never a benchmark item or a test prompt."""

import dataclasses
import os

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
