"""The excerpts and questions of experiments/long_chats.py."""

import random

import pytest

from ftp_jax.errors import UserError
from tests import scripts
from tests.test_data import byte_tokenizer


def test_excerpts_come_from_all_documents_and_do_not_overlap():
  documents = ["xy", "abcdefghij", "ABCDEF", "012"]  # 0, 3, 2 and 1 excerpts of three letters
  whole = {text[at : at + 3] for text in documents for at in range(0, len(text) - 2, 3)}
  script, tokenizer = scripts.load("long_chats"), byte_tokenizer()
  found = script.excerpts(documents, tokenizer, 3, 6, seed=0)
  assert {text for _, text in found} == whole and len(found) == 6
  names = {name: [text for own, text in found if own == name] for name, _ in found}
  assert sorted(map(len, names.values())) == [1, 2, 3] and len({name for name, _ in found[:3]}) == 3
  assert all(any(set("".join(texts)) <= set(text) for text in documents) for texts in names.values())
  assert set(names) == {name for name, _ in script.excerpts(documents[::-1], tokenizer, 2, 9, seed=1)} - {
      name for name, text in script.excerpts(documents[::-1], tokenizer, 2, 9, seed=1) if text == "xy"
  }  # of the text alone
  assert script.excerpts(documents, tokenizer, 3, 4, seed=0) == found[:4]
  assert any(script.excerpts(documents, tokenizer, 3, 6, seed=seed) != found for seed in (1, 2, 3))
  with pytest.raises(UserError, match="--count=7 excerpts of 3 tokens are needed, the documents have 6"):
    script.excerpts(documents, tokenizer, 3, 7, seed=0)


def test_questions_are_about_the_text():
  script, rng = scripts.load("long_chats"), random.Random(0)
  text = "In the year after, the good ship Ada Lovelace met Grace near the port of Reykjavik. It sailed on to Oslo."
  ask = lambda kind, number=0, text=text: script.question(kind, text, number, rng)
  assert [ask("general", n) for n in range(len(script.GENERAL))] == list(script.GENERAL)
  assert {ask("about") for _ in range(50)} == {
      f'What does the text say about "{name}"?' for name in ("Ada Lovelace", "Grace", "Reykjavik", "Oslo")
  }
  quotes = {ask("quote").split('"')[1] for _ in range(50)}
  assert len(quotes) > 3 and all(f"{quote} " in text and quote.count(" ") == 5 for quote in quotes)
  assert ask("about", text="at the beginning") == 'What does the text say about "beginning"?'  # no name in it
  assert [ask(kind, 1, "no no") for kind in ("about", "quote")] == [script.GENERAL[1]] * 2


def test_a_fact_is_put_before_a_sentence_and_asked_for():
  script = scripts.load("long_chats")
  text = "The ship left the harbour. It sailed on! Nobody saw where to? Oslo, Mr. Hale thought."
  starts = [text.index(word) for word in ("The", "It", "Nobody", "Oslo", "Hale")]  # Mr. looks like an end
  places, facts = set(), set()
  for seed in range(200):
    found, ask = script.with_fact(text, random.Random(seed))
    assert (found, ask) == script.with_fact(text, random.Random(seed)) and ask.endswith("?")
    (at,) = [n for n in starts if found[:n] == text[:n] and found.endswith(f". {text[n:]}")]
    fact = found[at : at + len(found) - len(text)]
    places.add(at)
    facts.add(ask.partition(" ")[0])
    shared = [word for word in ask.rstrip("?").split() if word[0].isupper() and word in fact]
    assert "{" not in found + ask and shared  # who or what it is about
  assert places == set(starts)
  assert facts >= {"Where", "Which", "In", "How", "What", "From"}
  assert script.with_fact("no sentence", random.Random(0))[0].endswith(". no sentence")
