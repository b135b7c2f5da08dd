"""How tokens are routed: the static description shared by every execution."""

import dataclasses

from ftp_jax.errors import UserError

FACTORS = ("position", "score", "rank", "sparsity")
KV_MODES = ("evict", "project")
SELECTIONS = ("topk", "argmax")
KINDS = ("global", "per_block", "recurrent")


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

  def __post_init__(self):
    if self.kind not in KINDS:
      raise UserError(f"router.kind={self.kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    unknown = set(self.factors) - set(FACTORS)
    if unknown or len(set(self.factors)) < len(self.factors):
      raise UserError(f"router.factors={self.factors} must be distinct names out of {', '.join(FACTORS)}.")
    if not self.factors and not self.hidden_states:
      raise UserError("The router has no input: name router.factors or set router.hidden_states=True.")


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
      them all (strict).
    decode_threshold: skip probability above which a continuation token skips a block.
  """

  kv_mode: str = "project"
  selection: str = "topk"
  bucket_multiple: int = 1
  score_window: int = 8
  decode_sparsity: float = 0.0
  decode_threshold: float = 0.5

  def __post_init__(self):
    if self.kv_mode not in KV_MODES:
      raise UserError(f"routing.kv_mode={self.kv_mode!r} is unknown; choose one of {', '.join(KV_MODES)}.")
    if self.selection not in SELECTIONS:
      raise UserError(f"routing.selection={self.selection!r} is unknown; choose one of {', '.join(SELECTIONS)}.")
    if self.bucket_multiple < 1 or self.score_window < 1:
      raise UserError("routing.bucket_multiple and routing.score_window must be at least 1.")
    if not 0 <= self.decode_sparsity < 1:
      raise UserError(f"routing.decode_sparsity={self.decode_sparsity} must be at least 0 and below 1.")
    if not 0 < self.decode_threshold < 1:
      raise UserError(f"routing.decode_threshold={self.decode_threshold} must lie between 0 and 1.")
