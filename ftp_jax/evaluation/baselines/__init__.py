"""Baselines, each from its paper, each really faster: `build`, `save`, `load`, and `Yardstick` that measures them.

  baseline = build("shortgpt", model, 0.30, calibration)
  baseline.engine.generate(...)                       # as any Engine
  Yardstick(model, prompts, 8).record(baseline)       # quality, sparsities, FLOPs saved, KV bytes
"""

from ftp_jax.evaluation.baselines.calibration import Calibration as Calibration
from ftp_jax.evaluation.baselines.kinds import Baseline as Baseline
from ftp_jax.evaluation.baselines.kinds import from_artifact as from_artifact
from ftp_jax.evaluation.baselines.kinds import to_artifact as to_artifact
from ftp_jax.evaluation.baselines.measure import Yardstick as Yardstick
from ftp_jax.evaluation.baselines.registry import METHODS as METHODS
from ftp_jax.evaluation.baselines.registry import build as build
from ftp_jax.evaluation.baselines.registry import load as load
from ftp_jax.evaluation.baselines.registry import save as save
