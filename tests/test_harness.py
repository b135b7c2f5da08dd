"""The lm-eval adapter against the masked reference; local tasks against lm-eval's own; retrieval; `ftp-jax eval`."""

import argparse
import functools
import json
import pathlib
import re
import subprocess
import sys
import types

import jax
import lm_eval
import numpy as np
import pytest
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean_stderr
from lm_eval.api.model import LM
from lm_eval.api.registry import get_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from ftp_jax import cli
from ftp_jax.errors import UserError
from ftp_jax.evaluation.harness import adapter, command, files, results, retrieval, suite, tasks
from ftp_jax.evaluation.harness.adapter import EngineLM, padding_for
from ftp_jax.evaluation.harness.generation import read_options
from ftp_jax.inference import Sampling, programs
from ftp_jax.routing.config import RoutingConfig
from tests.test_data import byte_tokenizer
from tests.test_inference import PLAIN, build, config, masked_logits, measured
from tests.test_inference import directories, fingerprints, served  # noqa: F401 - fixtures

BOS = PLAIN.bos_token_id
SKIPPING = dict(  # continuation tokens skip blocks too
    model_config=config(), routing=RoutingConfig("project", "argmax", decode_sparsity=0.4, decode_threshold=0.15)
)
ROOT = pathlib.Path(__file__).parent.parent
LM_EVAL = pathlib.Path(lm_eval.__file__).parent / "tasks"


def ask(lm, method, *arguments):
  """Answers of an adapter to requests with these arguments."""
  arguments = [entry if isinstance(entry, tuple) else (entry,) for entry in arguments]
  requests = [Instance(method, {}, entry, i) for i, entry in enumerate(arguments)]
  return getattr(lm, method)(requests, disable_tqdm=True)


def encode(text):
  return PLAIN.encode(text)


def reference(engine, context, continuation):
  """(log-probabilities, greedy) of token ids in one masked pass."""
  logits, _ = masked_logits(engine, [context + continuation], [len(context)])
  own = np.asarray(jax.nn.log_softmax(logits[0, len(context) - 1 : len(context) - 1 + len(continuation)]))
  return own[np.arange(len(continuation)), continuation], bool((own.argmax(-1) == continuation).all())


@pytest.fixture(scope="module")
def engine():
  return build(**SKIPPING)


@pytest.fixture(scope="module")
def lm(engine):
  return EngineLM(engine, progress=False)


# --- likelihoods -------------------------------------------------------------------------------------


def test_likelihoods_equal_the_masked_reference(engine, lm):
  greedy = engine.generate([encode("The tiny model")], 5, stop_tokens=())[0]
  asked = [
      ("The tiny model", " talks"), ("The tiny model", greedy.text), ("A bird", " sings at dawn"), ("A bird ", "flies"),
      ("", "No context"), ("<|bos|>Begun", " once"), ("x", "y"),
  ]
  split = [
      (encode("The tiny model"), encode(" talks")),
      (encode("The tiny model"), list(greedy.tokens)),
      (encode("A bird"), encode(" sings at dawn")),
      (encode("A bird"), encode(" flies")),  # blanks at the end of a context belong to the continuation
      ([BOS], encode("No context")),
      ([BOS, *encode("Begun")], encode(" once")),
  ]
  with pytest.raises(UserError, match="The continuation 'y' has 0 tokens"):
    ask(lm, "loglikelihood", asked[-1])  # "xy" is one token
  answers = ask(lm, "loglikelihood", *asked[:-1])
  for (total, is_greedy), pair in zip(answers, split):
    logprobs, expected = reference(engine, *pair)
    np.testing.assert_allclose(total, logprobs.sum(), atol=1e-4)
    assert is_greedy == expected
  assert [is_greedy for _, is_greedy in answers] == [False, True] + [False] * 4


def test_a_beginning_of_text_is_not_doubled():
  own = EngineLM(build(routing=None, tokenizer=byte_tokenizer(adds_bos=True)), progress=False)
  assert own.tok_encode("ab") == own.tok_encode("<|bos|>ab") == [BOS, *encode("ab")]
  assert own.tok_encode("ab", add_special_tokens=False) == encode("ab")
  whole, context = own.tok_encode("ab cd"), own.tok_encode("ab")
  assert own._encode_pair("ab", " cd") == (context, whole[len(context) :])


class Counting:
  """Passes on what the adapter needs and counts it: any object with these methods serves as an engine."""

  def __init__(self, engine):
    self.model, self._engine, self.prefilled, self.scored = engine.model, engine, [], []

  def prefill(self, prompts, padding):
    self.prefilled.append([len(p) for p in prompts])
    return self._engine.prefill(prompts, padding)

  def score(self, prefix, continuations, rows):
    self.scored.append([len(c) for c in continuations])
    return self._engine.score(prefix, continuations, rows)


def test_contexts_are_prefilled_once_and_batched_by_length(engine):
  counting = Counting(engine)
  contexts = ["of nine__", "short", "also nine"]
  asked = [(context, choice) for choice in (" a", " bcd") for context in contexts]
  answers = ask(EngineLM(counting, batch_size=2, progress=False), "loglikelihood", *asked)
  assert counting.prefilled == [[9, 9], [5, 5]]  # filled: one shape
  assert counting.scored == [[4, 4], [2, 2], [4, 2]]
  together = ask(EngineLM(engine, progress=False), "loglikelihood", *asked)
  np.testing.assert_allclose([t for t, _ in together], [t for t, _ in answers], atol=1e-4)


def test_long_continuations_are_scored_a_few_at_a_time(engine, monkeypatch):
  monkeypatch.setattr("ftp_jax.evaluation.harness.adapter._POSITIONS", 20)
  counting = Counting(engine)
  sizes = (12, 8, 5, 5, 3, 2)
  ask(EngineLM(counting, progress=False), "loglikelihood", *[("Hello", " " + "abcdefghijkl"[:n]) for n in sizes])
  assert counting.prefilled == [[5]] and counting.scored == [[13], [9, 6], [6, 4], [3, 3]]  # as 17, 9, 9, 9 positions


def test_few_programs_serve_many_lengths_and_change_no_score(engine):
  """Contexts of 20 to 64 tokens have two widths, continuations of 1 to 17 three; batches are filled."""
  rng = np.random.default_rng(0)
  text = lambda n: "".join(chr(c) for c in rng.integers(97, 123, n))
  asked = [(text(m), " " + text(n - 1)) for m, n in zip(rng.integers(20, 65, 21), rng.integers(2, 18, 21))]
  asked += [(context, " "[: 1 + n % 2] + "?" * (n % 2)) for n, (context, _) in enumerate(asked[:9])]
  counts = lambda: np.array([programs.prefill._cache_size(), programs.score._cache_size()])
  before = counts()
  answers = ask(EngineLM(engine, batch_size=4, progress=False), "loglikelihood", *asked)
  assert (counts() - before <= [2, 6]).all()
  prefix = engine.prefill([encode(context) for context, _ in asked])
  for (total, greedy), score in zip(answers, engine.score(prefix, [encode(c) for _, c in asked], range(len(asked)))):
    np.testing.assert_allclose(total, score.total, atol=1e-5 * len(score.logprobs))
    assert greedy == score.greedy


def test_widths_are_finer_where_there_are_more_contexts_to_pad():
  widths = lambda contexts: len({padding_for(contexts).context(n, 2048) for n in range(33, 65)})
  assert [widths(contexts) for contexts in (1, 511, 512, 2048, 8192, 10**6)] == [1, 1, 2, 4, 8, 8]


def test_contexts_that_are_too_long_lose_their_beginning(engine):
  context, continuation = "The beginning is cut and the end is kept", " as is"
  for max_length, kept in ((6, 1), (44, 39)):
    (answer,) = ask(EngineLM(engine, max_length=max_length, progress=False), "loglikelihood", (context, continuation))
    logprobs, _ = reference(engine, encode(context)[-kept:], encode(continuation))
    np.testing.assert_allclose(answer[0], logprobs.sum(), atol=1e-4)
  with pytest.raises(UserError, match="has 6 tokens, but 1 to 5 can be scored"):
    ask(EngineLM(engine, max_length=5, progress=False), "loglikelihood", (context, continuation))


def rolling_reference(engine, tokens, width):
  """By hand: windows of `width` inputs; the last one is full again and scores only what is left."""
  total, done = 0.0, 0
  stream = [BOS, *tokens]
  while done < len(tokens):
    end = min(done + width, len(tokens))
    begin = max(0, end - width)
    logprobs, _ = reference(engine, stream[begin : begin + 1], stream[begin + 1 : end + 1])
    total += logprobs[done - begin :].sum()
    done = end
  return total


@pytest.mark.parametrize("width", [10, 40])
def test_rolling_likelihood_is_causal_in_windows(engine, width):
  texts = ["A text of some thirty-seven characters", "Ten tokens", "x"]
  answers = ask(EngineLM(engine, max_length=width, progress=False), "loglikelihood_rolling", *texts)
  np.testing.assert_allclose(answers, [rolling_reference(engine, encode(t), width) for t in texts], atol=2e-4)


def test_texts_whose_tokens_would_not_skip_below_a_crossover_are_refused():
  for context in (10, None):  # None: never faster than dense
    lm = EngineLM(build(**SKIPPING, crossover=measured(context)), progress=False)
    with pytest.raises(UserError, match="below the artifact's crossover.* set --fallback=never"):
      ask(lm, "loglikelihood_rolling", "A text")
    assert len(ask(lm, "loglikelihood", ("A context", " goes on"))) == 1
    ask(EngineLM(build(**SKIPPING, crossover=measured(context), fallback="always"), progress=False),
        "loglikelihood_rolling", "A text")
  ask(EngineLM(build(**SKIPPING, crossover=measured(10), fallback="never"), progress=False),
      "loglikelihood_rolling", "A text")


def test_rolling_likelihood_with_all_new_tokens_computed_is_that_of_the_dense_model(lm):
  text = "Nothing is pruned after a context of one token."
  skipping = ask(lm, "loglikelihood_rolling", text)
  strict, dense = build(**SKIPPING, decode_sparsity=0.0), build(SKIPPING["model_config"], None)
  strict, dense = (ask(EngineLM(e, progress=False), "loglikelihood_rolling", text) for e in (strict, dense))
  np.testing.assert_allclose(strict, dense, atol=1e-4)
  assert abs(skipping[0] - dense[0]) > 0.1


def test_an_empty_text_has_likelihood_one(lm):
  assert ask(lm, "loglikelihood_rolling", "") == [0.0]


# --- generation --------------------------------------------------------------------------------------


PROMPTS = ("The tiny model", "A bird in hand")  # of one length: few shapes to compile
OPTIONS = {"until": [], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0}


def test_generation_stops_and_cuts(engine, lm):
  free = [g.text for g in engine.generate([encode(p) for p in PROMPTS], 20)]
  assert ask(lm, "generate_until", *[(p, OPTIONS) for p in PROMPTS]) == free
  stop = free[1][3:5]
  answers = ask(lm, "generate_until", *[(p, OPTIONS | {"until": [stop, "not there"]}) for p in PROMPTS])
  assert answers == [text.partition(stop)[0] for text in free] and len(answers[1]) <= 3
  mixed = ask(lm, "generate_until", (PROMPTS[0], OPTIONS | {"max_gen_toks": 18}), (PROMPTS[1], OPTIONS))
  assert mixed == [free[0][:18], free[1]]


def test_sampled_generations_do_not_depend_on_the_batch(engine):
  options = OPTIONS | {"until": ["never said"], "do_sample": True, "temperature": 0.9, "top_p": 0.95}
  asked = [(PROMPTS[0], options)] * 3 + [(PROMPTS[1], options)]
  made = lambda size, seed: EngineLM(engine, batch_size=size, seed=seed, progress=False)
  draw = lambda size, seed=3: ask(made(size, seed), "generate_until", *asked)
  first = draw(2)
  assert first == draw(8) and len(set(first)) == 4
  assert draw(2, seed=4)[:2] == first[1:3]
  expected = engine.generate([encode(p) for p in PROMPTS], 20, Sampling(0.9, 0.95), seed=5)
  assert first[2:] == [generation.text for generation in expected]


def test_prompts_that_are_too_long_lose_their_beginning_before_generation(engine):
  own = EngineLM(engine, max_length=34, progress=False)
  prompt = "The beginning is cut and the end is kept"
  expected = [g.text for g in engine.generate([encode(prompt)[-14:], [BOS]], 20)]
  assert ask(own, "generate_until", (prompt, OPTIONS), ("", OPTIONS)) == expected


def test_options_of_generation():
  assert read_options({}) == read_options({"until": None, "do_sample": False, "temperature": 0.7})
  assert read_options({}).max_new_tokens == 256
  assert read_options({"until": "\n", "max_tokens": 9, "num_beams": 1}).until == ("\n",)
  assert read_options({"max_tokens": 9, "max_gen_toks": 7}).max_new_tokens == 7
  assert read_options({"temperature": 0.5}).sampling == Sampling(0.5)
  assert read_options({"temperature": 0.5, "top_p": 0.9, "do_sample": True}).sampling == Sampling(0.5, 0.9)


# --- arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda e: EngineLM(e, batch_size=0), "batch_size=0"),
        (lambda e: EngineLM(e, max_length=129), "max_length=129 must lie in 1..128"),
        (lambda e: EngineLM.create_from_arg_string("modle=a"), "model_args has no 'modle'; it knows model, artifact"),
        (lambda e: EngineLM.create_from_arg_string("batch_size=1.5"), "batch_size=1.5 must be a whole number"),
        (lambda e: EngineLM.create_from_arg_string("decode_sparsity=much"), "decode_sparsity='much' must be a number"),
        (lambda e: EngineLM.create_from_arg_string("artifact=true"), "artifact=True must be a text"),
        (lambda e: EngineLM.create_from_arg_string("dtype=int8"), "dtype='int8' is unknown"),
        (lambda e: EngineLM.create_from_arg_string("model=/no/such/place"), "is no model source"),
        (lambda e: EngineLM.create_from_arg_string("artifact=/no/such/place"), "has no ftp_config.json"),
        (lambda e: read_options({"until": 3}), "until=3 must be a text"),
        (lambda e: read_options({"max_gen_toks": 0}), "max_gen_toks=0 must be a whole number"),
        (lambda e: read_options({"max_gen_toks": "9"}), "max_gen_toks='9' must be a whole number"),
        (lambda e: read_options({"top_k": 50}), "top_k=50 is not supported"),
        (lambda e: read_options({"temperature": "hot"}), "temperature='hot' must be a number"),
        (lambda e: read_options({"do_sample": True}), "needs a temperature above 0"),
        (lambda e: read_options({"temperature": -1.0, "do_sample": True}), "temperature=-1.0"),
        (lambda e: ask(EngineLM(e, max_length=9, progress=False), "generate_until", ("a", {"max_gen_toks": 9})),
         "leaves no room for a context within 9 positions"),
    ],
)
def test_mistakes_are_one_sentence(engine, call, message):
  with pytest.raises(UserError) as error:
    call(engine)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_a_template_without_system_turns_leaves_them_out():
  refusing = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}" + (
      "[{{ m.role }}] {{ m.content }}{% endfor %}"
  )
  lm = EngineLM(build(tokenizer=byte_tokenizer(refusing)))
  turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
  assert lm.apply_chat_template(turns) == lm.apply_chat_template(turns[1:]) == "[user] Hello"


def test_a_template_that_fails_is_one_sentence():
  lm = EngineLM(build(tokenizer=byte_tokenizer("{{ 'a' + 1 }}")))
  with pytest.raises(UserError, match=r"chat template fails \(can only concatenate str .*\); leave it out\."):
    lm.apply_chat_template([{"role": "user", "content": "Hello"}])


def test_an_lm_eval_of_another_version_is_one_sentence(monkeypatch):
  monkeypatch.setitem(sys.modules, "ftp_jax.evaluation.harness.adapter", None)
  with pytest.raises(UserError, match=r"lm-eval 0\.4\.13 does not fit .*; run pip install '\.\[eval\]'"):
    command.run(argparse.Namespace(json=None, artifact=None, decode_sparsity=None, decode_threshold=None))


def test_lm_eval_knows_the_model():
  assert get_model("ftp_jax") is EngineLM


# --- items and tasks -----------------------------------------------------------------------------------


ITEMS = {
    "choice": [
        {"context": "Which is a metal?", "choices": ["wood", "iron", "wool"], "label": 1},
        {"context": "What falls from clouds?", "choices": ["sand", "rain", "salt", "milk", "oil"], "label": 0},
    ],
    "hellaswag": [
        {"activity_label": "Baking", "ctx": "A cook opens  the oven. He", "label": 1,
         "endings": ["is swimming.", "takes out [laughs] a loaf.", "flies away.", "paints it."]},
        {"activity_label": "Sewing", "ctx": "[header] How to sew [title] Take a needle. ", "label": 3,
         "endings": ["Sleep.", "Run  home.", "Eat it.", "Thread it [substeps] now."]},
    ],
    "winogrande": [
        {"sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve", "label": 1},
        {"sentence": "The cup did not fit on the shelf as the _ was small.", "option1": "cup", "option2": "shelf",
         "label": 1},
    ],
    "mmlu": [
        {"subject": "world_religions", "context": " How many? ", "choices": ["1", "2", "3", "4"], "label": 2},
        {"subject": "anatomy", "context": "Where is it?", "choices": ["in", "on", "by", "at"], "label": 0},
    ],
    "target": [{"context": "One plus one is", "target": "two"}, {"context": "A, B, C,\n", "target": "D"}],
    "text": [{"text": "A short text of words."}, {"text": "Another one\nof two lines, longer than the first."}],
}


def write_items(path, items):
  path.write_text("".join(json.dumps(item) + "\n" for item in items))
  return str(path)


def requests_of(task, shots=0):
  """What a task asks a model for, document by document."""
  asked = []
  for doc in task.eval_docs:
    requests = task.construct_requests(doc, task.fewshot_context(doc, shots), metadata=("", 0, 1))
    asked.append([request.args for request in (requests if isinstance(requests, list) else [requests])])
  return asked


def own_task(kind, items, path, examples=None, shots=0):
  file = files.read_items(write_items(path / f"{kind}.jsonl", items))
  assert file.kind == kind
  return tasks.build_task(kind, kind, tasks.prepare(file, range(len(items)), examples, shots))


def theirs(name, rows, **splits):
  """lm-eval's own task of a file of its installation, with its data set replaced by these rows."""
  config = load_yaml(LM_EVAL / f"{name}.yaml")
  split = config.get("test_split") or config["validation_split"]
  for key in ("tag", "dataset_path", "dataset_name", "training_split", "task_alias"):
    config.pop(key, None)
  made = {split: rows, **splits}
  if config.get("validation_split") not in made:
    config.pop("validation_split", None)
  config["custom_dataset"] = lambda **unused: {name: Dataset.from_list(part) for name, part in made.items()}
  return ConfigurableTask(config={**config, "num_fewshot": 0})


def as_arc(item):
  labels = list("ABCDE")[: len(item["choices"])]
  return {"question": item["context"], "choices": {"text": item["choices"], "label": labels},
          "answerKey": labels[item["label"]]}


def as_hellaswag(item):
  first, _, second = item["ctx"].rpartition(". ")
  return {"activity_label": item["activity_label"], "ctx_a": f"{first}.", "ctx_b": second.lower(),
          "endings": item["endings"], "label": str(item["label"])}


def as_winogrande(item):
  return {"sentence": item["sentence"], "option1": item["option1"], "option2": item["option2"],
          "answer": str(item["label"] + 1)}


def as_mmlu(item):
  return {"question": item["context"], "subject": item["subject"], "choices": item["choices"], "answer": item["label"]}


@pytest.mark.parametrize(
    "kind, name, convert",
    [
        ("choice", "arc/arc_easy", as_arc),
        ("choice", "arc/arc_challenge", as_arc),
        ("hellaswag", "hellaswag/hellaswag", as_hellaswag),
        ("winogrande", "winogrande/default", as_winogrande),
    ],
)
def test_prompts_and_metrics_are_those_of_lm_eval(kind, name, convert, tmp_path):
  own, other = own_task(kind, ITEMS[kind], tmp_path), theirs(name, [convert(item) for item in ITEMS[kind]])
  assert requests_of(own) == requests_of(other)
  rng = np.random.default_rng(0)
  for doc, their_doc, asked in zip(own.eval_docs, other.eval_docs, requests_of(own)):
    for _ in range(8):
      answers = [(float(total), False) for total in -rng.uniform(1, 9, len(asked))]
      assert own.process_results(doc, answers) == other.process_results(their_doc, answers)
  assert own.aggregation().keys() == other.aggregation().keys()


@pytest.mark.parametrize("shots", [0, 2])
def test_mmlu_prompts_are_those_of_lm_eval(shots, tmp_path):
  examples = [
      {"subject": subject, "context": f"{subject} {n}? ", "choices": list("wxyz"), "label": n}
      for n in range(3)
      for subject in ("anatomy", "world_religions")
  ]
  file = files.read_items(write_items(tmp_path / "dev.jsonl", examples))
  own = requests_of(own_task("mmlu", ITEMS["mmlu"], tmp_path, file, shots))
  for item, asked in zip(ITEMS["mmlu"], own):
    dev = [as_mmlu(e) for e in examples if e["subject"] == item["subject"]]
    other = theirs(f"mmlu/default/mmlu_{item['subject']}", [as_mmlu(item)], dev=dev)
    assert requests_of(other, shots) == [asked]


def test_prompts_by_hand(tmp_path):
  make = lambda kind: requests_of(own_task(kind, ITEMS[kind], tmp_path))
  assert make("choice")[0] == [("Question: Which is a metal?\nAnswer:", f" {c}") for c in ("wood", "iron", "wool")]
  assert make("winogrande")[0] == [(f"Ann thanked Eve because {name}", " had helped.") for name in ("Ann", "Eve")]
  assert make("hellaswag")[1][3] == ("Sewing: How to sew. Take a needle.", " Thread it now.")
  assert make("mmlu")[1][2] == (
      "The following are multiple choice questions (with answers) about anatomy.\n\n"
      "Where is it?\nA. in\nB. on\nC. by\nD. at\nAnswer:", " C",
  )
  assert make("target") == [[("One plus one is", " two")], [("A, B, C,\n", "D")]]
  assert make("text") == [[("A short text of words.",)], [(ITEMS["text"][1]["text"],)]]


def test_every_subject_is_described_as_lm_eval_does():
  paths = [path for path in (LM_EVAL / "mmlu/default").glob("mmlu_*.yaml")]
  assert len(paths) == 57
  for path in paths:
    config = load_yaml(path)
    item = {"subject": config["dataset_name"], "context": "?", "choices": list("wxyz"), "label": 0}
    assert tasks._mmlu(item, ())["text"].startswith(config["description"] + "?\nA. w")


def test_samples_are_drawn_by_the_seed_alone():
  assert files.sample(5, None, 0) == [0, 1, 2, 3, 4] == files.sample(5, 9, 3)
  drawn = files.sample(1000, 100, 0)
  assert drawn == sorted(set(drawn)) and len(drawn) == 100 and drawn != list(range(100))
  assert drawn == files.sample(1000, 100, 0) != files.sample(1000, 100, 1)
  assert set(files.sample(1000, 50, 0)) < set(drawn)  # a smaller sample is part of a larger one


def test_texts_are_documents(tmp_path):
  (tmp_path / "plain.txt").write_text("One text\nof two lines.\n")
  (tmp_path / "wiki.txt").write_text(" = A = \n \n One . \n = B = \n \n Two . \n")
  assert [item["text"] for item in files.read_items(str(tmp_path / "plain.txt")).items] == ["One text\nof two lines.\n"]
  (tmp_path / "null.jsonl").write_text('{"id": null, "text": "a"}\n{"id": null, "text": "b"}\n')
  assert [item["id"] for item in files.read_items(str(tmp_path / "null.jsonl")).items] == ["1", "2"]
  wiki = files.read_items(str(tmp_path / "wiki.txt"))
  assert wiki.kind == "text" and len(wiki.items) == 2


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", None, "a.jsonl cannot be read (No such file or directory)"),
        ("a.jsonl", "", "a.jsonl holds no items"),
        ("a.txt", " \n", "a.txt holds no items"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "Line 2 of "),
        ("a.jsonl", '{"text": "a"}\n\n[1]', "Line 3 of "),
        ("a.jsonl", '{"text": "a"}\n{"context": "a", "target": "b"}', "Line 2 of {} is a 'target' item, but those"),
        ("a.jsonl", '{"question": "a", "answer": "b"}', "Line 1 of {} has the fields answer, question, but items have"),
        ("a.jsonl", '{"id": 2, "text": "a"}\n{"text": "b"}', "Line 2 of {} has the id '2' of Line 1 of {}; give every"),
        ("a.jsonl", '{"text": " "}', "Line 1 of {} has a 'text' that is no text or an empty one"),
        ("a.jsonl", '{"context": "a", "target": 3}', "has a 'target' that is no text"),
        ("a.jsonl", '{"context": "a", "choices": ["b"], "label": 0}', "has choices that are no list of two or more"),
        ("a.jsonl", '{"context": "a", "choices": ["b", ""], "label": 0}', "has choices that are no list of two"),
        ("a.jsonl", '{"context": "a", "choices": ["b", "c"], "label": 2}', "has label=2; give the number of the right"),
        ("a.jsonl", '{"context": "a", "choices": ["b", "c"], "label": "1"}', "has label='1'; give the number"),
        ("a.jsonl", '{"sentence": "a", "option1": "b", "option2": "c", "label": 0}', 'has a sentence without "_"'),
        ("a.jsonl", '{"subject": "s", "context": "a", "choices": ["b", "c"], "label": 0}', "has 2 choices, but mmlu"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path, name, content, message):
  path = tmp_path / name
  if content is not None:
    path.write_text(content)
  with pytest.raises(UserError) as error:
    files.read_items(str(path))
  assert message.replace("{}", str(path)) in str(error.value) and "\n" not in str(error.value)


# --- retrieval -----------------------------------------------------------------------------------------


def test_retrieval_documents_state_what_they_ask_for():
  words = lambda text: text.split()
  documents = retrieval.documents(words, (150, 400), (0.0, 0.5, 1.0), 12, seed=1)
  assert documents == retrieval.documents(words, (150, 400), (0.0, 0.5, 1.0), 12, seed=1)
  assert len({d["text"] for d in documents}) == 72 and len({d["label"] for d in documents}) == 4
  assert len({tuple(sorted(d["choices"])) for d in documents}) == 72  # none is asked twice
  cells = [(length, depth) for length in (150, 400) for depth in (0.0, 0.5, 1.0) for _ in range(12)]
  for document, (length, depth) in zip(documents, cells):
    story, question = document["text"].split("\n\n")
    assert document["group"] == f"{length} tokens, depth {depth}"
    assert length - 25 < len(words(document["text"])) <= length
    name = re.fullmatch(r"Question: What is the number of the (.+)\?\nAnswer: The number of the \1 is", question)[1]
    (key,) = re.findall(rf"The number of the {name} is (\d{{4}})\.", story)
    assert document["choices"][document["label"]] == key and len(set(document["choices"])) == 4
    assert sorted(re.findall(r"is (\d{4})\.", story)) == sorted(document["choices"])
    filler = re.sub(r" The number of the [a-z ]+ is \d{4}\.", lambda m: "" if key not in m[0] else "@", story)
    assert abs(filler.index("@") / len(filler) - depth) < 0.15 * 400 / length
  assert documents[:12] != retrieval.documents(words, (150,), (0.0,), 12, seed=2)
  begun = retrieval.documents(lambda text: ["<s>", *words(text)], (150,), (0.0,), 12, seed=1)
  assert all(150 - 25 < 1 + len(words(document["text"])) <= 150 for document in begun)  # it stands there once


# --- running -------------------------------------------------------------------------------------------


def test_standard_errors_and_perplexities_by_hand():
  records = [{"acc": a, "acc_norm": 1.0} for a in (1.0, 0.0, 0.0, 1.0)]
  figures = results.summarise("choice", records)
  assert figures["acc"] == {"value": 0.5, "stderr": pytest.approx(np.sqrt(1 / 3) / 2)}
  assert figures["acc_norm"] == {"value": 1.0, "stderr": 0.0}
  assert results.mean([1.0]) == {"value": 1.0, "stderr": None}
  text = {"tokens": 2, "words": 1}
  texts = [text | {"loglikelihood": -6.0, "bytes": 6}, text | {"loglikelihood": -2.0, "bytes": 2}]
  values = {name: figure["value"] for name, figure in results.summarise("text", texts).items()}
  assert values == pytest.approx({"token_perplexity": np.exp(2), "word_perplexity": np.exp(4), "byte_perplexity": np.e})
  targets = [{"loglikelihood": -1.0, "acc": 1.0}, {"loglikelihood": -3.0, "acc": 0.0}]
  perplexity = results.summarise("target", targets)["perplexity"]
  assert perplexity == pytest.approx({"value": np.exp(2), "stderr": np.exp(2)})
  assert results.mean([0.0, 1.0, 1.0])["stderr"] == pytest.approx(mean_stderr([0.0, 1.0, 1.0]))


class Fake(EngineLM):
  """Answers from the texts alone, without a model: the longer, the likelier."""

  def __init__(self):
    LM.__init__(self)
    self.asked, self.engine, self.tokenizer, self.max_length = 0, None, PLAIN, 500

  def loglikelihood(self, requests, disable_tqdm=False):
    self.asked += len(requests)
    return [(-1.0 / len("".join(r.args)), r.args[1] == " two") for r in requests]

  def loglikelihood_rolling(self, requests, disable_tqdm=False):
    return [-float(len(r.args[0])) for r in requests]


@pytest.fixture
def data(tmp_path):
  """A directory with a file of each kind."""
  names = {"choice": "arc_easy", "target": "ends", "text": "texts"}
  for kind, items in ITEMS.items():
    write_items(tmp_path / f"{names.get(kind, kind)}.jsonl", items)
  write_items(tmp_path / "mmlu_dev.jsonl", ITEMS["mmlu"])
  return tmp_path


def choose(data, names, **changes):
  return suite.Suite(tuple(str(data / n) if n.endswith(".jsonl") else n for n in names), str(data), **changes)


def test_records_and_figures_of_every_kind(data):
  names = ["arc_easy", "hellaswag", "winogrande", "mmlu", "retrieval", "ends.jsonl", "texts.jsonl"]
  jobs = suite.plan(choose(data, names, limit=2, lengths=(400,), depths=(0.5,)))
  assert [job.name for job in jobs] == [name.removesuffix(".jsonl") for name in names]
  done = suite.run(Fake(), jobs, {}, {})
  assert all(task["items"] == 2 == len(task["records"]) for task in done.values())
  first = done["arc_easy"]["records"][0]
  assert first == {"id": "1", "label": 1, "choice": 0, "greedy": False, "acc": 0.0, "acc_norm": 0.0,
                   "loglikelihoods": first["loglikelihoods"]}
  assert len(first["loglikelihoods"]) == 3 and done["arc_easy"]["records"][1]["acc"] == 1.0
  assert done["arc_easy"]["figures"]["acc"]["value"] == 0.5
  assert [done["mmlu"]["groups"][name]["items"] for name in ("world_religions", "anatomy")] == [1, 1]
  assert set(done["retrieval"]["figures"]) == {"acc", "greedy"}
  assert list(done["retrieval"]["groups"]) == ["400 tokens, depth 0.5"]
  assert done["ends"]["figures"]["acc"]["value"] == 0.5
  assert done["texts"]["records"][0] == {"id": "1", "loglikelihood": -22.0, "tokens": 22, "words": 5, "bytes": 22}
  assert done["texts"]["figures"]["token_perplexity"]["value"] == pytest.approx(np.e)
  table = results.format_table(done)
  assert "\n  400 tokens, depth 0.5  " in table and "word_perplexity" in table


def test_finished_tasks_are_not_run_again_and_changed_settings_are_named(data, tmp_path):
  path, settings = tmp_path / "results.json", {"model": "tiny", "dtype": "float32"}
  lm = Fake()
  first = suite.run(lm, suite.plan(choose(data, ["arc_easy"], limit=1)), settings, {"cpu": "one"}, path)
  asked = lm.asked
  both = suite.run(lm, suite.plan(choose(data, ["arc_easy", "winogrande"], limit=1)), settings, {}, path)
  assert lm.asked == asked + 2 and both["arc_easy"] == json.loads(json.dumps(first["arc_easy"]))
  stored = json.loads(path.read_text())
  assert stored["settings"] == settings and list(stored["tasks"]) == ["arc_easy", "winogrande"]
  before = path.read_bytes()
  for changed, own, message in (
      (settings | {"dtype": "bfloat16"}, {}, "made with dtype='float32', now it is 'bfloat16'; name another file"),
      (settings, {"limit": 2}, "made with arc_easy: limit=1, now it is 2"),
      (settings, {"limit": 1, "seed": 5}, "made with arc_easy: seed=0, now it is 5"),
  ):
    with pytest.raises(UserError, match=re.escape(message)):
      suite.run(lm, suite.plan(choose(data, ["arc_easy"], **({"limit": 1} | own))), changed, {}, path)
  write_items(data / "arc_easy.jsonl", ITEMS["choice"][::-1])
  with pytest.raises(UserError, match="arc_easy: digest="):
    suite.run(lm, suite.plan(choose(data, ["arc_easy"], limit=1)), settings, {}, path)
  assert path.read_bytes() == before and lm.asked == asked + 2
  path.write_text("[]")
  with pytest.raises(UserError, match="exists but holds no results"):
    suite.run(lm, suite.plan(choose(data, ["winogrande"])), settings, {}, path)


def test_tasks_that_another_process_has_finished_meanwhile_stay_in_the_file(data, tmp_path):
  path = tmp_path / "results.json"
  plan = lambda name: suite.plan(choose(data, [name], limit=1))

  class Slow(Fake):
    def loglikelihood(self, requests, disable_tqdm=False):
      if not path.exists():
        suite.run(Fake(), plan("winogrande"), {}, {}, path)
      return super().loglikelihood(requests)

  assert list(suite.run(Slow(), plan("arc_easy"), {}, {}, path)) == ["winogrande", "arc_easy"]
  assert list(json.loads(path.read_text())["tasks"]) == ["winogrande", "arc_easy"]


def test_tasks_outlive_a_results_file_that_is_deleted_meanwhile(data, tmp_path):
  path = tmp_path / "results.json"

  class Deleting(Fake):
    def loglikelihood(self, requests, disable_tqdm=False):
      path.unlink(missing_ok=True)
      return super().loglikelihood(requests)

  done = suite.run(Deleting(), suite.plan(choose(data, ["winogrande", "arc_easy"], limit=1)), {}, {}, path)
  assert list(done) == ["winogrande", "arc_easy"] == list(json.loads(path.read_text())["tasks"])


def test_a_batch_size_is_taken_unless_it_is_to_be_searched(monkeypatch, engine):
  monkeypatch.setattr(adapter.Engine, "load", lambda *args, **options: engine)
  size = lambda **options: EngineLM.create_from_arg_obj({}, options).batch_size
  assert size(batch_size=4, max_batch_size=64) == size(batch_size="4") == 4
  default = EngineLM(engine).batch_size
  assert size(batch_size="auto") == size(batch_size="auto:4", max_batch_size=64) == size() == default


def test_metrics_over_all_items_are_kept_as_numbers(tmp_path):
  """lm-eval gives those of an item as numpy's integers and arrays."""
  rows = [{"question": q, "choices": ["a", "bb"], "gold": gold} for q, gold in (("one", 1), ("two", 0))]
  task = ConfigurableTask(config={
      "task": "own", "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)}, "test_split": "test",
      "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
      "doc_to_target": "gold",
      "metric_list": [{"metric": m, "higher_is_better": True} for m in ("acc", "f1", "mcc")],
  })
  path = tmp_path / "results.json"
  done = suite.run(Fake(), [suite.Job("own", suite.FOREIGN, {}, task=task)], {}, {}, path)
  assert json.loads(path.read_text())["tasks"]["own"] == json.loads(json.dumps(done["own"]))
  assert [record["mcc"] for record in done["own"]["records"]] == [[1, 1], [0, 1]]  # of the answer, of the choice
  assert done["own"]["figures"]["acc"]["value"] == 0.5 and done["own"]["figures"]["mcc"]["value"] == 0.0
  assert done["own"]["figures"]["f1"]["value"] == pytest.approx(2 / 3)


def test_the_command_equals_the_adapter(directories, served, data, tmp_path, capsys):
  target = tmp_path / "out.json"
  options = [f"--model={directories[0]}", f"--artifact={directories[1]}", f"--data={data}", "--batch=4"]
  options += ["--tasks=winogrande", f"--json={target}"]
  assert cli.main(["eval", *options]) == 0
  out = capsys.readouterr().out
  assert out.startswith("task        items  metric   value       ±\nwinogrande      2  acc     ")
  stored = json.loads(target.read_text())
  asked = requests_of(own_task("winogrande", ITEMS["winogrande"], tmp_path))
  answers = ask(EngineLM(served, progress=False), "loglikelihood", *[pair for pairs in asked for pair in pairs])
  found = [value for record in stored["tasks"]["winogrande"]["records"] for value in record["loglikelihoods"]]
  np.testing.assert_allclose(found, [total for total, _ in answers], atol=1e-4)
  assert stored["settings"]["max_length"] == 128 and stored["machine"]["jax"] == jax.__version__
  assert cli.main(["eval", *options, "--decode-sparsity=0.2"]) == 2
  assert "was made with decode_sparsity=None, now it is 0.2" in capsys.readouterr().err


# `python -m lm_eval`, without the index of its own tasks, which takes 15 seconds.
LM_EVALS_COMMAND = """
import functools
import lm_eval.tasks
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


def test_lm_evals_own_command_runs_the_model(directories, tmp_path):
  """In a process of its own, with a task that stands in a file; the plug-in file adds no row."""
  (tmp_path / "rows.py").write_text(
      "import datasets\n\ndef rows(**unused):\n"
      "  return {'test': datasets.Dataset.from_list([{'q': 'A b c', 'a': 'd'}] * 2)}\n"
  )
  (tmp_path / "ends.yaml").write_text(
      "task: ends\ncustom_dataset: !function rows.rows\ntest_split: test\noutput_type: loglikelihood\n"
      'doc_to_text: "{{q}}"\ndoc_to_target: " {{a}}"\nmetric_list:\n  - metric: acc\n'
  )
  done = subprocess.run(
      [sys.executable, "-c", LM_EVALS_COMMAND, "--model", "ftp_jax", "--model_args",
       f"model={directories[0]},artifact={directories[1]},decode_sparsity=0.0", "--tasks",
       f"{command.PLUGIN},{tmp_path}/ends.yaml", "--batch_size", "2", "--output_path", str(tmp_path / "out")],
      capture_output=True, text=True, cwd=tmp_path,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
  assert len(rows) == 3 and rows[2].startswith("|ends |")
  assert list((tmp_path / "out").rglob("results*.json"))


def test_lm_evals_hugging_face_class_on_the_export_agrees_item_by_item(directories, data, tmp_path):
  out = tmp_path / "figures.json"
  done = subprocess.run(
      [sys.executable, ROOT / "experiments" / "lm_eval_torch.py", f"--model={directories[0]}",
       f"--artifact={directories[1]}", f"--task={data / 'arc_easy.jsonl'}", f"--json={out}"],
      capture_output=True, text=True, cwd=tmp_path,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(out.read_text())
  assert found["items"] == len(ITEMS["choice"]) and found["items_that_differ"] == []
  assert found["torch"] == found["jax"] and set(found["jax"]) == {"acc", "acc_norm"}
  assert found["largest_difference"] < 1e-4 and found["skipped"] > 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "There is no task; name some with --tasks"),
        (["--tasks=arc_easy", "--limit=0"], "--limit=0 must be at least 1"),
        (["--tasks=mmlu", "--shots=-1"], "--shots=-1 must be at least 0"),
        (["--tasks=mmlu", "--shots=2"], "mmlu_dev.jsonl has 1 examples of world_religions, but --shots=2; lower it"),
        (["--tasks=arc_challenge"], "arc_challenge.jsonl cannot be read"),
        (["--tasks=arc_easy,{data}/arc_easy.jsonl"], "Two tasks are called 'arc_easy'"),
        (["--tasks={data}/none.txt"], "none.txt cannot be read"),
        (["--tasks=retrieval", "--lengths=100"], "Retrieval contexts of 100 tokens have no room for the statements"),
        (["--tasks=retrieval"], "Retrieval contexts of 1024 tokens exceed the 128 of a pass; lower --lengths"),
        (["--tasks=retrieval", "--lengths=a"], "--lengths=a must be numbers with commas between"),
        (["--tasks=retrieval", "--lengths=120", "--depths=2"], "retrieval depths 2.0 must lie in 0..1"),
        (["--tasks=arc_easy", "--max-length=500"], "max_length=500 must lie in 1..128"),
        (["--tasks=arc_easy", "--batch=0"], "batch_size=0 must be at least 1"),
        (["--tasks=arc_easy", "--decode-sparsity=0.2"], "name one with --artifact"),
        (["--tasks=arc_easy", "--json={data}/no/such.json"], "create {data}/no first"),
        (["--tasks=arc_easy", "--artifact="], "The artifact has an empty name"),
        (["--tasks=arc_easy", "--limit=1", "--seed=-1"], "--seed=-1 must be at least 0"),
        (["--tasks=arc_easy", "--modle=a"], "'--modle=a' is not understood"),
    ],
)
def test_mistakes_in_the_command(directories, data, capsys, arguments, message):
  fill = lambda text: text.replace("{data}", str(data))
  assert cli.main(["eval", f"--model={directories[0]}", f"--data={data}", *map(fill, arguments)]) == 2
  out, err = capsys.readouterr()
  assert out == "" and fill(message) in err and err.rstrip().splitlines()[-1].startswith("ftp-jax: ")


def test_a_file_of_another_kind_is_not_taken_for_a_benchmark(data):
  write_items(data / "hellaswag.jsonl", ITEMS["choice"])
  with pytest.raises(UserError, match="holds 'choice' items, but hellaswag needs 'hellaswag'"):
    suite.plan(choose(data, ["hellaswag"]))


def test_names_of_lm_evals_own_tasks(monkeypatch):
  some = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False, include_path=LM_EVAL / "lambada")
  monkeypatch.setattr(lm_eval.tasks, "TaskManager", some)  # the index of all takes 15 seconds
  monkeypatch.setattr(tasks, "_manager", functools.cache(tasks._manager.__wrapped__))
  with pytest.raises(UserError, match="'no_such_task' is neither a file"):
    suite.plan(suite.Suite(("no_such_task",)))
  with pytest.raises(UserError, match="lambada_openai' cannot be had .+; go online"):
    suite.plan(suite.Suite(("lambada_openai",)))


def test_tasks_that_run_code_or_show_images_are_refused_before_anything_runs(monkeypatch):
  manager = types.SimpleNamespace(
      all_tasks=["coded", "shown"],
      load=lambda names: {"tasks": {names[0]: types.SimpleNamespace(**{dict(coded="UNSAFE_CODE", shown="MULTIMODAL")[
          names[0]]: True})}},
  )
  monkeypatch.setattr(tasks, "_manager", lambda: manager)
  for name in manager.all_tasks:
    with pytest.raises(UserError, match=f"{name}' runs code of the model or shows images; leave it out"):
      suite.plan(suite.Suite((name,)))


def test_numbers_given_twice_count_once():
  assert command._numbers("depths", "0.5,0.50,1", float) == (0.5, 1.0)


def test_without_lm_eval_the_command_says_what_to_install(capsys, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  for name in ("eval", "lm-eval"):
    assert cli.main([name]) == 2
    assert capsys.readouterr().err == "ftp-jax: lm-eval is not installed; run pip install '.[eval]' in the checkout.\n"
