"""FastV (Chen et al. 2024, arXiv 2403.06764), for text: from block K on the tokens of least attention are gone.

What the block before K says of each token's attention ranks the tokens once, and every block from K on computes the
same share of them; the others are evicted there. Nothing is trained. Deviations: the paper drops image tokens by the
attention that they receive from all tokens, here any context token may go, by what the last eight context queries pay
it, which is FTP's score. K is 2 in the paper; here it is the one of a few depths with the lowest KL on the validation
prompts, K = 2 among them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax.errors import UserError
from ftp_jax.evaluation.baselines.calibration import Calibration
from ftp_jax.evaluation.judge import Frozen, Judge
from ftp_jax.routing import routers
from ftp_jax.routing.config import RoutingConfig

_DEPTHS = (1 / 4, 3 / 8, 1 / 2, 5 / 8)  # of the model, tried beside block 2


def schedules(num_blocks: int, sparsity: float) -> dict[int, np.ndarray]:
  """For every K tried the schedule (L,), nothing before K and alike from there on.

  Raises:
    UserError: no K leaves enough blocks to skip as much.
  """
  tried = sorted({min(2, num_blocks - 1), *(int(num_blocks * depth) for depth in _DEPTHS)})
  after = {k: sparsity * num_blocks / (num_blocks - k) for k in tried}
  found = {k: np.where(np.arange(num_blocks) < k, 0.0, s).round(6) for k, s in after.items() if s < 1}
  if not found:
    raise UserError(f"The blocks from block {tried[0]} on cannot skip S={sparsity} of all {num_blocks}; ask for less.")
  return found


def calibrate(model: Frozen, sparsity: float, calibration: Calibration, seed: int) -> tuple[dict[str, Any], Any]:
  """Facts of a `Routed`, the KL of every K among them, and the router's parameters."""
  del seed
  config, params = routers.of_factor("score")
  router, found = routers.Router("dynamic", config, jax.tree.map(jnp.asarray, params)), {}
  for k, schedule_L in schedules(model.config.num_blocks, sparsity).items():
    routing = RoutingConfig("evict", one_pass_block=k)
    judge = Judge(model, routing, calibration.validation, calibration.batch, calibration.num_scored)
    found[k] = float(judge.kl(router, schedule_L[None])[0]), routing, schedule_L
  _, routing, schedule_L = found[min(found, key=lambda k: found[k][0])]
  return {
      "router": dataclasses.asdict(config),
      "routing": dataclasses.asdict(routing),
      "schedule": schedule_L.tolist(),
      "validation_kl": {str(k): kl for k, (kl, *_) in found.items()},
  }, params
