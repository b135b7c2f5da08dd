"""Makes chats about long texts: an excerpt of a document, a question about it, and the dense model's own answer.

  python experiments/long_chats.py --documents=books.jsonl,articles.txt --out=long_chats.jsonl

`--documents` are text files or JSON Lines with a `text` field; without any it is the prose that Python carries.
Documents are taken in a seeded order, each once before any a second time, excerpts of one do not overlap. Kinds of
questions take turns: `general` ones suit any text, `about` asks about a name in it (a long word where there is none),
`quote` for what follows some of its words, and `fact`, which has to be named, for a fact that is put before one of its
sentences, any of them. The answers are greedy. The file is one that `data.source=prompts` reads (with `data.chat=True`,
and at most --answer tokens as `data.continuation`), so that routers can be trained on such chats, and that
`main_table.py --long` measures all methods on; texts of the two should differ. Its lines name the `document`, so that
no two sets of a run share one while documents suffice.
"""

import hashlib
import json
import pathlib
import random
import re

import tqdm
from absl import flags

from ftp_jax import launch
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
# A fact and the question for it. The retrieval task of `ftp-jax eval` has other statements and things.
FACTS = (
    ("The meeting with {name} takes place in room {small}.", "In which room does the meeting with {name} take place?"),
    ("{name} keeps the spare key under the {place}.", "Where does {name} keep the spare key?"),
    ("The password that {name} chose is {word}.", "Which password did {name} choose?"),
    ("{name} was born in {year}.", "In which year was {name} born?"),
    ("The favourite fruit of {name} is the {fruit}.", "What is the favourite fruit of {name}?"),
    ("For the {place} {name} paid {small} dollars.", "How much did {name} pay for the {place}?"),
    ("The train to {town} leaves from platform {small}.", "From which platform does the train to {town} leave?"),
    ("The sister of {name} lives in {town}.", "Where does the sister of {name} live?"),
)
WORDS = {
    "name": (
        "Anna Berg", "Tom Hale", "Mr. Ortega", "Lucy Park", "Dr. Novak", "Omar Said", "Ruth Klein", "Ivan Petrov",
        "Mrs. Doyle", "Chen Wei", "Nadia Rossi", "Paul Mbeki",
    ),
    "place": ("doormat", "flowerpot", "piano", "bookshelf", "mailbox", "sofa", "carpet", "bench", "mirror", "cupboard"),
    "word": ("harvest", "lantern", "compass", "feather", "thunder", "velvet", "cinnamon", "granite", "meadow"),
    "fruit": ("pear", "cherry", "mango", "plum", "apricot", "melon", "fig", "papaya", "lemon", "grape"),
    "town": ("Lisbon", "Oslo", "Nairobi", "Kyoto", "Quebec", "Lima", "Dublin", "Cairo", "Vienna", "Hanoi"),
    "small": tuple(map(str, range(11, 99))),
    "year": tuple(map(str, range(1901, 1999))),
}
KINDS = ("general", "about", "quote", "fact")
_BATCH = 4
_QUOTED = 6  # words
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+(?: [A-Z][a-z]+)*")  # capitalised, not at the start of a sentence
_WORD = re.compile(r"[a-z]{8,}")
_SENTENCE = re.compile(r"(?<=[a-z][.!?])\s+")

_MODEL = flags.DEFINE_string("model", "smollm2-135m", "Model source, a chat model.")
_DOCUMENTS = flags.DEFINE_list("documents", [], "Files of long texts; none: the prose that Python carries.")
_OUT = flags.DEFINE_string("out", None, "File to write.", required=True)
_TOKENS = flags.DEFINE_integer("tokens", 960, "Tokens of an excerpt; more come on top.", lower_bound=2)
_ANSWER = flags.DEFINE_integer("answer", 32, "Tokens of an answer at most.", lower_bound=1)
_COUNT = flags.DEFINE_integer("count", 32, "Chats.", lower_bound=1)
_QUESTIONS = flags.DEFINE_list("questions", list(KINDS[:3]), "Kinds of questions, which take turns.")
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


def with_fact(text: str, rng: random.Random) -> tuple[str, str]:
  """The text with one of FACTS before a sentence, or what looks like one, and the question for it."""
  fact, ask = rng.choice(FACTS)
  words = {kind: rng.choice(options) for kind, options in WORDS.items()}
  ends = [found.end() for found in _SENTENCE.finditer(text)]
  at = rng.choice([0, *ends])
  return f"{text[:at]}{fact.format(**words)} {text[at:]}", ask.format(**words)


def question(kind: str, text: str, number: int, rng: random.Random) -> str:
  """A question of a kind but `fact`; `number` says which general one, asked where a text has no such words, too."""
  if kind == "about":
    names = _NAME.findall(text) or _WORD.findall(text)
    if names:
      return f'What does the text say about "{rng.choice(names)}"?'
  words = text.split()
  if kind == "quote" and len(words) > 2 * _QUOTED:
    start = rng.randrange(len(words) - 2 * _QUOTED)
    return f'Which words follow "{" ".join(words[start : start + _QUOTED])}" in the text?'
  return GENERAL[number % len(GENERAL)]


def main() -> None:
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
  prompts = []
  for i, (_, text) in enumerate(found):
    kind, rng = _QUESTIONS.value[i % kinds], random.Random(f"{_SEED.value} {i}")
    text, ask = with_fact(text, rng) if kind == "fact" else (text, question(kind, text, i // kinds, rng))
    prompts.append(f"{text}\n\n{ask}")
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
  launch.script(main)
