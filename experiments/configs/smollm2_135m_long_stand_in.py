"""SmolLM2-135M on chats about long texts (500 context tokens) with maps as in smollm2_135m_stand_in.py, S = 0.30.

  python experiments/long_chats.py --documents=speeches_and_books.jsonl,wikitext2_train.txt --tokens=480 --answer=24 \
    --count=320 --out=long_train.jsonl
  ftp-jax run --config=smollm2_135m_long_stand_in --workdir=runs/smollm2_135m_long_stand_in

A token that skips keeps its key and value throughout and is moved by a map; smollm2_135m_long.py lets it leave the
cache from block 23 on, which is smaller and faster, but further from the dense model. The plan is made at block 18, not
at 13 as that of short chats, and chosen on the validation chats; there the allotted schedule has no less KL than the
Fisher one after the warm-up.

Wall time: 5 minutes for the maps, 28 for the gate scores, 19 for the router of each seed, 6 for the chats, on 2 CPU
cores (AMD EPYC); the evaluation of all methods, some minutes more, was not timed.
Result: KL to dense 0.010 +- 0.001 nats a token over three seeds, where smollm2_135m_long.py has 0.067 +- 0.004, and a
plan at block 13 0.024 (seed 0).
"""

from ftp_jax.config import get_config as get_default_config
from ftp_jax.config import late_preset, long_chats_preset, small_preset, stand_in_preset


def get_config():
  config = stand_in_preset(long_chats_preset(late_preset(small_preset(get_default_config()))))
  config.sparsities = (0.30,)
  config.routing.one_pass_block = 18
  config.search.schedule = "fisher"
  config.train.guide_stakes = 0.0  # not tried on long chats
  config.train.validate_every = 8
  config.train.checkpoint_every = 8
  return config
