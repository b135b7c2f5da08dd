"""Compares this decoder with transformers + torch on the same weights, in fp32.

  python experiments/parity_smollm2.py --json=parity.json

Prints, for a few prompts, the largest |logit difference| over all positions and the next token of
both. Needs torch, which the rest of the project does not. About one minute on two CPU cores.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from ftp_jax import launch
from ftp_jax.models.decoder import forward, unembed
from ftp_jax.models.sources import load_model

_SOURCE = flags.DEFINE_string("source", "smollm2-135m", "Model source: known name, directory, .gguf file or hub id.")
_JSON = flags.DEFINE_string("json", "", "File to write the figures to.")

PROMPTS = (
    "The capital of France is",
    "In 1969 the first 2 people walked on the Moon, 384400 km away;\n\n\tthey stayed for",
    "def fibonacci(n):\n  if n < 2:\n    return n\n  return",
    "Über den Wolken muß die Freiheit wohl grenzenlos sein. 日本語の文章も少し。 🙂 " * 4,
)


def compare(source: str) -> dict:
  """Figures of every prompt, and the largest difference over all of them."""
  import torch
  import transformers

  model = load_model(source)
  reference = transformers.AutoModelForCausalLM.from_pretrained(model.directory, dtype=torch.float32).eval()
  logits_of = jax.jit(
      lambda params, tokens: unembed(
          model.config, params, forward(model.config, params, tokens, jnp.array([tokens.shape[1]]))
      )
  )
  rows = []
  for prompt in PROMPTS:
    tokens = np.array([model.tokenizer(prompt)["input_ids"]])
    ours = np.asarray(logits_of(model.params, tokens))
    with torch.no_grad():
      theirs = reference(torch.from_numpy(tokens)).logits.numpy()
    rows.append({
        "prompt": prompt,
        "tokens": tokens.shape[1],
        "max_abs_difference": float(np.max(np.abs(ours - theirs))),
        "max_abs_logit": float(np.max(np.abs(theirs))),
        "next_token": model.tokenizer.decode(ours[0, -1].argmax()),
        "next_token_reference": model.tokenizer.decode(theirs[0, -1].argmax()),
    })
  return {"source": source, "max_abs_difference": max(row["max_abs_difference"] for row in rows), "prompts": rows}


def main() -> None:
  figures = compare(_SOURCE.value)
  for row in figures["prompts"]:
    print(f"{row['max_abs_difference']:.2e}  {row['tokens']:4d} tokens  {row['next_token']!r}  {row['prompt'][:50]!r}")
  print(f"max |logit difference| = {figures['max_abs_difference']:.2e}")
  if _JSON.value:
    with open(_JSON.value, "w", encoding="utf-8") as file:
      json.dump(figures, file, indent=2, ensure_ascii=False)


if __name__ == "__main__":
  launch.script(main)
