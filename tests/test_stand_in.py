"""Linear maps that stand in for skipped blocks: what they do to a state, their fit by hand, what they cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftp_jax.data.prompts import Prompts
from ftp_jax.evaluation import flops
from ftp_jax.routing import masked, routers, stand_in
from ftp_jax.routing.config import RoutingConfig
from ftp_jax.training import stand_in as fitting
from ftp_jax.training.fisher import gate_fisher
from tests import tiny
from tests.test_bucketed import random_maps

CONFIG = tiny.config()
params = functools.cache(tiny.params)
ROUTING = RoutingConfig("project")


def prompts():
  lengths = [12, 9, 15, 8, 14, 12, 11]
  return Prompts(*tiny.batch(CONFIG, lengths, [n + 3 for n in lengths], 18, 0))


def maps(rank):
  return random_maps(CONFIG, rank, np.random.default_rng(1))


def normed(x):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def test_a_state_is_moved_by_hand():
  own = {name: a[2] for name, a in maps(3).items()}
  x = np.random.default_rng(0).normal(0, 2, (2, 5, CONFIG.hidden_size)).astype(np.float32)
  expected = x + own["bias"] + normed(x) @ own["down"] @ own["up"]
  np.testing.assert_allclose(stand_in.moved({"stand_in": own}, jnp.asarray(x)), expected, atol=1e-5)
  assert stand_in.moved({}, x) is x
  half = stand_in.moved({"stand_in": own}, jnp.asarray(x, jnp.bfloat16))
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(jnp.float32), expected, atol=0.1)


def test_only_tokens_that_skip_are_moved():
  """Every context token but the first and the last skips block 2; nothing else changes."""
  tokens, context, length = tiny.batch(CONFIG, [8, 6], [10, 9], 12)
  gate = np.ones((4, 2, 12), np.float32)
  gate[2] = ~((np.arange(12) > 0) & (np.arange(12)[None] < context[:, None] - 1))
  own, hidden = maps(4), {}
  for name, tree in (("plain", params(CONFIG)), ("moved", stand_in.attach(params(CONFIG), own))):
    run = lambda gate, tree: masked.forward(
        CONFIG, ROUTING, tree, routers.Router("given", None, gate), tokens, context, length, jnp.zeros(4)
    )
    hidden[name], dense = (np.asarray(jax.jit(run)(g, tree).hidden_BxTxD) for g in (gate, np.ones_like(gate)))
    hidden[name, "dense"] = dense
  np.testing.assert_array_equal(hidden["plain", "dense"], hidden["moved", "dense"])
  different = np.abs(hidden["plain"] - hidden["moved"]).max(-1) > 1e-3
  assert different[0, 1:10].all() and not different[:, 0].any()  # all later tokens see the moved ones


@pytest.mark.parametrize("buckets", [(), (14,)])
def test_the_fit_is_the_ridge_regression_and_its_best_part_of_a_rank(buckets):
  rows, ridge = prompts(), 0.05
  fit = lambda rank: fitting.fit(
      CONFIG, params(CONFIG), rows, 4, rank=rank, ridge=ridge, dtype=jnp.float32, length_buckets=buckets
  )
  entries, last = masked.dense_entries(CONFIG, ROUTING, params(CONFIG), *rows)
  states = np.concatenate([entries.x_BxTxD, np.asarray(last)[None]]).astype(np.float64)
  states = states[:, np.arange(18)[None] < rows.context[:, None]]  # (L+1, tokens, D)
  whole, some = fit(CONFIG.hidden_size), fit(3)
  assert stand_in.fits(whole, 4, CONFIG.hidden_size) and stand_in.fits(some, 4, CONFIG.hidden_size)
  for block, (x, y) in enumerate(zip(states, states[1:])):
    n, u = normed(x), y - x
    centred, of_u = n - n.mean(0), u - u.mean(0)
    penalty = ridge * len(n) * np.eye(n.shape[1])
    weight = np.linalg.solve(centred.T @ centred + penalty, centred.T @ of_u)
    predicted = u.mean(0) + centred @ weight
    by = lambda found: found["bias"][block] + n @ found["down"][block] @ found["up"][block]
    np.testing.assert_allclose(by(whole), predicted, atol=1e-3 * np.abs(predicted).max())
    left, right, axes = np.linalg.svd(centred @ weight, full_matrices=False)
    best = u.mean(0) + (left[:, :3] * right[:3]) @ axes[:3]
    np.testing.assert_allclose(by(some), best, atol=1e-3 * np.abs(predicted).max())
    assert ((u - by(whole)) ** 2).sum() < ((u - by(some)) ** 2).sum() < (of_u**2).sum()


def test_gate_scores_are_of_the_difference_to_what_a_skipping_token_becomes():
  """Nothing is lost where a block adds nothing, but for a map that then moves the token."""
  tokens, context, length = tiny.batch(CONFIG, [8, 6], [10, 9], 12)
  score = lambda tree: np.asarray(
      gate_fisher(CONFIG, ROUTING, tree, tokens, context, length, jax.random.key(0), num_scored=3, draws=2)
  )
  size = CONFIG.hidden_size
  silent = jax.tree.map(lambda a: np.array(a), params(CONFIG))
  for layer in ("o", "down"):
    silent["blocks"][layer]["kernel"][1] = 0
  assert (score(silent)[1] == 0).all() and score(silent)[2].max() > 0
  zero = {"bias": np.zeros((4, size), np.float32), "down": np.zeros((4, size, 1), np.float32),
          "up": np.zeros((4, 1, size), np.float32)}
  np.testing.assert_array_equal(score(stand_in.attach(silent, zero)), score(silent))
  zero["bias"] = np.ones_like(zero["bias"])
  assert score(stand_in.attach(silent, zero))[1].max() > 0


def test_maps_are_counted_where_a_block_skips_but_for_the_last():
  keep = np.ones((4, 10), bool)
  keep[1, 3:5] = keep[3, 2] = False
  plain = flops.prefill_flops(CONFIG, keep, 10, ROUTING)
  assert flops.prefill_flops(CONFIG, keep, 10, ROUTING, stand_in_rank=3) == plain + 2 * 2 * 10 * CONFIG.hidden_size * 3
  dense = np.ones((4, 10), bool)
  assert flops.prefill_flops(CONFIG, dense, 10, ROUTING, stand_in_rank=3) == flops.prefill_flops(CONFIG, dense, 10)


@pytest.mark.parametrize("change", [
    {"bias": np.zeros((4, 31))}, {"up": np.zeros((4, 2, 32))}, {"more": np.zeros(3)}, {"down": np.zeros((3, 32, 3))},
])
def test_maps_of_another_model_are_known(change):
  assert stand_in.fits(None, 4, 32) and stand_in.fits(maps(3), 4, 32)
  assert not stand_in.fits(maps(3) | change, 4, 32)
  assert not stand_in.fits({name: a for name, a in maps(3).items() if name not in change}, 4, 32) or "more" in change
