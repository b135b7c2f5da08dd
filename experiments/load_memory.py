"""Memory and time of loading a sharded checkpoint, in one and in two processes, against the bound that we promise.

  python experiments/load_memory.py --directory=DIR --json=load_memory.json

Writes a random Llama checkpoint into DIR (2.2 GB in bfloat16, several files; kept and used again), then loads it
in fresh processes on the CPU, four virtual devices each:

  unsharded   one process, everything on its first device
  1           one process, sharded over fsdp 2 x tensor 2
  2           two processes (jax.distributed), sharded over fsdp 4 x tensor 2
  staged      as 1, but arrays are filled in the way of accelerators, whose memory is the process's own here

Of every process it reports the bytes of its shards, the growth of its anonymous memory at the peak (RssAnon, read
every 2 ms from outside; mapped pages of the files do not count) and whether that keeps to the bound: shards plus
the largest tensor of the checkpoint as loaded, plus 20%. A few minutes on two CPU cores.
"""

import contextlib
import ctypes
import gc
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
from absl import app, flags
from safetensors import safe_open

from ftp_jax import sharding
from ftp_jax.errors import UserError, check_target
from ftp_jax.models import decoder, placement
from ftp_jax.models.config import ModelConfig
from ftp_jax.models.huggingface import checkpoint_files, load_params, write_checkpoint
from ftp_jax.models.sources import DTYPES

_DIRECTORY = flags.DEFINE_string("directory", None, "Where the checkpoint is, or is to be written.", required=True)
_CASES = flags.DEFINE_list("cases", ["unsharded", "1", "2", "staged"], "Which of these to measure.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "Of the loaded parameters; the files are bfloat16.")
_HIDDEN = flags.DEFINE_integer("hidden", 2048, "Hidden size of the checkpoint to write.")
_INTERMEDIATE = flags.DEFINE_integer("intermediate", 5632, "Its MLP size.")
_BLOCKS = flags.DEFINE_integer("blocks", 22, "Its blocks.")
_VOCABULARY = flags.DEFINE_integer("vocabulary", 32000, "Its vocabulary.")
_SLACK = flags.DEFINE_integer("slack_bytes", 0, "Added to the bound: what is no weight, for tiny checkpoints.")
_JSON = flags.DEFINE_string("json", "", "File to write the figures to.")
_WORKER = flags.DEFINE_string("worker", "", "Internal: case, process and port of a measured process.")

_ALL = ("unsharded", "1", "2", "staged")
_DEVICES = 4
_HEAD_DIM = 64
_SAMPLER = """
import re, select, sys
peak, status = 0, f"/proc/{sys.argv[1]}/status"
while not select.select([sys.stdin], [], [], 0.002)[0]:
  peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", open(status).read())[1]))
print(peak * 1024)
"""


def write_random(directory: pathlib.Path, hf: dict) -> None:
  """Writes a random Llama checkpoint in bfloat16, several files with their index."""
  D, F, V = hf["hidden_size"], hf["intermediate_size"], hf["vocab_size"]
  kv = hf["num_key_value_heads"] * _HEAD_DIM
  shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
  of_block = {
      "input_layernorm": (D,), "self_attn.q_proj": (D, D), "self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D),
      "self_attn.o_proj": (D, D), "post_attention_layernorm": (D,), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D),
      "mlp.down_proj": (D, F),
  }
  for i in range(hf["num_hidden_layers"]):
    shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in of_block.items()}
  rng = np.random.default_rng(0)
  make = lambda shape: lambda: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
  tensors = [(name, 2 * int(np.prod(shape)), make(shape)) for name, shape in shapes.items()]
  directory.mkdir(parents=True, exist_ok=True)
  write_checkpoint(tensors, directory, max_shard_bytes=sum(size for _, size, _ in tensors) // 4)
  (directory / "config.json").write_text(json.dumps(hf, indent=2) + "\n")


class PeakAnon:
  """Peak of this process's anonymous memory inside a `with`; another process looks, so nothing here can delay it."""

  def __enter__(self):
    command = [sys.executable, "-I", "-S", "-c", _SAMPLER, str(os.getpid())]
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return self

  def __exit__(self, *_):
    self.bytes = int(self._process.communicate("\n")[0])


def anon() -> int:
  """Anonymous memory of this process in bytes."""
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def same_as_files(params, directory: pathlib.Path) -> bool:
  """Whether the shards of this process hold what the files do; looks at the first and the last block."""
  with contextlib.ExitStack() as stack:
    files = [stack.enter_context(safe_open(file, framework="numpy")) for file in checkpoint_files(directory)]
    where = {name: file for file in files for name in file.keys()}

    def equal(name, array, block=None):
      want = where[name].get_tensor(name)
      want = (want if want.ndim == 1 or block is None else want.T).astype(array.dtype)
      for shard in array.addressable_shards:
        got = np.asarray(shard.data if block is None else shard.data[block])
        index = shard.index if block is None else shard.index[1:]
        if not np.array_equal(got, want[index]):
          return False
      return True

    blocks, embed = params["blocks"], params["embed"]
    first_last = (0, blocks["attn_norm"]["scale"].shape[0] - 1)
    of_block = (
        ("attn_norm", "scale", "input_layernorm"),
        ("q", "kernel", "self_attn.q_proj"),
        ("v", "kernel", "self_attn.v_proj"),
        ("up", "kernel", "mlp.up_proj"),
        ("down", "kernel", "mlp.down_proj"),
    )
    return (
        all(
            equal(f"model.layers.{i}.{name}.weight", blocks[key][kind], i)
            for i in first_last
            for key, kind, name in of_block
        )
        and equal("model.embed_tokens.weight", embed["embedding"])
        and equal("lm_head.weight", embed["lm_head"])
    )


def measure(directory: pathlib.Path, case: str, process: int, port: int) -> dict:
  """Loads the checkpoint in this process; figures in bytes and seconds."""
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", _DEVICES)
  if case == "2":
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
  if case == "staged":
    placement.IN_PLACE = ()
  config = ModelConfig.from_directory(directory)
  shardings = None
  if case != "unsharded":
    shardings = decoder.param_shardings(sharding.make_mesh(data=1, fsdp=-1, tensor=2), config)
  dtype = np.dtype(DTYPES[_DTYPE.value])
  abstract = decoder.abstract_params(config)
  jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(8))())  # the runtime's own memory is not the loader's
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)  # what is free but not given back would be filled before the process grows
  time.sleep(0.1)
  before, start, cpu = anon(), time.perf_counter(), time.process_time()
  with PeakAnon() as peak:
    params = jax.block_until_ready(load_params(directory, config, dtype, shardings))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
  shards = [shard for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
  tensors = [a.size for a in jax.tree.leaves(abstract["embed"])]
  tensors += [a.size // config.num_blocks for a in jax.tree.leaves(abstract["blocks"])]
  figures = {
      "case": case,
      "process": process,
      "shards_bytes": sum(shard.data.nbytes for shard in shards),
      "largest_tensor_bytes": dtype.itemsize * max(tensors),
      "peak_bytes": peak.bytes - before,
      "seconds": round(seconds, 2),
      "cpu_seconds": round(cpu, 2),
      "own_devices_only": all(shard.device in jax.local_devices() for shard in shards),
      "same_as_files": same_as_files(params, directory),
  }
  figures["bound_bytes"] = int(1.2 * (figures["shards_bytes"] + figures["largest_tensor_bytes"])) + _SLACK.value
  figures["holds"] = figures["peak_bytes"] <= figures["bound_bytes"]
  return figures


def run_case(case: str) -> list[dict]:
  """Figures of each process of a case, measured in fresh processes."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  command = [sys.executable, __file__, *sys.argv[1:]]
  workers = [
      subprocess.Popen([*command, f"--worker={case},{process},{port}"], stdout=subprocess.PIPE, text=True)
      for process in range(2 if case == "2" else 1)
  ]
  outputs = [worker.communicate()[0] for worker in workers]
  if any(worker.returncode for worker in workers):
    raise UserError(f"a process of case {case} failed; its error stands above.")
  return [json.loads(output.splitlines()[-1]) for output in outputs]


def main(_):
  directory = pathlib.Path(_DIRECTORY.value)
  if _WORKER.value:
    case, process, port = _WORKER.value.split(",")
    print(json.dumps(measure(directory, case, int(process), int(port))))
    return
  heads = _HIDDEN.value // _HEAD_DIM
  hf = {
      "model_type": "llama",
      "vocab_size": _VOCABULARY.value,
      "hidden_size": _HIDDEN.value,
      "intermediate_size": _INTERMEDIATE.value,
      "num_hidden_layers": _BLOCKS.value,
      "num_attention_heads": heads,
      "num_key_value_heads": max(heads // 8, 2),
      "tie_word_embeddings": False,
  }
  try:
    if unknown := set(_CASES.value) - set(_ALL):
      raise UserError(f"--cases names {', '.join(sorted(unknown))}, which is unknown; choose of {', '.join(_ALL)}.")
    if _JSON.value:
      check_target(pathlib.Path(_JSON.value))
    if not (directory / "config.json").is_file():
      if _HIDDEN.value % _HEAD_DIM or heads % hf["num_key_value_heads"]:
        raise UserError(f"--hidden={_HIDDEN.value} must be 128, 256 or a multiple of 512.")
      write_random(directory, hf)
    files = checkpoint_files(directory)
    rows = [figures for case in _CASES.value for figures in run_case(case)]
  except UserError as error:
    sys.exit(f"load_memory: {error}")
  report = {
      "files": len(files),
      "checkpoint_bytes": sum(file.stat().st_size for file in files),
      "dtype": _DTYPE.value,
      "holds": all(row["holds"] and row["own_devices_only"] and row["same_as_files"] for row in rows),
      "processes": rows,
  }
  print(f"{report['checkpoint_bytes'] / 1e6:.0f} MB in {len(files)} files, loaded as {_DTYPE.value}; in MB:")
  for row in rows:
    shards, tensor, peak, bound = (
        row[key] / 1e6 for key in ("shards_bytes", "largest_tensor_bytes", "peak_bytes", "bound_bytes")
    )
    print(f"{row['case']:>9}, process {row['process']}: shards {shards:.0f}, largest tensor {tensor:.0f}, peak "
          f"{peak:.0f}, bound {bound:.0f}: {'holds' if row['holds'] else 'BROKEN'}; {row['seconds']:.1f} s, "
          f"CPU {row['cpu_seconds']:.1f} s")
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(report, indent=2) + "\n")
  if not report["holds"]:
    sys.exit("load_memory: the bound is broken, or an array is wrong; see the figures.")


if __name__ == "__main__":
  app.run(main)
