"""SmolLM2-135M on chat-formatted instructions, with a late plan instead of a search.

  ftp-jax run --config=smollm2_135m_late --workdir=runs/smollm2_135m_late

Blocks 0 to 12 are dense. What enters block 13 decides all gates from there on, a router a block, in the Fisher schedule
(docs/recipe.md says why; the allotted one, which is better with maps, loses without them at S = 0.40). `data.path` as
in smollm2_135m.py.

Wall time: about 50 minutes on 2 CPU cores (AMD EPYC) by its parts: 5 for the gate scores and 5 for each of nine cells.
Result: KL to dense 0.025 / 0.064 / 0.158 nats a token (+- 0.001, 0.004 and 0.006 over seeds), below
every baseline without maps in docs/results.md at equal measured prefill time.
"""

from ftp_jax.config import get_config as get_default_config
from ftp_jax.config import late_preset, small_preset


def get_config():
  config = late_preset(small_preset(get_default_config()))
  config.search.schedule = "fisher"
  return config
