"""What the sources read: whole documents (str) or pairs of a prompt and its answer.

Sources, as named by `config.data.source`:
  embedded: the English prose that CPython carries for its own help(); no download, no file.
  text: a file of text, or JSON lines with a "text" field.
  prompts: JSON lines with instruction / input / output (Alpaca) or context / continuation, and maybe document and
    chat (true or false, in place of `config.data.chat`).
  hub: a Hugging Face data set whose rows have one of these shapes.
No boilerplate is put around a prompt: text that is the same in every prompt would reward routers
that skip the beginning.
"""

import contextlib
import importlib
import io
import json
import os
import pathlib
import re
import stat
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ftp_jax.errors import UserError

_HELD_TOPICS = 8  # embedded documents, last by name, that only perplexity reads
_REPEATED = 40  # characters from which a paragraph found twice is a copy rather than a connective
_ARTICLE = re.compile(r" = [^=\n]+ = \n")


class Pair(NamedTuple):
  """A prompt and the answer that continues it."""

  prompt: str
  answer: str
  is_instruction: bool  # the answer starts a new line after the prompt when no chat template is used
  document: str = ""  # what the prompt is about; while documents suffice no two sets share one. Empty: each is its own
  chat: bool | None = None  # whether the chat template is put around it; None: as the config says


def read_source(data) -> list[str] | list[Pair]:
  """Reads the records of `config.data`: documents or pairs, never both.

  Raises:
    UserError: the source is unknown, missing, empty or malformed.
  """
  _check_known(data)
  records = _SOURCES[data.source](data)
  if not records:
    raise UserError(f"data.path={data.path!r} holds no records; set it to a {data.source} source that has some.")
  return records


def check_source(data) -> None:
  """Raises UserError where the source is unknown, or a file that it would read cannot be opened."""
  _check_known(data)
  if data.source in ("prompts", "text"):
    check_file(data.path)


def _check_known(data) -> None:
  if data.source not in _SOURCES:
    raise UserError(f"data.source={data.source!r} is unknown; use one of {', '.join(_SOURCES)}.")


def check_file(path: str) -> None:
  """Raises UserError for a file that cannot be opened."""
  with _reading(path):
    if not stat.S_ISFIFO(os.stat(path).st_mode):  # a pipe can be opened only once
      open(path, "rb").close()


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
  """Turns what the system says of a file into a UserError."""
  if not path:
    raise UserError("data.path is empty; set it to the file to read.")
  try:
    yield
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}); name a readable file.") from None


def embedded_documents(held: bool) -> list[str]:
  """CPython's help topics: the few held ones, which only perplexity reads, or all others.

  The wording is that of the running Python version. Some topics quote others; a paragraph is kept
  where it comes first, so that no text is both trained on and tested on.
  """
  try:
    topics = importlib.import_module("pydoc_data.topics").topics
  except ImportError:
    raise UserError("This Python lacks its help topics; set data.source and data.path to text of your own.") from None
  documents, seen = [], set()
  for name in sorted(topics):
    paragraphs = [p for p in topics[name].split("\n\n") if p.strip() not in seen]
    seen.update(p.strip() for p in paragraphs if len(p.strip()) >= _REPEATED)
    documents.append("\n\n".join(paragraphs))
  return documents[-_HELD_TOPICS:] if held else documents[:-_HELD_TOPICS]


def read_documents(path: str) -> list[str]:
  """The documents of a `.jsonl` file ("text" fields) or of any other file (plain text).

  A plain text is one document, unless it starts with a WikiText heading (" = Title = "): then it is
  split into articles, and each is put together as in the usual evaluation of the raw WikiText sets:
  rows keep their line end, the row " \\n" becomes empty, and rows are joined with two line ends.
  """
  if pathlib.Path(path).suffix == ".jsonl":
    return [_field(record, "text", where) for where, record in read_jsonl(path)]
  text = read_text(path)
  rows = list(io.StringIO(text))
  if _is_wikitext(rows):
    return _articles(rows)
  return [text] if text.strip() else []


def _is_wikitext(rows: list[str]) -> bool:
  return bool(_ARTICLE.fullmatch(next((row for row in rows if row.strip()), "")))


def _articles(rows: list[str]) -> list[str]:
  """Joins WikiText rows into articles; joined with two line ends, these give the whole text."""
  articles: list[list[str]] = []
  for row in rows:
    if _ARTICLE.fullmatch(row) or not articles:
      articles.append([])
    articles[-1].append("" if row == " \n" else row)
  return ["\n\n".join(article) for article in articles]


def _read_pairs(path: str) -> list[Pair]:
  return [_pair(record, where) for where, record in read_jsonl(path)]


def _pair(record: dict[str, Any], where: str) -> Pair:
  document, chat = "" if record.get("document") is None else str(record["document"]), record.get("chat")
  if not isinstance(chat, bool | None):
    raise UserError(f"{where} has chat={chat!r}; it must be true or false, or be left out.")
  if "instruction" in record and "output" in record:
    parts = [_field(record, "instruction", where)]
    if record.get("input"):
      parts.append(_field(record, "input", where))
    return Pair("\n".join(parts), _field(record, "output", where), True, document, chat)
  if "context" in record and "continuation" in record:
    return Pair(_field(record, "context", where), _field(record, "continuation", where), False, document, chat)
  raise UserError(
      f"{where} has the fields {', '.join(sorted(record)) or '(none)'}; rename them to instruction, input and output, "
      "or to context and continuation."
  )


def _field(record: dict[str, Any], name: str, where: str) -> str:
  if not isinstance(record.get(name), str):
    found = f"{name!r} of type {type(record[name]).__name__}" if name in record else f"no {name!r}"
    raise UserError(f"{where} has {found}; every record needs a string {name!r}.")
  return record[name]


def read_text(path: str) -> str:
  """The text of a UTF-8 file, with or without a byte order mark; UserError if it cannot be read."""
  try:
    with _reading(path):
      return pathlib.Path(path).read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8.") from None


def read_jsonl(path: str) -> list[tuple[str, dict[str, Any]]]:
  """(where, record) of every line that is not blank; `where` names the line for error messages."""
  records = []
  for number, line in enumerate(io.StringIO(read_text(path)), start=1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except (ValueError, RecursionError) as error:  # the second: nested too deep
      reason = getattr(error, "msg", error)
      raise UserError(f"Line {number} of {path} is not JSON ({reason}); write one JSON object a line.") from None
    if not isinstance(record, dict):
      raise UserError(f"Line {number} of {path} is not a JSON object; write one JSON object a line.")
    try:
      json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # "\\ud83d" alone is valid JSON, but no text that a tokenizer takes
      raise UserError(f"Line {number} of {path} holds half a surrogate pair; mend or remove it.") from None
    records.append((f"Line {number} of {path}", record))
  return records


def _read_hub(data) -> list[str] | list[Pair]:
  """Rows of the data set `path`, or `path:subset`; `split` may be a slice such as "train[:20000]"."""
  if not data.path:
    raise UserError("data.path is empty; set it to the name of a Hugging Face data set.")
  import datasets  # costs seconds, and only this source needs it

  name, _, subset = data.path.partition(":")
  try:
    rows = datasets.load_dataset(name, subset or None, split=data.split)
  except Exception as error:  # the library raises its own, the hub client's, httpx's and the system's
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    raise UserError(
        f"Data set {data.path!r} (split {data.split!r}) cannot be loaded ({reason}); "
        "check the name, go online, or use data.source='prompts' or 'text' with a local file."
    ) from None
  located = [(f"Row {number} of {data.path}", row) for number, row in enumerate(rows)]
  # Alpaca on the hub has a text column as well, which holds the boilerplate preamble.
  columns = set(rows.column_names)
  if {"instruction", "output"} <= columns or {"context", "continuation"} <= columns or "text" not in columns:
    # A column `chat` there is somebody's own, such as a list of messages.
    return [_pair({name: row[name] for name in row if name != "chat"}, where) for where, row in located]
  texts = [_field(row, "text", where) for where, row in located]
  return _articles(texts) if _is_wikitext(texts) else texts


_SOURCES: dict[str, Callable[[Any], list]] = {
    "embedded": lambda data: embedded_documents(held=False),
    "prompts": lambda data: _read_pairs(data.path),
    "text": lambda data: read_documents(data.path),
    "hub": _read_hub,
}
