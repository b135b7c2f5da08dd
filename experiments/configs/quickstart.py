"""The whole pipeline on SmolLM2-135M in minutes: one seed, S = 0.30, the embedded prose.

  ftp-jax run --config=quickstart --workdir=runs/quickstart

Wall time: not measured yet (aim: at most 10 minutes on 2 CPU cores with 8 GB, the model's download included).
Result: not measured yet. It shows that everything runs; its sets are too small to rank close methods.
"""

from ftp_jax.config import get_config as get_default_config


def get_config():
  config = get_default_config()
  config.data.num_search = 16
  config.data.num_train = 96
  config.data.num_validation = 16
  config.data.num_test = 32
  config.search.population = 12
  config.search.generations = 6
  config.train.steps = 60
  config.train.validate_every = 20
  config.train.checkpoint_every = 20
  config.finetune.generations = 4
  config.evaluation.perplexity_windows = 4
  config.evaluation.redundancy_prompts = 8
  return config
