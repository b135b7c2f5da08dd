"""The flags of `ftp-jax bench`, checked before anything is loaded or measured."""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from ftp_jax.errors import UserError, check_target
from ftp_jax.models.sources import DTYPES
from ftp_jax.routing.config import KV_MODES
from ftp_jax.search import schedule as schedules

KINDS = ("prefill", "decode", "overhead", "compile", "crossover")
PLOTTED = ("prefill", "decode", "crossover")
WITH_TORCH = ("prefill", "decode")
WITH_BASELINES = ("prefill",)
WITH_TEXT = ("prefill", "decode", "overhead")
SHAPES = ("middle", "late")
ROUTERS = ("static", "dynamic", "factors")
_CONTEXTS = (512, 2048)
_CROSSOVER_CONTEXTS = (64, 128, 256, 512, 1024, 2048)


@dataclasses.dataclass(frozen=True)
class Settings:
  """What to measure.

  Attributes:
    context, batch: sizes, ascending; every pair is measured.
    sparsity, shape, kv: of the built-in schedules; every triple is measured.
    router: of the built-in schedules: `static`, `dynamic` (untrained, of the default kind) or `factors` (untrained, the
      paper's: one for all blocks on the four factors).
    runs: measurements of each method.
    steps: decode steps of one measurement.
    text: file whose text the contexts are; empty: random tokens.
    artifact: directories; they replace the built-in schedules.
    baseline: directories of saved baselines, or names of those that need no calibration, at every sparsity.
    torch: also measure transformers on torch.
    json, plot: files to write.
  """

  kind: str
  model: str | None  # None: that of the first artifact
  context: tuple[int, ...]
  batch: tuple[int, ...]
  sparsity: tuple[float, ...]
  shape: tuple[str, ...]
  kv: tuple[str, ...]
  router: str
  runs: int
  steps: int
  text: str
  dtype: str
  artifact: tuple[str, ...]
  baseline: tuple[str, ...]
  torch: bool
  json: pathlib.Path | None
  plot: pathlib.Path | None

  def check_positions(self, most: int) -> None:
    """UserError unless every context, with the tokens decoded after it, fits into `most` positions."""
    more = self.steps if self.kind == "decode" else 0
    if self.context[-1] + more > most:
      added = f" and {more} decode steps" if more else ""
      raise UserError(
          f"--context={self.context[-1]}{added} exceed the model's {most} positions; choose at most "
          f"--context={most - more}."
      )


def read(arguments: argparse.Namespace) -> Settings:
  """The settings that the flags ask for; flags are strings, None where they were not given.

  Raises:
    UserError: a flag has no meaning, or a file could not be written afterwards.
  """
  kind = _one_of(arguments.kind, "bench", KINDS)
  ours = ("shape", "kv", "router") if arguments.baseline else ("sparsity", "shape", "kv", "router")
  given = [name for name in ours if getattr(arguments, name) is not None]
  if arguments.artifact and given:
    print(f"--{given[0]} is not used: the artifact brings its schedule, its router and its kv mode.")
  if kind == "crossover" and not arguments.artifact:
    raise UserError("bench crossover measures an artifact; name its directory with --artifact=DIR.")
  if kind == "overhead" and arguments.router == "static":
    raise UserError("bench overhead measures what decides, and a static router decides nothing; use --router=dynamic.")
  if arguments.artifact == "":
    raise UserError("--artifact= has an empty name; give its directory, or leave it out for a built-in schedule.")
  artifact = tuple(dict.fromkeys(arguments.artifact.split(","))) if arguments.artifact else ()
  if kind == "crossover" and len(artifact) > 1:
    raise UserError("bench crossover writes into one artifact; give a single --artifact=DIR.")
  value = lambda name, default: default if getattr(arguments, name) is None else getattr(arguments, name)
  contexts = _CROSSOVER_CONTEXTS if kind == "crossover" else _CONTEXTS
  batch = _numbers("batch", value("batch", "1"), int, 1)
  if kind == "crossover" and len(batch) > 1:
    raise UserError("an artifact has one crossover; give bench crossover a single --batch.")
  sparsity = _numbers("sparsity", value("sparsity", "0.3,0.5"), float, 0)
  if sparsity[-1] > schedules.MAX_SPARSITY:
    raise UserError(
        f"--sparsity={sparsity[-1]:g} is out of reach; choose one between 0 and {schedules.MAX_SPARSITY}, the most "
        "that a block skips here."
    )
  if arguments.text and kind not in WITH_TEXT:
    raise UserError(f"bench {kind} reads no text; leave out --text.")
  if arguments.text == "":
    raise UserError("--text= has an empty name; give a file, or leave it out for random tokens.")
  if arguments.text and not pathlib.Path(arguments.text).is_file():
    raise UserError(f"--text={arguments.text} is no file; name a text, or leave it out for random tokens.")
  if arguments.baseline and kind not in WITH_BASELINES:
    raise UserError(f"bench {kind} measures no baselines; use --baseline with bench prefill.")
  json = pathlib.Path(arguments.json) if arguments.json else None
  plot = pathlib.Path(arguments.plot) if arguments.plot else None
  if plot and kind not in PLOTTED:
    raise UserError(f"bench {kind} draws no plot; leave out --plot.")
  if plot and plot.suffix != ".png":
    raise UserError(f"--plot={plot} must end in .png.")
  if json and json.suffix == ".png":
    raise UserError(f"--json={json} would be taken for a plot; let it end in .json.")
  for name, path in (("json", json), ("plot", plot)):
    if path:
      check_target(path, name)
  if json and not plot and kind in PLOTTED:
    plot = json.with_suffix(".png")
  return Settings(
      kind=kind,
      model=arguments.model,
      context=_numbers("context", value("context", ",".join(map(str, contexts))), int, 1),
      batch=batch,
      sparsity=sparsity,
      shape=_names("shape", value("shape", "late"), SHAPES),
      kv=_names("kv", value("kv", "project"), KV_MODES),
      router=_one_of(value("router", "dynamic" if kind == "overhead" else "static"), "--router", ROUTERS),
      runs=_number("runs", value("runs", "5")),
      steps=_number("steps", value("steps", "32")),
      text=value("text", ""),
      dtype=_one_of(value("dtype", "float32"), "--dtype", tuple(DTYPES)),
      artifact=artifact,
      baseline=tuple(dict.fromkeys(arguments.baseline.split(","))) if arguments.baseline else (),
      torch=arguments.torch and kind in WITH_TORCH,
      json=json,
      plot=plot,
  )


def _one_of(value: str, flag: str, known: Sequence[str]) -> str:
  if value not in known:
    raise UserError(f"{flag} {value!r} is unknown; choose one of {', '.join(known)}.")
  return value


def _names(flag: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
  return tuple(dict.fromkeys(_one_of(name, f"--{flag}", known) for name in text.split(",")))


def _numbers(flag: str, text: str, kind: Callable, least: float) -> tuple:
  """The distinct numbers of a comma list, ascending."""
  try:
    values = tuple(sorted({kind(part) for part in text.split(",")}))
  except ValueError:
    what = "whole numbers" if kind is int else "numbers"
    raise UserError(f"--{flag}={text} must be {what}, several with commas between them.") from None
  if not all(least <= value < float("inf") for value in values):  # NaN is not
    raise UserError(f"--{flag}={text} must be at least {least}.")
  return values


def _number(flag: str, text: str) -> int:
  values = _numbers(flag, text, int, 1)
  if len(values) > 1:
    raise UserError(f"--{flag}={text} must be one whole number.")
  return values[0]
