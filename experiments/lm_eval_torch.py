"""Shows that lm-eval gives an exported model the accuracy that the engine has in JAX.

  python experiments/lm_eval_torch.py --artifact=runs/NAME/S0.30/seed0/artifact --task=arc_easy.jsonl

Runs lm-eval through its own Hugging Face model class on the exported model, and through the JAX engine, on the first
`--items` of a file of JSON Lines with `context`, `choices` and `label`. Needs what that class needs: lm-eval[hf].
"""

import itertools
import json
import sys
import tempfile

import lm_eval
import numpy as np
import torch
from absl import app, flags
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from ftp_jax.errors import UserError
from ftp_jax.export import pytorch
from ftp_jax.export.torch_runtime import load_pruned
from ftp_jax.inference import Engine

_MODEL = flags.DEFINE_string("model", "smollm2-135m", "Model source.")
_ARTIFACT = flags.DEFINE_string("artifact", None, "Artifact directory.", required=True)
_TASK = flags.DEFINE_string("task", None, "JSON Lines file of multiple choice.", required=True)
_ITEMS = flags.DEFINE_integer("items", 100, "Items of the task.")
_JSON = flags.DEFINE_string("json", "", "File to write the figures to.")


class PrunedLM(HFLM):
  """lm-eval's Hugging Face model class, which tells the model where the context of each request ends.

  Requests whose contexts are equally long are scored together; all else is inherited.
  """

  _context: int | None = None

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
      return self.model(inps, context_length=self._context).logits


class EngineLM(PrunedLM):
  """The same requests, scored by an engine; few shapes, as each is compiled."""

  engine: Engine
  contexts_at_once = 32

  def _loglikelihood_tokens(self, requests, **options):
    scores = [None] * len(requests)
    contexts = sorted({tuple(request[1]) for request in requests}, key=len)
    for at in range(0, len(contexts), self.contexts_at_once):
      some = contexts[at : at + self.contexts_at_once]
      chosen = [i for i, request in enumerate(requests) if tuple(request[1]) in some]
      rows = [some.index(tuple(requests[i][1])) for i in chosen]
      found = self.engine.score(self.engine.prefill(some), [requests[i][2] for i in chosen], rows)
      for i, score in zip(chosen, found):
        scores[i] = (score.total, score.greedy)
    return scores


def accuracy(model, engine: Engine, path: str, items: int) -> dict:
  """Accuracy of both on the same items, and how many likelihoods differ."""
  task = {
      "task": "multiple_choice", "dataset_path": "json", "dataset_kwargs": {"data_files": path}, "test_split": "train",
      "output_type": "multiple_choice", "doc_to_text": "Question: {{context}}\nAnswer:", "doc_to_target": "label",
      "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
  }  # fmt: skip
  results = {}
  for kind in (PrunedLM, EngineLM):
    lm = kind(pretrained=model, tokenizer=engine.model.tokenizer, batch_size=8)
    lm.engine = engine
    tasks = [ConfigurableTask(config=dict(task))]
    done = lm_eval.simple_evaluate(lm, tasks=tasks, limit=items, bootstrap_iters=0)
    likelihoods = [r[0] for sample in done["samples"]["multiple_choice"] for r in sample["filtered_resps"]]
    results[kind] = done["results"]["multiple_choice"], np.array(likelihoods, float)
  (torch_scores, a), (jax_scores, b) = results.values()
  scores = lambda found: {name: found[f"{name},none"] for name in ("acc", "acc_norm")}
  return {
      "file": path.rpartition("/")[2], "items": items, "torch": scores(torch_scores), "jax": scores(jax_scores),
      "likelihoods": len(a), "largest_difference": float(np.abs(a - b).max()),
  }  # fmt: skip


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"The argument {argv[1]!r} is not understood.")
  with tempfile.TemporaryDirectory() as directory:
    pytorch.export(_ARTIFACT.value, directory, _MODEL.value, with_weights=True)
    engine = Engine.load(directory, directory, fallback="never")
    figures = {"artifact": _ARTIFACT.value, **accuracy(load_pruned(directory), engine, _TASK.value, _ITEMS.value)}
  print(json.dumps(figures, indent=2))
  if _JSON.value:
    with open(_JSON.value, "w", encoding="utf-8") as file:
      json.dump(figures, file, indent=2)


if __name__ == "__main__":
  try:
    app.run(main)
  except UserError as error:
    sys.exit(f"lm_eval_torch: {error}")
