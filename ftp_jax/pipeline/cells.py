"""What is found for one sparsity and seed, a cell: the stages `search`, `train` and `finetune`.

    search    schedule: found with the static router, named, or allotted by what routers lose
    train     dynamic router, and the maps where they are trained with it
    finetune  schedule found with the trained router
"""

import functools
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import tqdm

from ftp_jax import distributed
from ftp_jax.evaluation.judge import Frozen
from ftp_jax.export import artifact as artifact_lib
from ftp_jax.pipeline.directory import INITIAL, RunDirectory, save_weights
from ftp_jax.routing import routers, stand_in
from ftp_jax.search import schedule as schedules
from ftp_jax.search.loop import run_search
from ftp_jax.training import allotment, guide
from ftp_jax.training.loop import train_router
from ftp_jax.training.step import StepSpec

_FINETUNE_STARTS = (0.0, 0.25, 0.5, 0.75)  # shares of the Fisher schedule where fine-tuning starts


def search(run: RunDirectory) -> None:
  """Writes the schedule of every cell; see `search.schedule` of the config."""
  c = run.config.search
  for sparsity, seed in run.cells:

    def work(directory):
      _say(f"search: S={sparsity:.2f}, seed {seed}")
      distributed.on_first(lambda: artifact_lib.withdraw(run.cell(sparsity, seed) / "artifact"))
      if c.schedule != "ga":
        allotted = c.schedule == "allotted"
        units = allotted_schedule(run, sparsity, seed) if allotted else run.named_schedule(c.schedule, sparsity)
        found = schedules.to_sparsity(units, c.grid)
        distributed.on_first(lambda: schedules.save(directory / "schedule.json", found))
        return
      seeds = np.stack([run.named_schedule(name, sparsity) for name in c.seed_schedules])
      find_schedule(run, directory, seeds, routers.STATIC, run.frozen, c.generations, seed)

    run.run_stage(run.cell(sparsity, seed) / "search", "search", work, sparsity=sparsity, seed=seed)


def train(run: RunDirectory) -> None:
  """Writes the router of every cell, and maps that are trained with it."""
  for sparsity, seed in run.cells:
    cell = run.cell(sparsity, seed)

    def work(directory):
      _say(f"train: S={sparsity:.2f}, seed {seed}")
      distributed.on_first(lambda: artifact_lib.withdraw(cell / "artifact"))
      asked = run.training_schedule(run.schedule(cell / "search"), sparsity)
      # Kept, because a resumed training must start from the very same numbers, on any hardware.
      initial = directory / INITIAL
      if not distributed.exists(initial):
        router = new_router(run, seed)
        if run.config.train.guide == "fisher" and run.config.train.warmup_guide_steps:
          router = warm_up(run, router, asked, seed)
        save_weights(router, initial)
      weights = artifact_lib.load_weights(initial)
      maps = run.stand_in if run.config.train.stand_in_learning_rate else None
      fit(run, directory, stand_in.join(weights, maps), asked, seed)

    run.run_stage(cell / "train", "train", work, sparsity=sparsity, seed=seed)


def finetune(run: RunDirectory) -> None:
  """Writes schedule and router of every cell after the rounds of fine-tuning; without any, those that there were."""
  c = run.config
  for sparsity, seed in run.cells:
    cell = run.cell(sparsity, seed)

    def work(directory):
      distributed.on_first(lambda: artifact_lib.withdraw(cell / "artifact"))
      found, trained = run.schedule(cell / "search"), cell / "train"
      for r in range(c.finetune.rounds):
        _say(f"fine-tune: S={sparsity:.2f}, seed {seed}, round {r + 1} of {c.finetune.rounds}")
        here = directory / f"round{r}"
        if r:
          trained = here / "train"
          if not distributed.exists(trained / artifact_lib.WEIGHTS_FILE):
            before = directory / f"round{r - 1}" / "train" if r > 1 else cell / "train"
            weights = artifact_lib.load_weights(before / artifact_lib.WEIGHTS_FILE)
            fit(run, trained, weights, run.training_schedule(found, sparsity), seed + r)
        starts = [run.training_schedule(found, sparsity, share) for share in _FINETUNE_STARTS]
        units = [schedules.to_units(s, sparsity, c.search.grid, c.search.max_sparsity) for s in starts]
        seeds = np.unique(np.stack(units), axis=0)
        found = find_schedule(run, here, seeds, *run.load_trained(trained), c.finetune.generations, seed)
      distributed.on_first(lambda: schedules.save(directory / "schedule.json", found))
      final = artifact_lib.load_weights(trained / artifact_lib.WEIGHTS_FILE)
      save_weights(final, directory / artifact_lib.WEIGHTS_FILE)

    run.run_stage(cell / "finetune", "finetune", work, sparsity=sparsity, seed=seed)


def find_schedule(
    run: RunDirectory, directory, seeds_units, router: routers.Router, model: Frozen, generations: int, seed: int
) -> np.ndarray:
  """Runs the search with one router, and leaves `schedule.json`; the sparsities (L,)."""
  batch = run.config.search.batch
  validation, judge = (run.judge(split, batch, model) for split in ("validation", "search"))
  result = run_search(
      directory=str(directory),
      seeds_units=seeds_units,
      settings=run.search_settings,
      key_seed=seed,
      fitness=lambda candidates: judge.kl(router, candidates),
      validate=lambda candidates: [validation.kl(router, row[None])[0] for row in candidates],
      num_generations=generations,
  )
  found = schedules.to_sparsity(result.units, run.search_settings.grid)
  distributed.on_first(lambda: schedules.save(directory / "schedule.json", found))
  return found


def new_router(run: RunDirectory, seed: int) -> Any:
  """Parameters of a router that has learned nothing yet."""
  model = run.frozen.config
  return routers.init_router(run.router_config, jax.random.key(seed), model.num_blocks, model.hidden_size)


def allotted_schedule(run: RunDirectory, sparsity: float, seed: int) -> np.ndarray:
  """Units (L,) where routers lose least that were warmed up in the Fisher schedule, each on half of the prompts."""
  s, blocks = run.config.search, run.frozen.config.num_blocks
  after_plan = np.arange(blocks) >= max(run.routing.one_pass_block, 0)
  units = np.maximum(run.named_schedule("fisher", sparsity), after_plan)  # blocks asked nothing would have no router
  asked = schedules.to_sparsity(units, s.grid)
  sparsities = np.arange(schedules.max_units(s.grid, s.max_sparsity) + 1) / s.grid
  rows = np.arange(len(run.guide_data.context_N))
  losses = []
  for half in (0, 1):
    router = warm_up(run, new_router(run, seed), asked, seed, rows[rows % 2 == half])
    losses.append(allotment.expected_loss(
        run.router_config, run.routing, router, run.guide_data, run.fisher, asked, sparsities, rows[rows % 2 != half],
        run.config.train.batch, run.frozen.params,
    ))
  total = schedules.total_units(sparsity, blocks, s.grid, s.max_sparsity)
  found = allotment.allot(np.mean(losses, axis=0), total)
  if run.routing.trains_continuation:
    guide.share_of_new_tokens(found, run.routing.decode_sparsity)
  return found


def warm_up(run: RunDirectory, router: Any, schedule: np.ndarray, seed: int, rows: np.ndarray | None = None) -> Any:
  """A router after the guided warm-up, on some prompts of `guide_data` or on all."""
  c = run.config.train
  settings = guide.WarmupSettings(c.warmup_guide_steps, c.batch, c.warmup_guide_learning_rate, c.guide_stakes)
  bar = functools.partial(tqdm.tqdm, desc="guided warm-up")
  scores = run.training_scores(schedule)[:, : len(run.guide_data.context_N)]
  return guide.warm_up(
      run.router_config, run.routing, settings, router, run.guide_data._replace(fisher_LxNxT=scores), schedule, seed,
      bar, run.frozen.params, run.config.model.remat, rows,
  )[0]


def fit(run: RunDirectory, directory: pathlib.Path, weights: Any, schedule: np.ndarray, seed: int) -> None:
  """Trains a router, and maps that are beside it, with the three losses and writes them to `directory`."""
  c = run.config
  if run.routing.trains_continuation:
    guide.share_of_new_tokens(schedule, run.routing.decode_sparsity)

  def validate(weights: Any) -> float:
    router, model = run.trained(weights)
    return float(run.judge("validation", c.search.batch, model).kl(router, schedule[None])[0])

  skipping = np.flatnonzero(schedule > 0)
  spec = StepSpec(
      run.frozen.config, run.routing, run.router_config, run.train_settings, run.num_scored,
      start=int(skipping[0]) if len(skipping) else 0, dtype=run.frozen.dtype, remat=c.model.remat,
  )
  result = train_router(
      directory=str(directory), spec=spec, params=run.frozen.params, router_params=weights,
      prompts=run.prompts("train"),
      fisher_LxNxT=run.training_scores(schedule) if c.train.guide == "fisher" else None,
      schedule_L=schedule, batch_size=c.train.batch, seed=seed,
      validate=validate, validate_every=c.train.validate_every, checkpoint_every=c.train.checkpoint_every,
      length_buckets=c.data.length_buckets,
  )
  save_weights(result.router, directory / artifact_lib.WEIGHTS_FILE)


def _say(text: str) -> None:
  if distributed.is_first():
    print(text, file=sys.stderr, flush=True)
