"""SmolLM2-135M on chat-formatted instructions whose early tokens matter: 3 seeds, S = 0.22, 0.30 and 0.40.

  ftp-jax run --config=smollm2_135m --workdir=runs/smollm2_135m

`data.path` is a JSONL file of {instruction, input, output}, here the 5,000 examples of the early Alpaca
release; name your own with --config.data.path=FILE. Relative paths start at the working directory.

Wall time: not measured yet.
Result: not measured yet; docs/results.md will hold it.
"""

from ftp_jax.config import get_config as get_default_config


def get_config():
  config = get_default_config()
  config.seeds = (0, 1, 2)
  config.sparsities = (0.22, 0.30, 0.40)
  config.data.source = "prompts"
  config.data.path = "../shared/data/alpaca_5000.jsonl"
  config.data.chat = True
  config.data.max_context = 64
  config.data.continuation = 16
  config.data.num_search = 16
  config.data.num_train = 192
  config.data.num_validation = 24
  config.data.num_test = 64
  config.search.population = 10
  config.search.elite = 2
  config.search.generations = 5
  config.train.steps = 16
  config.train.warmup = 2
  config.train.validate_every = 8
  config.train.checkpoint_every = 8
  config.finetune.generations = 4
  config.evaluation.perplexity_path = "../shared/data/wikitext2_valid.txt"
  config.evaluation.perplexity_windows = 4
  config.evaluation.redundancy_prompts = 50
  return config
