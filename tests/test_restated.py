"""The items of experiments/restated.py, and what the evaluation reads of them."""

import pytest

from ftp_jax.errors import UserError
from ftp_jax.evaluation.harness.files import read_items
from tests import scripts
from tests.test_data import write_jsonl

FILLER = "some text about one thing and another that goes on and on with nothing to ask for"


def paragraph(number: int) -> str:
  first = f"on the day that it was built in {1900 + number} the Bridge near here seemed extraordinary . Then and"
  return " ".join([first, *[FILLER] * 4])


def test_items_say_again_what_stands_before_a_word_of_the_kind(tmp_path):
  script = scripts.load("restated")
  texts = [paragraph(n) for n in range(5)] + ["too short", FILLER]
  for kind, targets in (
      ("number", {f"{1900 + n}" for n in range(5)}), ("name", {"Bridge"}), ("word", {"seemed", "extraordinary"}),
  ):
    found = script.items(texts, kind, 40, 5, seed=0)
    assert {item["target"] for item in found} <= targets and len({item["id"] for item in found}) == 5
    for item in found:
      beginning, cue = item["context"].split("\n\nTo say it again: ")
      assert beginning in {" ".join(text.split()[:40]) for text in texts[:5]}
      assert len(cue.split()) == 8 and beginning.count(f"{cue} {item['target']}") == 1
      words = beginning.split()
      assert words.count(item["target"]) == 1 and words.index(item["target"]) < 20
    read = read_items(write_jsonl(tmp_path / f"{kind}.jsonl", found))
    assert read.kind == "target" and [item["id"] for item in read.items] == [item["id"] for item in found]
  assert script.items(texts, "number", 40, 5, seed=0) == script.items(texts, "number", 40, 5, seed=0)
  assert script.items(texts, "number", 40, 5, seed=0) != script.items(texts, "number", 40, 5, seed=1)


def test_too_few_paragraphs_are_one_sentence():
  script = scripts.load("restated")
  with pytest.raises(UserError, match="^5 paragraphs of 40 words have a number to ask for, not --count=6; lower it or"):
    script.items([paragraph(n) for n in range(5)] + [FILLER * 9], "number", 40, 6, seed=0)
  twice = [f"{paragraph(1)} {paragraph(1)}".replace(FILLER, "and")]  # the number stands there twice
  with pytest.raises(UserError, match="^0 paragraphs"):
    script.items(twice, "number", 40, 1, seed=0)
