"""smollm2_135m_late with four times the training prompts and steps.

  ftp-jax run --config=smollm2_135m_late_more --workdir=runs/smollm2_135m_late_more

Test prompts are those of smollm2_135m_late.py. As 32 to 64 context tokens are rare in the 5,000 instructions, three
quarters of the training prompts are shorter; and 64 prompts choose among the routers, as 24 are too few for it.

Wall time: on 2 CPU cores (AMD EPYC) about 21 minutes for the gate scores and 15 for each of nine cells.
Result: KL to dense 0.019 / 0.138 nats a token at S = 0.22 / 0.40 (seed 0), where that seed of smollm2_135m_late.py,
made anew on a machine of the same kind, has 0.025 / 0.173; at 0.30 0.060 +- 0.005 over three seeds, as without.
"""

from ftp_jax.config import get_config as get_default_config
from ftp_jax.config import late_preset, small_preset


def get_config():
  config = late_preset(small_preset(get_default_config()))
  config.search.schedule = "fisher"
  config.data.train_min_context = 16
  config.data.num_train = 2560
  config.data.num_validation = 64
  config.train.steps = 256
  config.train.warmup = 16
  config.train.validate_every = 32
  config.train.checkpoint_every = 32
  return config
