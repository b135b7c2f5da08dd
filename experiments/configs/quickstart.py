"""The whole pipeline on SmolLM2-135M in minutes: one seed, S = 0.30, the embedded prose.

  ftp-jax run --config=quickstart --workdir=runs/quickstart

For a model of other than 30 blocks set routing.one_pass_block, -1 for none.

Wall time: 6 to 21 minutes on 2 CPU cores (AMD EPYC, faster and slower ones), the installation and the model's download
included.
Result: KL to dense 0.023 nats a token with the fine-tuned dynamic router, 0.038 with the static one in the schedule
allotted for routers, 0.112 +- 0.034 for truncation, which saves more. Its sets are too small to rank close methods.
"""

from ftp_jax.config import get_config as get_default_config


def get_config():
  config = get_default_config()
  config.data.min_context = 64
  config.data.max_context = 64
  config.data.continuation = 16
  config.data.num_search = 16
  config.data.num_train = 512
  config.data.num_validation = 16
  config.data.num_test = 32
  config.routing.one_pass_block = 13  # routers from there on read what enters this block (of 30)
  config.stand_in.rank = 64  # maps that stand in for skipped blocks
  config.search.schedule = "allotted"  # by what routers are expected to lose
  config.search.population = 8  # of the genetic algorithm that fine-tunes it
  config.search.elite = 2
  config.train.input_gradient = False
  config.train.steps = 8
  config.train.warmup = 2
  config.train.validate_every = 8
  config.train.checkpoint_every = 8
  config.finetune.generations = 2
  config.evaluation.perplexity_windows = 4
  config.evaluation.redundancy_prompts = 16
  return config
