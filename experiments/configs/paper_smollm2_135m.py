"""The paper's recipe on SmolLM2-135M: evict, argmax, four factors, static guide, GA from a uniform schedule.

  ftp-jax run --config=paper_smollm2_135m --workdir=runs/paper_smollm2_135m

Data as in smollm2_135m.py; one seed, S = 0.30.

Wall time: about 8 minutes on 2 CPU cores (AMD EPYC).
Result: KL to dense 0.364 nats a token with the static router, as with truncation; the dynamic one collapses: it skips
89 % instead of 30, at a KL of 1.85 (docs/results.md).
"""

from ftp_jax.config import get_config as get_default_config
from ftp_jax.config import paper_preset, small_preset


def get_config():
  config = paper_preset(small_preset(get_default_config()))
  config.train.steps = 128
  config.train.validate_every = 32
  config.train.checkpoint_every = 32
  return config
