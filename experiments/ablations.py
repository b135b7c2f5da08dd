"""Ablations: variants of the method, each trained and fine-tuned anew.

  ftp-jax run --config=smollm2_135m --workdir=runs/smollm2_135m
  python experiments/ablations.py --run=runs/smollm2_135m --out=runs/ablations

Every variant is a run directory below --out with the config of --run, one sparsity and some seeds. Stages whose
settings are those of --run are copied from there, so that all variants share prompts, gate scores and, where it does
not depend on what is changed, the searched schedule. A variant and seed is computed once; what was interrupted goes on
where it was. The figure is the continuation KL on development prompts, of the source of --run but in none of its sets,
so that defaults may be chosen by it: of the static router and of the router as trained, both under the searched
schedule, and after schedule fine-tuning.
"""

import gc
import json
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from absl import logging as absl_logging
from ml_collections import config_dict

from ftp_jax import launch
from ftp_jax.config import get_config
from ftp_jax.data.prompts import Prompts, shuffled, take
from ftp_jax.data.sources import SPLITS, load_prompts
from ftp_jax.errors import UserError
from ftp_jax.evaluation import flops
from ftp_jax.evaluation.judge import Judge
from ftp_jax.files import replacing
from ftp_jax.launch import run_config
from ftp_jax.machine import describe_machine
from ftp_jax.pipeline.checks import digest
from ftp_jax.pipeline.directory import RunDirectory
from ftp_jax.pipeline.run import run
from ftp_jax.routing import routers, stand_in
from ftp_jax.routing.config import FACTORS
from ftp_jax.stages import DONE, check_stage, describe_changes, flatten, load_arrays, read_json, write_json

STAGES = ("data", "importance", "search", "train", "finetune")
FIGURES = "figures.json"
# name: (what it is a variant of, settings that differ from those of --run)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "as it is": ("", {}),
    **{
        name: ("schedule", {"search.schedule": schedule, "train.fisher_share": 0.0, "finetune.rounds": 0})
        for name, schedule in (
            ("uniform", "uniform"), ("block influence", "influence"), ("late blocks", "late"), ("Fisher", "fisher"),
            ("allotted", "allotted"),
        )
    },
    **{
        name: ("router", {"router.kind": kind})
        for name, kind in (("global", "global"), ("per block", "per_block"), ("recurrent", "recurrent"))
    },
    "four factors alone": ("inputs", {"router.hidden_states": False}),
    "hidden states alone": ("inputs", {"router.factors": ()}),
    "four factors alone and global": (
        "router and inputs", {"router.hidden_states": False, "router.kind": "global"}
    ),
    "hidden states alone and global": ("router and inputs", {"router.factors": (), "router.kind": "global"}),
    **{
        f"without {left}": ("inputs", {"router.factors": tuple(name for name in FACTORS if name != left)})
        for left in FACTORS
    },
    "warm-up alone": ("losses", {"train.steps": 1, "train.learning_rate": 1e-9}),
    "no warm-up": ("losses", {"train.warmup_guide_steps": 0}),
    "no warm-up and no guide": ("losses", {"train.guide_weight": 0.0, "train.warmup_guide_steps": 0}),
    "guide in the warm-up alone": ("losses", {"train.guide_weight": 0.0}),
    "static guide without warm-up": ("losses", {"train.guide": "static", "train.guide_stakes": 0.0}),
    "without distillation": ("losses", {"train.distill_weight": 0.0}),
    "no gradient through inputs": ("losses", {"train.input_gradient": False}),
    "uniform without gradient through inputs": ("schedule", {
        "search.schedule": "uniform", "train.fisher_share": 0.0, "finetune.rounds": 0, "train.input_gradient": False,
    }),
    "a tenth of the sparsity loss": ("losses", {"train.sparsity_weight": 0.1}),
    "without sparsity loss": ("losses", {"train.sparsity_weight": 0.0}),
    "argmax": ("selection", {"routing.selection": "argmax"}),
    "evict": ("kv mode", {"routing.kv_mode": "evict"}),
    **{f"planned at block {block}": ("plan", {"routing.one_pass_block": block}) for block in (9, 11, 15)},
    "two rounds": ("rounds", {"finetune.rounds": 2}),
    **{f"{steps} steps": ("training", {"train.steps": steps}) for steps in (16, 48, 128)},
    **{f"{count} training prompts": ("calibration", {"data.num_train": count}) for count in (64, 192)},
}


def config_of(
    base: dict[str, Any], sparsity: float, seeds: Sequence[int], changes: dict[str, Any]
) -> config_dict.ConfigDict:
  """The config of a run as `config.json` has it, with one sparsity, some seeds, and the changes of a variant."""
  config = get_config()
  config.update(config_dict.ConfigDict(_tuples(base)))
  config.sparsities, config.seeds = (sparsity,), tuple(seeds)
  config.update_from_flattened_dict(changes)
  return config


def _tuples(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _tuples(inner) for key, inner in value.items()}
  return tuple(value) if isinstance(value, list) else value


def development_prompts(variant: RunDirectory, source: pathlib.Path, count: int) -> Prompts:
  """`count` prompts of the source of a run, of documents of which none of its sets has a prompt.

  Raises:
    UserError: there are fewer, the source is not the one that the run was made from, or the variant's own sets have
      prompts that the run's have not.
  """
  data = variant.config.data
  found, documents, _ = load_prompts(data, variant.model.tokenizer, data.train_min_context or data.min_context)
  sets = [load_arrays(source / "data" / f"{split}.npz") for split in SPLITS]
  used = {row.tobytes() for arrays in sets for row in arrays["tokens"]}
  known = [row.tobytes() in used for row in found.tokens]
  if sum(known) != len(used) - run_config(source)["data"]["num_repeats"]:  # these are of another file
    raise UserError(f"data.path is not what {source} was made from; run it anew, or give the data that it had.")
  if any(row.tobytes() not in used for split in SPLITS for row in variant.prompts(split).tokens):
    raise UserError(
        f"{variant.workdir} has prompts that {source} has not, and development prompts may be among them; give a "
        "--run with the largest data.num_* settings of all variants."
    )
  taken = set(documents[known].tolist())
  free = np.flatnonzero((found.context >= data.min_context) & [number not in taken for number in documents])
  if len(free) < count:
    raise UserError(
        f"--prompts={count} development prompts are needed and {source} leaves {len(free)} of its source; "
        "ask for fewer."
    )
  return take(found, free[shuffled(len(free), data.seed)[:count]])


def share_stages(variant: RunDirectory, source: pathlib.Path) -> None:
  """Copies from a run what it has finished with the very settings that the variant's stages have."""
  stages = [(pathlib.Path(stage), variant.settings(stage)) for stage in STAGES[:2]]
  for sparsity, seed in variant.cells:
    cell = variant.cell(sparsity, seed).relative_to(variant.workdir)
    own = {"sparsity": sparsity, "seed": seed}
    stages += [(cell / stage, variant.settings(stage) | own) for stage in STAGES[2:]]
  for stage, settings in stages:
    if (variant.workdir / stage).exists() or not (source / stage / DONE).exists():
      continue
    try:
      check_stage(source / stage, settings, variant.defaults)
    except UserError:  # made with other settings
      continue
    copy = variant.workdir / stage.with_name(stage.name + ".copying")  # a killed copy must not look finished
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source / stage, copy)
    copy.rename(variant.workdir / stage)


def measure(variant: RunDirectory, judge: Judge, cell: pathlib.Path) -> list[dict[str, Any]]:
  """Figures of the static router, of the router as trained, both under the searched schedule, and fine-tuned."""
  searched, found = variant.schedule(cell / "search"), []
  for stage, router, model, schedule in (
      ("static", routers.STATIC, variant.frozen, searched),
      ("trained", *variant.load_trained(cell / "train"), searched),
      ("fine-tuned", *variant.load_trained(cell / "finetune"), variant.schedule(cell / "finetune")),
  ):
    quality, context = judge.of(model).quality(router, schedule), judge.prompts.context
    rank = stand_in.rank(model.params)
    saved = flops.saved_share(model.config, quality.keep_LxNxT, context, judge.routing, router.config, rank)
    found.append({
        "stage": stage,
        "kl": float(quality.kl.mean()),
        "kl_of_prompts": quality.kl.tolist(),
        "agreement": float(quality.agreement.mean()),
        "achieved": float(flops.skipped_share(quality.keep_LxNxT, context)),
        "flops_saved": float(saved),
        "prompts": len(quality.kl),
    })
  return found


def markdown(records: list[dict[str, Any]]) -> str:
  """One line a variant: KLs in nats a token, means over its seeds, and the difference to the method as it is.

  The difference is that of the fine-tuned KLs, over the seeds that both have, with two standard errors of its mean:
  over prompts, prompt by prompt with the seeds as they are, and over seeds; then the difference of each seed.
  """
  lines = [
      "| part | variant | seeds | KL static | trained | fine-tuned | difference ± over prompts, over seeds "
      "| of each seed | agreement % | achieved % | FLOPs saved % |",
      "|" + "---|" * 11,
  ]
  kl = lambda record: np.array(record["figures"][2]["kl_of_prompts"])
  error = lambda values: np.std(values, ddof=1) / np.sqrt(len(values))
  base = {record["seed"]: kl(record) for record in records if not record["part"]}
  for name in dict.fromkeys(record["variant"] for record in records):
    rows = sorted((r for r in records if r["variant"] == name), key=lambda r: r["seed"])
    seeds = " ".join(str(row["seed"]) for row in rows)
    mean = lambda stage, figure: np.mean([row["figures"][stage][figure] for row in rows])
    own = [kl(row) - base[row["seed"]] for row in rows if row["part"] and row["seed"] in base]
    difference = each = "-"
    if own:
      of_seeds = np.mean(own, axis=1)
      difference = f"{of_seeds.mean():+.3f} ± {error(np.mean(own, axis=0)):.3f}"
      difference += f", {error(of_seeds):.3f}" if len(own) > 1 else ""
      each = " ".join(f"{one:+.3f}" for one in of_seeds)
    lines.append(
        f"| {rows[0]['part'] or '-'} | {name} | {seeds} | {mean(0, 'kl'):.3f} | {mean(1, 'kl'):.3f} "
        f"| {mean(2, 'kl'):.3f} | {difference} | {each} | {100 * mean(2, 'agreement'):.1f} "
        f"| {100 * mean(2, 'achieved'):.1f} | {100 * mean(2, 'flops_saved'):.1f} |"
    )
  return "\n".join(lines)


def run_variants(
    source: pathlib.Path, out: pathlib.Path, names: list[str], sparsity: float, seeds: Sequence[int], prompts: int
) -> str:
  """Computes those variants and seeds that are missing; the table of all of this sparsity that are there.

  Raises:
    UserError: a name is unknown, or `out` holds a variant that was made otherwise.
  """
  unknown = set(names) - set(VARIANTS)
  if unknown:
    raise UserError(f"The variant {min(unknown)!r} is unknown; variants are {', '.join(VARIANTS)}.")
  base = json.loads(run_config(source).to_json())
  place = {name: out / name.replace(" ", "_") for name in VARIANTS}
  figures = lambda name: sorted((place[name] / f"S{sparsity:.2f}").glob(f"seed*/{FIGURES}"))
  # One that a router without one of its inputs cannot have is refused only where it is asked for.
  make = lambda name: RunDirectory(config_of(base, sparsity, seeds, VARIANTS[name][1]), place[name])
  sets = [digest(str(source / "data" / f"{split}.npz")) for split in SPLITS]
  settings = lambda variant: flatten(
      variant.settings("finetune") | {"sparsity": sparsity, "development prompts": prompts, "sets of --run": sets}
  )
  as_it_is, defaults = settings(make("as it is")), make("as it is").defaults
  # Of settings that were not there when figures were made; they do what was done before them.
  defaults = {key: value for key, value in defaults.items() if key in as_it_is}
  for name in VARIANTS:
    for path in figures(name):
      changes = describe_changes(defaults | read_json(path)["settings"], settings(make(name)))
      if changes:
        raise UserError(f"{path} was made with {changes}; name another directory with --out, or delete that folder.")
  for name in dict.fromkeys(names):
    variant = make(name)
    missing = [cell for cell in variant.cells if not (variant.cell(*cell) / FIGURES).exists()]
    same = VARIANTS[name][0] and settings(variant) == as_it_is
    print(f"variant: {name}" + (" is how it is" if same else ""), file=sys.stderr, flush=True)
    if same or not missing:
      continue
    share_stages(variant, source)
    run(variant.config, str(place[name]), STAGES)
    judge = Judge(
        variant.frozen, variant.routing, development_prompts(variant, source, prompts),
        variant.config.evaluation.batch, variant.num_scored,
    )
    for cell in missing:
      own = {"part": VARIANTS[name][0], "variant": name, "seed": cell[1], "settings": settings(variant)}
      directory = variant.cell(*cell)
      write_json(directory / FIGURES, own | {"figures": measure(variant, judge, directory)})
    del variant, judge  # and with them a model, its states and its programs
    gc.collect()
    jax.clear_caches()
  records = [read_json(path) for name in VARIANTS for path in figures(name)]
  write_json(out / f"ablations_S{sparsity:.2f}.json", {"machine": describe_machine(), "records": records})
  text = markdown(records)
  with replacing(out / f"ablations_S{sparsity:.2f}.md") as file:
    file.write((text + "\n").encode())
  return text


def main() -> None:
  absl_logging.set_verbosity(absl_logging.WARNING)  # below it orbax tells of every step of a save
  given = flags.FLAGS
  if not given.seeds or not all(seed.isdecimal() for seed in given.seeds):
    raise UserError(f"--seeds={','.join(given.seeds)} must be numbers, separated by commas.")
  print(run_variants(
      pathlib.Path(given.run), pathlib.Path(given.out), given.variants, given.sparsity,
      tuple(map(int, given.seeds)), given.prompts,
  ))


if __name__ == "__main__":
  flags.DEFINE_string("run", None, "Run directory of `ftp-jax run`.", required=True)
  flags.DEFINE_string("out", None, "Directory of the variants.", required=True)
  flags.DEFINE_list("variants", list(VARIANTS), "Which variants.")
  flags.DEFINE_float("sparsity", 0.30, "S.")
  flags.DEFINE_list("seeds", ["0"], "Seeds.")
  flags.DEFINE_integer("prompts", 64, "Development prompts.", lower_bound=2)
  launch.script(main)
