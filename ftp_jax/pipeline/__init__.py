"""search -> train -> fine-tune -> evaluate over one run directory, each stage resumable."""

from ftp_jax.pipeline.run import STAGES, run

__all__ = ["STAGES", "run"]
