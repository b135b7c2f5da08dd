"""PNG plots of a run."""

import os
from typing import Any, NamedTuple

import numpy as np
from matplotlib import ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator

from ftp_jax.plotting import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, new_figure, styled
from ftp_jax.report.rundir import Run
from ftp_jax.report.tables import METHODS, method_label

STYLE = {  # method -> colour, marker
    "dense": (BLACK, "_"),
    "truncation": (VERMILION, "s"),
    "random": (GREY, "x"),
    "static_uniform": (SKY, "v"),
    "static_ga": (BLUE, "^"),
    "dynamic_ga": (PURPLE, "D"),
    "dynamic_finetuned": (GREEN, "o"),
}
_MAX_PROMPTS = 3
_MAX_LABEL = 12  # characters of a token that a column can carry


class Plot(NamedTuple):
  """A written plot: its file, title and a caption that says what is drawn."""

  path: str
  title: str
  caption: str


def write_plots(run: Run, rows: list[dict[str, Any]], directory: str) -> list[Plot]:
  """Draws every plot of a run into `directory`; `rows` are aggregated records."""
  os.makedirs(directory, exist_ok=True)
  drawn = [
      ("methods.png", "KL to the dense model by method", *plot_methods(rows)),
      ("schedules.png", "Sparsity asked of each block", *plot_schedules(run)),
      ("training.png", "Router training", *plot_training(run)),
  ]
  if any(cell.search_history or cell.histories for cell in run.cells):
    drawn.insert(2, ("search.png", "Convergence of the searches", *plot_search(run)))
  for sparsity, cells in run.by_sparsity().items():
    name = f"routes_S{sparsity:.2f}.png"
    drawn.append((name, f"Tokens kept at S = {sparsity:.2f}", *plot_routes(cells[0].prompts)))
  drawn.append(("redundancy.png", "Redundancy of the blocks", *plot_redundancy(run)))
  written = []
  for name, title, figure, caption in drawn:
    path = os.path.join(directory, name)
    FigureCanvasAgg(figure).print_figure(path, dpi=130, bbox_inches="tight")
    written.append(Plot(path, title, caption))
  return written


@styled
def plot_methods(rows):
  """KL of the continuation for every method, against S; a ranking where there is one S only."""
  rows = [row for row in rows if row["method"] != "dense"]
  bars = lambda row: row["kl_stderr"] if row["kl_std"] is None else row["kl_std"]
  sparsities = sorted({row["asked"] for row in rows})
  prompts = rows[0]["prompts"]
  caption = (
      f"Mean KL(dense || pruned) of the continuation tokens of {prompts} held prompts; lower is better, dense is 0. "
      "Bars: sample standard deviation over seeds; standard error over prompts where a method has one seed or none."
  )
  if len(sparsities) == 1:
    figure, ((axes,),) = new_figure(1, 1, 7, 0.55 * len(rows) + 1.2)
    ranked = sorted(rows, key=lambda row: -row["kl"])
    for y, row in enumerate(ranked):
      colour, marker = STYLE[row["method"]]
      axes.errorbar(
          row["kl"], y, xerr=bars(row), color=colour, marker=marker, markersize=8, capsize=4, linestyle="none"
      )
      axes.annotate(f"{row['kl']:.3f}", (row["kl"], y), (0, 8), textcoords="offset points", ha="center", fontsize=9)
    axes.set_yticks(range(len(ranked)), [method_label(row) for row in ranked])
    axes.set_ylim(-0.6, len(ranked) - 0.3)
    axes.set_xscale("log")
    _plain_log(axes.xaxis)
    axes.set_xlabel(f"KL to dense (nats a token), S = {sparsities[0]:.2f}")
    return figure, caption
  figure, ((axes,),) = new_figure(1, 1, 7.5, 4.6)
  methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
  # Side by side by a hair, so that bars of neighbouring methods do not cover each other.
  step = 0.015 * min(np.diff(sparsities))
  for i, method in enumerate(methods):
    own = [row for row in rows if row["method"] == method]
    colour, marker = STYLE[method]
    x = [100 * (row["asked"] + step * (i - (len(methods) - 1) / 2)) for row in own]
    axes.errorbar(
        x, [row["kl"] for row in own], yerr=[bars(row) for row in own], color=colour, marker=marker, markersize=6,
        capsize=3, label=method_label(own[0]),
    )
  axes.set_yscale("log")
  _plain_log(axes.yaxis)
  axes.set_xticks([100 * s for s in sparsities])
  axes.set_xlabel("sparsity asked, S (%)")
  axes.set_ylabel("KL to dense (nats a token)")
  axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
  return figure, caption


def _plain_log(axis):
  """Decimal numbers on a log axis, at 1, 2 and 5 of each decade."""
  axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
  axis.set_minor_formatter(ticker.NullFormatter())


@styled
def plot_schedules(run: Run):
  """Asked sparsity of every block, before fine-tuning and, where there was any, after it; a panel for each S."""
  by_sparsity = run.by_sparsity()
  figure, panels = new_figure(len(by_sparsity), 1, 8, 2.6)
  for axes, (sparsity, cells) in zip(panels[:, 0], by_sparsity.items()):
    for label, colour, style, schedules in (
        ("search", BLUE, (0, (4, 2)), [cell.search_schedule for cell in cells]),
        ("fine-tuned", GREEN, "-", [cell.schedule for cell in cells]),
    )[: 2 if run.cells[0].histories else 1]:
      schedules = 100 * np.asarray(schedules)
      blocks = np.arange(schedules.shape[1])
      if len(schedules) > 1:
        for schedule in schedules:
          axes.step(blocks, schedule, where="mid", color=colour, linewidth=0.8, alpha=0.4)
      axes.step(blocks, schedules.mean(axis=0), where="mid", color=colour, linestyle=style, linewidth=2.2, label=label)
    axes.axhline(100 * sparsity, color=BLACK, linewidth=1, linestyle=":", label=f"mean, S = {sparsity:.2f}")
    axes.set_ylim(-3, 103)
    axes.set_ylabel("sparsity (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper left")
  panels[-1, 0].set_xlabel("block")
  caption = "Share of context tokens that each block is asked to skip. Thick: mean over seeds; thin: single seeds."
  return figure, caption


@styled
def plot_search(run: Run):
  """Fitness and validation of the searches against generations; a row for each S."""
  by_sparsity = run.by_sparsity()
  columns = [("search (static router)", lambda cell: cell.search_history)] if run.cells[0].search_history else []
  rounds = len(run.cells[0].histories)
  for r in range(rounds):
    title = "fine-tuning (trained router)" + (f", round {r + 1}" if rounds > 1 else "")
    columns.append((title, lambda cell, r=r: cell.histories[r]))
  figure, panels = new_figure(len(by_sparsity), len(columns), 5, 2.9)
  curves = (
      ("mean_fitness", "mean of the population", SKY, ":"),
      ("best_fitness", "best of the population", BLUE, "-"),
      ("best_validation", "best on validation prompts", VERMILION, "--"),
  )
  for row, (sparsity, cells) in zip(panels, by_sparsity.items()):
    for axes, (title, history_of) in zip(row, columns):
      for key, label, colour, style in curves:
        for i, cell in enumerate(cells):
          history = history_of(cell)
          x, y = [line["generation"] for line in history], [line[key] for line in history]
          axes.plot(x, y, color=colour, linestyle=style, marker=".", label=None if i else label)
      axes.set_title(f"S = {sparsity:.2f}, {title}")
      axes.set_yscale("log")
      _plain_log(axes.yaxis)
      axes.xaxis.set_major_locator(MaxNLocator(integer=True))
      axes.set_xlabel("generation")
    row[0].set_ylabel("KL to dense (nats a token)")
  panels[0, 0].legend()
  return figure, "One line for each seed. The schedule with the best validation figure is taken."


@styled
def plot_training(run: Run):
  """Losses, validation KL and sparsity against steps; a row for each S."""
  by_sparsity = run.by_sparsity()
  figure, panels = new_figure(len(by_sparsity), 3, 4.2, 2.9)
  for row, (sparsity, cells) in zip(panels, by_sparsity.items()):
    for i, cell in enumerate(cells):
      steps = [line for line in cell.training if "loss" in line]
      x = [line["step"] for line in steps]
      label = lambda text: None if i else text
      for key, name, colour in (
          ("distill", "distillation", BLUE), ("sparsity", "sparsity", ORANGE), ("guide", "guide", PURPLE),
      ):
        row[0].plot(x, [line[key] for line in steps], color=colour, linewidth=1.2, alpha=0.8, label=label(name))
      validated = [line for line in cell.training if "validation_kl" in line]
      y = [line["validation_kl"] for line in validated]
      row[1].plot([line["step"] for line in validated], y, color=GREEN, marker="o", markersize=4, label=label("seeds"))
      achieved = [100 * np.mean(line["achieved"]) for line in steps]
      row[2].plot(x, achieved, color=BLUE, linewidth=1.2, alpha=0.8, label=label("achieved"))
    row[2].axhline(100 * sparsity, color=BLACK, linestyle=":", linewidth=1.2, label="asked")
    row[2].set_ylim(bottom=0, top=1.35 * row[2].dataLim.ymax)
    row[2].legend()
    # Losses fall to exactly 0, which a logarithmic axis cannot show.
    row[0].set_yscale("symlog", linthresh=1e-2)
    row[0].yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    row[0].set_ylim(bottom=0)
    row[0].set_ylabel(f"S = {sparsity:.2f}\nloss, unweighted")
    row[1].set_ylabel("KL to dense (nats a token)")
    row[2].set_ylabel("mean sparsity (%)")
    for axes in row:
      axes.set_xlabel("step")
      axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
  for axes, title in zip(panels[0], ("losses on training prompts", "validation prompts", "sparsity of the context")):
    axes.set_title(title)
  panels[0, 0].legend()
  return figure, "One line for each seed; the router of the best validation is kept."


@styled
def plot_routes(prompts):
  """Which context tokens each block computes, for a few prompts: tokens as columns, blocks as rows."""
  prompts = prompts[:_MAX_PROMPTS]
  num_blocks = len(prompts[0]["keep"])
  longest = max(prompt["context"] for prompt in prompts)
  width, height = max(7, 0.15 * longest + 1), 0.09 * num_blocks + 1.3
  figure, panels = new_figure(len(prompts), 1, width, height)
  colours = ListedColormap(["#F1EEE6", BLUE])
  for axes, prompt in zip(panels[:, 0], prompts):
    context = prompt["context"]
    keep = np.asarray(prompt["keep"])
    # pcolormesh keeps every cell the same size; empty columns on the right align the prompts.
    axes.pcolormesh(keep, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=0.3)
    axes.set_xlim(0, longest)
    axes.set_xticks(np.arange(context) + 0.5)
    labels = [_readable(token) for token in prompt["tokens"][:context]]
    axes.set_xticklabels(labels, rotation=90, fontsize=7, family=["DejaVu Sans Mono"], parse_math=False)
    axes.tick_params(axis="x", length=0, pad=1)
    blocks = np.arange(0, num_blocks, max(1, num_blocks // 6))
    axes.set_yticks(blocks + 0.5, blocks)
    axes.set_ylabel("block")
    axes.grid(False)
    skipped = _percent(1 - keep.mean())
    axes.set_title(f"{context} context tokens, {skipped} of (token, block) pairs skipped", loc="left")
  panels[-1, 0].set_xlabel("context token")
  return figure, "Blue: the block computes the token; pale: the token skips the block. First seed, final schedule."


def _readable(token: str) -> str:
  """A token as a short printable label; the byte-level space becomes a visible one."""
  text = token.replace("Ġ", "·").replace("▁", "·").replace(" ", "·").replace("Ċ", "\\n").replace("\n", "\\n")
  text = "".join(c if c.isprintable() and ord(c) < 0x250 else "�" for c in text)
  return text if len(text) <= _MAX_LABEL else text[: _MAX_LABEL - 1] + "…"


@styled
def plot_redundancy(run: Run):
  """How little each block changes a token, and what skipping it costs."""
  found = run.redundancy
  blocks = np.arange(len(found["similarity_mean"]))
  figure, panels = new_figure(1 if run.fisher is None else 2, 1, 8, 2.7)
  top = panels[0, 0]
  top.bar(blocks, 100 * np.asarray(found["share_above_0.8"]), color=SKY, label="tokens with cosine above 0.8 (%)")
  top.plot(blocks, 100 * np.asarray(found["similarity_mean"]), color=VERMILION, marker="o", markersize=4,
           label="mean cosine × 100")
  top.set_ylim(0, 118)
  top.set_yticks(range(0, 101, 25))
  top.set_ylabel("cosine (× 100),\nshare of tokens (%)")
  top.legend(loc="upper center", ncols=2)
  caption = (
      f"Cosine of a token before and after each block, {found['num_sequences']} sequences of {found['length']} tokens: "
      f"above 0.8 for {_percent(found['share_above_0.8_all'])} of (token, block) pairs, "
      f"{_percent(found['share_above_0.8_edge'])} in the first and last three blocks, "
      f"{_percent(found['share_above_0.8_middle'])} between."
  )
  if run.fisher is not None:
    bottom = panels[1, 0]
    bottom.bar(blocks, run.fisher, color=BLUE)
    bottom.set_yscale("log")
    bottom.set_ylabel("mean Fisher score\n(squared nats)")
    caption += " Below: Fisher score of skipping a context token in the block."
  panels[-1, 0].set_xlabel("block")
  for axes in panels[:, 0]:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  return figure, caption


def _percent(share: float) -> str:
  return f"{100 * share:.1f} %"
