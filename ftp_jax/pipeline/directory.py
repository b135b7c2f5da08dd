"""One run directory: what its stages depend on, whether they may go on there, and what several of them need."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax import distributed, sharding
from ftp_jax import stages as stages_lib
from ftp_jax.config import get_config, needs_gate_scores
from ftp_jax.data.prompts import Prompts, take
from ftp_jax.errors import UserError, short_of_memory
from ftp_jax.evaluation.judge import Frozen, Judge
from ftp_jax.export import artifact as artifact_lib
from ftp_jax.models.decoder import abstract_params, param_shardings
from ftp_jax.models.sources import DTYPES, Model, describe, load_model
from ftp_jax.pipeline import checks
from ftp_jax.routing import routers, stand_in
from ftp_jax.routing.config import RouterConfig, RoutingConfig
from ftp_jax.search import schedule as schedules
from ftp_jax.search.genetic import SearchSettings
from ftp_jax.stages import check_order, flatten, load_arrays, read_json
from ftp_jax.training import guide
from ftp_jax.training.step import TrainSettings

STAGES = ("data", "importance", "search", "train", "finetune", "evaluate", "report")
STAND_IN, INITIAL = "stand_in.safetensors", "initial.safetensors"
_OF_CELLS = ("search", "train", "finetune", "evaluate")  # stages of each sparsity and seed


class RunDirectory:
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
            **(self.content("data.repeats_path", [self.workdir / "data"]) if c.data.num_repeats else {}),
        },
        "importance": {
            "model.dtype": c.model.dtype,
            "routing.kv_mode": c.routing.kv_mode,
            "stand_in": c.stand_in,
            "evaluation.redundancy_prompts": c.evaluation.redundancy_prompts,
            "train": {k: c.train[k] for k in ("fisher_draws", "batch")},
            "gate scores needed": needs_gate_scores(c),
        },
        "search": {
            "routing": c.routing,
            "search": c.search,
            **(self.warmup_settings() if c.search.schedule == "allotted" else {}),
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

  def warmup_settings(self) -> dict[str, Any]:
    """What routers depend on when their guided warm-up is done."""
    of_warmup = lambda key: key in ("guide", "guide_stakes", "batch") or key.startswith("warmup_guide")
    return {"router": self.config.router, "train": {k: v for k, v in self.config.train.items() if of_warmup(k)}}

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

  def check_files(self, stages: tuple[str, ...]) -> None:
    """Raises UserError if a file is missing that the stage `data` has still to read, before a model is fetched."""
    if "data" in stages and not (self.workdir / "data" / stages_lib.DONE).exists():
      checks.check_files(self.config)

  def check_memory(self, stages: tuple[str, ...]) -> None:
    """Raises UserError, in all processes, if a warm-up of routers that is still to come needs too much memory."""
    warms_up = {"train": INITIAL} | ({"search": stages_lib.DONE} if self.config.search.schedule == "allotted" else {})
    there = [
        distributed.exists(self.cell(*cell) / stage / name)
        for stage, name in warms_up.items() if stage in stages for cell in self.cells
    ]
    if not all(there):
      checks.check_memory(self.config, self.described[0].num_blocks, self.described[0].hidden_size)

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
    if self.config.search.schedule == "file":
      for cell in self.cells:
        if not (self.cell(*cell) / "search" / stages_lib.DONE).exists():
          self.schedule_file(cell[0], config.num_blocks)
    distributed.on_first(lambda: checks.check_model(self.workdir / "data" / "model.json", config, directory))
    checks.check_same_model(config, directory)
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
    return artifact_lib.load_weights(self.workdir / "importance" / STAND_IN) if self.config.stand_in.rank else None

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

  def drop_judges(self) -> None:
    """Frees what the judges made so far hold: on a mesh they keep their teachers on the devices."""
    self._judges.cache_clear()

  @functools.cached_property
  def fisher(self) -> np.ndarray:
    """Gate scores (L,N,T) of the training prompts."""
    return load_arrays(self.workdir / "importance" / "fisher.npz")["fisher_LxNxT"]

  @functools.cached_property
  def guide_scores(self) -> np.ndarray:
    """What the guide ranks the tokens of all training prompts by, (L,N,T)."""
    nested = self.router_config.kind == "global"  # one ranking; others rank the tokens anew for each block
    return guide.joint_scores(self.fisher, self.routing.one_pass_block) if nested else self.fisher

  def training_scores(self, schedule: np.ndarray) -> np.ndarray:
    """The gate scores of the training prompts as training takes them under a schedule."""
    train = self.prompts("train")
    if self.config.train.guide_stakes:  # otherwise only their order counts
      guide.check_scores(self.guide_scores)
    return guide.with_new_tokens(self.guide_scores, train.context, train.length, schedule, self.routing)

  @functools.cached_property
  def guide_data(self) -> guide.GuideData:
    """What routers read and should find in the prompts of the warm-up, collected on first use."""
    train = self.prompts("train")
    some = take(train, np.arange(min(self.config.train.warmup_guide_prompts, len(train.tokens))))
    with short_of_memory("lower train.warmup_guide_prompts"):
      score, hidden = guide.collect_inputs(
          self.frozen.config, self.routing, self.frozen.params, some, self.config.train.batch,
          with_hidden=self.router_config.hidden_states, dtype=self.frozen.dtype,
          length_buckets=self.config.data.length_buckets,
      )
    return guide.GuideData(some.context, some.length, score, hidden, self.guide_scores[:, : len(some.tokens)])

  def named_schedule(self, name: str, sparsity: float) -> np.ndarray:
    """One of SCHEDULES (but ga and allotted) on the grid, int32 units (L,)."""
    s, blocks = self.config.search, self.frozen.config.num_blocks
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
        "file": lambda: self.schedule_file(sparsity, blocks),
    }[name]()
    return schedules.to_units(real, sparsity, s.grid, s.max_sparsity, first)

  def schedule_file(self, sparsity: float, blocks: int) -> np.ndarray:
    s = self.config.search
    return checks.schedule_file(s.schedule_path, blocks, sparsity, s.grid, s.max_sparsity)

  def schedule(self, directory: pathlib.Path) -> np.ndarray:
    """What a stage found, (L,)."""
    try:
      found = schedules.from_file(directory / "schedule.json", self.frozen.config.num_blocks)
    except UserError as error:
      advice = "delete that folder and those of later stages, so that they run again"
      raise UserError(f"{directory} has no schedule that can be read; {advice}.") from error
    return found.astype(np.float32)

  def training_schedule(self, found: np.ndarray, sparsity: float, share: float | None = None) -> np.ndarray:
    """What training asks for, (L,): the found schedule, moved towards the Fisher schedule by a share.

    The static router's best schedules leave a dynamic one little to decide: blocks skip all or nothing. One that was
    allotted for dynamic routers is asked for as it is.
    """
    if share is None:
      share = 0.0 if self.config.search.schedule == "allotted" else self.config.train.fisher_share
    if self.config.train.guide != "fisher" or not share:
      return found
    fisher = schedules.to_sparsity(self.named_schedule("fisher", sparsity), self.config.search.grid)
    return (1 - share) * found + share * fisher

  def load_trained(self, directory: pathlib.Path) -> tuple[routers.Router, Frozen]:
    """A trained router, and the model with the maps that were trained with it, if any were."""
    return self.trained(artifact_lib.load_weights(directory / artifact_lib.WEIGHTS_FILE))

  def trained(self, weights: Any) -> tuple[routers.Router, Frozen]:
    """What training changes as the executions take it: see `load_trained`."""
    params, maps = stand_in.split(weights)
    router = routers.Router("dynamic", self.router_config, jax.tree.map(jnp.asarray, params))
    return router, self.frozen if maps is None else self.with_maps(maps)


def save_weights(weights: Any, path: pathlib.Path) -> None:
  """Writes what is trained, in the first process; the others wait, as they may read it."""
  distributed.on_first(lambda: artifact_lib.save_weights(jax.device_get(weights), path))
