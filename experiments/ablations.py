"""Ablations: variants of the method, each trained and fine-tuned anew.

  ftp-jax run --config=smollm2_135m --workdir=runs/smollm2_135m
  python experiments/ablations.py --run=runs/smollm2_135m --out=runs/ablations

Every variant is a run directory below --out with the config of --run, one sparsity and one seed. Stages whose settings
are those of --run are copied from there, so that all variants share prompts, gate scores and, where it does not depend
on what is changed, the searched schedule. A variant is computed once; what was interrupted goes on where it was. The
figure is the continuation KL on the test prompts of --run: of the static router and of the router as trained, both
under the searched schedule, and after schedule fine-tuning.
"""

import gc
import pathlib
import shutil
import sys
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_dict

from ftp_jax.config import get_config
from ftp_jax.errors import UserError
from ftp_jax.evaluation import flops
from ftp_jax.machine import describe_machine
from ftp_jax.pipeline.checks import digest
from ftp_jax.pipeline.run import Pipeline, run
from ftp_jax.routing import routers
from ftp_jax.stages import DONE, check_stage, describe_changes, flatten, read_json, write_json

FACTORS = ("position", "score", "rank", "sparsity")
STAGES = ("data", "importance", "search", "train", "finetune")
FIGURES = "figures.json"
# name: (what it is a variant of, settings that differ from those of --run)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "as it is": ("", {}),
    **{
        name: ("schedule", {"search.schedule": schedule, "train.fisher_share": 0.0, "finetune.rounds": 0})
        for name, schedule in (
            ("uniform", "uniform"), ("block influence", "influence"), ("late blocks", "late"), ("Fisher", "fisher"),
        )
    },
    "per block": ("router", {"router.kind": "per_block"}),
    "recurrent": ("router", {"router.kind": "recurrent"}),
    "four factors alone": ("inputs", {"router.hidden_states": False}),
    "hidden states alone": ("inputs", {"router.factors": ()}),
    **{
        f"without {left}": ("inputs", {"router.factors": tuple(name for name in FACTORS if name != left)})
        for left in FACTORS
    },
    "warm-up alone": ("losses", {"train.steps": 1, "train.learning_rate": 0.0}),
    "no warm-up": ("losses", {"train.warmup_guide_steps": 0}),
    "no warm-up and no guide": ("losses", {"train.guide_weight": 0.0, "train.warmup_guide_steps": 0}),
    "guide in the warm-up alone": ("losses", {"train.guide_weight": 0.0}),
    "static guide without warm-up": ("losses", {"train.guide": "static"}),
    "without distillation": ("losses", {"train.distill_weight": 0.0}),
    "without sparsity loss": ("losses", {"train.sparsity_weight": 0.0}),
    "argmax": ("selection", {"routing.selection": "argmax"}),
    "evict": ("kv mode", {"routing.kv_mode": "evict"}),
    "two rounds": ("rounds", {"finetune.rounds": 2}),
    "64 training prompts": ("calibration", {"data.num_train": 64}),
}


def config_of(base: dict[str, Any], sparsity: float, seed: int, changes: dict[str, Any]) -> config_dict.ConfigDict:
  """The config of a run as `config.json` has it, with one sparsity, one seed, and the changes of a variant."""
  config = get_config()
  try:
    config.update(config_dict.ConfigDict(_tuples(base)))
  except (KeyError, TypeError) as error:
    raise UserError(f"The config.json of --run is of another version ({error}); run it anew.") from None
  config.sparsities, config.seeds = (sparsity,), (seed,)
  config.update_from_flattened_dict(changes)
  return config


def _tuples(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _tuples(inner) for key, inner in value.items()}
  return tuple(value) if isinstance(value, list) else value


def share_stages(pipeline: Pipeline, source: pathlib.Path) -> None:
  """Copies from a run what it has finished with the very settings that the pipeline's stages have."""
  (sparsity, seed), = pipeline.cells
  cell = pipeline.cell(sparsity, seed).relative_to(pipeline.workdir)
  for stage in STAGES:
    own, settings = pathlib.Path(stage), pipeline.settings(stage)
    if stage not in ("data", "importance"):
      own, settings = cell / stage, settings | {"sparsity": sparsity, "seed": seed}
    if (pipeline.workdir / own).exists() or not (source / own / DONE).exists():
      continue
    try:
      check_stage(source / own, settings)
    except UserError:  # made with other settings
      continue
    copy = pipeline.workdir / own.with_name(own.name + ".copying")  # a killed copy must not look finished
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source / own, copy)
    copy.rename(pipeline.workdir / own)


def measure(pipeline: Pipeline) -> list[dict[str, Any]]:
  """Test figures of the static router, of the router as trained, both under the searched schedule, and fine-tuned."""
  (cell,) = (pipeline.cell(*cell) for cell in pipeline.cells)
  judge, searched = pipeline.judge("test", pipeline.config.evaluation.batch), pipeline.schedule(cell / "search")
  found = []
  for stage, router, schedule in (
      ("static", routers.STATIC, searched),
      ("trained", pipeline.load_router(cell / "train"), searched),
      ("fine-tuned", pipeline.load_router(cell / "finetune"), pipeline.schedule(cell / "finetune")),
  ):
    quality, context = judge.quality(router, schedule), judge.prompts.context
    saved = flops.saved_share(
        judge.model.config, quality.keep_LxNxT, context, judge.routing.kv_mode, router.config,
        judge.routing.score_window,
    )
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
  """One line a variant: KLs in nats a token, and the difference of the fine-tuned one to the method as it is.

  Behind ± the standard error over prompts of that difference, prompt by prompt; seeds differ by more.
  """
  lines = [
      "| part | variant | KL static | trained | fine-tuned | difference | agreement % | achieved % | FLOPs saved % |",
      "|" + "---|" * 9,
  ]
  base = next((np.array(r["figures"][2]["kl_of_prompts"]) for r in records if not r["part"]), None)
  for record in records:
    static, trained, tuned = record["figures"]
    difference = "-"
    if record["part"] and base is not None:
      own = np.array(tuned["kl_of_prompts"]) - base
      difference = f"{own.mean():+.3f} ± {own.std(ddof=1) / np.sqrt(len(own)):.3f}"
    lines.append(
        f"| {record['part']} | {record['variant']} | {static['kl']:.3f} | {trained['kl']:.3f} | {tuned['kl']:.3f} "
        f"| {difference} | {100 * tuned['agreement']:.1f} | {100 * tuned['achieved']:.1f} "
        f"| {100 * tuned['flops_saved']:.1f} |"
    )
  return "\n".join(lines)


def run_variants(source: pathlib.Path, out: pathlib.Path, names: list[str], sparsity: float, seed: int) -> str:
  """Computes those variants that are missing; the table of all that are there.

  Raises:
    UserError: a name is unknown, or `out` holds a variant that was made otherwise.
  """
  unknown = set(names) - set(VARIANTS)
  if unknown:
    raise UserError(f"The variant {min(unknown)!r} is unknown; variants are {', '.join(VARIANTS)}.")
  base = read_json(source / "config.json")
  place = {name: out / name.replace(" ", "_") for name in VARIANTS}
  make = lambda name: Pipeline(config_of(base, sparsity, seed, VARIANTS[name][1]), place[name])
  settings = lambda pipeline: flatten(
      pipeline.settings("finetune") | {"sparsity": sparsity, "seed": seed,
                                       "test": digest(str(source / "data" / "test.npz"))}
  )
  for name, here in place.items():
    if (here / FIGURES).exists():
      changes = describe_changes(read_json(here / FIGURES)["settings"], settings(make(name)))
      if changes:
        raise UserError(f"{here} was made with {changes}; name another directory with --out, or delete that folder.")
  for name in names:
    here = place[name]
    if (here / FIGURES).exists():
      continue
    print(f"variant: {name}", file=sys.stderr, flush=True)
    pipeline = make(name)
    share_stages(pipeline, source)
    run(pipeline.config, str(here), STAGES)
    own = {"part": VARIANTS[name][0], "variant": name, "settings": settings(pipeline)}
    write_json(here / FIGURES, own | {"figures": measure(pipeline)})
    del pipeline  # and with it a model, its states and its programs
    gc.collect()
    jax.clear_caches()
  records = [read_json(here / FIGURES) for here in place.values() if (here / FIGURES).exists()]
  write_json(out / "ablations.json", {"machine": describe_machine(), "records": records})
  text = markdown(records)
  (out / "ablations.md").write_text(text + "\n", encoding="utf-8")
  return text


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"The argument {argv[1]!r} is not understood.")
  given = flags.FLAGS
  print(run_variants(pathlib.Path(given.run), pathlib.Path(given.out), given.variants, given.sparsity, given.seed))


if __name__ == "__main__":
  flags.DEFINE_string("run", None, "Run directory of `ftp-jax run`.", required=True)
  flags.DEFINE_string("out", None, "Directory of the variants.", required=True)
  flags.DEFINE_list("variants", list(VARIANTS), "Which variants.")
  flags.DEFINE_float("sparsity", 0.30, "S.")
  flags.DEFINE_integer("seed", 0, "Seed.")
  try:
    app.run(main)
  except UserError as error:
    sys.exit(f"ablations: {error}")
