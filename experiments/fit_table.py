"""The table of docs/scaling.md: where router training fits, each program compiled alone by `ftp-jax compile-check`.

  python experiments/fit_table.py --out=docs/scaling          # compiles what OUT does not hold yet
  python experiments/fit_table.py --out=docs/scaling --print  # the table of what it holds

Needs libtpu (`pip install 'ftp-jax[tpu-check]'`) and no TPU.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

MODELS = ("llama2-7b", "llama2-13b", "llama3-8b", "qwen1.5-7b")
# Of each generation the slices from small to large; the first that fits, and those that always get a row.
SMALLEST = {"v5e": ("v5e:1x1", "v5e:2x2", "v5e:2x4"), "v5p": ("v5p:1x1x1",), "v6e": ("v6e:1x1", "v6e:2x2")}
ALWAYS = ("v5e:4x4", "v5p:2x2x1")
MOST_ROWS = 32  # of one chip


def check(out: pathlib.Path, model: str, topology: str, rows: int, chips: int) -> dict:
  """The record of one training step; compiles it unless `out` has it."""
  file = out / f"train_{model}_{topology.replace(':', '_')}_b{rows * chips}.json"
  if not file.exists():
    print(f"{model} on {topology}, {rows} rows a chip", file=sys.stderr, flush=True)
    command = [
        sys.executable, "-m", "ftp_jax.cli", "compile-check", f"--model={model}", f"--topology={topology}",
        f"--batch={rows * chips}", f"--json={file}",
    ]  # fmt: skip
    result = subprocess.run(command, stdout=subprocess.DEVNULL, env=os.environ)
    if result.returncode not in (0, 1):
      sys.exit(f"compile-check failed: {' '.join(command)}")
  return json.loads(file.read_text())


def chips_of(topology: str) -> int:
  chips = 1
  for size in topology.partition(":")[2].split("x"):
    chips *= int(size)
  return chips


def fill(out: pathlib.Path, model: str, topology: str) -> bool:
  """Finds the largest power of two of rows a chip that fits; False if one row does not."""
  chips = chips_of(topology)
  record = check(out, model, topology, 1, chips)
  if not record["fits"]:
    return False
  held = record["memory"]
  # All but the arguments grows with the rows at most as fast as they do.
  guess = (held["limit"] - held["arguments"]) / (held["peak"] - held["arguments"])
  rows = 1
  while 2 * rows <= min(guess, MOST_ROWS):
    rows *= 2
  while rows > 1 and not check(out, model, topology, rows, chips)["fits"]:
    rows //= 2
  return True


def table(out: pathlib.Path) -> str:
  """Markdown: of each model and slice the largest batch that fits."""
  best, failed = {}, set()
  for file in sorted(out.glob("train_*.json")):
    record = json.loads(file.read_text())
    key = (record["model"], record["topology"])
    if not record["fits"]:
      failed.add(key)
    elif key not in best or record["batch"] > best[key]["batch"]:
      best[key] = record
  lines = [
      "| model | slice | chips | batch | GiB a chip, of | FLOPs a chip, 1e12 | forwards | received, GiB |",
      "|---|---|---|---|---|---|---|---|",
  ]
  order = lambda key: (MODELS.index(key[0]), key[1][:3], chips_of(key[1]))
  for model, topology in sorted(set(best) | failed, key=order):
    if record := best.get((model, topology)):
      held, moved = record["memory"], sum(total["bytes"] for total in record["collectives"].values())
      cells = (
          record["chips"], record["batch"], f"{held['peak'] / 2**30:.1f} of {held['limit'] / 2**30:.2f}",
          f"{record['flops']['chip'] / 1e12:.0f}", f"{record['flops']['forwards']:.3f}", f"{moved / 2**30:.1f}",
      )  # fmt: skip
    else:
      cells = (chips_of(topology), f"{chips_of(topology)} does not fit", "", "", "", "")
    lines.append(f"| {model} | {topology} | " + " | ".join(map(str, cells)) + " |")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--print", action="store_true", dest="only_print")
  arguments = parser.parse_args()
  if not arguments.only_print:
    arguments.out.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
      for topology in ALWAYS:
        fill(arguments.out, model, topology)
      for topologies in SMALLEST.values():
        for topology in topologies:
          if fill(arguments.out, model, topology):
            break
  print(table(arguments.out))


if __name__ == "__main__":
  main()
