"""Files of benchmark items: JSON Lines recognised by their fields, and texts; every line is checked.

    kind         fields of a line
    choice       context, choices, label                       a question and its answers (ARC)
    mmlu         subject, context, choices (four), label
    hellaswag    activity_label, ctx, endings, label
    winogrande   sentence with a "_", option1, option2, label
    target       context, target                               a text and its end (LAMBADA)
    text         text; also any file that is not .jsonl        a document

`label` is the number of the right answer, from 0. Other fields are left alone; `id` names an item in results.
"""

import dataclasses
import hashlib
import pathlib
from typing import Any

from ftp_jax.data.prompts import shuffled
from ftp_jax.data.records import read_documents, read_jsonl
from ftp_jax.errors import UserError

KINDS = {  # the first whose fields are all there
    "winogrande": ("sentence", "option1", "option2", "label"),
    "hellaswag": ("activity_label", "ctx", "endings", "label"),
    "mmlu": ("subject", "context", "choices", "label"),
    "choice": ("context", "choices", "label"),
    "target": ("context", "target"),
    "text": ("text",),
}
_LISTS = ("choices", "endings")
_LETTERS = 4  # choices of an mmlu question

Item = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ItemFile:
  """The items of a file, all of one kind, in its order; each has an `id`. digest: of the file's bytes."""

  path: str
  kind: str
  items: tuple[Item, ...]
  digest: str


def read_items(path: str) -> ItemFile:
  """Reads and checks a file.

  Raises:
    UserError: it cannot be read, has no items, or a line is broken, of unknown fields, of another kind or of an id that
      an earlier one has.
  """
  if pathlib.Path(path).suffix == ".jsonl":
    located = read_jsonl(path)
  else:
    located = [(f"Document {n} of {path}", {"text": text}) for n, text in enumerate(read_documents(path), 1)]
  if not located:
    raise UserError(f"{path} holds no items; write one JSON object a line, or text into a file without .jsonl.")
  kind, items, lines = None, [], {}
  for number, (where, record) in enumerate(located, 1):
    found = _kind(record, where)
    if kind not in (None, found):
      raise UserError(f"{where} is a {found!r} item, but those before it are {kind!r}; put them into two files.")
    kind = found
    _check(kind, record, where)
    name = str(number if record.get("id") is None else record["id"])
    if name in lines:
      raise UserError(f"{where} has the id {name!r} of {lines[name]}; give every item an id of its own, or none any.")
    lines[name] = where
    items.append({"id": name, **{field: record[field] for field in KINDS[kind]}})
  return ItemFile(str(path), kind, tuple(items), hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:16])


def _kind(record: Item, where: str) -> str:
  for kind, names in KINDS.items():
    if all(name in record for name in names):
      return kind
  known = "; ".join(", ".join(names) for names in KINDS.values())
  raise UserError(f"{where} has the fields {', '.join(sorted(record)) or '(none)'}, but items have one of: {known}.")


def _check(kind: str, record: Item, where: str) -> None:
  for name in KINDS[kind]:
    value = record[name]
    if name == "label":
      continue
    if name in _LISTS:
      if not isinstance(value, list) or len(value) < 2 or not all(isinstance(v, str) and v.strip() for v in value):
        raise UserError(f"{where} has {name} that are no list of two or more texts; mend the line.")
    elif not isinstance(value, str) or not value.strip():
      raise UserError(f"{where} has a {name!r} that is no text or an empty one; mend the line.")
  if kind == "winogrande" and "_" not in record["sentence"]:
    raise UserError(f'{where} has a sentence without "_"; mark the place of the options with it.')
  if kind == "mmlu" and len(record["choices"]) != _LETTERS:
    raise UserError(f"{where} has {len(record['choices'])} choices, but mmlu questions have {_LETTERS}; mend the line.")
  if "label" in KINDS[kind]:
    choices = 2 if kind == "winogrande" else len(record["endings" if kind == "hellaswag" else "choices"])
    label = record["label"]
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < choices:
      raise UserError(f"{where} has label={label!r}; give the number of the right answer, 0 to {choices - 1}.")


def sample(count: int, limit: int | None, seed: int) -> list[int]:
  """Which of `count` items are run, ascending: all, or `limit` drawn by the seed alone, whatever the model."""
  chosen = range(count) if limit is None else shuffled(count, seed)[:limit].tolist()
  return sorted(chosen)
