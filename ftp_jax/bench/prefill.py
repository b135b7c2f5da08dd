"""Time to first token against context, batch and sparsity."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ftp_jax.bench import baselines, records
from ftp_jax.bench.cases import Case, Prefill, context_tokens, dense
from ftp_jax.bench.settings import Settings
from ftp_jax.bench.timing import interleave
from ftp_jax.bench.torch_dense import TorchDense
from ftp_jax.models.sources import Model


class _TorchPrefill:
  name = "torch_dense"

  def __init__(self, torch: TorchDense, tokens_BxT: np.ndarray):
    self.measure = lambda: torch.call("prefill", tokens_BxT)
    self.describe = torch.describe


def bench(model: Model, cases: Sequence[Case], settings: Settings, torch: TorchDense | None) -> list[dict[str, Any]]:
  """Records of every batch and context: dense, torch_dense where there is torch, the cases, then the baselines."""
  found, others = [], baselines.chosen(model, settings)
  for batch, context in itertools.product(settings.batch, settings.context):
    tokens = context_tokens(model, settings, batch, context)
    methods: list[Any] = [Prefill(case, tokens) for case in (dense(model, settings.dtype), *cases)]
    methods += [baselines.BaselinePrefill(baseline, tokens) for baseline in others]
    if torch:
      methods.insert(1, _TorchPrefill(torch, tokens))
    seconds = interleave(methods, settings.runs, f"{settings.kind} context {context} batch {batch}")
    for method, own in zip(methods, seconds):
      found.append(records.make(
          settings.kind, context=context, batch=batch, seconds=own, dense=seconds[0], dtype=settings.dtype,
          **method.describe(),
      ))
  return found
