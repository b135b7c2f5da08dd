"""Makes chats about long texts: an excerpt of a document, a question about it, and the dense model's own answer.

  python experiments/long_chats.py --documents=documents.jsonl --out=long_chats.jsonl

`--documents` is a text file or JSON Lines with a `text` field. Documents are taken in a seeded order, each once before
any a second time, excerpts of one do not overlap. The answers are greedy. The file is one that `data.source=prompts`
reads (with `data.chat=True`, and at most --answer tokens as `data.continuation`), so that routers can be trained on
such chats, and that `main_table.py --long` measures all methods on; texts of the two should differ.
"""

import json
import pathlib
import sys

import tqdm
from absl import app, flags

from ftp_jax.config import get_config
from ftp_jax.data.encoding import encode_windows
from ftp_jax.data.prompts import shuffled
from ftp_jax.data.records import read_source
from ftp_jax.errors import UserError
from ftp_jax.inference import Engine

QUESTIONS = (
    "Summarize the text in one sentence.",
    "What is the text about?",
    "What does the text say at its very beginning?",
    "Who is mentioned in the text?",
    "What is the most important point of the text?",
    "Write a title for the text and explain it.",
)
_BATCH = 4

_MODEL = flags.DEFINE_string("model", "smollm2-135m", "Model source, a chat model.")
_DOCUMENTS = flags.DEFINE_string("documents", None, "File of long texts.", required=True)
_OUT = flags.DEFINE_string("out", None, "File to write.", required=True)
_TOKENS = flags.DEFINE_integer("tokens", 960, "Tokens of an excerpt; question and template come on top.", lower_bound=2)
_ANSWER = flags.DEFINE_integer("answer", 32, "Tokens of an answer at most.", lower_bound=1)
_COUNT = flags.DEFINE_integer("count", 32, "Chats.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Which excerpts.", lower_bound=0)


def excerpts(documents: list[str], tokenizer, tokens: int, count: int, seed: int) -> list[str]:
  """`count` excerpts of `tokens` tokens, BOS included; UserError where the documents have fewer."""
  windows = [rows for rows in encode_windows(documents, tokenizer, tokens) if rows]
  if sum(map(len, windows)) < count:
    raise UserError(
        f"--count={count} excerpts of {tokens} tokens are needed, the documents have {sum(map(len, windows))}; "
        "lower --count or --tokens."
    )
  left = [[windows[at][i] for i in shuffled(len(windows[at]), seed, 1)] for at in shuffled(len(windows), seed)]
  found = []
  while len(found) < count:
    for rows in filter(None, left):
      found.append(rows.pop())
  texts = tokenizer.batch_decode(found[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
  return [text.strip("\ufffd") for text in texts]  # a window may begin or end within a character


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"The argument {argv[1]!r} is not understood.")
  data = get_config().data
  data.source, data.path = "text", _DOCUMENTS.value
  documents, engine = read_source(data), Engine.load(_MODEL.value)
  tokenizer = engine.model.tokenizer
  texts = excerpts(documents, tokenizer, _TOKENS.value, _COUNT.value, _SEED.value)
  prompts = [f"{text.strip()}\n\n{QUESTIONS[i % len(QUESTIONS)]}" for i, text in enumerate(texts)]
  ids = [engine.encode(prompt, chat=True) for prompt in prompts]
  engine.check(ids, _ANSWER.value)
  answers = []
  for at in tqdm.trange(0, len(ids), _BATCH, desc="answers"):
    answers += engine.generate(ids[at : at + _BATCH], _ANSWER.value)
  if not any(answer.text.strip() for answer in answers):
    raise UserError(f"{_MODEL.value} answers nothing to any of them; name a chat model.")
  lines = [json.dumps({"context": p, "continuation": a.text}) for p, a in zip(prompts, answers) if a.text.strip()]
  pathlib.Path(_OUT.value).write_text("\n".join(lines) + "\n", encoding="utf-8")
  print(f"written {_OUT.value}: {len(lines)} chats of {min(map(len, ids))} to {max(map(len, ids))} context tokens")


if __name__ == "__main__":
  try:
    app.run(main)
  except UserError as error:
    sys.exit(f"long_chats: {error}")
