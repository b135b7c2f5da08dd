"""Compares our lm-eval adapter with lm-eval's own Hugging Face model, item by item, on the same task files.

  python experiments/harness_parity.py --data=DIR --limit=100 --out=parity

Both run the dense model in fp32 on the CPU, on the same seeded items; prints accuracy of both, the items on which
their choices differ, and the largest difference of a log-likelihood. A choice that differs is a tie where on both
sides the two best scores are closer than twice that difference. Results are kept in --out task by task, and finished
ones are not computed again. Needs torch and accelerate (pip install 'lm-eval[hf]').

SmolLM2-135M, 100 items of each task, seed 0, about ten minutes on two CPU cores: of 500 items no choice and no greedy
match differs, nor whether acc and acc_norm hold, and there is no tie. acc is 0.56 (ARC-Easy), 0.23 (ARC-Challenge),
0.29 (HellaSwag), 0.44 (WinoGrande) and 0.19 (MMLU) on both sides, the largest difference of a log-likelihood 7.2e-4.
"""

import json
import logging
import pathlib
from typing import Any

from absl import flags

from ftp_jax import launch
from ftp_jax.evaluation.harness import suite
from ftp_jax.evaluation.harness.adapter import EngineLM
from ftp_jax.inference import Engine
from ftp_jax.machine import describe_machine
from ftp_jax.models.sources import resolve

_MODEL = flags.DEFINE_string("model", "smollm2-135m", "Model source.")
_DATA = flags.DEFINE_string("data", None, "Directory with arc_easy.jsonl, ...", required=True)
_TASKS = flags.DEFINE_list(
    "tasks", ["arc_easy", "arc_challenge", "hellaswag", "winogrande", "mmlu"], "Tasks, see ftp-jax eval."
)
_LIMIT = flags.DEFINE_integer("limit", 100, "Items of each.")
_SEED = flags.DEFINE_integer("seed", 0, "Which items.")
_BATCH = flags.DEFINE_integer("batch", 8, "Rows at once.")
_OUT = flags.DEFINE_string("out", "parity", "Directory of the results.")


def compare(ours: list[dict], theirs: list[dict], name: str) -> dict[str, Any]:
  """Figures of one task from both sides' records."""
  assert [record["id"] for record in ours] == [record["id"] for record in theirs], "not the same items"
  likelihoods = lambda records: [value for record in records for value in record["loglikelihoods"]]
  largest = max(abs(a - b) for a, b in zip(likelihoods(ours), likelihoods(theirs)))
  differing = [
      {
          "id": a["id"], "label": a["label"], "ours": a["loglikelihoods"], "theirs": b["loglikelihoods"],
          "tie": all(_margin(record) <= 2 * largest for record in (a, b)),
      }
      for a, b in zip(ours, theirs)
      if a["choice"] != b["choice"]
  ]
  metrics = [metric for metric in ("acc", "acc_norm") if metric in ours[0]]
  share = lambda records, metric: sum(record[metric] for record in records) / len(records)
  return {
      "task": name,
      "items": len(ours),
      "largest_difference": largest,
      "greedy_differs": sum(a["greedy"] != b["greedy"] for a, b in zip(ours, theirs)),
      "choices_differ": differing,
      **{metric: {"ours": share(ours, metric), "theirs": share(theirs, metric)} for metric in metrics},
      "correctness_differs": {m: [a["id"] for a, b in zip(ours, theirs) if a[m] != b[m]] for m in metrics},
  }


def _margin(record: dict) -> float:
  best, second = sorted(record["loglikelihoods"], reverse=True)[:2]
  return best - second


def main() -> None:
  from lm_eval.models.huggingface import HFLM  # needs torch

  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  jobs = suite.plan(suite.Suite(tuple(_TASKS.value), _DATA.value, _LIMIT.value, _SEED.value))
  figures = []
  sides = {
      "ours": lambda: EngineLM(Engine.load(_MODEL.value), batch_size=_BATCH.value),
      "theirs": lambda: HFLM(str(resolve(_MODEL.value)), dtype="float32", device="cpu", batch_size=_BATCH.value),
  }
  models = {}
  for job in jobs:
    records = {}
    for side, load in sides.items():
      path, settings = out / f"{side}.json", {"model": _MODEL.value, "side": side}
      done = suite.read_results(path, settings, [job])
      if job.name not in done:
        models[side] = models.get(side) or load()
        done = suite.run(models[side], [job], settings, describe_machine(), path)
      records[side] = done[job.name]["records"]
    figures.append(compare(records["ours"], records["theirs"], job.name))
    print(json.dumps(figures[-1]), flush=True)
  (out / "parity.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  launch.script(main)
