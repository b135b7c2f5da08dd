"""How a command starts: its config (by name or path, or the run directory's own, with overrides) and its processes.

Scripts of experiments/ start by `script`.

The run configs of `experiments/configs` are installed as `ftp_jax/experiments/configs`, so that
their names work from any directory.
"""

import argparse
import difflib
import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import app, flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from ftp_jax.config import get_config
from ftp_jax.distributed import Launch
from ftp_jax.errors import UserError, brief, check_target, of_disk

DEFAULT = "quickstart"


def add_process_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that say how the processes of a run find each other."""
  group = parser.add_argument_group("several hosts")
  group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0 and a port free there")
  group.add_argument("--num-processes", type=int, metavar="N", help="how many processes start this command")
  group.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
  group.add_argument(
      "--distributed", default="auto", metavar="MODE", help="without these: auto (SLURM, Open MPI or TPU pod, if there "
      "are several processes), on (whatever jax can find) or off (default: auto)",
  )
  for name, default, what in (
      ("peer-timeout", Launch.peer_timeout, "of silence after which another process counts as lost and the run ends"),
      ("start-timeout", Launch.start_timeout, "to wait for all processes at the start"),
  ):
    group.add_argument(f"--{name}", type=int, default=default, metavar="S", help=f"seconds {what} (default: {default})")


def processes(arguments: argparse.Namespace) -> Launch:
  """What the flags say; a command without them runs alone. Raises UserError if they contradict each other."""
  if "distributed" not in arguments:
    return Launch(mode="off")
  return Launch(
      arguments.coordinator, arguments.num_processes, arguments.process_id, arguments.distributed,
      arguments.peer_timeout, arguments.start_timeout,
  )


def config_names() -> list[str]:
  """Names of the run configs that came with the project."""
  return sorted(path.stem for path in _directory().glob("*.py"))


def _directory() -> pathlib.Path:
  package = pathlib.Path(__file__).parent
  installed = package / "experiments" / "configs"
  return installed if installed.is_dir() else package.parent / "experiments" / "configs"


def load_config(name: str | None, workdir: str | None, overrides: Sequence[str]) -> tuple[ConfigDict, str]:
  """The locked config of a run and its directory.

  Args:
    name: name of a run config or path of a Python file with `get_config()`; None: what
      `workdir/config.json` holds, or else DEFAULT.
    workdir: the run directory; None: runs/<name of the config>.
    overrides: arguments `--config.section.key=value`.

  Raises:
    UserError: there is no such config, it does not load, or an override names no key or has a wrong value.
  """
  directory = workdir or f"runs/{pathlib.Path(name or DEFAULT).stem}"
  saved = pathlib.Path(directory) / "config.json"
  config = _read_saved(saved) if name is None and saved.is_file() else _read_file(name or DEFAULT)
  config.lock()
  return _override(config, overrides), directory


def _read_file(name: str) -> ConfigDict:
  path = pathlib.Path(name)
  if not path.is_file():
    path = _directory() / f"{name}.py"
    if name not in config_names():
      raise UserError(f"there is no config {name!r}; pass a file or one of {', '.join(config_names())}.")
  try:
    spec = importlib.util.spec_from_file_location("ftp_jax_run_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
  except Exception as error:  # a config is a program: it can fail in any way
    reason = _brief(error)
    raise UserError(f"config {path} does not load ({type(error).__name__}: {reason}); mend the file.") from error
  if not isinstance(config, ConfigDict):
    raise UserError(f"get_config() of {path} gives a {type(config).__name__}; return ftp_jax.config.get_config().")
  return config


def run_config(directory: pathlib.Path) -> ConfigDict:
  """The config of a run; UserError where the directory holds none."""
  path = directory / "config.json"
  if not path.is_file():
    raise UserError(f"{directory} holds no config.json; name the directory of a run.")
  return _read_saved(path, "name the directory of another run")


def _read_saved(path: pathlib.Path, advice: str = "name one with --config") -> ConfigDict:
  """The base config with the values that a run directory holds."""
  config = get_config()
  try:
    _fill(config, json.loads(path.read_text(encoding="utf-8")))
  except (ValueError, TypeError, AttributeError, KeyError) as error:
    reason = _brief(error)
    raise UserError(f"{path} is not a config of this version ({reason}); {advice}.") from error
  return config


def _brief(error: Exception) -> str:
  """The message in one line, without the dump of all keys that ml_collections adds."""
  return " ".join(str(error).partition(" Other fields present:")[0].split())[:160]


def _fill(config: ConfigDict, values: dict) -> None:
  for key, value in values.items():
    if isinstance(value, dict):
      _fill(config[key], value)
    else:
      config[key] = tuple(value) if isinstance(value, list) else value


def _override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
  known = set(keys(config))
  for argument in overrides:
    key = argument.partition("=")[0].lstrip("-").removeprefix("config.")  # absl takes a single dash as well
    if argument.lstrip("-").startswith("config.") and key not in known:
      close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
      hint = f"did you mean {close[0]!r}?" if close else "ftp_jax/config.py lists all keys."
      raise UserError(f"the config has no key {key!r}; {hint}")
  argv = ["ftp-jax", *overrides]
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
  try:
    stray = values(argv)[1:]
  except flags.UnrecognizedFlagError as error:
    raise UserError(f"there is no option --{error.flagname}; see --help.") from error
  except flags.Error as error:
    reason = brief(error, None)
    raise UserError(f"{reason}; give --config.section.key=value with a value of its type.") from error
  if stray:
    raise UserError(f"the argument {stray[0]!r} is not understood; overrides read --config.section.key=value.")
  return values.config


def script(main: Callable[[], None]) -> None:
  """Runs a script of experiments/ with absl's flags; a user's mistake, or a disk's, ends it in one sentence.

  A flag --json is looked at first: it names a file that is written at the end.
  """

  def checked(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      raise app.UsageError(f"The argument {argv[1]!r} is not understood.")
    target = getattr(flags.FLAGS, "json", None)
    if target:
      check_target(pathlib.Path(target))
    main()

  name = pathlib.Path(sys.argv[0]).stem
  try:
    app.run(checked)
  except UserError as error:
    sys.exit(f"{name}: {error}")
  except OSError as error:
    if error.errno is None:  # of a library, about something else
      raise
    sys.exit(f"{name}: {of_disk(error)}")


def keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
  """All keys of a config as `section.key`."""
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      yield from keys(value, f"{prefix}{key}.")
    else:
      yield prefix + key
