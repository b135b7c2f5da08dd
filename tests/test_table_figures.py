"""The figures of the main table on hand-made cells."""

import json
import pathlib
import re

import numpy as np
import pytest

from tests import scripts


@pytest.fixture(scope="module")
def figures():
  return scripts.load("table_figures")


def cell(method, asked, seed, easy, hard, kl, speedup):
  """A row whose tasks have 100 items, of which the first ones are right."""
  quality = {"kl": kl, "agreement": 1.0, "perplexity": None, "achieved": asked, "flops_saved": asked}
  correct = lambda share: {str(i): float(i < round(100 * share)) for i in range(100)}
  return {
      "method": method, "asked": asked, "seed": seed, "quality": quality | {"cache_ratio": 1.0}, "skipped": None,
      "long": {}, "retrieval": None, "speedup": {512: speedup},
      "correct": {"arc_easy": correct(easy), "winogrande": correct(hard)}, "same_choice": {}, "choice_kl": {},
  }


GUESS = {"arc_easy": 0.25, "winogrande": 0.5}


def test_retention_and_spread_by_hand(figures):
  rows = [
      cell("dense", 0.0, 0, 0.85, 0.80, 0.0, 1.0),  # average 0.825, chance 0.375
      cell("ftp", 0.3, 0, 0.75, 0.80, 0.1, 1.3),  # average 0.775
      cell("ftp", 0.3, 1, 0.85, 0.80, 0.3, 1.5),
  ]
  dense, ftp = figures.summarise(rows, GUESS, [512])
  assert dense["retained"] == dense["retained_above_chance"] == 1 and dense["kl_seeds"] == 1
  assert dense["kl_spread"] is None and dense["average_interval"] is None
  assert ftp["average_seeds"] == 2 and ftp["average"] == pytest.approx(0.8)
  assert ftp["retained"] == pytest.approx(0.8 / 0.825)
  assert ftp["retained_above_chance"] == pytest.approx((0.40 + 0.45) / 2 / 0.45)
  assert ftp["kl"] == pytest.approx(0.2) and ftp["kl_spread"] == pytest.approx(0.02**0.5)
  assert ftp["speedup_512"] == pytest.approx(1.4) and ftp["items"] == {"arc_easy": 100, "winogrande": 100}


def test_the_interval_is_that_of_paired_items(figures):
  """Ten items of one task turn wrong in one of two seeds: 5 points of that task, whichever items are drawn."""
  rows = [cell("dense", 0.0, 0, 0.85, 0.80, 0.0, 1.0)]
  rows += [cell("ftp", 0.3, seed, easy, 0.80, 0.1, 1.3) for seed, easy in ((0, 0.75), (1, 0.85))]
  low, high = figures.summarise(rows, GUESS, [512])[1]["average_interval"]
  deviation = 0.5 * (0.1 * 0.9 / 100) ** 0.5 / 2  # of the mean of a difference of -0.5 at one item in ten, two tasks
  assert (low + high) / 2 == pytest.approx(-0.025, abs=0.003)
  assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.1)
  same = figures.summarise([rows[0], rows[2]], GUESS, [512])[1]
  assert same["average_interval"] == [0, 0] and same["retained_above_chance_interval"] == [1, 1]


def test_the_interval_of_what_is_retained(figures):
  """Ten items of one task turn wrong: 5 points of an average that lies 45 above chance, 90 items of 100 right."""
  rows = [cell("dense", 0.0, 0, 0.85, 0.80, 0.0, 1.0), cell("ftp", 0.3, 0, 0.75, 0.80, 0.1, 1.3)]
  dense, ftp = figures.summarise(rows, GUESS, [512])
  low, high = ftp["retained_above_chance_interval"]
  deviation = (0.1 * 0.9 / 100) ** 0.5 / 2 / 0.45  # of the loss; that of the dense average adds little
  assert (low + high) / 2 == pytest.approx(1 - 0.05 / 0.45, abs=0.01)
  assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.15)
  assert dense["retained_above_chance_interval"] is None
  text = figures.markdown([dense, ftp], [512])
  assert f"{100 * ftp['retained_above_chance']:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in text


def test_choices_by_hand(figures):
  """An item whose second choice becomes likelier, one whose likelihoods all fall alike, in another order of items."""
  dense = [{"id": "a", "loglikelihoods": [-1.0, -3.0]}, {"id": "b", "loglikelihoods": [-1.0, -2.0, -1.5]}]
  pruned = [{"id": "b", "loglikelihoods": [-3.0, -4.0, -3.5]}, {"id": "a", "loglikelihoods": [-4.0, -3.0]}]
  same, kl = figures.choices(pruned, dense)
  assert same == {"a": 0.0, "b": 1.0}
  p, q = 1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(1.0))
  assert kl["a"] == pytest.approx(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
  assert kl["b"] == pytest.approx(0)


def test_choices_are_averaged_over_tasks_and_at_equal_latency(figures):
  """`late` has 0.3 at one item in ten of one task and 0.03 at all of the other, `ftp` two thirds of that."""
  rows = [cell("dense", 0.0, 0, 0.85, 0.80, 0.0, 1.0)]
  rows += [cell("late", 0.3, 0, 0.85, 0.80, 0.1, 2.0), cell("ftp", 0.3, 0, 0.85, 0.80, 0.1, 4 / 3)]
  for row, factor in zip(rows, (0, 3, 2)):
    some = lambda value, count: {str(i): value * (i < count) for i in range(100)}
    row["choice_kl"] = {"arc_easy": some(0.1 * factor, 10), "winogrande": some(0.01 * factor, 100)}
    row["same_choice"] = {"arc_easy": some(1.0, 90), "winogrande": some(1.0, 100)}
  table = figures.summarise(rows, GUESS, [512])
  dense, late, ftp = table
  assert dense["choice_kl"] == 0 and dense["choice_kl_interval"] is None
  assert late["choice_kl"] == pytest.approx(0.03) and late["same_choice"] == pytest.approx(0.95)
  low, high = late["choice_kl_interval"]
  assert (low + high) / 2 == pytest.approx(0.03, abs=0.002)
  assert high - low == pytest.approx(2 * 1.96 * 0.3 * (0.1 * 0.9 / 100) ** 0.5 / 2, rel=0.15)
  assert f"0.030 [{low:.3f}, {high:.3f}]" in figures.markdown(table, [512])
  heading, _, late, ftp = figures.equal_latency(table, 512, "choice_kl").splitlines()
  assert heading.startswith("| KL of choices at the time of ftp, 512 tokens") and late == "| late | [0.015] |"
  assert ftp == "| ftp | 0.020 |" and not figures.equal_latency(table, 512, "retrieval")
  assert not figures.equal_latency(table[:2], 512, "choice_kl")


def test_differences_to_ftp_are_paired(figures):
  """Of both methods the same ten items differ from dense, so that the interval is that of a third of their figures."""
  rows = [cell("dense", 0.0, 0, 0.85, 0.80, 0.0, 1.0)]
  rows += [cell("late", 0.3, 0, 0.75, 0.80, 0.1, 2.0), cell("ftp", 0.3, 0, 0.85, 0.80, 0.1, 4 / 3)]
  for row, kl in zip(rows, (0.0, 0.3, 0.2)):
    row["choice_kl"] = {task: {str(i): kl * (i < 10) for i in range(100)} for task in GUESS}
    row["same_choice"] = {task: {str(i): 1.0 - (kl > 0.2 and i < 10) for i in range(100)} for task in GUESS}
  dense, late, ftp = figures.summarise(rows, GUESS, [512])
  assert dense["choice_kl_to_ftp"] is ftp["choice_kl_to_ftp"] is None
  mean, low, high = late["choice_kl_to_ftp"]
  assert mean == pytest.approx(0.01) and low > 0
  assert high - low == pytest.approx(2 * 1.96 * 0.1 * (0.1 * 0.9 / 100) ** 0.5 / 2**0.5, rel=0.15)
  assert late["same_choice_to_ftp"][0] == pytest.approx(-0.1) and late["average_to_ftp"][0] == pytest.approx(-0.05)
  better = rows[2] | {"seed": 1, "choice_kl": {task: dict.fromkeys(map(str, range(100)), 0.0) for task in GUESS}}
  of_seeds = figures.summarise([*rows, better], GUESS, [512])
  assert of_seeds[1]["choice_kl_to_ftp"][0] == pytest.approx(0.02) and of_seeds[2]["choice_kl_seeds"] == 2
  heading, _, line = figures.differences_to_ftp([dense, late, ftp]).splitlines()
  assert heading == "| method - ftp | S | average | same choice % | KL of choices |"
  assert line.startswith("| late | 0.30 | -5.0 [-") and f"+0.010 [{low:+.3f}, {high:+.3f}]" in line
  assert not figures.differences_to_ftp([dense, ftp])


def test_what_is_above_chance_needs_a_margin(figures):
  rows = [cell("dense", 0.0, 0, 0.30, 0.55, 0.0, 1.0), cell("ftp", 0.3, 0, 0.30, 0.50, 0.1, 1.3)]
  dense, ftp = figures.summarise(rows, GUESS, [512])  # the dense average is 0.05 above chance, at an error of 0.034
  assert dense["retained_above_chance"] is ftp["retained_above_chance"] is ftp["retained_above_chance_interval"] is None
  assert ftp["retained"] == pytest.approx(0.40 / 0.425)


def test_parts_that_are_missing_leave_the_others(figures):
  rows = [cell("dense", 0.0, 0, 0.85, 0.80, 0.0, 1.0)]
  rows += [cell("ftp", 0.3, seed, 0.75, 0.80, 0.1 * seed, 1.3) for seed in range(3)]
  rows[1]["quality"], rows[2]["correct"], rows[3]["speedup"] = {}, {}, {512: None}
  ftp = figures.summarise(rows, GUESS, [512])[1]
  assert (ftp["kl_seeds"], ftp["average_seeds"], ftp["speedup_512_seeds"]) == (2, 2, 2)
  assert ftp["kl"] == pytest.approx(0.15) and ftp["average"] == pytest.approx(0.775)
  assert figures.summarise(rows[1:], GUESS, [512])[0]["retained"] is None


def test_columns_that_nothing_fills_are_left_out(figures):
  rows = [cell("dense", 0.0, 0, 0.5, 0.5, 0.0, 1.0), cell("late", 0.3, 0, 0.5, 0.5, 2e5, None)]
  heading, _, dense, late = figures.markdown(figures.summarise(rows, {}, [512]), [512]).splitlines()
  assert heading == "| method | S | KL | agreement % | achieved % | FLOPs saved % | KV bytes | speedup at 512 |"
  assert dense == "| dense | 0.00 | 0.000 | 100.0 | 0.0 | 0.0 | 1.00 | 1.00 |"
  assert late == "| late | 0.30 | 2.0e+05 | 100.0 | 30.0 | 30.0 | 1.00 | - |"


def test_equal_latency_by_hand(figures):
  rows = [
      cell("dense", 0.0, 0, 0.85, 0.80, 0.0, 1.0),
      cell("late", 0.2, 0, 0.75, 0.80, 0.1, 1.25),  # time 0.8
      cell("late", 0.4, 0, 0.65, 0.80, 0.5, 2.0),  # time 0.5
      cell("ftp", 0.2, 0, 0.80, 0.80, 0.04, 1 / 0.9),
      cell("ftp", 0.4, 0, 0.70, 0.80, 0.2, 1 / 0.6),
      cell("ftp", 0.5, 0, 0.70, 0.80, 0.3, 4.0),
  ]
  heading, _, late, ftp = figures.equal_latency(figures.summarise(rows, GUESS, [512]), 512, "kl").splitlines()
  assert heading == "| at the time of ftp, 512 tokens | S = 0.20, 1.11 x | S = 0.40, 1.67 x | S = 0.50, 4.00 x |"
  # Half way between dense and 0.8; two thirds of the way from 0.8 to 0.5; never that fast.
  assert late == "| late | [0.050] (80.0 %) | 0.367 (74.2 %) | - |"
  assert ftp == "| ftp | 0.040 (80.0 %) | 0.200 (75.0 %) | 0.300 (75.0 %) |"
  slower = [*rows[:1], cell("late", 0.2, 0, 0.75, 0.80, 0.1, 0.8), *rows[2:]]  # its slowest point is beyond dense
  *_, late, _ = figures.equal_latency(figures.summarise(slower, GUESS, [512]), 512, "kl").splitlines()
  assert late.startswith("| late | 0.100 (")


def test_files_of_long_contexts_at_equal_latency(figures):
  """Each file has its own columns and its own table at equal time, without accuracy."""
  rows = [
      cell("dense", 0.0, 0, 0.85, 0.80, 0.0, 1.0),
      cell("late", 0.2, 0, 0.75, 0.80, 0.1, 1.25),
      cell("ftp", 0.2, 0, 0.80, 0.80, 0.04, 1 / 0.9),
  ]
  for row, kl in zip(rows, (0.0, 0.3, 0.06)):
    row["long"]["speeches"] = {"kl": kl, "agreement": 1 - kl, "achieved": row["asked"] / 2}
  table = figures.summarise(rows, GUESS, [512])
  heading, _, late, ftp = figures.equal_latency(table, 512, "kl, speeches").splitlines()
  assert heading.startswith("| KL, speeches, at the time of ftp, 512 tokens | S = 0.20")
  assert late == "| late | [0.150] |" and ftp == "| ftp | 0.060 |"
  heading, _, _, late, _ = figures.markdown(table, [512], ["speeches"]).splitlines()
  start = heading.split(" | ").index("KL, speeches")
  assert heading.split(" | ")[start + 1 : start + 3] == ["agreement %, speeches", "skipped there %"]
  assert late.split(" | ")[start : start + 3] == ["0.300", "70.0", "10.0"]


def test_the_plot_has_a_panel_of_what_is_there(figures, tmp_path, monkeypatch):
  """And in it every method that has a figure, runs that were named beside `ftp` in its colour."""
  drawn, make = [], figures.new_figure
  monkeypatch.setattr(figures, "new_figure", lambda *shape: drawn.append(make(*shape)) or drawn[-1])
  rows = [cell("dense", 0.0, 0, 0.5, 0.5, 0.0, 1.0), cell("late", 0.3, 0, 0.4, 0.5, 0.2, 1.3)]
  path = tmp_path / "plot.png"

  def panels(guess):
    figures.plot(figures.summarise(rows, guess, [512]), 512, path, figures.long_names(rows))
    return drawn[-1][1][0]

  assert len(panels({})) == 1 and path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
  assert len(panels(GUESS)) == 2
  rows[1]["long"] = {"chats": {"kl": 0.3}}
  assert len(panels(GUESS)) == 3
  rows[1]["quality"] = {}
  assert len(panels({})) == 1
  for row, kl in zip(rows, (0.0, 0.2)):
    row["choice_kl"] = {task: dict.fromkeys(map(str, range(100)), kl) for task in GUESS}
    row["same_choice"] = row["choice_kl"]
  assert len(panels(GUESS)) == 3
  rows += [cell("no_maps", 0.3, 0, 0.4, 0.5, 0.2, 1.3), cell("ftp", 0.3, 0, 0.4, 0.5, 0.1, 1.3)]
  first, *_, last = panels(GUESS)
  lines, names = first.get_legend_handles_labels()
  colors = {name: line.lines[0].get_color() for name, line in zip(names, lines)}
  assert set(colors) == {"FTP", "no maps"} and len(set(colors.values())) == 1  # late has no KL any more
  assert [text.get_text() for text in last.get_legend().get_texts()] == ["FTP", "no maps", "late blocks"]
  figures.plot(figures.summarise(rows[:1], GUESS, [512]), 512, tmp_path / "none.png")
  assert not (tmp_path / "none.png").exists()


def test_every_baseline_has_a_look(figures):
  assert set(figures.LOOKS) == set(scripts.load("main_table").METHODS)
  looks = [look for _, *look in figures.LOOKS.values()]
  assert len({tuple(look) for look in looks}) == len(looks)


IN_README = {
    "FTP": "ftp", "FTP without maps": "ftp_no_maps", "late blocks with maps": "late_maps", "late blocks": "late",
    "SkipGPT": "skipgpt", "truncation": "truncation", "FastV": "fastv", "ShortGPT": "shortgpt",
    "Mixture-of-Depths": "mod", "BlockPruner": "blockpruner",
}


def test_readme_says_what_the_records_say(figures):
  root = pathlib.Path(__file__).parents[1]
  table = json.loads((root / "docs" / "results" / "main_table.json").read_text())["table"]
  at = {(entry["method"], entry["asked"]): entry for entry in table}

  def rows(text):
    """(name, three figures) of every such row of a table, without bold letters and what is in parentheses."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[re.sub(r"\*|\(.*?\)|:.*", "", cell).strip() for cell in line] for line in lines if len(line) == 4]

  def shown(entry, figure="kl"):
    spread, digits = entry[f"{figure}_spread"] or 0, 4 if figure == "kl" and 0 < entry[figure] < 0.01 else 3
    return f"{entry[figure]:.{digits}f}" + (f" ± {spread:.{digits}f}" if round(spread, digits) else "")

  readme = rows((root / "README.md").read_text())
  of_name = lambda name: [figures for first, *figures in readme if first == name]
  equal = {name: values for name, *values in rows(figures.equal_latency(table, 2048, "kl"))}
  for name, method in IN_README.items():
    found = of_name(name)
    if name not in ("Mixture-of-Depths", "BlockPruner"):  # in the second table alone
      assert [shown(at[method, s]) for s in (0.22, 0.3, 0.4)] in found, name
    assert equal[method] in found, name
  page = (root / "docs" / "results.md").read_text()
  lines = [re.sub(r"\*", "", line).strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
  for (method, asked), entry in at.items():
    speed = f"{entry['speedup_2048']:.2f} (" if method != "dense" else "-"
    found = [line for line in lines if len(line) == 10 and line[:2] == [method, f"{asked:.2f}"]]
    assert [line[4] for line in found] == [shown(entry)] and found[0][8].startswith(speed), (method, asked)
  tasks = {key: entry for key, entry in at.items() if entry["choice_kl_interval"]}
  for (method, asked), entry in tasks.items():
    low, high = entry["choice_kl_interval"]
    found = [line for line in lines if len(line) == 9 and line[:2] == [method, f"{asked:.2f}"]]
    assert [line[6] for line in found] == [f"{shown(entry, 'choice_kl')} [{low:.3f} to {high:.3f}]"], (method, asked)
  assert {(name, s) for name in ("ftp", "late_maps", "truncation") for s in (0.22, 0.3, 0.4)} <= set(tasks)
  speeds = [f"{at['ftp', s]['speedup_2048']:.2f} x" for s in (0.22, 0.3, 0.4)]
  assert speeds in of_name("FTP's prefill speed at 2,048 tokens, one seed")
  assert [f"{100 * at['ftp', s]['agreement']:.1f} %" for s in (0.22, 0.3, 0.4)] in of_name(
      "FTP's agreement with the dense next token"
  )
