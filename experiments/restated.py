r"""Makes items that ask for a number, a name or a word that a real text has stated: what is lost of what a text says.

  python experiments/restated.py --documents=wikitext2_valid.txt --out=restated
  ftp-jax eval --tasks=restated/number.jsonl,restated/name.jsonl,restated/word.jsonl --artifact=DIR --fallback=never

A context is the beginning of a paragraph and then, again, the words before one of its words; the target is that word.
It stands in the first half of the beginning, and nowhere else in it. There is a file of each kind, of lines {"id",
"context", "target"}: an answer is right if greedy decoding gives it. Unlike the retrieval task of `ftp-jax eval` it is
about text as it is written, and not about numbers alone. Many paragraphs are in the files of all kinds.
"""

import json
import pathlib
import re

import numpy as np
from absl import flags

from ftp_jax import launch
from ftp_jax.errors import UserError

KINDS = {  # what the word looks like
    "number": re.compile(r"\d{2,}"),
    "name": re.compile(r"[A-Z][a-z]{2,}"),
    "word": re.compile(r"[a-z]{5,}"),
}
_CUE = 8  # words that are said again before the target
_AGAIN = "\n\nTo say it again: "

_DOCUMENTS = flags.DEFINE_string("documents", None, "Text file, a paragraph a line.", required=True)
_OUT = flags.DEFINE_string("out", None, "Directory of the files.", required=True)
_WORDS = flags.DEFINE_integer("words", 160, "Words of a beginning.", lower_bound=2 * (_CUE + 2))
_COUNT = flags.DEFINE_integer("count", 120, "Items of each kind.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Which paragraphs, and which of their words.", lower_bound=0)


def items(paragraphs: list[str], kind: str, num_words: int, count: int, seed: int) -> list[dict[str, str]]:
  """`count` items of a kind, each of another paragraph.

  Raises:
    UserError: fewer paragraphs have a word of the kind.
  """
  rng, found = np.random.default_rng(seed), []
  for i in rng.permutation(len(paragraphs)):
    words = paragraphs[i].split()[:num_words]
    if len(words) < num_words:
      continue
    asked = [
        at for at in range(_CUE, num_words // 2)
        if KINDS[kind].fullmatch(words[at]) and sum(words[at] in word for word in words) == 1
        and words[at - 1][-1] not in '.!?"'  # no name, but the beginning of a sentence
    ]
    if asked:
      at = asked[rng.integers(len(asked))]
      cue = " ".join(words[at - _CUE : at])
      found.append({"id": f"{kind} {i}", "context": " ".join(words) + _AGAIN + cue, "target": words[at]})
    if len(found) == count:
      return found
  raise UserError(
      f"{len(found)} paragraphs of {num_words} words have a {kind} to ask for, not --count={count}; lower it or "
      "--words, or name a longer text."
  )


def main() -> None:
  try:
    lines = pathlib.Path(_DOCUMENTS.value).read_text(encoding="utf-8").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"--documents={_DOCUMENTS.value} cannot be read ({error}); name a text file.") from None
  out = pathlib.Path(_OUT.value)
  for path in (out / f"{kind}.jsonl" for kind in KINDS):
    if path.exists() and path.samefile(_DOCUMENTS.value):
      raise UserError(f"--out={out} would write over --documents; name another directory.")
  paragraphs = list(dict.fromkeys(lines))
  made = {kind: items(paragraphs, kind, _WORDS.value, _COUNT.value, _SEED.value) for kind in KINDS}
  try:
    out.mkdir(parents=True, exist_ok=True)
    for kind, records in made.items():
      path = out / f"{kind}.jsonl"
      path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
      print(f"{path}: {len(records)} items")
  except OSError as error:
    raise UserError(f"--out={out} cannot be written ({error}); name another directory.") from None


if __name__ == "__main__":
  launch.script(main)
