"""One self-contained page: table, plots (embedded), machine and config. No script, nothing loaded from elsewhere."""

import base64
import datetime
import html
import json
import pathlib

from ftp_jax.files import replacing
from ftp_jax.report import tables
from ftp_jax.report.plots import Plot
from ftp_jax.report.rundir import Run
from ftp_jax.routing.config import RoutingConfig

_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 66rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.facts, figcaption, .note { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 2px solid #1c1c1c; } tr.first td { border-top: 1px solid #bbb; }
tr.best td { font-weight: 600; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
pre { background: #f6f6f4; padding: 1rem; overflow-x: auto; font-size: .85rem; }
"""


def write_html(results: dict, run: Run, plots: list[Plot], path: str) -> None:
  """Writes the page.

  Args:
    results: machine, config, records and aggregated rows (`report.results`).
    run: what the stages left.
    plots: written PNG files, embedded in this order.
  """
  config, machine = results["config"], results["machine"]
  escape = html.escape
  seeds = len(config["seeds"])
  kv = RoutingConfig(**config["routing"]).kv
  facts = (
      f"{len(run.cells[0].schedule)} blocks · S = {', '.join(f'{s:.2f}' for s in config['sparsities'])} · "
      f"{seeds} seed{'s' if seeds > 1 else ''} · {kv} · data: {config['data']['source']}"
  )
  place = (
      f"{machine['devices']} × {machine['device']}, {machine['cpu']}, {machine['cores']} cores, "
      f"{machine['memory_gb']} GB, jax {machine['jax']}, Python {machine['python']}"
  )
  redundancy = tables.redundancy_cells(run.redundancy)
  written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
  figures = "\n".join(
      f'<h2>{escape(plot.title)}</h2>\n<figure><img alt="{escape(plot.title)}" src="{_data_uri(plot.path)}">'
      f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
      for plot in plots
  )
  page = f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>ftp_jax: {escape(config["model"]["source"])}</title><style>{_CSS}</style></head>
<body>
<h1>Token-wise pruning of {escape(config["model"]["source"])}</h1>
<p class="facts">{escape(facts)}<br>{escape(place)}<br>{escape(written)}</p>
<h2>Results</h2>
<div class="wide">{_table(results["aggregated"])}</div>
<p class="note">{escape(tables.NOTE[0].upper() + tables.NOTE[1:])}. Bold: lowest KL at its S.</p>
{figures}
<details><summary>Redundancy of each block</summary>{_plain(tables.REDUNDANCY_HEADINGS, redundancy)}</details>
<h2>Config</h2>
<details><summary>All keys of this run</summary><pre>{escape(json.dumps(config, indent=2))}</pre></details>
</body>
</html>
"""
  with replacing(path) as file:
    file.write(page.encode())


def _line(tag: str, texts) -> str:
  return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _plain(headings, rows) -> str:
  body = "".join(f"<tr>{_line('td', row)}</tr>" for row in rows)
  return f"<table><thead><tr>{_line('th', headings)}</tr></thead><tbody>{body}</tbody></table>"


def _table(rows: list[dict]) -> str:
  best = {}
  for row in rows:
    if row["method"] != "dense" and (row["asked"] not in best or row["kl"] < best[row["asked"]]["kl"]):
      best[row["asked"]] = row
  body, previous = [], None
  for row in rows:
    classes = ["first"] * (row["asked"] != previous) + ["best"] * (best.get(row["asked"]) is row)
    body.append(f'<tr class="{" ".join(classes)}">{_line("td", tables.cells(row))}</tr>')
    previous = row["asked"]
  return f"<table><thead><tr>{_line('th', tables.HEADINGS)}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _data_uri(path: str) -> str:
  return "data:image/png;base64," + base64.b64encode(pathlib.Path(path).read_bytes()).decode()
