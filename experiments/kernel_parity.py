"""Shows on an accelerator that the attention kernel chosen there computes what XLA's attention computes.

  python experiments/kernel_parity.py --json=kernel_parity.json

For every way in which a prefill attends (all tokens, kept tokens of an evicting block, kept queries before all keys,
the last token alone, each with ragged rows and padding) and several lengths: the largest difference of the kernel, in
bf16, from XLA's attention in fp32 of the highest precision, beside that of XLA's attention in bf16, and how long each
takes. The kernel passes where its difference is at most twice XLA's. A few minutes.
"""

import functools
import json
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from ftp_jax import launch
from ftp_jax.bench.timing import seconds_of
from ftp_jax.errors import UserError
from ftp_jax.machine import describe_machine
from ftp_jax.models import attention, kernels

_LENGTHS = flags.DEFINE_list("lengths", ["128", "1000", "2048", "8192"], "Slots of keys.")
_BATCH = flags.DEFINE_integer("batch", 4, "Rows, of lengths between a third and all of the slots.", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 9, "Query heads.")
_GROUPS = flags.DEFINE_integer("groups", 3, "Key and value heads.")
_DIM = flags.DEFINE_integer("dim", 64, "Size of a head.")
_RUNS = flags.DEFINE_integer("runs", 5, "Timed calls of each.", lower_bound=1)
_JSON = flags.DEFINE_string("json", "", "File to write the figures to.")
_KERNEL = flags.DEFINE_boolean("kernel", True, "Fail where XLA's attention is all that ran.")
# Share of the positions that are keys, of the keys that are queries (0: the last alone), and whether they are the same.
_CASES = {
    "all tokens": (1.0, 1.0, True),
    "kept tokens": (0.6, 1.0, True),
    "kept queries": (1.0, 0.6, False),
    "last token": (1.0, 0.0, False),
}


def rows_of(rng, counts, slots, span, padding) -> np.ndarray:
  """Positions (B, slots): in each row as many ascending ones below `span` as it counts, then padding."""
  rows = [np.sort(rng.choice(span, size=n, replace=False)) for n in counts]
  return np.stack([np.pad(row, (0, slots - len(row)), constant_values=padding) for row in rows]).astype(np.int32)


def operands(case: str, slots: int, seed: int = 0) -> tuple[list[jax.Array], bool]:
  """q, k, v in fp32 and query and key positions of a case, and whether it is aligned."""
  keys, queries, aligned = _CASES[case]
  rng = np.random.default_rng(seed)
  counts = np.linspace(slots // 3, slots, _BATCH.value).astype(int)
  key = rows_of(rng, counts, slots, round(slots / keys), attention.EMPTY)
  if aligned:
    query = np.where(key < attention.EMPTY, key, -1)
  elif queries:
    width = round(slots * queries)
    query = np.full((len(counts), width), -1)
    for row, keys_of, n in zip(query, key, (counts * queries).astype(int)):
      row[:n] = np.sort(rng.choice(keys_of[: round(n / queries)], size=n, replace=False))
  else:
    query = (counts - 1)[:, None]
  normal = lambda width, heads: jnp.asarray(rng.normal(size=(len(counts), width, heads, _DIM.value)), jnp.float32)
  q = normal(query.shape[1], _HEADS.value) * 2
  k, v = normal(slots, _GROUPS.value), normal(slots, _GROUPS.value)
  return [q, k, v, jnp.asarray(query, jnp.int32), jnp.asarray(key)], aligned


def compare(case: str, slots: int) -> dict:
  """One record: what was chosen, differences, seconds."""
  (*qkv, query, key), aligned = operands(case, slots)
  half = [a.astype(jnp.bfloat16) for a in qkv]
  with jax.default_matmul_precision("highest"):
    want = jax.jit(attention.attend_positions)(*(a.astype(jnp.float32) for a in half), query, key)
  record = {"case": case, "slots": slots, "kernel": kernels.choose(
      "auto", kernels.backend_name(), dtype=jnp.bfloat16, head_dim=_DIM.value, aligned=aligned, window=None,
  )}
  valid = np.asarray(query) >= 0
  for name, implementation in (("kernel", "auto"), ("xla", "xla")):
    run = jax.jit(functools.partial(kernels.attend, aligned=aligned, implementation=implementation))
    got = run(*half, query, key)
    difference = np.abs(np.asarray(got, np.float32) - np.asarray(want))[valid].max()
    times = [seconds_of(lambda: run(*half, query, key))[0] for _ in range(_RUNS.value)]
    record |= {f"{name}_difference": float(difference), f"{name}_seconds": statistics.median(times)}
    record["finite"] = record.get("finite", True) and bool(np.isfinite(np.asarray(got, np.float32)).all())
  return record | {"largest": float(np.abs(want).max())}


def main() -> None:
  try:
    lengths = [int(length) for length in _LENGTHS.value]
  except ValueError:
    lengths = []
  if not lengths or min(lengths) < 8:
    raise UserError(f"--lengths={','.join(_LENGTHS.value)} must be whole numbers from 8, with commas between them.")
  records = []
  for slots in lengths:
    for case in _CASES:
      records.append(compare(case, slots))
      print(json.dumps(records[-1]), flush=True)
  if _JSON.value:
    with open(_JSON.value, "w", encoding="utf-8") as file:
      json.dump({"machine": describe_machine(), "records": records}, file, indent=2)
  if _KERNEL.value and all(r["kernel"] == "xla" for r in records):
    sys.exit("kernel_parity: no kernel but XLA's attention ran; install jax for this accelerator, or set --nokernel.")
  failed = [r for r in records if not r["finite"] or not r["kernel_difference"] <= 2 * r["xla_difference"]]
  if failed:
    sys.exit(f"kernel_parity: {len(failed)} of {len(records)} cases differ from XLA's attention.")


if __name__ == "__main__":
  launch.script(main)
