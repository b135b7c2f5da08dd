"""Continuation quality of routed execution against the dense model, on one set of prompts.

The teacher's log-probabilities are computed once. Dense states are kept at a few depths, so that a
schedule whose first blocks are dense is judged from the deepest of them below its first skipping block.
On a mesh batches lie over data x fsdp; several schedules are spread over data instead, batches over fsdp.
"""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax import sharding
from ftp_jax.data.prompts import Prompts, batches, put_back, take
from ftp_jax.models import scoring
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import masked, routers
from ftp_jax.routing.config import RoutingConfig

_DEPTHS = 5  # dense states are kept at this many evenly spaced blocks, block 0 included


@dataclasses.dataclass(frozen=True)
class Frozen:
  """The frozen model as the executions take it: architecture, parameters, compute dtype."""

  config: ModelConfig
  params: Any
  dtype: Any = jnp.float32


class Quality(NamedTuple):
  """Per prompt, (N,): KL to dense and NLL in nats a token, and share of equal next tokens; routes (L,N,T)."""

  kl: np.ndarray
  nll: np.ndarray
  agreement: np.ndarray
  keep_LxNxT: np.ndarray


@functools.partial(jax.jit, static_argnames=("config", "routing", "num_scored", "depths", "dtype"))
def _prepare(config, routing, params, tokens, context, length, *, num_scored, depths, dtype):
  entries, last = masked.dense_entries(config, routing, params, tokens, context, length, depths, dtype=dtype)
  source, _, _ = scoring.continuation(tokens, context, length, num_scored)
  return entries, scoring.log_probs(config, params, last, source)


@functools.partial(jax.jit, static_argnames=("config", "routing", "num_scored", "start", "dtype", "attention"))
def batch_quality(
    config, routing, params, router, rows, teacher, schedules_PxL, entry, *, num_scored, start, dtype, attention="auto"
):
  """Quality of P schedules on one batch, one by one, or spread over the mesh: arrays (P,B) and keep (P,L,B,T).

  Args:
    rows: tokens (B,T), context and length (B,); teacher: the dense log-probabilities (B,num_scored,V).
    entry: dense states (B,T,D) that enter block `start`, before which no schedule skips anything; None at 0.
  """

  def one(schedule, params, router, rows, teacher, entry):
    source, target, weight = scoring.continuation(*rows, num_scored)
    out = masked.forward(
        config, routing, params, router, *rows, schedule, start=start, entry=entry, dtype=dtype, attention=attention
    )
    student = scoring.log_probs(config, params, out.hidden_BxTxD, source)
    per_row = lambda values: scoring.row_mean(values, weight)
    return Quality(
        per_row(scoring.kl_divergence(teacher, student)),
        per_row(-scoring.pick(student, target)),
        per_row((jnp.argmax(teacher, -1) == jnp.argmax(student, -1)).astype(jnp.float32)),
        out.keep_LxBxT,
    )

  operands = (params, router, rows, teacher, entry)
  return sharding.replicate(sharding.map_candidates(one, schedules_PxL, *operands))


class Judge:
  """Judges routers and schedules on a fixed set of prompts."""

  def __init__(
      self,
      model: Frozen,
      routing: RoutingConfig,
      prompts: Prompts,
      batch: int,
      num_scored: int,
      length_buckets: Sequence[int] = (),
  ):
    """Runs the dense model over the prompts once.

    Args:
      batch: rows evaluated at once; num_scored: longest continuation (C); length_buckets: see `config.data`.
    """
    self.model, self.routing, self.prompts, self.num_scored = model, routing, prompts, num_scored
    blocks = model.config.num_blocks
    self.depths = tuple(sorted({blocks * i // _DEPTHS for i in range(_DEPTHS)}))
    self._batches = list(batches(prompts, batch, length_buckets))
    self._teacher, self._entries = [], []
    with sharding.over(model.params):
      for rows, *_ in self._batches:
        entries, teacher = sharding.park(model.params, _prepare(
            model.config, routing, model.params, *sharding.place(model.params, rows, "batch"),
            num_scored=num_scored, depths=self.depths, dtype=model.dtype,
        ))
        self._teacher.append(teacher)
        self._entries.append(entries)

  def of(self, model: Frozen) -> "Judge":
    """This judge of other parameters whose dense passes are the same: other maps for skipped blocks, or none."""
    other = copy.copy(self)
    other.model = model
    return other

  def quality(self, router: routers.Router, schedule_L, replaced: Prompts | None = None) -> Quality:
    """Quality of one schedule (L,).

    `replaced`: score these prompts, none longer, against the teacher of the original ones.
    """
    rows = self.prompts.tokens.shape
    figures = [np.zeros(len(self.prompts.tokens), np.float32) for _ in range(3)]
    result = Quality(*figures, np.zeros((self.model.config.num_blocks, *rows), bool))
    for i, batch in enumerate(self._batches):
      for name, part in jax.device_get(self._run(i, router, np.asarray(schedule_L)[None], replaced))._asdict().items():
        put_back(getattr(result, name), part[0], batch, int(name == "keep_LxNxT"))
    return result

  def kl(self, router: routers.Router, schedules_PxL) -> np.ndarray:
    """Mean KL to dense (P,) of P schedules: the fitness of the search. One compiled call a batch."""
    total = np.zeros(len(schedules_PxL))
    for i, (_, weight, _) in enumerate(self._batches):
      total += np.asarray(self._run(i, router, np.asarray(schedules_PxL), None).kl) @ weight
    return total / len(self.prompts.tokens)

  def _run(self, i: int, router: routers.Router, schedules_PxL: np.ndarray, replaced: Prompts | None) -> Quality:
    rows = self._batches[i].prompts
    if replaced is not None:
      rows = take(replaced, self._batches[i].rows, rows.tokens.shape[1])
    start, entry = 0, None
    if replaced is None:
      skipping = np.flatnonzero(schedules_PxL.max(axis=0) > 0)
      first = int(skipping[0]) if len(skipping) else self.model.config.num_blocks - 1
      first = masked.late_start(self.routing, router, first)
      at = max(d for d, depth in enumerate(self.depths) if depth <= first)
      start, entry = self.depths[at], self._entries[i][at]
    params = self.model.params
    with sharding.over(params):
      return batch_quality(
          self.model.config, self.routing, params, sharding.place(params, router),
          sharding.place(params, rows, "batch"), self._teacher[i], np.asarray(schedules_PxL, np.float32), entry,
          num_scored=self.num_scored, start=start, dtype=self.model.dtype,
      )
