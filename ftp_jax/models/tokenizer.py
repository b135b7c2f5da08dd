"""Tokenizers: loaded from a Hugging Face directory, or rebuilt from the metadata of a GGUF file."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ftp_jax.errors import UserError, brief

_CONTROL = 3  # GGUF token types: special tokens ...
_USER_DEFINED = 4  # ... and added tokens that are ordinary text


def _byte_level():
  return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _qwen2():
  """Contractions, words with the sign before them, single digits, other signs, and whitespace by lines."""
  words = (
      r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
      r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
  )
  return pre_tokenizers.Sequence([
      pre_tokenizers.Split(tokenizers.Regex(words), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ])


# What `tokenizer.ggml.pre` stands for; the merges are only right behind their own pre-tokenizer.
_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "gpt-2": _byte_level,
    "qwen2": _qwen2,
}
_NORMALIZERS = {"qwen2": normalizers.NFC}
_QWEN = ("qwen2", "qwen3")


def build_tokenizer(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
  """Byte-level BPE tokenizer from the key-value metadata of a GGUF file.

  Raises:
    UserError: the file holds no tokenizer, or one that is not rebuilt here.
  """
  kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
  if pre is None and metadata.get("general.architecture") in _QWEN:  # files from before there was the key
    pre = "qwen2"
  if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
    raise UserError(
        f"the GGUF file's tokenizer is model={kind!r} pre={pre!r}, but only model='gpt2' with pre in "
        f"{sorted(_PRE_TOKENIZERS)} can be rebuilt; use the model's Hugging Face directory or hub id."
    )
  tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
  merges = metadata.get("tokenizer.ggml.merges")
  if not tokens or merges is None or types is None or len(types) != len(tokens):
    raise UserError("the GGUF file's tokens, token types and merges are incomplete; download the file again.")
  vocab = {token: i for i, token in enumerate(tokens)}
  try:
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
  except Exception as error:  # pyo3's bare Exception, for a merge of what is no token
    raise UserError(
        f"the GGUF file's merges do not fit its tokens ({brief(error, 120)}); download the file again."
    ) from error
  if pre in _NORMALIZERS:
    tokenizer.normalizer = _NORMALIZERS[pre]()
  tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
  tokenizer.decoder = decoders.ByteLevel()
  added = lambda wanted, special: [
      tokenizers.AddedToken(token, special=special, normalized=False) for token, t in zip(tokens, types) if t == wanted
  ]
  tokenizer.add_special_tokens(added(_CONTROL, True))
  tokenizer.add_tokens(added(_USER_DEFINED, False))
  return tokenizer


def tokenizer_config(metadata: Mapping[str, Any], max_length: int) -> dict[str, Any]:
  """`tokenizer_config.json` that belongs to `build_tokenizer(metadata)`; max_length in tokens."""
  if metadata.get("tokenizer.ggml.add_bos_token"):
    raise UserError(
        "the GGUF file's tokenizer asks for a begin-of-text token on every text, which is not rebuilt here; "
        "use the model's Hugging Face directory or hub id."
    )
  config = {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "model_max_length": max_length,
      "clean_up_tokenization_spaces": False,
  }
  tokens = metadata["tokenizer.ggml.tokens"]
  for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
    token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if token_id is not None and token_id < len(tokens):
      config[f"{name}_token"] = tokens[token_id]
  if metadata.get("tokenizer.chat_template"):
    config["chat_template"] = metadata["tokenizer.chat_template"]
  return config


def end_tokens(metadata: Mapping[str, Any]) -> tuple[int, ...]:
  """Ids after which a model of a GGUF file has nothing to say: those named so, and Qwen's end of text."""
  tokens, qwen = metadata["tokenizer.ggml.tokens"], metadata.get("general.architecture") in _QWEN
  named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
  of_text = [i for i, token in enumerate(tokens) if qwen and token == "<|endoftext|>"]
  return tuple(dict.fromkeys(i for i in named + of_text if i is not None))


def generation_ends(directory: str | pathlib.Path) -> tuple[int, ...]:
  """Ids that end a generation by the `generation_config.json` of a Hugging Face directory; () where it says nothing."""
  try:
    found = json.loads((pathlib.Path(directory) / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
  except (OSError, ValueError, KeyError, TypeError):
    return ()
  return tuple(i for i in (found if isinstance(found, list) else [found]) if isinstance(i, int))


def load_tokenizer(directory: str | pathlib.Path) -> transformers.PreTrainedTokenizerBase:
  """Tokenizer of a Hugging Face directory; never runs the checkpoint's own code, never goes online.

  Raises:
    UserError: the directory has no usable tokenizer.
  """
  directory = pathlib.Path(directory)
  if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
    raise UserError(f"{directory} holds no tokenizer; copy the model's tokenizer.json and tokenizer_config.json there.")
  try:
    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
  except Exception as error:  # the loaders raise anything, down to pyo3's bare Exception
    reason = brief(error, 200)
    raise UserError(f"the tokenizer in {directory} cannot be read ({reason}); download it again.") from error
