"""Judging against the dense model, FLOPs, perplexity, redundancy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftp_jax.data.prompts import Prompts
from ftp_jax.evaluation import flops, methods, perplexity, redundancy
from ftp_jax.evaluation.judge import Frozen, Judge
from ftp_jax.models import decoder
from ftp_jax.routing import routers
from ftp_jax.routing.config import RouterConfig, RoutingConfig
from tests import tiny


@pytest.fixture(scope="module")
def model():
  c = tiny.config(num_blocks=5)
  return Frozen(c, tiny.params(c))


@pytest.fixture(scope="module")
def prompts(model):
  return Prompts(*tiny.batch(model.config, [8, 5, 6, 7, 4], [12, 8, 10, 8, 8], 12))


@pytest.fixture(scope="module")
def judge(model, prompts):
  return Judge(model, RoutingConfig("project"), prompts, 2, 4)


dense_forward = jax.jit(decoder.forward, static_argnums=0)
unembed = jax.jit(decoder.unembed, static_argnums=0)


def dense_log_probs(model, prompts):
  hidden = dense_forward(model.config, model.params, prompts.tokens, prompts.length)
  return np.asarray(jax.nn.log_softmax(unembed(model.config, model.params, hidden)))


def test_dense_schedule_has_no_divergence_and_the_models_own_nll(model, judge, prompts):
  quality = judge.quality(routers.STATIC, np.zeros(5))
  np.testing.assert_allclose(quality.kl, 0, atol=1e-6)
  np.testing.assert_array_equal(quality.agreement, 1)
  lp = dense_log_probs(model, prompts)
  for n, (m, end) in enumerate(zip(prompts.context, prompts.length)):
    expected = -np.mean([lp[n, t - 1, prompts.tokens[n, t]] for t in range(m, end)])
    np.testing.assert_allclose(quality.nll[n], expected, rtol=1e-4)


@pytest.mark.parametrize("one_pass", [-1, 2])
def test_kl_of_a_population_equals_the_definition_and_one_by_one(prompts, one_pass):
  config = tiny.config(num_blocks=5, tie_embeddings=False)
  params = tiny.params(config)
  params["embed"]["lm_head"] *= 20  # sharp predictions: the KL is far above the rounding of its terms
  model = Frozen(config, params)
  judge = Judge(model, RoutingConfig("project", one_pass_block=one_pass), prompts, 2, 4)
  settings = RouterConfig("global", hidden_states=True, hidden_size=8)
  router = routers.Router("dynamic", settings, routers.init_router(settings, jax.random.key(1), 5, config.hidden_size))
  schedules = np.array([[0, 0, 0.5, 0.25, 0.5], [0, 0, 0, 0.8, 0], [0.5, 0, 0, 0, 0]], np.float32)
  together = judge.kl(router, schedules)
  dense = dense_log_probs(model, prompts)
  for s, value in zip(schedules, together):
    out = tiny.forward(model.config, judge.routing, model.params, router, *prompts, jnp.asarray(s))
    pruned = np.asarray(jax.nn.log_softmax(unembed(model.config, model.params, out.hidden_BxTxD)))
    divergence = (np.exp(dense) * (dense - pruned)).sum(-1)
    scored = zip(prompts.context - 1, prompts.length - 1)
    expected = np.mean([divergence[n, first:end].mean() for n, (first, end) in enumerate(scored)])
    assert expected > 0.01
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(judge.kl(router, s[None])[0], expected, rtol=1e-4)


@pytest.mark.parametrize("buckets", [(8, 10), (9,)])
def test_length_buckets_change_no_figure(model, judge, prompts, buckets):
  bucketed = Judge(model, RoutingConfig("project"), prompts, 2, 4, buckets)
  schedule = np.array([0, 0, 0.5, 0.25, 0.5], np.float32)
  shorter = methods.truncate(prompts, 0.4)
  for replaced in (None, shorter):
    expected, found = (j.quality(routers.STATIC, schedule, replaced) for j in (judge, bucketed))
    np.testing.assert_array_equal(found.keep_LxNxT, expected.keep_LxNxT)
    np.testing.assert_array_equal(found.agreement, expected.agreement)
    np.testing.assert_allclose(found.kl, expected.kl, atol=1e-6)
    np.testing.assert_allclose(found.nll, expected.nll, atol=1e-5)
    assert expected.kl.min() > 1e-5 and len(set(expected.nll.tolist())) == len(prompts.tokens)
  np.testing.assert_allclose(
      bucketed.kl(routers.STATIC, schedule[None]), judge.kl(routers.STATIC, schedule[None]), atol=1e-6
  )


def test_truncation_keeps_the_sink_the_latest_tokens_and_the_continuation():
  prompts = Prompts(np.array([[5, 6, 7, 8, 9, 1, 2, 0]], np.int32), np.array([5], np.int32), np.array([7], np.int32))
  shorter = methods.truncate(prompts, 0.4)
  np.testing.assert_array_equal(shorter.tokens, [[5, 8, 9, 1, 2, 0, 0, 0]])
  assert shorter.context.tolist() == [3] and shorter.length.tolist() == [5]


def test_prefill_flops_by_hand():
  sizes = dict(hidden_size=4, intermediate_size=6, num_heads=2, num_kv_heads=1, head_dim=2, vocab_size=10)
  c = tiny.config(num_blocks=2, **sizes)
  keep = np.array([[1, 0, 1], [1, 1, 1]], bool)
  linear, key, pair = 2 * (4 * 4 * 2 + 3 * 4 * 6), 2 * 2 * 4 * 2, 2 * 2 * 4
  head = 2 * 4 * 10
  last_block = linear + 3 * key + 3 * pair  # one query: all keys
  project = head + (2 * linear + 3 * key + (1 + 3) * pair) + last_block
  evict = head + (2 * linear + 2 * key + (1 + 2) * pair) + last_block
  cost = lambda kv, router=None, **routing: flops.prefill_flops(c, keep, 3, RoutingConfig(kv, **routing), router)
  assert flops.prefill_flops(c, keep, 3) == cost("project") == project
  assert cost("evict") == evict and cost("evict", evict_from=1) == project  # of the two only the first block skips
  both = np.array([[1, 0, 1], [1, 0, 1]], bool)
  half = flops.prefill_flops(c, both, 3, RoutingConfig("evict", evict_from=1))
  assert half == project - key - pair  # the last query has one key less there
  unscored = RouterConfig(factors=("position", "sparsity"))
  mlp = 3 * 2 * (2 * 64 + 64 * 2)
  assert cost("evict", unscored) - evict == mlp  # only the first block skips
  assert cost("evict", dataclasses.replace(unscored, kind="recurrent")) - evict == 2 * (mlp + 3 * 2 * 64 * 64)
  four_factors, window = 3 * 2 * (4 * 64 + 64 * 2), {"score_window": 2}
  assert cost("project", RouterConfig(), **window) - project == four_factors  # no router after it to read scores
  # With two blocks that skip, scores of the first: two late queries, which see 2 and 3 keys, or without the second
  # token 1 and 2. A plan made before them reads none.
  cost = lambda kv, router=None, **routing: flops.prefill_flops(c, both, 3, RoutingConfig(kv, **routing), router)
  scored, query, pair = cost("project", RouterConfig(), **window) - cost("project"), 2 * 4 * 4, 2 * 4
  assert scored - 2 * four_factors == 2 * query + (2 + 3) * pair
  assert cost("evict", RouterConfig(), **window) - cost("evict") == scored - 2 * pair
  assert cost("project", RouterConfig(), one_pass_block=0, **window) - cost("project") == 2 * four_factors
  dense = flops.prefill_flops(c, np.ones((2, 3)), 3)
  assert flops.prefill_flops(c, np.ones((2, 3)), 3, RoutingConfig(), RouterConfig()) == dense


def test_shares_of_a_hand_made_route():
  keep = np.ones((2, 1, 4), bool)
  keep[0, 0, 1] = False
  assert flops.skipped_share(keep, np.array([3])) == pytest.approx(1 / 6)
  c = tiny.config(num_blocks=2)
  assert flops.saved_share(c, np.ones((2, 1, 4), bool), np.array([3]), RoutingConfig("evict")) == 0


def test_dense_perplexity_equals_the_definition(model):
  windows = Prompts(*tiny.batch(model.config, [1, 1, 1], [12, 12, 9], 12, seed=3))
  lp = dense_log_probs(model, windows)
  nll = [-lp[n, t - 1, windows.tokens[n, t]] for n in range(3) for t in range(1, windows.length[n])]
  zero = np.zeros(5)
  value, achieved = perplexity.routed_perplexity(model, RoutingConfig(), routers.STATIC, zero, windows, 2)
  np.testing.assert_allclose(value, np.exp(np.mean(nll)), rtol=1e-4)
  assert achieved == 0
  np.testing.assert_allclose(perplexity.truncated_perplexity(model, 0.0, windows, 2), value, rtol=1e-4)


def test_routed_perplexity_equals_the_definition(model):
  windows = Prompts(*tiny.batch(model.config, [1, 1, 1], [12, 12, 9], 12, seed=3))
  schedule, router = jnp.array([0, 0.5, 0.9, 0.6, 0.5]), routers.Router("random", None, jax.random.key(0))
  routing = RoutingConfig(decode_sparsity=0.5)  # every token but the first is a continuation token
  out = tiny.forward(model.config, routing, model.params, router, *windows, schedule)
  lp = np.asarray(jax.nn.log_softmax(decoder.unembed(model.config, model.params, out.hidden_BxTxD)))
  nll = [-lp[n, t - 1, windows.tokens[n, t]] for n in range(3) for t in range(1, windows.length[n])]
  value, achieved = perplexity.routed_perplexity(model, RoutingConfig(), router, schedule, windows, 2)
  np.testing.assert_allclose(value, np.exp(np.mean(nll)), rtol=1e-4)
  np.testing.assert_allclose(achieved, 1 - np.asarray(out.keep_LxBxT).sum() / (5 * 33), rtol=1e-6)
  dense = perplexity.truncated_perplexity(model, 0.0, windows, 2)
  assert abs(value / dense - 1) > 1e-3 and 0.2 < achieved < 0.7


def test_truncated_perplexity_sees_sink_and_recent_tokens_only(model):
  windows = Prompts(*tiny.batch(model.config, [1], [8], 8, seed=4))
  value = perplexity.truncated_perplexity(model, 0.5, windows, 1)
  visible = np.zeros((8, 8), bool)
  # ceil((t + 1) / 2) keys: the sink, itself, and the latest before it.
  for t, keys in enumerate([[0], [0, 1], [0, 2], [0, 3], [0, 3, 4], [0, 4, 5], [0, 4, 5, 6], [0, 5, 6, 7]]):
    visible[t, keys] = True
  hidden = decoder.forward(model.config, model.params, windows.tokens, windows.length, visible_TxT=jnp.asarray(visible))
  lp = np.asarray(jax.nn.log_softmax(decoder.unembed(model.config, model.params, hidden)))
  expected = np.exp(-np.mean([lp[0, t, windows.tokens[0, t + 1]] for t in range(7)]))
  np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_perplexity_of_a_router_for_new_tokens_is_of_what_is_asked_of_them(model):
  windows = Prompts(*tiny.batch(model.config, [1], [12], 12, seed=5))
  chance, schedule = routers.Router("random", None, jax.random.key(0)), np.full(model.config.num_blocks, 0.6)
  of = lambda asked: perplexity.routed_perplexity(
      model, RoutingConfig(decode_sparsity=asked), chance, schedule, windows, 1
  )
  np.testing.assert_equal(of(0.0), of(0.6))  # strict: the schedule's own
  assert 0.05 < of(0.2)[1] < 0.4 < of(0.6)[1]


def test_redundancy_of_blocks_that_do_nothing(model, prompts):
  silent = jax.tree.map(lambda p: p, model.params)
  silent["blocks"] = {**silent["blocks"]}
  for name in ("o", "down"):
    silent["blocks"][name] = {"kernel": silent["blocks"][name]["kernel"].at[1:].set(0.0)}
  similarity = redundancy.token_similarity(Frozen(model.config, silent), prompts, 2)
  assert similarity.shape == (5, int(prompts.length.sum()))
  np.testing.assert_allclose(similarity[1:], 1, atol=1e-5)
  influence = redundancy.block_influence(similarity)
  assert influence[0] > 0.01 and influence[1:].max() < 1e-5
  table = redundancy.summary(similarity, prompts)
  assert table["share_above_0.8"][1:] == [1.0] * 4 and table["share_above_0.8_all"] < 1


def test_records_name_every_figure(judge, model):
  bench = methods.Bench(judge, Prompts(*tiny.batch(model.config, [1, 1], [10, 10], 10, seed=5)), 2)
  dense, cut, uniform, chance = bench.dense(), bench.truncation(0.5), bench.static_uniform(0.5), bench.random(0.5, 1)
  assert dense["kl"] == pytest.approx(0, abs=1e-6) and dense["flops_saved"] == pytest.approx(0)
  for record in (cut, uniform, chance):
    assert record["kl"] > 1e-3 and 0.2 < record["achieved"] <= 0.5 and 0 < record["flops_saved"] < 0.6
    assert record["prompts"] == 5 and record["asked"] == 0.5
  assert uniform["perplexity"] is None and uniform["perplexity_achieved"] is None  # it never skips the newest token
  assert cut["perplexity"] > 1 and abs(chance["perplexity"] / dense["perplexity"] - 1) > 1e-5
  assert 0.3 < chance["perplexity_achieved"] < 0.7
