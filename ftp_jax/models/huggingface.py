"""Weights of Hugging Face checkpoints (safetensors), both ways, bit for bit.

`_TABLE` is the one mapping between checkpoint names and our tree. Which of its rows a model has
follows from `abstract_params(config)`, so this module knows nothing of families.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ftp_jax.errors import UserError, brief
from ftp_jax.models.config import ModelConfig
from ftp_jax.models.decoder import abstract_params
from ftp_jax.models.fingerprint import fingerprint_tensors
from ftp_jax.models.placement import Part, make_array, shape_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 2 * 10**9
PIECE_SIZE = 4 * 2**20  # values that are read, cast and sent to a device at once
_COMPARED_ROWS = 256  # of an output head that should be the embedding

# Path in our tree -> name in the checkpoint. Kernels are (in, out) here and (out, in) there.
_TABLE = {
    "embed/embedding": "model.embed_tokens.weight",
    "embed/lm_head": "lm_head.weight",
    "embed/final_norm/scale": "model.norm.weight",
    "blocks/attn_norm/scale": "model.layers.{}.input_layernorm.weight",
    "blocks/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "blocks/q/bias": "model.layers.{}.self_attn.q_proj.bias",
    "blocks/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "blocks/k/bias": "model.layers.{}.self_attn.k_proj.bias",
    "blocks/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "blocks/v/bias": "model.layers.{}.self_attn.v_proj.bias",
    "blocks/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "blocks/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
    "blocks/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "blocks/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "blocks/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "blocks/down/kernel": "model.layers.{}.mlp.down_proj.weight",
}
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # buffers of old checkpoints
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class _Leaf:
  """One leaf of our tree and the checkpoint tensors that it is stacked from."""

  names: tuple[str, ...]  # one a block, or a single one for unstacked leaves
  stacked: bool
  transposed: bool
  tensor_shape: tuple[int, ...]  # of each tensor, in the checkpoint's layout


def _leaves(config: ModelConfig) -> tuple[list[tuple[jax.ShapeDtypeStruct, _Leaf]], Any]:
  """(abstract leaf, its checkpoint tensors) in tree order, and the tree's structure."""
  paths, treedef = jax.tree_util.tree_flatten_with_path(abstract_params(config))
  found = []
  for path, abstract in paths:
    key = "/".join(p.key for p in path)
    stacked, transposed = key.startswith("blocks/"), key.endswith("/kernel")
    names = tuple(_TABLE[key].format(i) for i in range(config.num_blocks)) if stacked else (_TABLE[key],)
    shape = abstract.shape[1:] if stacked else abstract.shape
    found.append((abstract, _Leaf(names, stacked, transposed, shape[::-1] if transposed else shape)))
  return found, treedef


def checkpoint_files(directory: str | pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files that make up the checkpoint in a directory.

  Raises:
    UserError: there are none, only pickled weights, or a shard is missing.
  """
  directory = pathlib.Path(directory)
  if (directory / SINGLE_FILE).is_file():
    return [directory / SINGLE_FILE]
  index = directory / INDEX_FILE
  if not index.is_file():
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
      raise UserError(
          f"{directory} holds only pickled weights, which are never read; convert them to safetensors first."
      )
    raise UserError(f"{directory} holds no {SINGLE_FILE} and no {INDEX_FILE}; get the model in safetensors format.")
  try:
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
  except (ValueError, KeyError, TypeError, AttributeError):
    raise UserError(f"{index} is not a valid index of safetensors files; download it again.") from None
  for name in names:
    if pathlib.PurePath(name).name != name or not (directory / name).is_file():
      raise UserError(f"{index} names the file {name!r}, which is not beside it; download the missing shard.")
  return [directory / name for name in names]


@contextlib.contextmanager
def open_checkpoint(directory: str | pathlib.Path):
  """Yields {tensor name: slice of an open safetensors file}; nothing is read until it is indexed."""
  with contextlib.ExitStack() as stack:
    slices = {}
    for file in checkpoint_files(directory):
      try:
        handle = stack.enter_context(safe_open(file, framework="numpy"))
      except (SafetensorError, OSError) as error:
        reason = brief(error, None)
        raise UserError(f"{file} is truncated or not a safetensors file ({reason}); download it again.") from None
      slices.update({name: handle.get_slice(name) for name in handle.keys()})
    yield slices


def _check(config: ModelConfig, leaves: Sequence[_Leaf], slices: dict[str, Any], directory) -> None:
  """Raises UserError unless the checkpoint holds exactly the tensors of the config."""
  expected = {name: leaf.tensor_shape for leaf in leaves for name in leaf.names}
  optional = {"lm_head.weight": (config.vocab_size, config.hidden_size)} if config.tie_embeddings else {}
  some = lambda names: ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
  missing = expected.keys() - slices.keys()
  if missing:
    raise UserError(f"{directory} lacks {some(missing)}; download the model again or correct its config.json.")
  present = {name: s for name, s in slices.items() if not _IGNORED.fullmatch(name)}
  extra = present.keys() - expected.keys() - optional.keys()
  if extra:
    raise UserError(
        f"{directory} holds {some(extra)}, which config.json has no place for; use the matching config.json."
    )
  for name, tensor in present.items():
    shape, want = tuple(tensor.get_shape()), (expected | optional)[name]
    if shape != want:
      raise UserError(f"{name} has shape {shape} where config.json asks for {want}; use the matching config.json.")
    if tensor.get_dtype() not in _FLOATS:
      raise UserError(
          f"{name} is stored as {tensor.get_dtype()}, but only {', '.join(_FLOATS)} are read; "
          "use the unquantised model."
      )
  if optional.keys() & present.keys():
    rows = np.unique(np.linspace(0, config.vocab_size - 1, _COMPARED_ROWS).astype(int))
    row = lambda name, i: present[name][i : i + 1].astype(np.float32)  # they may be stored in different types
    if any((row("lm_head.weight", i) != row("model.embed_tokens.weight", i)).any() for i in rows.tolist()):
      raise UserError(
          f"{directory} holds an lm_head.weight of its own, although config.json says that it is the embedding; set "
          "tie_word_embeddings to false there."
      )


def _read(leaf: _Leaf, slices: dict[str, Any], part: Part, out: np.ndarray) -> None:
  """Reads one part of a leaf into `out`; only the bytes of that part (rows apart from other rows)."""
  blocks, inner = (part[0], part[1:]) if leaf.stacked else ((0, 1), part)
  bounds = tuple(slice(*ends) for ends in (inner[::-1] if leaf.transposed else inner))
  for target, name in zip(out if leaf.stacked else out[None], leaf.names[slice(*blocks)], strict=True):
    tensor = slices[name][bounds]
    if leaf.transposed:
      # A few rows at a time stay in the cache: four times as fast as one copy of the transposed view.
      for row in range(0, len(tensor), 16):
        target[:, row : row + 16] = tensor[row : row + 16].T
    else:
      target[...] = tensor


def load_params(
    directory: str | pathlib.Path, config: ModelConfig, dtype: Any = np.float32, shardings: Any = None
) -> Any:
  """Parameters of a Hugging Face checkpoint, in the tree of `decoder.init_params`.

  Beside what `placement.make_array` needs, a process holds one piece of a tensor (PIECE_SIZE) as it is stored.

  Args:
    directory: holds `model.safetensors`, or shards with their index.
    config: the model's architecture.
    dtype: of the result; tensors stored otherwise are cast.
    shardings: tree of `jax.sharding.Sharding` like the parameters. Each process then reads only
      its own slices. None: all on the default device.

  Raises:
    UserError: a tensor is missing, unknown, misshaped or not a float, or a file is unreadable.
  """
  found, treedef = _leaves(config)
  placed = [None] * len(found) if shardings is None else treedef.flatten_up_to(shardings)
  with open_checkpoint(directory) as slices:
    _check(config, [leaf for _, leaf in found], slices, directory)
    return treedef.unflatten(
        make_array(
            abstract.shape, dtype, sharding, functools.partial(_pieces, leaf), functools.partial(_read, leaf, slices)
        )
        for (abstract, leaf), sharding in zip(found, placed)
    )


def _pieces(leaf: _Leaf, part: Part) -> list[Part]:
  """Cuts a part into pieces of one shape and at most PIECE_SIZE values: itself, or else blocks, or rows of blocks."""
  shape = shape_of(part)
  if math.prod(shape) <= PIECE_SIZE:
    return [part]
  blocks = [((i, i + 1),) for i in range(*part[0])] if leaf.stacked else [()]
  inner = part[1:] if leaf.stacked else part
  axis = len(inner) - 1 if leaf.transposed else 0  # the rows of the checkpoint's tensor
  start, stop = inner[axis]
  per_row = math.prod(shape) // len(blocks) // (stop - start)
  count = -(-(stop - start) // max(1, PIECE_SIZE // per_row))
  rows = -(-(stop - start) // count)
  # The last piece ends where the part does, over rows of the one before where need be: one shape, one compilation.
  firsts = [min(start + i * rows, stop - rows) for i in range(count)]
  cut = [inner[:axis] + ((first, first + rows),) + inner[axis + 1 :] for first in firsts]
  return [block + piece for block in blocks for piece in cut]


def fingerprint(directory: str | pathlib.Path) -> str:
  """Hash (16 hex digits) of the weights in a Hugging Face directory; reads a small sample of them."""
  tied = ModelConfig.from_directory(directory).tie_embeddings
  with open_checkpoint(directory) as slices:
    counted = {
        name: tensor for name, tensor in slices.items()
        if not _IGNORED.fullmatch(name) and not (tied and name == "lm_head.weight")
    }
    for name, tensor in counted.items():
      shape = tuple(tensor.get_shape())
      if not shape or 0 in shape:
        raise UserError(
            f"{directory} holds {name!r} of shape {shape}, which is no weight of a supported model; get the model in "
            "its original format."
        )
    return fingerprint_tensors((name, tensor.get_shape(), tensor.__getitem__) for name, tensor in counted.items())


def write_checkpoint(
    tensors: Sequence[tuple[str, int, Callable[[], np.ndarray]]], directory: pathlib.Path, max_shard_bytes: int
) -> None:
  """Writes (name, bytes, function that makes the array) as safetensors; holds one shard at a time.

  One file where all fits into `max_shard_bytes`, else numbered shards and their index.
  """
  shards: list[list[int]] = [[]]
  used = 0
  for i, (_, size, _) in enumerate(tensors):
    if shards[-1] and used + size > max_shard_bytes:
      shards.append([])
      used = 0
    shards[-1].append(i)
    used += size
  weight_map = {}
  for number, members in enumerate(shards, 1):
    file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    arrays = {tensors[i][0]: np.ascontiguousarray(tensors[i][2]()) for i in members}
    try:
      save_file(arrays, directory / file, metadata={"format": "pt"})
      (directory / file).chmod(directory.stat().st_mode & 0o666)  # the writer leaves it to its owner alone
    except (SafetensorError, OSError) as error:
      reason = brief(error, None)
      raise UserError(f"cannot write {directory / file} ({reason}); free disk space or choose another place.") from None
    weight_map.update(dict.fromkeys(arrays, file))
  if len(shards) > 1:
    index = {"metadata": {"total_size": sum(size for _, size, _ in tensors)}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def save_params(
    params: Any,
    config: ModelConfig,
    directory: str | os.PathLike,
    hf_config: dict[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Writes parameters as a Hugging Face checkpoint: safetensors and `config.json`.

  Args:
    params: tree of `decoder.init_params`, every array readable from this process.
    config: the model's architecture.
    directory: created where missing; must hold no weights yet.
    hf_config: the `config.json` to write; must describe the same architecture as `config`.
    max_shard_bytes: largest file.

  Raises:
    UserError: the directory holds weights, the config differs, or the disk refuses.
  """
  directory = pathlib.Path(directory)
  if ModelConfig.from_hf(hf_config) != config:
    raise UserError("hf_config describes another architecture than config; pass the config.json of the same model.")
  tensors = hf_tensors(params, config)
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"cannot create {directory} ({error.strerror}); choose another place.") from None
  if any(directory.glob("*.safetensors")):
    raise UserError(f"{directory} already holds weights; choose an empty directory.")
  write_checkpoint(tensors, directory, max_shard_bytes)
  (directory / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")


def hf_tensors(params: Any, config: ModelConfig) -> list[tuple[str, int, Callable[[], np.ndarray]]]:
  """(Hugging Face name, bytes, function that makes the array) of every tensor of the parameters."""
  found, treedef = _leaves(config)
  tensors = []
  for array, (abstract, leaf) in zip(treedef.flatten_up_to(params), found):
    if array.shape != abstract.shape:
      raise ValueError(f"{leaf.names[0]}: parameters of shape {array.shape}, config asks for {abstract.shape}")
    size = array.nbytes // len(leaf.names)
    tensors.extend((name, size, _tensor_maker(array, leaf, i)) for i, name in enumerate(leaf.names))
  return tensors


def _tensor_maker(array: Any, leaf: _Leaf, i: int) -> Callable[[], np.ndarray]:
  def make():
    tensor = np.asarray(array[i] if leaf.stacked else array)
    return tensor.T if leaf.transposed else tensor

  return make
