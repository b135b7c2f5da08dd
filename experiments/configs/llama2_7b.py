"""Llama 2 7B on Alpaca: one seed, S = 0.22, 0.30 and 0.40.

  ftp-jax run --config=llama2_7b --workdir=runs/llama2_7b

The source needs the hub and, for this checkpoint, an account that has accepted its licence (`hf auth login`), or
--config.model.source=DIRECTORY with a local copy.

Wall time and result: not run here: no accelerator; checked by abstract evaluation of the full-size model
(tests/test_configs.py).
"""

from ftp_jax.config import get_config as get_default_config
from ftp_jax.config import large_preset


def get_config():
  config = large_preset(get_default_config())
  config.model.source = "meta-llama/Llama-2-7b-hf"
  return config
