"""Time of steps and runs by formula: what a slice of a pod would take if it did what its figures promise.

Three terms, in seconds, for the chip that does most:

  compute        FLOPs / peak bf16 FLOP/s
  memory         bytes / HBM bytes/s: every matrix product reads its inputs and writes its output once, and gathered
                 weights are written once more
  communication  bytes received / half of the chip's ICI bytes/s, as a ring uses half of the links of a torus: weights
                 gathered once a forward pass over fsdp, activations summed twice a block over tensor

A step takes between the largest (all of them overlap) and their sum (none do). A training step is four forward
passes (teacher, student, recomputation, gradient of the activations), see TRAIN_FORWARDS. Not counted: sorts, norms
and other elementwise work, the host, compilation, and what a chip falls short of its peak.
"""

import dataclasses
import math
from typing import Any

from ftp_jax.config import needs_gate_scores
from ftp_jax.fit import counts
from ftp_jax.fit.topologies import Chip
from ftp_jax.models.config import ModelConfig

# FLOPs of a training step over those of a dense forward, as `compile-check` counts them at T = 2048 (4.10 to 4.13):
# four passes, and the products that splash repeats in its two backward kernels.
TRAIN_FORWARDS = 4.13
TRAIN_PASSES = 4
_BYTES = 2  # of a bf16 number
_WINDOW = 8  # the last queries of a context, whose attention gives the scores that routers read


@dataclasses.dataclass(frozen=True)
class Slice:
  """A chip, and the mesh of as many of them as its sizes say."""

  chip: Chip
  data: int = 1
  fsdp: int = 1
  tensor: int = 1

  @property
  def chips(self) -> int:
    return self.data * self.fsdp * self.tensor


@dataclasses.dataclass(frozen=True)
class Terms:
  """Seconds of work; see the module."""

  compute: float = 0.0
  memory: float = 0.0
  communication: float = 0.0

  @property
  def overlapped(self) -> float:
    return max(self.compute, self.memory, self.communication)

  @property
  def serial(self) -> float:
    return self.compute + self.memory + self.communication

  def __add__(self, other: "Terms") -> "Terms":
    return Terms(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

  def __mul__(self, times: float) -> "Terms":
    return Terms(*(times * a for a in dataclasses.astuple(self)))


def block_parameters(model: ModelConfig) -> int:
  """Numbers in the matrices of one block."""
  heads, groups = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
  return model.hidden_size * (2 * heads + 2 * groups + 3 * model.intermediate_size)


def parameters(model: ModelConfig) -> int:
  """Numbers in all matrices."""
  tables = 1 if model.tie_embeddings else 2
  return model.num_blocks * block_parameters(model) + tables * model.vocab_size * model.hidden_size


def forward_flops(model: ModelConfig, positions: int, scored: int) -> float:
  """FLOPs of a masked or dense forward of one row and its scored positions, the router's own left out.

  Attention computes the tiles of splash where `positions` allows it, else all pairs; _WINDOW queries give scores.
  """
  pairs = positions**2 if positions % 128 else counts.causal_pairs(positions)
  width = model.num_heads * model.head_dim
  scores = 2.0 * (width + model.num_heads) * _WINDOW * positions
  turned = 2.0 * positions * (width + model.num_kv_heads * model.head_dim) * model.head_dim  # see `rope.apply_rope`
  block = 2.0 * positions * block_parameters(model) + 4.0 * width * pairs + scores + turned
  return model.num_blocks * block + 2.0 * scored * model.vocab_size * model.hidden_size


def forward(model: ModelConfig, slice_: Slice, rows: int, positions: int, scored: int) -> Terms:
  """One forward pass over `rows` rows, spread over data x fsdp; what remains makes some chips do one more."""
  chip, parts = slice_.chip, slice_.data * slice_.fsdp
  tokens = math.ceil(rows / parts) * positions
  flops = math.ceil(rows / parts) * forward_flops(model, positions, scored) / slice_.tensor
  weights = _BYTES * model.num_blocks * block_parameters(model) / slice_.tensor
  heads, groups = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
  # Inputs and outputs of q, k, v, attention, o, gate, up and down.
  width = 4 * model.hidden_size + 4 * heads + 4 * groups + 2 * (model.hidden_size + model.intermediate_size)
  width += model.intermediate_size + model.hidden_size
  activations = _BYTES * model.num_blocks * tokens * width / slice_.tensor
  gathered = weights * (slice_.fsdp - 1) / slice_.fsdp
  summed = 2 * 2 * (slice_.tensor - 1) / slice_.tensor * _BYTES * model.num_blocks * tokens * model.hidden_size
  return Terms(
      flops / chip.peak,
      (weights + activations + (weights if slice_.fsdp > 1 else 0)) / chip.hbm_rate,
      (gathered + summed) / (chip.ici_rate / 2),
  )


def train_step(model: ModelConfig, slice_: Slice, rows: int, positions: int, scored: int) -> Terms:
  """One step of the router."""
  once = forward(model, slice_, rows, positions, scored)
  return dataclasses.replace(once * TRAIN_PASSES, compute=once.compute * TRAIN_FORWARDS)


def candidates(model: ModelConfig, slice_: Slice, count: int, rows: int, positions: int, scored: int) -> Terms:
  """One call that judges `count` schedules on `rows` prompts: each group of the mesh axis data judges its share."""
  group = dataclasses.replace(slice_, data=1)
  return forward(model, group, rows, positions, scored) * math.ceil(count / slice_.data)


@dataclasses.dataclass(frozen=True)
class Run:
  """The numbers of a run that its time follows from; `of_config` reads them from a run config.

  Attributes:
    cells: sparsities x seeds, each trained, and searched where `calls` is not 0.
    search_batch, train_batch: prompts of one call; the train batch is also that of the gate scores.
    calls, children: calls of a cell, the search's and fine-tuning's, that judge that many schedules each.
    validated: schedules judged one by one on the validation prompts, at most.
  """

  cells: int
  search_batch: int
  train_batch: int
  positions: int
  scored: int
  search_prompts: int
  validation_prompts: int
  train_prompts: int
  warmup_prompts: int
  fisher_draws: int
  calls: int
  children: int
  validated: int
  steps: int
  validations: int


def of_config(config: Any) -> Run:
  """A `Run` of a config: generation 0 fills whole calls of children, and each round of fine-tuning is a search."""
  s, t, d = config.search, config.train, config.data
  children = s.population - s.elite
  pool = -(-max(s.population, len(s.seed_schedules)) // children)
  scored = needs_gate_scores(config)
  rounds = [s.generations] * (s.schedule == "ga") + [config.finetune.generations] * config.finetune.rounds
  return Run(
      cells=len(config.sparsities) * len(config.seeds), search_batch=s.batch, train_batch=t.batch,
      positions=d.max_context + d.continuation, scored=d.continuation,
      search_prompts=d.num_search, validation_prompts=d.num_validation, train_prompts=d.num_train + d.num_repeats,
      warmup_prompts=t.warmup_guide_prompts if t.guide == "fisher" and t.warmup_guide_steps else 0,
      fisher_draws=t.fisher_draws if scored else 0, calls=sum(pool + generations for generations in rounds),
      children=children,
      validated=sum(len(s.seed_schedules) + max(1, s.elite) * (generations + 1) for generations in rounds),
      steps=t.steps, validations=1 + -(-t.steps // t.validate_every),
  )


def run_terms(run: Run, model: ModelConfig, slice_: Slice) -> dict[str, Terms]:
  """Terms of each part of a run."""
  size = (run.positions, run.scored)

  def over(prompts, batch):
    return forward(model, slice_, batch, *size) * math.ceil(prompts / batch)

  # A pass, and for each draw the blocks again and their gradient.
  scores = over(run.train_prompts, run.train_batch) * (1 + 2 * run.fisher_draws if run.fisher_draws else 0)
  call = candidates(model, slice_, run.children, run.search_batch, *size)
  judged = call * (run.calls * math.ceil(run.search_prompts / run.search_batch))
  judged += over(run.validation_prompts, run.search_batch) * run.validated
  steps = train_step(model, slice_, run.train_batch, *size) * run.steps
  steps += over(run.validation_prompts, run.search_batch) * run.validations
  teachers = over(run.search_prompts * bool(run.calls) + run.validation_prompts, run.search_batch)
  return {
      "teacher and gate scores": teachers + scores + over(run.warmup_prompts, run.train_batch),
      "search and fine-tuning": judged * run.cells,
      "training": steps * run.cells,
  }
