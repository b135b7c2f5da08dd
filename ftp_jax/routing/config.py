"""How tokens are routed: the static description shared by every execution."""

import dataclasses
from collections.abc import Iterable, Sequence

from ftp_jax.errors import UserError

FACTORS = ("position", "score", "rank", "sparsity")
SCORE_FACTORS = frozenset({"score", "rank"})  # those that are made of attention scores
KV_MODES = ("evict", "project")
SELECTIONS = ("topk", "argmax")
DECODE_RULES = ("threshold", "quantile")
KINDS = ("global", "per_block", "recurrent")
_MOST = 2**20  # tokens that a key may name


@dataclasses.dataclass(frozen=True)
class RouterConfig:
  """The dynamic router: an MLP from per-token inputs to the logits (skip, compute).

  Attributes:
    kind: `global` (one MLP for all blocks), `per_block`, or `recurrent` (one MLP whose hidden
      layer also reads the token's hidden layer of the block before).
    factors: subset of FACTORS, each in [0, 1].
    hidden_states: also feed the root-mean-square normed hidden state (D numbers).
    hidden_size: width of the MLP.
  """

  kind: str = "global"
  factors: tuple[str, ...] = FACTORS
  hidden_states: bool = False
  hidden_size: int = 64

  @classmethod
  def from_config(cls, config) -> "RouterConfig":
    """That of the `router` part of a config."""
    return cls(config.kind, tuple(config.factors), config.hidden_states, config.hidden_size)

  def __post_init__(self):
    if self.kind not in KINDS:
      raise UserError(f"router.kind={self.kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    unknown = [name for name in self.factors if name not in FACTORS]
    if unknown or len(set(self.factors)) < len(self.factors):
      raise UserError(f"router.factors={self.factors} must be distinct names out of {', '.join(FACTORS)}.")
    if not self.factors and not self.hidden_states:
      raise UserError("The router has no input: name router.factors or set router.hidden_states=True.")
    if self.hidden_size < 1:
      raise UserError(f"router.hidden_size={self.hidden_size} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class RoutingConfig:
  """Selection and semantics (docs/method.md); hashable, a static jit argument.

  Attributes:
    kv_mode: `evict` (a skipped token has no key or value in the block) or `project` (it has,
      from its unchanged hidden state).
    selection: `topk` (the K largest margins) or `argmax` (those with a positive margin, at most K).
    bucket_multiple: capacities are rounded up to a multiple of this many tokens.
    score_window: number of last context queries whose attention scores the context tokens.
    decode_sparsity: sparsity asked of continuation tokens, the schedule scaled to this mean; 0 computes
      them all (strict). In training it is what routers learn to skip of them.
    decode_rule: when the dynamic router lets a continuation token skip: `threshold` (the paper's: its skip probability
      is above `decode_threshold`) or `quantile` (causal router: its margin is below the largest ones of the context,
      as many as would be kept at the sparsity asked of continuation tokens).
    decode_threshold: see there.
    one_pass_block: one-pass routing: the gates of this block and all after it are decided from what enters this
      block, so that the whole plan is known there; -1: every block decides from what enters it.
    evict_from: under `evict`, the first block that evicts; those before it project.
    recent_tokens: how many of a context's last tokens take a block's slots before all but the forced ones, the latest
      first. Contexts of less than four times as many have none, so that on these it has no effect.
  """

  kv_mode: str = "project"
  selection: str = "topk"
  bucket_multiple: int = 1
  score_window: int = 8
  decode_sparsity: float = 0.0
  decode_rule: str = "threshold"
  decode_threshold: float = 0.5
  one_pass_block: int = -1
  evict_from: int = 0
  recent_tokens: int = 0

  def __post_init__(self):
    if self.kv_mode not in KV_MODES:
      raise UserError(f"routing.kv_mode={self.kv_mode!r} is unknown; choose one of {', '.join(KV_MODES)}.")
    if self.selection not in SELECTIONS:
      raise UserError(f"routing.selection={self.selection!r} is unknown; choose one of {', '.join(SELECTIONS)}.")
    if self.decode_rule not in DECODE_RULES:
      raise UserError(f"routing.decode_rule={self.decode_rule!r} is unknown; choose one of {', '.join(DECODE_RULES)}.")
    for name, least in (("bucket_multiple", 1), ("score_window", 1), ("recent_tokens", 0)):
      if not least <= getattr(self, name) <= _MOST:
        raise UserError(f"routing.{name}={getattr(self, name)} must be from {least} to {_MOST}.")
    if not 0 <= self.decode_sparsity < 1:
      raise UserError(f"routing.decode_sparsity={self.decode_sparsity} must be at least 0 and below 1.")
    if not 0 < self.decode_threshold < 1:
      raise UserError(f"routing.decode_threshold={self.decode_threshold} must lie between 0 and 1.")
    if self.one_pass_block < -1:
      raise UserError(f"routing.one_pass_block={self.one_pass_block} must be a block, counted from 0, or -1 for none.")
    if self.evict_from < 0:
      raise UserError(f"routing.evict_from={self.evict_from} must be a block, counted from 0.")
    if self.evict_from and self.kv_mode != "evict":
      raise UserError(
          f"routing.evict_from={self.evict_from} needs routing.kv_mode=evict; set it to 0, as with {self.kv_mode} no "
          "block evicts."
      )

  @property
  def trains_continuation(self) -> bool:
    """Whether guide and sparsity loss reach continuation tokens, whose gates then follow the margin's sign."""
    return self.decode_sparsity > 0 and self.decode_rule == "threshold"

  @property
  def kv(self) -> str:
    """The KV mode in words, for people."""
    return f"{self.kv_mode} from block {self.evict_from} on" if self.evict_from else self.kv_mode

  def check_blocks(self, num_blocks: int) -> None:
    """UserError if a block is named that a model of `num_blocks` does not have."""
    others = {"one_pass_block": "-1 where each block decides for itself", "evict_from": "0 for all blocks"}
    for name, otherwise in others.items():
      if getattr(self, name) >= num_blocks:
        raise UserError(
            f"routing.{name}={getattr(self, name)} does not exist: the model has blocks 0 to {num_blocks - 1}; choose "
            f"one of them, or {otherwise}."
        )

  def first_evicting(self, num_blocks: int) -> int:
    """The block from which on skipped tokens have no keys and values; `num_blocks` if there is none."""
    return self.evict_from if self.kv_mode == "evict" else num_blocks

  def scored_blocks(self, routed_L: Sequence[bool], recurrent: bool = False) -> list[bool]:
    """Whether a router that reads attention scores reads those of each block, (L): it is asked in the next one.

    Where nothing is decided in the next block, it is dense, and its own scores replace all before them.

    Args:
      routed_L: which blocks have gates to decide; a recurrent router is asked in all blocks up to the last of them.
    """
    last = max((block for block, routed in enumerate(routed_L) if routed), default=-1)
    plan = self.one_pass_block if self.one_pass_block >= 0 else len(routed_L)
    asked = {min(block, plan) for block in range(last + 1) if routed_L[block] or recurrent}
    return [block + 1 in asked for block in range(len(routed_L))]

  def phases(self, num_blocks: int, start: int = 0, more: Iterable[int] = ()) -> list[tuple[int, int]]:
    """Runs of blocks [begin, end) from `start` on, cut where a plan is made, where eviction begins, and at `more`."""
    cuts = {self.one_pass_block, self.first_evicting(num_blocks), *more}
    bounds = [start, *sorted(cut for cut in cuts if start < cut < num_blocks), num_blocks]
    return list(zip(bounds, bounds[1:]))
