"""Items -> lm-eval tasks: the prompts, answers and metrics of lm-eval's own tasks of these names, zero-shot.

An item becomes a document whose text and choices are already what the model reads; the task only names its fields.
MMLU's examples come from a file like mmlu_dev.jsonl, the first of the item's subject, as lm-eval takes them.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.api.utils import maybe_delimit

from ftp_jax.errors import UserError, brief
from ftp_jax.evaluation.harness.files import Item, ItemFile

BENCHMARKS = {  # name of the task and of its file: kind of its items
    "arc_easy": "choice", "arc_challenge": "choice", "hellaswag": "hellaswag", "winogrande": "winogrande",
    "mmlu": "mmlu",
}
_LETTERS = "ABCD"
_METRICS = {  # of each kind
    "choice": ("acc", "acc_norm"), "hellaswag": ("acc", "acc_norm"), "winogrande": ("acc",), "mmlu": ("acc",),
    "retrieval": ("acc",), "target": ("perplexity", "acc"), "text": ("word_perplexity", "byte_perplexity"),
}
_CHOOSE = dict(output_type="multiple_choice", doc_to_text="text", doc_to_choice="choices", doc_to_target="label")
_FIELDS = {
    # The options differ in what stands before the rest of the sentence, and the rest is scored: partial scoring.
    "winogrande": _CHOOSE | dict(doc_to_text="label", doc_to_target="continuation"),
    "target": dict(output_type="loglikelihood", doc_to_text="text", doc_to_target="continuation"),
    "text": dict(output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text"),
}


def build_task(name: str, kind: str, documents: Sequence[Item]) -> ConfigurableTask:
  """An lm-eval task over documents of `prepare` or `retrieval.documents`."""
  return ConfigurableTask(config={
      "task": name,
      "custom_dataset": lambda **unused: {"test": datasets.Dataset.from_list(list(documents))},
      "test_split": "test",
      "num_fewshot": 0,
      "metric_list": [{"metric": metric} for metric in _METRICS[kind]],
      **_FIELDS.get(kind, _CHOOSE),
  })


def prepare(file: ItemFile, indices: Sequence[int], examples: ItemFile | None = None, shots: int = 0) -> list[Item]:
  """Documents of a file's items at `indices`.

  Args:
    examples, shots: mmlu items after which, and how many of the same subject, an mmlu item stands.

  Raises:
    UserError: a subject has fewer examples.
  """
  make = _PREPARE[file.kind]
  if file.kind == "mmlu":
    of_subject: dict[str, list[Item]] = {}
    for item in examples.items if shots else ():
      of_subject.setdefault(item["subject"], []).append(item)
    for item in file.items if shots else ():
      found = of_subject.get(item["subject"], [])
      if len(found) < shots:
        raise UserError(
            f"{examples.path} has {len(found)} examples of {item['subject']}, but --shots={shots}; lower it."
        )
    make = lambda item: _mmlu(item, of_subject[item["subject"]][:shots] if shots else [])
  return [{"id": file.items[i]["id"], **make(file.items[i])} for i in indices]


def _choice(item: Item) -> Item:
  return {"text": f"Question: {item['context']}\nAnswer:", "choices": item["choices"], "label": item["label"]}


def _hellaswag(item: Item) -> Item:
  text = _without_marks(f"{item['activity_label']}: {item['ctx']}")
  return {"text": text, "choices": list(map(_without_marks, item["endings"])), "label": item["label"]}


def _without_marks(text: str) -> str:
  """Without the marks in brackets of HellaSwag's WikiHow texts."""
  return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _winogrande(item: Item) -> Item:
  before, _, after = item["sentence"].partition("_")
  choices = [before + item["option1"], before + item["option2"]]
  return {"choices": choices, "continuation": after.strip(), "label": item["label"]}


def _mmlu(item: Item, examples: Sequence[Item]) -> Item:
  subject = item["subject"].replace("_", " ")
  parts = [f"The following are multiple choice questions (with answers) about {subject}.\n\n"]
  parts += [f"{_question(example)} {_LETTERS[example['label']]}\n\n" for example in examples]
  text = "".join([*parts, _question(item)])
  return {"text": text, "choices": list(_LETTERS), "label": item["label"], "group": item["subject"]}


def _question(item: Item) -> str:
  lines = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, item["choices"])]
  return "\n".join([item["context"].strip(), *lines, "Answer:"])


def _target(item: Item) -> Item:
  whole = maybe_delimit(item["context"], item["target"])  # a blank between, unless one of them brings white space
  return {"text": item["context"], "continuation": whole[len(item["context"]) :]}


def _text(item: Item) -> Item:
  return {"text": item["text"]}


_PREPARE: dict[str, Callable[[Item], Item]] = {
    "choice": _choice, "hellaswag": _hellaswag, "winogrande": _winogrande, "mmlu": lambda item: _mmlu(item, ()),
    "target": _target, "text": _text,
}


@functools.cache
def _manager() -> Any:
  """lm-eval's index of tasks; it reads thousands of files, and only `hub_tasks` needs it."""
  from lm_eval.tasks import TaskManager

  return TaskManager()


def hub_tasks(name: str, shots: int | None, seed: int) -> dict[str, Task]:
  """lm-eval's own tasks of a name, group or tag, by name; their data comes from the hub.

  Args:
    shots, seed: examples before an item, as `lm_eval --num_fewshot` sets them, and what draws them.

  Raises:
    UserError: there is no such task, or its data cannot be had.
  """
  manager = _manager()
  if name not in manager.all_tasks:
    raise UserError(
        f"{name!r} is neither a file, nor one of {', '.join(BENCHMARKS)} and retrieval, nor a task of lm-eval; "
        "`lm_eval ls tasks` lists its tasks."
    )
  try:
    tasks = manager.load([name])["tasks"]
  except Exception as error:  # data sets raise their own, the hub client's, httpx's and the system's
    reason = brief(error).rstrip(".")
    raise UserError(
        f"The data of lm-eval's task {name!r} cannot be had ({reason}); go online, or read items from --data=DIR or "
        "from a file named by its path."
    ) from None
  for task_name, task in tasks.items():
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
      raise UserError(f"lm-eval's task {task_name!r} runs code of the model or shows images; leave it out.")
    default = task.get_config("num_fewshot")
    if default is None or (shots is not None and default != 0):  # a task that says 0 has no examples
      task.set_config("num_fewshot", shots or 0)
    task.set_fewshot_seed(seed)
  return tasks
