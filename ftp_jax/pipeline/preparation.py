"""What every sparsity and seed shares: the stages `data` and `importance`.

    data        prompts of the four splits and the windows of the perplexity text
    importance  redundancy of the blocks, block influence, maps for skipped blocks, Fisher scores of the gates
"""

import functools
import pathlib
from collections.abc import Callable

import numpy as np
import tqdm

from ftp_jax import distributed
from ftp_jax.config import needs_gate_scores
from ftp_jax.data.prompts import take
from ftp_jax.data.sources import load_splits
from ftp_jax.data.windows import perplexity_windows
from ftp_jax.errors import UserError
from ftp_jax.evaluation import redundancy
from ftp_jax.pipeline import checks
from ftp_jax.pipeline.directory import STAND_IN, RunDirectory, save_weights
from ftp_jax.routing.config import RoutingConfig
from ftp_jax.stages import load_arrays, save_arrays, write_json
from ftp_jax.training import guide
from ftp_jax.training import stand_in as stand_in_fit


def data(run: RunDirectory) -> None:
  """Writes the sets of prompts, the windows and what tells the model from others, whose weights it does not load."""
  c = run.config

  def work(directory):
    model = run.described  # in every process; the first alone reads and writes prompts, and none reads weights
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
    write_json(directory / "model.json", checks.described_model(config, source))

  run.run_stage(run.workdir / "data", "data", work)


def importance(run: RunDirectory) -> None:
  """Writes what ranks blocks and tokens, and fits the maps; gate scores are kept batch by batch until all are there."""
  def kept(directory: pathlib.Path, i: int, make: Callable[[], np.ndarray]) -> np.ndarray:
    path = directory / f"batch{i}.npz"
    if not distributed.exists(path):
      save_arrays(path, fisher_LxBxT=make())
      distributed.barrier()
    return load_arrays(path)["fisher_LxBxT"]

  def work(directory):
    train = run.prompts("train")
    some = take(train, np.arange(min(run.config.evaluation.redundancy_prompts, len(train.tokens))))
    similarity = redundancy.token_similarity(run.dense, some, run.config.evaluation.batch)
    write_json(directory / "redundancy.json", redundancy.summary(similarity, some))
    write_json(directory / "influence.json", redundancy.block_influence(similarity).tolist())
    if run.config.stand_in.rank and not distributed.exists(directory / STAND_IN):
      fit_stand_in(run, directory / STAND_IN)
    if needs_gate_scores(run.config):
      routing = RoutingConfig(run.routing.kv_mode)  # evict_from aside: one set of scores serves all of them
      fisher = guide.collect_fisher(
          run.frozen.config, routing, run.frozen.params, run.prompts("train"), run.config.train.batch,
          run.config.data.seed, num_scored=run.num_scored, draws=run.config.train.fisher_draws,
          dtype=run.frozen.dtype, remat_policy=run.config.model.remat,
          length_buckets=run.config.data.length_buckets,
          progress=functools.partial(tqdm.tqdm, desc="fisher scores"), keep=functools.partial(kept, directory),
      )
      valid = np.arange(fisher.shape[-1])[None] < run.prompts("train").context[:, None]
      write_json(directory / "fisher.json", fisher[:, valid].mean(axis=1).tolist())
      save_arrays(directory / "fisher.npz", fisher_LxNxT=fisher)

  here = run.workdir / "importance"
  run.run_stage(here, "importance", work)
  distributed.on_first(lambda: [path.unlink() for path in here.glob("batch*.npz")])


def fit_stand_in(run: RunDirectory, path: pathlib.Path) -> None:
  c = run.config
  maps = stand_in_fit.fit(
      run.dense.config, run.dense.params, run.prompts("train"), c.train.batch, rank=c.stand_in.rank,
      ridge=c.stand_in.ridge, dtype=run.dense.dtype, length_buckets=c.data.length_buckets,
      progress=functools.partial(tqdm.tqdm, desc="maps for skipped blocks"),
  )
  save_weights(maps, path)
