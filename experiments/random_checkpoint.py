"""Writes a checkpoint of a full-size architecture with random weights in bf16: for timing, good for nothing else.

  python experiments/random_checkpoint.py --architecture=llama2-7b --tokenizer=DIR --out=DIR
  ftp-jax bench prefill --model=DIR --dtype=bfloat16

What a prefill costs depends on shapes and routes, not on what the weights are. The tokenizer is that of a model at
hand; where it has more tokens than the architecture has embeddings, as many embeddings are made. Llama-2-7B takes 13.5
GB on disk, and twice as much memory while it is made.
"""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
from absl import flags

from ftp_jax import launch
from ftp_jax.errors import UserError
from ftp_jax.models import decoder
from ftp_jax.models.architectures import ARCHITECTURES
from ftp_jax.models.config import ModelConfig
from ftp_jax.models.huggingface import save_params
from ftp_jax.models.sources import resolve
from ftp_jax.models.tokenizer import load_tokenizer

_ARCHITECTURE = flags.DEFINE_enum("architecture", "llama2-7b", list(ARCHITECTURES), "Whose shapes.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "smollm2-135m", "Model source whose tokenizer is copied.")
_OUT = flags.DEFINE_string("out", None, "Directory to write.", required=True)

_FILES = ("tokenizer.json", "tokenizer_config.json")


def write(architecture: str, tokenizer: pathlib.Path, out: pathlib.Path) -> None:
  """Writes weights, `config.json` and tokenizer.

  Args:
    tokenizer: directory that holds one.

  Raises:
    UserError: `out` holds weights, or the disk refuses.
  """
  for file in _FILES:
    if not (tokenizer / file).exists():
      raise UserError(f"{tokenizer} has no {file}; name another --tokenizer.")
  if out.exists() and any(out.iterdir()):
    raise UserError(f"{out} is not empty; name another --out.")
  out.mkdir(parents=True, exist_ok=True)
  for file in _FILES:
    shutil.copy(tokenizer / file, out / file)
  hf = ARCHITECTURES[architecture] | {"dtype": "bfloat16"}
  (out / "config.json").write_text(json.dumps(hf))  # what transformers takes for the tokenizer depends on it
  tokens = max(load_tokenizer(out).get_vocab().values()) + 1
  hf["vocab_size"] = max(tokens, hf["vocab_size"])
  config = ModelConfig.from_hf(hf)
  random = lambda key: jax.tree.map(lambda a: a.astype(jnp.bfloat16), decoder.init_params(config, key))
  save_params(jax.jit(random)(jax.random.key(0)), config, out, hf)


def main() -> None:
  write(_ARCHITECTURE.value, resolve(_TOKENIZER.value), pathlib.Path(_OUT.value))
  print(f"written to {_OUT.value}")


if __name__ == "__main__":
  launch.script(main)
