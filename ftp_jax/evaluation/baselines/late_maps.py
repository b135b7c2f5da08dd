"""Late-block skipping with trained linear maps in place of the blocks: what FTP's maps do without any router.

The schedule and the static order are those of the baseline `late`. A token that skips a block is moved by a map
(`routing.stand_in`), fitted in closed form on the calibration prompts and then trained by FTP's training code (KL on
the continuation), with the rank, ridge and rate of FTP's configs. ReplaceMe (Shopkhoev et al. 2025, arXiv 2505.02819)
puts one linear map in place of a run of blocks; here each block has one of low rank, and keys and values are still
projected, from the moved states.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax.evaluation.baselines.calibration import Calibration, fingerprint
from ftp_jax.evaluation.judge import Frozen, Judge
from ftp_jax.export.artifact import load_weights, save_weights
from ftp_jax.routing import routers, stand_in
from ftp_jax.routing.config import RoutingConfig
from ftp_jax.search import schedule as schedules
from ftp_jax.training import stand_in as fitting
from ftp_jax.training.loop import train_router
from ftp_jax.training.step import StepSpec, TrainSettings

RANK, RIDGE, RATE = 64, 2e-3, 3e-4
ROUTING = RoutingConfig("project")


def schedule(num_blocks: int, sparsity: float) -> np.ndarray:
  """The schedule (L,): the last blocks skip everything, and one before them what is left."""
  return schedules.late(num_blocks, sparsity, 1.0)


def settings(steps: int) -> TrainSettings:
  return TrainSettings(
      steps=steps, learning_rate=RATE, warmup=min(4, steps // 4), clip=1.0, distill="kl", distill_weight=1.0,
      sparsity_weight=0.0, sparsity_two_sided=False, guide="static", guide_weight=0.0, guide_decay="none",
      stand_in_learning_rate=RATE,
  )


def calibrate(model: Frozen, sparsity: float, calibration: Calibration, seed: int) -> tuple[dict[str, Any], Any]:
  """Facts of a `Routed` and the maps; an interrupted training goes on from its last checkpoint."""
  schedule_L = schedule(model.config.num_blocks, sparsity).astype(np.float32)
  judge = Judge(model, ROUTING, calibration.validation, calibration.batch, calibration.num_scored)

  def validate(weights: Any) -> float:
    params = stand_in.attach(model.params, stand_in.split(weights)[1])
    return float(judge.of(dataclasses.replace(model, params=params)).kl(routers.STATIC, schedule_L[None])[0])

  every = max(1, calibration.steps // 4)
  with calibration.working_directory(f"late_maps-S{sparsity:.2f}-seed{seed}", model) as directory:
    # Kept: a resumed training must start from the very same numbers. Those of other prompts have another name.
    fitted = pathlib.Path(directory) / f"fitted-{fingerprint(model, *calibration.prompts)}.safetensors"
    if not fitted.exists():
      fitted.parent.mkdir(parents=True, exist_ok=True)
      maps = fitting.fit(
          model.config, model.params, calibration.prompts, calibration.batch, rank=min(RANK, model.config.hidden_size),
          ridge=RIDGE, dtype=model.dtype,
      )
      save_weights(maps, fitted)
    result = train_router(
        directory=directory,
        spec=StepSpec(
            model.config, ROUTING, None, settings(calibration.steps), calibration.num_scored,
            start=int(np.argmax(schedule_L > 0)), dtype=model.dtype,
        ),
        params=model.params, router_params=stand_in.join({}, load_weights(fitted)),
        prompts=calibration.prompts, fisher_LxNxT=None, schedule_L=schedule_L, batch_size=calibration.batch, seed=seed,
        validate=lambda weights: validate(jax.tree.map(jnp.asarray, weights)),
        validate_every=every, checkpoint_every=every,
    )
  return {
      "router": "static",
      "routing": dataclasses.asdict(ROUTING),
      "schedule": [float(str(s)) for s in schedule_L],
      "validation_kl": result.validation,
      "step": result.step,
  }, result.router
