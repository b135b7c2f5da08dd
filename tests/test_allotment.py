"""Sparsity allotted by what routers lose: the losses against selection itself, the allotment against all schedules."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftp_jax.errors import UserError
from ftp_jax.routing import factors
from ftp_jax.routing.config import FACTORS, RouterConfig, RoutingConfig
from ftp_jax.routing.routers import init_router
from ftp_jax.routing.selection import keep_context
from ftp_jax.training import allotment, guide

GRID = np.arange(8) / 8
CONTEXT = np.array([16, 9, 12, 5, 16, 7], np.int32)


@pytest.mark.parametrize("recent", [0, 3])
def test_what_skips_is_what_selection_skips(recent):
  routing = RoutingConfig(recent_tokens=recent)
  rng = np.random.default_rng(0)
  margin = rng.standard_normal((3, 6, 20)).astype(np.float32)
  margin[0] = np.round(margin[0])  # ties
  fisher = rng.random((3, 6, 20)).astype(np.float32)
  worth = allotment.skipped_worth(margin, fisher, CONTEXT, routing, GRID)
  assert worth.shape == (3, 8, 6)
  in_context = np.arange(20)[None] < CONTEXT[:, None]
  for block, (u, sparsity) in itertools.product(range(3), enumerate(GRID)):
    keep = np.asarray(keep_context(jnp.asarray(margin[block]), jnp.float32(sparsity), CONTEXT, routing))
    expected = np.sum(fisher[block] * (in_context & ~keep), axis=1) / 2
    np.testing.assert_allclose(worth[block, u], expected, rtol=1e-5, atol=1e-7)
  assert np.all(worth[:, 0] == 0) and np.all(worth[:, -1] > 0)


def data_of(rng, inputs, num_blocks=3):
  """Scores of which one half is in the states that enter each block, and another prompt's in the attention scores."""
  hidden = rng.standard_normal((inputs, 6, 20, 4)).astype(np.float16)
  score = rng.random((inputs, 6, 20), np.float32)
  fisher = rng.random((num_blocks, 6, 20), np.float32)
  return guide.GuideData(CONTEXT, CONTEXT + 4, score, hidden, fisher)


@pytest.mark.parametrize("kind, names, one_pass_block", [
    ("per_block", FACTORS, -1), ("per_block", FACTORS, 1), ("global", ("rank",), 1), ("recurrent", (), -1),
])
def test_expected_losses_are_those_of_the_routers_margins(kind, names, one_pass_block):
  rng = np.random.default_rng(1)
  config = RouterConfig(kind, names, hidden_states=True, hidden_size=8)
  data = data_of(rng, 3 if one_pass_block < 0 else one_pass_block + 1)
  params = jax.tree.map(lambda a: a + 0.3 * rng.standard_normal(a.shape).astype(np.float32),
                        init_router(config, jax.random.key(0), 3, 4))
  schedule, rows = np.array([0, 0.25, 0.5], np.float32), np.array([0, 2, 3, 4, 5])
  routing = RoutingConfig(one_pass_block=one_pass_block)
  losses = [
      allotment.expected_loss(config, routing, params, data, data.fisher_LxNxT, schedule, GRID, rows, batch)
      for batch in (2, 5)
  ]
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
  at = np.minimum(np.arange(3), len(data.score_UxNxT) - 1)
  features = None
  if names:
    features = jnp.stack([
        factors.context_factors(names, jnp.asarray(data.score_UxNxT[i]), s, jnp.asarray(CONTEXT))
        for i, s in zip(at, schedule)
    ])
  margin = np.asarray(guide.margins(config, params, features, jnp.asarray(data.hidden_UxNxTxD[at], jnp.float32)))
  worth = allotment.skipped_worth(margin, data.fisher_LxNxT, CONTEXT, RoutingConfig(), GRID)[:, :, rows].mean(axis=2)
  np.testing.assert_allclose(losses[0][1:], worth[1:], rtol=1e-5)
  assert np.isnan(losses[0][0]).all()  # of a recurrent router as well, which is asked there for its state


@pytest.mark.parametrize("what, words", [
    ("router", "warm-up has diverged; lower train.warmup_guide_learning_rate"),
    ("scores", "gate scores have overflowed; take model.dtype=float32"),
])
def test_what_is_not_finite_is_not_ranked(what, words):
  data = data_of(np.random.default_rng(5), 3)
  config = RouterConfig("per_block", FACTORS, hidden_states=True, hidden_size=8)
  params, fisher = init_router(config, jax.random.key(0), 3, 4), data.fisher_LxNxT.copy()
  if what == "router":
    params["out"]["kernel"] = params["out"]["kernel"].at[1].set(jnp.nan)
  else:
    fisher[2, 3, 4] = np.inf
  with pytest.raises(UserError, match=words):
    allotment.expected_loss(
        config, RoutingConfig(), params, data, fisher, np.full(3, 0.5, np.float32), GRID, np.arange(6), 4
    )


def test_no_schedule_loses_less_than_the_one_allotted():
  rng = np.random.default_rng(2)
  for total in (0, 1, 5, 9, 12):
    losses = np.cumsum(rng.random((4, 4)), axis=1) - 0.5
    losses[:, 0], losses[1] = 0, [0, 0.1, 0.1, 5]  # one that is not convex
    units = allotment.allot(losses, total)
    cost = lambda u: losses[np.arange(4), list(u)].sum()
    every = [u for u in itertools.product(range(4), repeat=4) if sum(u) == total]
    assert units.sum() == total and units.dtype == np.int32
    np.testing.assert_allclose(cost(units), min(map(cost, every)))


def test_blocks_without_losses_are_not_asked():
  losses = np.array([[np.nan] * 4, [0, 3, 6, 9], [0, 1, 2, 3]])
  np.testing.assert_array_equal(allotment.allot(losses, 4), [0, 1, 3])
  assert np.isnan(losses[0]).all()  # as it was


def test_sparsity_leaves_a_block_whose_few_precious_tokens_a_router_cannot_tell():
  """In both blocks the same share of tokens carries all of the worth; the router sees which in the second alone."""
  rng, count = np.random.default_rng(3), 64
  context = np.full(count, 20, np.int32)
  hidden = rng.standard_normal((2, count, 20, 4)).astype(np.float16)
  precious = np.stack([rng.random((count, 20)) < 0.1, hidden[1, :, :, 0] > 1.3]).astype(np.float32)
  fisher = precious + 1e-3 * rng.random(precious.shape).astype(np.float32)
  data = guide.GuideData(context, context, np.zeros((2, count, 20), np.float32), hidden, fisher)
  config = RouterConfig("per_block", (), hidden_states=True, hidden_size=8)
  asked, rows = np.full(2, 0.5, np.float32), np.arange(count)
  router, _ = guide.warm_up(
      config, RoutingConfig(), guide.WarmupSettings(200, 8, 1e-2), init_router(config, jax.random.key(0), 2, 4), data,
      asked, 0, rows=rows[::2],
  )
  losses = allotment.expected_loss(config, RoutingConfig(), router, data, fisher, asked, GRID, rows[1::2], 8)
  blind, seeing = allotment.allot(losses, 7)
  assert blind + seeing == 7 and seeing >= 5
  np.testing.assert_allclose(guide.fisher_schedule(fisher, context, 0.4375), 0.4375, atol=0.06)  # sees no difference


def test_a_warm_up_learns_from_the_prompts_that_it_is_given():
  rng = np.random.default_rng(4)
  data = data_of(rng, 3)
  config = RouterConfig("per_block", FACTORS, hidden_states=True, hidden_size=8)
  fit = lambda data, rows: guide.warm_up(
      config, RoutingConfig(), guide.WarmupSettings(3, 2, 1e-2), init_router(config, jax.random.key(0), 3, 4), data,
      np.full(3, 0.5, np.float32), 0, rows=rows,
  )
  some = np.array([1, 4, 5])
  of_some, history = fit(data, some)
  cut = guide.GuideData(*(a[some] for a in data[:2]), *(a[:, some] for a in data[2:]))
  alone, expected = fit(cut, None)
  jax.tree.map(np.testing.assert_array_equal, of_some, alone)
  assert history == expected and history != fit(data, None)[1]
