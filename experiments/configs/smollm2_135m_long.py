"""SmolLM2-135M on chats about long texts (500 context tokens): nested routes from block 17 on, S = 0.30, three seeds.

  python experiments/long_chats.py --documents=speeches_and_books.jsonl,wikitext2_train.txt --tokens=480 --answer=24 \
    --count=320 --out=long_train.jsonl
  ftp-jax run --config=smollm2_135m_long --workdir=runs/smollm2_135m_long

The files hold long texts, some two hundred of at least 480 tokens. docs/recipe.md says why routes are nested here and
not in smollm2_135m.py, why they begin so late, and why eviction begins later still.

Wall time: about 45 minutes, the sum of its stages, on 2 CPU cores (AMD EPYC), 17 of them for the gate scores; 6 for
the chats.
Result: KL to dense 0.067 +- 0.004 nats a token with the dynamic router, 0.272 with a static one, 0.311 for truncation.
"""

from ftp_jax.config import get_config as get_default_config
from ftp_jax.config import long_chats_preset, small_preset


def get_config():
  config = long_chats_preset(small_preset(get_default_config()))
  config.seeds = (0, 1, 2)
  config.routing.kv_mode = "evict"
  config.routing.evict_from = 23  # blocks 17 to 22 still see what they skip, later ones do not
  config.routing.one_pass_block = 17  # one ranking of the tokens for all blocks from there on; those before are dense
  config.router.kind = "global"
  config.router.factors = ("position", "score", "rank")  # none that differs from block to block
  config.search.schedule = "fisher"
  config.train.warmup_guide_steps = 1500
  config.train.input_gradient = False
  config.train.validate_every = 4
  config.train.checkpoint_every = 4
  config.finetune.rounds = 0  # generations take minutes here, and the Fisher schedule is made for what routers learn
  return config
