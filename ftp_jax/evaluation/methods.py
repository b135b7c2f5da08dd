"""The methods of the results table, each measured on the same test prompts.

A record holds quality (continuation KL to dense, NLL, next-token agreement, all-position perplexity
under the causal view) and the three sparsities: asked, achieved, FLOPs saved; where continuation tokens may skip,
`decode_achieved` as well, the share of their (token, block) pairs that did (of the last
token nothing is read).
"""

from typing import Any

import jax
import numpy as np

from ftp_jax.data.prompts import Prompts
from ftp_jax.evaluation import flops
from ftp_jax.evaluation.judge import Judge, Quality
from ftp_jax.evaluation.perplexity import routed_perplexity, truncated_perplexity
from ftp_jax.routing import routers, stand_in


def truncated(context: int, sparsity: float) -> np.ndarray:
  """Positions that truncation keeps of a context: the first and the latest, ceil((1 - S) m) in all, at least 2."""
  kept = min(max(int(np.ceil((1 - sparsity) * context - 1e-3)), 2), int(context))
  return np.r_[0, context - kept + 1 : context]


def truncate(prompts: Prompts, sparsity: float) -> Prompts:
  """Truncates every context and keeps the whole continuation."""
  tokens, context, length = np.zeros_like(prompts.tokens), prompts.context.copy(), prompts.length.copy()
  for n, (m, end) in enumerate(zip(prompts.context, prompts.length)):
    kept = truncated(m, sparsity)
    rows = np.r_[kept, m:end]
    tokens[n, : len(rows)], context[n], length[n] = prompts.tokens[n, rows], len(kept), len(rows)
  return Prompts(tokens, context, length)


class Bench:
  """Test prompts and perplexity windows on which every method is measured, in masked execution.

  Each method gives a record of `_record`. `judge` has the model and the prompts, of `windows` `batch` run at once.
  """

  def __init__(self, judge: Judge, windows: Prompts, batch: int):
    self.judge, self.windows, self.batch = judge, windows, batch
    self.blocks = judge.model.config.num_blocks

  def dense(self) -> dict[str, Any]:
    quality = self.judge.quality(routers.STATIC, np.zeros(self.blocks))
    perplexity = truncated_perplexity(self.judge.model, 0.0, self.windows, self.batch)
    return self._record("dense", 0.0, None, quality, perplexity, 0.0, 0.0)

  def truncation(self, sparsity: float) -> dict[str, Any]:
    """The oldest context but the sink cut off, positions counted anew; then dense."""
    shorter = truncate(self.judge.prompts, sparsity)
    quality = self.judge.quality(routers.STATIC, np.zeros(self.blocks), shorter)
    config, before, after = self.judge.model.config, 0.0, 0.0
    for m, kept in zip(self.judge.prompts.context, shorter.context):
      before += flops.prefill_flops(config, np.ones((self.blocks, m), bool), m)
      after += flops.prefill_flops(config, np.ones((self.blocks, kept), bool), kept)
    perplexity = truncated_perplexity(self.judge.model, sparsity, self.windows, self.batch)
    dropped = 1 - shorter.context.sum() / self.judge.prompts.context.sum()
    return self._record("truncation", sparsity, None, quality, perplexity, float(dropped), 1 - after / before)

  def static_uniform(self, sparsity: float) -> dict[str, Any]:
    return self.routed("static_uniform", sparsity, None, routers.STATIC, np.full(self.blocks, sparsity))

  def random(self, sparsity: float, seed: int) -> dict[str, Any]:
    """Random tokens, behind recent ones if there are any, the same number in every block."""
    router = routers.Router("random", None, jax.random.key(seed))
    return self.routed("random", sparsity, seed, router, np.full(self.blocks, sparsity))

  def routed(self, method: str, sparsity: float, seed: int | None, router: routers.Router, schedule) -> dict[str, Any]:
    """A router with a schedule (L,)."""
    judge = self.judge
    quality = judge.quality(router, schedule)
    # The static order never skips the newest token: its perplexity would be the dense one and say nothing.
    perplexity = perplexity_achieved = None
    if router.kind != "static":
      perplexity, perplexity_achieved = routed_perplexity(
          judge.model, judge.routing, router, schedule, self.windows, self.batch
      )
    context = judge.prompts.context
    saved = flops.saved_share(
        judge.model.config, quality.keep_LxNxT, context, judge.routing, router.config,
        stand_in.rank(judge.model.params),
    )
    achieved = flops.skipped_share(quality.keep_LxNxT, context)
    record = self._record(method, sparsity, seed, quality, perplexity, achieved, saved, perplexity_achieved)
    if judge.routing.decode_sparsity:
      record["decode_achieved"] = flops.skipped_share(quality.keep_LxNxT, judge.prompts.length - 1, context)
    return record

  def _record(
      self, method, asked, seed, quality: Quality, perplexity, achieved, saved, perplexity_achieved=None
  ) -> dict[str, Any]:
    count = len(quality.kl)
    return {
        "method": method,
        "schedule": None,
        "asked": float(asked),
        "seed": seed,
        "kl": float(quality.kl.mean()),
        "kl_stderr": float(quality.kl.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0,
        "nll": float(quality.nll.mean()),
        "agreement": float(quality.agreement.mean()),
        "perplexity": perplexity,
        "perplexity_achieved": perplexity_achieved,
        "achieved": float(achieved),
        "flops_saved": float(saved),
        "prompts": count,
    }
