"""Runs the whole pipeline; the same as `ftp-jax run`.

  python experiments/run.py --config=experiments/configs/quickstart.py --workdir=runs/quickstart
  python experiments/run.py --config=quickstart --workdir=runs/short --config.train.steps=20
"""

import sys

from ftp_jax import cli

if __name__ == "__main__":
  sys.exit(cli.main(["run", *sys.argv[1:]]))
