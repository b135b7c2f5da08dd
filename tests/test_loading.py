"""Loading in pieces: the same values however it is cut, memory within its bound, and one process that fetches."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from ftp_jax.models import huggingface, placement
from ftp_jax.models.decoder import abstract_params
from ftp_jax.models.huggingface import load_params
from tests.test_weights import CONFIG, write

ROOT = pathlib.Path(__file__).parent.parent


def over_tensor():
  """Shardings of the last axis over 4 devices, each part on two of them."""
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  spec = lambda leaf: jax.P(*[None] * (len(leaf.shape) - 1), "tensor")
  return jax.tree.map(lambda leaf: jax.sharding.NamedSharding(mesh, spec(leaf)), abstract_params(CONFIG))


@pytest.mark.parametrize("in_place", [("cpu",), ()])
@pytest.mark.parametrize("stored, dtype", [(np.float32, ml_dtypes.bfloat16), (ml_dtypes.bfloat16, np.float32)])
def test_pieces_give_the_same_arrays(in_place, stored, dtype, tmp_path, monkeypatch):
  tensors = write(tmp_path, dtype=stored)
  whole = load_params(tmp_path, CONFIG, dtype)
  np.testing.assert_array_equal(whole["embed"]["lm_head"], tensors["lm_head.weight"].astype(dtype))
  np.testing.assert_array_equal(
      whole["blocks"]["gate"]["kernel"][1], tensors["model.layers.1.mlp.gate_proj.weight"].T.astype(dtype)
  )
  sizes = []
  original = huggingface._read
  monkeypatch.setattr(huggingface, "_read", lambda *args: sizes.append(args[-1].size) or original(*args))
  monkeypatch.setattr(huggingface, "PIECE_SIZE", 50)
  monkeypatch.setattr(placement, "IN_PLACE", in_place)
  for shardings in (None, over_tensor()):
    sizes.clear()
    cut = load_params(tmp_path, CONFIG, dtype, shardings)
    jax.tree.map(np.testing.assert_array_equal, cut, whole)
    assert max(sizes) <= 50 and sum(sizes) >= sum(leaf.size for leaf in jax.tree.leaves(whole))
    if shardings is None:
      assert not any(leaf.committed for leaf in jax.tree.leaves(cut))  # free to join arrays on any mesh
    else:
      assert all(jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding == s, cut, shardings)))


def test_a_row_longer_than_a_piece_is_read_alone(tmp_path, monkeypatch):
  write(tmp_path)
  whole = load_params(tmp_path, CONFIG)
  monkeypatch.setattr(huggingface, "PIECE_SIZE", 5)
  jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, CONFIG), whole)


def test_writing_pieces_compiles_once_a_shape(tmp_path, monkeypatch):
  write(tmp_path)
  monkeypatch.setattr(placement, "IN_PLACE", ())
  monkeypatch.setattr(huggingface, "PIECE_SIZE", 50)
  placement._write.clear_cache()
  load_params(tmp_path, CONFIG)
  shapes = {leaf.shape for leaf in jax.tree.leaves(abstract_params(CONFIG)) if leaf.size > 50}
  assert placement._write._cache_size() == len(shapes)


def load_memory(directory, report, *arguments) -> dict:
  command = [sys.executable, str(ROOT / "experiments/load_memory.py"), f"--directory={directory}", f"--json={report}"]
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stdout + done.stderr
  return json.loads(report.read_text())


def test_memory_stays_within_its_bound(tmp_path):
  # A leaf of the MLP is a third of the model: a second copy of one breaks the bound. Slack: heap, threads, compiler.
  small = ["--hidden=256", "--intermediate=4096", "--blocks=16", "--vocabulary=512", "--dtype=float32"]
  slack = 16 * 2**20
  report = load_memory(
      tmp_path / "model", tmp_path / "a.json", *small, f"--slack_bytes={slack}", "--cases=unsharded,2"
  )
  assert report["files"] > 1 and report["checkpoint_bytes"] > 10**8
  assert [(row["case"], row["process"]) for row in report["processes"]] == [("unsharded", 0), ("2", 0), ("2", 1)]
  for row, parts in zip(report["processes"], (1, 2, 2)):
    values = report["checkpoint_bytes"] / 2
    assert 4 * values / parts < row["shards_bytes"] * 1.001 < 4 * values / parts * 1.01  # norms are replicated
    assert row["largest_tensor_bytes"] == 4 * 256 * 4096
    assert row["bound_bytes"] == int(1.2 * (row["shards_bytes"] + row["largest_tensor_bytes"])) + slack
    assert 0.95 * row["shards_bytes"] < row["peak_bytes"] <= row["bound_bytes"]
    assert row["own_devices_only"] and row["same_as_files"]
  # As on accelerators, whose arrays are in this process's memory here: what the host adds is staging alone.
  small += ["--staged", "--cases=1", f"--slack_bytes={slack}"]
  staged = load_memory(tmp_path / "model", tmp_path / "b.json", *small)
  assert staged["holds"] and staged["processes"][0]["same_as_files"]
