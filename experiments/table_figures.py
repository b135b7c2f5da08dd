"""Figures of the main table: what its cells come to, as a table in Markdown, at equal latency and as a plot.

A row is one cell (method, S, seed) as `main_table.Table` reads it; every part of it may be missing. An entry of the
table is one method and S, over its seeds.
"""

import itertools
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from ftp_jax.plotting import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, new_figure, styled

# What a method is called in a plot, its colour and its line; runs of --others come after `ftp`, by their names.
LOOKS = {
    "ftp": ("FTP", VERMILION, "-"),
    "late_maps": ("late blocks with maps", ORANGE, "-"),
    "late": ("late blocks", ORANGE, "--"),
    "skipgpt": ("SkipGPT", GREEN, "-"),
    "truncation": ("truncation", BLUE, "-"),
    "static": ("static order", BLUE, "--"),
    "fastv": ("FastV", SKY, "-"),
    "random": ("random tokens", SKY, "--"),
    "shortgpt": ("ShortGPT", BLACK, "-"),
    "mod": ("Mixture-of-Depths", PURPLE, "-"),
    "blockpruner": ("BlockPruner", GREY, "-"),
}
_OTHER_LINES = ("--", ":", "-.")
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
    text = f"{value:.3f}" if value >= 0.01 else f"{value:.4f}"
    return value, text if 1 / speedup <= max(measured)[0] else f"[{text}]"

  for method in dict.fromkeys(e["method"] for e in table if e["method"] != "dense"):
    own, line = [e for e in table if e["method"] == method], [method]
    for e in ours:
      (kl, text), (average, _) = (at(own, name, e[key]) for name in (figure, "average"))
      shown = "" if average is None or figure != "kl" else f" ({100 * average:.1f} %)"
      line.append("-" if kl is None else text + shown)
    lines.append(line)
  return _table(lines)


@styled
def plot(table: list[dict[str, Any]], context: int, path: pathlib.Path, files: Sequence[str] = ()) -> None:
  """What is there of both KL, that on files of --long and retained accuracy, against a prefill's measured speed.

  Bars are standard deviations over seeds. `context`: tokens of the prefill.
  """
  panels_of = (
      ("kl", 1, "KL to the dense model (nats a token)"),
      *((of_file(file), 1, f"KL to the dense model, {file} (nats a token)") for file in files),
      ("choice_kl", 1, "KL of choices to the dense model's (nats an item)"),
      ("retained", 100, "average accuracy retained (%)"),
  )
  known = [entry for entry in table if entry[f"speedup_{context}"] and entry["method"] != "dense"]
  shown = [panel for panel in panels_of if any(entry[panel[0]] is not None for entry in known)]
  if not shown:
    return
  others = [name for name in dict.fromkeys(entry["method"] for entry in known) if name not in LOOKS]
  lines = itertools.cycle(_OTHER_LINES)
  own_runs = {name: (name.replace("_", " "), VERMILION, next(lines)) for name in others}
  looks, handles = {"ftp": LOOKS["ftp"]} | own_runs | LOOKS, {}
  figure, (panels,) = new_figure(1, len(shown), 7, 4.6)
  for panel, (key, factor, label) in zip(panels, shown):
    for method, (name, color, line) in looks.items():
      own = [entry for entry in known if entry["method"] == method and entry[key] is not None]
      own.sort(key=lambda entry: entry[f"speedup_{context}"])
      speed, height = [entry[f"speedup_{context}"] for entry in own], [entry[key] * factor for entry in own]
      spread = [(entry.get(f"{key}_spread") or 0.0) * factor for entry in own]
      if own:
        bars = spread if any(spread) else None
        look = {"label": name, "color": color, "linestyle": line, "linewidth": 3 if method == "ftp" else 1.6}
        handles[method] = panel.errorbar(speed, height, bars, marker="o", markersize=5, **look)
    panel.set_xlabel(f"measured speed of a prefill of {context:,} tokens, dense = 1")
    panel.set_ylabel(label)
    if key != "retained":
      panel.set_yscale("log")
  panels[-1].legend(handles=[handles[m] for m in looks if m in handles], loc="center left", bbox_to_anchor=(1, 0.5))
  figure.savefig(path, dpi=110)
