"""The way to PyTorch: a directory that `export.torch_runtime` loads, and that `export.artifact.load` reads back.

Weights are copied file by file, so that they are those of the source bit for bit, in its shards, and no more than a
buffer of them is ever in memory.
"""

import json
import os
import pathlib
import shutil
import tempfile

from ftp_jax.errors import UserError
from ftp_jax.export import artifact as artifacts
from ftp_jax.export.artifact import Artifact
from ftp_jax.models.huggingface import INDEX_FILE, SINGLE_FILE, checkpoint_files, fingerprint
from ftp_jax.models.sources import resolve

RUNTIME = pathlib.Path(__file__).with_name("torch_runtime.py")
# What a model directory holds beside its weights; never its own code.
_BESIDE = (
    "config.json", "generation_config.json", "tokenizer*.json", "tokenizer.model", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "*.jinja",
)
_FIGURES = """\
On prompts that no stage had seen; `kl` (to the dense model) and `nll` in nats a token of their continuations,
`agreement` with the dense next token, `perplexity` over all positions of a text; `asked`, `achieved` and `flops_saved`
are shares: of (prompt token, block) pairs that should skip and did, and of the operations of a dense prefill;
`decode_achieved` is the share of (new token, block) pairs that skipped.

| figure | value |
|---|---|
"""


def export(artifact: str, out: str, model: str | None = None, with_weights: bool = False) -> pathlib.Path:
  """Writes an artifact for PyTorch into a new directory, which appears whole or not at all.

  Args:
    artifact: its directory.
    out: the directory to write; must not exist or be empty.
    model: source of the base model (see `models.sources`), whose fingerprint is compared; None: what the artifact
      names, which is read only where the weights are wanted.
    with_weights: also copy the base model: weights, configs, tokenizer.

  Returns:
    The directory.

  Raises:
    UserError: artifact or model are unusable or do not belong together, `out` is in use, or the disk refuses.
  """
  made, out = artifacts.load(artifact), pathlib.Path(out).absolute()
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f"--out={out} already exists and is not empty; choose a new directory.")
  files = []
  if model is not None or with_weights:
    source = resolve(model or made.base_model)
    found = fingerprint(source)
    if found != made.fingerprint:
      raise UserError(
          f"The artifact was made for {made.base_model} (fingerprint {made.fingerprint}), but {source} has {found}; "
          "name the base model it belongs to with --model."
      )
    files = base_files(source) if with_weights else []
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
      here = pathlib.Path(temporary, out.name)
      here.mkdir()  # with the permissions of any new directory, unlike the one around it
      for file in files:
        shutil.copyfile(file, here / file.name)
      artifacts.save(made, here, "torch")
      shutil.copyfile(RUNTIME, here / RUNTIME.name)
      (here / "README.md").write_text(card(made, with_weights), encoding="utf-8")
      os.replace(here, out)
  except OSError as error:
    raise UserError(
        f"cannot write {out} ({error.strerror or error}); free disk space or choose another --out."
    ) from None
  return out


def base_files(source: pathlib.Path) -> list[pathlib.Path]:
  """The files of a Hugging Face directory that make up the model and its tokenizer."""
  weights = checkpoint_files(source)
  index = [] if weights[0].name == SINGLE_FILE else [source / INDEX_FILE]
  beside = sorted({file for pattern in _BESIDE for file in source.glob(pattern) if file.is_file()})
  return weights + index + beside


def card(artifact: Artifact, with_weights: bool) -> str:
  """The README.md of the directory: its files, how to use them, and the figures measured, as a model card."""
  routing, router = artifact.routing, artifact.router
  inputs = [*router.factors, *(["hidden states"] if router.hidden_states else [])]
  base = artifact.base_model
  weights = "| `*.safetensors`, `config.json`, tokenizer files | the base model, unchanged |\n" if with_weights else ""
  new_tokens = f"asked to skip {routing.decode_sparsity:g}" if routing.decode_sparsity else "computed in every block"
  recent = f", the last {routing.recent_tokens} tokens of long prompts first" if routing.recent_tokens else ""
  skipped = "keeps its state"
  if artifact.stand_in is not None:
    skipped = f"is moved by a linear map of rank {artifact.stand_in['down'].shape[-1]} of the block"
  load, tokenizer = ('"HERE"', "HERE") if with_weights else ('"BASE", "HERE"', "BASE")
  where = "HERE is this directory" + ("" if with_weights else f", BASE a directory or hub id that holds `{base}`")
  numbers = {name: value for name, value in artifact.figures.items() if isinstance(value, (int, float, str))}
  measured = "Nothing was measured."
  if numbers:
    measured = _FIGURES + "".join(f"| {name} | {value} |\n" for name, value in numbers.items())
  if artifact.crossover:
    measured += f"\nWhere pruning pays in JAX (`ftp-jax bench crossover`): {json.dumps(artifact.crossover)}\n"
  return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags: [token-pruning, ftp]
---

# {pathlib.PurePath(base).name}, pruned token by token

Each prompt token skips the transformer blocks it does not need (FTP, fine-grained token-wise pruning). The base model,
`{base}` (family {artifact.family}, fingerprint {artifact.fingerprint}), is not changed: a small router
decides while the prompt is read.

## Files

| file | what it is |
|---|---|
{weights}| `ftp_config.json` | schedule, routing, router and figures; format {artifacts.FORMAT_VERSION}, layout torch |
| `router.safetensors` | the router, named and shaped as `torch.nn.Linear`; the maps, if any |
| `torch_runtime.py` | loads and runs it: needs torch, transformers and safetensors, and no other file |

## Use

Copy `torch_runtime.py` beside your program, or install ftp-jax and import `ftp_jax.export.torch_runtime`.
{where}.

```python
from transformers import AutoTokenizer
from torch_runtime import load_pruned

model = load_pruned({load})
tokenizer = AutoTokenizer.from_pretrained("{tokenizer}", padding_side="left")
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=16)[0]))
```

## Router

| | |
|---|---|
| mean sparsity asked | {sum(artifact.schedule) / len(artifact.schedule):.4g} |
| sparsity asked of each block | {", ".join(f"{s:g}" for s in artifact.schedule)} |
| a skipped token | {skipped} |
| keys and values of skipped tokens | {routing.kv} |
| selection | {routing.selection}{recent} |
| router | {router.kind}, {router.hidden_size} wide, reads {", ".join(inputs)} |
| new tokens | {new_tokens} |

## Measured

{measured}"""
