"""smollm2_135m_late with linear maps that stand in for skipped blocks.

  ftp-jax run --config=smollm2_135m_stand_in --workdir=runs/smollm2_135m_stand_in

A context token that skips a block is moved by a map of rank 64, fitted in closed form and then trained with the router
(docs/method.md, section 4).

Wall time: one minute more than smollm2_135m_late.py, which has all other settings.
Result: KL to dense 0.003 / 0.010 / 0.046 nats a token at S = 0.22 / 0.30 / 0.40 (+- 0.001, 0.001 and 0.005
over seeds), where smollm2_135m_late.py has 0.025 / 0.064 / 0.158.
"""

from ftp_jax.config import get_config as get_default_config
from ftp_jax.config import late_preset, small_preset


def get_config():
  config = late_preset(small_preset(get_default_config()))
  config.stand_in.rank = 64
  config.train.stand_in_learning_rate = 3e-4
  return config
