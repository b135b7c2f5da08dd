"""What is run and what is kept: jobs from the names of tasks, and one JSON file of results that grows job by job.

The file holds `machine`, `settings` (of the model, common to all tasks) and `tasks`: for each its settings, figures
and one record an item. A task in the file is not computed again; a changed setting is named instead.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.task import Task

from ftp_jax.errors import UserError
from ftp_jax.evaluation.harness import results, retrieval
from ftp_jax.evaluation.harness.adapter import EngineLM
from ftp_jax.evaluation.harness.files import Item, ItemFile, read_items, sample
from ftp_jax.evaluation.harness.tasks import BENCHMARKS, build_task, hub_tasks, prepare
from ftp_jax.stages import describe_changes, flatten, write_json

RETRIEVAL, FOREIGN, EXAMPLES = "retrieval", "lm_eval", "mmlu_dev.jsonl"


@dataclasses.dataclass(frozen=True)
class Suite:
  """Which tasks are run on which items.

  Attributes:
    tasks: names of benchmarks, paths of item files, `retrieval`, or names of lm-eval's own tasks.
    data: directory with `<benchmark>.jsonl`; None: benchmarks are lm-eval's own, from the hub.
    limit: items of a task, drawn by `seed`; None: all. Of retrieval, items of each length and depth.
    shots: examples before an mmlu question or an item of lm-eval's own tasks; None: the task's default.
    lengths, depths: of retrieval.
  """

  tasks: tuple[str, ...]
  data: str | None = None
  limit: int | None = None
  seed: int = 0
  shots: int | None = None
  lengths: tuple[int, ...] = retrieval.LENGTHS
  depths: tuple[float, ...] = retrieval.DEPTHS


@dataclasses.dataclass(frozen=True)
class Job:
  """One task that is ready to run.

  Attributes:
    settings: everything that its results depend on besides the model.
    documents: makes its documents from a tokenizer's encode; None for a task of lm-eval's own.
    task, indices: that task, and which of its documents are run (None: all).
  """

  name: str
  kind: str
  settings: dict[str, Any]
  documents: Callable[[Callable[[str], list[int]]], list[Item]] | None = None
  task: Task | None = None
  indices: list[int] | None = None


def plan(wanted: Suite) -> list[Job]:
  """Jobs of a suite; all files are read and all tasks loaded, so that mistakes show before anything is computed.

  Raises:
    UserError: the limit, a file or a name is wrong, or two tasks have one name.
  """
  if wanted.limit is not None and wanted.limit < 1:
    raise UserError(f"--limit={wanted.limit} must be at least 1.")
  if wanted.shots is not None and wanted.shots < 0:
    raise UserError(f"--shots={wanted.shots} must be at least 0.")
  if wanted.seed < 0:
    raise UserError(f"--seed={wanted.seed} must be at least 0.")
  if not wanted.tasks:
    raise UserError("There is no task; name some with --tasks=arc_easy,retrieval,FILE.jsonl.")
  jobs = [job for name in wanted.tasks for job in _plan_one(name, wanted)]
  for job in jobs:
    if sum(other.name == job.name for other in jobs) > 1:
      raise UserError(f"Two tasks are called {job.name!r}; rename a file or leave one out.")
  return jobs


def _plan_one(name: str, wanted: Suite) -> list[Job]:
  if name == RETRIEVAL:
    return [_retrieval(wanted)]
  if name in BENCHMARKS and wanted.data is not None:
    file = read_items(str(pathlib.Path(wanted.data) / f"{name}.jsonl"))
    if file.kind != BENCHMARKS[name]:
      raise UserError(
          f"{file.path} holds {file.kind!r} items, but {name} needs {BENCHMARKS[name]!r}; put its own file there."
      )
    return [_of_file(name, file, wanted)]
  path = pathlib.Path(name)
  if path.is_file() or path.suffix in (".jsonl", ".txt"):
    return [_of_file(path.stem, read_items(name), wanted)]
  return [_of_lm_eval(own, task, wanted) for own, task in hub_tasks(name, wanted.shots, wanted.seed).items()]


def _of_file(name: str, file: ItemFile, wanted: Suite) -> Job:
  shots = (wanted.shots or 0) if file.kind == "mmlu" else 0
  examples = read_items(str(pathlib.Path(wanted.data or pathlib.Path(file.path).parent) / EXAMPLES)) if shots else None
  if examples and examples.kind != "mmlu":
    raise UserError(f"{examples.path} holds {examples.kind!r} items; --shots needs mmlu examples there.")
  documents = prepare(file, sample(len(file.items), wanted.limit, wanted.seed), examples, shots)
  settings = {"digest": file.digest, "limit": wanted.limit, "seed": wanted.seed, "shots": shots}
  return Job(name, file.kind, settings | {"examples": examples and examples.digest}, lambda encode: documents)


def _retrieval(wanted: Suite) -> Job:
  count = retrieval.COUNT if wanted.limit is None else wanted.limit
  make = lambda encode: retrieval.documents(encode, wanted.lengths, wanted.depths, count, wanted.seed)
  settings = {"limit": count, "seed": wanted.seed, "lengths": wanted.lengths, "depths": wanted.depths}
  settings |= {"things and numbers": "drawn for each item"}  # once lengths and depths shared them
  return Job(RETRIEVAL, RETRIEVAL, settings, make)


def _of_lm_eval(name: str, task: Task, wanted: Suite) -> Job:
  indices = None if wanted.limit is None else sample(len(task.eval_docs), wanted.limit, wanted.seed)
  settings = {"limit": wanted.limit, "seed": wanted.seed, "shots": task.get_config("num_fewshot")}
  return Job(name, FOREIGN, settings, task=task, indices=indices)


def read_results(
    path: str | pathlib.Path, settings: dict[str, Any], jobs: Sequence[Job],
    advice: str = "name another file with --json",
) -> dict[str, Any]:
  """Finished tasks of a results file, by name; empty where there is none.

  Raises:
    UserError: the file is none of ours, or was made with other settings.
  """
  try:
    stored = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    before, tasks = stored["settings"], stored["tasks"]
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, KeyError, TypeError):
    raise UserError(f"{path} exists but holds no results; {advice}.") from None
  changes = describe_changes(flatten(before), flatten(settings))
  for job in jobs:
    if job.name in tasks and not changes:
      changes = describe_changes(flatten(tasks[job.name]["settings"]), flatten({"kind": job.kind, **job.settings}))
      changes = changes and f"{job.name}: {changes}"
  if changes:
    raise UserError(f"{path} was made with {changes}; {advice}, or delete it.")
  return tasks


def run(
    lm: EngineLM, jobs: Sequence[Job], settings: dict[str, Any], machine: dict[str, Any],
    path: str | pathlib.Path | None = None,
) -> dict[str, Any]:
  """Runs the jobs that are not in the results file yet, and writes it after each.

  Args:
    settings: of the model; what else a result depends on.
    path: the file; None: nothing is kept.

  Returns:
    By name what the file holds of each task: settings, machine, items, figures, groups, records, seconds.

  Raises:
    UserError: as `read_results`, or an item cannot be run.
  """
  for job in jobs:
    longest = max(job.settings["lengths"]) if job.kind == RETRIEVAL else 0
    if longest >= lm.max_length:
      raise UserError(f"Retrieval contexts of {longest} tokens exceed the {lm.max_length} of a pass; lower --lengths.")
  tasks = read_results(path, settings, jobs) if path else {}
  for job in jobs:
    if job.name in tasks:
      continue
    begin = time.perf_counter()
    found = _run_foreign(lm, job) if job.task else _run_own(lm, job)
    seconds = round(time.perf_counter() - begin, 1)
    if path:  # another process may have added to it
      tasks |= read_results(path, settings, jobs)
    own = {"settings": {"kind": job.kind, **job.settings}, "machine": machine}
    tasks[job.name] = own | found | {"seconds": seconds}
    if path:
      write_json(path, {"machine": machine, "settings": settings, "tasks": tasks})
  return tasks


def _run_own(lm: EngineLM, job: Job) -> dict[str, Any]:
  task = build_task(job.name, job.kind, job.documents(lm.tok_encode))
  samples, _ = results.run(lm, {job.name: task})
  records = results.record_items(job.kind, samples[job.name], lm)
  return {
      "items": len(records), "figures": results.summarise(job.kind, records),
      "groups": results.summarise_groups(job.kind, records), "records": records,
  }


def _run_foreign(lm: EngineLM, job: Job) -> dict[str, Any]:
  samples, figures = results.run(lm, {job.name: job.task}, job.indices and {job.name: job.indices})
  records = results.record_foreign(samples[job.name])
  items = len({record["id"] for record in records})
  return {
      "items": items, "figures": results.summarise_foreign(figures[job.name], records), "groups": {},
      "records": records,
  }
