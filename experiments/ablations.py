"""Ablations: one part of the method left out or replaced at a time, each trained and fine-tuned anew.

  ftp-jax run --config=smollm2_135m --workdir=runs/smollm2_135m
  python experiments/ablations.py --run=runs/smollm2_135m --out=runs/ablations

Every variant is a run directory below --out with the config of --run, one sparsity and one seed. Stages whose settings
are those of --run are copied from there, so that all variants share prompts, gate scores and, where it does not depend
on what is changed, the searched schedule. A variant is computed once; what was interrupted goes on where it was. The
figure is the continuation KL on the test prompts of --run, on which nothing was chosen: of the router as trained under
the searched schedule, and after schedule fine-tuning.
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

_RUN = flags.DEFINE_string("run", None, "Run directory of `ftp-jax run`.", required=True)
_OUT = flags.DEFINE_string("out", None, "Directory of the variants.", required=True)
_VARIANTS = flags.DEFINE_list("variants", list(VARIANTS), "Which variants.")
_SPARSITY = flags.DEFINE_float("sparsity", 0.30, "S.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed.")


def config_of(base: dict[str, Any], changes: dict[str, Any]) -> config_dict.ConfigDict:
  """The config of a run as `config.json` has it, with one sparsity, one seed, and the changes of a variant."""
  config = get_config()
  config.update(config_dict.ConfigDict(_tuples(base)))
  config.sparsities, config.seeds = (_SPARSITY.value,), (_SEED.value,)
  config.update_from_flattened_dict(changes)
  return config


def _tuples(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _tuples(inner) for key, inner in value.items()}
  return tuple(value) if isinstance(value, list) else value


def share_stages(pipeline: Pipeline, source: pathlib.Path) -> None:
  """Copies from a run what it has finished with the very settings that the pipeline's stages have."""
  cell = pipeline.cell(_SPARSITY.value, _SEED.value).relative_to(pipeline.workdir)
  for stage in STAGES:
    own, settings = pathlib.Path(stage), pipeline.settings(stage)
    if stage not in ("data", "importance"):
      own, settings = cell / stage, settings | {"sparsity": _SPARSITY.value, "seed": _SEED.value}
    if (pipeline.workdir / own).exists() or not (source / own / DONE).exists():
      continue
    try:
      check_stage(source / own, settings)
    except UserError:  # made with other settings
      continue
    shutil.copytree(source / own, pipeline.workdir / own)


def measure(pipeline: Pipeline) -> dict[str, float]:
  """Test KL of the router as trained and after fine-tuning; sparsity and saved FLOPs of the latter."""
  cell, judge = pipeline.cell(_SPARSITY.value, _SEED.value), pipeline.judge("test", pipeline.config.evaluation.batch)
  trained = judge.quality(pipeline.load_router(cell / "train"), pipeline.schedule(cell / "search"))
  router = pipeline.load_router(cell / "finetune")
  tuned = judge.quality(router, pipeline.schedule(cell / "finetune"))
  context, config = judge.prompts.context, judge.model.config
  count = len(tuned.kl)
  return {
      "kl_trained": float(trained.kl.mean()),
      "kl": float(tuned.kl.mean()),
      "kl_stderr": float(tuned.kl.std(ddof=1) / np.sqrt(count)),
      "agreement": float(tuned.agreement.mean()),
      "achieved": float(flops.skipped_share(tuned.keep_LxNxT, context)),
      "flops_saved": float(
          flops.saved_share(config, tuned.keep_LxNxT, context, judge.routing.kv_mode, router.config)
      ),
      "prompts": count,
  }  # fmt: skip


def static_row(pipeline: Pipeline) -> dict[str, float]:
  """The static router under the schedule searched with it."""
  judge = pipeline.judge("test", pipeline.config.evaluation.batch)
  schedule = pipeline.schedule(pipeline.cell(_SPARSITY.value, _SEED.value) / "search")
  quality = judge.quality(routers.STATIC, schedule)
  saved = flops.saved_share(
      judge.model.config, quality.keep_LxNxT, judge.prompts.context, judge.routing.kv_mode, None
  )
  return {
      "kl_trained": float(quality.kl.mean()), "kl": None, "kl_stderr": None,
      "agreement": float(quality.agreement.mean()),
      "achieved": float(flops.skipped_share(quality.keep_LxNxT, judge.prompts.context)), "flops_saved": float(saved),
      "prompts": len(quality.kl),
  }  # fmt: skip


def markdown(records: list[dict[str, Any]]) -> str:
  """One line a variant; KLs in nats a token."""
  lines = [
      "| part | variant | KL as trained | KL fine-tuned | agreement % | achieved % | FLOPs saved % |", "|" + "---|" * 7
  ]
  number = lambda value, digits, factor=1: "-" if value is None else f"{value * factor:.{digits}f}"
  for r in records:
    spread = "" if r["kl_stderr"] is None else f" ± {r['kl_stderr']:.3f}"
    lines.append(
        f"| {r['part']} | {r['variant']} | {number(r['kl_trained'], 3)} | {number(r['kl'], 3)}{spread} "
        f"| {number(r['agreement'], 1, 100)} | {number(r['achieved'], 1, 100)} | {number(r['flops_saved'], 1, 100)} |"
    )
  return "\n".join(lines)


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"The argument {argv[1]!r} is not understood.")
  unknown = set(_VARIANTS.value) - set(VARIANTS)
  if unknown:
    raise UserError(f"The variant {sorted(unknown)[0]!r} is unknown; variants are {', '.join(VARIANTS)}.")
  source, out = pathlib.Path(_RUN.value), pathlib.Path(_OUT.value)
  base = read_json(source / "config.json")
  for name in _VARIANTS.value:
    here = out / name.replace(" ", "_")
    if (here / "figures.json").exists():
      continue
    print(f"variant: {name}", file=sys.stderr, flush=True)
    config = config_of(base, VARIANTS[name][1])
    pipeline = Pipeline(config, here)
    share_stages(pipeline, source)
    run(config, str(here), STAGES)
    record = {"part": VARIANTS[name][0], "variant": name, **measure(pipeline)}
    if name == "as it is":
      write_json(here / "static.json", {"part": "router", "variant": "static", **static_row(pipeline)})
    write_json(here / "figures.json", record)
  records = []
  for name in VARIANTS:
    files = [out / name.replace(" ", "_") / file for file in ("figures.json", "static.json")]
    records += [read_json(path) for path in files if path.exists()]
  settings = {"sparsity": _SPARSITY.value, "seed": _SEED.value}
  write_json(out / "ablations.json", {"machine": describe_machine(), "settings": settings, "records": records})
  text = markdown(records)
  (out / "ablations.md").write_text(text + "\n", encoding="utf-8")
  print(text)


if __name__ == "__main__":
  try:
    app.run(main)
  except UserError as error:
    sys.exit(f"ablations: {error}")
