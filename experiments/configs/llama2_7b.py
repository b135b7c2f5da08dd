"""Llama 2 7B on Alpaca: one seed, S = 0.22, 0.30 and 0.40.

  ftp-jax run --config=llama2_7b --workdir=runs/llama2_7b

The source needs the hub and, for this checkpoint, an account that has accepted its licence (`hf auth login`), or
--config.model.source=DIRECTORY with a local copy.

Wall time and result: not run here: no accelerator; checked by abstract evaluation of the full-size model
(tests/test_configs.py).
"""

from ftp_jax.config import get_config as get_default_config


def get_config():
  config = get_default_config()
  config.sparsities = (0.22, 0.30, 0.40)
  config.model.source = "meta-llama/Llama-2-7b-hf"
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.data.source = "hub"
  config.data.path = "tatsu-lab/alpaca"
  config.data.max_context = 256
  config.data.continuation = 64
  config.data.num_search = 64
  config.data.num_train = 1024
  config.data.num_validation = 64
  config.data.num_test = 256
  config.search.population = 24
  config.search.generations = 24
  config.train.steps = 400
  config.finetune.generations = 16
  config.evaluation.perplexity_length = 1024
  return config
