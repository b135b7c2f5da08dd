"""A pruned causal language model on PyTorch, for transformers 5: each prompt token skips the blocks it does not need.

  model = load_pruned("EXPORTED")             # written by `ftp-jax export --with-weights`
  model = load_pruned(base_model, "EXPORTED")  # or what `ftp-jax export` wrote, beside your own base model
  model.generate(**tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt"), max_new_tokens=64)

This file needs torch, transformers and safetensors alone and may be copied beside a program that uses it. It
computes with the modules of the Hugging Face model and replaces its loop over the blocks. Routes are those of
ftp_jax, whose docs/method.md has the formulas; inference only, on one device.

Axes: B rows, T context tokens of the longest row, P tokens of all rows packed one behind the other, K those of them
that a block computes, S slots of a block's cache, W queries of the score window, D hidden size, H query heads,
G key heads, N head size, R hidden size of the router.
"""

import copy
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

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
_CHUNK = 512  # queries that are masked at once
_WHOLE = 0.3  # from this share of queries on, causal attention of all tokens is faster than masked of some
# Fields of the config, and the values that are known of those that choose one.
_ROUTING = {
    "kv_mode": ("evict", "project"), "selection": ("topk", "argmax"), "bucket_multiple": None, "score_window": None,
    "decode_sparsity": None, "decode_rule": ("threshold", "quantile"), "decode_threshold": None, "one_pass_block": None,
}  # fmt: skip
_ROUTER = {"kind": ("global", "per_block", "recurrent"), "factors": None, "hidden_states": None, "hidden_size": None}
_FACTORS = ("position", "score", "rank", "sparsity")


# --- artifact and base model -------------------------------------------------------------------


@dataclasses.dataclass
class Artifact:
  """What an exported directory says: schedule (L,), routing, router (see ftp_jax/routing/config.py) and its weights."""

  base_model: str
  fingerprint: str
  schedule: torch.Tensor
  routing: dict[str, Any]
  router: dict[str, Any]
  weights: dict[str, torch.Tensor]

  def __post_init__(self):
    asked, mean = self.routing["decode_sparsity"], self.schedule.mean()
    self.decode_schedule = (self.schedule * asked / (mean if mean > 0 else 1.0)).clamp(0.0, 0.99)

  def margin(self, block: int, factors_PxF, x_PxD, state_PxR):
    """Compute minus skip logit (P) in fp32 of tokens that enter a block, and the state carried to the next."""
    weights = self.weights
    if weights["out.bias"].device != x_PxD.device:
      weights = self.weights = {name: w.to(x_PxD.device) for name, w in weights.items()}
    if self.router["kind"] == "per_block":
      weights = {name: w[block] for name, w in weights.items()}
    with torch.autocast(x_PxD.device.type, enabled=False):
      num_factors = len(self.router["factors"])
      hidden = weights["hidden.bias"]
      if num_factors:
        hidden = hidden + factors_PxF @ weights["hidden.weight"][:, :num_factors].T
      if self.router["hidden_states"]:  # root mean square normed; the norm is applied to the R results
        x = x_PxD.float()
        scale = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + 1e-6)
        hidden = hidden + (x @ weights["hidden.weight"][:, num_factors:].T) * scale
      if self.router["kind"] == "recurrent":
        hidden = hidden + state_PxR @ weights["recurrent.weight"].T
      hidden = F.silu(hidden)
      logits = F.linear(hidden, weights["out.weight"], weights["out.bias"])
    return logits[:, 1] - logits[:, 0], hidden


def read_artifact(directory) -> Artifact:
  """Reads an exported artifact; ValueError in one sentence if it is missing, damaged, foreign or newer."""
  directory = pathlib.Path(directory)
  file = directory / CONFIG_FILE
  try:
    described = json.loads(file.read_text(encoding="utf-8"))
    version, layout = described.get("format_version"), described.get("layout", "flax")
  except FileNotFoundError:
    raise ValueError(f"{directory} has no {CONFIG_FILE}; point at what `ftp-jax export` wrote.") from None
  except (OSError, ValueError, AttributeError) as error:
    raise ValueError(f"{file} cannot be read ({error}); export the artifact again.") from None
  if version != FORMAT_VERSION:
    raise ValueError(f"{directory} has format {version!r}, but {FORMAT_VERSION} is read here; update this file.")
  if layout != "torch":
    raise ValueError(f"{directory} has the layout {layout!r}; convert it with `ftp-jax export --artifact={directory}`.")
  try:
    weights = load_file(directory / WEIGHTS_FILE)
  except (OSError, SafetensorError) as error:
    raise ValueError(f"{directory / WEIGHTS_FILE} cannot be read ({error}); export the artifact again.") from None
  try:
    routing, router, schedule = described["routing"], described["router"], described["schedule"]
    fields = set(routing) ^ set(_ROUTING) or set(router) ^ set(_ROUTER) or set(router["factors"]) - set(_FACTORS)
    fields |= {name for name, known in (_ROUTING | _ROUTER).items() if known and (routing | router)[name] not in known}
    if fields or not schedule or not all(0 <= s < 1 for s in schedule):
      raise ValueError(f"{', '.join(sorted(fields)) or 'its schedule'}")
    schedule = torch.tensor(schedule, dtype=torch.float32)
    return Artifact(described["base_model"], described["fingerprint"], schedule, routing, router, weights)
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{file} says what is not known here ({error}); update this file or export again.") from None


def _check_weights(artifact: Artifact, config) -> None:
  """ValueError unless schedule and router fit the model."""
  router, blocks = artifact.router, config.num_hidden_layers
  width, lead = router["hidden_size"], (blocks,) if router["kind"] == "per_block" else ()
  inputs = len(router["factors"]) + bool(router["hidden_states"]) * config.hidden_size
  want = {"hidden.weight": (width, inputs), "hidden.bias": (width,), "out.weight": (2, width), "out.bias": (2,)}
  if router["kind"] == "recurrent":
    want["recurrent.weight"] = (width, width)
  want = {name: lead + shape for name, shape in want.items()}
  found = {name: tuple(w.shape) for name, w in artifact.weights.items()}
  if found != want or len(artifact.schedule) != blocks:
    raise ValueError(
        f"The artifact's router {found} and schedule of {len(artifact.schedule)} blocks do not fit this model of "
        f"{blocks}, which needs {want}; load the base model it belongs to."
    )


def fingerprint(tensors: dict[str, Any], tied: bool) -> str:
  """The hash of ftp_jax/models/fingerprint.py; values are tensors or open slices of safetensors files."""
  digest = hashlib.sha256()
  for name in sorted(tensors):
    if (tied and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq"):
      continue
    tensor = tensors[name]
    shape = tuple(tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape())
    digest.update(f"{name} {shape}\n".encode())
    for row in sorted({0, shape[0] // 2, shape[0] - 1}):
      part = tensor[(slice(row, row + 1), *(slice(0, min(64, size)) for size in shape[1:]))]
      digest.update(np.ascontiguousarray(part.detach().float().cpu().numpy(), "<f4").tobytes())
  return digest.hexdigest()[:16]


def _stored_tensors(directory: pathlib.Path) -> dict[str, Any]:
  """{name: open slice} of the safetensors files of a model directory; nothing is read yet."""
  files = [directory / "model.safetensors"]
  if not (directory / "config.json").is_file():
    raise ValueError(f"{directory} holds no model; pass the base model first and the exported artifact second.")
  try:
    if not files[0].is_file():
      index = json.loads((directory / "model.safetensors.index.json").read_text(encoding="utf-8"))
      files = [directory / name for name in sorted(set(index["weight_map"].values()))]
    opened = [safe_open(file, framework="pt") for file in files]
  except (OSError, ValueError, KeyError, SafetensorError) as error:
    raise ValueError(f"{directory} holds no readable safetensors weights ({error}); get the model again.") from None
  return {name: file.get_slice(name) for file in opened for name in file.keys()}


def load_pruned(model, artifact=None, *, dtype=None, device=None) -> "PrunedModel":
  """A causal LM of transformers whose prefill skips what the artifact says; otherwise used as any other.

  Args:
    model: directory or hub id of the base model, or the model itself, which stays dense and shares its weights with
      what is returned.
    artifact: what `ftp-jax export` wrote; None: the same directory as `model`.
    dtype: of weights and computation, for instance torch.bfloat16; None: as stored. The router computes in fp32.
    device: where to put the model; None: where it is.

  Raises:
    ValueError: the artifact is missing, damaged, foreign or newer, or it was made for another base model.
  """
  if artifact is None and isinstance(model, transformers.PreTrainedModel):
    raise ValueError("A model without an artifact is dense; pass what `ftp-jax export` wrote as the second argument.")
  pruning = read_artifact(model if artifact is None else artifact)
  if isinstance(model, transformers.PreTrainedModel):
    config, tensors = model.config, model.state_dict()
  else:
    directory = pathlib.Path(model)
    if not directory.is_dir():
      patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
      directory = pathlib.Path(huggingface_hub.snapshot_download(str(model), allow_patterns=patterns))
    tensors = _stored_tensors(directory)
    try:
      config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
      reason = " ".join(str(error).split())[:160]
      raise ValueError(f"{directory} has no config.json that transformers reads ({reason}); get it again.") from None
  if config.model_type not in FAMILIES:
    raise ValueError(f"model_type={config.model_type!r} is not supported; supported are {', '.join(FAMILIES)}.")
  found = fingerprint(tensors, config.tie_word_embeddings)
  if found != pruning.fingerprint:
    raise ValueError(
        f"The artifact was made for {pruning.base_model} (fingerprint {pruning.fingerprint}), but this model has "
        f"{found}; load the base model it belongs to, by its directory if you cast its weights."
    )
  _check_weights(pruning, config)
  if not isinstance(model, transformers.PreTrainedModel):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False
    )
  if len(set(getattr(model, "hf_device_map", {None: 0}).values())) > 1:
    raise ValueError("The model is spread over several devices, which is not supported; load it on one.")
  changes = {name: value for name, value in (("dtype", dtype), ("device", device)) if value is not None}
  pruned = copy.copy(model.to(**changes) if changes else model).eval()
  base = type(model).__mro__[2] if isinstance(model, PrunedModel) else type(model)
  pruned.__class__ = type(f"Pruned{base.__name__}", (PrunedModel, base), {})
  pruned.pruning = pruning
  return pruned


# --- selection -----------------------------------------------------------------------------------


def capacity(sparsity: float, context: list[int], bucket_multiple: int = 1) -> list[int]:
  """Tokens that a block of which `sparsity`, a number in fp32, is asked computes of each context."""
  steps = int(torch.round(torch.tensor(sparsity) * _STEPS))
  wanted = (max(m - steps * m // _STEPS, 2) for m in context)
  return [min(-(-n // bucket_multiple) * bucket_multiple, m) for n, m in zip(wanted, context)]


def _descending(values_BxT: torch.Tensor) -> torch.Tensor:
  """Positions from the largest value to the smallest, among equal ones the later first."""
  order = torch.sort(values_BxT.flip(1), dim=1, descending=True, stable=True).indices
  return values_BxT.shape[1] - 1 - order


def _nth_largest(values_BxT: torch.Tensor, count: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
  """Position and value (B,1) of the last of the `count` largest values of each row."""
  nth = torch.tensor(count, device=values_BxT.device)[:, None] - 1
  at_Bx1 = _descending(values_BxT).gather(1, nth)
  return at_Bx1, values_BxT.gather(1, at_Bx1)


def select(margin_BxT: torch.Tensor, count: list[int], context: list[int], selection: str) -> torch.Tensor:
  """Which context tokens (B,T) are computed: the `count` largest margins; the first and the last token always."""
  t, m = torch.arange(margin_BxT.shape[1], device=margin_BxT.device)[None], margin_BxT.new_tensor(context)[:, None]
  valid, forced = t < m, (t == 0) | (t == m - 1)
  value = torch.where(forced, torch.inf, margin_BxT).masked_fill(~valid, -torch.inf)
  last, least = _nth_largest(value, count)
  keep = valid & ((value > least) | ((value == least) & (t >= last)))
  return keep & ((margin_BxT > 0) | forced) if selection == "argmax" else keep


# --- packed tokens, attention, cache --------------------------------------------------------------


class Packed:
  """Tokens of several rows, one row behind the other, in order. counts: of each row; position_P: in its sequence."""

  def __init__(self, row_P: torch.Tensor, position_P: torch.Tensor, counts: list[int]):
    self.row_P, self.position_P, self.counts = row_P, position_P, counts
    self.even = len(set(counts)) == 1
    if not self.even:
      starts = torch.tensor([0, *counts[:-1]], device=row_P.device).cumsum(0)
      self.slot_P = torch.arange(len(row_P), device=row_P.device) - starts[row_P]

  def take(self, index_K: torch.Tensor) -> "Packed":
    row_K = self.row_P[index_K]
    counts = [len(row_K)] if len(self.counts) == 1 else torch.bincount(row_K, minlength=len(self.counts)).tolist()
    return Packed(row_K, self.position_P[index_K], counts)

  def pad(self, a: torch.Tensor, fill=0) -> torch.Tensor:
    """(P,...) as (B, longest row, ...)."""
    shape = (len(self.counts), max(self.counts))
    if self.even:
      return a.reshape(shape + a.shape[1:])
    out = a.new_full(shape + a.shape[1:], fill)
    out[self.row_P, self.slot_P] = a
    return out

  def unpad(self, a: torch.Tensor) -> torch.Tensor:
    return a.flatten(0, 1) if self.even else a[self.row_P, self.slot_P]


def visible(query_BxK, key_BxS, window: int) -> torch.Tensor:
  """(B,K,S): the key stands at or before the query, and within its window."""
  mask = key_BxS[:, None] <= query_BxK[:, :, None]
  return mask & (query_BxK[:, :, None] - key_BxS[:, None] < window) if window else mask


def attend(q_BxHxKxN, query_BxK, k_BxGxSxN, v_BxGxSxN, key_BxS, window: int, first: bool, same: bool) -> torch.Tensor:
  """Attended values (B,H,K,N). first: the keys stand in order; same: they are those of the queries."""
  if first and same and not window:
    return F.scaled_dot_product_attention(q_BxHxKxN, k_BxGxSxN, v_BxGxSxN, is_causal=True, enable_gqa=True)
  batch, heads, num_queries, dim = q_BxHxKxN.shape
  groups, starts, parts = k_BxGxSxN.shape[1], range(0, num_queries, _CHUNK), []
  ends = [key_BxS.shape[1]] * len(starts)
  if first and num_queries > _CHUNK:  # early queries see a part of the keys
    last = [min(start + _CHUNK, num_queries) - 1 for start in starts]
    ends = torch.searchsorted(key_BxS, query_BxK[:, last].contiguous(), right=True).amax(0).tolist()
  for start, end in zip(starts, ends):
    mask = visible(query_BxK[:, start : start + _CHUNK], key_BxS[:, :end], window)[:, None, None]
    q = q_BxHxKxN[:, :, start : start + _CHUNK]
    size = q.shape[2]
    # The heads of a group become queries of one head: keys and values need no copies.
    q = q.reshape(batch, groups, -1, dim)
    mask = mask.expand(-1, -1, heads // groups, -1, -1).flatten(2, 3)
    out = F.scaled_dot_product_attention(q, k_BxGxSxN[:, :, :end], v_BxGxSxN[:, :, :end], attn_mask=mask)
    parts.append(out.reshape(batch, heads, size, dim))
  return torch.cat(parts, dim=2)


def attention_rows(q_BxHxKxN, k_BxGxSxN, mask_BxKxS) -> torch.Tensor:
  """Attention probabilities (B,K,S) of a few queries, mean over heads, in fp32."""
  batch, heads, num_queries, dim = q_BxHxKxN.shape
  q = q_BxHxKxN.float().reshape(batch, k_BxGxSxN.shape[1], -1, dim)
  scores = (q @ k_BxGxSxN.float().transpose(2, 3) * dim**-0.5).reshape(batch, heads, num_queries, -1)
  return scores.masked_fill(~mask_BxKxS[:, None], -torch.inf).softmax(-1).mean(1)


class Slots:
  """Keys and values of one block. kept: the token was computed there, and not only given a key and a value."""

  def __init__(self, k_BxGxSxN, v_BxGxSxN, position_BxS, kept_BxS):
    self.parts = [k_BxGxSxN, v_BxGxSxN, position_BxS, kept_BxS]

  def append(self, other: "Slots") -> "Slots":
    return Slots(*(torch.cat(pair, dim=axis) for *pair, axis in zip(self.parts, other.parts, (2, 2, 1, 1))))

  def places(self, none: int) -> torch.Tensor:
    """Positions (B,S) of the tokens that were computed; `none` in other slots."""
    return torch.where(self.parts[3], self.parts[2], none)


class PrunedCache(transformers.Cache):
  """The cache of a PrunedModel: under `evict` a block has slots for the tokens it keeps alone.

  Attributes:
    columns: of the inputs so far, padding included. length_B: tokens of each row. longest: at least their maximum.
    keep_LxBxT: routes of the context tokens.
  """

  is_compileable = is_croppable = False

  def __init__(self, batch: int, device):
    super().__init__(layers=[])
    self.columns, self.longest, self.length_B = 0, 0, torch.zeros(batch, dtype=torch.long, device=device)
    self.slots: list[Slots | None] = []
    self.least_LxB: list[torch.Tensor | None] = []
    self.keep_LxBxT = None

  def get_seq_length(self, layer_idx: int = 0) -> int:
    return self.columns

  @property
  def nbytes(self) -> int:
    """Bytes of keys and values."""
    return sum(a.numel() * a.element_size() for slots in self.slots for a in slots.parts[:2])

  def batch_select_indices(self, indices: torch.Tensor) -> None:
    """Keeps these rows; a row may come several times."""
    self.length_B, self.keep_LxBxT = self.length_B[indices], self.keep_LxBxT[:, indices]
    self.slots = [Slots(*(a[indices] for a in slots.parts)) for slots in self.slots]
    self.least_LxB = [least if least is None else least[indices] for least in self.least_LxB]

  reorder_cache = batch_select_indices

  def batch_repeat_interleave(self, repeats: int) -> None:
    self.batch_select_indices(torch.arange(len(self.length_B), device=self.length_B.device).repeat_interleave(repeats))

  def crop(self, *_) -> None:
    raise ValueError("The cache of a pruned model cannot be cropped; generate without assistant or prompt lookup.")


# --- who is computed --------------------------------------------------------------------------------


class _View:
  """Gates of packed tokens, block by block, and the attention scores that they are decided from."""

  def __init__(self, pruning: Artifact, tokens: Packed, schedule: torch.Tensor):
    self.pruning, self.tokens, self.schedule = pruning, tokens, schedule.tolist()
    self.last_routed = max((i for i, s in enumerate(self.schedule) if s > 0), default=-1)
    size = pruning.router["hidden_size"] if pruning.router["kind"] == "recurrent" else 0
    self.state = torch.zeros(len(tokens.row_P), size, device=tokens.row_P.device)
    self.frozen = None  # one-pass routing: what the gates of all later blocks are decided from
    self.scored = bool({"score", "rank"} & set(pruning.router["factors"]))

  def margin(self, block: int, x_PxD):
    """Margins (P) in a block; None where nothing needs them."""
    routed = self.schedule[block] > 0
    if block == self.pruning.routing["one_pass_block"]:
      self.frozen = x_PxD.clone()
    if not routed and (self.pruning.router["kind"] != "recurrent" or block > self.last_routed):
      return None
    margin, self.state = self.pruning.margin(
        block, self.factors(self.schedule[block]), x_PxD if self.frozen is None else self.frozen, self.state
    )
    return margin if routed else None

  def stack(self, known_P, own_P, rank_P, position_P, sparsity) -> torch.Tensor | None:
    """The named factors (P,F). known: tokens known to each; own: its score."""
    make = {
        "position": lambda: position_P / (known_P - 1).clamp(min=1),
        "score": lambda: own_P * known_P / (1 + own_P * known_P),
        "rank": lambda: rank_P / (known_P - 1).clamp(min=1),
        "sparsity": lambda: torch.full_like(known_P, sparsity),
    }
    names = self.pruning.router["factors"]
    return torch.stack([make[name]() for name in names], dim=-1) if names else None

  def observes(self, block: int) -> bool:
    """Whether a later decision reads the scores of this block."""
    return self.scored and self.frozen is None and block < self.last_routed


class _ContextView(_View):
  """The prefill view: scores paid by the last context queries, ranks among the context tokens."""

  def __init__(self, pruning: Artifact, tokens: Packed):
    super().__init__(pruning, tokens, pruning.schedule)
    self.score_BxT1 = torch.zeros(len(tokens.counts), max(tokens.counts) + 1, device=tokens.row_P.device)
    self.least_LxB, self.keep_LxP = [], []

  def factors(self, sparsity):
    tokens, score_BxT = self.tokens, self.score_BxT1[:, :-1]
    known_B = score_BxT.new_tensor(tokens.counts)
    rank_P = None
    if "rank" in self.pruning.router["factors"]:
      past = torch.arange(score_BxT.shape[1], device=score_BxT.device)[None] >= known_B[:, None]
      order = _descending(score_BxT.masked_fill(past, -torch.inf))
      rank_P = tokens.unpad(order.argsort(dim=1)).float()
    return self.stack(known_B[tokens.row_P], tokens.unpad(score_BxT), rank_P, tokens.position_P.float(), sparsity)

  def decide(self, block: int, x_PxD) -> torch.Tensor | None:
    """Which tokens (P) are computed in a block; None: all."""
    routing, context = self.pruning.routing, self.tokens.counts
    margin_P, keep = self.margin(block, x_PxD), None
    self.least_LxB.append(None)
    if margin_P is not None:
      margin_BxT = self.tokens.pad(margin_P, -torch.inf)
      count = capacity(self.schedule[block], context, routing["bucket_multiple"])
      keep = self.tokens.unpad(select(margin_BxT, count, context, routing["selection"]))
      if routing["decode_sparsity"] and routing["decode_rule"] == "quantile":
        count = capacity(float(self.pruning.decode_schedule[block]), context)
        self.least_LxB[-1] = _nth_largest(margin_BxT, count)[1][:, 0]
    self.keep_LxP.append(torch.ones_like(self.tokens.row_P, dtype=torch.bool) if keep is None else keep)
    return keep

  def observe(self, index_K, some: Packed, q_BxHxKxN, query_BxK, slots: Slots, window: int) -> None:
    """Writes the scores of a block that computed `some` tokens, which index_K chooses; None: all."""
    size, counts, m = self.pruning.routing["score_window"], query_BxK.new_tensor(some.counts), self.tokens.counts
    at_BxW = counts[:, None] - size + torch.arange(size, device=counts.device)[None]
    exists_BxW, at_BxW = at_BxW >= 0, at_BxW.clamp(min=0)
    query_BxW = query_BxK.gather(1, at_BxW)
    weight_BxW = (exists_BxW & (query_BxW >= query_BxW.new_tensor(m)[:, None] - size)).float()
    q = q_BxHxKxN.take_along_dim(at_BxW[:, None, :, None], dim=2)
    k, _, key_BxS, _ = slots.parts
    rows_BxWxS = attention_rows(q, k, visible(query_BxW, key_BxS, window))
    score_BxS = (rows_BxWxS * weight_BxW[:, :, None]).sum(1) / weight_BxW.sum(1, keepdim=True).clamp(min=1)
    self.score_BxT1.scatter_(1, slots.places(self.score_BxT1.shape[1] - 1), score_BxS)


class _NewestView(_View):
  """The causal view of continuation tokens: everything as it stands when the token is the newest."""

  def __init__(self, pruning: Artifact, tokens: Packed, least_LxB: list, longest: int):
    super().__init__(pruning, tokens, pruning.decode_schedule)
    self.least_LxB = least_LxB
    self.scored &= bool(pruning.routing["decode_sparsity"])
    width = longest + 1 if self.scored else 0
    self.seen_PxS1 = torch.zeros(len(tokens.row_P), width, device=tokens.row_P.device)

  def factors(self, sparsity):
    position_P = self.tokens.position_P
    own_P = rank_P = None
    if self.scored:
      own_P = self.seen_PxS1.gather(1, position_P[:, None])[:, 0]
      before = torch.arange(self.seen_PxS1.shape[1], device=own_P.device)[None] < position_P[:, None]
      rank_P = ((self.seen_PxS1 > own_P[:, None]) & before).sum(1).float()
    return self.stack(position_P.float() + 1, own_P, rank_P, position_P.float(), sparsity)

  def decide(self, block: int, x_PxD) -> torch.Tensor | None:
    routing = self.pruning.routing
    margin_P = self.margin(block, x_PxD)
    if margin_P is None:
      return None
    if routing["decode_rule"] == "quantile":
      return margin_P >= self.least_LxB[block][self.tokens.row_P]
    return torch.sigmoid(-margin_P) <= routing["decode_threshold"]

  def observe(self, index_K, some: Packed, q_BxHxKxN, query_BxK, slots: Slots, window: int) -> None:
    k, _, key_BxS, _ = slots.parts
    rows_KxS = some.unpad(attention_rows(q_BxHxKxN, k, visible(query_BxK, key_BxS, window)))
    places_KxS = slots.places(self.seen_PxS1.shape[1] - 1)[some.row_P]
    index = slice(None) if index_K is None else index_K
    self.seen_PxS1[index] = self.seen_PxS1[index].scatter(1, places_KxS, rows_KxS)


# --- the model ------------------------------------------------------------------------------------------


def _rope(x_PxHxN, cos_PxN, sin_PxN) -> torch.Tensor:
  first, second = x_PxHxN.chunk(2, dim=-1)
  return x_PxHxN * cos_PxN[:, None] + torch.cat((-second, first), dim=-1) * sin_PxN[:, None]


class PrunedModel:
  """Mixed into the class of a causal LM of transformers by `load_pruned`. pruning: the Artifact."""

  def prepare_inputs_for_generation(self, *args, **kwargs):
    if kwargs.get("use_cache") is False:
      raise ValueError("use_cache=False would prune new tokens as if they were the prompt's; leave the cache on.")
    return super().prepare_inputs_for_generation(*args, **kwargs)

  @torch.no_grad()
  def forward(
      self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
      labels=None, use_cache=None, logits_to_keep=0, context_length=None, return_dict=None, **kwargs,
  ):  # fmt: skip
    """As the forward of the base model.

    With an empty cache the tokens are a context, which is pruned, or a context and its continuation; with a filled
    cache they are a continuation, of which no gate depends on a later token.

    Args:
      attention_mask: (B, columns so far), 0 at padding, on either side. Positions follow from it.
      context_length: how many tokens of each row, an int or (B,), are context; None: all of them.

    Raises:
      ValueError: what is asked cannot be had of a pruned model.
    """
    if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
      raise ValueError("A pruned model gives no attentions and no hidden states; ask the base model.")
    embeds = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    (batch, columns), cache = embeds.shape[:2], past_key_values
    if not isinstance(cache, PrunedCache):
      if cache is not None and (cache.get_seq_length() or cache.is_compileable):
        raise ValueError("A pruned model keeps its own cache; leave out past_key_values and cache_implementation.")
      cache = PrunedCache(batch, embeds.device)
    first = cache.columns == 0
    mask = torch.ones(batch, columns, dtype=torch.bool, device=embeds.device)
    if attention_mask is not None:
      if attention_mask.shape != (batch, cache.columns + columns):
        raise ValueError(f"attention_mask must have the shape {(batch, cache.columns + columns)}: all columns so far.")
      mask = attention_mask[:, cache.columns :].to(embeds.device, torch.bool)
    index_BxC = mask.cumsum(1) - 1
    if first and position_ids is not None and not ((position_ids == index_BxC) | ~mask).all():
      raise ValueError("position_ids must count the tokens of each row; leave them out.")
    size_B = mask.sum(1)
    context_B = size_B if context_length is None else torch.as_tensor(context_length, device=mask.device).expand(batch)
    if context_length is not None and not first:
      raise ValueError("context_length belongs to the first call; what follows a filled cache is continuation.")
    if first and not ((context_B >= 1) & (context_B <= size_B)).all():
      raise ValueError("Every row needs a context of at least one token and at most its length.")
    wanted = torch.zeros(columns, dtype=torch.bool, device=mask.device)
    kept_logits = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    wanted[kept_logits] = True

    in_context = mask & (index_BxC < context_B[:, None]) if first else torch.zeros_like(mask)
    hidden = embeds.clone()
    for view, piece in (("context", in_context), ("newest", mask & ~in_context)):
      counts = piece.sum(1).tolist()
      if not any(counts):
        continue
      row_P, column_P = piece.nonzero(as_tuple=True)
      start_B = cache.length_B - (index_BxC.masked_fill(~piece, columns).amin(1))
      tokens = Packed(row_P, (start_B[:, None] + index_BxC)[row_P, column_P], counts)
      cache.length_B = cache.length_B + piece.sum(1)
      cache.longest += max(counts)
      if view == "context":
        view = _ContextView(self.pruning, tokens)
      else:
        view = _NewestView(self.pruning, tokens, cache.least_LxB, cache.longest)
      hidden[row_P, column_P] = self._run(embeds[row_P, column_P], tokens, view, cache, wanted[column_P])
      if isinstance(view, _ContextView):
        cache.least_LxB = view.least_LxB
        cache.keep_LxBxT = torch.stack([tokens.pad(keep_P, False) for keep_P in view.keep_LxP])
    cache.columns += columns
    logits = self.lm_head(self.model.norm(hidden[:, kept_logits]))
    loss = None
    if labels is not None:
      loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
    use_cache = self.config.use_cache if use_cache is None else use_cache
    out = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)
    return out.to_tuple() if return_dict is False else out

  def _run(self, x_PxD, tokens: Packed, view: _View, cache: PrunedCache, wanted_P) -> torch.Tensor:
    """States that leave the last block, right where they are wanted; appends to the cache."""
    window = self.config.sliding_window if self.config.model_type == "mistral" else None
    window = window if window and cache.longest > window else 0
    evict = self.pruning.routing["kv_mode"] == "evict"
    cos, sin = (a[0] for a in self.model.rotary_emb(x_PxD[None], tokens.position_P[None]))
    blocks = self.model.layers
    for i, block in enumerate(blocks):
      keep_P = view.decide(i, x_PxD)
      index = None if keep_P is None else keep_P.nonzero()[:, 0]
      attention = block.self_attn
      heads = lambda y, norm: getattr(attention, norm, torch.nn.Identity())(y.unflatten(-1, (-1, attention.head_dim)))

      # Keys and values: of all tokens, or under `evict` of those kept.
      keyed = index if evict else None
      keyed_tokens = tokens if keyed is None else tokens.take(keyed)
      at = lambda a: a if keyed is None else a[keyed]
      y = block.input_layernorm(at(x_PxD))
      k = _rope(heads(attention.k_proj(y), "k_norm"), at(cos), at(sin))
      v = attention.v_proj(y).unflatten(-1, (-1, attention.head_dim))
      swapped = lambda a: keyed_tokens.pad(a).transpose(1, 2)
      kept = torch.ones_like(tokens.row_P, dtype=torch.bool) if keep_P is None else keep_P
      new = Slots(
          swapped(k), swapped(v), keyed_tokens.pad(keyed_tokens.position_P, EMPTY), keyed_tokens.pad(at(kept), False)
      )
      first = len(cache.slots) <= i
      if first:
        cache.slots.append(new)
      else:
        cache.slots[i] = cache.slots[i].append(new)

      # What is computed: the tokens kept; in the last block only where somebody reads the result.
      if i == len(blocks) - 1 and not wanted_P.all():
        index = (kept & wanted_P).nonzero()[:, 0]
      if index is not None and not len(index):
        continue
      whole = first and not window and index is not None and keyed is None and len(index) > _WHOLE * len(x_PxD)
      asked = None if whole else index  # whose queries are computed
      same = asked is keyed
      some = keyed_tokens if same else tokens.take(asked)
      pick = lambda a, chosen: a if chosen is None else a[chosen]
      if not same:
        y = y[asked] if keyed is None else block.input_layernorm(x_PxD[asked])
      q_PxHxN = _rope(heads(attention.q_proj(y), "q_norm"), pick(cos, asked), pick(sin, asked))
      padded = lambda: (some.pad(q_PxHxN).transpose(1, 2), some.pad(some.position_P))
      attended = some.unpad(attend(*padded(), *cache.slots[i].parts[:3], window, first, same).transpose(1, 2))
      if whole:
        attended, some, q_PxHxN = attended[index], tokens.take(index), q_PxHxN[index]
      if view.observes(i):
        view.observe(index, some, *padded(), cache.slots[i], window)
      y = pick(x_PxD, index) + attention.o_proj(attended.flatten(1))
      y = y + block.mlp(block.post_attention_layernorm(y))
      x_PxD = y if index is None else x_PxD.index_copy_(0, index, y)
    return x_PxD
