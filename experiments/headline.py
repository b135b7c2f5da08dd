"""KL against measured prefill speed: the plot of README.md, and its table of KL at equal speed.

  python experiments/headline.py --results=docs/results --out=docs/results/headline.png

`--results` holds records of experiments/main_table.py (main_table.json: methods without maps; late_maps.json and
late_maps_times.json: those with maps) and stand_in_trained.json, those of the run that trained FTP with maps.
"""

import pathlib
import statistics
import sys
from typing import Any

import table_figures
from absl import app, flags

from ftp_jax.errors import UserError, check_target
from ftp_jax.plotting import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, new_figure, styled
from ftp_jax.stages import read_json

CONTEXT = 2048
SPEED = f"speedup_{CONTEXT}"
# What a method of the records is called here, in the order of the table, its colour and its line.
NAMES = {
    "ftp, maps": ("FTP with maps", VERMILION, "-"),
    "late_maps": ("late blocks with maps, no router", ORANGE, "-"),
    "ftp": ("FTP without maps", VERMILION, "--"),
    "late": ("late blocks", ORANGE, "--"),
    "skipgpt": ("SkipGPT", GREEN, "-"),
    "truncation": ("truncation", BLUE, "-"),
    "fastv": ("FastV", SKY, "-"),
    "shortgpt": ("ShortGPT", BLACK, "-"),
    "mod": ("Mixture-of-Depths", PURPLE, "-"),
    "blockpruner": ("BlockPruner", GREY, "-"),
}

_RESULTS = flags.DEFINE_string("results", None, "Directory of the records.", required=True)
_OUT = flags.DEFINE_string("out", None, "The plot.", required=True)


def entries(results: pathlib.Path) -> list[dict[str, Any]]:
  """Method, S, mean KL, its standard deviation over seeds (None of one) and speedup, of all that is in the records."""
  nothing = dict.fromkeys(("kl", "kl_spread", "average"))
  found = [nothing | entry for entry in read_json(results / "main_table.json")["table"]]
  speeds = speedups(read_json(results / "late_maps_times.json")["runs"])
  for entry in read_json(results / "late_maps.json")["table"]:
    if entry["method"] == "late_maps":
      found.append(nothing | entry | {SPEED: speeds["late_maps", entry["asked"]]})
  trained: dict[float, list[float]] = {}
  for record in read_json(results / "stand_in_trained.json")["records"]:
    if record["method"] == "dynamic_ga":
      trained.setdefault(record["asked"], []).append(record["kl"])
  for asked, kl in trained.items():
    spread = statistics.stdev(kl) if len(kl) > 1 else None
    own = {"method": "ftp, maps", "asked": asked, "kl": statistics.fmean(kl), "kl_spread": spread}
    found.append(nothing | own | {SPEED: speeds["ftp", asked]})
  return [entry for entry in found if entry["method"] in (*NAMES, "dense")]


def speedups(runs: list[dict[str, Any]]) -> dict[tuple[str, float], float]:
  """Of every method and S the ratio of medians, dense's over its own, of all measurements of all runs."""
  seconds: dict[tuple[str, float], list[float]] = {}
  for run in runs:
    for record in run["records"]:
      seconds.setdefault((record["method"], run["S"]), []).extend(record["seconds"])
  return {key: statistics.median(seconds["dense", key[1]]) / statistics.median(own) for key, own in seconds.items()}


@styled
def plot(found: list[dict[str, Any]], path: pathlib.Path) -> None:
  figure, ((panel,),) = new_figure(1, 1, 9, 4.6)
  for method, (name, color, line) in NAMES.items():
    own = sorted((e for e in found if e["method"] == method and e[SPEED]), key=lambda entry: entry[SPEED])
    speed, kl, spread = ([entry[key] or 0.0 for entry in own] for key in (SPEED, "kl", "kl_spread"))
    width = 3 if method == "ftp, maps" else 1.6
    look = {"label": name, "color": color, "linestyle": line, "linewidth": width}
    panel.errorbar(speed, kl, spread, marker="o", markersize=5, **look)
  panel.set_yscale("log")
  panel.set_xlabel(f"measured speed of a prefill of {CONTEXT:,} tokens, dense = 1")
  panel.set_ylabel("KL to the dense model (nats a token)")
  panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
  figure.savefig(path, dpi=110)


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"The argument {argv[1]!r} is not understood.")
  path = pathlib.Path(_OUT.value)
  check_target(path, "out")
  try:
    found = entries(pathlib.Path(_RESULTS.value))
  except (UserError, KeyError, TypeError) as error:
    raise UserError(f"--results={_RESULTS.value} lacks the records that are read here; name docs/results.") from error
  order = {method: place for place, method in enumerate(NAMES)}
  found.sort(key=lambda entry: order.get(entry["method"], -1))
  plot(found, path)
  print(table_figures.equal_latency(found, CONTEXT, "kl"))
  print(f"written {path}")


if __name__ == "__main__":
  try:
    app.run(main)
  except UserError as error:
    sys.exit(f"headline: {error}")
