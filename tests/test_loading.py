"""Loading in pieces: the same values however it is cut, memory within its bound, and one process that fetches."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from ftp_jax.models import huggingface, placement
from ftp_jax.models.decoder import abstract_params
from ftp_jax.models.gguf import convert_gguf
from ftp_jax.models.huggingface import load_params
from tests.test_sources import write_gguf
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


def run(script: str | pathlib.Path, *arguments, **environment) -> subprocess.Popen:
  """Starts a Python script on a CPU; it chooses its number of devices."""
  inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  return subprocess.Popen(
      [sys.executable, str(script), *map(str, arguments)], env=inherited | {"PYTHONPATH": str(ROOT)} | environment,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )


def finish(process: subprocess.Popen) -> str:
  """What a script printed; fails with its error."""
  try:
    out, error = process.communicate(timeout=240)
  finally:
    process.kill()
  assert process.returncode == 0, out + error
  return out


def load_memory(directory, *arguments) -> list[dict]:
  report = directory.with_suffix(".json")
  finish(run(ROOT / "experiments/load_memory.py", f"--directory={directory}", f"--json={report}", *arguments))
  return json.loads(report.read_text())["processes"]


def test_memory_stays_within_its_bound(tmp_path):
  # A leaf of the MLP is a third of the model, so that a second copy of one shows.
  sizes = dict(hidden=256, intermediate=4096, blocks=16, vocabulary=512)
  small = [f"--{name}={size}" for name, size in sizes.items()] + ["--dtype=float32"]
  slack = 12 * 2**20  # heap and threads, nothing of which grows with the model
  *rows, staged = load_memory(tmp_path / "model", *small, "--cases=unsharded,2,staged", f"--slack_bytes={slack}")
  assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
  assert [(row["case"], row["process"]) for row in rows] == [("unsharded", 0), ("2", 0), ("2", 1)]
  values = 16 * (3 * 256 * 4096 + 2 * 256 * 256 + 2 * 256 * 128 + 2 * 256) + 2 * 512 * 256 + 256
  for row, parts in zip(rows, (1, 2, 2), strict=True):
    assert 4 * values / parts <= row["shards_bytes"] < 4 * values / parts * 1.01  # norms lie on every device
    assert row["largest_tensor_bytes"] == 4 * 256 * 4096
    assert 0.95 * row["shards_bytes"] < row["peak_bytes"] < row["shards_bytes"] + row["largest_tensor_bytes"] + slack
    assert row["holds"] and row["own_devices_only"] and row["same_as_files"]
  # Arrays of accelerators are in this process's memory here, and the compiler's own comes on top.
  assert staged["bound_bytes"] == int(1.2 * (staged["shards_bytes"] + staged["largest_tensor_bytes"])) + slack
  assert staged["holds"] and staged["same_as_files"]


# Two processes: 0 and 1 share the cache "shared"; with FTP_JAX_CACHE each has its own.
PAIR = """
import json, pathlib, sys, time
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
process, port, root = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
from ftp_jax import sharding
from ftp_jax.errors import UserError
from ftp_jax.models import decoder, huggingface, sources

converted, read = [], []
convert, original = sources.convert_gguf, huggingface._read

def slow(path, directory):
  time.sleep(0.3)  # who does not wait looks too early
  converted.append(path.name)
  convert(path, directory)

def counted(*args):
  read.append(args[-1].size)
  original(*args)

sources.convert_gguf, huggingface._read = slow, counted

def outcome(name, cache=None):
  try:
    return str(sources.resolve(str(root / name), cache))
  except UserError as error:
    return f"UserError: {error}"

outcomes = [outcome("a.gguf", root / "shared"), outcome("b.gguf"), outcome("broken.gguf"), outcome("directory")]
directory = str(root / "directory")
whole = sources.load_model(directory).params
mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
read.clear()
params = sources.load_model(directory, shardings=lambda config: decoder.param_shardings(mesh, config)).params
shards = [(s, w) for p, w in zip(jax.tree.leaves(params), jax.tree.leaves(whole)) for s in p.addressable_shards]
print(json.dumps({
    "outcomes": outcomes,
    "converted": converted,
    "read": sum(read),
    "devices": sorted({s.device.id for s, _ in shards}) == [d.id for d in jax.local_devices()],
    "whole": all(p.devices() == {jax.local_devices()[0]} for p in jax.tree.leaves(whole)),
    "global": all(len(p.sharding.device_set) == 8 for p in jax.tree.leaves(params)),
    "equal": all(np.array_equal(s.data, w[s.index]) for s, w in shards),
    "values": sum({(i, str(s.index)): s.data.size for i, p in enumerate(jax.tree.leaves(params))
                   for s in p.addressable_shards}.values()),
}))
"""


def test_two_processes_fetch_once_and_load_their_own_shards(tmp_path):
  write_gguf(tmp_path / "a.gguf")
  write_gguf(tmp_path / "b.gguf", llama__context_length=256)  # another file, another conversion
  (tmp_path / "broken.gguf").write_bytes(b"PK")
  convert_gguf(tmp_path / "a.gguf", tmp_path / "directory")
  (tmp_path / "pair.py").write_text(PAIR)
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  started = [run(tmp_path / "pair.py", i, port, tmp_path, FTP_JAX_CACHE=str(tmp_path / f"own{i}")) for i in range(2)]
  first, second = (json.loads(finish(process).splitlines()[-1]) for process in started)
  assert first["converted"] == ["a.gguf", "b.gguf", "broken.gguf"] and second["converted"] == []
  shared, own, broken, directory = zip(first["outcomes"], second["outcomes"])
  assert shared[0] == shared[1] and pathlib.Path(shared[0]).parent == tmp_path / "shared"
  assert pathlib.Path(own[0]).parent == tmp_path / "own0"
  assert own[1].startswith("UserError: process 1 (") and "FTP_JAX_CACHE" in own[1] and "each host" in own[1]
  assert not (tmp_path / "own1").exists()
  assert broken[0].startswith("UserError: ") and "not a GGUF file" in broken[0]
  assert broken[1] == broken[0]
  assert directory == (str(tmp_path / "directory"),) * 2
  for figures in (first, second):
    assert figures["devices"] and figures["global"] and figures["whole"] and figures["equal"]
    assert figures["read"] == figures["values"]  # its own parts, each once
