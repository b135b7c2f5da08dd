"""The paper's recipe on SmolLM2-135M: evict, argmax, four factors, static guide, GA from a uniform schedule.

  ftp-jax run --config=paper_smollm2_135m --workdir=runs/paper_smollm2_135m

Data as in smollm2_135m.py; one seed, S = 0.30.

Wall time: not measured yet.
Result: not measured yet.
"""

from ftp_jax.config import get_config as get_default_config
from ftp_jax.config import paper_preset


def get_config():
  config = paper_preset(get_default_config())
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
  config.train.steps = 128
  config.train.validate_every = 32
  config.train.checkpoint_every = 32
  config.finetune.generations = 4
  config.evaluation.perplexity_path = "../shared/data/wikitext2_valid.txt"
  config.evaluation.perplexity_windows = 4
  config.evaluation.redundancy_prompts = 50
  return config
