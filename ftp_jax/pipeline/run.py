"""The pipeline: what each stage computes, from what, and where it leaves it.

    data        prompts of the four splits and the windows of the perplexity text
    importance  redundancy of the blocks, block influence, Fisher scores of the gates
    search      per S and seed: schedule found with the static router
    train       per S and seed: dynamic router
    finetune    per S and seed: schedule found with the trained router
    evaluate    every method on the test prompts; writes the artifacts with their figures
    report      tables and plots (ftp_jax.report)
"""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from ftp_jax import distributed, sharding
from ftp_jax import stages as stages_lib
from ftp_jax.config import get_config
from ftp_jax.data.prompts import Prompts, take
from ftp_jax.data.sources import load_splits
from ftp_jax.data.windows import perplexity_windows
from ftp_jax.errors import UserError
from ftp_jax.evaluation import methods, redundancy
from ftp_jax.evaluation.judge import Frozen, Judge
from ftp_jax.export import artifact as artifact_lib
from ftp_jax.machine import describe_machine
from ftp_jax.models.decoder import abstract_params, param_shardings
from ftp_jax.models.huggingface import fingerprint
from ftp_jax.models.sources import DTYPES, Model, describe, load_model
from ftp_jax.pipeline import checks
from ftp_jax.routing import routers, stand_in
from ftp_jax.routing.config import RouterConfig, RoutingConfig
from ftp_jax.search import schedule as schedules
from ftp_jax.search.genetic import SearchSettings
from ftp_jax.search.loop import run_search
from ftp_jax.stages import alone_in, check_order, flatten, load_arrays, read_json, save_arrays, write_json
from ftp_jax.training import guide
from ftp_jax.training import stand_in as stand_in_fit
from ftp_jax.training.loop import train_router
from ftp_jax.training.step import StepSpec, TrainSettings

STAGES = ("data", "importance", "search", "train", "finetune", "evaluate", "report")
_STAND_IN = "stand_in.safetensors"
_OF_CELLS = ("search", "train", "finetune", "evaluate")  # stages of each sparsity and seed
_FINETUNE_STARTS = (0.0, 0.25, 0.5, 0.75)  # shares of the Fisher schedule where fine-tuning starts
_MAPPED_PROMPTS = 4  # prompts whose kept tokens the report shows


def run(config: Any, workdir: str, stages: tuple[str, ...] = STAGES) -> None:
  """Runs the named stages of a config in `workdir`; finished ones are skipped.

  Raises:
    UserError: anything the user can mend, in one sentence.
  """
  pipeline = Pipeline(config, pathlib.Path(workdir))
  if stages == ("report",):
    if not pipeline.workdir.is_dir():
      raise UserError(f"{workdir} does not exist; give the --workdir of an evaluated run.")
    distributed.on_first(pipeline.check)
    pipeline.report()
    return
  # All processes meet where the devices are found.
  checks.check_alike(config, stages)
  checks.check_batches(config, sharding.batch_parts(pipeline.mesh))
  distributed.on_first(pipeline.check)
  with alone_in(pipeline.workdir):
    write_json(pipeline.workdir / "config.json", json.loads(config.to_json()))
    distributed.barrier()
    checks.check_shared(pipeline.workdir / "config.json")
    for stage in STAGES:
      if stage in stages:
        getattr(pipeline, stage)()


class Pipeline:
  """One run directory; what several stages need is made once, on first use."""

  def __init__(self, config: Any, workdir: pathlib.Path):
    self.config, self.workdir = config, workdir
    self.prompts, self._judges = functools.cache(self._prompts), functools.cache(self._judge)
    checks.check_config(config)
    self.defaults = flatten(get_config())
    self.routing = RoutingConfig(**config.routing)
    self.router_config = RouterConfig.from_config(config.router)
    self.search_settings = SearchSettings.from_config(config.search)
    self.train_settings = TrainSettings.from_config(config.train)
    self.num_scored = config.data.continuation
    self.needs_fisher = (
        config.train.guide == "fisher" or config.search.schedule == "fisher" or "fisher" in config.search.seed_schedules
    )

  # --- what stages depend on -------------------------------------------------------------------

  def settings(self, stage: str) -> dict[str, Any]:
    """Flat settings that decide a stage's result, those of the stages before it included."""
    c = self.config
    own = {
        "data": {
            "model.source": c.model.source,
            "data": c.data,
            "evaluation": {k: v for k, v in c.evaluation.items() if k.startswith("perplexity")},
            **self.content("data.path", [self.workdir / "data"]),
            **self.content("evaluation.perplexity_path", [self.workdir / "data"]),
        },
        "importance": {
            "model.dtype": c.model.dtype,
            "routing.kv_mode": c.routing.kv_mode,
            "stand_in": c.stand_in,
            "evaluation.redundancy_prompts": c.evaluation.redundancy_prompts,
            "train": {k: c.train[k] for k in ("fisher_draws", "batch")},
            "gate scores needed": self.needs_fisher,
        },
        "search": {
            "routing": c.routing,
            "search": c.search,
            **self.content("search.schedule_path", [self.cell(*cell) / "search" for cell in self.cells]),
        },
        "train": {"router": c.router, "train": {k: v for k, v in c.train.items() if k != "checkpoint_every"}},
        "finetune": {"finetune": c.finetune},
        "evaluate": {"evaluation": c.evaluation},
    }
    merged: dict[str, Any] = {}
    for name in STAGES[: STAGES.index(stage) + 1]:
      merged |= flatten(own[name])
    return merged

  def content(self, key: str, readers: Sequence[pathlib.Path]) -> dict[str, str]:
    """Hash of the file that a config key names; where it is out of sight, as a stage of `readers` that is done has it.

    A stage that is not done will need the file and say so.
    """
    section, name = key.split(".")
    named, found = f"content of {key}", checks.digest(self.config[section][name])
    if not found:
      done = (stage for stage in readers if (stage / stages_lib.DONE).exists())
      found = next((read_json(stage / stages_lib.SETTINGS).get(named, "") for stage in done), "")
    return {named: found}

  def run_stage(
      self, directory: pathlib.Path, stage: str, work: Callable[[pathlib.Path], None], **own: float | int
  ) -> None:
    """`stages.run_stage` of a stage, or of one S or cell of it, which `own` names."""
    stages_lib.run_stage(directory, lambda: self.settings(stage) | own, work, self.defaults)

  def check(self) -> None:
    """Raises UserError if any stage that exists was begun with other settings, before anything is written."""
    checks.check_workdir(self.workdir)
    check_stage = functools.partial(stages_lib.check_stage, defaults=self.defaults)
    shared = [self.workdir / stage for stage in ("data", "importance")]
    for directory in shared:
      check_stage(directory, self.settings(directory.name))
    for sparsity, seed in self.cells:
      own = [self.cell(sparsity, seed) / stage for stage in _OF_CELLS]
      for directory in own:
        check_stage(directory, self.settings(directory.name) | {"sparsity": sparsity, "seed": seed})
      check_order([*shared, *own])
    for sparsity in (0.0, *self.config.sparsities):
      directory = self.workdir / "evaluate" / f"S{sparsity:.2f}"
      check_stage(directory, self.settings("evaluate") | {"sparsity": sparsity})
      check_order([*shared, directory])

  def cell(self, sparsity: float, seed: int) -> pathlib.Path:
    return self.workdir / f"S{sparsity:.2f}" / f"seed{seed}"

  @property
  def cells(self):
    return [(sparsity, seed) for sparsity in self.config.sparsities for seed in self.config.seeds]

  # --- shared by stages --------------------------------------------------------------------------

  @functools.cached_property
  def described(self) -> tuple[Any, Any, pathlib.Path]:
    """Architecture, tokenizer and directory of the model, which fits the config and the run directory."""
    config, _, directory = found = describe(self.config.model.source)
    self.routing.check_blocks(config.num_blocks)
    checks.check_plan(self.config, config.num_blocks)
    checks.check_rank(self.config, config.hidden_size)
    distributed.on_first(lambda: checks.check_weights(self.workdir / "data" / "model.json", directory))
    return found

  @functools.cached_property
  def model(self) -> Model:
    self.described  # what is wrong with it shows before its weights are read
    mesh = self.mesh
    if mesh is None:
      return load_model(self.config.model.source, self.config.model.dtype)

    def shardings(config):  # known before anything is read
      placed = param_shardings(mesh, config)
      abstract = abstract_params(config, DTYPES[self.config.model.dtype])
      sharding.check_replication(abstract, placed, self.config.mesh.replicated_mib * 2**20)
      return placed

    return load_model(self.config.model.source, self.config.model.dtype, shardings)

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh | None:
    """The mesh of this run; None on a single device."""
    sizes = self.config.mesh
    mesh = sharding.make_mesh(sizes.data, sizes.fsdp, sizes.tensor)
    return mesh if mesh.size > 1 else None

  @functools.cached_property
  def dense(self) -> Frozen:
    return Frozen(self.model.config, self.model.params, DTYPES[self.config.model.dtype])

  @functools.cached_property
  def stand_in(self) -> Any:
    """The maps of `routing.stand_in`, on the host; None without."""
    return artifact_lib.load_weights(self.workdir / "importance" / _STAND_IN) if self.config.stand_in.rank else None

  @functools.cached_property
  def frozen(self) -> Frozen:
    """The dense model, with the maps that stand in for skipped blocks where there are any, as they were fitted."""
    return self.with_maps(self.stand_in)

  def with_maps(self, maps: Any) -> Frozen:
    """The dense model with maps for skipped blocks, None for none."""
    placed = sharding.place(self.dense.params, jax.tree.map(jnp.asarray, maps))
    return dataclasses.replace(self.dense, params=stand_in.attach(self.dense.params, placed))

  def _prompts(self, split: str) -> Prompts:
    return Prompts(**load_arrays(self.workdir / "data" / f"{split}.npz"))

  def _judge(self, split: str, batch: int) -> Judge:
    prompts, buckets = self.prompts(split), self.config.data.length_buckets
    return Judge(self.dense, self.routing, prompts, batch, self.num_scored, buckets)

  def judge(self, split: str, batch: int, model: Frozen | None = None) -> Judge:
    """Of a set of prompts; `model`: with other maps for skipped blocks than those that were fitted."""
    return self._judges(split, batch).of(self.frozen if model is None else model)

  @functools.cached_property
  def fisher(self) -> np.ndarray:
    return load_arrays(self.workdir / "importance" / "fisher.npz")["fisher_LxNxT"]

  @functools.cached_property
  def guide_scores(self) -> np.ndarray:
    nested = self.router_config.kind == "global"  # one ranking; others rank the tokens anew for each block
    return guide.joint_scores(self.fisher, self.routing.one_pass_block) if nested else self.fisher

  @functools.cached_property
  def guide_data(self) -> guide.GuideData:
    train = self.prompts("train")
    some = take(train, np.arange(min(self.config.train.warmup_guide_prompts, len(train.tokens))))
    score, hidden = guide.collect_inputs(
        self.frozen.config, self.routing, self.frozen.params, some, self.config.train.batch,
        with_hidden=self.router_config.hidden_states, dtype=self.frozen.dtype,
        length_buckets=self.config.data.length_buckets,
    )
    return guide.GuideData(some.context, score, hidden, self.guide_scores[:, : len(some.tokens)])

  def named_schedule(self, name: str, sparsity: float) -> np.ndarray:
    """One of SCHEDULES (but ga) on the grid, int32 units (L,)."""
    s, blocks = self.config.search, self.frozen.config.num_blocks
    schedules.total_units(sparsity, blocks, s.grid, s.max_sparsity)
    largest = schedules.max_units(s.grid, s.max_sparsity) / s.grid
    first = max(self.routing.one_pass_block, 0) if name == "fisher" else 0
    real = {
        "uniform": lambda: schedules.uniform(blocks, sparsity),
        "middle": lambda: schedules.middle(blocks, sparsity, largest),
        "late": lambda: schedules.late(blocks, sparsity, largest),
        "influence": lambda: schedules.from_importance(
            read_json(self.workdir / "importance" / "influence.json"), sparsity, largest
        ),
        "fisher": lambda: guide.fisher_schedule(self.fisher, self.prompts("train").context, sparsity, first),
        "file": lambda: checks.schedule_file(s.schedule_path, blocks, sparsity, s.grid),
    }[name]()
    return schedules.to_units(real, sparsity, s.grid, s.max_sparsity, first)

  def find_schedule(
      self, directory, seeds_units, router: routers.Router, model: Frozen, generations: int, seed: int
  ) -> np.ndarray:
    """Runs the search with one router, and leaves `schedule.json`; the sparsities (L,)."""
    batch = self.config.search.batch
    validation, judge = (self.judge(split, batch, model) for split in ("validation", "search"))
    result = run_search(
        directory=str(directory),
        seeds_units=seeds_units,
        settings=self.search_settings,
        key_seed=seed,
        fitness=lambda candidates: judge.kl(router, candidates),
        validate=lambda candidates: [validation.kl(router, row[None])[0] for row in candidates],
        num_generations=generations,
    )
    found = schedules.to_sparsity(result.units, self.search_settings.grid)
    distributed.on_first(lambda: schedules.save(directory / "schedule.json", found))
    return found

  def schedule(self, directory: pathlib.Path) -> np.ndarray:
    return schedules.from_file(directory / "schedule.json", self.frozen.config.num_blocks).astype(np.float32)

  def load_trained(self, directory: pathlib.Path) -> tuple[routers.Router, Frozen]:
    """A trained router, and the model with the maps that were trained with it, if any were."""
    return self.trained(artifact_lib.load_weights(directory / artifact_lib.WEIGHTS_FILE))

  def trained(self, weights: Any) -> tuple[routers.Router, Frozen]:
    """What training changes as the executions take it: see `load_trained`."""
    params, maps = stand_in.split(weights)
    router = routers.Router("dynamic", self.router_config, jax.tree.map(jnp.asarray, params))
    return router, self.frozen if maps is None else self.with_maps(maps)

  # --- stages ------------------------------------------------------------------------------------

  def data(self) -> None:
    c = self.config

    def work(directory):
      model = self.described  # in every process; the first alone reads and writes prompts, and none reads weights
      distributed.on_first(lambda: write_prompts(*model, directory))

    def write_prompts(config, tokenizer, source, directory):
      positions = config.max_positions
      for what, longest in (
          ("data.max_context + data.continuation", c.data.max_context + c.data.continuation),
          ("evaluation.perplexity_length", c.evaluation.perplexity_length),
      ):
        if longest > positions:
          raise UserError(f"{what} = {longest} exceeds the model's {positions} positions; lower it.")
      windows = perplexity_windows(
          c.evaluation.perplexity_path, tokenizer, c.evaluation.perplexity_windows,
          c.evaluation.perplexity_length,
      )
      for split, prompts in load_splits(c.data, tokenizer).items():
        save_arrays(directory / f"{split}.npz", **prompts._asdict())
      save_arrays(directory / "windows.npz", **windows._asdict())
      write_json(directory / "model.json", {"fingerprint": fingerprint(source)})

    self.run_stage(self.workdir / "data", "data", work)

  def importance(self) -> None:
    def kept(directory: pathlib.Path, i: int, make: Callable[[], np.ndarray]) -> np.ndarray:
      path = directory / f"batch{i}.npz"
      if not _exists(path):
        save_arrays(path, fisher_LxBxT=make())
        distributed.barrier()
      return load_arrays(path)["fisher_LxBxT"]

    def work(directory):
      train = self.prompts("train")
      some = take(train, np.arange(min(self.config.evaluation.redundancy_prompts, len(train.tokens))))
      similarity = redundancy.token_similarity(self.dense, some, self.config.evaluation.batch)
      write_json(directory / "redundancy.json", redundancy.summary(similarity, some))
      write_json(directory / "influence.json", redundancy.block_influence(similarity).tolist())
      if self.config.stand_in.rank and not _exists(directory / _STAND_IN):
        self.fit_stand_in(directory / _STAND_IN)
      if self.needs_fisher:
        routing = RoutingConfig(self.routing.kv_mode)  # evict_from aside: one set of scores serves all of them
        fisher = guide.collect_fisher(
            self.frozen.config, routing, self.frozen.params, self.prompts("train"), self.config.train.batch,
            self.config.data.seed, num_scored=self.num_scored, draws=self.config.train.fisher_draws,
            dtype=self.frozen.dtype, remat_policy=self.config.model.remat,
            length_buckets=self.config.data.length_buckets,
            progress=functools.partial(tqdm.tqdm, desc="fisher scores"), keep=functools.partial(kept, directory),
        )
        valid = np.arange(fisher.shape[-1])[None] < self.prompts("train").context[:, None]
        write_json(directory / "fisher.json", fisher[:, valid].mean(axis=1).tolist())
        save_arrays(directory / "fisher.npz", fisher_LxNxT=fisher)

    here = self.workdir / "importance"
    self.run_stage(here, "importance", work)
    distributed.on_first(lambda: [path.unlink() for path in here.glob("batch*.npz")])

  def fit_stand_in(self, path: pathlib.Path) -> None:
    c = self.config
    maps = stand_in_fit.fit(
        self.dense.config, self.dense.params, self.prompts("train"), c.train.batch, rank=c.stand_in.rank,
        ridge=c.stand_in.ridge, dtype=self.dense.dtype, length_buckets=c.data.length_buckets,
        progress=functools.partial(tqdm.tqdm, desc="maps for skipped blocks"),
    )
    save_weights(maps, path)

  def search(self) -> None:
    c = self.config.search
    for sparsity, seed in self.cells:

      def work(directory):
        _say(f"search: S={sparsity:.2f}, seed {seed}")
        distributed.on_first(lambda: withdraw(self.cell(sparsity, seed) / "artifact"))
        if c.schedule != "ga":
          units = self.named_schedule(c.schedule, sparsity)
          found = schedules.to_sparsity(units, c.grid)
          distributed.on_first(lambda: schedules.save(directory / "schedule.json", found))
          return
        seeds = np.stack([self.named_schedule(name, sparsity) for name in c.seed_schedules])
        self.find_schedule(directory, seeds, routers.STATIC, self.frozen, c.generations, seed)

      self.run_stage(self.cell(sparsity, seed) / "search", "search", work, sparsity=sparsity, seed=seed)

  def train(self) -> None:
    for sparsity, seed in self.cells:
      cell = self.cell(sparsity, seed)

      def work(directory):
        _say(f"train: S={sparsity:.2f}, seed {seed}")
        distributed.on_first(lambda: withdraw(cell / "artifact"))
        asked = self.training_schedule(self.schedule(cell / "search"), sparsity)
        # Kept, because a resumed training must start from the very same numbers, on any hardware.
        initial = directory / "initial.safetensors"
        if not _exists(initial):
          router = routers.init_router(
              self.router_config, jax.random.key(seed), self.frozen.config.num_blocks, self.frozen.config.hidden_size
          )
          if self.config.train.guide == "fisher" and self.config.train.warmup_guide_steps:
            router = self.warm_up(router, asked, seed)
          save_weights(router, initial)
        weights = artifact_lib.load_weights(initial)
        maps = self.stand_in if self.config.train.stand_in_learning_rate else None
        self.fit(directory, stand_in.join(weights, maps), asked, seed)

      self.run_stage(cell / "train", "train", work, sparsity=sparsity, seed=seed)

  def training_schedule(self, found: np.ndarray, sparsity: float, share: float | None = None) -> np.ndarray:
    """What training asks for, (L,): the found schedule, moved towards the Fisher schedule by a share.

    The static router's best schedules leave a dynamic one little to decide: blocks skip all or nothing.
    """
    share = self.config.train.fisher_share if share is None else share
    if self.config.train.guide != "fisher" or not share:
      return found
    fisher = schedules.to_sparsity(self.named_schedule("fisher", sparsity), self.config.search.grid)
    return (1 - share) * found + share * fisher

  def warm_up(self, router: Any, schedule: np.ndarray, seed: int) -> Any:
    c = self.config.train
    settings = guide.WarmupSettings(c.warmup_guide_steps, c.batch, c.warmup_guide_learning_rate)
    bar = functools.partial(tqdm.tqdm, desc="guided warm-up")
    return guide.warm_up(
        self.router_config, self.routing, settings, router, self.guide_data, schedule, seed, bar, self.frozen.params,
        self.config.model.remat,
    )[0]

  def fit(self, directory: pathlib.Path, weights: Any, schedule: np.ndarray, seed: int) -> None:
    """Trains a router, and maps that are beside it, with the three losses and writes them to `directory`."""
    c = self.config

    def validate(weights: Any) -> float:
      router, model = self.trained(weights)
      return float(self.judge("validation", c.search.batch, model).kl(router, schedule[None])[0])

    skipping = np.flatnonzero(schedule > 0)
    spec = StepSpec(
        self.frozen.config, self.routing, self.router_config, self.train_settings, self.num_scored,
        start=int(skipping[0]) if len(skipping) else 0, dtype=self.frozen.dtype, remat=c.model.remat,
    )
    result = train_router(
        directory=str(directory), spec=spec, params=self.frozen.params, router_params=weights,
        prompts=self.prompts("train"),
        fisher_LxNxT=self.guide_scores if c.train.guide == "fisher" else None,
        schedule_L=schedule, batch_size=c.train.batch, seed=seed,
        validate=validate, validate_every=c.train.validate_every, checkpoint_every=c.train.checkpoint_every,
        length_buckets=c.data.length_buckets,
    )
    save_weights(result.router, directory / artifact_lib.WEIGHTS_FILE)

  def finetune(self) -> None:
    c = self.config
    for sparsity, seed in self.cells:
      cell = self.cell(sparsity, seed)

      def work(directory):
        distributed.on_first(lambda: withdraw(cell / "artifact"))
        found, trained = self.schedule(cell / "search"), cell / "train"
        for r in range(c.finetune.rounds):
          _say(f"fine-tune: S={sparsity:.2f}, seed {seed}, round {r + 1} of {c.finetune.rounds}")
          here = directory / f"round{r}"
          if r:
            trained = here / "train"
            if not _exists(trained / artifact_lib.WEIGHTS_FILE):
              before = directory / f"round{r - 1}" / "train" if r > 1 else cell / "train"
              weights = artifact_lib.load_weights(before / artifact_lib.WEIGHTS_FILE)
              self.fit(trained, weights, self.training_schedule(found, sparsity), seed + r)
          starts = [self.training_schedule(found, sparsity, share) for share in _FINETUNE_STARTS]
          units = [schedules.to_units(s, sparsity, c.search.grid, c.search.max_sparsity) for s in starts]
          seeds = np.unique(np.stack(units), axis=0)
          found = self.find_schedule(here, seeds, *self.load_trained(trained), c.finetune.generations, seed)
        distributed.on_first(lambda: schedules.save(directory / "schedule.json", found))
        final = artifact_lib.load_weights(trained / artifact_lib.WEIGHTS_FILE)
        save_weights(final, directory / artifact_lib.WEIGHTS_FILE)

      self.run_stage(cell / "finetune", "finetune", work, sparsity=sparsity, seed=seed)

  def evaluate(self) -> None:
    self._judges.cache_clear()  # on a mesh the judges of the stages before keep their teachers on the devices
    c = self.config

    def bench(model: Frozen) -> methods.Bench:
      judge = self.judge("test", c.evaluation.batch, model)
      return methods.Bench(judge, self.prompts("windows"), c.evaluation.batch)

    records = []
    for asked in tqdm.tqdm((0.0, *c.sparsities), desc="evaluate dense, truncation, static + uniform"):

      def shared(directory):
        plain = bench(self.dense)  # what other methods skip has no map that stands in for it
        rows = [plain.truncation(asked), plain.static_uniform(asked)] if asked else [plain.dense()]
        write_json(self.workdir / "evaluate" / "machine.json", describe_machine())
        write_json(directory / "records.json", rows)

      here = self.workdir / "evaluate" / f"S{asked:.2f}"
      self.run_stage(here, "evaluate", shared, sparsity=asked)
      records += read_json(here / "records.json")
    for sparsity, seed in tqdm.tqdm(self.cells, desc="evaluate cells"):
      cell = self.cell(sparsity, seed)

      def work(directory):
        found, tuned = self.schedule(cell / "search"), self.schedule(cell / "finetune")
        (first, of_first), (final, model) = map(self.load_trained, (cell / "train", cell / "finetune"))
        rows = [
            bench(self.dense).random(sparsity, seed),
            bench(self.frozen).routed("static_ga", sparsity, seed, routers.STATIC, found),
            bench(of_first).routed("dynamic_ga", sparsity, seed, first, found),
        ]
        if c.finetune.rounds:
          rows.append(bench(model).routed("dynamic_finetuned", sparsity, seed, final, tuned))
        for row in rows[1:]:
          row["schedule"] = c.search.schedule
        write_json(self.workdir / "evaluate" / "machine.json", describe_machine())
        write_json(directory / "records.json", rows)
        write_json(directory / "routes.json", self.route_maps(final, model, tuned))
        maps = model.params["blocks"].get(stand_in.NAME)
        self.write_artifact(cell / "artifact", final, maps, tuned, rows[-1])

      self.run_stage(cell / "evaluate", "evaluate", work, sparsity=sparsity, seed=seed)
      records += read_json(cell / "evaluate" / "records.json")
    write_json(self.workdir / "evaluate" / "records.json", records)

  def route_maps(self, router: routers.Router, model: Frozen, schedule: np.ndarray) -> dict[str, Any]:
    """Kept tokens of the first few test prompts."""
    judge = self.judge("test", self.config.evaluation.batch, model)
    keep, prompts = judge.quality(router, schedule).keep_LxNxT, []
    for n in range(min(_MAPPED_PROMPTS, len(judge.prompts.tokens))):
      m = int(judge.prompts.context[n])
      tokens = [self.model.tokenizer.decode([t]) for t in judge.prompts.tokens[n, :m]]
      prompts.append({"tokens": tokens, "context": m, "keep": keep[:, n, :m].astype(int).tolist()})
    return {"prompts": prompts}

  def write_artifact(
      self, directory, router: routers.Router, maps: Any, schedule: np.ndarray, record: dict[str, Any]
  ) -> None:
    made = artifact_lib.Artifact(
        base_model=self.config.model.source,
        fingerprint=fingerprint(self.model.directory),
        family=self.model.config.family,
        schedule=tuple(float(str(s)) for s in schedule),
        routing=self.routing,
        router=self.router_config,
        params=jax.device_get(router.params),
        figures=record,
        stand_in=jax.device_get(maps),
    )

    def write():
      before = _loaded(directory)
      same = before is not None and before.digest == made.digest
      withdraw(directory)
      artifact_lib.save(dataclasses.replace(made, crossover=before.crossover) if same else made, directory)

    distributed.on_first(write)

  def report(self) -> None:
    from ftp_jax.report import write_report  # matplotlib loads slowly, and only this stage needs it

    distributed.on_first(lambda: print(write_report(str(self.workdir), self.config)))


def _loaded(artifact: pathlib.Path) -> artifact_lib.Artifact | None:
  """The artifact; None where there is none that can be read."""
  try:
    return artifact_lib.load(artifact)
  except UserError:
    return None


def withdraw(artifact: pathlib.Path) -> None:
  """Makes an artifact of an earlier state of the run unloadable."""
  (artifact / artifact_lib.CONFIG_FILE).unlink(missing_ok=True)


def save_weights(router: Any, path: pathlib.Path) -> None:
  """Writes a router's parameters, in the first process; the others wait, as they may read them."""
  distributed.on_first(lambda: artifact_lib.save_weights(jax.device_get(router), path))


def _exists(path: pathlib.Path) -> bool:
  """Whether the first process sees a file: what all of them act upon."""
  return distributed.from_first(lambda: b"yes" if path.exists() else b"") == b"yes"


def _say(text: str) -> None:
  if distributed.is_first():
    print(text, file=sys.stderr, flush=True)
