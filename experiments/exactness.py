"""Shows on a trained artifact that the fast path generates what the masked reference generates.

  python experiments/exactness.py --artifact=runs/NAME/S0.30/seed0/artifact --prompts=FILE --json=exactness.json

`--prompts` is JSON Lines of {"instruction", "input"}; the first `--count` that fit are wrapped in the model's
chat template. The fast path (bucketed prefill, KV cache, decode loop) generates greedily, without stop tokens.
The reference runs prompt and generated tokens through masked execution at once: its gates and logits at a
position know nothing after it, so where every generated token is its most likely one, it would have generated
the very same. Also compares routes and logits. About two minutes on two CPU cores.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from ftp_jax import launch
from ftp_jax.data.encoding import chat_turn
from ftp_jax.data.records import check_file, read_jsonl
from ftp_jax.errors import UserError
from ftp_jax.inference import Engine
from ftp_jax.models import decoder
from ftp_jax.routing import masked

_MODEL = flags.DEFINE_string("model", "smollm2-135m", "Model source.")
_ARTIFACT = flags.DEFINE_string("artifact", None, "Artifact directory.", required=True)
_PROMPTS = flags.DEFINE_string("prompts", None, "JSON Lines file of instructions.", required=True)
_COUNT = flags.DEFINE_integer("count", 32, "Prompts.")
_LONGEST = flags.DEFINE_integer("longest", 96, "Longest prompt in tokens.")
_NEW = flags.DEFINE_integer("new_tokens", 64, "Tokens to generate for each.")
_JSON = flags.DEFINE_string("json", "", "File to write the figures to.")


def read_prompts(path: str, tokenizer, count: int, longest: int) -> list[list[int]]:
  """Token ids of the first `count` instructions of at most `longest` tokens."""
  turn, prompts = chat_turn(tokenizer), []
  for where, record in read_jsonl(path):
    parts = record.get("instruction"), record.get("input") or ""
    if not all(isinstance(part, str) for part in parts):
      raise UserError(f"{where} has no text 'instruction'; name a file of instructions.")
    ids = tokenizer.encode(turn.before + "\n".join(filter(None, parts)) + turn.after, add_special_tokens=False)
    if len(ids) <= longest:
      prompts.append(ids)
    if len(prompts) == count:
      return prompts
  raise UserError(f"{path} has only {len(prompts)} prompts of at most {longest} tokens; ask for a smaller --count.")


def compare(engine: Engine, prompts: list[list[int]], new_tokens: int) -> dict:
  """Figures over all prompts; `engine` must not fall back."""
  prefix = engine.prefill(prompts)
  (group,) = prefix.groups
  generations = engine.generate(prefix, new_tokens, stop_tokens=())
  length = np.array([len(p) + new_tokens for p in prompts], np.int32)
  context = np.array([len(p) for p in prompts], np.int32)
  tokens = np.zeros((len(prompts), length.max()), np.int32)
  for row, prompt, generation in zip(tokens, prompts, generations):
    row[: len(prompt) + new_tokens] = [*prompt, *generation.tokens]
  spec, weights = group.spec, group.weights
  reference = jax.jit(functools.partial(masked.forward, spec.model, spec.routing))
  identical, difference, routes = 0, 0.0, True
  for at in range(0, len(prompts), 8):  # a few rows at a time: all their logits are held
    rows = slice(at, at + 8)
    out = reference(weights.params, weights.router, tokens[rows], context[rows], length[rows], weights.schedule_L)
    logits = np.asarray(decoder.unembed(spec.model, weights.params, out.hidden_BxTxD))
    for b, m in enumerate(context[rows]):
      greedy = logits[b, m - 1 : m - 1 + new_tokens].argmax(-1)
      identical += greedy.tolist() == list(generations[at + b].tokens)
      fast = np.asarray(group.prefilled.logits_BxV[at + b])
      difference = max(difference, float(np.abs(fast - logits[b, m - 1]).max()))
      routes &= np.array_equal(group.prefilled.cache.keep_LxBxT[:, at + b, :m], out.keep_LxBxT[:, b, :m])
  keep = np.asarray(group.prefilled.cache.keep_LxBxT)
  return {
      "prompts": len(prompts),
      "new_tokens": new_tokens,
      "identical_generations": identical,
      "identical_routes": bool(routes),
      "largest_logit_difference": difference,
      "largest_logit": float(jnp.abs(group.prefilled.logits_BxV).max()),
      "skipped": float(1 - keep.sum() / (keep.shape[0] * context.sum())),
      "kv_mode": spec.routing.kv,
      "artifact": _ARTIFACT.value,
  }


def main() -> None:
  check_file(_PROMPTS.value)
  engine = Engine.load(_MODEL.value, _ARTIFACT.value, fallback="never")
  prompts = read_prompts(_PROMPTS.value, engine.model.tokenizer, _COUNT.value, _LONGEST.value)
  figures = compare(engine, prompts, _NEW.value)
  print(json.dumps(figures, indent=2))
  if _JSON.value:
    with open(_JSON.value, "w", encoding="utf-8") as f:
      json.dump(figures, f, indent=2)


if __name__ == "__main__":
  launch.script(main)
