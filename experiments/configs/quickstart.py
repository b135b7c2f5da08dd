"""The whole pipeline on SmolLM2-135M in minutes: one seed, S = 0.30, the embedded prose.

  ftp-jax run --config=quickstart --workdir=runs/quickstart

Wall time: not measured yet (aim: at most 10 minutes on 2 CPU cores with 8 GB, the model's download included).
Result: not measured yet. It shows that everything runs; its sets are too small to rank close methods.
"""

from ftp_jax.config import get_config as get_default_config


def get_config():
  config = get_default_config()
  config.data.min_context = 64
  config.data.max_context = 64
  config.data.continuation = 16
  config.data.num_search = 16
  config.data.num_train = 64
  config.data.num_validation = 16
  config.data.num_test = 32
  config.search.population = 8
  config.search.elite = 2
  config.search.generations = 4
  config.train.steps = 16
  config.train.warmup = 2
  config.train.validate_every = 8
  config.train.checkpoint_every = 8
  config.finetune.generations = 3
  config.evaluation.perplexity_windows = 4
  config.evaluation.redundancy_prompts = 16
  return config
