"""SmolLM2-135M on chats, plain questions and running text, with the late plan of smollm2_135m_late.py.

  python experiments/mixed_prompts.py --prompts=alpaca_5000.jsonl --documents=wikitext2_train.txt \\
    --test_documents=wikitext2_valid.txt --out=mixed
  ftp-jax run --config=smollm2_135m_mixed --workdir=runs/smollm2_135m_mixed

Wall time: TODO
Result: TODO
"""

from ftp_jax.config import get_config as get_default_config
from ftp_jax.config import late_preset, small_preset


def get_config():
  config = late_preset(small_preset(get_default_config()))
  config.data.path = "mixed/train.jsonl"
  config.data.num_test = 48
  return config
