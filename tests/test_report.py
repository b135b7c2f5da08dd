"""The report of a hand-made run directory."""

import csv
import errno
import json
import math
import re
import shutil

import matplotlib.image
import numpy as np
import pytest

from ftp_jax import files, report
from ftp_jax.config import get_config
from ftp_jax.errors import UserError
from ftp_jax.report import html, plots, tables
from ftp_jax.report.rundir import cell_directory, read_run

BLOCKS, CONTEXT = 12, 14
TOKENS = "<|im_start|> user Ċ What Ġis Ġ$ 2 ^ 3 $ ? 日 Ġunbelievably-long Ġend x".split()
KL = {
    "truncation": 1.5, "random": 8.0, "static_uniform": 6.0, "static_ga": 0.45, "dynamic_ga": 0.4,
    "dynamic_finetuned": 0.37,
}


def record(method, asked, seed, kl, **changes):
  values = dict(
      method=method, asked=asked, seed=seed, kl=kl, kl_stderr=0.1 * kl, nll=1.4 + kl, agreement=0.9, perplexity=20.0,
      achieved=asked, flops_saved=0.9 * asked, prompts=64, schedule=None,
  )
  return {**values, **changes}


def make_run(workdir, config):
  """Writes what the stages of a run leave, with invented figures."""
  rng = np.random.default_rng(0)

  def write(path, value, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(v) + "\n" for v in value) if lines else json.dumps(value))

  similarity = np.linspace(0.6, 0.99, BLOCKS).tolist()
  redundancy = {"num_sequences": 16, "length": 64, "similarity_mean": similarity, "share_above_0.8": similarity}
  shares = {"share_above_0.8_all": 0.93, "share_above_0.8_edge": 0.5, "share_above_0.8_middle": 0.99}
  write(workdir / "importance" / "redundancy.json", redundancy | shares)
  write(workdir / "importance" / "fisher.json", np.geomspace(1e-2, 1e-5, BLOCKS).tolist())
  records = [record("dense", 0.0, None, 0.0)]
  for s in config.sparsities:
    for method, kl in KL.items():
      seeds = (None,) if method in ("truncation", "static_uniform") else config.seeds
      records += [record(method, s, seed, kl * s * rng.uniform(0.9, 1.1)) for seed in seeds]
    for seed in config.seeds:
      cell = workdir.joinpath(cell_directory(str(workdir), s, seed))
      for stage, generations in (("search", 13), ("finetune", 8)):
        schedule = np.clip(np.linspace(-0.6, 0.9, BLOCKS) + rng.normal(0, 0.1, BLOCKS) + s - 0.15, 0, 0.975)
        write(cell / stage / "schedule.json", schedule.tolist())
        history = [
            {"generation": g, "best_fitness": 0.1 + 0.2 / (g + 1), "mean_fitness": 0.2 + 3 / (g + 1),
             "best_validation": 0.12 + 0.2 / (g + 1) + 0.01 * seed}
            for g in range(generations)
        ]
        write(cell / stage / ("round0" if stage == "finetune" else "") / "metrics.jsonl", history, lines=True)
      training = []
      for step in range(60):
        training.append({
            "step": step, "loss": 1.0, "distill": 0.2 + 0.3 / (step + 1) + rng.uniform(0, 0.05),
            "sparsity": 0.02 / (step + 1), "guide": 0.6 * 0.97**step, "grad_norm": 1.0, "guide_weight": 1.0,
            "asked": [s] * BLOCKS, "achieved": [s] * BLOCKS,
        })
        if step % 10 == 9:
          training.append({"step": step, "validation_kl": 0.2 + 0.2 / step})
      write(cell / "train" / "metrics.jsonl", training, lines=True)
      keep = rng.random((BLOCKS, CONTEXT)) > np.linspace(0, 0.9, BLOCKS)[:, None]
      prompts = [
          {"tokens": TOKENS, "context": m, "keep": keep[:, :m].astype(int).tolist()} for m in (CONTEXT, CONTEXT - 5)
      ]
      write(cell / "evaluate" / "routes.json", {"prompts": prompts})
  write(workdir / "evaluate" / "records.json", records)


def make_config(seeds, sparsities):
  config = get_config()
  config.seeds, config.sparsities = seeds, sparsities
  return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(workdir, config, table) of a reported run with two sparsities and two seeds."""
  workdir, config = tmp_path_factory.mktemp("run"), make_config((0, 1), (0.3, 0.4))
  make_run(workdir, config)
  return workdir, config, report.write_report(str(workdir), config)


def test_a_schedule_that_no_search_found_is_named():
  names = [tables.method_label(row) for row in tables.aggregate([
      record("static_ga", 0.3, 0, 0.1, schedule="late"), record("dynamic_ga", 0.3, 0, 0.1, schedule="ga"),
      record("truncation", 0.3, None, 0.1),
  ])]
  assert names == ["truncation", "static + late", "dynamic + GA"]


def test_mean_and_spread_over_seeds():
  rows = tables.aggregate([
      record("dynamic_ga", 0.3, 0, 0.2, perplexity=10.0), record("dynamic_ga", 0.3, 1, 0.4, perplexity=12.0),
      record("truncation", 0.3, None, 0.5, perplexity=None), record("dense", 0.0, None, 0.0),
  ])
  assert [row["method"] for row in rows] == ["dense", "truncation", "dynamic_ga"]
  truncation, dynamic = rows[1:]
  assert dynamic["seeds"] == 2 and dynamic["kl"] == pytest.approx(0.3) and dynamic["perplexity"] == 11.0
  assert dynamic["kl_std"] == pytest.approx(math.sqrt(0.02))  # sqrt(((-0.1)^2 + 0.1^2) / (2 - 1))
  assert dynamic["kl_stderr"] == pytest.approx(0.03)
  assert truncation["kl_std"] is None and truncation["perplexity"] is None


def test_a_broken_figure_is_shown_not_hidden():
  rows = tables.aggregate([record("random", 0.3, 0, float("nan")), record("random", 0.3, 1, 1.0)])
  assert math.isnan(rows[0]["kl"]) and rows[0]["kl_std"] is None
  assert "nan" in tables.format_table(rows)


def test_rows_as_text():
  rows = tables.aggregate([
      record("dynamic_ga", 0.3, 0, 0.2, achieved=0.29), record("dynamic_ga", 0.3, 1, 0.4, achieved=0.31),
      record("truncation", 0.3, None, 0.5, perplexity=None),
  ])
  assert tables.cells(rows[0]) == ("truncation", "0.30", "30.0 %", "27.0 %", "0.5000", "1.9000", "90.0 %", "-", "1")
  assert tables.cells(rows[1])[2] == "30.0 ± 1.4 %"
  assert tables.cells(rows[1])[4] == "0.3000 ± 0.1414"


def test_table_columns_are_aligned(run):
  lines = run[2].splitlines()
  table = [line for line in lines[:-1] if not line.startswith("---")]
  assert len(table) == 1 + 1 + 2 * len(KL)  # heading, dense, every method at both sparsities
  assert len({len(line) for line in table}) == 1
  assert lines[-1] == tables.NOTE


def test_results_files(run):
  workdir, config, _ = run
  results = json.loads((workdir / "results.json").read_text())
  assert results["machine"]["cores"] >= 1 and results["machine"]["device"] == "cpu"
  assert results["config"]["data"]["num_test"] == config.data.num_test
  assert len(results["records"]) == 1 + 2 * (2 + 4 * 2)
  with open(workdir / "results.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == len(results["aggregated"])
  assert float(rows[-1]["kl"]) == results["aggregated"][-1]["kl"] and rows[0]["kl_std"] == ""


def test_a_full_disk_leaves_the_report_of_before(run, tmp_path, monkeypatch):
  workdir, config, _ = run
  shutil.copytree(workdir, tmp_path / "run")
  report.write_report(str(tmp_path / "run"), config)
  names = "results.json", "results.csv", "redundancy.csv", "report.html"
  before = {name: (tmp_path / "run" / name).read_bytes() for name in names}

  def full(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(files.os, "fsync", full)
  writers = (
      lambda path: report.write_report(str(tmp_path / "run"), config), lambda path: tables.write_csv([{"a": 1}], path),
      lambda path: tables.write_redundancy(read_run(workdir, config).redundancy, path),
      lambda path: html.write_html(report.results(str(workdir), config), read_run(workdir, config), [], path),
  )
  for name, write in zip(names, writers):
    with pytest.raises(UserError, match=f"no space left to write to .*{name}"):
      write(str(tmp_path / "run" / name))
  assert {name: (tmp_path / "run" / name).read_bytes() for name in names} == before


def test_plots_are_drawn(run):
  names = {"methods", "schedules", "search", "training", "redundancy", "routes_S0.30", "routes_S0.40"}
  files = {path.stem: path for path in (run[0] / "plots").iterdir()}
  assert set(files) == names
  for path in files.values():
    pixels = matplotlib.image.imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 200
    colours = (pixels * 255).round().astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    assert len(np.unique(colours)) > 20  # more than an empty sheet


def test_route_plot_shows_the_map(run):
  """The colour of every cell is its gate, row 0 is block 0."""
  workdir, config, _ = run
  prompts = read_run(str(workdir), config).cells[0].prompts
  figure, _ = plots.plot_routes(prompts)
  for axes, prompt in zip(figure.axes, prompts):
    np.testing.assert_array_equal(axes.collections[0].get_array(), prompt["keep"])
    assert len(axes.get_xticklabels()) == prompt["context"]
  assert [label.get_text() for label in figure.axes[0].get_xticklabels()][4:7] == ["·is", "·$", "2"]


def test_one_sparsity_is_drawn_as_a_ranking():
  rows = tables.aggregate([record(method, 0.3, None, kl) for method, kl in KL.items()])
  figure, _ = plots.plot_methods(rows)
  labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
  assert labels[0] == "random" and labels[-1] == "dynamic + fine-tuned"


def test_a_schedule_that_was_not_searched_has_no_search_curve(tmp_path):
  config = make_config((0,), (0.3,))
  make_run(tmp_path, config)
  config.search.schedule = "uniform"
  (tmp_path / "S0.30" / "seed0" / "search" / "metrics.jsonl").unlink()
  figure, _ = plots.plot_search(read_run(str(tmp_path), config))
  assert [axes.get_title() for axes in figure.axes] == ["S = 0.30, fine-tuning (trained router)"]


def test_a_run_without_any_search_or_scores_is_reported(tmp_path):
  config = make_config((0,), (0.3,))
  make_run(tmp_path, config)
  config.search.schedule, config.finetune.rounds = "uniform", 0
  shutil.rmtree(tmp_path / "S0.30" / "seed0" / "finetune" / "round0")
  (tmp_path / "importance" / "fisher.json").unlink()
  report.write_report(str(tmp_path), config)
  assert not (tmp_path / "plots" / "search.png").exists() and (tmp_path / "plots" / "redundancy.png").exists()


def test_rounds_of_finetuning_stand_side_by_side(tmp_path):
  config = make_config((0,), (0.3,))
  make_run(tmp_path, config)
  config.finetune.rounds = 2
  finetune = tmp_path / "S0.30" / "seed0" / "finetune"
  shutil.copytree(finetune / "round0", finetune / "round1")
  figure, _ = plots.plot_search(read_run(str(tmp_path), config))
  assert [axes.get_title().partition(", ")[2] for axes in figure.axes] == [
      "search (static router)", "fine-tuning (trained router), round 1", "fine-tuning (trained router), round 2",
  ]


def test_html_is_self_contained(run):
  page = (run[0] / "report.html").read_text()
  assert page.count("data:image/png;base64,") == 7
  assert not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page
  assert page.count('class="best"') + page.count('class="first best"') == 2  # one at each S
  assert "dynamic + fine-tuned" in page and "&quot;num_test&quot;" in page


@pytest.mark.parametrize(
    "piece, stage",
    [
        ("evaluate/records.json", "evaluate"),
        ("importance/redundancy.json", "importance"),
        ("S0.40/seed1/search/schedule.json", "search"),
        ("S0.40/seed1/train/metrics.jsonl", "train"),
        ("S0.40/seed1/finetune/schedule.json", "finetune"),
        ("S0.40/seed1/finetune/round0/metrics.jsonl", "finetune"),
        ("S0.40/seed1/evaluate/routes.json", "evaluate"),
    ],
)
def test_missing_piece_names_its_stage(run, tmp_path, piece, stage):
  shutil.copytree(run[0], tmp_path / "copy")
  (tmp_path / "copy" / piece).unlink()
  with pytest.raises(UserError, match=f"{re.escape(piece)} is missing; run the stage '{stage}' first"):
    report.write_report(str(tmp_path / "copy"), run[1])


def test_damaged_and_foreign_records_are_refused(tmp_path):
  config = make_config((0,), (0.3,))
  make_run(tmp_path, config)
  records = tmp_path / "evaluate" / "records.json"
  records.write_text('[{"method": "dense"')
  with pytest.raises(UserError, match="damaged.*'evaluate'"):
    report.write_report(str(tmp_path), config)
  records.write_text(json.dumps([record("magic", 0.3, 0, 0.1)]))
  with pytest.raises(UserError, match="no records of known methods"):
    report.write_report(str(tmp_path), config)
