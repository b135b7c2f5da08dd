"""`ftp-jax eval`: reads flags, runs tasks, prints the table and keeps the results file."""

import argparse
import importlib.metadata
import importlib.util
import logging
import pathlib
from typing import Any

from ftp_jax.errors import UserError, brief, check_target, short_of_memory
from ftp_jax.inference import Engine
from ftp_jax.machine import describe_machine
from ftp_jax.models.huggingface import fingerprint

PLUGIN = pathlib.Path(__file__).with_name("ftp_jax.yaml")


def check_installed() -> None:
  """Raises UserError where lm-eval is missing."""
  if importlib.util.find_spec("lm_eval") is None:
    raise UserError("lm-eval is not installed; run pip install '.[eval]' in the checkout.")


def run(arguments: argparse.Namespace) -> None:
  """Runs the command.

  Raises:
    UserError: a flag is wrong, or a file, the model, the artifact or the results file unusable.
  """
  check_installed()
  target = pathlib.Path(arguments.json) if arguments.json else None
  if target:
    check_target(target)
  if not arguments.artifact and (arguments.decode_sparsity, arguments.decode_threshold) != (None, None):
    raise UserError("--decode-sparsity and --decode-threshold change a router; name one with --artifact=DIR.")

  try:
    from ftp_jax.evaluation.harness import results, retrieval, suite
    from ftp_jax.evaluation.harness.adapter import EngineLM
  except ImportError as error:
    version = importlib.metadata.version("lm_eval")
    raise UserError(
        f"lm-eval {version} does not fit ({brief(error)}); run pip install '.[eval]' in the checkout for one that does."
    ) from error

  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  jobs = suite.plan(suite.Suite(
      tuple(filter(None, (arguments.tasks or "").split(","))), arguments.data, arguments.limit, arguments.seed,
      arguments.shots, _numbers("lengths", arguments.lengths, int) or retrieval.LENGTHS,
      _numbers("depths", arguments.depths, float) or retrieval.DEPTHS,
  ))
  with short_of_memory("set --dtype=bfloat16, or split the weights with --tensor"):
    engine = Engine.load(
        arguments.model, arguments.artifact, dtype=arguments.dtype, fallback=arguments.fallback,
        attention=arguments.attention, decode_sparsity=arguments.decode_sparsity,
        decode_threshold=arguments.decode_threshold, tensor=arguments.tensor,
    )
  lm = EngineLM(engine, batch_size=arguments.batch, max_length=arguments.max_length, seed=arguments.seed)
  with short_of_memory("lower --batch or --max-length, or set --dtype=bfloat16"):
    tasks = suite.run(lm, jobs, model_settings(lm, arguments), describe_machine(), target)
  print(results.format_table({job.name: tasks[job.name] for job in jobs}))
  if target:
    print(f"written {target}")


def model_settings(lm: Any, arguments: argparse.Namespace) -> dict[str, Any]:
  """What the results of every task depend on; the batch size is not part of it."""
  artifact = lm.engine.artifact
  return {
      "model": arguments.model,
      "fingerprint": fingerprint(lm.engine.model.directory),
      "artifact": artifact and artifact.digest,
      "decode_sparsity": arguments.decode_sparsity,
      "decode_threshold": arguments.decode_threshold,
      "dtype": arguments.dtype,
      "fallback": arguments.fallback if artifact else None,
      "crossover": lm.engine.crossover if arguments.fallback == "auto" else None,
      "attention": arguments.attention,
      "max_length": lm.max_length,
      "lm_eval": importlib.metadata.version("lm_eval"),
  }


def _numbers(name: str, text: str | None, kind: type) -> tuple[Any, ...] | None:
  """Comma-separated numbers of a flag; None where it was not given."""
  if text is None:
    return None
  try:
    return tuple(dict.fromkeys(kind(part) for part in text.split(",")))
  except ValueError:
    raise UserError(f"--{name}={text} must be numbers with commas between.") from None
