"""How all plots look. Colours are Okabe and Ito's, which colour-blind readers tell apart."""

import functools

import matplotlib
from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#8A8A8A"
)
_LOOK = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}


def styled(draw):
  """Draws under this module's look and leaves the caller's matplotlib settings alone."""

  @functools.wraps(draw)
  def wrapped(*args):
    with matplotlib.rc_context(_LOOK):
      return draw(*args)

  return wrapped


def new_figure(rows: int, columns: int, width: float, height: float):
  """A figure and its (rows, columns) panels of `width` x `height` inches each."""
  figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
  return figure, figure.subplots(rows, columns, squeeze=False)
