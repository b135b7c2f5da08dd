"""The excerpts of experiments/long_chats.py."""

import pytest

from ftp_jax.errors import UserError
from tests import scripts
from tests.test_data import byte_tokenizer


def test_excerpts_come_from_all_documents_and_do_not_overlap():
  documents = ["abcdefghij", "ABCDEF", "012"]  # 3, 2 and 1 excerpts of three letters
  whole = {text[at : at + 3] for text in documents for at in range(0, len(text) - 2, 3)}
  script, tokenizer = scripts.load("long_chats"), byte_tokenizer()
  found = script.excerpts(documents, tokenizer, 3, 6, seed=0)
  assert set(found) == whole and len(found) == 6
  assert {text[0].isdigit() + 2 * text[0].isupper() for text in found[:3]} == {0, 1, 2}
  assert script.excerpts(documents, tokenizer, 3, 4, seed=0) == found[:4]
  assert any(script.excerpts(documents, tokenizer, 3, 6, seed=seed) != found for seed in (1, 2, 3))
  with pytest.raises(UserError, match="--count=7 excerpts of 3 tokens are needed, the documents have 6"):
    script.excerpts(documents, tokenizer, 3, 7, seed=0)
