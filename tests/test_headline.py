"""The plot and the table of README.md come from the records beside the docs."""

import pathlib

import pytest

from tests import scripts

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def headline():
  return scripts.load("headline")


def test_times_are_medians_over_all_runs(headline):
  record = lambda method, *seconds: {"method": method, "seconds": list(seconds)}
  runs = [
      {"S": 0.3, "records": [record("dense", 4.0, 5.0, 6.0), record("late", 2.0, 2.0, 9.0)]},
      {"S": 0.3, "records": [record("dense", 6.0, 7.0), record("late", 3.0, 3.0)]},
      {"S": 0.4, "records": [record("dense", 8.0), record("late", 2.0)]},
  ]
  found = headline.speedups(runs)
  assert found == {("dense", 0.3): 1.0, ("late", 0.3): 2.0, ("dense", 0.4): 1.0, ("late", 0.4): 4.0}


def test_readme_says_what_the_records_say(headline, tmp_path):
  found = headline.entries(ROOT / "docs" / "results")
  table = headline.table_figures.equal_latency(found, headline.CONTEXT, "kl")

  def rows(text):
    """(name, three figures) of every such row of a table, without what is in parentheses."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [tuple(cell.partition("(")[0].strip(" *") for cell in line) for line in lines if len(line) == 4]

  readme = rows((ROOT / "README.md").read_text())
  shown = [row for row in rows(table) if headline.NAMES.get(row[0], [None])[0] in [name for name, *_ in readme]]
  assert {"ftp, maps", "late_maps", "ftp", "late", "skipgpt", "truncation"} <= {name for name, *_ in shown}
  for name, *figures in shown:
    assert (headline.NAMES[name][0], *figures) in readme
  own = [entry for entry in found if entry["method"] == "ftp, maps"]
  means = [f"{entry['kl']:.3f} ± {entry['kl_spread']:.3f}" for entry in sorted(own, key=lambda entry: entry["asked"])]
  assert ("FTP with maps", *means) in readme
  headline.plot(found, tmp_path / "plot.png")
  assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
