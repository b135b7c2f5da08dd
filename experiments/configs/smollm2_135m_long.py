"""SmolLM2-135M on chats about long texts (500 context tokens): nested routes under `evict`; one seed, S = 0.30.

  python experiments/long_chats.py --documents=documents.jsonl --tokens=480 --answer=24 --count=128 \
    --out=long_train.jsonl
  ftp-jax run --config=smollm2_135m_long --workdir=runs/smollm2_135m_long

`documents.jsonl` holds long texts, as many of at least 480 tokens as there are chats: then no two sets have chats about
the same text. docs/recipe.md says why routes are nested here and not in smollm2_135m.py.

Wall time: about 25 minutes on 2 CPU cores (AMD EPYC), the chats' 4 minutes not included.
Result: KL to dense 0.051 nats a token with the dynamic router, 0.234 with the static one, 0.170 for truncation.
"""

from ftp_jax.config import get_config as get_default_config
from ftp_jax.config import small_preset


def get_config():
  config = small_preset(get_default_config())
  config.data.path = "long_train.jsonl"
  config.data.min_context = 256
  config.data.max_context = 512
  config.data.num_search = 8
  config.data.num_train = 72
  config.data.num_validation = 12
  config.data.num_test = 32
  config.routing.kv_mode = "evict"
  config.routing.one_pass_block = 2  # one ranking of the tokens for all blocks from there on
  config.router.kind = "global"
  config.router.factors = ("position", "score", "rank")  # none that differs from block to block
  config.search.schedule = "fisher"
  config.search.batch = config.train.batch = config.evaluation.batch = 4
  config.train.warmup_guide_prompts = 72
  config.train.warmup_guide_steps = 200
  config.train.input_gradient = False
  config.train.steps = 16
  config.train.warmup = 2
  config.train.validate_every = 4
  config.train.checkpoint_every = 4
  config.evaluation.redundancy_prompts = 16
  return config
