"""The table of docs/scaling.md: where router training fits, each program compiled alone by `ftp-jax compile-check`.

  JAX_OPTIMIZATION_LEVEL=O0 python experiments/fit_table.py --out=docs/scaling   # compiles what is not there yet
  python experiments/fit_table.py --out=docs/scaling --print                     # the table of what is there
  python experiments/fit_table.py --cost                                         # the cost model's table

Needs libtpu (`pip install '.[tpu-check]'`) and no TPU. On two CPU cores a program takes about a minute.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys

# Model, slice, rows a chip: the smallest slice of each generation, and the slices of the cost model.
RUNS = (
    ("llama2-7b", "v5e:1x1", 1), ("llama2-7b", "v5e:2x2", 4), ("llama2-7b", "v5e:4x4", 1), ("llama2-7b", "v5e:4x4", 8),
    ("llama2-7b", "v5p:1x1x1", 16), ("llama2-7b", "v5p:2x2x1", 32), ("llama2-7b", "v6e:1x1", 4),
    ("llama3-8b", "v5e:4x4", 8), ("llama3-8b", "v5e:2x2", 1), ("llama3-8b", "v5p:2x2x1", 16),
    ("llama3-8b", "v6e:1x1", 2), ("llama3-8b", "v5p:1x1x1", 8),
    ("qwen1.5-7b", "v5e:4x4", 8), ("qwen1.5-7b", "v5e:2x2", 1), ("qwen1.5-7b", "v5p:2x2x1", 16),
    ("qwen1.5-7b", "v6e:1x1", 2), ("qwen1.5-7b", "v5p:1x1x1", 8),
    ("llama2-13b", "v6e:1x1", 1), ("llama2-13b", "v5e:8x8", 1), ("llama2-13b", "v5p:1x1x1", 8),
    ("llama2-13b", "v5e:2x2", 2), ("llama2-13b", "v5e:4x4", 4), ("llama2-13b", "v5p:2x2x1", 16),
    ("llama2-13b", "v6e:2x2", 4),
)
# Slice and mesh of the cost model's table, by the names they are rented under.
SLICES = (
    ("v5e-16", "v5e", (1, 16, 1)), ("v5e-16", "v5e", (4, 4, 1)),
    ("v5p-8", "v5p", (1, 4, 1)), ("v5p-8", "v5p", (4, 1, 1)),
)
MODELS = ("llama2-7b", "llama2-13b", "llama3-8b", "qwen1.5-7b")


def chips_of(topology: str) -> int:
  return math.prod(map(int, topology.partition(":")[2].split("x")))


def path(out: pathlib.Path, model: str, topology: str, rows: int) -> pathlib.Path:
  return out / f"train_{model}_{topology.replace(':', '_')}_b{rows * chips_of(topology)}.json"


def compile_all(out: pathlib.Path) -> None:
  """Compiles one training step of each run whose record is not in `out`."""
  out.mkdir(parents=True, exist_ok=True)
  for model, topology, rows in RUNS:
    file = path(out, model, topology, rows)
    if file.exists():
      continue
    print(file.name, file=sys.stderr, flush=True)
    command = [
        sys.executable, "-m", "ftp_jax.cli", "compile-check", f"--model={model}", f"--topology={topology}",
        f"--batch={rows * chips_of(topology)}", f"--json={file}",
    ]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode not in (0, 1):  # 1: it does not fit
      sys.exit(f"compile-check failed: {' '.join(command)}")


def table(out: pathlib.Path) -> str:
  """Markdown of the records in `out`."""
  lines = [
      "| model | slice | chips | batch | GiB a chip | fits | FLOPs of a chip, 10^12 | dense forwards | received, GiB |",
      "|---|---|---|---|---|---|---|---|---|",
  ]
  order = lambda run: (MODELS.index(run[0]), run[1][:3], chips_of(run[1]), run[2])
  for model, topology, rows in sorted(RUNS, key=order):
    file = path(out, model, topology, rows)
    if not file.exists():
      continue
    record = json.loads(file.read_text())
    needs, limit = record.get("needs"), record.get("limit")
    if held := record.get("memory"):
      needs, limit = held["peak"], held["limit"]
    moved = sum(total["bytes"] for total in record.get("collectives", {}).values())
    flops = record["flops"]
    cells = (
        model, topology, record["chips"], record["batch"],
        f"{needs / 2**30:.1f} of {limit / 2**30:.2f}" if needs else f"more than {limit / 2**30:.2f}",
        "yes" if record["fits"] else "no", f"{flops['chip'] / 1e12:.0f}", f"{flops['forwards']:.3f}",
        f"{moved / 2**30:.1f}" if held else "",
    )
    lines.append("| " + " | ".join(map(str, cells)) + " |")
  return "\n".join(lines)


def cost_table() -> str:
  """Markdown: a training step at T = 2048, and the run of `config.large_preset`, by `ftp_jax.fit.cost`."""
  from ftp_jax.config import get_config, large_preset
  from ftp_jax.fit import cost, topologies
  from ftp_jax.models.architectures import architecture

  run = cost.of_config(large_preset(get_config()))
  lines = [
      "| model | slice | mesh | step, T 2048: compute, memory, links | s a step | share of peak | run: scores | search "
      "| training | minutes in all |",
      "|---|---|---|---|---|---|---|---|---|---|",
  ]
  span = lambda terms, unit: f"{terms.overlapped / unit:.2f} to {terms.serial / unit:.2f}"
  for model in MODELS:
    for name, kind, sizes in SLICES:
      slice_, config = cost.Slice(topologies.CHIPS[kind], *sizes), architecture(model)
      if cost.parameters(config) * 2 / math.prod(sizes[1:]) > 0.8 * slice_.chip.hbm:
        continue  # the weights alone leave too little room
      step = cost.train_step(config, slice_, 8 * slice_.chips, 2048, 64)
      parts = cost.run_terms(run, config, slice_)
      total = sum(parts.values(), cost.Terms())
      cells = (
          model, name, ",".join(map(str, sizes)),
          f"{step.compute:.2f}, {step.memory:.2f}, {step.communication:.2f}", span(step, 1),
          f"{step.compute / step.serial:.0%} to {step.compute / step.overlapped:.0%}",
          *(span(terms, 60) for terms in parts.values()), span(total, 60),
      )
      lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/scaling"))
  parser.add_argument("--print", action="store_true", dest="only_print")
  parser.add_argument("--cost", action="store_true")
  arguments = parser.parse_args()
  if arguments.cost:
    print(cost_table())
    return
  if not arguments.only_print:
    compile_all(arguments.out)
  print(table(arguments.out))


if __name__ == "__main__":
  main()
