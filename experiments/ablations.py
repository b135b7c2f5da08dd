"""Ablations: one part of the method left out or replaced at a time, each trained and fine-tuned anew.

  ftp-jax run --config=smollm2_135m --workdir=runs/smollm2_135m
  python experiments/ablations.py --run=runs/smollm2_135m --out=runs/ablations

Every variant is a run directory below --out with the config of --run, one sparsity and one seed. Stages whose settings
are those of --run are copied from there, so that all variants share prompts, gate scores and, where it does not depend
on what is changed, the searched schedule. A variant is computed once; what was interrupted goes on where it was. The
figure is the continuation KL on the test prompts of --run: of the static router and of the router as trained, both
under the searched schedule, and after schedule fine-tuning.
"""

import pathlib
import shutil
import sys
from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import config_dict

from ftp_jax.config import get_config
from ftp_jax.errors import UserError
from ftp_jax.evaluation import flops
from ftp_jax.machine import describe_machine
from ftp_jax.pipeline.run import Pipeline, run
from ftp_jax.routing import routers
from ftp_jax.stages import DONE, check_stage, read_json, write_json

FACTORS = ("position", "score", "rank", "sparsity")
STAGES = ("data", "importance", "search", "train", "finetune")
FIGURES = "figures.json"
# name: (what it is a variant of, settings that differ from those of --run)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "as it is": ("", {}),
    "uniform": ("schedule", {"search.schedule": "uniform"}),
    "block influence": ("schedule", {"search.schedule": "influence"}),
    "late blocks": ("schedule", {"search.schedule": "late"}),
    "per block": ("router", {"router.kind": "per_block"}),
    "recurrent": ("router", {"router.kind": "recurrent"}),
    "four factors alone": ("inputs", {"router.hidden_states": False}),
    "hidden states alone": ("inputs", {"router.factors": ()}),
    **{
        f"without {left}": ("inputs", {"router.factors": tuple(name for name in FACTORS if name != left)})
        for left in FACTORS
    },
    "without guide": ("losses", {"train.guide_weight": 0.0, "train.warmup_guide_steps": 0}),
    "without distillation": ("losses", {"train.distill_weight": 0.0}),
    "without sparsity loss": ("losses", {"train.sparsity_weight": 0.0}),
    "static guide": ("losses", {"train.guide": "static"}),
    "argmax": ("selection", {"routing.selection": "argmax"}),
    "evict": ("kv mode", {"routing.kv_mode": "evict"}),
    "two rounds": ("rounds", {"finetune.rounds": 2}),
    "64 training prompts": ("calibration", {"train.warmup_guide_prompts": 64}),
}


def config_of(base: dict[str, Any], sparsity: float, seed: int, changes: dict[str, Any]) -> config_dict.ConfigDict:
  """The config of a run as `config.json` has it, with one sparsity, one seed, and the changes of a variant."""
  config = get_config()
  config.update(config_dict.ConfigDict(_tuples(base)))
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
    shutil.copytree(source / own, pipeline.workdir / own)


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
    saved = flops.saved_share(judge.model.config, quality.keep_LxNxT, context, judge.routing.kv_mode, router.config)
    found.append({
        "stage": stage,
        "kl": float(quality.kl.mean()),
        "kl_stderr": float(quality.kl.std(ddof=1) / np.sqrt(len(quality.kl))),
        "agreement": float(quality.agreement.mean()),
        "achieved": float(flops.skipped_share(quality.keep_LxNxT, context)),
        "flops_saved": float(saved),
        "prompts": len(quality.kl),
    })
  return found


def markdown(records: list[dict[str, Any]]) -> str:
  """One line a variant: KLs in nats a token, of the fine-tuned router with its standard error over prompts."""
  lines = [
      "| part | variant | KL static | KL trained | KL fine-tuned | agreement % | achieved % | FLOPs saved % |",
      "|" + "---|" * 8,
  ]
  for record in records:
    static, trained, tuned = record["figures"]
    lines.append(
        f"| {record['part']} | {record['variant']} | {static['kl']:.3f} | {trained['kl']:.3f} "
        f"| {tuned['kl']:.3f} ± {tuned['kl_stderr']:.3f} | {100 * tuned['agreement']:.1f} "
        f"| {100 * tuned['achieved']:.1f} | {100 * tuned['flops_saved']:.1f} |"
    )
  return "\n".join(lines)


def run_variants(source: pathlib.Path, out: pathlib.Path, names: list[str], sparsity: float, seed: int) -> str:
  """Computes those variants that are missing; the table of all that are there.

  Raises:
    UserError: a name is unknown, or `out` holds variants of another sparsity or seed.
  """
  unknown = set(names) - set(VARIANTS)
  if unknown:
    raise UserError(f"The variant {min(unknown)!r} is unknown; variants are {', '.join(VARIANTS)}.")
  base = read_json(source / "config.json")
  for name in names:
    here = out / name.replace(" ", "_")
    if (here / FIGURES).exists():
      continue
    print(f"variant: {name}", file=sys.stderr, flush=True)
    config = config_of(base, sparsity, seed, VARIANTS[name][1])
    pipeline = Pipeline(config, here)
    share_stages(pipeline, source)
    run(config, str(here), STAGES)
    own = {"part": VARIANTS[name][0], "variant": name, "sparsity": sparsity, "seed": seed}
    write_json(here / FIGURES, own | {"figures": measure(pipeline)})
  paths = [out / name.replace(" ", "_") / FIGURES for name in VARIANTS]
  records = [read_json(path) for path in paths if path.exists()]
  if any((record["sparsity"], record["seed"]) != (sparsity, seed) for record in records):
    raise UserError(f"{out} holds variants of another sparsity or seed; name another directory with --out.")
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
