"""Tokens a second and size of the KV cache against context: greedy steps after one prefill."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax.bench import records
from ftp_jax.bench.cases import Case, Prefill, context_tokens, dense
from ftp_jax.bench.settings import Settings
from ftp_jax.bench.timing import interleave, seconds_of
from ftp_jax.bench.torch_dense import TorchDense
from ftp_jax.inference import programs
from ftp_jax.inference.programs import Stream
from ftp_jax.inference.sampling import Sampling
from ftp_jax.models.sources import Model
from ftp_jax.routing.cache import empty_recent

_NO_STOP = -1  # no token has this id, so that every measurement takes all its steps


class Decode:
  """Seconds of one decode step of a case, mean over `steps`, always from the same prefill; a timing.Method."""

  def __init__(self, case: Case, tokens_BxT: np.ndarray, steps: int):
    self.case, self.name, self.steps = case, case.name, steps
    prefill = Prefill(case, tokens_BxT)
    self.plan, (logits_BxV, self.cache) = prefill.plan, prefill.run()
    batch = len(tokens_BxT)
    self.seed_B, self.stop_K = jnp.zeros(batch, jnp.uint32), jnp.full(1, _NO_STOP)
    self.first = programs.first_token(Sampling(), logits_BxV, self.seed_B, self.stop_K)
    self.cache_bytes = sum(a.nbytes for a in self.cache[:3])

  def measure(self) -> float:
    spec, batch = self.case.spec, len(self.seed_B)
    recent = empty_recent(spec.model, batch, self.steps, spec.dtype)
    stream = jax.block_until_ready(Stream(*map(jnp.copy, self.first), recent, jnp.ones((), jnp.int32)))  # is donated
    seconds, (stream, _, count) = seconds_of(
        lambda: programs.decode_steps(
            spec, self.plan, self.case.weights, Sampling(), self.steps, self.cache, stream, self.seed_B, self.stop_K
        )
    )
    assert int(count) == self.steps
    self.skipped = 1 - float(jnp.mean(stream.recent.computed_LxBxM[:, :, : self.steps]))
    return seconds / self.steps

  def describe(self) -> dict[str, Any]:
    """For its record: method, labels, and the share of (new token, block) pairs that were skipped."""
    return {"method": self.case.method, **self.case.labels, "decode_achieved": self.skipped}


class _TorchDecode:
  name = "torch_dense"

  def __init__(self, torch: TorchDense, tokens_BxT: np.ndarray, steps: int):
    self.cache_bytes = torch.call("start", tokens_BxT)
    self.measure = lambda: torch.call("decode", steps) / steps
    self.describe = torch.describe


def bench(model: Model, cases: Sequence[Case], settings: Settings, torch: TorchDense | None) -> list[dict[str, Any]]:
  """Records of every batch and context, as `prefill.bench`; seconds are those of a step, one token of every row."""
  found = []
  for batch, context in itertools.product(settings.batch, settings.context):
    tokens = context_tokens(model, settings, batch, context)
    methods: list[Any] = [Decode(case, tokens, settings.steps) for case in (dense(model, settings.dtype), *cases)]
    if torch:
      methods.insert(1, _TorchDecode(torch, tokens, settings.steps))
    seconds = interleave(methods, settings.runs, f"decode context {context} batch {batch}")
    for method, own in zip(methods, seconds):
      record = records.make(
          "decode", context=context, batch=batch, seconds=own, dense=seconds[0], dtype=settings.dtype,
          steps=settings.steps, cache_bytes=method.cache_bytes,
          cache_ratio=method.cache_bytes / methods[0].cache_bytes, **method.describe(),
      )
      found.append(record | {"tokens_per_second": batch / record["seconds_median"]})
  return found
