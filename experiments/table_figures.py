"""Figures of the main table: what its cells come to, as a table in Markdown, at equal latency and as a plot.

A row is one cell (method, S, seed) as `main_table.Table` reads it; every part of it may be missing. An entry of the
table is one method and S, over its seeds.
"""

import math
import pathlib
import re
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

from ftp_jax.errors import UserError

_COLORS = (*(f"C{i}" for i in range(10)), "navy")  # of methods in a plot; matplotlib itself has ten
_RESAMPLES = 2000  # of the items, for confidence intervals
# Columns: heading, key, factor, digits.
_COLUMNS = (
    ("S", "asked", 1, 2), ("ARC-e", "arc_easy", 100, 1), ("ARC-c", "arc_challenge", 100, 1),
    ("HellaSwag", "hellaswag", 100, 1), ("WinoGrande", "winogrande", 100, 1), ("MMLU", "mmlu", 100, 1),
    ("average", "average", 100, 1), ("retained %", "retained", 100, 1),
    ("above chance %", "retained_above_chance", 100, 1), ("same choice %", "same_choice", 100, 1),
    ("KL of choices", "choice_kl", 1, 3), ("skipped there %", "skipped", 100, 1),
    ("retrieval", "retrieval", 100, 1), ("KL", "kl", 1, 3),
    ("agreement %", "agreement", 100, 1), ("perplexity", "perplexity", 1, 1),
    ("skipped there %", "perplexity_achieved", 100, 1), ("achieved %", "achieved", 100, 1),
    ("FLOPs saved %", "flops_saved", 100, 1), ("KV bytes", "cache_ratio", 1, 2),
)
_COMPANION = re.compile("_(spread|interval|seeds|to_ftp)$")  # what an entry says of the figure so named
# Figures of items, and what of a row they are means of: those of a method and of `ftp` are compared item by item.
_PAIRED = {"average": "correct", "same_choice": "same_choice", "choice_kl": "choice_kl"}
# Figures with 95 % intervals over items, that of the average for its difference to dense: factor, format.
_INTERVALS = {
    "average": (100, "+.1f"), "retained_above_chance": (100, ".1f"), "same_choice": (100, ".1f"),
    "choice_kl": (1, ".3f"),
}


def choices(records: list[dict[str, Any]], dense: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
  """Items of a task -> whether the choice is that of the dense model, and the KL (nats) of all choices to its own.

  Both are of the log-likelihoods as they are, not of those divided by a choice's length: the likeliest choice, and the
  distribution that they give over an item's choices.
  """

  def distribution(record):
    loglikelihoods = np.array(record["loglikelihoods"])
    return loglikelihoods - np.logaddexp.reduce(loglikelihoods)

  same, kl, of_dense = {}, {}, {record["id"]: record for record in dense}
  for record in records:
    name, log_p, log_q = str(record["id"]), distribution(of_dense[record["id"]]), distribution(record)
    same[name] = float(np.argmax(log_p) == np.argmax(log_q))
    kl[name] = float(np.sum(np.exp(log_p) * (log_p - log_q)))
  return same, kl


def long_names(rows: list[dict[str, Any]]) -> list[str]:
  """Names of the files of --long that any cell has figures of."""
  return sorted({name for row in rows for name in row["long"] or ()})


def of_file(file: str) -> str:
  """The key of the KL on a file of --long."""
  return f"kl, {file}"


def summarise(rows: list[dict[str, Any]], guess: dict[str, float], contexts: list[int]) -> list[dict[str, Any]]:
  """One entry a method and S: means over the seeds that have a figure, None where none has it, and spreads.

  `<figure>_spread` is the sample standard deviation over seeds. `<figure>_interval` is a 95 % interval, items drawn
  anew: of the average it is that of the difference to the dense one, the same items drawn for both (paired bootstrap).
  What is retained above chance is left out unless the dense average lies three standard errors above chance.
  `same_choice` and `choice_kl` are means over tasks. `<figure>_to_ftp` of _PAIRED are the difference to what `ftp` has
  at the same S and its interval, paired as well.

  Args:
    guess: chance of every task.
  """
  dense = next((row for row in rows if row["method"] == "dense" and row["asked"] == 0), None)
  whole = lambda row: bool(guess) and all(row["correct"].get(task) for task in guess)
  accuracy = lambda row, task: statistics.fmean(row["correct"][task].values()) if row["correct"].get(task) else None
  over_tasks = lambda row, name: statistics.fmean(statistics.fmean(row[name][task].values()) for task in guess)
  average = lambda row: over_tasks(row, "correct") if whole(row) else None
  base, against = statistics.fmean(guess.values()) if guess else None, dense is not None and whole(dense)
  clear = against and average(dense) - base > 3 * statistics.pstdev(resampled([dense], "correct", guess))
  compared = lambda row: bool(guess) and all(row["choice_kl"].get(task) for task in guess)
  figures = {
      **{task: lambda row, task=task: accuracy(row, task) for task in guess},
      "average": average,
      "retained": lambda row: average(row) / average(dense) if against and whole(row) else None,
      "retained_above_chance": lambda row: (
          (average(row) - base) / (average(dense) - base) if clear and whole(row) else None
      ),
      **{name: lambda row, name=name: over_tasks(row, name) if compared(row) else None
         for name in ("same_choice", "choice_kl")},
      **{name: lambda row, name=name: row["quality"].get(name) for name in (
          "kl", "agreement", "perplexity", "perplexity_achieved", "achieved", "flops_saved", "cache_ratio",
      )},
      **{f"{name}, {file}": lambda row, name=name, file=file: row["long"].get(file, {}).get(name)
         for file in long_names(rows) for name in ("kl", "agreement", "achieved")},
      "skipped": lambda row: row["skipped"],
      "retrieval": lambda row: row["retrieval"],
      **{f"speedup_{context}": lambda row, context=context: row["speedup"].get(context) for context in contexts},
  }
  table = []
  for method, asked in dict.fromkeys((row["method"], row["asked"]) for row in rows):
    own = [row for row in rows if (row["method"], row["asked"]) == (method, asked)]
    entry: dict[str, Any] = {"method": method, "asked": asked}
    entry |= dict.fromkeys([*(f"{name}_interval" for name in _INTERVALS), *(f"{name}_to_ftp" for name in _PAIRED)])
    for name, figure in figures.items():
      values = [value for value in map(figure, own) if value is not None]
      entry[name] = statistics.fmean(values) if values else None
      entry[f"{name}_spread"] = statistics.stdev(values) if len(values) > 1 else None
      entry[f"{name}_seeds"] = len(values)
    entry["items"] = {task: len(row["correct"][task]) for row in own for task in guess if row["correct"].get(task)}
    done = [row for row in own if whole(row)]
    if against and done and method != "dense":
      interval = lambda drawn: np.percentile(drawn, (2.5, 97.5)).tolist()
      own_average, dense_average = resampled(done, "correct", guess), resampled([dense], "correct", guess)
      entry["average_interval"] = interval(own_average - dense_average)
      if clear:
        entry["retained_above_chance_interval"] = interval((own_average - base) / (dense_average - base))
      if all(map(compared, done)):
        for name in ("same_choice", "choice_kl"):
          entry[f"{name}_interval"] = interval(resampled(done, name, guess))
        ours = [row for row in rows if (row["method"], row["asked"]) == ("ftp", asked) and compared(row)]
        if ours and method != "ftp":
          for figure, name in _PAIRED.items():
            found, of_ftp = (statistics.fmean(over_tasks(row, name) for row in some) for some in (done, ours))
            drawn = resampled(done, name, guess) - resampled(ours, name, guess)
            entry[f"{figure}_to_ftp"] = [found - of_ftp, *interval(drawn)]
    table.append(entry)
  return table


def joined(new: list[dict[str, Any]], earlier: list[dict[str, Any]], named: Sequence[str]) -> list[dict[str, Any]]:
  """The cells or entries of two tables; where both have one, by the values of `named`, what `new` knows comes first.

  A figure comes with its spread and interval. Differences to `ftp` are those of `new` alone at an S whose `ftp` it has.
  """
  name = lambda entry: tuple(entry[key] for key in named)
  blank = dict.fromkeys(key for entry in [*earlier, *new] for key in entry)
  found, anew = {name(entry): blank | entry for entry in earlier}, {name(entry): entry for entry in new}
  for key, entry in anew.items():
    if key not in found:
      found[key] = blank | entry
      continue
    for part, value in entry.items():
      if isinstance(value, dict):
        known = {inner: figure for inner, figure in value.items() if figure is not None}
        found[key][part] = (found[key][part] or {}) | known
      elif entry[_COMPANION.sub("", part)] is not None:
        found[key][part] = value
  remade = {entry["asked"] for entry in new if entry["method"] == "ftp"}
  for key, entry in found.items():
    if entry["asked"] in remade:
      own = anew.get(key, {})
      entry.update({part: own.get(part) for part in entry if part.endswith("_to_ftp")})
  return sorted(found.values(), key=lambda entry: entry["asked"])


def check_alike(cells: list[dict[str, Any]], earlier: list[dict[str, Any]]) -> None:
  """UserError where the dense cells of two tables tell of other tasks, items, prompts or models."""
  ours, theirs = ({cell["method"]: cell for cell in some}.get("dense", {}) for some in (cells, earlier))
  part = lambda cell, name: cell.get(name) or {}
  refused = lambda what: UserError(f"--earlier is a table of other {what} than this one; name one of the same.")
  for task in part(ours, "correct").keys() & part(theirs, "correct").keys():
    if ours["correct"][task].keys() != theirs["correct"][task].keys():
      raise refused(f"items of {task}")
  for what, name in (("tasks", "correct"), ("retrieval items", "retrieval_items")):
    own, other = ({key for key, value in part(cell, name).items() if value} for cell in (ours, theirs))
    if own and other and own != other:
      raise refused(f"{what} ({', '.join(sorted(other))})")
  measured = {"test prompts": (part(ours, "quality"), part(theirs, "quality"))}
  for file in part(ours, "long").keys() & part(theirs, "long").keys():
    measured[f"prompts in {file}"] = ours["long"][file], theirs["long"][file]
  for what, (own, other) in measured.items():
    if own and other and not math.isclose(own["nll"], other["nll"], rel_tol=1e-3):
      raise refused(what)


def resampled(rows: list[dict[str, Any]], name: str, guess: dict[str, float]) -> np.ndarray:
  """Averages over tasks of the figure `name` of items drawn with replacement, mean over rows.

  The draws are the same for whatever rows and figure.
  """
  total, rng = np.zeros(_RESAMPLES), np.random.default_rng(0)
  for task in guess:
    ids = sorted(rows[0][name][task])
    figure = np.mean([[row[name][task][i] for i in ids] for row in rows], axis=0)
    total += figure[rng.integers(0, len(ids), (_RESAMPLES, len(ids)))].mean(axis=1)
  return total / len(guess)


def markdown(table: list[dict[str, Any]], contexts: list[int], files: Sequence[str] = ()) -> str:
  """The table without the columns that nothing fills; `files`: names of the files of --long.

  Behind ± the sample standard deviation over seeds; in brackets the intervals of _INTERVALS.
  """
  long_columns = lambda file: (
      (f"KL, {file}", of_file(file), 1, 3), (f"agreement %, {file}", f"agreement, {file}", 100, 1),
      ("skipped there %", f"achieved, {file}", 100, 1),
  )
  columns = _COLUMNS + tuple(column for file in files for column in long_columns(file))
  columns += tuple((f"speedup at {context}", f"speedup_{context}", 1, 2) for context in contexts)
  columns = [how for how in columns if any(entry.get(how[1]) is not None for entry in table)]

  def cell(entry, key, factor, digits):
    if entry[key] is None:
      return "-"
    show = lambda value: f"{value:.{digits}f}" if abs(entry[key] * factor) < 1e5 else f"{value:.1e}"
    text, spread = show(entry[key] * factor), entry.get(f"{key}_spread")
    text = text if spread is None else f"{text} ± {show(spread * factor)}"
    if entry.get(f"{key}_interval"):
      scale, how = _INTERVALS[key]
      text += " [" + ", ".join(f"{scale * end:{how}}" for end in entry[f"{key}_interval"]) + "]"
    return text

  lines = [["method", *(heading for heading, *_ in columns)], ["---"] * (len(columns) + 1)]
  lines += [[entry["method"], *(cell(entry, *how) for _, *how in columns)] for entry in table]
  return _table(lines)


def _table(lines: list[list[str]]) -> str:
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def differences_to_ftp(table: list[dict[str, Any]]) -> str:
  """What every method has more than `ftp` at the same S, with 95 % intervals; empty where nothing is known."""
  shown = [entry for entry in table if entry["choice_kl_to_ftp"]]
  if not shown:
    return ""
  columns = [(heading, key, factor) for heading, key, factor, _ in _COLUMNS if key in _PAIRED]
  lines = [["method - ftp", "S", *(heading for heading, *_ in columns)], ["---"] * (2 + len(columns))]
  for entry in shown:
    line = [entry["method"], f"{entry['asked']:.2f}"]
    for _, key, factor in columns:
      how = f"+{_INTERVALS[key][1].removeprefix('+')}"
      mean, low, high = (f"{factor * value:{how}}" for value in entry[f"{key}_to_ftp"])
      line.append(f"{mean} [{low}, {high}]")
    lines.append(line)
  return _table(lines)


def equal_latency(table: list[dict[str, Any]], context: int, figure: str) -> str:
  """A figure of every method at the prefill time of each S of `ftp`; with `kl` also the average accuracy if known.

  Between the times of its own S, and 1 (dense), a method is taken to lie on straight lines. In square brackets: on the
  one from dense to the slowest S that it has; "-": no S at which it has both is so fast. Empty where no method has the
  figure, or `ftp` no time.
  """
  key = f"speedup_{context}"
  ours = sorted((e for e in table if e["method"] == "ftp" and e[key]), key=lambda entry: entry[key])
  if not ours or not any(entry[figure] for entry in table):
    return ""
  what = {"kl": "at the time of ftp", "choice_kl": "KL of choices at the time of ftp"}.get(
      figure, f"KL, {figure.removeprefix(of_file(''))}, at the time of ftp"
  )
  lines = [
      [f"{what}, {context} tokens", *(f"S = {e['asked']:.2f}, {e[key]:.2f} x" for e in ours)],
      ["---"] * (len(ours) + 1),
  ]
  dense = [entry for entry in table if entry["method"] == "dense"]

  def at(own, name, speedup):
    points = lambda entries: [(1 / e[key], e[name]) for e in entries if e[key] and e[name] is not None]
    measured, known = points(own), sorted(points(own + dense))
    if not measured or len(known) < 2 or 1 / speedup < known[0][0]:
      return None, ""
    value = float(np.interp(1 / speedup, *zip(*known)))
    return value, f"{value:.3f}" if 1 / speedup <= max(measured)[0] else f"[{value:.3f}]"

  for method in dict.fromkeys(e["method"] for e in table if e["method"] != "dense"):
    own, line = [e for e in table if e["method"] == method], [method]
    for e in ours:
      (kl, text), (average, _) = (at(own, name, e[key]) for name in (figure, "average"))
      shown = "" if average is None or figure != "kl" else f" ({100 * average:.1f} %)"
      line.append("-" if kl is None else text + shown)
    lines.append(line)
  return _table(lines)


def plot(
    table: list[dict[str, Any]], context: int, path: pathlib.Path, methods: Sequence[str], files: Sequence[str] = ()
) -> None:
  """What is there of both KL, that on files of --long and retained accuracy, against a prefill's measured time.

  Args:
    context: tokens of the prefill.
    methods: all there are, whose order gives each its colour.
  """
  matplotlib.use("Agg")
  from matplotlib import pyplot

  panels_of = (
      ("kl", 1, "KL to the dense model on the run's test prompts (nats a token)"),
      *((of_file(file), 1, f"KL to the dense model on {file} (nats a token)") for file in files),
      ("choice_kl", 1, "KL of choices to the dense model's, mean of tasks (nats an item)"),
      ("retained", 100, "average accuracy retained on short tasks (%)"),
  )
  known = [entry for entry in table if entry[f"speedup_{context}"]]
  filled = lambda key: any(entry[key] is not None for entry in known if entry["method"] != "dense")
  shown = [panel for panel in panels_of if filled(panel[0])]
  if not shown:
    return
  figure, panels = pyplot.subplots(1, len(shown), figsize=(6 * len(shown), 5), squeeze=False)
  for panel, (key, factor, label) in zip(panels[0], shown):
    there = [entry for entry in known if entry[key] is not None]
    for method in dict.fromkeys(entry["method"] for entry in there):
      own = sorted((entry for entry in there if entry["method"] == method), key=lambda entry: entry["asked"])
      color = "black" if method == "dense" else _COLORS[methods.index(method)]  # in all panels, which have one legend
      time, quality = [1 / entry[f"speedup_{context}"] for entry in own], [entry[key] * factor for entry in own]
      panel.plot(time, quality, "o-", label=method, color=color)
    panel.set_xlabel(f"prefill time at {context} tokens, dense = 1")
    panel.set_ylabel(label)
    panel.grid(alpha=0.3)
    if key != "retained":
      panel.set_yscale("symlog", linthresh=0.1)
  panels[0, 0].legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
