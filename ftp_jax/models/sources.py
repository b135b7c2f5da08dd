"""One way in for every model source: known name, Hugging Face directory, GGUF file or hub id."""

import dataclasses
import hashlib
import os
import pathlib
import re
import socket
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import transformers

from ftp_jax import distributed
from ftp_jax.errors import UserError, brief
from ftp_jax.models.config import ModelConfig
from ftp_jax.models.fetch import KNOWN, cache_root, expand, fetch
from ftp_jax.models.gguf import convert_gguf
from ftp_jax.models.huggingface import load_params
from ftp_jax.models.tokenizer import load_tokenizer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja")


@dataclasses.dataclass(frozen=True)
class Model:
  """A frozen model: architecture, parameters (tree of `decoder.init_params`), tokenizer, directory."""

  config: ModelConfig
  params: Any
  tokenizer: transformers.PreTrainedTokenizerBase
  directory: pathlib.Path

  @property
  def dtype(self) -> str:
    """Of the parameters, one of DTYPES."""
    return jax.tree.leaves(self.params)[0].dtype.name


def resolve(source: str, cache_dir: str | os.PathLike | None = None) -> pathlib.Path:
  """Local Hugging Face directory of a model source; fetches or converts it where needed.

  Of several processes (jax.distributed) only process 0 fetches or converts. The others wait for it, then look in
  their own file system: it has to be shared between hosts, or each host has to hold the model before the run.

  Args:
    source: known name, existing directory, existing `.gguf` file, or hub id `org/name`.
    cache_dir: see `fetch.cache_root`; hub models stay in the hub's own cache.

  Raises:
    UserError: the source is none of these or cannot be had; process 0 had that error; or this process does not find
      what process 0 has.
  """
  found = []
  distributed.on_first(lambda: found.append(_resolve(source, cache_dir)))
  if found:
    return found[0]
  try:
    return _resolve(source, cache_dir, get=False)
  except UserError as error:
    raise UserError(
        f"process {distributed.process_id()} ({socket.gethostname()}) does not find {source!r}, which process 0 has; "
        "let FTP_JAX_CACHE or HF_HOME name a directory that all hosts share, or fetch the model on each host before "
        "the run."
    ) from error


def _resolve(source: str, cache_dir: str | os.PathLike | None, get: bool = True) -> pathlib.Path:
  """`resolve` for this process alone. With `get` false nothing is fetched or converted: UserError where it is not."""
  if source in KNOWN:
    return fetch(source, cache_dir) if get else _present(cache_root(cache_dir) / source)
  path = expand(source)
  if source and path.is_dir():
    return path
  if path.is_file() and path.suffix == ".gguf":
    with path.open("rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    directory = cache_root(cache_dir) / f"gguf-{digest}"
    if get:
      convert_gguf(path, directory)
    return _present(directory)
  if path.exists() or path.suffix == ".gguf" or not _HUB_ID.fullmatch(source):
    raise UserError(
        f"{source!r} is no model source; pass a known name ({', '.join(sorted(KNOWN))}), an existing Hugging Face "
        "directory, an existing .gguf file, or a hub id of the form org/name."
    )
  try:
    # Subfolders hold other formats of the same weights.
    found = huggingface_hub.snapshot_download(
        source, allow_patterns=_HUB_FILES, ignore_patterns="*/*", local_files_only=not get
    )
  except Exception as error:  # the hub client raises its own, httpx's and the system's
    reason = brief(error)
    raise UserError(
        f"{source!r} is no local directory and the hub does not give it ({type(error).__name__}: {reason}); "
        "check the name, the network and your access, or pass a local directory."
    ) from error
  return pathlib.Path(found)


def _present(directory: pathlib.Path) -> pathlib.Path:
  if not directory.is_dir():
    raise UserError(f"{directory} does not exist; fetch the model first.")
  return directory


def describe(source: str) -> tuple[ModelConfig, transformers.PreTrainedTokenizerBase, pathlib.Path]:
  """Architecture, tokenizer and directory of a model, which is fetched where needed; no weights are read.

  Raises:
    UserError: the source, the architecture or the tokenizer is unusable.
  """
  directory = resolve(source)
  config = ModelConfig.from_directory(directory)
  tokenizer = load_tokenizer(directory)
  largest = max(tokenizer.get_vocab().values())
  if largest >= config.vocab_size:
    raise UserError(
        f"the tokenizer in {directory} has token id {largest}, but the model has only {config.vocab_size} embeddings; "
        "use the model's own tokenizer."
    )
  return config, tokenizer, directory


def load_model(source: str, dtype: str = "float32", shardings: Any = None) -> Model:
  """Loads a model from any source.

  Args:
    source: see `resolve`.
    dtype: of the parameters, "float32" or "bfloat16".
    shardings: tree of shardings like the parameters, or a function that makes it from the
      `ModelConfig`; None: all on the default device. Of several processes each reads and holds only the shards of
      its own devices; without shardings each holds the whole model.

  Raises:
    UserError: the source, the weights or the tokenizer are unusable.
  """
  if dtype not in DTYPES:
    raise UserError(f"dtype {dtype!r} is not supported; use one of {', '.join(DTYPES)}.")
  config, tokenizer, directory = describe(source)
  placed = shardings(config) if callable(shardings) else shardings
  return Model(config, load_params(directory, config, DTYPES[dtype], placed), tokenizer, directory)
