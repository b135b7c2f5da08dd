"""A pruned causal language model on PyTorch, for transformers 5: each prompt token skips the blocks it does not need.

  model = load_pruned("EXPORTED")             # written by `ftp-jax export --with-weights`
  model = load_pruned(base_model, "EXPORTED")  # or what `ftp-jax export` wrote, beside your own base model
  model.generate(**tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt"), max_new_tokens=64)

This file needs torch, transformers and safetensors alone and may be copied beside a program that uses it. It
computes with the modules of the Hugging Face model and replaces its loop over the blocks: that is `PrunedModel`, at
the end. The two `_Gates` decide what a block computes, by the router of the `Artifact`. Routes are those of ftp_jax,
whose docs/method.md has the formulas; inference only, on one device.

Axes: B rows, C columns of the input, T context tokens of the longest row, P tokens of all rows packed one behind the
other, K some of those, S slots of a block's cache, W late queries of a row, D hidden size, H query heads, G key heads,
N head size, F factors and R hidden size of the router.
"""

import copy
import dataclasses
import hashlib
import json
import math
import pathlib
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.modeling_outputs import CausalLMOutputWithPast

FORMAT_VERSION = 1
CONFIG_FILE, WEIGHTS_FILE = "ftp_config.json", "router.safetensors"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
EMPTY = 2**30  # position of a cache slot that holds no token
_STEPS = 40_000  # sparsities count in steps of 1 / _STEPS, so that capacities are integer arithmetic
_ROUNDING = 1e-5  # share by which a new token's margin may be below that of a context token and count as equal
_MOST_RECENT = 4  # recent tokens are at most the 4th part of a context: a shorter one has none
_CHUNK = 512  # queries that are masked at once
# What a model's output calls its cache; transformers 5.24 changed the name.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
_WHOLE = 0.3  # from this share of queries on, causal attention of all tokens is faster than masked of some
# What an artifact chooses, with the values known here; its numbers, with the least and the largest; their types.
_CHOICES = {
    "kv_mode": ("evict", "project"), "selection": ("topk", "argmax"), "decode_rule": ("threshold", "quantile"),
    "kind": ("global", "per_block", "recurrent"),
}
_RANGES = {
    "bucket_multiple": (1, 2**20), "score_window": (1, 2**20), "recent_tokens": (0, 2**20), "decode_sparsity": (0, 1),
    "decode_threshold": (0, 1), "one_pass_block": (-1, math.inf), "evict_from": (0, math.inf),
    "hidden_size": (1, math.inf),
}
_TYPES = {"hidden_states": (bool,), "factors": (list,)} | {
    name: (int, float) if name.startswith("decode") else (int,) for name in _RANGES
}
_MAPS = "stand_in."  # how the names of the maps for skipped blocks begin in the file of weights
_FACTORS = ("position", "score", "rank", "sparsity")


@dataclasses.dataclass
class Artifact:
  """What an exported directory says: schedule (L), routing and router (see ftp_jax/routing/config.py), its weights."""

  base_model: str
  fingerprint: str
  schedule: torch.Tensor
  routing: dict[str, Any]
  router: dict[str, Any]
  weights: dict[str, torch.Tensor]
  maps: dict[str, torch.Tensor]  # bias (L,D), down (L,D,R) and up (L,R,D) that stand in for skipped blocks, or none

  def __post_init__(self):
    asked, mean = self.routing["decode_sparsity"], self.schedule.mean()
    self.decode_schedule = (self.schedule * asked / (mean if mean > 0 else 1.0)).clamp(0.0, 0.99)

  def moved(self, block: int, x_KxD: torch.Tensor) -> torch.Tensor:
    """The states of tokens that skip a block."""
    if not self.maps:
      return x_KxD
    bias, down, up = (self.maps[name][block].to(x_KxD) for name in ("bias", "down", "up"))
    scale = torch.rsqrt(x_KxD.float().square().mean(-1, keepdim=True) + 1e-6).to(x_KxD.dtype)
    return x_KxD + (scale * (x_KxD @ down)) @ up + bias

  def margin(self, block: int, factors_PxF, x_PxD, state_PxR):
    """Compute minus skip logit (P) in fp32 of tokens that enter a block, and the state carried to the next."""
    if self.weights["out.bias"].device != x_PxD.device:
      self.weights = {name: w.to(x_PxD.device) for name, w in self.weights.items()}
    per_block = self.router["kind"] == "per_block"
    weights = {name: w[block] if per_block else w for name, w in self.weights.items()}
    of_factors, of_states = weights["hidden.weight"].tensor_split([factors_PxF.shape[1]], dim=1)
    with torch.autocast(x_PxD.device.type, enabled=False):
      hidden = factors_PxF @ of_factors.T + weights["hidden.bias"]
      if self.router["hidden_states"]:  # root mean square normed; the norm is applied to the R results
        x = x_PxD.float()
        scale = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + 1e-6)
        hidden = hidden + (x @ of_states.T) * scale
      if self.router["kind"] == "recurrent":
        hidden = hidden + state_PxR @ weights["recurrent.weight"].T
      hidden = F.silu(hidden)
      logits = F.linear(hidden, weights["out.weight"], weights["out.bias"])
    return logits[:, 1] - logits[:, 0], hidden


def _read(path, read):
  """What `read` makes of a file or directory; ValueError in one sentence if it cannot."""
  try:
    return read(path)
  except (OSError, AttributeError, ValueError, KeyError, TypeError, SafetensorError) as error:
    reason = " ".join(str(error).split())[:200]
    raise ValueError(f"{path} cannot be read ({reason}); export or download it again.") from None


def read_artifact(directory) -> Artifact:
  """Reads an exported artifact; ValueError in one sentence if it is missing, damaged, foreign or newer."""
  file = pathlib.Path(directory) / CONFIG_FILE
  if not file.is_file():
    raise ValueError(f"{directory} has no {CONFIG_FILE}; point at what `ftp-jax export` wrote.")
  said = _read(file, lambda path: dict(json.loads(path.read_text(encoding="utf-8"))))
  version, layout = said.get("format_version"), said.get("layout", "flax")
  if version != FORMAT_VERSION:
    raise ValueError(f"{directory} has format {version!r}, but {FORMAT_VERSION} is read here; update this file.")
  if layout != "torch":
    raise ValueError(f"{directory} has the layout {layout!r}; convert it with `ftp-jax export --artifact={directory}`.")
  weights = _read(file.with_name(WEIGHTS_FILE), load_file)
  try:
    routing = {"evict_from": 0, "recent_tokens": 0} | said["routing"]  # absent in older artifacts
    schedule, options = torch.tensor(said["schedule"], dtype=torch.float32), routing | said["router"]
    unknown = set(options) ^ {*_CHOICES, *_TYPES} | set(options["factors"]) - set(_FACTORS)
    unknown |= {name for name, known in _CHOICES.items() if options[name] not in known}
    unknown |= {name for name, types in _TYPES.items() if type(options[name]) not in types}  # a bool is no int
    unknown |= {name for name in set(_RANGES) - unknown if not _RANGES[name][0] <= options[name] <= _RANGES[name][1]}
    maps = {name.removeprefix(_MAPS): weights.pop(name) for name in list(weights) if name.startswith(_MAPS)}
    unknown |= {"factors"} if len(set(options["factors"])) < len(options["factors"]) else set()
    if unknown or schedule.ndim != 1 or not ((schedule >= 0) & (schedule <= 1)).all():
      raise ValueError(", ".join(sorted(unknown)) or "its schedule")
    return Artifact(said["base_model"], said["fingerprint"], schedule, routing, said["router"], weights, maps)
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{file} says what is not known here ({error}); update this file or export again.") from None


def fingerprint(tensors: dict[str, Any], tied: bool) -> str:
  """The hash of ftp_jax/models/fingerprint.py; values are tensors or open slices of safetensors files."""
  digest = hashlib.sha256()
  for name in sorted(tensors):
    if (tied and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq"):
      continue
    tensor = tensors[name]
    shape = tuple(tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape())
    if not shape or 0 in shape:
      raise ValueError(f"The model holds {name!r} of shape {shape}, no weight of a supported one; take the original.")
    digest.update(f"{name} {shape}\n".encode())
    for row in sorted({0, shape[0] // 2, shape[0] - 1}):
      part = tensor[(slice(row, row + 1), *(slice(0, min(64, size)) for size in shape[1:]))]
      digest.update(np.ascontiguousarray(part.detach().float().cpu().numpy(), "<f4").tobytes())
  return digest.hexdigest()[:16]


def _check_fit(artifact: Artifact, tensors: dict[str, Any], config) -> None:
  """ValueError unless the artifact is of this base model, and schedule and router have its size."""
  if config.model_type not in FAMILIES:
    raise ValueError(f"model_type={config.model_type!r} is not supported; supported are {', '.join(FAMILIES)}.")
  found = fingerprint(tensors, config.tie_word_embeddings)
  if found != artifact.fingerprint:
    raise ValueError(
        f"The artifact was made for {artifact.base_model} (fingerprint {artifact.fingerprint}), but this model has "
        f"{found}; load the base model it belongs to, by its directory if you cast its weights."
    )
  router, blocks = artifact.router, config.num_hidden_layers
  width, inputs = router["hidden_size"], len(router["factors"]) + bool(router["hidden_states"]) * config.hidden_size
  want = {"hidden.weight": (width, inputs), "hidden.bias": (width,), "out.weight": (2, width), "out.bias": (2,)}
  if router["kind"] == "recurrent":
    want["recurrent.weight"] = (width, width)
  if router["kind"] == "per_block":
    want = {name: (blocks, *shape) for name, shape in want.items()}
  shapes = {name: tuple(w.shape) for name, w in (artifact.weights | artifact.maps).items()}
  if artifact.maps:
    size, rank = (blocks, config.hidden_size), (0, *shapes.get("down", ()))[-1]
    want |= {"bias": size, "down": (*size, rank), "up": (blocks, rank, config.hidden_size)}
  named = {name: artifact.routing[name] for name in ("one_pass_block", "evict_from")}
  if max(named.values()) >= blocks:
    raise ValueError(f"The artifact names blocks, {named}, that this model of {blocks} has not; export it again.")
  if shapes != want or len(artifact.schedule) != blocks:
    raise ValueError(
        f"The artifact's router {shapes} and schedule of {len(artifact.schedule)} blocks do not fit this model of "
        f"{blocks}, which needs {want}; load the base model it belongs to."
    )


def load_pruned(model, artifact=None, *, dtype=None, device=None) -> "PrunedModel":
  """A causal LM of transformers whose prefill skips what the artifact says; otherwise used as any other.

  Args:
    model: directory or hub id of the base model, or the model itself, which stays dense and shares its weights with
      what is returned.
    artifact: what `ftp-jax export` wrote; None: the same directory as `model`.
    dtype: of weights and computation of a model that is loaded here; None: as stored. The router computes in fp32.
    device: where to put the model; None: where it is.

  Raises:
    ValueError: the artifact is missing, damaged, foreign or newer, or it was made for another base model.
  """
  given = isinstance(model, transformers.PreTrainedModel)
  if given and artifact is None:
    raise ValueError("A model without an artifact is dense; pass what `ftp-jax export` wrote as the second argument.")
  if given and dtype is not None:
    raise ValueError("dtype is of a model that is loaded here; name the base model by its directory to have it cast.")
  pruning = read_artifact(model if artifact is None else artifact)
  if given:
    tensors = model.state_dict()
  else:
    directory = pathlib.Path(model)
    if not directory.is_dir():
      patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
      download = lambda name: huggingface_hub.snapshot_download(str(name), allow_patterns=patterns)
      directory = pathlib.Path(_read(model, download))
    files = [_read(file, lambda path: safe_open(path, "pt")) for file in _weight_files(directory)]
    if not files:
      raise ValueError(f"{directory} holds no model; pass the base model first and the exported artifact second.")
    tensors = {name: file.get_slice(name) for file in files for name in file.keys()}
    options = dict(dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False)
    model = _read(directory, lambda path: transformers.AutoModelForCausalLM.from_pretrained(path, **options))
  _check_fit(pruning, tensors, model.config)
  if len(set(getattr(model, "hf_device_map", {None: 0}).values())) > 1:
    raise ValueError("The model is spread over several devices, which is not supported; load it on one.")
  pruned = copy.copy(model if device is None else model.to(device))
  base = type(model).__mro__[2] if isinstance(model, PrunedModel) else type(model)
  pruned.__class__ = type(f"Pruned{base.__name__}", (PrunedModel, base), {})
  pruned.pruning = pruning
  return pruned


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
  """The files of the base model's weights: the one of the usual name, or those that the index names."""
  if (directory / "model.safetensors").is_file():
    return [directory / "model.safetensors"]
  index = directory / "model.safetensors.index.json"
  read = lambda path: sorted(set(json.loads(path.read_text())["weight_map"].values()))
  if not index.is_file() and any(directory.glob("model-*.safetensors")):
    raise ValueError(f"{directory} holds parts of a model without their {index.name}; download it as well.")
  return [directory / name for name in _read(index, read)] if index.is_file() else []


class Packed:
  """Tokens of several rows, one row behind the other, in order.

  counts: tokens of each row. position_P: in its sequence. index: where they stand among the packed tokens they were
  taken from; None: they are all of those.
  """

  def __init__(self, row_P: torch.Tensor, position_P: torch.Tensor, counts: list[int], index=None):
    self.row_P, self.position_P, self.counts, self.index = row_P, position_P, counts, index
    self.even = len(set(counts)) == 1
    if not self.even:
      starts = torch.tensor([0, *counts[:-1]], device=row_P.device).cumsum(0)
      self.slot_P = torch.arange(len(row_P), device=row_P.device) - starts[row_P]

  def take(self, chosen_P: torch.Tensor) -> "Packed":
    index = chosen_P.nonzero()[:, 0]
    row_K = self.row_P[index]
    counts = [len(row_K)] if len(self.counts) == 1 else torch.bincount(row_K, minlength=len(self.counts)).tolist()
    return Packed(row_K, self.position_P[index], counts, index)

  def of(self, a: torch.Tensor) -> torch.Tensor:
    """Their part of an array over the tokens that they were taken from."""
    return a if self.index is None else a[self.index]

  def put(self, into: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """An array over the tokens that they were taken from, with their part replaced in place."""
    return a if self.index is None else into.index_copy_(0, self.index, a)

  def pad(self, a: torch.Tensor, fill=0) -> torch.Tensor:
    """(P,...) as (B, longest row, ...)."""
    shape = (len(self.counts), max(self.counts), *a.shape[1:])
    if self.even:
      return a.reshape(shape)
    out = a.new_full(shape, fill)
    out[self.row_P, self.slot_P] = a
    return out

  def unpad(self, a: torch.Tensor) -> torch.Tensor:
    return a.flatten(0, 1) if self.even else a[self.row_P, self.slot_P]


class Slots(NamedTuple):
  """Keys and values of one block. kept: the token was computed there, and not only given a key and a value."""

  k_BxGxSxN: torch.Tensor
  v_BxGxSxN: torch.Tensor
  position_BxS: torch.Tensor
  kept_BxS: torch.Tensor

  def visible(self, query_BxK: torch.Tensor, window: int) -> torch.Tensor:
    """(B,K,S): the key stands at or before the query, and within its window where there is one."""
    mask = self.position_BxS[:, None] <= query_BxK[:, :, None]
    return mask & (self.position_BxS[:, None] > query_BxK[:, :, None] - window) if window else mask


def attend(queries: Packed, q_KxHxN, slots: Slots, window: int, ordered: bool, same: bool) -> torch.Tensor:
  """Attended values (K,H,N). ordered: each row's keys stand in order, its last slots empty; same: at the queries."""
  q_BxHxKxN, query_BxK = queries.pad(q_KxHxN).transpose(1, 2), queries.pad(queries.position_P)
  if ordered and same and not window:
    out = F.scaled_dot_product_attention(q_BxHxKxN, *slots[:2], is_causal=True, enable_gqa=True)
    return queries.unpad(out.transpose(1, 2))
  parts = []
  for q, query in zip(q_BxHxKxN.split(_CHUNK, dim=2), query_BxK.split(_CHUNK, dim=1)):
    end = slots.position_BxS.shape[1]
    if ordered and query.shape != query_BxK.shape:  # early queries see a part of the keys
      end = int((slots.position_BxS <= query.amax(1, keepdim=True)).sum(1).amax())
    # The heads of a group become queries of one head: keys and values need no copies.
    k, v = slots.k_BxGxSxN[:, :, :end], slots.v_BxGxSxN[:, :, :end]
    mask = slots.visible(query, window)[:, None, :, :end].repeat(1, 1, q.shape[1] // k.shape[1], 1)
    grouped = q.reshape(*k.shape[:2], -1, k.shape[3])
    parts.append(F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape))
  return queries.unpad(torch.cat(parts, dim=2).transpose(1, 2))


def attention_rows(queries: Packed, q_KxHxN, slots: Slots, window: int) -> torch.Tensor:
  """Attention probabilities (B,K,S) of a few queries, mean over heads, in fp32."""
  q, k = queries.pad(q_KxHxN).transpose(1, 2).float(), slots.k_BxGxSxN.float()
  hidden = ~slots.visible(queries.pad(queries.position_P), window)
  with torch.autocast(q.device.type, enabled=False):
    scores = q.reshape(*k.shape[:2], -1, k.shape[3]) @ k.transpose(2, 3) * k.shape[3] ** -0.5
    return scores.reshape(*q.shape[:3], -1).masked_fill(hidden[:, None], -torch.inf).softmax(-1).mean(1)


class PrunedCache(transformers.Cache):
  """The cache of a PrunedModel: a block that evicts has slots for the tokens it keeps alone.

  Attributes:
    columns: of the inputs so far, padding included. length_B: tokens of each row. longest: at least their maximum.
    keep_LxBxT: routes of the context tokens. least_LxB: the margin from which (up to _ROUNDING) new tokens are
      computed under the rule `quantile`.
  """

  is_compileable = is_croppable = False

  def __init__(self, batch: int, device):
    super().__init__(layers=[])
    self.columns, self.longest, self.length_B = 0, 0, torch.zeros(batch, dtype=torch.long, device=device)
    self.slots: list[Slots] = []
    self.keep_LxBxT, self.least_LxB = None, {}

  def append(self, block: int, new: Slots) -> Slots:
    """Adds slots to a block, and returns all it has."""
    if block == len(self.slots):
      self.slots.append(new)
    else:
      pairs = zip(self.slots[block], new, (2, 2, 1, 1))
      self.slots[block] = Slots(*(torch.cat((old, added), dim=axis) for old, added, axis in pairs))
    return self.slots[block]

  def get_seq_length(self, layer_idx: int = 0) -> int:
    return self.columns

  @property
  def nbytes(self) -> int:
    """Bytes of keys and values."""
    return sum(a.nbytes for slots in self.slots for a in slots[:2])

  def batch_select_indices(self, indices: torch.Tensor) -> None:
    """Keeps these rows; a row may come several times."""
    self.length_B, self.keep_LxBxT = self.length_B[indices], self.keep_LxBxT[:, indices]
    self.slots = [Slots(*(a[indices] for a in slots)) for slots in self.slots]
    self.least_LxB = {block: least_B[indices] for block, least_B in self.least_LxB.items()}

  reorder_cache = batch_select_indices

  def batch_repeat_interleave(self, repeats: int) -> None:
    self.batch_select_indices(torch.arange(len(self.length_B), device=self.length_B.device).repeat_interleave(repeats))

  def crop(self, *_) -> None:
    raise ValueError("The cache of a pruned model cannot be cropped; generate without assistant or prompt lookup.")


def capacity(sparsity: float, context: list[int], bucket_multiple: int = 1) -> list[int]:
  """Tokens that a block of which `sparsity`, a number in fp32, is asked computes of each context."""
  steps = int(np.rint(np.float32(sparsity) * np.float32(_STEPS)))
  wanted = (max(m - steps * m // _STEPS, 2) for m in context)
  return [min(-(-n // bucket_multiple) * bucket_multiple, m) for n, m in zip(wanted, context)]


def _descending(values_BxT: torch.Tensor) -> torch.Tensor:
  """Positions from the largest value to the smallest, among equal ones the later first."""
  order = torch.sort(values_BxT.flip(1), dim=1, descending=True, stable=True).indices
  return values_BxT.shape[1] - 1 - order


def select(
    margin_BxT: torch.Tensor, count: list[int], context: list[int], selection: str, recent: int = 0
) -> torch.Tensor:
  """Which context tokens (B,T) are computed: the first and the last, `recent` ones, then the largest margins."""
  t, m = torch.arange(margin_BxT.shape[1], device=margin_BxT.device)[None], margin_BxT.new_tensor(context)[:, None]
  valid, forced = t < m, (t == 0) | (t == m - 1)
  if recent:
    latest = (t >= m - recent) & (m >= _MOST_RECENT * recent)
    margin_BxT = margin_BxT.masked_fill(latest, torch.finfo(torch.float32).max)
  value = torch.where(forced, torch.inf, margin_BxT).masked_fill(~valid, -torch.inf)
  chosen = t < margin_BxT.new_tensor(count)[:, None]
  keep = valid & torch.zeros_like(valid).scatter(1, _descending(value), chosen.expand_as(valid))
  return keep & ((margin_BxT > 0) | forced) if selection == "argmax" else keep


class _Gates:
  """Decides block by block which of the packed tokens are computed, and keeps the scores that this depends on.

  There are two views. Each says how many tokens a token knows (`known_P`), its score and its rank among them, which
  tokens its margins choose, and what it takes over from the attention of a block.
  """

  def __init__(self, pruning: Artifact, tokens: Packed, cache: PrunedCache, schedule: torch.Tensor, known_P):
    self.routing, self.router, self.pruning = pruning.routing, pruning.router, pruning
    self.tokens, self.cache, self.schedule, self.known_P = tokens, cache, schedule.tolist(), known_P.float()
    self.last_routed = max((i for i, s in enumerate(self.schedule) if s > 0), default=-1)
    self.scored = self.last_routed >= 0 and bool({"score", "rank"} & set(self.router["factors"]))
    self.state_PxR = self.known_P.new_zeros(len(known_P), self.router["hidden_size"])
    self.frozen_PxD = None  # one-pass routing: what the gates of all later blocks are decided from

  def observes(self, block: int) -> bool:
    """Whether a later decision reads the scores of this block."""
    following = block + 1  # a decision reads them there, or a dense block replaces them
    decides = self.router["kind"] == "recurrent" or following == self.routing["one_pass_block"]
    asked = following <= self.last_routed and (decides or self.schedule[following] > 0)
    return self.scored and self.frozen_PxD is None and asked

  def decide(self, block: int, x_PxD) -> torch.Tensor | None:
    """Which tokens (P) are computed in a block; None: all."""
    sparsity = self.schedule[block]
    if block == self.routing["one_pass_block"]:
      self.frozen_PxD = x_PxD.clone()
    if not sparsity and (self.router["kind"] != "recurrent" or block > self.last_routed):
      return None
    x_PxD = x_PxD if self.frozen_PxD is None else self.frozen_PxD
    margin_P, self.state_PxR = self.pruning.margin(block, self.factors(sparsity), x_PxD, self.state_PxR)
    return self.choose(block, margin_P) if sparsity else None

  def factors(self, sparsity: float) -> torch.Tensor:
    """The router's factors (P,F)."""
    known, others, names = self.known_P, (self.known_P - 1).clamp(min=1), self.router["factors"]
    found = {"position": self.tokens.position_P / others, "sparsity": torch.full_like(known, sparsity)}
    if self.scored:
      score, rank = self.score_and_rank()
      found |= {"score": score * known / (1 + score * known), "rank": rank / others}
    return torch.stack([found[name] for name in names], dim=-1) if names else known.new_zeros(len(known), 0)

  @staticmethod
  def latest(table, slots: Slots, values, rows=slice(None)):
    """A table of scores with new ones of those tokens that were computed in the block."""
    places = torch.where(slots.kept_BxS, slots.position_BxS, table.shape[1])[rows]
    return F.pad(table, (0, 1)).scatter(1, places, values)[:, :-1]


class _ContextGates(_Gates):
  """The prefill view: scores paid by the last context queries, ranks among the context tokens."""

  def __init__(self, pruning: Artifact, tokens: Packed, cache: PrunedCache):
    counts = torch.tensor(tokens.counts, device=tokens.row_P.device)
    super().__init__(pruning, tokens, cache, pruning.schedule, counts[tokens.row_P])
    self.score_BxT = tokens.pad(torch.zeros_like(self.known_P), -torch.inf)

  def score_and_rank(self):
    rank_BxT = _descending(self.score_BxT).argsort(dim=1)
    return self.tokens.unpad(self.score_BxT), self.tokens.unpad(rank_BxT)

  def choose(self, block: int, margin_P) -> torch.Tensor:
    margin_BxT, context = self.tokens.pad(margin_P, -torch.inf), self.tokens.counts
    if self.routing["decode_sparsity"] and self.routing["decode_rule"] == "quantile":
      count = capacity(float(self.pruning.decode_schedule[block]), context)
      last_B = torch.tensor(count, device=margin_P.device) - 1
      self.cache.least_LxB[block] = margin_BxT.sort(descending=True).values.gather(1, last_B[:, None])[:, 0]
    count = capacity(self.schedule[block], context, self.routing["bucket_multiple"])
    routing = self.routing
    return self.tokens.unpad(select(margin_BxT, count, context, routing["selection"], routing["recent_tokens"]))

  def observe(self, computed: Packed, q_KxHxN, slots: Slots, window: int) -> None:
    late = computed.take(computed.of(self.tokens.position_P >= self.known_P - self.routing["score_window"]))
    rows_BxWxS = attention_rows(late, late.of(q_KxHxN), slots, window)
    counted_BxWx1 = late.pad(torch.ones_like(late.row_P))[:, :, None]
    score_BxS = (rows_BxWxS * counted_BxWx1).sum(1) / counted_BxWx1.sum(1)
    self.score_BxT = self.latest(self.score_BxT, slots, score_BxS)


class _NewestGates(_Gates):
  """The causal view of continuation tokens: everything as it stands when the token is the newest."""

  def __init__(self, pruning: Artifact, tokens: Packed, cache: PrunedCache):
    super().__init__(pruning, tokens, cache, pruning.decode_schedule, tokens.position_P + 1)
    self.seen_PxS = self.known_P.new_zeros(len(self.known_P), cache.longest if self.scored else 0)

  def score_and_rank(self):
    own_Px1 = self.seen_PxS.gather(1, self.tokens.position_P[:, None])
    before_PxS = torch.arange(self.seen_PxS.shape[1], device=own_Px1.device) < self.tokens.position_P[:, None]
    return own_Px1[:, 0], ((self.seen_PxS > own_Px1) & before_PxS).sum(1)

  def choose(self, block: int, margin_P) -> torch.Tensor:
    if self.routing["decode_rule"] == "quantile":
      least_P = self.cache.least_LxB[block][self.tokens.row_P]
      return margin_P >= least_P - _ROUNDING * least_P.abs().clamp(min=1.0)
    return torch.sigmoid(-margin_P) <= self.routing["decode_threshold"]

  def observe(self, computed: Packed, q_KxHxN, slots: Slots, window: int) -> None:
    rows_KxS = computed.unpad(attention_rows(computed, q_KxHxN, slots, window))
    seen_KxS = self.latest(computed.of(self.seen_PxS), slots, rows_KxS, computed.row_P)
    self.seen_PxS = computed.put(self.seen_PxS, seen_KxS)


def _rotated(attention, name: str, y_KxD, cos_KxN, sin_KxN) -> torch.Tensor:
  """Queries (name q) or keys (k) of normed states, (K, heads, N), rope applied."""
  x = getattr(attention, f"{name}_proj")(y_KxD).unflatten(-1, (-1, attention.head_dim))
  if hasattr(attention, f"{name}_norm"):  # Qwen3
    x = getattr(attention, f"{name}_norm")(x)
  first, second = x.chunk(2, dim=-1)
  return x * cos_KxN[:, None] + torch.cat((-second, first), dim=-1) * sin_KxN[:, None]


class PrunedModel:
  """Mixed into the class of a causal LM of transformers by `load_pruned`. pruning: the Artifact."""

  def prepare_inputs_for_generation(self, *args, **kwargs):
    if kwargs.get("use_cache") is False:
      raise ValueError("use_cache=False would prune new tokens as if they were the prompt's; leave the cache on.")
    return super().prepare_inputs_for_generation(*args, **kwargs)

  @torch.no_grad()
  def forward(
      self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None, labels=None,
      use_cache=None, logits_to_keep=0, context_length=None, return_dict=None, past_key_values=None, **kwargs,
  ):
    """As the forward of the base model.

    With an empty cache the tokens are a context, which is pruned, or a context and its continuation; with a filled
    cache they are a continuation, of which no gate depends on a later token.

    Args:
      attention_mask: (B, columns so far), 0 at padding, on either side. Positions follow from it.
      cache: the cache of an earlier call; past_key_values is its name before transformers 5.24.
      context_length: how many tokens of each row, an int or (B,), are context; None: all of them.

    Raises:
      ValueError: what is asked cannot be had of a pruned model.
    """
    if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
      raise ValueError("A pruned model gives no attentions and no hidden states; ask the base model.")
    if (input_ids is None) == (inputs_embeds is None):
      raise ValueError("Pass either input_ids or inputs_embeds.")
    embeds = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    batch, columns = embeds.shape[:2]
    cache = past_key_values if cache is None else cache
    if not isinstance(cache, PrunedCache):
      plain = type(cache) is transformers.DynamicCache and not getattr(cache, "offloading", False)
      if cache is not None and (cache.get_seq_length() or not plain):
        raise ValueError("A pruned model keeps its own cache; leave out past_key_values and cache_implementation.")
      cache = PrunedCache(batch, embeds.device)
    if len(cache.length_B) != batch:
      raise ValueError(f"The cache is of {len(cache.length_B)} rows, but {batch} are given; select its rows first.")
    first = cache.columns == 0
    present_BxC = torch.ones(batch, columns, dtype=torch.bool, device=embeds.device)
    if attention_mask is not None:
      if attention_mask.shape != (batch, cache.columns + columns):
        raise ValueError(f"attention_mask must have the shape {(batch, cache.columns + columns)}: all columns so far.")
      present_BxC = attention_mask[:, cache.columns :].to(embeds.device, torch.bool)
    if isinstance(logits_to_keep, int) and logits_to_keep == 1 and not present_BxC[:, -1].all():  # as `generate` asks
      raise ValueError("The last column is padding, whose logits mean nothing; use padding_side='left'.")
    index_BxC, size_B = present_BxC.cumsum(1) - 1, present_BxC.sum(1)
    if first and position_ids is not None and not ((position_ids == index_BxC) | ~present_BxC).all():
      raise ValueError("position_ids must count the tokens of each row; leave them out.")
    if not first and context_length is not None:
      raise ValueError("context_length belongs to the first call; what follows a filled cache is continuation.")
    if first and labels is not None and context_length is None:
      raise ValueError(
          "The loss of a prompt would be that of gates which have seen its later tokens; pass context_length: 1 for a "
          "text, or how many tokens of it are the prompt."
      )
    context_B = size_B if context_length is None else torch.as_tensor(context_length, device=size_B.device)
    if first and not ((context_B >= 1) & (context_B <= size_B)).all():
      raise ValueError("Every row needs a context of at least one token and at most its length.")
    context_BxC = present_BxC & (index_BxC < context_B.expand(batch)[:, None]) & first
    wanted_C = torch.zeros(columns, dtype=torch.bool, device=embeds.device)
    kept_logits = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    wanted_C[kept_logits] = True

    hidden, position_BxC = embeds.clone(), cache.length_B[:, None] + index_BxC
    for piece_BxC, view in ((context_BxC, _ContextGates), (present_BxC & ~context_BxC, _NewestGates)):
      counts = piece_BxC.sum(1).tolist()
      if any(counts):
        row_P, column_P = piece_BxC.nonzero(as_tuple=True)
        tokens = Packed(row_P, position_BxC[row_P, column_P], counts)
        cache.longest += max(counts)
        gates = view(self.pruning, tokens, cache)
        hidden[row_P, column_P] = self._run(embeds[row_P, column_P], tokens, gates, cache, wanted_C[column_P])
    cache.length_B = cache.length_B + size_B
    cache.columns += columns
    logits, loss = self.lm_head(self.model.norm(hidden[:, kept_logits])), None
    if labels is not None:
      loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
    use_cache = self.config.use_cache if use_cache is None else use_cache
    out = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache if use_cache else None})
    return out.to_tuple() if return_dict is False else out

  def _run(self, x_PxD, tokens: Packed, gates: _Gates, cache: PrunedCache, wanted_P) -> torch.Tensor:
    """States that leave the last block, right where they are wanted; appends to the cache."""
    window = self.config.sliding_window if self.config.model_type == "mistral" else None
    window = window if window and cache.longest > window else 0
    evicting = self.pruning.routing["kv_mode"] == "evict"
    cos, sin = (a[0] for a in self.model.rotary_emb(x_PxD[None], tokens.position_P[None]))
    first, blocks, routes = not cache.slots, self.model.layers, []
    for i, block in enumerate(blocks):
      attention, keep_P = block.self_attn, gates.decide(i, x_PxD)
      computed = tokens if keep_P is None else tokens.take(keep_P)
      keep_P = torch.ones_like(tokens.row_P, dtype=torch.bool) if keep_P is None else keep_P
      routes.append(keep_P)

      # Keys and values: of all tokens, or where the block evicts of those computed.
      keyed = computed if evicting and i >= self.pruning.routing["evict_from"] else tokens
      y = block.input_layernorm(keyed.of(x_PxD))
      k = _rotated(attention, "k", y, keyed.of(cos), keyed.of(sin))
      v = attention.v_proj(y).unflatten(-1, (-1, attention.head_dim))
      places = keyed.pad(keyed.position_P, EMPTY), keyed.pad(keyed.of(keep_P), False)
      slots = cache.append(i, Slots(*(keyed.pad(a).transpose(1, 2) for a in (k, v)), *places))

      # The last block is computed only where somebody reads the result.
      skipping_P = ~keep_P
      if i == len(blocks) - 1 and not wanted_P.all():
        computed, skipping_P = tokens.take(keep_P & wanted_P), skipping_P & wanted_P
      if self.pruning.maps and skipping_P.any():
        skipping = tokens.take(skipping_P)
        x_PxD = skipping.put(x_PxD, self.pruning.moved(i, skipping.of(x_PxD)))
      if not len(computed.row_P):
        continue
      share = len(computed.row_P) / len(x_PxD)
      whole = first and not window and keyed is tokens and _WHOLE < share < 1
      asked = tokens if whole else computed  # whose queries attend
      if asked is not keyed:
        y = asked.of(y) if keyed is tokens else block.input_layernorm(asked.of(x_PxD))
      q = _rotated(attention, "q", y, asked.of(cos), asked.of(sin))
      attended = attend(asked, q, slots, window, ordered=first, same=asked is keyed)
      if whole:
        attended, q = computed.of(attended), computed.of(q)
      if gates.observes(i):
        gates.observe(computed, q, slots, window)
      y = computed.of(x_PxD) + attention.o_proj(attended.flatten(1))
      x_PxD = computed.put(x_PxD, y + block.mlp(block.post_attention_layernorm(y)))
    if first:
      cache.keep_LxBxT = torch.stack([tokens.pad(keep_P, False) for keep_P in routes])
    return x_PxD
