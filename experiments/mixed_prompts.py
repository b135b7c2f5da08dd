r"""Makes prompts of three formats out of instructions and plain text: chats, plain questions, running text.

  python experiments/mixed_prompts.py --prompts=alpaca_5000.jsonl --documents=wikitext2_train.txt \
    --test_documents=wikitext2_valid.txt --out=mixed
  ftp-jax run --config=smollm2_135m_mixed --workdir=runs/mixed --config.data.path=mixed/train.jsonl

Routers that have seen chats alone lose more on running text (docs/recipe.md). The instructions are divided as a run of
--config on them divides them. `train.jsonl` holds the first of its training prompts as chats, the others as "Question:
...\nAnswer:" without the template, and beginnings of paragraphs of --documents. `chat.jsonl`, `question.jsonl` and
`text.jsonl` are for the test: the first of its test prompts in both formats, and paragraphs of --test_documents. All
are files that `data.source=prompts` and `main_table.py --long` read; every line says whether it is a chat.
"""

import json
import pathlib
from typing import Any

import numpy as np
from absl import flags

from ftp_jax import launch
from ftp_jax.data.encoding import ChatTurn, chat_turn
from ftp_jax.data.prompts import Prompts
from ftp_jax.data.sources import load_splits
from ftp_jax.errors import UserError
from ftp_jax.models.sources import describe

_PROMPTS = flags.DEFINE_string("prompts", None, "JSON Lines of instructions and answers.", required=True)
_CONFIG = flags.DEFINE_string("config", "smollm2_135m_late", "Run config with data.chat=True; its model and sets.")
_DOCUMENTS = flags.DEFINE_string("documents", None, "Text file, a paragraph a line, for training.", required=True)
_TESTED = flags.DEFINE_string("test_documents", None, "Another, for the test.", required=True)
_OUT = flags.DEFINE_string("out", None, "Directory of the files.", required=True)
_CHATS = flags.DEFINE_integer("chats", 273, "Training prompts that stay chats.", lower_bound=0)
_TEXTS = flags.DEFINE_integer("texts", 240, "Paragraphs for training.", lower_bound=0)
_TEST = flags.DEFINE_integer("test", 48, "Test prompts of each format.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 1, "Which paragraphs, and where their contexts end.", lower_bound=0)

_FILES = ("train", "chat", "question", "text")
_LEAST = 600  # characters of a paragraph
_AFTER = 20  # tokens after a context; runs cut them at their data.continuation

Record = dict[str, Any]


def chats(prompts: Prompts, tokenizer, turn: ChatTurn, name: str) -> list[Record]:
  """Prompts in the chat template as records: instruction and answer without it.

  Raises:
    UserError: a prompt is not in the chat template.
  """
  records = []
  for i, (ids, context, length) in enumerate(zip(*prompts)):
    prompt, answer = tokenizer.decode(ids[:context]), tokenizer.decode(ids[context:length])
    if not prompt.startswith(turn.before) or not prompt.endswith(turn.after):
      raise UserError("A prompt is not in the chat template; name a --config with data.chat=True.")
    prompt = prompt.removeprefix(turn.before).removesuffix(turn.after)
    end = tokenizer.decode(turn.end)
    records.append({
        "context": prompt, "continuation": answer.removesuffix(end), "document": f"{name} {i}", "chat": True,
    })
  return records


def question(record: Record) -> Record:
  """A chat as a plain question."""
  return record | {
      "context": f"Question: {record['context']}\nAnswer:", "continuation": " " + record["continuation"], "chat": False,
  }


def chats_and_questions(records: list[Record], num_chats: int) -> list[Record]:
  """The first `num_chats` chats as they are, the others as plain questions."""
  return records[:num_chats] + [question(record) for record in records[num_chats:]]


def paragraphs(path: str, tokenizer, shortest: int, longest: int, count: int, seed: int) -> list[Record]:
  """Beginnings of `count` paragraphs, of `shortest` to `longest` context tokens.

  Raises:
    UserError: there are fewer, or the file cannot be read.
  """
  try:
    lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path} cannot be read ({error}); name a text file.") from None
  texts = [line.strip() for line in lines if len(line) > _LEAST]
  rng, records = np.random.default_rng(seed), []
  for i in rng.permutation(len(texts)):
    if len(records) == count:
      break
    ids, context = tokenizer.encode(texts[i], add_special_tokens=False), int(rng.integers(shortest, longest + 1))
    if len(ids) >= context + _AFTER:
      records.append({
          "context": tokenizer.decode(ids[:context]), "continuation": tokenizer.decode(ids[context : context + _AFTER]),
          "document": f"{pathlib.Path(path).name} {i}", "chat": False,
      })
  if len(records) < count:
    raise UserError(
        f"{path} has {len(records)} lines of more than {_LEAST} characters that hold up to {longest} context tokens; "
        f"{count} are asked for."
    )
  return records


def main() -> None:
  out = pathlib.Path(_OUT.value)
  inputs = [pathlib.Path(path) for path in (_PROMPTS.value, _DOCUMENTS.value, _TESTED.value)]
  for name in _FILES:
    target = out / f"{name}.jsonl"
    if target.exists() and any(path.exists() and target.samefile(path) for path in inputs):
      raise UserError(f"--out={out} would write over {target}, which is read; name another directory.")
  source = ["--config.data.source=prompts", f"--config.data.path={_PROMPTS.value}"]
  config, _ = launch.load_config(_CONFIG.value, None, source)
  _, tokenizer, _ = describe(config.model.source)
  turn, data = chat_turn(tokenizer), config.data
  splits = load_splits(data, tokenizer)
  text = lambda path, count: paragraphs(path, tokenizer, data.min_context, data.max_context, count, _SEED.value)
  train, test = (chats(splits[name], tokenizer, turn, name) for name in ("train", "test"))
  test = test[: _TEST.value]
  if len(train) <= _CHATS.value or len(test) < _TEST.value:
    raise UserError(
        f"--config has {len(train)} training and {len(test)} test prompts; ask for fewer with --chats or --test."
    )
  contents = (
      chats_and_questions(train, _CHATS.value) + text(_DOCUMENTS.value, _TEXTS.value),
      test,
      chats_and_questions(test, 0),
      text(_TESTED.value, _TEST.value),
  )
  try:
    out.mkdir(parents=True, exist_ok=True)
    for name, records in zip(_FILES, contents, strict=True):
      lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
      (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
      print(f"{out / name}.jsonl: {len(records)} prompts")
  except OSError as error:
    raise UserError(f"--out={out} cannot be written ({error}); name another directory.") from None


if __name__ == "__main__":
  launch.script(main)
