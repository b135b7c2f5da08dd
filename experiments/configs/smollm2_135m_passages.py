"""SmolLM2-135M on chats and on passages said twice, so that routers learn what of a text is needed again.

  ftp-jax run --config=smollm2_135m_passages --workdir=runs/smollm2_135m_passages

As smollm2_135m_stand_in.py, but no gate scores are raised: 240 further training prompts, of 880, say a passage twice
(docs/method.md, section 3). They are of `data.repeats_path`, a text of which nothing is evaluated: the first 1,000,000
bytes of WikiText-2's training text without blank lines. `data.path` as in smollm2_135m.py.

Wall time: as smollm2_135m_stand_in.py, but gate scores and maps take a third more, for 880 instead of 640 prompts.
Result: KL to dense 0.0027 / 0.0093 / 0.037 nats a token at S = 0.22 / 0.30 / 0.40 (64 test chats, seed 0); of 120
numbers of real texts 91 / 85 / 68 % are said again rightly, of names 85 / 84 / 80, of words 85 / 85 / 81
(docs/recipe.md).
"""

from ftp_jax.config import get_config as get_default_config
from ftp_jax.config import late_preset, small_preset, stand_in_preset


def get_config():
  config = stand_in_preset(late_preset(small_preset(get_default_config())))
  config.routing.recent_tokens = 32
  config.data.num_repeats = 240
  config.data.repeats_path = "wikitext2_train.txt"
  config.train.warmup_guide_prompts = 880
  return config
