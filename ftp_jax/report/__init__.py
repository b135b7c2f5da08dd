"""Run directory -> results.json, results.csv, plots/*.png, report.html and the table on the terminal."""

import json
import os

from ml_collections import ConfigDict

from ftp_jax.files import replacing
from ftp_jax.machine import describe_machine
from ftp_jax.report import html, plots, tables
from ftp_jax.report.rundir import read_run
from ftp_jax.stages import read_json


def results(workdir: str, config: ConfigDict) -> dict:
  """Everything that was measured, ready for JSON: machine, config, records and their aggregation over seeds.

  Raises:
    UserError: the run was not evaluated.
  """
  records = tables.read_records(workdir)
  return {
      "machine": measured_on(workdir),
      "config": config.to_dict(),
      "records": records,
      "aggregated": tables.aggregate(records),
  }


def measured_on(workdir: str) -> dict:
  """The machine of the last evaluation; runs of earlier versions do not know it, and it is taken to be this one."""
  path = os.path.join(workdir, "evaluate", "machine.json")
  return read_json(path) if os.path.exists(path) else describe_machine()


def write_report(workdir: str, config: ConfigDict) -> str:
  """Writes all reports of a finished run into its directory; returns the table as plain text.

  Raises:
    UserError: a stage that the report needs has not run; the message names it.
  """
  found = results(workdir, config)
  run = read_run(workdir, config)
  with replacing(os.path.join(workdir, "results.json")) as file:
    file.write(json.dumps(found, indent=2).encode())
  tables.write_csv(found["aggregated"], os.path.join(workdir, "results.csv"))
  tables.write_redundancy(run.redundancy, os.path.join(workdir, "redundancy.csv"))
  figures = plots.write_plots(run, found["aggregated"], os.path.join(workdir, "plots"))
  html.write_html(found, run, figures, os.path.join(workdir, "report.html"))
  return tables.format_table(found["aggregated"])
