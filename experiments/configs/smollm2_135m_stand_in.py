"""smollm2_135m_late with linear maps that stand in for skipped blocks.

  ftp-jax run --config=smollm2_135m_stand_in --workdir=runs/smollm2_135m_stand_in

A context token that skips a block is moved by a map of rank 64, fitted in closed form (docs/method.md, section 4).

Wall time: one minute more than smollm2_135m_late.py, which has all other settings.
Result: KL to dense 0.006 / 0.014 / 0.057 nats a token at S = 0.22 / 0.30 / 0.40 (seed 0), where that seed of
smollm2_135m_late.py has 0.025 / 0.063 / 0.173.
"""

from ftp_jax.config import get_config as get_default_config
from ftp_jax.config import late_preset, small_preset


def get_config():
  config = late_preset(small_preset(get_default_config()))
  config.stand_in.rank = 64
  return config
