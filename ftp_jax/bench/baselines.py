"""Time to first token of the baselines, beside dense and FTP."""

import os
from typing import Any

import numpy as np

from ftp_jax.bench.cases import Case, Prefill
from ftp_jax.bench.settings import Settings
from ftp_jax.bench.timing import seconds_of
from ftp_jax.errors import UserError
from ftp_jax.evaluation.baselines import METHODS, Baseline, build, load
from ftp_jax.evaluation.flops import prefill_flops
from ftp_jax.models.sources import Model

NAMES = tuple(name for name, method in METHODS.items() if not method.calibrated and name != "dense")


def chosen(model: Model, settings: Settings) -> list[Baseline]:
  """The baselines that settings name.

  Raises:
    UserError: an entry is neither a saved baseline of this model nor the name of one without calibration.
  """
  found = []
  for entry in settings.baseline:
    if entry in NAMES:
      found += [build(entry, model, sparsity, dtype=settings.dtype) for sparsity in settings.sparsity]
    elif os.path.isdir(entry):
      found.append(load(entry, model, dtype=settings.dtype))
    else:
      raise UserError(f"--baseline={entry} is no directory; name a saved baseline's, or one of {', '.join(NAMES)}.")
  return found


class BaselinePrefill(Prefill):
  """A timing.Method; what a baseline does to a prompt's tokens is done before the clock starts."""

  def __init__(self, baseline: Baseline, tokens_BxT: np.ndarray):
    self.baseline, self.context, self.keep = baseline, tokens_BxT.shape[1], None
    labels = {"sparsity": baseline.sparsity, "shape": None, "kv": None, "router": None}
    seen = np.array([baseline.prompt(row) for row in tokens_BxT], np.int32)
    super().__init__(Case(baseline.name, *baseline.engine.execution, labels), seen)

  def measure(self) -> float:
    seconds, out = seconds_of(self.run)
    self.keep = self.baseline.routes(out.cache)
    return seconds

  def describe(self) -> dict[str, Any]:
    """For its record: as `Prefill.describe`."""
    keep, config = np.asarray(self.keep), self.baseline.model.config
    costs = [self.baseline.costs(keep[..., b, :], self.context) for b in range(keep.shape[-2])]
    dense = prefill_flops(config, np.ones((config.num_blocks, self.context)), self.context)
    ideal = dense * len(costs) / sum(cost.flops for cost in costs)
    achieved = float(np.mean([cost.skipped for cost in costs]))
    return {"method": self.baseline.name, **self.case.labels, "achieved_sparsity": achieved, "ideal_speedup": ideal}
