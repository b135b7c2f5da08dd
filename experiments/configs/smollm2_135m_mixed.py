"""SmolLM2-135M on chats, plain questions and running text: a late plan and maps, in the allotted schedule.

  python experiments/mixed_prompts.py --prompts=alpaca_5000.jsonl --documents=wikitext2_train.txt \
    --test_documents=wikitext2_valid.txt --out=mixed
  ftp-jax run --config=smollm2_135m_mixed --workdir=runs/smollm2_135m_mixed

Wall time: as smollm2_135m_stand_in.py, which has the same sizes; half a minute for the prompts.
Result: KL to dense on 48 test prompts of the mix 0.005 / 0.017 +- 0.002 / 0.053 nats a token at S = 0.22 / 0.30 / 0.40
(seed 0, at 0.30 three), 0.397 for truncation at 0.30. In the Fisher schedule 0.008 / 0.026 / 0.060, there without maps
0.029 / 0.073 / 0.196.
"""

from ftp_jax.config import get_config as get_default_config
from ftp_jax.config import late_preset, small_preset, stand_in_preset


def get_config():
  config = stand_in_preset(late_preset(small_preset(get_default_config())))
  config.train.guide_stakes = 0.0  # 0.5 was tried at S = 0.30 alone (docs/recipe.md)
  config.data.path = "mixed/train.jsonl"
  config.data.num_test = 48
  return config
