"""Shows that lm-eval gives an exported model the accuracy, item by item, that it gives the engine in JAX.

  python experiments/lm_eval_torch.py --artifact=runs/NAME/S0.30/seed0/artifact --task=arc_easy.jsonl

lm-eval runs twice over the same tasks: with its own Hugging Face model class on the exported model in PyTorch, and
with `ftp_jax.evaluation.harness.adapter.EngineLM`. Items are those of `ftp-jax eval --limit`, from a file of any of
its multiple-choice formats (docs/evaluation.md). Both prune every context, however short. Needs what lm-eval's class
needs: pip install 'lm-eval[hf]'.

SmolLM2-135M, S = 0.30, fp32, CPU: ARC-Easy, 100 items, acc 0.55 and acc_norm 0.50 of both; HellaSwag, 50 items, 0.28
and 0.42 of both; no item differs. Ten minutes of processor time each.
"""

import itertools
import json
import tempfile

import numpy as np
import torch
from absl import flags
from lm_eval.models.huggingface import HFLM

from ftp_jax import launch
from ftp_jax.evaluation.harness import results, suite
from ftp_jax.evaluation.harness.adapter import EngineLM
from ftp_jax.evaluation.harness.tasks import build_task
from ftp_jax.export import pytorch
from ftp_jax.export.torch_runtime import load_pruned
from ftp_jax.inference import Engine

_MODEL = flags.DEFINE_string("model", "smollm2-135m", "Model source.")
_ARTIFACT = flags.DEFINE_string("artifact", None, "Artifact directory.", required=True)
_TASK = flags.DEFINE_string("task", None, "JSON Lines file of multiple choice.", required=True)
_ITEMS = flags.DEFINE_integer("items", 100, "Items of the task.")
_JSON = flags.DEFINE_string("json", "", "File to write the figures to.")
_BATCH = 8


class PrunedLM(HFLM):
  """lm-eval's Hugging Face model class, which tells the model where the context of each request ends.

  Requests whose contexts are equally long are scored together; all else is inherited.
  """

  _context: int | None = None

  def __init__(self, *args, **options):
    super().__init__(*args, **options)
    self.kept: list[float] = []  # share of the (block, context token) pairs that each pass computed

  def _loglikelihood_tokens(self, requests, **options):
    # lm-eval cuts from the left what does not fit.
    cut = lambda request: max(len(request[1]) + len(request[2]) - (self.max_length + 1), 0)
    context = lambda i: max(len(requests[i][1]) - cut(requests[i]), 1)
    scores = [None] * len(requests)
    for self._context, group in itertools.groupby(sorted(range(len(requests)), key=context), context):
      group = list(group)
      for i, score in zip(group, super()._loglikelihood_tokens([requests[i] for i in group], disable_tqdm=True)):
        scores[i] = score
    return scores

  def _model_call(self, inps, attn_mask=None, labels=None):
    with torch.no_grad():
      out = self.model(inps, context_length=self._context)
    self.kept.append(out.past_key_values.keep_LxBxT.float().mean().item())
    return out.logits


def compare(model, engine: Engine, path: str, items: int) -> dict:
  """Accuracies of both, the items on which they differ, and how far their likelihoods (nats) are apart."""
  (job,) = suite.plan(suite.Suite(tasks=(path,), limit=items))
  theirs = PrunedLM(pretrained=model, tokenizer=engine.model.tokenizer, batch_size=_BATCH)
  records = []
  for lm in (theirs, EngineLM(engine, batch_size=_BATCH, progress=False)):
    samples, _ = results.run(lm, {job.name: build_task(job.name, job.kind, job.documents(lm.tok_encode))})
    records.append(results.record_items(job.kind, samples[job.name], lm))
  accuracies = [{name: figure["value"] for name, figure in results.summarise(job.kind, r).items()} for r in records]
  differs = lambda a, b: any(a[name] != b[name] for name in ("choice", "greedy", *accuracies[0]))
  likelihoods = [[np.array(record["loglikelihoods"]) for record in r] for r in records]
  differences = [np.abs(a - b).max() for a, b in zip(*likelihoods)]
  leads = [float(np.diff(np.sort(a)[-2:])[0]) for a in likelihoods[1]]
  return {
      "task": job.name, "items": len(records[0]), "torch": accuracies[0], "jax": accuracies[1],
      "items_that_differ": [a["id"] for a, b in zip(*records) if differs(a, b)],
      "likelihoods": sum(map(len, likelihoods[0])), "largest_difference": float(max(differences)),
      "largest_likelihood": float(max(np.abs(a).max() for a in likelihoods[1])),
      # A choice that leads by less than twice the difference of its likelihoods is a tie that rounding may turn.
      "ties": sum(bool(lead <= 2 * d) for lead, d in zip(leads, differences)), "smallest_lead": min(leads),
      "skipped": 1 - float(np.mean(theirs.kept)),
  }


def main() -> None:
  with tempfile.TemporaryDirectory() as directory:
    pytorch.export(_ARTIFACT.value, directory, _MODEL.value, with_weights=True)
    engine = Engine.load(directory, directory, fallback="never")
    figures = {"artifact": _ARTIFACT.value, **compare(load_pruned(directory), engine, _TASK.value, _ITEMS.value)}
  print(json.dumps(figures, indent=2))
  if _JSON.value:
    with open(_JSON.value, "w", encoding="utf-8") as file:
      json.dump(figures, file, indent=2)


if __name__ == "__main__":
  launch.script(main)
