"""The host loop of the schedule search: judges candidates, validates the best, saves every generation.

Generation 0 judges the starting pool; every further one judges C = population - elite children beside
the elite, which survives unchanged and is not judged again. A small search overfits its prompts
(docs/method.md, section 5), so the best candidates of each generation are validated on held-out prompts, and
the result is the best by validation, never the best by fitness.

SIGTERM stops the search after a generation, when it is saved (`distributed.Stopped`). Figures are those of
process 0 in all processes, so that they cannot drift apart.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from ftp_jax import distributed
from ftp_jax.errors import UserError
from ftp_jax.files import replacing, writing
from ftp_jax.search import genetic, schedule
from ftp_jax.search import state as state_lib

STATE_FILE = "search_state.npz"
METRICS_FILE = "metrics.jsonl"


class SearchResult(NamedTuple):
  """The best schedule by validation.

  units: int32 (L,). fitness, validation: its two figures. history: one dict per generation with
  generation, best_fitness and mean_fitness of its population, best_validation so far.
  """
  units: np.ndarray
  fitness: float
  validation: float
  history: list[dict[str, Any]]


def run_search(*, directory: str, seeds_units: Sequence[np.ndarray], settings: genetic.SearchSettings, key_seed: int,
               fitness: Callable[[np.ndarray], Any], validate: Callable[[np.ndarray], Any], num_generations: int,
               progress: bool = True) -> SearchResult:
  """Searches schedules of the sum that the seeds have; continues exactly where an earlier call was stopped.

  A finished search goes on if called with more generations. With several processes all call this with
  the same arguments; only the first reads and writes the directory.

  Args:
    directory: where the state (search_state.npz) and metrics.jsonl are kept; created if missing.
    seeds_units: starting schedules, integer (L,) each, one or more, all of the same sum.
    settings: the genetic algorithm's.
    key_seed: seed of all randomness here.
    fitness: float32 (C, L) sparsities -> (C,) figures, lower is better. C = population - elite in
      every call, so that it compiles once. NaN counts as worst.
    validate: float32 (k, L) sparsities -> (k,) held-out figures, for the best max(1, elite) candidates
      of a generation that were not validated before, and the seeds at first; k varies.
    num_generations: generations of children after the starting pool.
    progress: show a progress bar.

  Raises:
    UserError: every candidate's figure is NaN; the disk is full; the saved states are damaged or of other settings.
  """
  seeds_KxL = np.asarray(seeds_units, np.int32)
  if seeds_KxL.ndim != 2 or np.ptp(seeds_KxL.sum(axis=1)) or seeds_KxL.min() < 0 or seeds_KxL.max() > settings.u_max:
    raise ValueError("seeds must be one or more schedules in units, alike in length and sum, within [0, u_max]")
  path = os.path.join(directory, STATE_FILE)
  identity = _identity(seeds_KxL, settings, key_seed)

  def begin() -> bytes:
    with writing(directory):
      os.makedirs(directory, exist_ok=True)
    state = state_lib.load(path, identity)
    if state is not None and state.generation > num_generations:
      raise UserError(f"The search in {path} already has {state.generation} generations and {num_generations} are "
                      f"asked; ask at least as many, or delete that file and {path + state_lib.PREVIOUS}.")
    # What the state does not know of is done again, and a line lost with the process comes back.
    _write_metrics(directory, [] if state is None else _history(state))
    return state_lib.pack(state)

  state = state_lib.unpack(distributed.from_first(begin))
  is_writer = distributed.is_first()
  bar = tqdm.tqdm(total=num_generations + 1, initial=0 if state is None else state.generation + 1, desc="search",
                  disable=not (progress and is_writer))
  with bar, distributed.stoppable() as votes:
    while state is None or state.generation < num_generations:
      if state is None:
        state = _first_generation(seeds_KxL, settings, key_seed, fitness, validate)
      else:
        state = _next_generation(state, settings, fitness, validate)
      if is_writer:
        state_lib.save(path, state, identity)
        _append_metrics(directory, _history(state)[-1])
      bar.set_postfix(best=f"{state.fitness_P.min():.4g}", refresh=False)
      bar.update()
      if state.generation < num_generations and votes.cast()():
        raise distributed.Stopped
  best = int(np.argmin(state.validation_V))
  return SearchResult(state.validated_units_VxL[best], float(state.validated_fitness_V[best]),
                      float(state.validation_V[best]), _history(state))


def _first_generation(seeds_KxL, settings, key_seed, fitness, validate):
  key, key_start = jax.random.split(jax.random.key(key_seed))
  # The pool fills whole calls of `fitness`; what exceeds the population is dropped once judged.
  num_children = settings.num_children
  num_calls = -(-max(settings.population, len(seeds_KxL)) // num_children)
  pool_KxL = np.asarray(genetic.start(key_start, seeds_KxL, num_calls * num_children, settings))
  figures = np.concatenate([_judge(fitness, units, settings) for units in np.split(pool_KxL, num_calls)])
  best = np.argsort(figures, kind="stable")[:settings.population]
  state = state_lib.SearchState(
      generation=0, key_data=np.asarray(jax.random.key_data(key)), units_PxL=pool_KxL[best], fitness_P=figures[best],
      validated_units_VxL=np.zeros((0, seeds_KxL.shape[1]), np.int32), validated_fitness_V=np.zeros(0),
      validation_V=np.zeros(0), history_Gx3=np.zeros((0, 3)))
  # The seeds lead the pool. Validating them all makes the result at least as good as the best of them.
  num_seeds = len(seeds_KxL)
  return _finish(state, pool_KxL[:num_seeds], figures[:num_seeds], settings, validate)


def _next_generation(state, settings, fitness, validate):
  key, key_propose = jax.random.split(jax.random.wrap_key_data(state.key_data))
  children_CxL = np.asarray(genetic.propose(key_propose, state.units_PxL, state.fitness_P, settings))
  elite = np.argsort(state.fitness_P, kind="stable")[:settings.elite]
  state = dataclasses.replace(
      state, generation=state.generation + 1, key_data=np.asarray(jax.random.key_data(key)),
      units_PxL=np.concatenate([state.units_PxL[elite], children_CxL]),
      fitness_P=np.concatenate([state.fitness_P[elite], _judge(fitness, children_CxL, settings)]))
  return _finish(state, children_CxL[:0], state.fitness_P[:0], settings, validate)


def _finish(state, extra_units_KxL, extra_fitness_K, settings, validate):
  """Validates the extra candidates and the population's best, those not validated before, and adds to the history."""
  if not np.isfinite(state.fitness_P).any():
    raise UserError("Every candidate's fitness is NaN or infinite; check model.dtype and the calibration prompts.")
  best = np.argsort(state.fitness_P, kind="stable")[:max(1, settings.elite)]
  best = best[np.isfinite(state.fitness_P[best])]
  candidates = zip(np.concatenate([extra_units_KxL, state.units_PxL[best]]),
                   np.concatenate([extra_fitness_K, state.fitness_P[best]]))
  known = {units.tobytes() for units in state.validated_units_VxL}
  new = {units.tobytes(): (units, figure) for units, figure in candidates if units.tobytes() not in known}
  if new:
    units_KxL = np.stack([units for units, _ in new.values()])
    state = dataclasses.replace(
        state, validated_units_VxL=np.concatenate([state.validated_units_VxL, units_KxL]),
        validated_fitness_V=np.concatenate([state.validated_fitness_V, [figure for _, figure in new.values()]]),
        validation_V=np.concatenate([state.validation_V, _judge(validate, units_KxL, settings)]))
  if not np.isfinite(state.validation_V).any():
    raise UserError("Every validated schedule's figure is NaN or infinite; check the validation prompts.")
  finite = state.fitness_P[np.isfinite(state.fitness_P)]
  row = [[finite.min(), finite.mean(), state.validation_V.min()]]
  return dataclasses.replace(state, history_Gx3=np.concatenate([state.history_Gx3, row]))


def _judge(function, units_KxL, settings):
  """Figures (K,) float64 of schedules in units, with NaN made infinite."""
  figures = np.asarray(function(schedule.to_sparsity(units_KxL, settings.grid)), np.float64)
  if figures.shape != units_KxL.shape[:1]:
    raise ValueError(f"{len(units_KxL)} schedules must get as many figures, not shape {figures.shape}")
  return distributed.of_first(np.where(np.isnan(figures), np.inf, figures))


def _identity(seeds_KxL, settings, key_seed):
  named = {f"search.{name}": value for name, value in dataclasses.asdict(settings).items()}
  digest = hashlib.sha256(np.ascontiguousarray(seeds_KxL, "<i4").tobytes()).hexdigest()[:12]
  return {"the number of blocks": seeds_KxL.shape[1], **named, "the seed": key_seed,
          "the fingerprint of the starting schedules": digest}


def _history(state):
  names = ("best_fitness", "mean_fitness", "best_validation")
  return [{"generation": g, **dict(zip(names, row))} for g, row in enumerate(state.history_Gx3.tolist())]


def _write_metrics(directory, history):
  with replacing(os.path.join(directory, METRICS_FILE)) as file:
    file.writelines((json.dumps(line) + "\n").encode() for line in history)


def _append_metrics(directory, line):
  path = os.path.join(directory, METRICS_FILE)
  with writing(path), open(path, "a", encoding="utf-8") as file:
    file.write(json.dumps(line) + "\n")
