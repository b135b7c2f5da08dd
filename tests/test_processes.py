"""A whole run in two real processes of four devices each, against one process with one device."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from ftp_jax import pipeline
from ftp_jax.export import artifact
from tests.conftest import QUICK_COMPILATION
from tests.test_pipeline import model_directory, tiny_run  # noqa: F401

MESH = dict(data=2, fsdp=2, tensor=2)


def run_in_two(config, directory):
  """Runs what the directory's own config.json says; both processes' (exit status, stderr)."""
  directory.mkdir(exist_ok=True)
  (directory / "config.json").write_text(config.to_json())
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  flags = f"--xla_force_host_platform_device_count=4 {QUICK_COMPILATION}"
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  command = [
      sys.executable, "-m", "ftp_jax.cli", "run", f"--workdir={directory}", f"--coordinator=localhost:{port}",
      "--num-processes=2",
  ]
  started = [
      subprocess.Popen([*command, f"--process-id={i}"], env=environment, stderr=subprocess.PIPE, text=True)
      for i in range(2)
  ]
  ends = [process.communicate()[1] for process in started]
  return [(process.returncode, end) for process, end in zip(started, ends)]


@pytest.fixture(scope="module")
def both(model_directory, tmp_path_factory):  # noqa: F811
  alone, shared = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("shared")
  config = tiny_run(model_directory)
  # One router for all blocks: of the 9,992 weights of one for each, the guided warm-up moves one by 1.5e-5 with nothing
  # but the compiler's optimisation level changed, on a single device. tests/test_sharding.py trains those on a mesh.
  config.router.kind = "global"
  config.stand_in.rank = 32  # the hidden size: the axes of a part of it may turn with rounding
  pipeline.run(config, str(alone), pipeline.STAGES[:-1])
  config.mesh.update(MESH)
  ends = run_in_two(config, shared)
  assert [status for status, _ in ends] == [0, 0], ends
  return alone, shared, ends


def test_two_processes_find_what_one_finds(both):
  alone, shared, _ = both
  cell = "S0.25/seed0"
  for stage in ("search", "finetune"):
    assert (alone / cell / stage / "schedule.json").read_text() == (shared / cell / stage / "schedule.json").read_text()
  for name in ("train", "finetune"):
    got, want = (artifact.load_weights(d / cell / name / "router.safetensors") for d in (shared, alone))
    for layer in want:
      for leaf in want[layer]:
        np.testing.assert_allclose(got[layer][leaf], want[layer][leaf], rtol=1e-5, atol=1e-5)
  assert (shared / "report.html").exists()
  got, want = (json.loads((d / "evaluate" / "records.json").read_text()) for d in (shared, alone))
  assert [r["method"] for r in got] == [r["method"] for r in want] and len(want) == 7
  for a, b in zip(got, want):
    for name in ("kl", "nll", "agreement", "achieved", "flops_saved"):
      assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), (a["method"], name)


def test_metrics_are_equal_line_by_line(both):
  alone, shared, _ = both
  for path in ("S0.25/seed0/search/metrics.jsonl", "S0.25/seed0/train/metrics.jsonl"):
    got, want = ([json.loads(line) for line in (d / path).read_text().splitlines()] for d in (shared, alone))
    assert len(got) == len(want) > 2
    for a, b in zip(got, want):
      assert a.keys() == b.keys()
      for name in b:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-5, err_msg=f"{path}: {name}")


def test_only_the_first_process_speaks(both):
  _, _, (first, second) = both
  assert "training" in first[1] and "search" in first[1]
  assert second[1].strip() == ""
