"""What a config may ask for, checked before any work begins."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import socket
from typing import Any

import numpy as np

from ftp_jax import __version__, distributed
from ftp_jax.config import get_config
from ftp_jax.data.records import check_file, check_source
from ftp_jax.data.sources import check_lengths
from ftp_jax.data.windows import check_windows
from ftp_jax.errors import UserError
from ftp_jax.models.config import ModelConfig
from ftp_jax.models.decoder import REMAT
from ftp_jax.models.huggingface import fingerprint
from ftp_jax.models.sources import DTYPES
from ftp_jax.routing.config import RoutingConfig
from ftp_jax.search import schedule as schedules
from ftp_jax.stages import flatten, read_json

SCHEDULES = ("ga", "uniform", "middle", "late", "influence", "fisher", "allotted", "file")
_AT_LEAST = {
    1: (
        "data.num_search", "data.num_train", "data.num_validation", "data.num_test", "search.batch", "train.batch",
        "train.fisher_draws", "train.warmup_guide_prompts", "evaluation.batch", "evaluation.redundancy_prompts",
        "train.validate_every", "train.checkpoint_every",
    ),
    0: (
        "train.warmup", "train.warmup_guide_steps", "search.generations", "finetune.rounds", "finetune.generations",
        "data.seed", "train.distill_weight", "train.sparsity_weight", "train.guide_weight",
        "train.warmup_guide_learning_rate",
    ),
}


def check_config(config) -> None:
  """Raises UserError for a value that no stage could work with."""
  _check_values(config)
  _check_cells(config)
  _check_search(config)
  check_lengths(config.data)
  check_windows(config.evaluation.perplexity_windows, config.evaluation.perplexity_length)
  _check_routing(config)
  _check_train(config)
  if config.data.chat and config.data.source in ("embedded", "text"):
    raise UserError("data.chat=True needs prompts; set data.source='prompts' or 'hub', or data.chat=False.")


def _check_values(config) -> None:
  """Numbers that are there, finite and large enough, and names that are known."""
  known, found = flatten(get_config()), flatten(config)
  for name in known:
    if found.get(name) is None or found[name] != found[name]:
      raise UserError(f"The config has {name}={found.get(name)!r}; give it a value, such as {known[name]!r}.")
    if isinstance(found[name], float) and math.isinf(found[name]) and name != "train.clip":  # there: no clipping
      raise UserError(f"{name}={found[name]} is no finite number; give it one, such as {known[name]!r}.")
  for name, value, allowed in (
      ("search.schedule", config.search.schedule, SCHEDULES),
      ("model.dtype", config.model.dtype, tuple(DTYPES)),
      ("model.remat", config.model.remat, REMAT),
  ):
    if value not in allowed:
      raise UserError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}.")
  for least, names in _AT_LEAST.items():
    for name in names:
      section, key = name.split(".")
      if config[section][key] < least:
        raise UserError(f"{name}={config[section][key]} must be at least {least}.")
  if config.data.seed >= 2**32:
    raise UserError(f"data.seed={config.data.seed} must be less than 2**32.")


def _check_cells(config) -> None:
  """Sparsities and seeds."""
  if not config.sparsities or not config.seeds:
    raise UserError("The run has nothing to do: give at least one of config.sparsities and of config.seeds.")
  for seed in config.seeds:
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
      raise UserError(f"seeds={tuple(config.seeds)} must be whole numbers from 0 to 2**32 - 1.")
  largest = schedules.max_units(config.search.grid, config.search.max_sparsity) / config.search.grid
  for sparsity in config.sparsities:
    if not isinstance(sparsity, float) or not 0.005 <= sparsity <= largest:
      raise UserError(
          f"Sparsity {sparsity!r} is out of reach: choose numbers from 0.005 to {largest:g}, the largest that "
          f"search.max_sparsity={config.search.max_sparsity} allows."
      )
  folders = [{f"{s:.2f}" for s in config.sparsities}, set(config.seeds)]
  if [len(names) for names in folders] != [len(config.sparsities), len(config.seeds)]:
    raise UserError("config.sparsities must differ in their first two decimals, and config.seeds from each other.")


def _check_search(config) -> None:
  """What the search starts from and leaves to train for."""
  starts = [name for name in SCHEDULES if name not in ("ga", "allotted", "file")]
  if not config.search.seed_schedules or any(name not in starts for name in config.search.seed_schedules):
    raise UserError(f"search.seed_schedules must name one or more of {', '.join(starts)}.")
  t = config.train
  warmed = min(t.warmup_guide_prompts, _trained(config.data)) if t.guide == "fisher" and t.warmup_guide_steps else 0
  if config.search.schedule == "allotted" and warmed < 2:
    raise UserError(
        "search.schedule='allotted' judges routers after their guided warm-up; set train.guide='fisher', "
        "train.warmup_guide_steps above 0, and train.warmup_guide_prompts and data.num_train to at least 2."
    )
  if config.finetune.rounds == 0 and t.guide == "fisher":
    if t.fisher_share and config.search.schedule not in ("fisher", "allotted"):
      raise UserError(
          "finetune.rounds=0 would keep a schedule that the router is not trained for; set train.fisher_share=0, "
          "search.schedule='fisher' or finetune.rounds=1."
      )


def _check_routing(config) -> None:
  """What a run can train and measure of its routes."""
  r = RoutingConfig(**config.routing)
  if r.selection == "topk" and r.bucket_multiple >= config.data.max_context:
    raise UserError(
        f"routing.bucket_multiple={r.bucket_multiple} rounds what contexts of at most data.max_context="
        f"{config.data.max_context} tokens keep up to all of them, so that nothing skips; choose a smaller one."
    )
  if r.trains_continuation and config.data.continuation < 2:
    raise UserError(
        "data.continuation=1 leaves no new token that routing.decode_sparsity could train; raise it, or set "
        "routing.decode_sparsity=0."
    )
  if r.trains_continuation and r.decode_threshold != 0.5:
    raise UserError(
        f"routing.decode_threshold={r.decode_threshold:g} is not what new tokens are trained for, 0.5; keep that here "
        "and give another one to what runs the artifact."
    )


def _check_train(config) -> None:
  """Maps, and the schedule that training moves towards."""
  if config.stand_in.rank < 0 or config.stand_in.ridge <= 0:
    raise UserError(
        f"stand_in.rank={config.stand_in.rank} must be at least 0, and stand_in.ridge={config.stand_in.ridge} positive."
    )
  if config.train.stand_in_learning_rate and not config.stand_in.rank:
    raise UserError(
        f"train.stand_in_learning_rate={config.train.stand_in_learning_rate} has no maps to train; set stand_in.rank, "
        "or leave it at 0."
    )
  if not 0 <= config.train.fisher_share <= 1:
    raise UserError(f"train.fisher_share={config.train.fisher_share} must lie between 0 and 1.")


def _trained(data) -> int:
  return data.num_train + data.num_repeats


def check_plan(config, num_blocks: int) -> None:
  """Raises UserError where no schedule on the grid has an S, or that of a plan would need blocks before it."""
  s, first = config.search, config.routing.one_pass_block
  scored = s.schedule in ("fisher", "allotted")  # made of gate scores
  most = (num_blocks - max(first, 0)) * schedules.max_units(s.grid, s.max_sparsity)
  for sparsity in config.sparsities:
    units = schedules.total_units(sparsity, num_blocks, s.grid, s.max_sparsity)
    if not units:
      raise UserError(
          f"Sparsity {sparsity:g} of {num_blocks} blocks is less than half a step of search.grid={s.grid}, so that "
          "nothing would skip; choose a larger S or grid."
      )
    if scored and units > most:
      raise UserError(
          f"Sparsity {sparsity:g} is more than the blocks from {first} on can skip, and with search.schedule="
          f"{s.schedule!r} those before a plan are dense; choose a smaller S or a smaller routing.one_pass_block."
      )
  routed, new = num_blocks - max(first, 0), config.routing.decode_sparsity
  if scored and RoutingConfig(**config.routing).trains_continuation and new * num_blocks >= routed:
    raise UserError(
        f"routing.decode_sparsity={new:g} would take all of the {routed} blocks that can skip, or more; choose a "
        "smaller one."
    )


def check_files(config) -> None:
  """Raises UserError where a file that the stage `data` reads cannot be opened, before a model is fetched."""
  check_source(config.data)
  repeats = config.data.repeats_path if config.data.num_repeats else ""
  evaluated = {"evaluation.perplexity_path": config.evaluation.perplexity_path}
  for path in filter(None, (repeats, *evaluated.values())):
    check_file(path)
  if config.data.source == "text":  # its windows are in the held sets too
    evaluated["data.path"] = config.data.path
  for name, path in evaluated.items():
    if digest(repeats) and digest(repeats) == digest(path):  # a pipe has none
      raise UserError(f"data.repeats_path={repeats} is that of {name} as well, which is evaluated on; name another.")


def check_memory(config, num_blocks: int, hidden_size: int) -> None:
  """Raises UserError where the inputs of the guided warm-up are more than this machine's memory."""
  t, d, p = config.train, config.data, config.routing.one_pass_block
  if t.guide != "fisher" or not t.warmup_guide_steps or not config.router.hidden_states:
    return
  shape = num_blocks if p < 0 else p + 1, min(t.warmup_guide_prompts, _trained(d)), d.max_context + d.continuation
  needed, there = 2 * math.prod(shape) * hidden_size, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  if needed > there:
    raise UserError(
        f"The hidden states of train.warmup_guide_prompts={t.warmup_guide_prompts} take {needed / 1e9:.0f} GB of this "
        f"machine's {there / 1e9:.0f}; lower it, or data.max_context."
    )


def check_rank(config, hidden_size: int) -> None:
  """Raises UserError where maps are asked for of a higher rank than the model has."""
  if config.stand_in.rank > hidden_size:
    raise UserError(
        f"stand_in.rank={config.stand_in.rank} is more than the model's hidden size; use at most {hidden_size}."
    )


def check_workdir(directory: pathlib.Path) -> None:
  """Raises UserError if a directory holds a config.json that is not that of a run: it would be overwritten."""
  path = directory / "config.json"
  if not path.exists():
    return
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    own = {"sparsities", "seeds", "search", "train"} <= set(found)
  except (OSError, ValueError, TypeError):
    own = False
  if not own:
    raise UserError(f"{path} is not the config of a run; give another --workdir.")


def described_model(model: ModelConfig, directory: pathlib.Path) -> dict[str, Any]:
  """What a run remembers of the model it was begun with."""
  return {"fingerprint": fingerprint(directory), "config": flatten(dataclasses.asdict(model))}


def check_model(path: pathlib.Path, model: ModelConfig, directory: pathlib.Path) -> None:
  """Raises UserError if the run that wrote `path` was begun with a model of other weights or another config."""
  if not path.exists():
    return
  begun, now = read_json(path), described_model(model, directory)
  run = path.parent.parent
  if begun["fingerprint"] != now["fingerprint"]:
    raise UserError(f"The weights in {directory} are not those that {run} was begun with; give another --workdir.")
  for name, value in begun.get("config", {}).items():  # absent in earlier runs
    if now["config"].get(name, value) != value:
      raise UserError(
          f"The config of the model in {directory} now says {name}={now['config'][name]!r}, and {value!r} when {run} "
          "was begun; restore its config.json, or give another --workdir."
      )


def check_alike(config, stages: tuple[str, ...]) -> None:
  """Raises UserError in a process that was started to do something else than process 0."""
  mine = json.dumps({"the version": __version__, "the stages": list(stages)} | flatten(config)).encode()
  first, mine = json.loads(distributed.from_first(lambda: mine)), json.loads(mine)
  for name in first | mine:
    if first.get(name) != mine.get(name):
      raise UserError(
          f"{name} is {first.get(name)!r} in process 0 and {mine.get(name)!r} in process {distributed.process_id()}; "
          "start the very same command, of the same version, on every host."
      )


def check_same_model(model: ModelConfig, directory: pathlib.Path) -> None:
  """Raises UserError in a process whose copy of the model is another one than that of process 0."""
  if distributed.num_processes() == 1:
    return
  mine = f"{fingerprint(directory)} {model}".encode()
  if distributed.from_first(lambda: mine) != mine:
    raise UserError(
        f"The model in {directory} on {socket.gethostname()} (process {distributed.process_id()}) has other weights or "
        "another config.json than that of process 0; copy the same one to every host."
    )


def check_shared(path: pathlib.Path) -> None:
  """Raises UserError where this process does not see a file that process 0 has written."""
  if not path.exists():
    raise UserError(
        f"{socket.gethostname()} does not see {path}, which process 0 wrote; give a --workdir that all hosts share."
    )


def check_batches(config, parts: int) -> None:
  """Raises UserError for a batch that the mesh cannot split into equal parts."""
  for section, key in (("train", "batch"), ("search", "batch"), ("evaluation", "batch")):
    if config[section][key] % parts:
      raise UserError(
          f"{section}.{key}={config[section][key]} must be a multiple of mesh.data * mesh.fsdp = {parts}; change it or "
          "the mesh."
      )


def digest(path: str) -> str:
  """Hash (12 hex digits) of a file's content; empty where there is no such file."""
  if not os.path.isfile(path):
    return ""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def schedule_file(path: str, num_blocks: int, sparsity: float, grid: int, max_sparsity: float) -> np.ndarray:
  """Reads `search.schedule_path`, (L,); UserError unless its mean is the sparsity asked for and no entry too large."""
  found = schedules.from_file(path, num_blocks)
  largest = schedules.max_units(grid, max_sparsity) / grid
  if found.max() > largest + 0.5 / grid:
    raise UserError(
        f"Schedule file {path} asks {found.max():g} of block {found.argmax()}, where search.max_sparsity="
        f"{max_sparsity:g} with search.grid={grid} allows {largest:g}; lower it, or set these two."
    )
  if abs(found.mean() - sparsity) > 0.5 / (grid * num_blocks):
    raise UserError(
        f"Schedule file {path} has a mean sparsity of {found.mean():.4f}, but {sparsity} is asked; set "
        "config.sparsities to its mean."
    )
  return found
