"""SmolLM2-135M on chat-formatted instructions: a late plan, an allotted schedule, maps for skipped blocks.

  ftp-jax run --config=smollm2_135m_stand_in --workdir=runs/smollm2_135m_stand_in

Blocks 0 to 12 are dense. What enters block 13 decides all gates from there on, a router a block, in the schedule in
which such routers are expected to lose least; errors that cost more count more (docs/method.md, section 3). A context
token that skips a block is moved by a map of rank 64, fitted in closed form and then trained with the router
(section 4). Of 880 training prompts 640 are chats and 240 say a passage twice, so that routers learn what of a text is
needed again (section 3). Those are of `data.repeats_path`, a text of which nothing is evaluated: the first 1,000,000
bytes of WikiText-2's training text without blank lines. In prompts of 128 tokens or more, longer than any that is
trained on, the last 32 take slots first. `data.path` as in smollm2_135m.py.

Wall time: about 110 minutes on 2 CPU cores (AMD EPYC without AVX-512; with it chats alone took a third of that): 14 for
gate scores and maps, 10 to 11 for each of nine cells, evaluation included.
Result: KL to dense 0.0024 / 0.0082 / 0.033 nats a token at S = 0.22 / 0.30 / 0.40 (+- 0.0000, 0.0003 and 0.001 over
seeds); on chats alone (--config.data.num_repeats=0 --config.train.steps=64) 0.0019 / 0.0073 / 0.027, but then numbers
and names that a prompt states are lost; that with all errors alike (--config.train.guide_stakes=0) 0.0025 / 0.0076 /
0.031, and in the Fisher schedule (--config.search.schedule=fisher) 0.003 / 0.010 / 0.046.
"""

from ftp_jax.config import get_config as get_default_config
from ftp_jax.config import late_preset, small_preset, stand_in_preset


def get_config():
  config = stand_in_preset(late_preset(small_preset(get_default_config())))
  config.data.num_repeats = 240
  config.data.repeats_path = "wikitext2_train.txt"
  config.train.warmup_guide_prompts = 880
  config.train.steps = 88  # of 8 prompts: as many chats as 64 of late_preset, beside the passages
  config.routing.recent_tokens = 32
  return config
