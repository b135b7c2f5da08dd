"""kill -9 at seeded random moments of a search and a training, in runs of one and of two processes.

    python experiments/survival.py --json=survival.json

First an undisturbed run; then, for every kill, a fresh run that is killed at a random event (a judged generation, a
training step, or, for every second one, within a save) plus a random delay, and started again until it is through.
Schedule, search state, router, state of the optimizer and both metrics files must be those of the undisturbed run to
the last bit. In runs of two processes one of them is killed and the other must end by itself.

The model is tiny and random. It lies on a mesh of data=2 and, over what is left of 2 virtual CPU devices a process,
fsdp: processes do talk to each other in every step.

21 minutes on 2 CPU cores (AMD EPYC, 24 GiB) shared with other work, one run: of 10 kills with one process and 10 with
two, 7 and 5 cut a save short, all 20 resumed to the bit, and the other process ended 1.1 to 4.0 s after the kill.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

PEER_TIMEOUT = 4  # seconds
PATIENCE = 240  # seconds for a run that takes a few
ROOT = pathlib.Path(__file__).resolve().parent.parent


# --- the run that is killed ----------------------------------------------------------------------


def work(directory: str, tell, light: bool) -> None:
  """A search and a training with its schedule.

  Args:
    tell: gets a line for every event that the killing process may go by.
    light: for quick tests: judge by a formula, with one device a process.
  """
  import jax

  from ftp_jax import sharding, stages
  from ftp_jax.data.prompts import Prompts
  from ftp_jax.evaluation.judge import Frozen, Judge
  from ftp_jax.models import decoder
  from ftp_jax.models.config import ModelConfig
  from ftp_jax.routing import routers
  from ftp_jax.routing.config import RouterConfig, RoutingConfig
  from ftp_jax.search import schedule, state
  from ftp_jax.search.genetic import SearchSettings
  from ftp_jax.search.loop import run_search
  from ftp_jax.training import checkpoint, step
  from ftp_jax.training.loop import train_router

  config = ModelConfig(
      family="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_blocks=4, num_heads=4, num_kv_heads=2,
      head_dim=8, tie_embeddings=True,
  )
  mesh = sharding.make_mesh() if light else sharding.make_mesh(data=2, fsdp=-1)
  rng = np.random.default_rng(0)
  drawn = lambda shape: rng.normal(1.0 if len(shape) < 3 else 0.0, 0.2, shape).astype(np.float32)  # norms, or matrices

  def placed(leaf, where):
    array = drawn(leaf.shape)
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

  shapes = jax.eval_shape(lambda: decoder.init_params(config, jax.random.key(0)))
  params = jax.tree.map(placed, shapes, decoder.param_shardings(mesh, config))
  tokens = rng.integers(1, config.vocab_size, (16, 16)).astype(np.int32)
  prompts = Prompts(tokens, np.full(16, 12, np.int32), np.full(16, 16, np.int32))
  judge = None if light else Judge(Frozen(config, params), RoutingConfig(), prompts, 16, 4)

  def figures(router, schedules):
    if light:  # nothing to compile
      size = sum(np.square(np.asarray(leaf)).sum() for leaf in jax.tree.leaves(router.params))
      return np.asarray(schedules) @ [4.0, 3.0, 2.0, 1.0] + abs(float(size) - 17)
    return judge.kl(router, np.asarray(schedules, np.float32))

  def told(name, function):
    def telling(*arguments, **keywords):
      tell(name)
      return function(*arguments, **keywords)

    return telling

  state.save = told("save search", state.save)
  checkpoint.Checkpoints.save = told("save train", checkpoint.Checkpoints.save)
  step.jitted_step = told("train", step.jitted_step)

  settings = SearchSettings(
      grid=8, max_sparsity=0.875, population=6, elite=2, tournament=2, crossover_rate=0.5, mutation_moves=2
  )
  found = run_search(
      directory=f"{directory}/search", seeds_units=[schedule.to_units(np.full(4, 0.25), 0.25, 8, 0.875)],
      settings=settings, key_seed=1, fitness=told("search", lambda s: figures(routers.STATIC, s)),
      validate=lambda rows: [figures(routers.STATIC, np.repeat(row[None], 4, 0))[0] for row in rows],
      num_generations=12, progress=False,
  )
  asked = schedule.to_sparsity(found.units, 8)
  router_config = RouterConfig(hidden_size=8)
  spec = step.StepSpec(
      config, RoutingConfig(), router_config,
      step.TrainSettings(
          steps=24, learning_rate=0.1, warmup=2, clip=1.0, distill="kl", distill_weight=1.0, sparsity_weight=1.0,
          sparsity_two_sided=False, guide="static", guide_weight=1.0, guide_decay="cosine",
      ), num_scored=4,
  )
  dynamic = lambda router: routers.Router("dynamic", router_config, jax.tree.map(np.asarray, router))
  initial = jax.eval_shape(lambda: routers.init_router(router_config, jax.random.key(0), 4, 32))
  result = train_router(
      directory=f"{directory}/train", spec=spec, params=params, prompts=prompts, fisher_LxNxT=None, schedule_L=asked,
      router_params=jax.tree.map(lambda leaf: drawn((*leaf.shape, 1))[..., 0], initial), batch_size=8, seed=3,
      validate=lambda router: float(figures(dynamic(router), np.repeat(asked[None], 4, 0))[0]), validate_every=8,
      checkpoint_every=3, progress=False,
  )
  leaves = {f"router{i}": leaf for i, leaf in enumerate(jax.tree.leaves(result.router))}
  stages.save_arrays(
      f"{directory}/result.npz", units=found.units, figures=np.array([found.fitness, found.validation]),
      step=np.array(result.step), validation=np.array(result.validation), asked=asked, **leaves,
  )


def worker(arguments: argparse.Namespace) -> int:
  from ftp_jax import cli, distributed

  launch = distributed.Launch(
      arguments.coordinator, arguments.num_processes, arguments.process_id, "auto" if arguments.coordinator else "off",
      peer_timeout=PEER_TIMEOUT,
  )
  try:
    with distributed.together(launch, cli.outcome):
      tell = lambda line: os.write(arguments.events, f"{line}\n".encode()) if distributed.is_first() else None
      work(arguments.worker, tell, arguments.light)
  except distributed.Stopped:
    return distributed.STOPPED
  return 0


# --- the one that kills --------------------------------------------------------------------------


@dataclasses.dataclass
class Kill:
  """A signal for process `victim`, `delay` seconds after event `name` was told for the time number `count`."""

  name: str
  count: int
  delay: float
  victim: int
  signal: int = signal.SIGKILL


@dataclasses.dataclass
class Ended:
  """How the processes of a run ended: exit statuses, stderr, events, seconds from the kill to the end of each."""

  statuses: list[int]
  stderr: list[str]
  events: list[tuple[float, str]]
  after_kill: list[float]


def run(directory: pathlib.Path, processes: int, kill: Kill | None = None, light: bool = False) -> Ended:
  """Starts the run in `directory` and waits until all its processes ended, by themselves but for the one killed."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  read, write = os.pipe()
  environment = os.environ | {
      "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
      "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={1 if light else 2} "
      "--xla_backend_optimization_level=0",
      "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  started = []
  logs = [tempfile.TemporaryFile("w+") for _ in range(processes)]
  for i in range(processes):
    command = [sys.executable, __file__, f"--worker={directory}", f"--events={write}"] + ["--light"] * light
    if processes > 1:
      command += [f"--coordinator=localhost:{port}", f"--num-processes={processes}", f"--process-id={i}"]
    started.append(subprocess.Popen(command, env=environment, stderr=logs[i], pass_fds=[write]))
  os.close(write)
  events, killed_at = [], []

  def follow() -> None:
    count = 0
    with open(read, encoding="utf-8") as lines:
      for line in lines:
        events.append((time.monotonic(), line.strip()))
        if kill is not None and line.strip() == kill.name:
          count += 1
          if count == kill.count and not killed_at:
            time.sleep(kill.delay)
            killed_at.append(time.monotonic())
            started[kill.victim].send_signal(kill.signal)

  follower = threading.Thread(target=follow)
  follower.start()
  ends = []
  try:
    deadline = time.monotonic() + PATIENCE
    for process in started:
      process.wait(max(1, deadline - time.monotonic()))
      ends.append(time.monotonic())
  finally:
    for process in started:
      process.kill()
  follower.join()
  texts = []
  for log in logs:
    log.seek(0)
    texts.append(log.read())
    log.close()
  after = [round(end - killed_at[0], 2) for end in ends] if killed_at else []
  return Ended([process.returncode for process in started], texts, events, after)


def fingerprint(directory: pathlib.Path) -> dict[str, str]:
  """Digests of all that a run leaves and that must not depend on kills."""
  import orbax.checkpoint as ocp

  digest = lambda data: hashlib.sha256(data).hexdigest()[:16]
  found = {
      name: digest((directory / name).read_bytes()) for name in ("search/metrics.jsonl", "train/metrics.jsonl")
  }
  for name in ("result.npz", "search/search_state.npz"):
    with np.load(directory / name, allow_pickle=False) as arrays:
      found |= {f"{name}:{key}": digest(arrays[key].tobytes()) for key in arrays.files}
  last = max(int(path.name) for path in (directory / "train" / "checkpoints").iterdir() if path.name.isdigit())
  with ocp.StandardCheckpointer() as reader:
    arrays = reader.restore(directory / "train" / "checkpoints" / str(last) / "arrays")
  flat, step = [], {"train/checkpoints": str(last)}

  def collect(tree, path=""):
    if isinstance(tree, dict | list | tuple):
      for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        collect(value, f"{path}.{key}")
    elif tree is not None:
      flat.append((path, np.asarray(tree).tobytes()))

  collect(arrays)
  return found | step | {"train/checkpoints:arrays": digest(b"".join(data for _, data in sorted(flat)))}


def unfinished(directory: pathlib.Path) -> bool:
  """Whether a kill left a save that was not complete."""
  return any(path.name.endswith(".tmp") or "orbax-checkpoint-tmp" in path.name for path in directory.rglob("*"))


def draw(rng: np.random.Generator, events: list[tuple[float, str]], name: str, processes: int) -> Kill:
  """A kill at a random event of a kind, from what an undisturbed run told."""
  count = int(rng.integers(1, 1 + sum(event == name for _, event in events)))
  span = {"save search": 0.004, "save train": 0.06}.get(name, 0.03)
  victim = 0 if name.startswith("save") else int(rng.integers(processes))  # process 0 is the one that saves
  return Kill(name, count, float(rng.uniform(0, span)), victim)


def kill_once(directory: pathlib.Path, processes: int, kill: Kill) -> dict:
  """One kill: the record of how the run ended and whether a save was cut short."""
  ended = run(directory, processes, kill)
  record = dataclasses.asdict(kill) | {"cut_a_save": unfinished(directory), "statuses": ended.statuses}
  if ended.statuses[kill.victim] != -9:
    raise SystemExit(f"the run ended with {ended.statuses} before the kill {kill}:\n{ended.stderr[0]}")
  others = [i for i in range(processes) if i != kill.victim]
  return record | {
      "others_ended_after_s": [ended.after_kill[i] for i in others],
      "others_said_why": [f"process {kill.victim} of {processes} was lost" in ended.stderr[i] for i in others],
  }


def experiment(processes: int, kills: int, seed: int, directory: pathlib.Path) -> dict:
  """All kills of runs of so many processes."""
  undisturbed = run(directory / "undisturbed", processes)
  if any(undisturbed.statuses):
    raise SystemExit(f"the undisturbed run ended with {undisturbed.statuses}:\n{undisturbed.stderr}")
  expected = fingerprint(directory / "undisturbed")
  rng = np.random.default_rng([seed, processes])
  records = []
  for number in range(kills):
    phase = "search" if number % 4 < 2 else "train"
    during_save = number % 2 == 0
    for attempt in range(8):  # a save takes milliseconds: the first shot may come too late
      here = directory / f"kill{number}"
      shutil.rmtree(here, ignore_errors=True)
      kill = draw(rng, undisturbed.events, f"save {phase}" if during_save else phase, processes)
      record = kill_once(here, processes, kill)
      if record["cut_a_save"] or not during_save:
        break
    resumed = run(here, processes)
    found = fingerprint(here) if not any(resumed.statuses) else {}
    differing = [name for name in expected | found if expected.get(name) != found.get(name)]
    record |= {"attempts": attempt + 1, "resumed": resumed.statuses, "differing": differing}
    records.append(record)
    print(f"{processes} process(es), kill {number}: {record}", flush=True)
  return {
      "processes": processes, "kills": records, "identical": sum(not record["differing"] for record in records),
      "saves_cut_short": sum(record["cut_a_save"] for record in records),
  }


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
  parser.add_argument("--kills", type=int, default=10, metavar="N", help="for each number of processes; default: 10")
  parser.add_argument("--seed", type=int, default=0, metavar="N")
  parser.add_argument("--light", action="store_true", help=argparse.SUPPRESS)
  parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the outcome to this file")
  for name, kind in (("worker", str), ("events", int), ("coordinator", str), ("num-processes", int),
                     ("process-id", int)):
    parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.worker:
    return worker(arguments)

  from ftp_jax.errors import UserError, check_target
  from ftp_jax.machine import describe_machine

  if arguments.json:
    try:
      check_target(arguments.json)  # known now, not after the kills
    except UserError as error:
      sys.exit(f"survival: {error}")
  with tempfile.TemporaryDirectory() as directory:
    runs = [
        experiment(processes, arguments.kills, arguments.seed, pathlib.Path(directory) / str(processes))
        for processes in arguments.processes
    ]
  outcome = {"machine": describe_machine(), "seed": arguments.seed, "runs": runs}
  if arguments.json:
    arguments.json.write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
  failures = 0
  for result in runs:
    count = len(result["kills"])
    others = [second for record in result["kills"] for second in record["others_ended_after_s"]]
    print(f"{result['processes']} process(es): {count} kills, {result['saves_cut_short']} within a save, "
          f"{result['identical']} resumed to the bit" + (f"; others ended within {max(others)} s" if others else ""))
    failures += count - result["identical"]
    failures += sum(not all(record["others_said_why"]) for record in result["kills"])
  return 1 if failures else 0


if __name__ == "__main__":
  sys.exit(main())
