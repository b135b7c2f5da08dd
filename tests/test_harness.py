"""The lm-eval adapter against the masked reference; local tasks against lm-eval's own; retrieval; `ftp-jax eval`."""

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from ftp_jax.errors import UserError
from ftp_jax.evaluation.harness.adapter import EngineLM
from ftp_jax.evaluation.harness.generation import read_options
from ftp_jax.inference import Sampling
from tests.test_data import byte_tokenizer
from tests.test_inference import CASES, PLAIN, build, fingerprints, masked_logits  # noqa: F401 - a fixture of the module

BOS = PLAIN.bos_token_id


def ask(lm, method, *arguments):
  """Answers of an adapter to requests with these arguments."""
  requests = [Instance(method, {}, entry if isinstance(entry, tuple) else (entry,), i) for i, entry in enumerate(arguments)]
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
  return build(**CASES["tied_project_skipping"])  # its continuation tokens skip blocks too


@pytest.fixture(scope="module")
def lm(engine):
  return EngineLM(engine, progress=False)


# --- likelihoods -------------------------------------------------------------------------------------


def test_likelihoods_equal_the_masked_reference(engine, lm):
  greedy = engine.generate([encode("The tiny model")], 5, stop_tokens=())[0]
  asked = [
      ("The tiny model", " talks"), ("The tiny model", greedy.text), ("A bird", " sings at dawn"), ("A bird ", "flies"),
      ("", "No context"), ("<|bos|>Begun", " once"), ("x", "y"),
  ]  # fmt: skip
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

  def prefill(self, prompts):
    self.prefilled.append([len(p) for p in prompts])
    return self._engine.prefill(prompts)

  def score(self, prefix, continuations, rows):
    self.scored.append([len(c) for c in continuations])
    return self._engine.score(prefix, continuations, rows)


def test_contexts_are_prefilled_once_and_batched_by_length(engine):
  counting = Counting(engine)
  contexts = ["short", "of a middle length", "the longest of all contexts", "tiny"]
  asked = [(context, choice) for choice in (" a", " bcd", " ef") for context in contexts]
  answers = ask(EngineLM(counting, batch_size=2, progress=False), "loglikelihood", *asked)
  assert counting.prefilled == [[27, 18], [5, 4]]
  assert counting.scored == [[4, 4], [3, 3], [2, 2]] * 2
  for batch_size in (1, 8):
    other = ask(EngineLM(engine, batch_size=batch_size, progress=False), "loglikelihood", *asked)
    np.testing.assert_allclose([t for t, _ in other], [t for t, _ in answers], atol=1e-4)


def test_long_continuations_are_scored_a_few_at_a_time(engine, monkeypatch):
  monkeypatch.setattr("ftp_jax.evaluation.harness.adapter._POSITIONS", 12)
  counting = Counting(engine)
  ask(EngineLM(counting, progress=False), "loglikelihood", *[("Hello", " " + "abcdefghi"[:n]) for n in (8, 5, 5, 3, 2)])
  assert counting.prefilled == [[5]] and counting.scored == [[9], [6, 6], [4, 3]]


def test_contexts_that_are_too_long_lose_their_beginning(engine):
  context, continuation = "The beginning is cut and the end is kept", " as is"
  for max_length, kept in ((20, 15), (6, 1), (44, 39), (45, 40)):
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


@pytest.mark.parametrize("width", [10, 24, 40])
def test_rolling_likelihood_is_causal_in_windows(engine, width):
  texts = ["A text of some thirty-seven characters", "Ten tokens", "x"]
  answers = ask(EngineLM(engine, max_length=width, progress=False), "loglikelihood_rolling", *texts)
  np.testing.assert_allclose(answers, [rolling_reference(engine, encode(t), width) for t in texts], atol=2e-4)


def test_rolling_likelihood_with_all_new_tokens_computed_is_that_of_the_dense_model(lm):
  text = "Nothing is pruned after a context of one token."
  skipping = ask(lm, "loglikelihood_rolling", text)
  strict = build(**CASES["tied_project_skipping"], decode_sparsity=0.0)
  dense = build(CASES["tied_project_skipping"]["model_config"], None)
  strict, dense = (ask(EngineLM(e, progress=False), "loglikelihood_rolling", text) for e in (strict, dense))
  np.testing.assert_allclose(strict, dense, atol=1e-4)
  assert abs(skipping[0] - dense[0]) > 0.1


def test_an_empty_text_has_likelihood_one(lm):
  assert ask(lm, "loglikelihood_rolling", "") == [0.0]


# --- generation --------------------------------------------------------------------------------------


def test_generation_stops_and_cuts(engine, lm):
  prompts = ["The tiny model", "A bird", "Of all the birds"]
  free = [g.text for g in engine.generate([encode(p) for p in prompts], 20)]
  options = {"until": [], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0}
  assert ask(lm, "generate_until", *[(p, options) for p in prompts]) == free
  stop = free[1][3:5]
  answers = ask(lm, "generate_until", *[(p, options | {"until": [stop, "not there"]}) for p in prompts])
  assert answers == [text.partition(stop)[0] for text in free] and len(answers[1]) <= 3
  mixed = ask(lm, "generate_until", (prompts[0], options | {"max_gen_toks": 4}), (prompts[1], options))
  assert mixed == [free[0][:4], free[1]]


def test_sampled_generations_do_not_depend_on_the_batch(engine):
  options = {"until": ["never said"], "max_gen_toks": 12, "do_sample": True, "temperature": 0.9, "top_p": 0.95}
  asked = [("The tiny model", options)] * 3 + [("A bird", options), ("Of all the birds", options)]
  draw = lambda size, seed=3: ask(EngineLM(engine, batch_size=size, seed=seed, progress=False), "generate_until", *asked)
  first = draw(2)
  assert first == draw(8) and len(set(first)) == 5
  assert draw(2, seed=4)[:2] == first[1:3]
  expected = engine.generate([encode("A bird")], 12, Sampling(0.9, 0.95), seed=6)
  assert first[3] == expected[0].text


def test_prompts_that_are_too_long_lose_their_beginning_before_generation(engine):
  own = EngineLM(engine, max_length=20, progress=False)
  prompt = "The beginning is cut and the end is kept"
  expected = engine.generate([encode(prompt)[-8:]], 12)[0].text
  assert ask(own, "generate_until", (prompt, {"max_gen_toks": 12}), ("", {"max_gen_toks": 12})) == [
      expected, engine.generate([[BOS]], 12)[0].text
  ]  # fmt: skip


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
        (lambda e: EngineLM.create_from_arg_obj({}, {"device": "cuda:0"}), "jax chooses the device"),
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
)  # fmt: skip
def test_mistakes_are_one_sentence(engine, call, message):
  with pytest.raises(UserError) as error:
    call(engine)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_lm_eval_knows_the_model():
  assert get_model("ftp_jax") is EngineLM
