"""A router in the way of Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258), for a frozen model.

Every other block computes the K tokens of highest router score and no other; these see each other alone there (KV
mode `evict`). Deviations: the paper trains model and router together from scratch, and multiplies a block's output by
the score; here the model is frozen, so the output is left as it is, and the router is distilled by FTP's training code
(KL on the continuation, straight through), without schedule, guide or factors. It is a small MLP of the normed state
for each routed block, where the paper has a linear one. The share of routed blocks is half, so each is asked for twice
S (0.875 in the paper). Instead of an auxiliary loss, a two-sided sparsity loss moves the score's zero to the K-th
token, so that a token can decide alone; generated tokens are computed, as by FTP.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from ftp_jax.errors import UserError
from ftp_jax.evaluation.baselines.calibration import Calibration
from ftp_jax.evaluation.judge import Frozen, Judge
from ftp_jax.routing import routers
from ftp_jax.routing.config import RouterConfig, RoutingConfig
from ftp_jax.training.loop import train_router
from ftp_jax.training.step import StepSpec, TrainSettings

ROUTER = RouterConfig("per_block", factors=(), hidden_states=True, hidden_size=16)
ROUTING = RoutingConfig("evict", "topk")


def settings(steps: int) -> TrainSettings:
  return TrainSettings(
      steps=steps, learning_rate=1e-3, warmup=min(10, steps // 4), clip=1.0, distill="kl", distill_weight=1.0,
      sparsity_weight=0.1, sparsity_two_sided=True, guide="static", guide_weight=0.0, guide_decay="none",
  )


def every_other(num_blocks: int, sparsity: float) -> np.ndarray:
  """The schedule (L,): blocks 1, 3, 5, ... alike, the others dense. UserError if they cannot hold the sparsity."""
  schedule_L = np.zeros(num_blocks)
  routed = num_blocks // 2
  if sparsity * num_blocks >= routed:
    raise UserError(f"Every other of {num_blocks} blocks cannot skip S={sparsity}; ask for less than one half.")
  schedule_L[1::2] = sparsity * num_blocks / routed
  return schedule_L.round(6)


def calibrate(model: Frozen, sparsity: float, calibration: Calibration, seed: int) -> tuple[dict[str, Any], Any]:
  """Facts of a `Routed` and the router's parameters; an interrupted training goes on from its last checkpoint."""
  schedule_L = every_other(model.config.num_blocks, sparsity).astype(np.float32)
  judge = Judge(model, ROUTING, calibration.validation, calibration.batch, calibration.num_scored)
  every = max(1, calibration.steps // 4)
  with calibration.working_directory(f"mod-S{sparsity:.2f}-seed{seed}", model) as directory:
    result = train_router(
        directory=directory,
        spec=StepSpec(
            model.config, ROUTING, ROUTER, settings(calibration.steps), calibration.num_scored, start=1,
            dtype=model.dtype,
        ),
        params=model.params,
        router_params=routers.init_router(
            ROUTER, jax.random.key(seed), model.config.num_blocks, model.config.hidden_size
        ),
        prompts=calibration.prompts, fisher_LxNxT=None, schedule_L=schedule_L, batch_size=calibration.batch, seed=seed,
        validate=lambda params: float(judge.kl(routers.Router("dynamic", ROUTER, params), schedule_L[None])[0]),
        validate_every=every, checkpoint_every=every,
    )
  return {
      "router": dataclasses.asdict(ROUTER),
      "routing": dataclasses.asdict(ROUTING),
      "schedule": [float(str(s)) for s in schedule_L],
      "validation_kl": result.validation,
      "step": result.step,
  }, result.router
