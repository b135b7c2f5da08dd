"""ShortGPT (Men et al. 2024, arXiv 2403.03853): whole blocks of least influence leave the model, for all tokens.

Block influence is 1 - cosine(x_i, x_{i+1}), mean over tokens; the round(S L) blocks with the least of it are removed
at once. Deviation: influence is measured on the calibration prompts, where the paper takes PG19.
"""

from typing import Any

import numpy as np

from ftp_jax.evaluation.baselines.calibration import Calibration
from ftp_jax.evaluation.judge import Frozen
from ftp_jax.evaluation.redundancy import block_influence, token_similarity


def calibrate(model: Frozen, sparsity: float, calibration: Calibration, seed: int) -> tuple[dict[str, Any], Any]:
  """Facts: the `removed` blocks, ascending, and the `influence` of all; no arrays. At least one block stays."""
  del seed
  influence = block_influence(token_similarity(model, calibration.prompts, calibration.batch))
  count = min(round(sparsity * len(influence)), len(influence) - 1)
  removed = np.argsort(influence, kind="stable")[:count]
  return {"removed": sorted(removed.tolist()), "influence": influence.tolist()}, {}
