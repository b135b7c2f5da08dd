"""Sparsity allotted to blocks by what learned routers are expected to lose in each.

The Fisher schedule asks of a block what a perfect choice of its tokens could skip. A router errs, and in a block where
a few tokens carry nearly all of the worth an error costs many times what it costs elsewhere. So routers are warmed up
on one half of the prompts, choose among the tokens of the other half, and the sparsity goes to where the Fisher scores
of what they skip add up to least.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax import sharding
from ftp_jax.errors import UserError
from ftp_jax.routing.config import RouterConfig, RoutingConfig
from ftp_jax.routing.selection import capacity, first_to_keep
from ftp_jax.training import guide


def skipped_worth(
    margin_LxBxT: np.ndarray, fisher_LxBxT: np.ndarray, context_B: np.ndarray, routing: RoutingConfig, sparsities
) -> np.ndarray:
  """What each block loses at each of U sparsities under `topk`, (L,U,B): half the Fisher scores of what skips, in nats.

  Args:
    sparsities: ascending, (U,).
  """
  t, last = np.arange(margin_LxBxT.shape[2]), context_B[:, None] - 1
  stays = (t == 0) | (t >= last)  # forced tokens, and what is no context
  ranked = np.asarray(first_to_keep(margin_LxBxT, jnp.asarray(context_B), routing))
  order = np.argsort(np.where(stays, np.inf, ranked), axis=2, kind="stable")  # of equals the later one is kept
  worth = np.cumsum(np.take_along_axis(fisher_LxBxT.astype(np.float64), order, axis=2), axis=2)
  worth = np.pad(worth, ((0, 0), (0, 0), (1, 0))) / 2
  slots = np.asarray(capacity(jnp.asarray(sparsities, jnp.float32)[:, None], jnp.asarray(context_B)[None]))
  return np.take_along_axis(worth[:, None], (context_B - slots)[None, :, :, None], axis=3)[..., 0]


@functools.lru_cache(maxsize=None)
def _compiled_margins(router: RouterConfig, reading: guide.Reading) -> Any:
  return jax.jit(guide.make_margins(router, reading, "none"))


def expected_loss(
    router: RouterConfig,
    routing: RoutingConfig,
    params: Any,
    data: guide.GuideData,
    fisher_LxNxT: np.ndarray,
    schedule_L: np.ndarray,
    sparsities: Sequence[float],
    rows: np.ndarray,
    batch: int,
    frozen: Any = None,
) -> np.ndarray:
  """What a router loses in each block at each of U sparsities, nats a prompt, mean over prompts, (L,U).

  Gates are taken one by one, as Fisher scores take them. Blocks of which the schedule asks nothing, for which the
  router has not learned, have NaN.

  Args:
    data: router inputs of N prompts.
    fisher_LxNxT: their gate scores, each block's own.
    schedule_L: what routers read as asked of the blocks.
    rows: the prompts that count, which should be others than the router was warmed up on.
    batch: prompts at once.
    frozen: parameters of the model; batches are split over the mesh that they lie on. None: there is none.

  Raises:
    UserError: the router's margins or the scores are no finite numbers.
  """
  frozen = params if frozen is None else frozen
  reading = guide.Reading.of(router, len(data.score_UxNxT), schedule_L)
  margins = _compiled_margins(router, reading)
  params, asked = sharding.place(frozen, (params, guide.asked_of(reading, routing, schedule_L)))
  losses, blocks = np.full((len(schedule_L), len(sparsities)), np.nan), np.array(reading.blocks, int)
  losses[blocks] = 0.0
  for start in range(0, len(rows), batch):
    some = rows[start : start + batch]
    filled = np.resize(some, batch)  # of one shape
    arrays = sharding.place(frozen, guide.inputs_of(data, reading, filled), None, "batch")
    with sharding.over(frozen):
      context = sharding.place(frozen, data.context_N[filled], "batch")
      found = sharding.fetch(frozen, margins(params, context, *arrays, *asked))[:, : len(some)]
    fisher = fisher_LxNxT[np.ix_(blocks, some)]
    guide.check_scores(fisher)
    if not np.isfinite(found).all():
      raise UserError("The guided warm-up has diverged; lower train.warmup_guide_learning_rate.")
    losses[blocks] += skipped_worth(found, fisher, data.context_N[some], routing, sparsities).sum(axis=2)
  losses[np.asarray(schedule_L) <= 0] = np.nan  # a recurrent router is asked there as well, for the sake of its state
  return losses / len(rows)


def allot(loss_LxU: np.ndarray, total: int) -> np.ndarray:
  """The units (L,) int32 of sum `total` whose losses add up to least; with u units block i loses loss_LxU[i, u].

  Exact, by dynamic programming. NaN: the block cannot have as many; every block can have none.
  """
  num_blocks, choices = loss_LxU.shape
  loss_LxU = np.where(np.isnan(loss_LxU), np.inf, loss_LxU)
  loss_LxU[:, 0] = 0.0
  least = np.full(total + 1, np.inf)  # of the blocks so far, by the units that they hold together
  least[0], taken = 0.0, []
  for loss_U in loss_LxU:
    padded = np.concatenate([np.full(choices - 1, np.inf), least])
    before = np.lib.stride_tricks.sliding_window_view(padded, choices)[:, ::-1]  # [t, u]: least[t - u]
    table = before + loss_U
    taken.append(np.argmin(table, axis=1))
    least = np.min(table, axis=1)
  assert np.isfinite(least[total]), "the blocks cannot hold the total"
  units, left = np.zeros(num_blocks, np.int32), total
  for block in reversed(range(num_blocks)):
    units[block] = taken[block][left]
    left -= units[block]
  return units
