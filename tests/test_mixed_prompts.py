"""The three formats of experiments/mixed_prompts.py."""

import json

import pytest

from ftp_jax.data.encoding import chat_turn, encode_pairs
from ftp_jax.data.prompts import pack
from ftp_jax.data.records import Pair
from ftp_jax.errors import UserError
from tests import scripts
from tests.test_data import CHAT, byte_tokenizer, data_config, load_prompts, rows_as_text, write_jsonl


def test_chats_come_back_as_they_were_and_as_questions(tmp_path):
  script, tokenizer = scripts.load("mixed_prompts"), byte_tokenizer(CHAT)
  pairs = [Pair("Add.\n1 2", "3", True), Pair("Say A", "a long answer", True)]
  rows = [(m + a[:8], len(m)) for m, a in encode_pairs(pairs, tokenizer, True)]  # the second one cut
  records = script.chats(pack(rows, 60), tokenizer, chat_turn(tokenizer), "test")
  assert [record["context"] for record in records] == ["Add.\n1 2", "Say A"]
  questions = script.chats_and_questions(records, 1)[1:] + script.chats_and_questions(records[:1], 0)
  path = write_jsonl(tmp_path / "mixed.jsonl", records + questions)
  prompts, documents, _ = load_prompts(data_config(path=path, max_context=50, continuation=8), tokenizer)
  assert [prompts.tokens[i, :n].tolist() for i, n in enumerate(prompts.length[:2])] == [ids for ids, _ in rows]
  assert rows_as_text(prompts, tokenizer)[2:] == [
      ("Question: Say A\nAnswer:", " a long "), ("Question: Add.\n1 2\nAnswer:", " 3")
  ]
  assert documents.tolist() == [0, 1, 1, 0]  # in one set, whatever their format
  assert script.chats_and_questions(records, 1)[0] == records[0]
  plain = pack([(tokenizer.encode("Add."), 3)], 8)
  with pytest.raises(UserError, match="is not in the chat template; name a --config"):
    script.chats(plain, tokenizer, chat_turn(tokenizer), "test")


def test_paragraphs_begin_texts_and_have_contexts_of_all_lengths(tmp_path):
  script, tokenizer = scripts.load("mixed_prompts"), byte_tokenizer()
  lines = [chr(ord("a") + i) * 700 for i in range(20)] + ["short"]
  path = tmp_path / "text.txt"
  path.write_text("\n".join(lines))
  records = script.paragraphs(str(path), tokenizer, 3, 6, 20, seed=0)
  assert {record["context"][0] for record in records} == {line[0] for line in lines[:20]}
  assert {len(record["context"]) for record in records} == {3, 4, 5, 6}
  assert all(set(record["continuation"]) == set(record["context"]) and not record["chat"] for record in records)
  assert json.dumps(script.paragraphs(str(path), tokenizer, 3, 6, 20, seed=0)) == json.dumps(records)
  assert script.paragraphs(str(path), tokenizer, 3, 6, 20, seed=1) != records
  with pytest.raises(UserError, match="has 20 lines of more than 600 char.* 6 context tokens; 21 are asked"):
    script.paragraphs(str(path), tokenizer, 3, 6, 21, seed=0)
  with pytest.raises(UserError, match="has 0 lines"):
    script.paragraphs(str(path), tokenizer, 690, 690, 1, seed=0)
  with pytest.raises(UserError, match="cannot be read"):
    script.paragraphs(str(tmp_path / "none.txt"), tokenizer, 3, 6, 1, seed=0)
