"""Llama 2 7B on Alpaca with a late plan and maps instead of a search, what is best on the small models that were run.

  ftp-jax run --config=llama2_7b_stand_in --workdir=runs/llama2_7b_stand_in

As llama2_7b.py, but what enters block 14 decides all gates from there on (about as deep as block 13 of SmolLM2's 30 and
block 10 of Qwen's 24), in the allotted schedule, and maps of rank 64 stand in for skipped blocks. These numbers
and train.guide_stakes are carried over, not chosen on this model. No passage is said twice, and there are no recent
tokens.

Wall time and result: not run here: no accelerator; checked by abstract evaluation of the full-size model
(tests/test_configs.py).
"""

from ftp_jax.config import get_config as get_default_config
from ftp_jax.config import large_preset, plan_preset, stand_in_preset


def get_config():
  config = stand_in_preset(plan_preset(large_preset(get_default_config()), 14))
  config.model.source = "meta-llama/Llama-2-7b-hf"
  return config
