"""Data: fixed-shape prompts, resumable batches, sources, disjoint splits and perplexity windows."""

import json
import os
import threading

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ftp_jax.config import get_config
from ftp_jax.data import sources
from ftp_jax.data.encoding import chat_turn
from ftp_jax.data.prompts import Prompts, batches, buckets_of, indices_at, pack, put_back, shuffled, take, turns
from ftp_jax.data.records import check_source, embedded_documents, read_documents
from ftp_jax.data.sources import SPLITS, load_prompts, load_splits
from ftp_jax.data.windows import perplexity_windows
from ftp_jax.errors import UserError

SPECIALS = ["<|bos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<|system|>You are helpful<|end|>\n{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Like Qwen3's: the last answer of a conversation is preceded by an empty thought, and there is no BOS.
THINKING_CHAT = (
    "<|system|>You are helpful<|end|>\n"
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}"
    "{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


def byte_tokenizer(chat_template=None, adds_bos=False):
  """One token a byte (ids in the order of the alphabet), the single merge "xy", and SPECIALS."""
  vocab = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
  vocab["xy"] = len(vocab)
  backend = Tokenizer(models.BPE(vocab=vocab, merges=[("x", "y")]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(SPECIALS)
  if adds_bos:
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))]
    )
  return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", chat_template=chat_template)


@pytest.fixture(scope="module")
def tokenizer():
  return byte_tokenizer(CHAT)


def data_config(**settings):
  """The data config with small defaults: at most 20 + 10 tokens, two prompts a split."""
  data = get_config().data
  data.update(source="prompts", min_context=1, max_context=20, continuation=10, min_continuation=1)
  data.update(num_search=2, num_train=2, num_validation=2, num_test=2)
  data.update(settings)
  return data


def write_jsonl(path, records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
  return str(path)


def rows_as_text(prompts, tokenizer):
  """(context text, continuation text) of every row; checks the padding."""
  texts = []
  for ids, context, length in zip(*prompts):
    assert 0 < context <= length <= len(ids) and not ids[length:].any()
    texts.append((tokenizer.decode(ids[:context]), tokenizer.decode(ids[context:length])))
  return texts


def numbered(count):
  return pack([([number], 1) for number in range(1, count + 1)], 2)


# Prompts and batches


def test_pack_pads_on_the_right_and_take_keeps_the_asked_order():
  prompts = pack([([5, 6, 7], 2), ([8], 1)], 4)
  swapped = take(prompts, [1, 0])
  np.testing.assert_array_equal(prompts.tokens, [[5, 6, 7, 0], [8, 0, 0, 0]])
  np.testing.assert_array_equal(swapped.tokens, [[8, 0, 0, 0], [5, 6, 7, 0]])
  assert swapped.context.tolist() == [1, 2] and swapped.length.tolist() == [1, 3]
  assert all(array.dtype == np.int32 for array in swapped)
  assert take(prompts, []).tokens.shape == (0, 4)


def test_batches_are_full_and_weight_every_prompt_once():
  got = list(batches(numbered(5), 2))
  assert [batch.prompts.tokens[:, 0].tolist() for batch in got] == [[1, 2], [3, 4], [5, 5]]
  assert [batch.weight.tolist() for batch in got] == [[1, 1], [1, 1], [1, 0]]
  assert [batch.rows.tolist() for batch in got] == [[0, 1], [2, 3], [4, 4]]


LENGTHS = pack([([n] * n, 1) for n in (3, 9, 4, 2, 5, 8, 4)], 9)


def test_every_prompt_is_in_the_narrowest_bucket_that_holds_it_or_fills_up_a_wider_one():
  in_words = lambda *arguments: [(width, rows.tolist()) for width, rows in buckets_of(LENGTHS, *arguments)]
  # None has 7 tokens, and none is longer than 9.
  assert in_words((2, 4, 6, 7, 20), 1) == [(9, [1, 5]), (6, [4]), (4, [0, 2, 6]), (2, [3])]
  assert in_words((2, 4, 6, 7, 20), 3) == [(9, [1, 4, 5]), (4, [0, 2, 3, 6])]  # the one of 5 tokens, that of 2
  assert in_words((2, 4, 6), 4) == in_words((), 1) == in_words((), 9) == [(9, list(range(7)))]


def test_batches_of_similar_length_hold_whole_prompts_once_and_results_return_to_their_places():
  made = list(batches(LENGTHS, 2, (4, 6)))
  assert [(b.prompts.tokens.shape, b.rows.tolist(), b.weight.tolist()) for b in made] == [
      ((2, 4), [3, 0], [1, 1]), ((2, 4), [2, 6], [1, 1]), ((2, 9), [4, 5], [1, 1]), ((2, 9), [1, 1], [1, 0]),
  ]
  for b in made:
    assert (b.prompts.length == (b.prompts.tokens > 0).sum(1)).all()
  twice, lengths = np.zeros((2, 7, 9), int), np.zeros(7, int)
  for b in made:
    marked = np.stack([b.prompts.tokens, -b.prompts.tokens])
    marked[:, b.weight == 0] = 7  # the row that fills a batch up
    put_back(twice, marked, b, 1)
    put_back(lengths, b.prompts.length, b, 0)
  np.testing.assert_array_equal(twice, [LENGTHS.tokens, -LENGTHS.tokens])
  np.testing.assert_array_equal(lengths, LENGTHS.length)


def test_turns_give_every_bucket_its_share_and_do_not_depend_on_their_number():
  buckets = buckets_of(pack([([1] * n, 1) for n in [2] * 70 + [4] * 29 + [6]], 6), (2, 4), 1)
  order = list(turns(buckets, 100))
  for bucket, count in zip(buckets, (1, 29, 70), strict=True):
    at = [step for step, (whose, _) in enumerate(order) if whose is bucket]
    assert [turn for whose, turn in order if whose is bucket] == list(range(count))
    share = count / 100  # after any number of steps nearly its share of them
    assert all(abs(done + 1 - share * (step + 1)) < 1.5 for done, step in enumerate(at))
  assert [(w.width, n) for w, n in turns(buckets, 9)] == [(w.width, n) for w, n in order[:9]]
  assert [turn for _, turn in turns(buckets_of(LENGTHS, (), 1), 5)] == [0, 1, 2, 3, 4]


def test_indices_visit_every_row_once_an_epoch_across_batch_boundaries():
  stream = np.concatenate([indices_at(5, 3, step, seed=7) for step in range(10)])
  epochs = stream.reshape(6, 5)
  assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs.tolist())
  assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1


def test_indices_depend_on_seed_and_step_alone():
  late = indices_at(50, 8, 1000, seed=3)
  indices_at(50, 8, 5, seed=3)
  np.testing.assert_array_equal(late, indices_at(50, 8, 1000, seed=3))
  assert (late != indices_at(50, 8, 1000, seed=4)).any()


def test_a_batch_larger_than_the_data_repeats_whole_epochs():
  assert sorted(indices_at(2, 4, 0, seed=0).tolist()) == [0, 0, 1, 1]


def test_shuffled_order_never_changes():
  # A resumed run must see the data of the interrupted one, whatever numpy it runs on.
  assert shuffled(8, 0, 1).tolist() == [7, 4, 5, 1, 6, 2, 0, 3]
  assert shuffled(0, 0).tolist() == []


# Prompts with answers


ALPACA = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Greet me", "input": "", "output": "hello, dear reader"},
]


def test_alpaca_rows_hold_the_instruction_and_nothing_else(tmp_path, tokenizer):
  path = write_jsonl(tmp_path / "a.jsonl", ALPACA)
  prompts, _, _ = load_prompts(data_config(path=path), tokenizer)
  assert rows_as_text(prompts, tokenizer) == [("Add.\n1 2\n", "3"), ("Greet me\n", "hello, dea")]
  assert prompts.tokens.shape == (2, 30)


def test_chat_drops_the_default_system_turn_and_keeps_bos_and_end_of_turn(tmp_path, tokenizer):
  path = write_jsonl(tmp_path / "a.jsonl", ALPACA)
  prompts, _, _ = load_prompts(data_config(path=path, chat=True), tokenizer)
  assert rows_as_text(prompts, tokenizer) == [
      ("<|bos|><|user|>Add.\n1 2<|end|>\n<|assistant|>", "3<|end|>"),
      ("<|bos|><|user|>Greet me<|end|>\n<|assistant|>", "hello, dea"),  # no room for the end of turn
  ]
  assert prompts.tokens[0, 0] == tokenizer.bos_token_id


@pytest.mark.parametrize("chat", [False, True])
def test_a_record_may_say_itself_whether_it_is_a_chat(chat, tmp_path, tokenizer):
  greeting = {"context": "Say hello ", "continuation": "now"}
  records = [greeting, greeting | {"chat": True}, greeting | {"chat": False}, ALPACA[0] | {"chat": False}]
  path = write_jsonl(tmp_path / "a.jsonl", records)
  prompts, _, _ = load_prompts(data_config(path=path, chat=chat), tokenizer)
  wrapped, plain = ("<|bos|><|user|>Say hello<|end|>\n<|assistant|>", "now<|end|>"), ("Say hello ", "now")
  assert rows_as_text(prompts, tokenizer) == (  # equal ones count once
      [wrapped, plain, ("Add.\n1 2\n", "3")] if chat else [plain, wrapped, ("Add.\n1 2\n", "3")]
  )


def test_chat_template_that_writes_the_last_answer_differently():
  turn = chat_turn(byte_tokenizer(THINKING_CHAT))
  assert (turn.before, turn.after) == ("<|user|>", "<|end|>\n<|assistant|><think></think>")


def test_context_and_continuation_are_tokenised_apart(tmp_path, tokenizer):
  path = write_jsonl(tmp_path / "a.jsonl", [{"context": "xy x", "continuation": "y xy", "id": 1}])
  prompts, _, _ = load_prompts(data_config(path=path), tokenizer)
  assert prompts.context.tolist() == [3] and prompts.length.tolist() == [6]  # xy,' ',x | y,' ',xy
  assert rows_as_text(prompts, tokenizer) == [("xy x", "y xy")]


def test_prompts_of_other_lengths_are_dropped(tmp_path, tokenizer):
  pairs = [("a" * 4, "bbb"), ("a" * 5, "bbb"), ("a" * 6, "bb"), ("a" * 7, "bbb"), ("a" * 8, "bbb")]
  path = write_jsonl(tmp_path / "a.jsonl", [{"context": c, "continuation": a} for c, a in pairs])
  data = data_config(path=path, min_context=5, max_context=7, min_continuation=3)
  prompts, _, found = load_prompts(data, tokenizer)
  assert prompts.context.tolist() == [5, 7]
  assert "5 records, of which 2 have a context outside 5..7 tokens and 1 an answer below 3" in found


def test_a_tokenizer_that_starts_texts_with_bos_starts_rows_so(tmp_path):
  tokenizer = byte_tokenizer(adds_bos=True)
  path = write_jsonl(tmp_path / "a.jsonl", [{"context": "ab", "continuation": "cd"}])
  prompts, _, _ = load_prompts(data_config(path=path), tokenizer)
  assert rows_as_text(prompts, tokenizer) == [("<|bos|>ab", "cd")]
  text = tmp_path / "a.txt"
  text.write_text("abcdefgh")
  prompts, _, _ = load_prompts(data_config(source="text", path=str(text), max_context=3, continuation=2), tokenizer)
  assert rows_as_text(prompts, tokenizer) == [("<|bos|>ab", "cd"), ("<|bos|>ef", "gh")]
  windows = perplexity_windows(str(text), tokenizer, num_windows=2, length=4)
  assert tokenizer.batch_decode(windows.tokens) == ["<|bos|>abc", "defg"]


# Splits


def test_splits_have_the_asked_sizes_no_common_row_and_no_common_prompt(tmp_path, tokenizer):
  records = [{"context": f"question {n % 30}", "continuation": f"answer {n % 45}"} for n in range(180)]
  data = data_config(path=write_jsonl(tmp_path / "a.jsonl", records), num_train=20, num_test=5)
  splits = load_splits(data, tokenizer)
  assert set(splits) == set(SPLITS)
  assert {name: len(prompts.tokens) for name, prompts in splits.items()} == dict(
      search=2, train=20, validation=2, test=5
  )
  rows = [row for prompts in splits.values() for row in rows_as_text(prompts, tokenizer)]
  assert len(set(rows)) == len(rows)
  asked = {name: {context for context, _ in rows_as_text(prompts, tokenizer)} for name, prompts in splits.items()}
  assert sum(map(len, asked.values())) == len(set().union(*asked.values()))


def test_splits_depend_on_the_seed_alone_and_held_sets_not_on_the_training_size(tmp_path, tokenizer):
  path = write_jsonl(tmp_path / "a.jsonl", [{"context": f"q{n}", "continuation": f"a{n}"} for n in range(60)])
  first = load_splits(data_config(path=path), tokenizer)
  more = load_splits(data_config(path=path, num_train=40), tokenizer)
  other = load_splits(data_config(path=path, seed=1), tokenizer)
  for name in ("test", "validation", "search"):
    np.testing.assert_array_equal(first[name].tokens, more[name].tokens)
  np.testing.assert_array_equal(first["train"].tokens, more["train"].tokens[:2])
  assert (first["test"].tokens != other["test"].tokens).any()


def test_the_training_set_alone_takes_shorter_prompts_last_and_none_of_a_held_document(tmp_path, tokenizer):
  long = [{"context": f"longer {n:02d}", "continuation": "a", "document": f"d{n}"} for n in range(12)]
  short = [{"context": f"s{n:02d}", "continuation": "a", "document": f"d{n}"} for n in range(24)]
  path = write_jsonl(tmp_path / "a.jsonl", short + long)
  texts = lambda splits, name: [context for context, _ in rows_as_text(splits[name], tokenizer)]
  plain = load_splits(data_config(path=path, min_context=9, num_train=6), tokenizer)
  more = load_splits(data_config(path=path, min_context=9, train_min_context=3, num_train=24), tokenizer)
  for name in ("test", "validation", "search"):
    assert texts(more, name) == texts(plain, name)
  train = texts(more, "train")
  assert train[:6] == texts(plain, "train")
  assert len(set(train)) == 24 and all(context.startswith("s") for context in train[6:])
  held = {context[-2:] for name in ("test", "validation", "search") for context in texts(more, name)}
  assert held == {f"{n:02d}" for n in range(12)} - {context[-2:] for context in train[:6]}
  assert not held & {context[-2:] for context in train}
  refused(
      data_config(path=path, min_context=9, train_min_context=3, num_train=25), tokenizer,
      r"31 prompts are needed .* 36 distinct ones .*; 12 of these prompts are long enough for the held sets",
  )


def test_exactly_enough_prompts_are_enough_and_a_set_may_be_empty(tmp_path, tokenizer):
  path = write_jsonl(tmp_path / "a.jsonl", [{"context": f"q{n}", "continuation": "a"} for n in range(6)])
  splits = load_splits(data_config(path=path, num_validation=0), tokenizer)
  assert splits["validation"].tokens.shape == (0, 30)
  texts = [context for prompts in splits.values() for context, _ in rows_as_text(prompts, tokenizer)]
  assert sorted(texts) == [f"q{n}" for n in range(6)]


def test_duplicates_count_once(tmp_path, tokenizer):
  path = write_jsonl(tmp_path / "a.jsonl", [{"context": f"q{n % 7}", "continuation": "a"} for n in range(70)])
  with pytest.raises(UserError, match=r"8 prompts are needed .* gives 7 distinct ones \(70 records"):
    load_splits(data_config(path=path), tokenizer)


def test_windows_of_one_document_stay_in_one_split(tmp_path, tokenizer):
  documents = [{"text": "".join(f"{letter}{n:02d}" for n in range(35))} for letter in "abcdefghijklmnopqrst"]
  path = write_jsonl(tmp_path / "a.jsonl", [*documents, {"text": "too short"}])
  data = data_config(source="text", path=path, num_test=8, num_train=18)
  splits = load_splits(data, tokenizer)
  letters = {}
  for name, prompts in splits.items():
    assert prompts.context.tolist() == [20] * len(prompts.context)
    assert prompts.length.tolist() == [30] * len(prompts.context)
    letters[name] = [tokenizer.decode(row[:1]) for row in prompts.tokens]
  assert len(set(letters["test"])) == 4  # at most a quarter of the set from one document
  assert sum(len(set(group)) for group in letters.values()) == len({x for group in letters.values() for x in group})
  assert {name: len(group) for name, group in letters.items()} == dict(search=2, train=18, validation=2, test=8)


def test_prompts_that_name_one_document_stay_in_one_split(tmp_path, tokenizer):
  letters = [letter for _ in (0, 1) for letter in "abcdefghijkl"]
  records = [{"context": f"{x}{n}", "continuation": "a", "document": x} for n, x in enumerate(letters)]
  path = write_jsonl(tmp_path / "a.jsonl", [*records, {"instruction": "g2", "output": "a", "document": "g"}])
  splits = load_splits(data_config(path=path, num_test=4, num_train=4), tokenizer)
  letters = {name: {context[0] for context, _ in rows_as_text(rows, tokenizer)} for name, rows in splits.items()}
  assert sum(map(len, letters.values())) == len(set().union(*letters.values()))
  assert len(letters["test"]) == 4  # at most a quarter of the set from one document
  unnamed = [{"context": f"q{n}", "continuation": "a", "document": None} for n in range(8)]
  assert len(load_splits(data_config(path=write_jsonl(tmp_path / "b.jsonl", unnamed)), tokenizer)["test"].tokens) == 2


def test_equal_prompts_belong_to_the_document_that_is_named_first(tmp_path, tokenizer):
  named = [{"context": f"q{n % 6}", "continuation": f"a{n}", "document": f"d{n}"} for n in range(12)]
  _, documents, _ = load_prompts(data_config(path=write_jsonl(tmp_path / "a.jsonl", named)), tokenizer)
  assert documents.tolist() == [0, 1, 2, 3, 4, 5] * 2


def test_a_pipe_is_opened_once(tmp_path, tokenizer):
  os.mkfifo(tmp_path / "pipe")
  lines = "".join(json.dumps({"context": f"q{n}", "continuation": "a"}) + "\n" for n in range(12))
  writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(lines,))
  writer.start()
  data = data_config(path=str(tmp_path / "pipe"))
  sources.check_lengths(data)
  check_source(data)
  assert len(load_prompts(data, tokenizer)[1]) == 12
  writer.join()


def test_finding_the_document_of_many_prompts_takes_few_steps_each():
  class Counted(dict):
    steps = 0

    def setdefault(self, *item):
      self.steps += 1
      return super().setdefault(*item)

  joined, count = Counted(), 2000
  for n in range(count):
    joined[sources._first(joined, "document")] = sources._first(joined, n)
  assert {sources._first(joined, n) for n in range(count)} == {count - 1}
  assert joined.steps < 20 * count  # without shortcuts a thousand steps each


def test_documents_that_share_a_prompt_are_one(tmp_path, tokenizer):
  asked = [("q0", "a"), ("q1", "b"), ("q0", "b"), ("q2", "c"), ("q1", None), ("q3", "c"), ("q4", "a")]
  records = [{"context": x, "continuation": f"{n}", "document": name} for n, (x, name) in enumerate(asked)]
  _, documents, _ = load_prompts(data_config(path=write_jsonl(tmp_path / "a.jsonl", records)), tokenizer)
  assert documents.tolist() == [0, 0, 0, 1, 0, 1, 0]


def test_few_documents_are_still_kept_whole(tmp_path, tokenizer):
  path = write_jsonl(tmp_path / "a.jsonl", [{"text": "".join(f"{x}{n:02d}" for n in range(42))} for x in "abcd"])
  splits = load_splits(data_config(source="text", path=path), tokenizer)
  letters = [{tokenizer.decode(row[:1]) for row in prompts.tokens} for prompts in splits.values()]
  assert sorted(map(sorted, letters)) == [["a"], ["b"], ["c"], ["d"]]


def test_a_single_text_is_cut_so_that_no_two_sets_are_neighbours(tmp_path, tokenizer):
  path = tmp_path / "book.txt"
  path.write_text("".join(f"{n:05d}" for n in range(11 * 6)))  # windows of 30 tokens = 6 numbers; 11 windows
  data = data_config(source="text", path=str(path))
  owner = {}
  for name, prompts in load_splits(data, tokenizer).items():
    for row in prompts.tokens:
      owner[int(tokenizer.decode(row[:5])) // 6] = name
  assert len(owner) == 8
  assert all(owner[n] == owner[n + 1] for n in owner if n + 1 in owner)
  path.write_text("".join(f"{n:05d}" for n in range(10 * 6)))
  with pytest.raises(UserError, match="8 prompts are needed .*up to 3 more.* gives 10 distinct"):
    load_splits(data, tokenizer)


# Sources


def test_embedded_text_needs_no_file_and_no_two_documents_share_a_paragraph(tokenizer):
  data = data_config(source="embedded", max_context=96, continuation=32, num_train=256, num_test=64)
  splits = load_splits(data, tokenizer)
  assert splits["train"].tokens.shape == (256, 128)
  documents = embedded_documents(held=False) + embedded_documents(held=True)
  paragraphs = [{p.strip() for p in text.split("\n\n") if len(p.strip()) >= 40} for text in documents]
  assert len(set().union(*paragraphs)) == sum(map(len, paragraphs)) > 1000


def test_hub_reads_rows_of_either_shape(tmp_path, tokenizer, monkeypatch):
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
  with_preamble = [{**row, "text": "Below is an instruction. " + row["instruction"]} for row in ALPACA]
  with_messages = [{**row, "chat": [row["instruction"], row["output"]]} for row in ALPACA]  # a column of their own
  files = {"pairs": ALPACA, "published": with_preamble, "messages": with_messages, "texts": [{"text": "w" * 65}]}
  for name, rows in files.items():
    (tmp_path / name).mkdir()
    write_jsonl(tmp_path / name / "train.jsonl", rows)
  for name in ("pairs", "published", "messages"):
    pairs, _, _ = load_prompts(data_config(source="hub", path=str(tmp_path / name)), tokenizer)
    assert rows_as_text(pairs, tokenizer)[0] == ("Add.\n1 2\n", "3")
  texts, _, found = load_prompts(data_config(source="hub", path=str(tmp_path / "texts")), tokenizer)
  assert rows_as_text(texts, tokenizer) == [("w" * 20, "w" * 10)]  # two equal windows count once
  assert "1 documents" in found


def test_wikitext_is_split_into_articles_that_join_to_the_usual_text(tmp_path):
  rows = [" \n", " = One = \n", " \n", " Text . \n", " = = Part = = \n", " \n", " = Two = \n", " End . \n"]
  path = tmp_path / "wiki.txt"
  path.write_text("".join(rows))
  articles = read_documents(str(path))
  assert articles[1:] == [
      " = One = \n\n\n\n\n Text . \n\n\n = = Part = = \n\n\n",
      " = Two = \n\n\n End . \n",
  ]
  assert "\n\n".join(articles) == "\n\n".join("" if row == " \n" else row for row in rows)


BAD_FILES = {
    "missing": (None, "cannot be read"),
    "empty": ("", "holds no records"),
    "bad line": ('{"context": "a", "continuation": "b"}\n\n{"context": \n', "^Line 3 of .*x.jsonl is not JSON"),
    "nested too deep": ("[" * 200_000 + "\n", "^Line 1 of .*x.jsonl is not JSON"),
    "not an object": ("[1]\n", "^Line 1 of .* is not a JSON object"),
    "other fields": ('{"question": "a", "reply": "b"}\n', "^Line 1 of .* has the fields question, reply; rename"),
    "wrong type": ('{"context": 3, "continuation": "b"}\n', "^Line 1 of .* has 'context' of type int"),
    "bad chat": ('{"context": "a", "continuation": "b", "chat": "no"}\n', "has chat='no'; it must be true"),
    "half a pair": ('{"context": "a", "continuation": "\\ud83d"}\n', "^Line 1 of .* holds half a surrogate pair"),
    "not UTF-8": (b"\xff\xfe", "is not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_prompt_files_are_refused_in_one_sentence(name, tmp_path, tokenizer):
  content, message = BAD_FILES[name]
  path = tmp_path / "x.jsonl"
  if content is not None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
  refused(data_config(path=str(path)), tokenizer, message)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(source="web"), "data.source='web' is unknown; use one of embedded, prompts, text, hub"),
        (dict(path=""), "data.path is empty"),
        (dict(source="hub", path=""), "data.path is empty"),
        (dict(source="hub", path="no-one/nothing"), "'no-one/nothing' .* cannot be loaded"),
        (dict(source="embedded", num_train=10**6), "^1000006 prompts are needed"),
        (dict(min_context=21), "data.min_context=21 and data.max_context=20 are not in order"),
        (dict(train_min_context=2), "data.train_min_context=2 must be at most data.min_context=1"),
        (dict(length_buckets=(8, 4)), r"data.length_buckets=\(8, 4\) must be whole numbers in ascending order"),
        (dict(length_buckets=(4, 4)), "data.length_buckets"),
        (dict(length_buckets=(1,)), "data.length_buckets"),
        (dict(length_buckets=(4096,)), "data.length_buckets.* less than data.max_context"),
        (dict(length_buckets=(8.5,)), "data.length_buckets"),
        (dict(min_continuation=0), "data.min_continuation=0"),
        (dict(num_test=-1), "is negative"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings, message, tokenizer):
  refused(data_config(**settings), tokenizer, message)


def test_text_records_without_text_are_refused(tmp_path, tokenizer):
  path = write_jsonl(tmp_path / "x.jsonl", [{"body": "a"}])
  refused(data_config(source="text", path=path), tokenizer, "^Line 1 of .* has no 'text'")


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", r"fails \(roles must alternate\)"),
        ("{{ 'a' + 1 }}", r"fails \(can only concatenate str"),
        ([{"name": n, "template": "x"} for n in ("tools", "plain")], r"fails \(.*multiple chat templates"),
        ("{{ messages[0]['content'] }}", "does not write turn after turn"),
    ],
)
def test_chat_without_a_usable_template_is_refused(template, message, tmp_path):
  path = write_jsonl(tmp_path / "x.jsonl", ALPACA)
  refused(data_config(path=path, chat=True), byte_tokenizer(template), message)


def refused(data, tokenizer, message):
  with pytest.raises(UserError, match=message) as caught:
    load_splits(data, tokenizer)
  assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


# Passages said twice


def repeating(tmp_path, text, **settings):
  """A config of 12 numbered prompts and passages of a text, contexts of 20 to 30 tokens."""
  records = [{"context": f"the longer question {n:02d}", "continuation": f"an answer {n}"} for n in range(12)]
  (tmp_path / "book.txt").write_text(text)
  data = data_config(
      path=write_jsonl(tmp_path / "a.jsonl", records), min_context=20, max_context=30, min_continuation=2, num_train=4,
  )
  data.update({"num_repeats": 5, "repeats_path": str(tmp_path / "book.txt")} | settings)
  return data


@pytest.mark.parametrize("adds_bos", [False, True])
def test_further_training_prompts_say_passages_twice(tmp_path, adds_bos):
  tokenizer, book = byte_tokenizer(adds_bos=adds_bos), "".join(chr(33 + n % 87) for n in range(400))
  data = repeating(tmp_path, book)
  none = repeating(tmp_path, book, num_repeats=0, repeats_path="none.txt")  # which is not read
  plain, splits = (load_splits(d, tokenizer) for d in (none, data))
  for name in ("search", "validation", "test"):
    np.testing.assert_array_equal(plain[name].tokens, splits[name].tokens)
  texts = rows_as_text(splits["train"], tokenizer)
  start = "<|bos|>" * adds_bos
  twice = [(context.removeprefix(start), after) for context, after in texts if "question" not in context]
  assert len(texts) == 9 and sorted(set(texts) - {(start + c, a) for c, a in twice}) == sorted(
      rows_as_text(plain["train"], tokenizer)
  )
  assert [row for row in texts if row[0].startswith(start + "the")] != texts[:4]  # in no order
  passages = set()
  for context, after in twice:
    passage, again = context.split("\n\n")
    passages.add(passage)
    assert passage in book and passage.startswith(again) and 12 <= len(passage) <= 20
    assert passage[len(again) :][:10] == after and 2 <= len(after) and 20 <= len(context) + adds_bos <= 30
  assert len(passages) == 5 and len({len(passage) for passage in passages}) > 1
  same, other = (load_splits(repeating(tmp_path, book, seed=seed), tokenizer)["train"] for seed in (0, 1))
  np.testing.assert_array_equal(same.tokens, splits["train"].tokens)
  assert (other.tokens != same.tokens).any()


@pytest.mark.parametrize("settings, message", [
    (dict(num_repeats=99), "has 20 passages of 20 tokens, not data.num_repeats=99; lower it or give a longer text"),
    (dict(max_context=22, min_continuation=10), None),  # room for passages of one length
    (dict(min_context=22, max_context=22, min_continuation=10), "leave no room to say a passage twice; widen them"),
    (dict(repeats_path=""), "data.num_repeats=5 passages are to be said twice, of no text; set data.repeats_path, or"),
    (dict(num_repeats=-1), "data.num_.* setting is negative"),
    (dict(repeats_path="nowhere.txt"), "nowhere.txt"),
])
def test_passages_that_cannot_be_said_twice(tmp_path, tokenizer, settings, message):
  data = repeating(tmp_path, "".join(chr(33 + n % 87) for n in range(400)), **settings)
  if message:
    refused(data, tokenizer, message)
  else:
    assert len(load_splits(data, tokenizer)["train"].tokens) == 9


# Perplexity windows


def test_perplexity_windows_are_consecutive_and_causal_everywhere(tmp_path, tokenizer):
  path = write_jsonl(tmp_path / "x.jsonl", [{"text": "abcdef"}, {"text": "ghijkl"}])
  windows = perplexity_windows(path, tokenizer, num_windows=3, length=4)
  assert tokenizer.batch_decode(windows.tokens) == ["abcd", "ef\n\n", "ghij"]
  assert windows.context.tolist() == [1, 1, 1] and windows.length.tolist() == [4, 4, 4]


def test_perplexity_text_defaults_to_embedded_prose_outside_the_splits(tokenizer):
  windows = perplexity_windows("", tokenizer, num_windows=4, length=64)
  text = "".join(tokenizer.batch_decode(windows.tokens))
  assert isinstance(windows, Prompts) and windows.tokens.shape == (4, 64)
  assert "\n\n".join(embedded_documents(held=True)).startswith(text)


def test_perplexity_text_that_is_too_short_is_refused(tmp_path, tokenizer):
  path = tmp_path / "x.txt"
  path.write_text("abc")
  with pytest.raises(UserError, match="1 perplexity windows of 4 tokens need 4 tokens, but .* has 3; ask for fewer"):
    perplexity_windows(str(path), tokenizer, num_windows=1, length=4)
  with pytest.raises(UserError, match="score nothing"):
    perplexity_windows(str(path), tokenizer, num_windows=1, length=1)
