"""SmolLM2-135M on chat-formatted instructions whose early tokens matter: 3 seeds, S = 0.22, 0.30 and 0.40.

  ftp-jax run --config=smollm2_135m --workdir=runs/smollm2_135m

`data.path` is a JSONL file of {instruction, input, output}, here the 5,000 examples of the early Alpaca
release; name your own with --config.data.path=FILE. Relative paths start at the working directory.

Wall time: about 70 minutes on 2 CPU cores (AMD EPYC).
Result: KL to dense 0.027 / 0.059 / 0.132 nats a token with the fine-tuned dynamic router, 0.060 / 0.142 / 0.235
with the static one, 0.278 / 0.364 / 0.540 for truncation; docs/results.md has the table.
"""

from ftp_jax.config import get_config as get_default_config
from ftp_jax.config import small_preset


def get_config():
  config = small_preset(get_default_config())
  config.seeds = (0, 1, 2)
  config.sparsities = (0.22, 0.30, 0.40)
  return config
