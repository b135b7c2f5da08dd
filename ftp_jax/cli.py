"""The console command `ftp-jax`: names for the stages of the pipeline, no logic of its own.

Heavy imports stand in the commands that need them, so that help and mistakes answer at once.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from ftp_jax import launch
from ftp_jax.errors import UserError

_OVERRIDES = """\
Every key of the config can be set: --config.train.steps=20 --config.sparsities="(0.3, 0.4)".
Finished stages are not repeated; delete a stage's folder to have it run again."""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command; returns the exit status: 2 for a user's mistake, 130 for Ctrl-C."""
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it warns that torch, which we do not use, is missing
  parser = _parser()
  arguments, rest = parser.parse_known_args(argv)
  try:
    arguments.command(arguments, rest)
  except UserError as error:
    print(f"ftp-jax: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  except OSError as error:  # a full or read-only disk, a path that is no directory
    print(f"ftp-jax: {error.filename or 'a file'}: {error.strerror or error}; free space or choose another --workdir.",
          file=sys.stderr)  # fmt: skip
    return 2
  except RuntimeError as error:  # jax reports memory by the text of its error alone
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    print("ftp-jax: the device is out of memory; lower train.batch, search.batch or evaluation.batch, or set "
          "model.remat=full.", file=sys.stderr)  # fmt: skip
    return 2
  except KeyboardInterrupt:
    print("\nftp-jax: stopped; the same command goes on from the last saved state.", file=sys.stderr)
    return 130
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      "ftp-jax", description="Token-wise pruning (FTP) of frozen LLMs: each token skips the blocks it does not need.",
      allow_abbrev=False,
  )  # fmt: skip
  commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

  def add(name: str, summary: str, command, epilog: str | None = None) -> argparse.ArgumentParser:
    added = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=epilog, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    added.set_defaults(command=command, name=name)
    return added

  fetch = add("fetch", "download a model that is known by name, once, and print its directory", _fetch)
  fetch.add_argument("model", help="name of the model, for instance smollm2-135m")
  fetch.add_argument("--out", metavar="DIR", help="where to keep it (default: $FTP_JAX_CACHE or ~/.cache/ftp_jax)")
  for name, summary in (
      ("run", "run the whole pipeline and report"),
      ("search", "search the sparsity schedules; runs missing earlier stages first"),
      ("train", "train the routers; runs missing earlier stages first"),
      ("finetune", "fine-tune the schedules; runs missing earlier stages first"),
      ("evaluate", "evaluate all methods on held prompts; runs missing earlier stages first"),
      ("report", "write tables, plots and report.html of an evaluated run"),
  ):
    stage = add(name, summary, _stages, _OVERRIDES)
    stage.add_argument(
        "--config", metavar="NAME|FILE", help=f"run config, a file or one of {', '.join(launch.config_names())} "
        "(default: the config of the run directory, or else quickstart)",
    )  # fmt: skip
    stage.add_argument("--workdir", metavar="DIR", help="run directory (default: runs/<name of the config>)")
    if name in ("run", "evaluate"):
      stage.add_argument("--json", metavar="FILE", help="also write machine, config, records and table to this file")
  return parser


def _fetch(arguments: argparse.Namespace, rest: list[str]) -> None:
  from ftp_jax.models.fetch import fetch

  if rest:
    raise UserError(f"the argument {rest[0]!r} is not understood; see ftp-jax fetch --help.")
  print(fetch(arguments.model, arguments.out))


def _stages(arguments: argparse.Namespace, rest: list[str]) -> None:
  config, workdir = launch.load_config(arguments.config, arguments.workdir, rest)
  target = pathlib.Path(arguments.json) if "json" in arguments and arguments.json else None
  if target and not target.absolute().parent.is_dir():  # known now, not after an hour
    raise UserError(f"--json={target} lies in no existing directory; create {target.parent} first.")

  from ftp_jax import pipeline

  stages = pipeline.STAGES
  if arguments.name == "report":
    stages = ("report",)
  elif arguments.name != "run":
    stages = stages[: stages.index(arguments.name) + 1]
  pipeline.run(config, workdir, stages)

  from ftp_jax import report
  from ftp_jax.report import tables

  if arguments.name == "evaluate":
    print(tables.format_table(report.results(workdir, config)["aggregated"]))
  if target:
    target.write_text(json.dumps(report.results(workdir, config), indent=2), encoding="utf-8")


if __name__ == "__main__":
  sys.exit(main())
