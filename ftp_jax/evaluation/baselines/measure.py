"""Every method, FTP among them, measured by the execution that is timed: prefill, then a teacher-forced continuation.

KL, NLL and agreement compare whole next-token distributions at the continuation's positions with the dense model's.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax.data.prompts import Prompts, batches
from ftp_jax.evaluation.baselines.kinds import Baseline
from ftp_jax.evaluation.flops import prefill_flops
from ftp_jax.inference import programs
from ftp_jax.inference.engine import Engine, Prefix
from ftp_jax.models import scoring
from ftp_jax.models.sources import Model
from ftp_jax.routing.cache import empty_recent


class Comparison(NamedTuple):
  """Per prompt, (N,): KL to dense and NLL in nats a token, and share of equal next tokens."""

  kl: np.ndarray
  nll: np.ndarray
  agreement: np.ndarray


def _continuation(spec, plan, weights, prefilled, tokens_BxC):
  """Log-probabilities (B,C,V) that predict each token."""
  room = max(tokens_BxC.shape[1] - 1, 1)
  recent = empty_recent(spec.model, len(tokens_BxC), room, spec.dtype)
  logits = programs.continuation_logits(
      spec, plan, weights, prefilled.cache, recent, prefilled.logits_BxV, tokens_BxC
  )
  return jax.nn.log_softmax(logits)


log_probs = functools.partial(jax.jit, static_argnames=("spec", "plan"))(_continuation)


@functools.partial(jax.jit, static_argnames=("spec", "plan"))
def _compare(spec, plan, weights, prefilled, tokens_BxC, weight_BxC, teacher_BxCxV) -> Comparison:
  student = _continuation(spec, plan, weights, prefilled, tokens_BxC)
  mean = lambda values: scoring.row_mean(values, weight_BxC)
  return Comparison(
      mean(scoring.kl_divergence(teacher_BxCxV, student)),
      mean(-jnp.take_along_axis(student, tokens_BxC[:, :, None], axis=2)[:, :, 0]),
      mean((jnp.argmax(teacher_BxCxV, -1) == jnp.argmax(student, -1)).astype(jnp.float32)),
  )


class Yardstick:
  """Test prompts and the dense model's distributions over their continuations."""

  def __init__(self, model: Model, prompts: Prompts, batch: int, **options):
    """Runs the dense model once; the log-probabilities stay in host memory, 4 N C V bytes.

    Args:
      batch: rows at once; options: of the dense engine.
    """
    self.prompts, self.model = prompts, model
    self.longest = int(np.max(prompts.length - prompts.context))
    self._batches = list(batches(prompts, batch))
    dense, self._teacher, self.dense_cache_bytes = Engine(model, **options), [], 0
    for rows, weight, _ in self._batches:
      prefix = dense.prefill(_contexts(rows))
      self.dense_cache_bytes += prefix.cache_bytes
      (group,) = prefix.groups
      tokens, _ = self._continuations(rows)
      self._teacher.append(np.asarray(log_probs(group.spec, group.plan, group.weights, group.prefilled, tokens)))

  def _continuations(self, rows: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (B,C) and weights (B,C), 1.0 where there is one."""
    _, tokens, weight = scoring.continuation(rows.tokens, rows.context, rows.length, self.longest)
    return np.asarray(tokens), np.asarray(weight)

  def compare(self, engine: Engine) -> tuple[Comparison, list[Prefix]]:
    """Compares an engine with the dense model; also what it prefilled, one prefix a batch."""
    results = [np.zeros((len(self._batches), len(self._batches[0].rows))) for _ in Comparison._fields]
    prefixes = []
    for i, ((rows, *_), teacher) in enumerate(zip(self._batches, self._teacher)):
      prefix = engine.prefill(_contexts(rows))
      tokens, weight = self._continuations(rows)
      for group in prefix.groups:
        at = np.array(group.index)
        found = _compare(group.spec, group.plan, group.weights, group.prefilled, tokens[at], weight[at], teacher[at])
        for all_rows, values in zip(results, found):
          all_rows[i, at] = np.asarray(values)
      prefixes.append(prefix)
    return Comparison(*(a.ravel()[: len(self.prompts.tokens)] for a in results)), prefixes

  def record(self, baseline: Baseline, windows: Prompts | None = None, batch: int = 8) -> dict[str, Any]:
    """One flat record: quality, perplexity over `windows` where given, sparsities, FLOPs saved and KV bytes.

    `cache_bytes` is what the prefills of all prompts hold, padding included; `cache_ratio` that of the dense model's.
    """
    found, prefixes = self.compare(baseline.engine)
    costs, lengths, before, cache_bytes, config = [], [], 0.0, 0, self.model.config
    for (rows, weight, _), prefix in zip(self._batches, prefixes):
      cache_bytes += prefix.cache_bytes
      for group in prefix.groups:
        keep = np.asarray(baseline.routes(group.prefilled.cache))
        for row, at in enumerate(group.index):
          if weight[at]:
            m = int(rows.context[at])
            costs.append(baseline.costs(keep[..., row, :], m))
            lengths.append(m)
            before += prefill_flops(config, np.ones((config.num_blocks, m)), m)
    perplexity = perplexity_achieved = None
    if windows is not None:
      perplexity, perplexity_achieved = baseline.perplexity(windows, batch)
    count = len(found.kl)
    return {
        "method": baseline.name,
        "asked": baseline.sparsity,
        "seed": baseline.seed,
        "kl": float(found.kl.mean()),
        "kl_stderr": float(found.kl.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0,
        "nll": float(found.nll.mean()),
        "agreement": float(found.agreement.mean()),
        "perplexity": perplexity,
        "perplexity_achieved": perplexity_achieved,
        "achieved": float(np.average([c.skipped for c in costs], weights=lengths)),
        "flops_saved": 1 - sum(c.flops for c in costs) / before,
        "cache_bytes": cache_bytes,
        "cache_ratio": cache_bytes / self.dense_cache_bytes,
        "prompts": count,
    }


def _contexts(rows: Prompts) -> list[list[int]]:
  return [row[:m].tolist() for row, m in zip(rows.tokens, rows.context)]
