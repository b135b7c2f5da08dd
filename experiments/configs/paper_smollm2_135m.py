"""The paper's recipe on SmolLM2-135M: evict, argmax, four factors, static guide, GA from a uniform schedule.

  ftp-jax run --config=paper_smollm2_135m --workdir=runs/paper_smollm2_135m

Data as in smollm2_135m.py; one seed, S = 0.30.

Wall time: not measured yet.
Result: not measured yet.
"""

from ftp_jax.config import get_config as get_default_config
from ftp_jax.config import paper_preset, small_preset


def get_config():
  config = paper_preset(small_preset(get_default_config()))
  config.train.steps = 128
  config.train.validate_every = 32
  config.train.checkpoint_every = 32
  return config
