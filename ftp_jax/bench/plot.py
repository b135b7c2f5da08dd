"""Plots of a bench against context: speedup with its ideal, or tokens a second; a panel for each batch."""

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib import ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ftp_jax.files import replacing
from ftp_jax.plotting import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, new_figure, styled

_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
_MARKERS = "osv^D"
_DASHED = (0, (4, 2))


def write(records: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws records of one bench (prefill, crossover or decode) into a PNG file, atomically."""
  figure = _draw(records)
  with replacing(path) as file:
    FigureCanvasAgg(figure).print_png(file)


@styled
def _draw(records):
  decode = records[0]["bench"] == "decode"
  key = "tokens_per_second" if decode else "speedup"
  batches = sorted({r["batch"] for r in records})
  figure, panels = new_figure(1, len(batches), 6, 4)
  figure.set_dpi(130)
  for axes, batch in zip(panels[0], batches):
    of_batch = [r for r in records if r["batch"] == batch]
    looks = itertools.product(_MARKERS, _COLOURS)
    for label in dict.fromkeys(map(_label, of_batch)):
      line = sorted((r for r in of_batch if _label(r) == label), key=lambda r: r["context"])
      x = [r["context"] for r in line]
      fixed = {"dense": ("_", BLACK), "torch_dense": ("x", GREY)}
      marker, colour = fixed.get(line[0]["method"]) or next(looks)
      axes.plot(x, [r[key] for r in line], color=colour, marker=marker, label=label)
      if not decode and line[0]["method"] == "ftp":
        ideal = [r["ideal_speedup"] for r in line]
        axes.plot(x, ideal, color=colour, marker=marker, markersize=3, linestyle=_DASHED, linewidth=1)
    if not decode:
      axes.plot([], [], color=GREY, linestyle=_DASHED, linewidth=1, label="ideal, by FLOPs")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({r["context"] for r in of_batch}))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context (tokens)")
    axes.set_title(f"batch {batch}, {records[0]['dtype']}")
  axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
  panels[0, 0].set_ylabel("tokens a second" if decode else "prefill speedup over dense")
  return figure


def _label(record: dict[str, Any]) -> str:
  if not record["shape"]:
    return record["method"] + (f", S = {record['sparsity']:.2f}" if record["sparsity"] else "")
  return f"{record['shape']}, {record['kv']}, S = {record['sparsity']:.2f}"
