"""Generation, scores and the fallback against the masked reference; sampling, stops, streaming; `ftp-jax generate`.

Nearly all the time goes into compiling, so that the tests share few models, shapes and settings of sampling.
"""

import dataclasses
import functools
import io
import json
import math
import os
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftp_jax import cli, sharding
from ftp_jax.data.encoding import encode_pairs
from ftp_jax.data.records import Pair
from ftp_jax.errors import UserError
from ftp_jax.export import artifact as artifacts
from ftp_jax.export.artifact import Artifact
from ftp_jax.inference import Engine, Sampling, command, programs
from ftp_jax.inference import engine as engine_module
from ftp_jax.inference.padding import FINE, Padding
from ftp_jax.inference.sampling import nucleus, sample
from ftp_jax.machine import describe_machine
from ftp_jax.models import decoder
from ftp_jax.models.huggingface import fingerprint, save_params
from ftp_jax.models.kernels import IMPLEMENTATIONS
from ftp_jax.models.sources import Model, load_model
from ftp_jax.routing import routers
from ftp_jax.routing.config import RouterConfig, RoutingConfig
from tests import tiny
from tests.test_bucketed import random_maps
from tests.test_data import CHAT, byte_tokenizer

DOC = pathlib.Path(__file__).parent.parent / "docs" / "inference.md"
IN_MEMORY = pathlib.Path("a tiny model that stands in no directory")
VOCABULARY, POSITIONS, LETTERS = 262, 128, 94  # of the byte tokenizer; ids below LETTERS are printable ASCII
SCHEDULE = (0.5, 0.5, 0.5, 0.5)
HERE = describe_machine()
ELSEWHERE = {**HERE, "device": "TPU v5e"}


def measured(context, machine=HERE, dtype="float32"):
  """A crossover of an artifact."""
  return {"context": context, "dtype": dtype, "machine": machine}
LENGTHS = (17, 9, 3)
DRAWN = Sampling(0.8, 0.9)
PLAIN = byte_tokenizer()
unembed = jax.jit(decoder.unembed, static_argnums=0)


def config(**changes):
  return tiny.config(**{"vocab_size": VOCABULARY, "max_positions": POSITIONS, "tie_embeddings": False, **changes})


@functools.cache
def params(model_config):
  """Random weights whose most likely token is a printable character."""
  tree = tiny.params(model_config)
  if not model_config.tie_embeddings:
    tree["embed"]["lm_head"] = tree["embed"]["lm_head"].at[LETTERS:].set(0) * 8
  return tree


@functools.cache
def router_weights(router, num_blocks, size):
  """Random ones, large enough for margins on both sides of 0."""
  return jax.tree.map(lambda a: np.asarray(a) * 3, routers.init_router(router, jax.random.key(1), num_blocks, size))


def artifact(model_config, routing, router, crossover=None, schedule=SCHEDULE, made_for="tiny", stand_in=None):
  weights = router_weights(router, model_config.num_blocks, model_config.hidden_size)
  return Artifact("tiny", made_for, model_config.family, schedule, routing, router, weights, {}, crossover, stand_in)


def build(model_config=config(), routing=RoutingConfig("evict"), router=RouterConfig(), tokenizer=None, **options):
  """An engine in memory; `routing` None: dense."""
  own = {name: options.pop(name) for name in ("crossover", "schedule", "made_for", "stand_in") if name in options}
  model = Model(model_config, params(model_config), tokenizer or PLAIN, IN_MEMORY)
  return Engine(model, artifact(model_config, routing, router, **own) if routing else None, **options)


@pytest.fixture(scope="module", autouse=True)
def fingerprints():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(engine_module, "fingerprint", lambda path: "tiny" if path == IN_MEMORY else fingerprint(path))
    yield


@pytest.fixture(scope="module")
def engine():
  return build()


def prompts_of(lengths=LENGTHS, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, LETTERS, n).tolist() for n in lengths]


PROMPTS = prompts_of()


def masked_logits(engine, rows, context):
  """(logits (B,T,V), keep (L,B,T)) of one masked pass over whole rows whose contexts have these lengths."""
  made, c, number = engine.artifact, engine.model.config, len(rows)
  tokens, length, filled = np.zeros((6, 48), np.int32), np.ones(6, np.int32), np.ones(6, np.int32)  # one shape for all
  length[:number], filled[:number] = list(map(len, rows)), context
  for row, ids in zip(tokens, rows):
    row[: len(ids)] = ids
  router = routers.Router("dynamic", made.router, made.params)
  schedule = jnp.asarray(made.schedule, jnp.float32)
  out = tiny.forward(c, made.routing, engine.model.params, router, tokens, filled, length, schedule)
  logits = unembed(c, engine.model.params, out.hidden_BxTxD)
  return np.asarray(logits)[:number], np.asarray(out.keep_LxBxT)[:, :number]


def greedy_reference(engine, prompts, steps):
  """New tokens by recomputing all at every step, and the share of the blocks that these tokens skip."""
  rows = [list(prompt) for prompt in prompts]
  for _ in range(steps):
    logits, keep = masked_logits(engine, rows, list(map(len, prompts)))
    for row, own in zip(rows, logits):
      row.append(int(own[len(row) - 1].argmax()))
  new = [row[len(prompt) :] for row, prompt in zip(rows, prompts)]
  ran = np.concatenate([keep[:, b, len(p) : len(r) - 1] for b, (p, r) in enumerate(zip(prompts, rows))], axis=1)
  return new, 1 - ran.mean()


def tokens_of(generations):
  return [list(generation.tokens) for generation in generations]


# --- generation ------------------------------------------------------------------------------


CASES = {
    "llama_evict": dict(),
    "tied_project_skipping": dict(
        model_config=config(tie_embeddings=True), schedule=(0.0, 0.5, 0.75, 0.4),
        routing=RoutingConfig("project", "argmax", decode_sparsity=0.4, decode_threshold=0.15),
    ),
    "mistral_evict_skipping": dict(
        model_config=config(sliding_window=6), router=RouterConfig("per_block"),
        routing=RoutingConfig("evict", decode_sparsity=0.4, decode_threshold=0.8),
    ),
    "qwen_project": dict(
        model_config=config(qkv_bias=True, qk_norm=True), router=RouterConfig("recurrent", hidden_states=True),
        routing=RoutingConfig("project"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_greedy_generation_equals_recomputing_everything_masked(case):
  engine = build(**CASES[case])
  expected, skipped = greedy_reference(engine, PROMPTS, 20)
  assert tokens_of(engine.generate(PROMPTS, 20, stop_tokens=())) == expected
  assert 0.05 < skipped < 0.95 if engine.artifact.routing.decode_sparsity else skipped == 0
  assert len({token for row in expected for token in row}) > 5  # and not one token over and over


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "sampled"])
def test_rows_do_not_depend_on_their_neighbours(engine, sampling):
  together = tokens_of(engine.generate(PROMPTS, 18, sampling, seed=5))
  for row in (0, 1):
    assert tokens_of(engine.generate([PROMPTS[row]], 18, sampling, seed=5 + row)) == [together[row]]


def test_seeds(engine):
  draw = lambda seed: tokens_of(engine.generate(PROMPTS, 18, DRAWN, seed=seed))
  first = draw(5)
  assert draw(5) == first
  assert all(a != b for a, b in zip(draw(6), first))
  assert draw(-1) == draw(2**32 - 1) != first


def test_without_a_dtype_the_computation_is_in_that_of_the_parameters(engine):
  model = engine.model
  half = dataclasses.replace(model, params=jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.params))
  for own, dtype in ((model, jnp.float32), (half, jnp.bfloat16)):
    assert Engine(own).prefill(PROMPTS).groups[0].prefilled.cache.k_BxGxNxS.dtype == dtype
  assert Engine(half, dtype="float32").prefill(PROMPTS).groups[0].prefilled.cache.k_BxGxNxS.dtype == jnp.float32


def test_the_number_of_stop_tokens_compiles_nothing_anew(engine):
  before = None
  for count in (1, 2, 8):
    engine.generate(PROMPTS, 18, stop_tokens=range(count))
    compiled = programs.decode_steps._cache_size(), programs.first_token._cache_size()
    assert compiled == (before or compiled)
    before = compiled


def test_bfloat16_and_options_of_the_artifact_that_are_replaced(engine):
  changed = build(dtype="bfloat16", decode_sparsity=0.4, decode_threshold=0.6)
  prefix = changed.prefill(PROMPTS)
  assert prefix.groups[0].spec.routing == dataclasses.replace(
      engine.artifact.routing, decode_sparsity=0.4, decode_threshold=0.6
  )
  assert prefix.groups[0].prefilled.cache.k_BxGxNxS.dtype == jnp.bfloat16
  np.testing.assert_allclose(
      jax.nn.softmax(prefix.groups[0].prefilled.logits_BxV),
      jax.nn.softmax(engine.prefill(PROMPTS).groups[0].prefilled.logits_BxV), atol=0.1,
  )


def test_one_decode_program_serves_every_number_of_steps_and_the_stream(engine):
  engine.generate(PROMPTS, 18)
  compiled = programs.decode_steps._cache_size()
  for new_tokens in (17, 23, 32):
    assert [len(row) for row in tokens_of(engine.generate(PROMPTS, new_tokens))] == [new_tokens] * 3
  engine.generate(PROMPTS, 20, stream=lambda row, tokens: None)
  assert programs.decode_steps._cache_size() == compiled


def test_a_pruned_model_decodes_with_the_programs_of_the_dense_one():
  """Where it projects and computes every new token."""
  build(routing=None).generate(PROMPTS, 18)
  compiled = programs.decode_steps._cache_size()
  build(routing=RoutingConfig("project", one_pass_block=1)).generate(PROMPTS, 18)
  assert programs.decode_steps._cache_size() == compiled


def test_whole_numbers_may_be_of_any_library(engine):
  expected = tokens_of(engine.generate(PROMPTS, 5, DRAWN, seed=3))
  for whole in (np.int64, np.uint8, jnp.int32):
    assert tokens_of(engine.generate(PROMPTS, whole(5), DRAWN, seed=whole(3))) == expected
  stopped = tokens_of(engine.generate(PROMPTS, 5, DRAWN, seed=3, stop_tokens=expected[0][1]))
  for kind in (np.int64, jnp.int32, np.array, lambda stop: jnp.array([stop])):
    stop = kind(expected[0][1])
    assert tokens_of(engine.generate(PROMPTS, 5, DRAWN, seed=3, stop_tokens=stop)) == stopped != expected
  scores = engine.score(engine.prefill(PROMPTS), [[1], [2]], [1, 0])
  assert engine.score(engine.prefill(PROMPTS), [[1], [2]], jnp.array([1, 0])) == scores


# --- sampling --------------------------------------------------------------------------------


def test_nucleus_by_hand():
  logits = jnp.log(jnp.array([[0.15, 0.5, 0.05, 0.3], [0.25, 0.25, 0.25, 0.25]]))
  chosen = lambda top_p: [np.flatnonzero(row).tolist() for row in nucleus(logits, top_p)]
  assert chosen(0.4) == [[1], [0, 1, 2, 3]]  # ties stay together
  assert chosen(0.6)[0] == chosen(0.75)[0] == [1, 3]
  assert chosen(0.9)[0] == [0, 1, 3]
  assert chosen(0.99)[0] == [0, 1, 2, 3]


def test_temperature_zero_takes_the_most_likely_token_whatever_the_seed():
  logits = jax.random.normal(jax.random.key(0), (4, 30))
  for step in range(3):
    np.testing.assert_array_equal(sample(Sampling(0.0, 0.5), logits, jnp.arange(4), step), jnp.argmax(logits, axis=1))


@pytest.mark.parametrize("temperature, top_p", [(0.7, 1.0), (2.0, 1.0), (1.0, 0.8)])
def test_draws_follow_the_tempered_distribution(temperature, top_p):
  logits, number = np.log([0.4, 0.3, 0.2, 0.1]), 4000
  draws = jax.jit(sample, static_argnums=0)(
      Sampling(temperature, top_p), jnp.tile(logits, (number, 1)), jnp.arange(number, dtype=jnp.uint32), jnp.int32(3)
  )
  expected = np.exp(logits / temperature) * ([1, 1, 1, 0] if top_p < 1 else 1)
  expected /= expected.sum()
  share = np.bincount(draws, minlength=4) / number
  np.testing.assert_array_less(np.abs(share - expected), 4 * np.sqrt(expected * (1 - expected) / number) + 1e-9)


def test_a_temperature_and_a_nucleus_next_to_nothing_take_the_most_likely_token():
  logits, seeds = jnp.array([[1.0, 5.0, 20.0, -3.0], [4.0, -1.0, 2.0, 0.0]]), jnp.arange(2, dtype=jnp.uint32)
  for sampling in (Sampling(1e-37), Sampling(1e-38), Sampling(5e-324), Sampling(1.0, 1e-30), Sampling(1.0, 1e-44)):
    assert sample(sampling, logits, seeds, jnp.int32(0)).tolist() == [2, 0], sampling


def test_every_step_and_every_seed_draw_anew():
  logits = jnp.zeros((50, 1000))
  draw = lambda seed, step: np.asarray(sample(Sampling(1.0), logits, jnp.arange(50) + seed, jnp.int32(step)))
  np.testing.assert_array_equal(draw(0, 0), draw(0, 0))
  np.testing.assert_array_equal(draw(1, 0)[:-1], draw(0, 0)[1:])  # a seed is a stream, whichever row has it
  for other in (draw(50, 0), draw(0, 1)):
    assert np.mean(draw(0, 0) == other) < 0.1


# --- stops and streaming -----------------------------------------------------------------------


def test_stop_tokens_end_their_row_alone(engine):
  free = tokens_of(engine.generate(PROMPTS, 30))
  stops = (free[0][5], free[1][20])
  ends = [next((n for n, token in enumerate(row, 1) if token in stops), None) for row in free]
  assert ends[0] <= 6 and ends[1] <= 21 and ends[0] != ends[1]
  done = engine.generate(PROMPTS, 30, stop_tokens=stops)
  assert tokens_of(done) == [row[:end] for row, end in zip(free, ends)]
  assert [row.stopped for row in done] == [end is not None for end in ends]
  assert done[0].text == engine.decode(free[0][: ends[0] - 1])


def test_a_row_may_stop_at_its_first_and_at_its_last_token(engine, monkeypatch):
  free = tokens_of(engine.generate(PROMPTS, 18))
  done = engine.generate(PROMPTS, 18, stop_tokens=[free[1][0]])
  assert done[1].tokens == (free[1][0],) and done[1].stopped and done[1].text == ""
  last = free[0].index(free[0][9])
  assert engine.generate([PROMPTS[0]], last + 1, stop_tokens=[free[0][9]])[0].stopped
  if last:
    assert not engine.generate([PROMPTS[0]], last, stop_tokens=[free[0][9]])[0].stopped
  monkeypatch.setattr(programs, "decode_steps", None)  # neither needs a further step
  assert tokens_of(engine.generate(PROMPTS, 1)) == [row[:1] for row in free]
  assert tokens_of(engine.generate(PROMPTS, 18, stop_tokens=[row[0] for row in free])) == [row[:1] for row in free]


@pytest.mark.parametrize("begin, end", [(0, 1), (7, 10), (15, 19), (28, 30)])
def test_stop_strings_cut_the_text(engine, begin, end):
  """One token is one character here; the third string lies across two looks of the host."""
  free = engine.generate(PROMPTS, 30)
  stop = free[0].text[begin:end]
  for stream in (None, lambda row, tokens: None):
    done = engine.generate(PROMPTS, 30, stop_strings=("no such text", stop), stream=stream)
    for row, whole in zip(done, free):
      at = whole.text.find(stop)
      assert row.stopped == (at >= 0)
      assert row.text == (whole.text[:at] if at >= 0 else whole.text)
      assert row.tokens == (whole.tokens[: at + len(stop)] if at >= 0 else whole.tokens)
  assert done[0].stopped and len(done[0].tokens) <= end


def test_a_prompt_that_fits_the_largest_bucket_is_run_whatever_its_padding(engine):
  prompt = [[1 + n % 90 for n in range(33)]]
  assert engine.prefill(prompt).groups[0].plan.num_positions > 34
  own = build(buckets=(17, 34)).prefill(prompt)
  assert own.groups[0].plan.num_positions == 34
  np.testing.assert_allclose(
      own.groups[0].prefilled.logits_BxV, engine.prefill(prompt).groups[0].prefilled.logits_BxV, atol=1e-5
  )


@pytest.mark.parametrize("stops", [
    dict(stop_tokens="ab"), dict(stop_tokens=["a"]), dict(stop_tokens=[None]), dict(stop_tokens=[2**31]),
    dict(stop_tokens=1.0), dict(stop_strings=None), dict(stop_strings=[3]), dict(sampling=0.5),
])
def test_stops_and_sampling_of_another_type_are_one_sentence(engine, stops, monkeypatch):
  monkeypatch.setattr(programs, "prefill", None)  # before any work
  with pytest.raises(UserError, match=f"{next(iter(stops))}=.* must be"):
    engine.generate(PROMPTS, 18, **stops)


@pytest.mark.parametrize("text", [b"bytes", None, "half \ud83d"])
def test_what_is_no_text_is_not_encoded(engine, text):
  with pytest.raises(UserError, match="is no text that a tokenizer reads; decode it as UTF-8 first") as error:
    engine.encode(text)
  assert str(error.value).isprintable()


def test_tokenizer_and_checkpoint_name_the_default_stops(engine, monkeypatch):
  free = engine.generate(PROMPTS, 18)
  letter = free[0].text[6]
  end = free[0].text.index(letter)
  tokenizer = byte_tokenizer()
  tokenizer.add_special_tokens({"eos_token": letter})
  own = build(tokenizer=tokenizer)
  assert own.stop_tokens == (free[0].tokens[6],) and engine.stop_tokens == ()
  done = own.generate(PROMPTS, 18)[0]
  assert done.tokens == free[0].tokens[: end + 1] and done.stopped and done.text == free[0].text[:end]
  assert own.generate(PROMPTS, 18, stop_tokens=())[0].tokens == free[0].tokens
  assert own.generate(PROMPTS, 18, stop_tokens=free[0].tokens[6])[0] == done  # one of each may be given as it is
  assert own.generate(PROMPTS, 18, stop_tokens={free[0].tokens[6]})[0] == done
  assert engine.generate(PROMPTS, 18, stop_strings=free[0].text[5:8]) == engine.generate(
      PROMPTS, 18, stop_strings=[free[0].text[5:8]]
  )
  assert own.generate(PROMPTS, 18, stop_tokens=iter(free[0].tokens[6:7]), stop_strings=iter(()))[0] == done
  with monkeypatch.context() as patch:
    patch.setattr(engine_module, "generation_ends", lambda directory: (free[0].tokens[3],))
    ends = build(tokenizer=tokenizer)
    assert ends.stop_tokens == (free[0].tokens[6], free[0].tokens[3])
  first = next(n for n, token in enumerate(free[0].tokens, 1) if token in ends.stop_tokens)
  assert ends.generate(PROMPTS, 18)[0].tokens == free[0].tokens[:first]
  # A string that is a token of its own stops as one: its text is not in the decoded text.
  assert own.generate(PROMPTS, 18, stop_tokens=(), stop_strings=[letter])[0] == done
  # As it does where other tokens spell it.
  tokenizer = byte_tokenizer()
  tokenizer.add_tokens([free[0].text[5:8]])
  spelled = build(tokenizer=tokenizer).generate(PROMPTS, 18, stop_tokens=(), stop_strings=free[0].text[5:8])
  assert spelled[0].text == free[0].text[: free[0].text.index(free[0].text[5:8])]
  chat = build(tokenizer=byte_tokenizer(CHAT))
  assert chat.stop_tokens == (chat.model.tokenizer.convert_tokens_to_ids("<|end|>"),)


def test_the_stream_is_what_is_returned(engine):
  free = tokens_of(engine.generate(PROMPTS, 18))
  seen = [[] for _ in PROMPTS]
  done = engine.generate(PROMPTS, 18, stop_tokens=[free[0][4]], stream=lambda row, tokens: seen[row].extend(tokens))
  assert seen == tokens_of(done) and len(seen[0]) <= 5
  seen = []

  def end_row_one(row, tokens):
    seen.append(row)
    return row == 1 and seen.count(1) == 5

  done = engine.generate(PROMPTS, 18, stream=end_row_one)
  assert tokens_of(done) == [free[0], free[1][:5], free[2]]
  assert [row.stopped for row in done] == [False, True, False]
  assert seen[:3] == [0, 1, 2] and seen.count(1) == 5


# --- scores and prefixes -----------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama_evict", "tied_project_skipping", "mistral_evict_skipping"])
def test_scores_are_teacher_forcing_of_the_masked_execution(case):
  engine = build(**CASES[case])
  prefix = engine.prefill(PROMPTS)
  continuations = [*prompts_of((5, 1, 8, 16), seed=1), *tokens_of(engine.generate(prefix, 20))[:2]]
  rows = [2, 0, 1, 0, 0, 1]
  scores = engine.score(prefix, continuations, rows)
  whole, context = [PROMPTS[row] + c for row, c in zip(rows, continuations)], [LENGTHS[row] for row in rows]
  logits, keep = masked_logits(engine, whole, context)
  assert keep[:, 3, 17:33].all() == (not engine.artifact.routing.decode_sparsity)
  for own, m, continuation, score in zip(np.asarray(jax.nn.log_softmax(logits)), context, continuations, scores):
    own = own[m - 1 : m - 1 + len(continuation)]
    np.testing.assert_allclose(score.logprobs, own[np.arange(len(own)), continuation], atol=1e-5)
    assert score.total == pytest.approx(sum(score.logprobs))
    assert score.greedy == (own.argmax(-1) == continuation).all()
  assert [score.greedy for score in scores] == [False] * 4 + [True] * 2
  nearly = continuations[5][:-1] + [(continuations[5][-1] + 1) % LETTERS]
  assert not engine.score(prefix, [nearly] * 6, rows)[5].greedy


def test_one_prefill_serves_all_continuations(engine, monkeypatch):
  calls, prefill = [], programs.prefill
  monkeypatch.setattr(programs, "prefill", lambda *arguments: calls.append(1) or prefill(*arguments))
  continuations = prompts_of((5, 1, 8), seed=1)
  scores = engine.score(PROMPTS[0], continuations)
  assert len(calls) == 1
  for alone, together in zip(engine.score(engine.prefill(PROMPTS), continuations), scores):
    np.testing.assert_allclose(alone.logprobs, together.logprobs, atol=1e-5)


def test_scores_where_some_contexts_are_pruned_and_others_dense(engine):
  mixed, dense = build(crossover=measured(10)), build(routing=None)
  short, *long = prompts = prompts_of((9, 10, 17))
  continuations, rows = prompts_of((5, 2, 7, 1, 3), seed=2), [2, 0, 1, 0, 2]
  prefix = mixed.prefill(prompts)
  assert [group.index for group in prefix.groups] == [(1, 2), (0,)]
  expected = engine.score(engine.prefill(long), [continuations[i] for i in (0, 2, 4)], [1, 0, 1])
  for i, score in zip((1, 3), dense.score(short, [continuations[i] for i in (1, 3)])):
    expected.insert(i, score)
  assert mixed.score(prefix, continuations, rows) == expected
  assert mixed.score(prefix, []) == []


def test_a_prefix_can_be_continued_again_and_again(engine):
  prefix = engine.prefill(PROMPTS)
  before = engine.score(prefix, [[1, 2, 3]], [1])
  fresh = engine.generate(PROMPTS, 18)
  assert engine.generate(prefix, 18) == engine.generate(prefix, 18) == fresh
  assert tokens_of(engine.generate(prefix, 18, DRAWN)) != tokens_of(fresh)
  assert engine.score(prefix, [[1, 2, 3]], [1]) == before
  assert prefix.lengths == LENGTHS


# --- fallback and cache --------------------------------------------------------------------------


def logits_of(engine, prompts):
  """Next-token logits in the order of the prompts."""
  found = np.zeros((len(prompts), VOCABULARY), np.float32)
  for group in engine.prefill(prompts).groups:
    found[list(group.index)] = group.prefilled.logits_BxV
  return found


def test_prompts_below_the_crossover_are_dense_and_the_others_pruned(engine):
  mixed, dense = build(crossover=measured(10)), build(routing=None)
  short, *long = prompts = prompts_of((9, 10, 17))
  found = logits_of(mixed, prompts)
  np.testing.assert_array_equal(found[:1], logits_of(dense, [short]))
  np.testing.assert_array_equal(found[1:], logits_of(engine, long))
  assert np.abs(found[1:] - logits_of(dense, long)).max() > 0.1
  assert np.abs(found[:1] - logits_of(engine, [short])).max() > 0.1
  assert [mixed.prunes(n) for n in (1, 9, 10, 128)] == [False, False, True, True]
  assert mixed.generate([long[0], short, long[1]], 1) == [
      (kept := engine.generate(long, 1))[0], *dense.generate([short], 1), kept[1]
  ]


@pytest.mark.parametrize(
    "crossover, fallback, pruned",
    [
        (None, "auto", True),
        (measured(None, ELSEWHERE), "auto", True),  # says nothing about this machine
        (measured(None, {**HERE, "cpu": "another"}), "auto", True),
        (measured(None, dtype="bfloat16"), "auto", True),
        (measured(None), "auto", False),
        (measured(None), "never", True),
        (measured(2000), "never", True),
        (None, "always", False),
        (measured(1), "always", False),
    ],
)
def test_fallback_without_crossover_and_by_order(engine, crossover, fallback, pruned):
  own = build(crossover=crossover, fallback=fallback)
  assert own.prunes(3) == own.prunes(POSITIONS) == pruned
  prompts = prompts_of((9,))
  np.testing.assert_array_equal(logits_of(own, prompts), logits_of(engine if pruned else build(routing=None), prompts))


def test_an_evicting_cache_is_as_small_as_its_plan():
  prompts = prompts_of((10, 17))  # run as 18 positions
  made = lambda mode, schedule=SCHEDULE: build(routing=mode and RoutingConfig(mode), schedule=schedule)
  size = lambda *arguments: made(*arguments).prefill(prompts).cache_bytes
  dense = size(None)
  a_slot = 2 * 2 * 8 * 4 + 4  # keys and values of two heads, and a position
  assert dense == 2 * 4 * 18 * a_slot  # rows, blocks, slots
  assert size("evict") == dense / 2
  project = build(**CASES["qwen_project"]).prefill(PROMPTS)  # has the same heads
  assert project.cache_bytes == 3 * 4 * 18 * a_slot
  assert size("evict", (0.0, 0.5, 0.75, 0.99)) == 2 * (18 + 9 + 5 + 2) * a_slot


# --- padding -------------------------------------------------------------------------------------


def test_fine_widths_are_few_and_waste_little():
  lengths = range(1, 5000)
  padded = [FINE.context(n, 4500) for n in lengths]
  assert all(n <= p for n, p in zip(lengths, padded)) and padded == sorted(padded)
  assert all(p <= 1.125 * n for n, p in zip(lengths, padded))
  assert all(p <= max(n, 4500) for n, p in zip(lengths, padded)) and padded[4499] == 4500
  for octave in range(12):
    assert len(set(padded[2**octave : 2 ** (octave + 1)])) <= 8  # lengths 2**octave + 1 to 2 * 2**octave
  assert [FINE.continuation(n) for n in (1, 2, 3, 18, 20)] == [1, 2, 3, 19, 21]  # the last token is not run


def test_coarse_widths_by_hand():
  coarse, halves = Padding(1, 32, 8, 256), Padding(2, 32, 8, 256)
  widths = lambda padding, most: sorted({padding.context(n, most) for n in range(1, most + 1)})
  assert widths(coarse, 1100) == [32, 64, 128, 256, 512, 768, 1024, 1100]
  assert widths(halves, 500) == [32, 48, 64, 96, 128, 192, 256, 384, 500]
  assert sorted({coarse.continuation(n) for n in range(1, 600)}) == [1, 9, 17, 33, 65, 129, 257, 513, 769]


def test_neither_routes_nor_scores_depend_on_widths():
  """Capacities follow from a row's own context, whatever the plan of its width reserves; see tests/test_bucketed.py."""
  engine = build(**CASES["mistral_evict_skipping"])
  continuations, rows = prompts_of((5, 1, 12, 2), seed=1), [2, 0, 1, 0]
  fine, coarse = engine.prefill(PROMPTS), engine.prefill(PROMPTS, Padding(2, 40, 20))
  assert [prefix.groups[0].plan.num_positions for prefix in (fine, coarse)] == [18, 48]
  routes, wide = (np.asarray(prefix.groups[0].prefilled.cache.keep_LxBxT) for prefix in (fine, coarse))
  np.testing.assert_array_equal(wide, np.pad(routes, ((0, 0), (0, 0), (0, 30))))
  for found, score in zip(engine.score(coarse, continuations, rows), engine.score(fine, continuations, rows)):
    np.testing.assert_allclose(found.logprobs, score.logprobs, atol=1e-5)
    assert found.greedy == score.greedy


def test_one_width_is_one_program(engine):
  padding = Padding(1, 32, 8)
  counts = lambda: (programs.prefill._cache_size(), programs.score._cache_size())
  engine.score(engine.prefill(prompts_of((33, 5)), padding), prompts_of((4, 2)), [0, 1])
  before = counts()
  for lengths, sizes in (((64, 1), (9, 1)), ((40, 40), (3, 8))):
    engine.score(engine.prefill(prompts_of(lengths), padding), prompts_of(sizes), [1, 0])
  assert counts() == before


def test_continuations_share_programs_where_all_of_them_are_computed():
  """Dense, pruned with every key and value kept, evicting by one schedule, and letting new tokens skip."""
  project, evict = RoutingConfig("project"), RoutingConfig("evict")

  def key(routing, **options):
    """What chooses a compiled program besides shapes."""
    spec, weights = build(routing=routing, **options).execution
    spec, plan, weights = spec.continuing(spec.plan(weights, 18), weights)
    return spec, plan, jax.tree.structure(weights)

  dense, skipping = key(None), dataclasses.replace(project, decode_sparsity=0.4)
  assert key(project) == key(project, schedule=(0.0, 0.3, 0.6, 0.9)) == dense
  assert key(project, router=RouterConfig("per_block", hidden_states=True)) == dense
  maps = random_maps(config(), 4, np.random.default_rng(0))
  assert key(project, stand_in=maps) == dense != key(skipping, stand_in=maps) != key(skipping)
  assert key(evict) == key(evict, router=RouterConfig("per_block")) != dense
  assert key(evict, schedule=(0.0, 0.5, 0.75, 0.99)) not in (dense, key(evict))
  assert key(skipping) != dense and key(skipping) != key(skipping, schedule=(0.0, 0.5, 0.75, 0.99))


def test_of_equally_likely_tokens_the_first_is_the_greedy_one(engine):
  (group,) = engine.prefill([PROMPTS[0]]).groups
  logits = np.full((1, VOCABULARY), -1.0, np.float32)
  logits[0, [5, 9]] = 2.0
  tokens, row = np.array([[5], [9], [7]], np.int32), np.zeros(3, np.int32)
  arguments = group.prefilled.cache, jnp.asarray(logits), row, tokens, np.ones(3, np.int32)
  logprob, greedy = programs.score(*group.spec.continuing(group.plan, group.weights), *arguments)
  assert greedy[:, 0].tolist() == [True, False, False]
  expected = jax.nn.log_softmax(logits[0].astype(np.float64))[tokens[:, 0]]
  np.testing.assert_allclose(logprob[:, 0], expected, atol=1e-6)


# --- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda e: e.generate([], 4), "There is no prompt"),
        (lambda e: e.prefill([]), "There is no prompt"),
        (lambda e: e.generate([[1], []], 4), "Prompt 1 is empty"),
        (lambda e: e.score([], [[1]]), "Prompt 0 is empty"),
        (lambda e: e.generate(["text"], 4), "Prompt 0 is a text"),
        (lambda e: e.generate([1, 2, 3], 4), "Prompt 0 is no list of token ids; pass a list of lists"),
        (lambda e: e.generate([[1, 2], [1.0, 2.0]], 4), "Prompt 1 is no list of token ids"),
        (lambda e: e.prefill([[[1, 2], [3]]]), "Prompt 0 is no list of token ids"),
        (lambda e: e.score([1], ["text"]), "Continuation 0 is a text"),
        (lambda e: e.score([1], [1, 2]), "Continuation 0 is no list of token ids"),
        (lambda e: e.generate([[1]], 4.5), "max_new_tokens=4.5 must be a whole number"),
        (lambda e: e.generate([[1]], None), "max_new_tokens=None must be a whole number, at least 1"),
        (lambda e: e.generate(e.prefill([[1]]), None), "max_new_tokens=None must be a whole number, at least 1"),
        (lambda e: e.generate([[1]], 4, seed=None), "seed=None must be a whole number"),
        (lambda e: e.generate((row for row in [[1]]), 4), "The prompts must be a list of rows of token ids, not gener"),
        (lambda e: e.prefill(np.array(5)), "The prompts must be a list of rows of token ids, not ndarray"),
        (lambda e: e.score([1], (row for row in [[1]])), "The continuations must be a list of rows of token ids"),
        (lambda e: e.score([1], [[1]], rows=0), "rows=0 must name, for each continuation, one of the 1 contexts"),
        (lambda e: e.score([1], [[1]], rows=[[0]]), "must name, for each continuation, one of the 1 contexts"),
        (lambda e: build(routing=None, decode_sparsity=0.2), "decode_sparsity need an artifact"),
        (lambda e: build(decode_threshold=0.9), "decode_threshold has nothing to change where decode_sparsity=0 "),
        (lambda e: build(routing=RoutingConfig(decode_sparsity=0.2, decode_rule="quantile"), decode_threshold=0.9),
         "decode_threshold has nothing to change .* under the rule 'quantile'"),
        (lambda e: build(routing=None, decode_sparsity=0.2, decode_threshold=0.5), "decode_sparsity and decode_thresh"),
        (lambda e: e.prefill([[1] * 129]), "129 tokens exceeds the model's 128 positions"),
        (lambda e: e.generate([[1] * 100], 29), "100 tokens and 29 new ones exceed the model's 128 positions"),
        (lambda e: e.generate([[1]], 0), "max_new_tokens=0"),
        (lambda e: e.generate([[1, VOCABULARY]], 4), "outside 0..261"),
        (lambda e: e.generate([[-1]], 4), "outside 0..261"),
        (lambda e: e.score([1], [[1], []]), "Continuation 1 is empty"),
        (lambda e: e.score([1], [[1, VOCABULARY]]), "outside 0..261"),
        (lambda e: e.score([1] * 120, [[1] * 10]), "120 tokens with a continuation of 10 exceeds"),
        (lambda e: e.score([1], [[1]], rows=[1]), "one of the 1 contexts"),
        (lambda e: e.score([1], [[1], [2]], rows=[0]), "one of the 1 contexts"),
        (lambda e: e.encode("hi", chat=True), "no chat template"),
        (lambda e: build(made_for="another"), "made for tiny .fingerprint another., but this model has tiny"),
        (lambda e: build(fallback="sometimes"), "fallback='sometimes' is unknown; choose one of auto"),
        (lambda e: build(attention="flash"), "attention='flash' is unknown; choose one of auto"),
        (lambda e: build(dtype="float16"), "dtype='float16' is unknown; choose one of float32"),
        (lambda e: build(attention="cudnn").prefill([[1]]), "cudnn needs an NVIDIA GPU"),
        (lambda e: build(buckets=(4, 8)).prefill([[1] * 30]), "add a bucket"),
        (lambda e: build(decode_sparsity=1.0), "decode_sparsity=1.0"),
        (lambda e: Sampling(temperature=-1.0), "temperature=-1.0"),
        (lambda e: Sampling(temperature=float("nan")), "temperature=nan"),
        (lambda e: Sampling(top_p=0.0), "top_p=0.0"),
        (lambda e: Sampling(top_p=1.1), "top_p=1.1"),
    ],
)
def test_mistakes_are_one_sentence(engine, call, message):
  with pytest.raises(UserError, match=message) as error:
    call(engine)
  assert "\n" not in str(error.value)


def on_mesh(engine, *sizes):
  """The same engine with its model on a mesh."""
  model_config, mesh = engine.model.config, sharding.make_mesh(*sizes)
  placed = jax.device_put(engine.model.params, decoder.param_shardings(mesh, model_config))
  return Engine(dataclasses.replace(engine.model, params=placed), engine.artifact)


@pytest.mark.parametrize(
    "case, sizes, sampling",
    [
        ("llama_evict", (1, 1, 2), DRAWN),
        ("tied_project_skipping", (1, 1, 4), Sampling()),
        ("qwen_project", (2, 2, 2), Sampling()),
    ],
)
def test_several_devices_give_what_one_gives_and_hold_their_parts(case, sizes, sampling):
  one = build(**CASES[case])
  several, tensor = on_mesh(one, *sizes), sizes[2]
  prefix = several.prefill(PROMPTS)
  own = tokens_of(one.generate(PROMPTS, 20, sampling, stop_tokens=()))
  assert tokens_of(several.generate(prefix, 20, sampling, stop_tokens=())) == own
  answers = prompts_of((5, 3, 1), seed=1)
  for got, want in zip(several.score(prefix, answers, [0, 1, 2]), one.score(one.prefill(PROMPTS), answers, [0, 1, 2])):
    np.testing.assert_allclose(got.logprobs, want.logprobs, rtol=1e-5, atol=1e-5)
    assert got.greedy == want.greedy
  cache = prefix.groups[0].prefilled.cache
  parts = tensor if one.model.config.num_kv_heads % tensor == 0 else 1  # heads of keys and values are not cut
  for whole in (cache.k_BxGxNxS, cache.v_BxGxSxN):
    assert {shard.data.nbytes * parts for shard in whole.addressable_shards} == {whole.nbytes}
  assert len(cache.k_BxGxNxS.sharding.device_set) == math.prod(sizes)
  assert prefix.cache_bytes == one.prefill(PROMPTS).cache_bytes


def test_a_crossover_of_one_device_says_nothing_of_several():
  one = build(crossover=measured(10))
  assert (one.crossover, on_mesh(one, 1, 1, 2).crossover) == (10, None)


def test_the_last_position_can_be_reached():
  engine = build(routing=None)
  full = prompts_of((POSITIONS,))[0]
  assert len(engine.generate([full[:-1]], 1)[0].tokens) == 1
  assert engine.score(full, [[5]])[0].total < 0  # the last token is scored, not run


# --- the command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
  """(model, artifact): a checkpoint with its tokenizer, and what prunes it from 10 tokens on."""
  root = tmp_path_factory.mktemp("served")
  c = config()
  hf = dict(
      model_type="llama", vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
      num_hidden_layers=c.num_blocks, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
      head_dim=c.head_dim, rms_norm_eps=c.norm_eps, tie_word_embeddings=False, max_position_embeddings=POSITIONS,
  )
  save_params(params(c), c, root / "model", hf)
  byte_tokenizer(CHAT).save_pretrained(root / "model")
  made = artifact(c, RoutingConfig("evict"), RouterConfig(), measured(10))
  made = dataclasses.replace(made, base_model=str(root / "model"), fingerprint=fingerprint(root / "model"))
  artifacts.save(made, root / "artifact")
  return str(root / "model"), str(root / "artifact")


@pytest.fixture(scope="module")
def served(directories):
  return Engine.load(*directories)


def generate(directories, *arguments):
  return cli.main(["generate", f"--model={directories[0]}", f"--artifact={directories[1]}", *arguments])


def test_the_command_streams_the_continuation_of_one_prompt(directories, served, capsys, monkeypatch):
  expected = served.generate([served.encode("Do tiny ones talk?")], 18)[0]
  printed = []
  monkeypatch.setattr(command, "print", lambda *a, **k: printed.append(a) or print(*a, **k), raising=False)
  assert generate(directories, "--prompt=Do tiny ones talk?", "--max-new-tokens=18") == 0
  out, err = capsys.readouterr()
  assert out == expected.text + "\n" and len(printed) >= 18  # piece by piece
  assert re.fullmatch(
      r"ftp-jax: 18 prompt tokens, 18 new tokens, first token after \d+\.\d\d s, \d+\.\d tokens/s, cache [\d,]+ bytes, "
      r"pruned: not below the crossover of 10 tokens\n", err,
  )
  monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Do tiny ones talk?\n")))
  assert generate(directories, "--max-new-tokens=18") == 0
  assert capsys.readouterr().out == out
  assert generate(directories, "--prompt=Do tiny ones talk?", "--max-new-tokens=18", "--tensor=2") == 0
  out, err = capsys.readouterr()
  assert out == expected.text + "\n" and "pruned: no crossover was measured on this kind and number" in err


def test_without_a_model_it_is_that_of_the_artifact(directories, served, capsys, tmp_path):
  expected = served.generate([served.encode("Do tiny ones talk?")], 4)[0].text
  asked = ["generate", "--prompt=Do tiny ones talk?", "--max-new-tokens=4"]
  assert cli.main([*asked, f"--artifact={directories[1]}"]) == 0
  assert capsys.readouterr().out == expected + "\n"
  config = pathlib.Path(shutil.copytree(directories[1], tmp_path / "one,two")) / "ftp_config.json"
  assert cli.main([*asked, f"--artifact={config.parent}"]) == 0
  assert capsys.readouterr().out == expected + "\n"
  config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model": 3}))
  assert cli.main([*asked, f"--artifact={config.parent}"]) == 2
  assert "is incomplete or wrong (base_model=3 is no text); copy the artifact again." in capsys.readouterr().err


@pytest.mark.parametrize("typed", [b"caf\xe9", b""])
def test_a_prompt_that_is_no_text_is_one_sentence(typed, directories, capsys, monkeypatch):
  message = "is not UTF-8" if typed else "is empty"
  monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed + b"\n")))
  assert generate(directories) == 2
  assert message in capsys.readouterr().err
  assert generate(directories, f"--prompt={os.fsdecode(typed)}") == 2
  assert message in capsys.readouterr().err


def test_prompts_of_other_systems_and_with_rare_line_ends(tmp_path):
  texts = ["one\u2028two\x85\x0cthree", "four"]
  (tmp_path / "mark.jsonl").write_text(
      "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\r\n" for text in texts), encoding="utf-8-sig"
  )
  (tmp_path / "mark.txt").write_text("\r\n".join(texts), encoding="utf-8-sig")
  assert command.read_prompts(None, str(tmp_path / "mark.jsonl")) == texts
  assert command.read_prompts(None, str(tmp_path / "mark.txt")) == texts


@pytest.mark.parametrize("change, message", [
    (lambda a: {"params": jax.tree.map(lambda w: w[:1], a.params)}, "is not of its ftp_config.json"),
    (lambda a: {"params": {"hidden": a.params["hidden"]}}, "is not of its ftp_config.json"),
    (lambda a: {"stand_in": dict.fromkeys(("bias", "down", "up"), np.float32(0))}, "is not of its ftp_config.json"),
    (lambda a: {"schedule": (*a.schedule, 0.5)}, "one number from 0 to 1 for each of"),
    (lambda a: {"schedule": ("0.5", *a.schedule[1:])}, "one number from 0 to 1 for each of"),
    (lambda a: {"routing": RoutingConfig(one_pass_block=99)}, "routing.one_pass_block=99 does not exist"),
])
def test_an_artifact_of_mixed_files_is_refused(directories, change, message):
  good = artifacts.load(directories[1])
  with pytest.raises(UserError, match=message):
    Engine(load_model(directories[0]), dataclasses.replace(good, **change(good)))


def test_the_command_does_not_write_over_its_prompts(directories, tmp_path, capsys):
  prompts = tmp_path / "prompts.jsonl"
  prompts.write_text('{"prompt": "Do tiny ones talk?"}\n')
  assert generate(directories, f"--prompts={prompts}", f"--json={tmp_path}/../{tmp_path.name}/prompts.jsonl") == 2
  assert "is the file of --prompts" in capsys.readouterr().err
  assert json.loads(prompts.read_text()) == {"prompt": "Do tiny ones talk?"}


def test_the_command_samples_stops_and_chats(directories, served, capsys):
  ids = served.encode(" now speak up ", chat=True)
  assert ids == encode_pairs([Pair(" now speak up ", "", True)], served.model.tokenizer, True)[0][0]
  free = served.generate([ids], 18, DRAWN, seed=3)[0]
  stop = free.text[9:11]
  options = ["--prompt= now speak up ", "--chat", "--temperature=0.8", "--top-p=0.9", "--seed=3", "--max-new-tokens=18"]
  assert generate(directories, *options, f"--stop={stop}", "--stop=never said") == 0
  assert capsys.readouterr().out == free.text[: free.text.index(stop)] + "\n"


def test_the_command_runs_a_file_of_prompts(directories, served, capsys, tmp_path):
  texts = ["too short", "more than ten ids", "and a third prompt"]
  expected = [served.generate([served.encode(t)], 18, DRAWN, seed=7 + i)[0] for i, t in enumerate(texts)]
  target = tmp_path / "results.jsonl"
  (tmp_path / "plain.txt").write_text("\n\n".join(texts))
  (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text, "id": 1}) + "\n" for text in texts))
  for name in ("plain.txt", "prompts.jsonl"):
    options = ["--max-new-tokens=18", "--temperature=0.8", "--top-p=0.9", "--seed=7", "--batch=2", f"--json={target}"]
    assert generate(directories, f"--prompts={tmp_path / name}", *options) == 0
    out, err = capsys.readouterr()
    assert out == "".join(f"=== {n}/3: {t}\n{e.text}\n" for n, (t, e) in enumerate(zip(texts, expected), 1))
    assert [json.loads(line) for line in target.read_text().splitlines()] == [
        {"prompt": t, "text": e.text, "tokens": list(e.tokens), "stopped": False, "pruned": n > 0}
        for n, (t, e) in enumerate(zip(texts, expected))
    ]
    assert "44 prompt tokens, 54 new tokens" in err and "2 of 3 pruned" in err


def test_the_clock_leaves_out_what_compiles_for_the_dense_rows_of_a_batch(monkeypatch):
  now = iter([0.0, 5.0, 9.0, 9.5, 10.0, 15.0, 19.0, 19.5])  # begin; first, second and later tokens of row 0; of row 1
  monkeypatch.setattr(command.time, "perf_counter", lambda: next(now))
  clock = command.Clock()
  for row, calls in ((0, 4), (1, 3)):
    for _ in range(calls):
      clock.tick(row, 1)
  clock.pause()
  assert clock.first == 5.0 and clock.rate == pytest.approx(3 / (1.0 + 0.5))


def test_the_screen_holds_back_what_may_still_change(capsys):
  tokenizer = byte_tokenizer()
  screen = command.Screen(tokenizer.decode, ["END", "never"])
  shown = []
  for token in tokenizer("né€ EN!xEND").input_ids:
    screen.add([token])
    shown.append(capsys.readouterr().out)
  # "n" may begin "never", a byte of two is no letter, "EN" may become "END", which is not printed when it does.
  assert shown == ["", "n", "é"] + ["", "", "€", " "] + ["", "", "EN!", "x"] + ["", "", ""]
  screen.finish("né€ EN!x")
  assert capsys.readouterr().out == "\n"
  screen = command.Screen(tokenizer.decode, ["--é"])
  for token in tokenizer("ab--é").input_ids:  # at the first byte of é it may still become the stop
    screen.add([token])
  assert capsys.readouterr().out == "ab"
  screen = command.Screen(tokenizer.decode, [], stop_tokens=tokenizer("b").input_ids)
  screen.add(tokenizer("aé").input_ids[:2] + tokenizer("b").input_ids)
  assert capsys.readouterr().out == "a"
  screen.finish("a\ufffd")  # the limit came in the middle of a letter
  assert capsys.readouterr().out == "\ufffd\n"


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"routing": None}, "dense: there is no --artifact"),
        ({"fallback": "never"}, "pruned: --fallback=never"),
        ({"fallback": "always"}, "dense: --fallback=always"),
        ({}, "pruned: no crossover was measured"),
        ({"crossover": measured(None, ELSEWHERE)}, "pruned: no crossover was measured on"),
        ({"crossover": measured(30, ELSEWHERE)}, "pruned: no crossover was measured on"),
        ({"crossover": measured(None)}, "dense: pruning was faster at no length"),
        ({"crossover": measured(30)}, "dense: below the crossover of 30 tokens"),
        ({"crossover": measured(5)}, "pruned: not below the crossover of 5 tokens"),
        ({"crossover": measured(10)}, "1 of 2 pruned"),
    ],
)
def test_the_command_says_why_a_prompt_was_pruned_or_not(options, expected):
  assert command.reason(build(**options), [17, 9]).startswith(expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt="], "The prompt is empty"),
        (["--prompt=a", "--prompts=b"], "exclude each other"),
        (["--prompts="], "--prompts is empty; name a text file"),
        (["--prompts={tmp}/missing.txt"], "missing.txt cannot be read (No such file or directory)"),
        (["--prompts={tmp}/blank.txt"], "holds no prompt"),
        (["--prompts={tmp}/broken.jsonl"], 'broken.jsonl has no text "prompt"'),
        (["--prompts={tmp}/half.jsonl"], "Line 1 of {tmp}/half.jsonl holds half a surrogate pair"),
        (["--prompt=" + "x" * 129], "129 tokens exceeds the model's 128 positions"),
        (["--prompt=" + "x" * 120], "120 tokens and 64 new ones exceed"),
        (["--prompt=a", "--artifact={tmp}"], "has no ftp_config.json"),
        (["--prompt=a", "--artifact={tmp}/foreign"], "(fingerprint 0123), but this model has"),
        (["--prompt=a", "--temperature=-1"], "temperature=-1.0"),
        (["--prompt=a", "--top-p=2"], "top_p=2.0"),
        (["--prompt=a", "--batch=0"], "--batch=0"),
        (["--prompt=a", "--max-new-tokens=0"], "max_new_tokens=0"),
        (["--prompt=a", "--fallback=maybe"], "fallback='maybe'"),
        (["--prompt=a", "--attention=flash"], "attention='flash'"),
        (["--prompt=a", "--dtype=int8"], "dtype='int8'"),
        (["--prompt=a", "--tensor=0"], "tensor=0 devices cannot be had; this process has 8, choose 1 to 8"),
        (["--prompt=a", "--tensor=9"], "tensor=9 devices cannot be had"),
        (["--prompt=a", "--tensor=5"], "tensor=5 divides neither the 4 heads nor the 48 columns"),
        (["--prompt=a", "--artifact=", "--decode-sparsity=0.2"], "name one with --artifact"),
        (["--prompt=a", "--json={tmp}/no/such.jsonl"], "create {tmp}/no first"),
        (["--prompt=a", "--promt=b"], "'--promt=b' is not understood"),
    ],
)
def test_mistakes_in_the_command(directories, capsys, tmp_path, arguments, message):
  (tmp_path / "blank.txt").write_text("\n \n")
  (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
  (tmp_path / "half.jsonl").write_text(r'{"prompt": "hi \ud83d"}')
  foreign = artifacts.load(directories[1])
  artifacts.save(dataclasses.replace(foreign, fingerprint="0123"), tmp_path / "foreign")
  fill = lambda text: text.replace("{tmp}", str(tmp_path))
  assert generate(directories, *map(fill, arguments)) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.startswith("ftp-jax: ") and err.count("\n") == 1
  assert fill(message) in err


def test_the_command_asks_for_a_prompt_on_a_terminal(directories, capsys, monkeypatch):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr("sys.stdin", terminal)
  assert generate(directories) == 2
  assert "pipe a text in" in capsys.readouterr().err
  monkeypatch.setattr("sys.stdin", None)  # it was closed
  assert generate(directories) == 2
  assert "pipe a text in" in capsys.readouterr().err


def test_characters_that_a_terminal_has_not_do_not_end_the_command(directories, tmp_path, monkeypatch):
  shown, record = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True), tmp_path / "record.jsonl"
  monkeypatch.setattr(Engine, "decode", lambda self, tokens: "caf\xe9"[: len(tokens)])
  monkeypatch.setattr("sys.stdout", shown)
  assert generate(directories, "--prompt=a", "--max-new-tokens=6", f"--json={record}") == 0
  assert shown.buffer.getvalue() == b"caf?\n"
  assert json.loads(record.read_text(encoding="utf-8"))["text"] == "caf\xe9"


def test_interrupting_the_command_promises_no_saved_state(capsys, monkeypatch):
  monkeypatch.setattr(command, "run", lambda arguments: (_ for _ in ()).throw(KeyboardInterrupt))
  assert cli.main(["generate", "--prompt=a"]) == 130
  assert capsys.readouterr().err == "\nftp-jax: stopped.\n"


def test_help_of_the_command(capsys):
  with pytest.raises(SystemExit):
    cli.main(["generate", "--help"])
  out = capsys.readouterr().out
  assert out.startswith("usage: ftp-jax generate ") and all(name in out for name in IMPLEMENTATIONS)


def test_the_examples_of_the_document_run(directories, capsys):
  text = DOC.read_text(encoding="utf-8")
  for name, path in (("smollm2-135m", directories[0]), ("runs/quickstart/S0.30/seed0/artifact", directories[1])):
    assert name in text
    text = text.replace(name, path)
  scope = {}
  blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  assert len(blocks) >= 4
  for block in blocks:
    exec(compile(block, str(DOC), "exec"), scope)
  assert capsys.readouterr().out
