"""Makes chats about long texts: an excerpt of a document, a question about it, and the dense model's own answer.

  python experiments/long_chats.py --documents=books.jsonl,articles.txt --out=long_chats.jsonl

`--documents` are text files or JSON Lines with a `text` field; without any it is the prose that Python carries.
Documents are taken in a seeded order, each once before any a second time, excerpts of one do not overlap. Kinds of
questions take turns: `general` ones suit any text, `about` asks about a name in it (a long word where there is none)
and `quote` for what follows some of its words. The answers are greedy. The file is one that `data.source=prompts` reads
(with `data.chat=True`, and at most --answer tokens as `data.continuation`), so that routers can be trained on such
chats, and that `main_table.py --long` measures all methods on; texts of the two should differ. Its lines name the
`document`, so that no two sets of a run share one while documents suffice.
"""

import hashlib
import json
import pathlib
import random
import re
import sys

import tqdm
from absl import app, flags

from ftp_jax.data.encoding import encode_windows
from ftp_jax.data.prompts import shuffled
from ftp_jax.data.records import embedded_documents, read_documents
from ftp_jax.errors import UserError, check_target
from ftp_jax.files import replacing
from ftp_jax.inference import Engine

GENERAL = (
    "Summarize the text in one sentence.",
    "What is the text about?",
    "What does the text say at its very beginning?",
    "Who is mentioned in the text?",
    "What is the most important point of the text?",
    "Write a title for the text and explain it.",
)
KINDS = ("general", "about", "quote")
_BATCH = 4
_QUOTED = 6  # words
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+(?: [A-Z][a-z]+)*")  # capitalised, not at the start of a sentence
_WORD = re.compile(r"[a-z]{8,}")

_MODEL = flags.DEFINE_string("model", "smollm2-135m", "Model source, a chat model.")
_DOCUMENTS = flags.DEFINE_list("documents", [], "Files of long texts; none: the prose that Python carries.")
_OUT = flags.DEFINE_string("out", None, "File to write.", required=True)
_TOKENS = flags.DEFINE_integer("tokens", 960, "Tokens of an excerpt; question and template come on top.", lower_bound=2)
_ANSWER = flags.DEFINE_integer("answer", 32, "Tokens of an answer at most.", lower_bound=1)
_COUNT = flags.DEFINE_integer("count", 32, "Chats.", lower_bound=1)
_QUESTIONS = flags.DEFINE_list("questions", list(KINDS), "Kinds of questions, which take turns.")
_SEED = flags.DEFINE_integer("seed", 0, "Which excerpts, and what is asked of them.", lower_bound=0)


def excerpts(documents: list[str], tokenizer, tokens: int, count: int, seed: int) -> list[tuple[str, str]]:
  """`count` excerpts of `tokens` tokens, BOS included, each behind a name of its document, a digest of the text.

  Raises:
    UserError: the documents have fewer.
  """
  name = lambda text: hashlib.sha256(text.encode()).hexdigest()[:12]
  windows = [(name(text), rows) for text, rows in zip(documents, encode_windows(documents, tokenizer, tokens)) if rows]
  available = sum(len(rows) for _, rows in windows)
  if available < count:
    raise UserError(
        f"--count={count} excerpts of {tokens} tokens are needed, the documents have {available}; lower --count or "
        "--tokens, or name longer documents."
    )
  order = [windows[at] for at in shuffled(len(windows), seed)]
  left = [(document, [rows[i] for i in shuffled(len(rows), seed, 1)]) for document, rows in order]
  found = []
  while len(found) < count:
    found += [(document, rows.pop()) for document, rows in left if rows]
  names, rows = zip(*found[:count])
  texts = tokenizer.batch_decode(list(rows), skip_special_tokens=True, clean_up_tokenization_spaces=False)
  return list(zip(names, (text.strip("\ufffd").strip() for text in texts)))  # may be cut within a character


def question(kind: str, text: str, number: int, rng: random.Random) -> str:
  """A question of one of KINDS; `number` says which general one. A general one, too, where a text has no such words."""
  if kind == "about":
    names = _NAME.findall(text) or _WORD.findall(text)
    if names:
      return f'What does the text say about "{rng.choice(names)}"?'
  words = text.split()
  if kind == "quote" and len(words) > 2 * _QUOTED:
    start = rng.randrange(len(words) - 2 * _QUOTED)
    return f'Which words follow "{" ".join(words[start : start + _QUOTED])}" in the text?'
  return GENERAL[number % len(GENERAL)]


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"The argument {argv[1]!r} is not understood.")
  unknown = set(_QUESTIONS.value) - set(KINDS)
  if unknown or not _QUESTIONS.value:
    raise UserError(f"--questions={','.join(_QUESTIONS.value)} is unknown; kinds are {', '.join(KINDS)}.")
  out = pathlib.Path(_OUT.value)
  check_target(out, "out")  # known now, not after minutes of answers
  if out.exists() and any(pathlib.Path(path).exists() and out.samefile(path) for path in _DOCUMENTS.value):
    raise UserError(f"--out={out} is one of --documents; name another file.")
  documents = [text for path in _DOCUMENTS.value for text in read_documents(path)]
  documents = documents if _DOCUMENTS.value else embedded_documents(held=False)
  engine = Engine.load(_MODEL.value)
  found = excerpts(documents, engine.model.tokenizer, _TOKENS.value, _COUNT.value, _SEED.value)
  kinds = len(_QUESTIONS.value)
  asked = [
      question(_QUESTIONS.value[i % kinds], text, i // kinds, random.Random(f"{_SEED.value} {i}"))
      for i, (_, text) in enumerate(found)
  ]
  prompts = [f"{text}\n\n{ask}" for (_, text), ask in zip(found, asked)]
  ids = [engine.encode(prompt, chat=True) for prompt in prompts]
  engine.check(ids, _ANSWER.value)
  answers = []
  for at in tqdm.trange(0, len(ids), _BATCH, desc="answers"):
    answers += engine.generate(ids[at : at + _BATCH], _ANSWER.value)
  lines = [
      json.dumps({"context": prompt, "continuation": answer.text, "document": document})
      for prompt, answer, (document, _) in zip(prompts, answers, found) if answer.text.strip()
  ]
  if not lines:
    raise UserError(f"{_MODEL.value} answers nothing to any of them; name a chat model.")
  with replacing(out) as file:
    file.write(("\n".join(lines) + "\n").encode())
  print(f"written {out}: {len(lines)} chats of {min(map(len, ids))} to {max(map(len, ids))} context tokens")


if __name__ == "__main__":
  try:
    app.run(main)
  except UserError as error:
    sys.exit(f"long_chats: {error}")
