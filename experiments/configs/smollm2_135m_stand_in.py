"""SmolLM2-135M on chat-formatted instructions: a late plan, an allotted schedule, maps for skipped blocks.

  ftp-jax run --config=smollm2_135m_stand_in --workdir=runs/smollm2_135m_stand_in

Blocks 0 to 12 are dense. What enters block 13 decides all gates from there on, a router a block, in the schedule in
which such routers are expected to lose least; errors that cost more count more (docs/method.md, section 3). A context
token that skips a block is moved by a map of rank 64, fitted in closed form and then trained with the router
(section 4). Gate scores of digits are raised (section 2), and in prompts of 128 tokens or more, longer than any that is
trained on, the last 32 take slots first: without the two, digits and questions are lost (docs/recipe.md). Prompts in
which no digit stands need --config.train.raised_tokens= (empty). `data.path` as in smollm2_135m.py.

Wall time: about 30 minutes on 2 CPU cores (AMD EPYC) by its parts: 3 for gate scores and maps, 2 to 3 for each of nine
cells, 3 for the evaluation.
Result: KL to dense 0.0022 / 0.0075 / 0.029 nats a token at S = 0.22 / 0.30 / 0.40 (+- 0.0002, 0.0006 and 0.0007 over
seeds); without raised scores 0.0019 / 0.0073 / 0.027, then with all errors alike (--config.train.guide_stakes=0)
0.0025 / 0.0076 / 0.031, and that in the Fisher schedule (--config.search.schedule=fisher) 0.003 / 0.010 / 0.046.
"""

from ftp_jax.config import get_config as get_default_config
from ftp_jax.config import late_preset, small_preset, stand_in_preset


def get_config():
  config = stand_in_preset(late_preset(small_preset(get_default_config())))
  config.train.raised_tokens = "[0-9]"
  config.routing.recent_tokens = 32
  return config
