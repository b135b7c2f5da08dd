"""The console command `ftp-jax`: names for the stages of the pipeline, no logic of its own.

Heavy imports stand in the commands that need them, so that help and mistakes answer at once.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from ftp_jax import distributed, launch
from ftp_jax.errors import UserError, brief, check_target, of_disk, out_of_memory
from ftp_jax.files import replacing

_OVERRIDES = """\
Every key of the config can be set: --config.train.steps=20 --config.sparsities="(0.3, 0.4)".
Finished stages are not repeated; delete a stage's folder and those of later stages to have them run again.
Several hosts: start the same command on each. SLURM, Open MPI and TPU pods are recognised; elsewhere give
--coordinator=HOST:PORT --num-processes=N --process-id=I. The run directory must be one that all hosts share.
Exit status: 0 done, 2 a mistake to mend, 75 another process was lost, 130 Ctrl-C, 143 SIGTERM (saved; go on later)."""
_BENCHES = """\
prefill    time to first token: dense, torch_dense (transformers) and ftp, in turns
decode     tokens a second and size of the KV cache
overhead   what routing costs by itself: nothing skipped, decisions, gathering and scattering
compile    compile time and memory against the number of buckets
crossover  the context from which on --artifact is faster than dense, written into the artifact"""

_CHECK = """\
Needs libtpu (in the checkout pip install '.[tpu-check]'). The exit status is 0 if the program fits, 1 if not, 2 for a
mistake.
JAX_OPTIMIZATION_LEVEL=O0 compiles in a third of the time, with other memory."""

_TASKS = """\
tasks:
  arc_easy, arc_challenge, hellaswag, winogrande, mmlu   from DIR/NAME.jsonl of --data
  FILE.jsonl   items in the format of one of these, {"context", "target"}, or {"text"}
  FILE.txt     a text, for its perplexity
  retrieval    a number stated early in a long context and asked for at its end
  any other    a task of lm-eval's own, from the hub"""

_MODEL = "any model source (default: what the artifact was made for, or else smollm2-135m)"


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command; returns the exit status: 1 for what does not fit, 2 for a user's mistake, 130 for Ctrl-C, 143 for
  SIGTERM."""
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it warns that torch, which we do not use, is missing
  parser = _parser()
  arguments, rest = parser.parse_known_args(argv)
  saves = arguments.command is _stages or (arguments.command is _eval and arguments.json)
  try:
    if arguments.command is _stages:
      return _stages(arguments, rest)
    if rest:
      raise UserError(f"the argument {rest[0]!r} is not understood; see ftp-jax {arguments.name} --help.")
    return arguments.command(arguments) or 0
  except BaseException as error:
    ending = outcome(error, saves)
    if ending is None:
      raise
    print(f"{'' if ending[0] == 2 else chr(10)}ftp-jax: {ending[1]}", file=sys.stderr)
    return ending[0]


def outcome(error: BaseException, saves: bool = True) -> tuple[int, str] | None:
  """Exit status and sentence for what ended a command; None: a defect. `saves`: the command can go on."""
  saved = "; the same command goes on from the last saved state" if saves else ""
  if isinstance(error, UserError):
    return 2, brief(error, most=None)
  if isinstance(error, OSError):
    return 2, of_disk(error)
  if out_of_memory(error):
    return 2, ("there is not enough memory; set model.remat=full, or begin in another --workdir with a smaller "
               "train.batch, search.batch or evaluation.batch.")
  if isinstance(error, KeyboardInterrupt):
    return 130, f"stopped{saved}."
  if isinstance(error, distributed.Stopped):
    return distributed.STOPPED, f"stopped by SIGTERM{saved}."
  return None


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      "ftp-jax", description="Token-wise pruning (FTP) of frozen LLMs: each token skips the blocks it does not need.",
      allow_abbrev=False,
  )
  commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

  def add(name: str, summary: str, command, epilog: str | None = None) -> argparse.ArgumentParser:
    added = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=epilog, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    )
    stage.add_argument("--workdir", metavar="DIR", help="run directory (default: runs/<name of the config>)")
    if name != "report":
      launch.add_process_flags(stage)
    if name in ("run", "evaluate"):
      stage.add_argument("--json", metavar="FILE", help="also write machine, config, records and table to this file")
  export = add("export", "write an artifact for PyTorch, alone or with the weights of its base model", _export)
  export.add_argument("--artifact", metavar="DIR", required=True, help="artifact of a finished run")
  export.add_argument("--out", metavar="DIR", required=True, help="directory to write; new or empty")
  export.add_argument("--model", help="any model source, to compare and copy (default: what the artifact names)")
  export.add_argument("--with-weights", action="store_true", help="also copy the base model, unchanged")
  generate = add("generate", "continue prompts, dense or pruned by an artifact", _generate)
  generate.add_argument("--model", help=_MODEL)
  generate.add_argument("--artifact", metavar="DIR", help="what prunes the model (default: nothing does)")
  generate.add_argument("--prompt", metavar="TEXT", help="one prompt, printed as it is continued (default: stdin)")
  generate.add_argument(
      "--prompts", metavar="FILE", help='one prompt a line, or one JSON object with "prompt" a line',
  )
  generate.add_argument("--chat", action="store_true", help="put prompts into the model's chat template")
  for name, kind, default, summary in (
      ("max-new-tokens", int, 64, "most new tokens of a prompt"),
      ("temperature", float, 0.0, "of sampling; 0 takes the most likely token"),
      ("top-p", float, 1.0, "draw from the fewest most likely tokens with this probability"),
      ("seed", int, 0, "prompt i draws from seed + i"),
      ("batch", int, 8, "prompts that are run at once"),
      ("tensor", int, 1, "devices over which the model is split"),
      ("dtype", str, "float32", "float32 or bfloat16"),
      ("attention", str, "auto", "auto, xla, cudnn (NVIDIA) or splash (TPU)"),
      ("fallback", str, "auto", "compute densely: auto (prompts below the artifact's crossover), never or always"),
  ):
    metavar = {int: "N", float: "X", str: "NAME"}[kind]
    generate.add_argument(
        f"--{name}", type=kind, default=default, metavar=metavar, help=f"{summary} (default: {default})",
    )
  generate.add_argument("--stop", metavar="TEXT", action="append", default=[], help="ends the text; may be repeated")
  for name, summary in (
      ("decode-sparsity", "asked of new tokens; 0 computes them all"),
      ("decode-threshold", "new tokens skip above this probability"),
  ):
    generate.add_argument(f"--{name}", type=float, metavar="X", help=f"{summary} (default: the artifact's)")
  generate.add_argument("--json", metavar="FILE", help="also write the results to this file as JSON Lines")
  bench = add("bench", "measure time and memory of pruned inference on this machine", _bench, _BENCHES)
  bench.add_argument("kind", metavar="KIND", help="prefill, decode, overhead, compile or crossover")
  bench.add_argument("--model", help=_MODEL)
  for name, metavar, summary in (
      ("artifact", "DIR[,DIR]", "trained artifacts (numbered in this order) in place of built-in schedules"),
      ("baseline", "NAME|DIR[,..]", "prefill: also measure saved baselines, or truncation, random, static, late"),
      ("context", "N[,N]", "context lengths (default: 512,2048; crossover: 64 to 2048)"),
      ("batch", "N[,N]", "rows (default: 1)"),
      ("sparsity", "S[,S]", "mean sparsities of the built-in schedules (default: 0.3,0.5)"),
      ("shape", "NAME[,NAME]", "built-in schedules, middle or late (default: late)"),
      ("kv", "MODE[,MODE]", "evict or project (default: project)"),
      ("router", "NAME",
       "static (not in overhead); dynamic, an untrained one; factors, one like the paper's (default: the first)"),
      ("dtype", "NAME", "float32 or bfloat16 (default: float32)"),
      ("runs", "N", "measurements of each method; medians are compared (default: 5)"),
      ("steps", "N", "decode steps of a measurement (default: 32)"),
      ("text", "FILE", "contexts of this text, plain or JSON Lines of documents (default: random tokens)"),
      ("json", "FILE", "write machine and records to this file"),
      ("plot", "FILE", "draw prefill, decode or crossover into this .png (default: beside the JSON)"),
  ):
    bench.add_argument(f"--{name}", metavar=metavar, help=summary)
  bench.add_argument(
      "--torch", action=argparse.BooleanOptionalAction, default=True,
      help="also measure the dense model in transformers, where torch can be imported",
  )
  evaluate = add("eval", "run benchmarks: lm-eval's tasks, your own files, long-context retrieval", _eval, _TASKS)
  evaluate.add_argument("--tasks", metavar="NAME[,NAME]", help="what to run, see below")
  evaluate.add_argument("--model", help=_MODEL)
  for name, metavar, kind, default, summary in (
      ("artifact", "DIR", str, None, "what prunes the model (default: nothing does)"),
      ("data", "DIR", str, None, "directory with arc_easy.jsonl, ... (default: lm-eval's tasks, from the hub)"),
      ("limit", "N", int, None, "items of a task, drawn by the seed; of retrieval, of each cell (default: all; 20)"),
      ("seed", "N", int, 0, "which items, and what is drawn (default: 0)"),
      ("shots", "N", int, None, "examples before a question, mmlu and lm-eval's own tasks (default: the task's)"),
      ("lengths", "N[,N]", str, None, "tokens of retrieval contexts (default: 256,512,1024)"),
      ("depths", "X[,X]", str, None, "where the number stands, 0 to 1 (default: 0.1,0.5,0.9)"),
      ("batch", "N", int, 8, "contexts and continuations that are run at once (default: 8)"),
      ("max-length", "N", int, None, "most tokens of one pass (default: the model's positions)"),
      ("tensor", "N", int, 1, "devices over which the model is split (default: 1)"),
      ("dtype", "NAME", str, "float32", "float32 or bfloat16 (default: float32)"),
      ("attention", "NAME", str, "auto", "auto, xla, cudnn (NVIDIA) or splash (TPU) (default: auto)"),
      ("fallback", "NAME", str, "auto", "compute densely: auto (below the crossover), never or always (default: auto)"),
      ("decode-sparsity", "X", float, None, "asked of continuations and whole texts (default: the artifact's)"),
      ("decode-threshold", "X", float, None, "continuation tokens skip above it (default: the artifact's)"),
      ("json", "FILE", str, None, "keep results and a record an item; tasks that it holds are not run again"),
  ):
    evaluate.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=summary)
  check = add(
      "compile-check", "compile a program for a TPU topology, without a TPU, and say whether it fits", _check, _CHECK,
  )
  for name, metavar, kind, default, summary in (
      ("model", "NAME|DIR", str, "llama2-7b", "architecture or directory with a config.json (default: llama2-7b)"),
      ("topology", "NAME", str, "v5e:4x4", "for instance v5e:4x4, v5p:2x2x1, v6e:2x4 (default: v5e:4x4)"),
      ("program", "NAME", str, "train", "train, warmup, search, prefill or decode (default: train)"),
      ("batch", "N", int, 16, "rows, of all chips together (default: 16)"),
      ("context", "T", int, 2048, "positions of a row, scored ones included (default: 2048)"),
      ("scored", "C", int, 64, "scored positions of a row (default: 64)"),
      ("candidates", "N", int, 20, "search: schedules of one call (default: 20)"),
      ("mesh", "D,F,T", str, None, "sizes of data, fsdp and tensor (default: all chips on fsdp)"),
      ("dtype", "NAME", str, "bfloat16", "bfloat16 or float32 (default: bfloat16)"),
      ("remat", "NAME", str, "full", "train: none, dots or full (default: full)"),
      ("kv", "MODE", str, "project", "project or evict (default: project)"),
      ("sparsity", "S", float, 0.3, "prefill, decode: of the built-in schedule, 0 for the dense model (default: 0.3)"),
      ("shape", "NAME", str, "late", "prefill, decode: which blocks skip, late or middle (default: late)"),
      ("attention", "NAME", str, None, "splash or full (default: splash, where it can be had)"),
      ("stand-in", "R", int, 0, "rank of maps that stand in for skipped blocks (default: 0, none)"),
      ("json", "FILE", str, None, "write the record to this file"),
  ):
    check.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=summary)
  add("lm-eval", "print the file that, named in --tasks, makes the command lm_eval know the model ftp_jax", _lm_eval)
  return parser


def _fetch(arguments: argparse.Namespace) -> None:
  from ftp_jax.models.fetch import fetch

  print(fetch(arguments.model, arguments.out))


def _export(arguments: argparse.Namespace) -> None:
  from ftp_jax.export import pytorch

  print(pytorch.export(arguments.artifact, arguments.out, arguments.model, arguments.with_weights))


def _name_model(arguments: argparse.Namespace) -> None:
  """Where no --model is given it is the one that the artifact was made for."""
  from ftp_jax.export import artifact

  arguments.model = arguments.model or artifact.base_model(arguments.artifact)


def _generate(arguments: argparse.Namespace) -> None:
  from ftp_jax.inference import command

  _name_model(arguments)
  command.run(arguments)


def _bench(arguments: argparse.Namespace) -> None:
  from ftp_jax.bench import command

  command.run(arguments)


def _eval(arguments: argparse.Namespace) -> None:
  from ftp_jax.evaluation.harness import command

  _name_model(arguments)
  command.run(arguments)


def _check(arguments: argparse.Namespace) -> int:
  from ftp_jax.fit import command

  return command.run(arguments)


def _lm_eval(arguments: argparse.Namespace) -> None:
  from ftp_jax.evaluation.harness import command

  command.check_installed()
  print(command.PLUGIN)


def _stages(arguments: argparse.Namespace, overrides: list[str]) -> int:
  config, workdir = launch.load_config(arguments.config, arguments.workdir, overrides)
  target = pathlib.Path(arguments.json) if "json" in arguments and arguments.json else None
  with distributed.together(launch.processes(arguments), outcome):
    # Known now, not after an hour. The first process alone will write it, and all meet here, with the flag or without.
    distributed.on_first(lambda: check_target(target) if target else None)
    _run_stages(arguments.name, config, workdir, target)
  return 0


def _run_stages(name: str, config, workdir: str, target: pathlib.Path | None) -> None:
  from ftp_jax import pipeline

  stages = pipeline.STAGES
  if name == "report":
    stages = ("report",)
  elif name != "run":
    stages = stages[: stages.index(name) + 1]
  pipeline.run(config, workdir, stages)

  if not distributed.is_first() or not (name == "evaluate" or target):
    return

  from ftp_jax import report
  from ftp_jax.report import tables

  if name == "evaluate":
    print(tables.format_table(report.results(workdir, config)["aggregated"]))
  if target:
    with replacing(target) as file:
      file.write(json.dumps(report.results(workdir, config), indent=2).encode())


if __name__ == "__main__":
  sys.exit(main())
