"""The main table's arithmetic on hand-made cells."""

import importlib.util
import json
import pathlib

import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "experiments" / "main_table.py"


@pytest.fixture(scope="module")
def script():
  spec = importlib.util.spec_from_file_location("main_table", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def cell(method, asked, seed, easy, hard, kl, speedup):
  quality = {"kl": kl, "agreement": 1.0, "perplexity": None, "achieved": asked, "flops_saved": asked}
  return {
      "method": method, "asked": asked, "seed": seed, "quality": quality | {"cache_ratio": 1.0},
      "accuracy": {"arc_easy": easy, "winogrande": hard}, "speedup": {"512": speedup},
  }  # fmt: skip


GUESS = {"arc_easy": 0.25, "winogrande": 0.5}


def test_retention_and_spread_by_hand(script):
  rows = [
      cell("dense", 0.0, 0, 0.55, 0.60, 0.0, 1.0),  # average 0.575, chance 0.375
      cell("ftp", 0.3, 0, 0.45, 0.60, 0.1, 1.3),  # average 0.525
      cell("ftp", 0.3, 1, 0.55, 0.60, 0.3, 1.3),
  ]
  dense, ftp = script.summarise(rows, GUESS, ["512"])
  assert dense["retained"] == dense["retained_above_chance"] == 1 and dense["seeds"] == 1 and dense["kl_spread"] is None
  assert ftp["seeds"] == 2 and ftp["average"] == pytest.approx(0.55)
  assert ftp["retained"] == pytest.approx(0.55 / 0.575)
  assert ftp["retained_above_chance"] == pytest.approx((0.75 + 1.0) / 2)
  assert ftp["kl"] == pytest.approx(0.2) and ftp["kl_spread"] == pytest.approx(0.02**0.5)
  assert script.summarise(rows[1:], GUESS, ["512"]) == []


def test_columns_that_nothing_fills_are_left_out(script):
  rows = [cell("dense", 0.0, 0, 0.5, 0.5, 0.0, 1.0), cell("late", 0.3, 0, 0.5, 0.5, 2e5, None)]
  heading, _, dense, late = script.markdown(script.summarise(rows, {}, ["512"]), ["512"]).splitlines()
  assert heading == "| method | S | KL | agreement % | achieved % | FLOPs saved % | KV bytes | speedup at 512 |"
  assert dense == "| dense | 0.00 | 0.000 | 100.0 | 0.0 | 0.0 | 1.00 | 1.00 |"
  assert late == "| late | 0.30 | 2.0e+05 | 100.0 | 30.0 | 30.0 | 1.00 | - |"


def test_jobs_are_those_that_were_asked_for(script, tmp_path):
  item = {"context": "Which is a metal?", "choices": ["wood", "iron"], "label": 1}
  (tmp_path / "arc_easy.jsonl").write_text(json.dumps(item) + "\n")
  both = script.jobs_of(["arc_easy"], str(tmp_path), 100, 2, [256, 512])
  assert [(job.name, job.settings["limit"]) for job in both] == [("arc_easy", 100), ("retrieval", 2)]
  assert both[1].settings["lengths"] == (256, 512)
  assert [job.name for job in script.jobs_of([], str(tmp_path), 100, 2, [256])] == ["retrieval"]
  assert [job.name for job in script.jobs_of(["arc_easy"], str(tmp_path), 100, 0, [])] == ["arc_easy"]


def test_the_plot_is_drawn_with_and_without_tasks(script, tmp_path):
  rows = [cell("dense", 0.0, 0, 0.5, 0.5, 0.0, 1.0), cell("late", 0.3, 0, 0.4, 0.5, 0.2, 1.3)]
  for guess in ({}, GUESS):
    path = tmp_path / f"{len(guess)}.png"
    script.plot(script.summarise(rows, guess, ["512"]), "512", path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
