"""GGUF files of Llama, Qwen1.5/2/2.5 and Qwen3: dequantised into a Hugging Face directory, tokenizer included.

The converter of "llama" permutes the rows of the query and key weights (interleaved rotary pairs instead of halves);
they are put back here. That of the others does not.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import filelock
import gguf
import numpy as np

from ftp_jax.errors import UserError, brief
from ftp_jax.models.config import ModelConfig
from ftp_jax.models.huggingface import MAX_SHARD_BYTES, write_checkpoint
from ftp_jax.models.tokenizer import build_tokenizer, end_tokens, tokenizer_config

# GGUF name of a block's tensor -> its name in a Hugging Face checkpoint.
_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
# GGUF architecture, which is also the `model_type` -> class of the checkpoint, and tensors that only its blocks have.
_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {f"attn_{part}.bias": f"self_attn.{part}_proj.bias" for part in "qkv"}),
    "qwen3": ("Qwen3ForCausalLM", {f"attn_{part}_norm.weight": f"self_attn.{part}_norm.weight" for part in "qk"}),
}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def convert_gguf(gguf_path: str | os.PathLike, out_dir: str | os.PathLike) -> None:
  """Writes a Hugging Face directory with the dequantised weights in fp32 (4 bytes a parameter).

  The directory appears whole or not at all; nothing is done where it already exists.

  Raises:
    UserError: the file is corrupt or holds a model that is not read here, or the disk refuses.
  """
  gguf_path, out_dir = pathlib.Path(gguf_path), pathlib.Path(out_dir)
  if out_dir.exists():
    return
  try:
    reader = gguf.GGUFReader(gguf_path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
  except FileNotFoundError:
    raise UserError(f"{gguf_path} does not exist; check the path.") from None
  except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, OSError) as error:
    reason = brief(error, 120)
    raise UserError(f"{gguf_path} is truncated or not a GGUF file ({reason}); download it again.") from None
  if metadata.get("split.count", 1) > 1:
    raise UserError(
        f"{gguf_path} is one of {metadata['split.count']} parts of a model; merge them with llama-gguf-split --merge, "
        "or use the model's Hugging Face directory or hub id."
    )
  names = {tensor.name for tensor in reader.tensors}
  config = _hf_config(metadata, tied="output.weight" not in names)
  tokenizer, settings = build_tokenizer(metadata), tokenizer_config(metadata, config["max_position_embeddings"])
  tensors = [_entry(tensor, config) for tensor in reader.tensors]
  with _new_directory(out_dir) as directory:
    if directory is None:
      return
    write_checkpoint(tensors, directory, MAX_SHARD_BYTES)
    # Written by us: the library reports a full disk as an exception of no type.
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    ends = end_tokens(metadata)
    if ends:
      generation["eos_token_id"] = list(ends)
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", settings),
        ("generation_config.json", generation),
    ):
      (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _hf_config(metadata: Mapping[str, Any], tied: bool) -> dict[str, Any]:
  """`config.json` of the model that the metadata describe."""
  architecture = metadata.get("general.architecture")
  if architecture not in _ARCHITECTURES:
    raise UserError(
        f"the GGUF file holds architecture {architecture!r}, but only {', '.join(_ARCHITECTURES)} are read from GGUF; "
        "use the model's Hugging Face directory or hub id."
    )
  option = lambda name, default=None: metadata.get(f"{architecture}.{name}", default)
  if option("rope.scaling.type", "none") != "none" or option("expert_count") or option("attention.sliding_window"):
    raise UserError(
        "the GGUF file asks for rope scaling, experts or a sliding window, which are not read from GGUF; "
        "use the model's Hugging Face directory or hub id."
    )
  try:
    value = lambda name: metadata[f"{architecture}.{name}"]
    heads, hidden = value("attention.head_count"), value("embedding_length")
    config = {
        "architectures": [_ARCHITECTURES[architecture][0]],
        "model_type": architecture,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": option("attention.head_count_kv", heads),
        "head_dim": option("attention.key_length") or hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": value("context_length"),
        # Stored in fp32: the shortest decimal that rounds to it is the number that was meant.
        "rms_norm_eps": float(str(np.float32(value("attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(option("rope.freq_base", 10_000.0)),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
    }
  except KeyError as missing:
    raise UserError(f"the GGUF file has no {missing} in its metadata; download it again.") from None
  except (TypeError, ValueError, ZeroDivisionError) as error:  # such as numbers of heads that differ between blocks
    raise UserError(f"the GGUF file's sizes cannot be read ({brief(error, 120)}); use another model.") from None
  rotary = option("rope.dimension_count", config["head_dim"])
  if rotary != config["head_dim"]:
    raise UserError(
        f"the GGUF file rotates {rotary} of {config['head_dim']} dimensions of a head, which is not supported; "
        "use another model."
    )
  for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
    token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if token_id is not None:
      config[f"{name}_token_id"] = token_id
  ModelConfig.from_hf(config)
  return config


def _entry(tensor: gguf.ReaderTensor, config: Mapping[str, Any]):
  """What `write_checkpoint` takes: name, bytes in fp32 and a function that makes the array."""
  name = _OUTSIDE.get(tensor.name)
  part = ""
  if tensor.name.startswith("blk."):
    block, _, part = tensor.name.removeprefix("blk.").partition(".")
    in_block = (_BLOCK | _ARCHITECTURES[config["model_type"]][1]).get(part)
    name = in_block and f"model.layers.{block}.{in_block}"
  if name is None:
    raise UserError(
        f"the GGUF file holds {tensor.name}, which is not read from GGUF; "
        "use the model's Hugging Face directory or hub id."
    )
  try:
    gguf.quants.dequantize(tensor.data[:1] if tensor.data.ndim > 1 else tensor.data, tensor.tensor_type)
  except NotImplementedError:
    raise UserError(
        f"the GGUF file holds {tensor.name} as {tensor.tensor_type.name}, which cannot be dequantised; use another "
        "quantisation of the model."
    ) from None
  permuted = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}
  heads = config[permuted[part]] if config["model_type"] == "llama" and part in permuted else None

  def make():
    weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    return weight if heads is None else _unpermute(weight, heads)

  return name, 4 * int(tensor.n_elements), make


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
  """Rows (2j, 2j+1) of each head, a rotary pair, back to (j, j + N/2); weight (heads * N, D)."""
  pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)
  return pairs.swapaxes(1, 2).reshape(weight.shape)


@contextlib.contextmanager
def _new_directory(final: pathlib.Path) -> Iterator[pathlib.Path | None]:
  """Yields a scratch directory that becomes `final` in one step, or is removed on failure.

  None where another process has made it while this one waited for its turn.
  """
  lock, scratch = filelock.FileLock(final.with_name(f".{final.name}.lock")), final.with_name(f".{final.name}.partial")
  try:
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
      lock.acquire()
    except (OSError, NotImplementedError):  # a file system without locks: each writes its own, and the first one stays
      scratch = final.with_name(f".{final.name}.{os.getpid()}.partial")
    if final.exists():
      yield None
      return
    shutil.rmtree(scratch, ignore_errors=True)  # that of a process that was killed
    scratch.mkdir()
    yield scratch
    try:
      scratch.rename(final)
    except OSError:
      if not final.exists():
        raise
  except OSError as error:
    raise UserError(f"cannot write {final} ({error.strerror}); free disk space or choose another place.") from None
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
    lock.release()
