"""Qwen2.5-Coder-0.5B-Instruct on chats, with plan and maps as smollm2_135m_stand_in.py.

  ftp-jax run --config=qwen2_5_coder_0_5b --workdir=runs/qwen2_5_coder_0_5b

No prompt says a passage twice, there are 64 steps, and no recent tokens. Nothing was chosen for this model: the plan is
made at block 10 of 24, about as deep as block 13 of 30. Its tokenizer writes chats in fewer tokens, so that contexts
begin at 28. `data.path` as in smollm2_135m.py; `model.source` may be a GGUF file, as in the run below.

Wall time: 33 minutes on 2 CPU cores (AMD EPYC) by its parts: 10 for gate scores and maps, 23 for three S.
Result: KL to dense 0.0034 / 0.0076 / 0.026 nats a token at S = 0.22 / 0.30 / 0.40 (seed 0; docs/results.md, A second
model), 0.444 / 0.609 / 0.991 for truncation.
"""

from ftp_jax.config import get_config as get_default_config
from ftp_jax.config import late_preset, small_preset, stand_in_preset


def get_config():
  config = stand_in_preset(late_preset(small_preset(get_default_config())))
  config.model.source = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
  config.routing.one_pass_block = 10
  config.data.min_context = 28
  config.seeds = (0,)
  return config
