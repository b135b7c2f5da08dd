"""Selection, factors, routers and masked execution: hand-worked cases, causality, exactness."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftp_jax import hardware
from ftp_jax.errors import UserError
from ftp_jax.models import decoder
from ftp_jax.models.attention import attention_paid, attention_rows
from ftp_jax.routing import factors, masked, routers
from ftp_jax.routing.config import FACTORS, RouterConfig, RoutingConfig
from ftp_jax.routing.selection import (
    capacity, decode_schedule, descending_rank, forced_tokens, keep_context, keep_continuation, least_kept_margin,
    select,
)
from tests import tiny

KINDS = ("global", "per_block", "recurrent")


def dynamic(model_config, seed=1, **changes):
  router_config = RouterConfig(**changes)
  params = routers.init_router(router_config, jax.random.key(seed), model_config.num_blocks, model_config.hidden_size)
  return routers.Router("dynamic", router_config, params)


# --- capacity and selection -----------------------------------------------------------------


def test_capacity_counts_the_slots_of_each_row():
  m = jnp.array([10, 5, 3, 1])
  np.testing.assert_array_equal(capacity(jnp.float32(0.3), m), [7, 4, 3, 1])
  np.testing.assert_array_equal(capacity(jnp.float32(0.9), m), [2, 2, 2, 1])  # forced tokens need 2
  np.testing.assert_array_equal(capacity(jnp.float32(0.3), m, 4), [8, 4, 3, 1])
  np.testing.assert_array_equal(capacity(jnp.float32(0.0), m, 4), m)
  million = jnp.array([1_000_000, 999_999])
  np.testing.assert_array_equal(capacity(jnp.float32(0.3), million), [700_000, 700_000])


@settings(deadline=None)
@given(st.sampled_from((10, 16, 40, 64, 1000)).flatmap(lambda grid: st.tuples(st.integers(0, grid - 1), st.just(grid))),
       st.integers(1, 1_000_000))
def test_capacity_is_exact_on_grids(sparsity, m):
  units, grid = sparsity
  wanted = -((units - grid) * m // grid)
  assert capacity(jnp.float32(units / grid), jnp.array([m]))[0] == min(max(wanted, 2), m)


def test_descending_rank_breaks_ties_towards_the_later_token():
  values = jnp.array([[3.0, 1.0, 3.0, 2.0, 9.0]])
  valid = jnp.array([[True, True, True, True, False]])
  np.testing.assert_array_equal(descending_rank(values, valid), [[1, 3, 0, 2, 4]])


@pytest.mark.parametrize(
    "length, platform", [(1, "cpu"), (2, "cpu"), (700, "cpu"), (2**16, "cpu"), (2**16 + 3, "cpu"), (700, "tpu")]
)
def test_descending_rank_is_that_of_a_sort_by_value_then_position(length, platform):
  rng = np.random.default_rng(length)
  kinds = np.array([-3e38, -2, -1e-30, -0.0, 0.0, 1e-30, 1, 1 + 2**-23, np.inf], np.float32)
  values = rng.choice(kinds, (3, length))
  values[1] = rng.normal(size=length)
  valid = np.arange(length) < np.array([length, length, max(1, length - 3)])[:, None]
  expected = np.empty((3, length), int)
  for row, own, used in zip(expected, values, valid):
    row[np.lexsort((-np.arange(length), -np.where(used, own, -np.inf)))] = np.arange(length)
  with hardware.tracing_for(platform):
    np.testing.assert_array_equal(descending_rank(jnp.asarray(values), jnp.asarray(valid)), expected)


def test_attention_paid_is_the_weighted_sum_of_the_rows_and_nothing_for_those_that_see_no_key():
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 5, 6, 4)).astype(np.float32), rng.normal(size=(2, 9, 2, 4)).astype(np.float32)
  mask = rng.random((2, 5, 9)) < 0.5
  mask[1, 2] = False
  weight = rng.random((2, 5)).astype(np.float32)
  expected = np.einsum("bts,bt->bs", attention_rows(q, k, mask), weight)
  paid = attention_paid(q, k, mask, weight)
  np.testing.assert_allclose(paid, expected, atol=1e-6)
  seen = weight * mask.any(axis=2)
  np.testing.assert_allclose(paid.sum(axis=1), seen.sum(axis=1), atol=1e-6)
  assert (np.asarray(paid)[~mask.any(axis=1)] == 0).all()


def test_topk_keeps_forced_tokens_then_the_largest_margins():
  margin = jnp.array([[-5.0, 2.0, 1.0, 2.0, -9.0, 7.0]])
  valid = jnp.arange(6)[None] < 5
  keep = select(margin, jnp.array([3]), forced_tokens(jnp.array([5]), 6), valid, "topk")
  np.testing.assert_array_equal(keep, [[True, False, False, True, True, False]])  # tie 1 ~ 3: the later


def test_selection_is_that_of_a_sort_by_margin_then_position():
  rng = np.random.default_rng(0)
  for _ in range(30):
    margin = rng.choice(np.array([-1e30, -2, -1.5, -0.0, 0.0, 1e-30, 1, 3e38], np.float32), (8, 17))
    margin[:4] = rng.normal(size=(4, 17))
    context = rng.integers(1, 18, 8)
    slots = np.minimum(rng.integers(2, 18, 8), context)
    keep = select(
        jnp.array(margin), jnp.array(slots), forced_tokens(jnp.array(context), 17),
        jnp.arange(17)[None] < context[:, None], "topk",
    )
    least = least_kept_margin(jnp.array(margin), jnp.float32(0.4), jnp.array(context))
    for b, m in enumerate(context):
      order = sorted(range(m), key=lambda t: (t in (0, m - 1), margin[b, t], t), reverse=True)
      assert np.flatnonzero(keep[b]).tolist() == sorted(order[: slots[b]])
      assert least[b] == np.sort(margin[b, :m])[-int(capacity(jnp.float32(0.4), jnp.array([m]))[0])]


@pytest.mark.parametrize("least", [0.0, 0.3, -40.0])
def test_a_new_token_at_the_least_kept_margin_is_computed_however_it_was_rounded(least):
  least = np.float32(least)
  ulps = np.spacing(np.float32(max(abs(least), 1)))
  margin = np.array([[least, least - 2 * ulps, least + 2 * ulps, least - 1e-3, least + 1e-3]], np.float32)
  routing = RoutingConfig(decode_sparsity=0.4, decode_rule="quantile")
  keep = lambda asked: keep_continuation("dynamic", margin, jnp.float32(asked), jnp.array([least]), routing)[0].tolist()
  assert keep(0.4) == [True, True, True, False, True]
  assert all(keep(0.0))


def test_argmax_keeps_winners_only_and_at_most_the_capacity():
  margin = jnp.array([[-5.0, 2.0, -1.0, 3.0, 1.0, -2.0]])
  valid = jnp.ones((1, 6), bool)
  forced = forced_tokens(jnp.array([6]), 6)
  keep = lambda k: np.flatnonzero(select(margin, jnp.array([k]), forced, valid, "argmax")[0]).tolist()
  assert keep(6) == [0, 1, 3, 4, 5]
  assert keep(4) == [0, 1, 3, 5]


@pytest.mark.parametrize("selection", ["topk", "argmax"])
def test_recent_tokens_of_long_contexts_come_behind_the_forced_ones_the_latest_first(selection):
  margin = jnp.tile(jnp.array([9.0, 8.0, 7.0, -3.0, 6.0, 5.0, -1.0, -9.0, 4.0, -7.0, -8.0, -2.0]), (3, 1))
  routing = RoutingConfig(selection=selection, recent_tokens=3)
  rows = lambda s: [
      np.flatnonzero(row).tolist() for row in keep_context(margin, jnp.float32(s), jnp.array([12, 11, 3]), routing)
  ]
  assert rows(0.5)[0] == [0, 1, 2, 9, 10, 11]  # of 12: the last three, whatever their margins
  assert rows(0.5)[1] == [0, 1, 2, 4, 5, 10]  # of 11, less than four times three: the last alone
  assert rows(0.8)[0] == [0, 10, 11]  # not all have a slot
  assert rows(0.9)[0] == [0, 11]
  assert rows(0.5)[2] == [0, 2] and rows(0.0)[0] == list(range(12))
  with pytest.raises(UserError, match="recent_tokens=-1 must be from 0"):
    RoutingConfig(recent_tokens=-1)
  with pytest.raises(UserError, match="recent_tokens=536870912 must be from 0"):
    RoutingConfig(recent_tokens=2**29)


@pytest.mark.parametrize("selection,kept", [("topk", [0, 3, 4]), ("argmax", [0, 4])])
def test_a_block_of_which_nothing_is_asked_keeps_every_context_token(selection, kept):
  margin = jnp.array([[-1.0, -3.0, -2.0, -1.0, -4.0, 9.0]])
  keep = lambda s: np.flatnonzero(
      keep_context(margin, jnp.float32(s), jnp.array([5]), RoutingConfig(selection=selection))[0]
  ).tolist()
  assert keep(0.0) == [0, 1, 2, 3, 4]
  assert keep(0.4) == kept


def test_static_router_is_the_papers_priority_order():
  margin = routers.static_margin(jnp.arange(6)[None])
  for slots, kept in [(2, [0, 5]), (3, [0, 4, 5]), (5, [0, 2, 3, 4, 5])]:
    keep = select(margin, jnp.array([slots]), forced_tokens(jnp.array([6]), 6), jnp.ones((1, 6), bool), "topk")
    assert np.flatnonzero(keep[0]).tolist() == kept


# --- factors ---------------------------------------------------------------------------------


def test_factors_of_the_prefill_view_by_hand():
  score = jnp.array([[0.5, 0.25, 0.25, 0.0, 0.0]])
  values = factors.context_factors(FACTORS, score, 0.3, jnp.array([4]))[0]
  np.testing.assert_allclose(values[:4, 0], [0, 1 / 3, 2 / 3, 1], atol=1e-6)
  np.testing.assert_allclose(values[:4, 1], [2 / 3, 0.5, 0.5, 0.0], atol=1e-6)
  np.testing.assert_allclose(values[:4, 2], [0, 2 / 3, 1 / 3, 1], atol=1e-6)  # tie: the later ranks first
  np.testing.assert_allclose(values[:, 3], 0.3, atol=1e-6)


def test_factors_of_the_causal_view_by_hand():
  causal = jnp.zeros((1, 4, 4)).at[0, 3].set(jnp.array([0.4, 0.1, 0.3, 0.2]))
  values = masked.factors(FACTORS, masked.Scores(jnp.zeros((1, 4)), causal), 0.3, 0.0, jnp.array([1]))
  # The newest of 4 tokens: position 1, own score 0.2 -> 0.8 / 1.8, two tokens score higher.
  np.testing.assert_allclose(values[0, 3], [1.0, 0.8 / 1.8, 2 / 3, 0.0], atol=1e-6)


@pytest.mark.parametrize(
    "routed, one_pass, recurrent, scored",
    [
        ((0, 0, 1, 1, 0), -1, False, (0, 1, 1, 0, 0)),  # a dense block's scores are replaced in the next one
        ((1, 0, 1, 0, 0), -1, False, (0, 1, 0, 0, 0)),
        ((1, 1, 0, 1, 1), -1, False, (1, 0, 1, 1, 0)),
        ((0, 0, 1, 1, 1), -1, True, (1, 1, 1, 1, 0)),
        ((0, 0, 1, 0, 0), -1, True, (1, 1, 0, 0, 0)),
        ((0, 0, 0, 0, 0), -1, True, (0, 0, 0, 0, 0)),
        ((1, 0, 0, 0, 1), 2, True, (1, 1, 0, 0, 0)),
        ((0, 0, 1, 1, 1), 2, False, (0, 1, 0, 0, 0)),
        ((0, 0, 0, 1, 1), 2, False, (0, 1, 0, 0, 0)),
        ((0, 1, 1, 1, 1), 3, False, (1, 1, 1, 0, 0)),
        ((0, 1, 1, 1, 1), 0, False, (0, 0, 0, 0, 0)),
        ((0, 0, 0, 0, 0), 2, False, (0, 0, 0, 0, 0)),
    ],
)
def test_which_blocks_have_their_scores_read(routed, one_pass, recurrent, scored):
  routing = RoutingConfig(one_pass_block=one_pass)
  assert routing.scored_blocks(routed, recurrent) == [bool(some) for some in scored]


def test_skipped_tokens_keep_their_latest_score():
  q = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
  k = jax.random.normal(jax.random.key(1), (1, 4, 2, 8))
  mask = jnp.tril(jnp.ones((1, 4, 4), bool))
  context = jnp.array([4])
  first = masked.update_scores(masked.init_scores(1, 4, True), q, k, mask, jnp.ones((1, 4), bool), context, 2)
  keep = jnp.array([[True, False, True, True]])
  second = masked.update_scores(first, 2 * q, k, mask & keep[:, None, :], keep, context, 2)
  assert second.prefill_BxT[0, 1] == first.prefill_BxT[0, 1]
  assert np.all(second.prefill_BxT[0, [0, 2, 3]] != first.prefill_BxT[0, [0, 2, 3]])
  np.testing.assert_array_equal(second.seen_BxTxT[0, 1], first.seen_BxTxT[0, 1])
  np.testing.assert_allclose(np.sum(second.seen_BxTxT[0, 3, jnp.array([0, 2, 3])]), 1.0, atol=1e-6)


def test_score_window_averages_the_last_computed_context_queries():
  q = jax.random.normal(jax.random.key(0), (1, 4, 1, 8))
  k = jax.random.normal(jax.random.key(1), (1, 4, 1, 8))
  mask = jnp.tril(jnp.ones((1, 4, 4), bool))
  keep = jnp.array([[True, True, False, True]])
  table = masked.update_scores(masked.init_scores(1, 4, False), q, k, mask, keep, jnp.array([4]), 3).prefill_BxT
  rows = jax.nn.softmax(jnp.where(mask, jnp.einsum("bthn,bshn->bts", q, k) / np.sqrt(8), -jnp.inf))[0]
  expected = (rows[1] + rows[3]) / 2  # window 1..3, query 2 is skipped
  np.testing.assert_allclose(table[0], jnp.where(keep[0], expected, 0), atol=1e-6)
  wide = lambda window: masked.update_scores(
      masked.init_scores(1, 4, False), q, k, mask, keep, jnp.array([4]), window
  ).prefill_BxT
  np.testing.assert_array_equal(wide(4), wide(5))
  assert str(2**20) not in str(jax.make_jaxpr(lambda: wide(2**20))())  # no more queries than there are positions


@pytest.mark.parametrize("name", ["bucket_multiple", "score_window", "recent_tokens"])
@pytest.mark.parametrize("tokens", [-1, 2**20 + 1])
def test_numbers_of_tokens_out_of_range_are_refused(name, tokens):
  with pytest.raises(UserError, match=f"routing.{name}={tokens} must be from . to 1048576"):
    RoutingConfig(**{name: tokens})


def test_a_router_without_width_is_refused():
  with pytest.raises(UserError, match="router.hidden_size=0 must be at least 1"):
    RouterConfig(hidden_size=0)


# --- execution -------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_mode", ["evict", "project"])
@pytest.mark.parametrize("router_kind", ["static", "random", "dynamic"])
def test_schedule_zero_equals_dense_exactly(kv_mode, router_kind):
  c = tiny.config()
  p = tiny.params(c)
  tokens, context, length = tiny.batch(c, [7, 4, 1], [10, 9, 6], 10)
  router = {
      "static": routers.STATIC, "random": routers.Router("random", None, jax.random.key(0)), "dynamic": dynamic(c),
  }[router_kind]
  out = tiny.forward(c, RoutingConfig(kv_mode), p, router, tokens, context, length, jnp.zeros(c.num_blocks))
  dense = jax.jit(decoder.forward, static_argnums=0)(c, p, tokens, length)
  valid = np.arange(10)[None] < length[:, None]
  np.testing.assert_array_equal(np.asarray(out.keep_LxBxT), np.broadcast_to(valid, out.keep_LxBxT.shape))
  np.testing.assert_array_equal(np.asarray(out.hidden_BxTxD)[valid], np.asarray(dense)[valid])


@pytest.mark.parametrize("kv_mode, first", [("evict", 0), ("evict", 2), ("evict", 3), ("project", 4)])
def test_masked_blocks_against_a_loop_over_kept_tokens(kv_mode, first):
  """The definition, token by token: kept tokens run through the block, alone (evict) or seeing all keys (project)."""
  c = tiny.config()
  p = tiny.params(c)
  tokens, context, length = tiny.batch(c, [8], [8], 8)
  schedule = jnp.array([0.0, 0.5, 0.25, 0.5])
  routing = RoutingConfig(kv_mode, evict_from=first if kv_mode == "evict" else 0)
  out = tiny.forward(c, routing, p, routers.STATIC, tokens, context, length, schedule)
  block = jax.jit(decoder.Block(c).apply)
  x = decoder.embed(c, p, tokens)
  sin, cos = decoder.angles(c, jnp.arange(8)[None])
  for i, slots in enumerate([8, 4, 6, 4]):
    kept = np.array([0] + list(range(8 - slots + 1, 8)))
    weights = {"params": jax.tree.map(lambda a: a[i], p["blocks"])}
    if i >= first:
      y = block(weights, x[:, kept], sin[:, kept], cos[:, kept], jnp.tril(jnp.ones((1, slots, slots), bool)))
    else:
      y = block(weights, x, sin, cos, jnp.tril(jnp.ones((1, 8, 8), bool)))[:, kept]
    x = x.at[:, kept].set(y)
    np.testing.assert_array_equal(np.flatnonzero(out.keep_LxBxT[i, 0]), kept)
  np.testing.assert_allclose(out.hidden_BxTxD, x, atol=1e-5)


@pytest.fixture(scope="module")
def dense_prefixes():
  """A model, a batch, and what enters each block of the dense execution."""
  c = tiny.config()
  p, batch = tiny.params(c), tiny.batch(c, [9, 5], [12, 9], 12)
  entries, last = masked.dense_entries(c, RoutingConfig(), p, *batch)
  return c, p, batch, entries, last


def test_what_enters_each_block_is_that_of_the_dense_execution(dense_prefixes):
  c, p, batch, entries, last = dense_prefixes
  some, same = masked.dense_entries(c, RoutingConfig(), p, *batch, (0, 2))
  np.testing.assert_allclose(same, last, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[2], atol=1e-5), some[1], entries)
  np.testing.assert_allclose(last, decoder.forward(c, p, batch[0], batch[2]), atol=1e-5)


@pytest.mark.parametrize("kind, one_pass, changes", [
    ("global", -1, {}), ("per_block", -1, {}), ("global", 2, {}), ("per_block", 1, {}),
    ("global", 2, dict(kv_mode="evict", evict_from=3)), ("global", -1, dict(kv_mode="evict", evict_from=2)),
    ("no scores", -1, dict(decode_sparsity=0.4)), ("no scores", 2, dict(decode_sparsity=0.3)),
])
def test_starting_after_a_dense_prefix_is_exact(kind, one_pass, changes, dense_prefixes):
  c, p, batch, entries, _ = dense_prefixes
  own = dict(factors=("sparsity", "position"), hidden_states=True) if kind == "no scores" else dict(kind=kind)
  routing, router = RoutingConfig(one_pass_block=one_pass, **changes), dynamic(c, **own)
  schedule = jnp.array([0.0, 0.0, 0.5, 0.4])
  full = tiny.forward(c, routing, p, router, *batch, schedule)
  starts = {masked.late_start(routing, router, first) for first in (1, 2)}
  assert starts == {1, 2 if one_pass != 1 else 1}  # the block that decides for those after it must be run
  for start in starts:
    entry = jax.tree.map(lambda a: a[start], entries)
    out = tiny.forward(c, routing, p, router, *batch, schedule, start=start, entry=entry)
    np.testing.assert_array_equal(out.keep_LxBxT, full.keep_LxBxT)
    np.testing.assert_allclose(out.hidden_BxTxD[full.keep_LxBxT[0]], full.hidden_BxTxD[full.keep_LxBxT[0]], atol=1e-5)


@pytest.mark.parametrize("routing, kind, expected", [
    ({}, "global", 3), ({}, "per_block", 3), ({}, "recurrent", 0), (dict(decode_sparsity=0.5), "global", 0),
    (dict(decode_sparsity=0.5), "no scores", 3),
    (dict(one_pass_block=2), "global", 2), (dict(one_pass_block=3), "global", 3), (dict(one_pass_block=0), "global", 0),
])
def test_where_a_pass_can_start(routing, kind, expected):
  config = RouterConfig(factors=("sparsity", "position")) if kind == "no scores" else RouterConfig(kind)
  router = routers.Router("dynamic", config, None)
  assert masked.late_start(RoutingConfig(**routing), router, 3) == expected
  assert masked.late_start(RoutingConfig(**routing), routers.Router("given"), 3) == 0


def test_static_uniform_evict_is_truncation_of_the_oldest_context():
  c = tiny.config()
  p = tiny.params(c)
  tokens, context, length = tiny.batch(c, [8], [12], 12)
  out = tiny.forward(c, RoutingConfig("evict"), p, routers.STATIC, tokens, context, length, jnp.full(4, 0.5))
  kept = np.array([0, 5, 6, 7, 8, 9, 10, 11])
  sin, cos = decoder.angles(c, jnp.asarray(kept)[None])
  block, x = jax.jit(decoder.Block(c).apply), decoder.embed(c, p, tokens[:, kept])
  for i in range(4):
    weights = {"params": jax.tree.map(lambda a: a[i], p["blocks"])}
    x = block(weights, x, sin, cos, jnp.tril(jnp.ones((1, 8, 8), bool)))
  np.testing.assert_allclose(out.hidden_BxTxD[:, kept], x, atol=1e-5)


def test_sink_and_last_context_token_are_always_computed():
  c = tiny.config()
  tokens, context, length = tiny.batch(c, [9, 6, 1], [12, 6, 5], 12)
  routing = RoutingConfig("evict", decode_sparsity=0.9)
  for router in (routers.Router("random", None, jax.random.key(3)), dynamic(c)):
    out = tiny.forward(c, routing, tiny.params(c), router, tokens, context, length, jnp.full(4, 0.9))
    keep = np.asarray(out.keep_LxBxT)
    assert keep[:, :, 0].all()
    assert all(keep[:, b, m - 1].all() for b, m in enumerate(context))
    in_context = np.arange(12)[None] < context[:, None]
    np.testing.assert_array_equal((keep & in_context).sum(-1), np.broadcast_to([2, 2, 1], (4, 3)))


@pytest.mark.parametrize("kv_mode, kind, hidden", [
    ("evict", "global", False), ("project", "global", False), ("project", "per_block", False),
    ("evict", "recurrent", True),
])
def test_padding_and_neighbours_change_nothing(kv_mode, kind, hidden):
  c = tiny.config()
  p = tiny.params(c)
  router = dynamic(c, kind=kind, hidden_states=hidden)
  schedule = jnp.array([0.0, 0.4, 0.6, 0.3])
  run = lambda tokens, context, length: tiny.forward(
      c, RoutingConfig(kv_mode, decode_sparsity=0.3), p, router, tokens, context, length, schedule
  )
  tokens, context, length = tiny.batch(c, [9, 5, 7], [11, 9, 7], 16)
  together = run(tokens, context, length)
  for b in range(3):
    n = int(length[b])
    alone = run(tokens[b : b + 1, :n], context[b : b + 1], length[b : b + 1])
    np.testing.assert_array_equal(alone.keep_LxBxT[:, 0], together.keep_LxBxT[:, b, :n])
    np.testing.assert_allclose(alone.hidden_BxTxD[0], together.hidden_BxTxD[b, :n], atol=1e-5)


@pytest.mark.parametrize("kv_mode, kind, selection", [
    ("evict", "global", "topk"), ("project", "global", "argmax"), ("evict", "per_block", "argmax"),
    ("project", "per_block", "topk"), ("evict", "recurrent", "topk"), ("project", "recurrent", "argmax"),
])
def test_no_gate_sees_the_future(kv_mode, kind, selection):
  """Replacing every later token leaves the gates of a continuation token as they were; replacing
  the continuation leaves the gates of the context."""
  c = tiny.config()
  p = tiny.params(c)
  router = dynamic(c, kind=kind, hidden_states=True)
  schedule = jnp.array([0.3, 0.5, 0.4, 0.5])
  run = jax.jit(lambda tokens: tiny.forward(
      c, RoutingConfig(kv_mode, selection, decode_sparsity=0.4), p, router, tokens, jnp.array([6]), jnp.array([12]),
      schedule,
  ))
  tokens, _, _ = tiny.batch(c, [6], [12], 12)
  base = run(tokens)
  assert not np.asarray(base.keep_LxBxT[:, 0, 6:]).all()  # some continuation token does skip
  for known in (6, 7, 9, 11):
    changed = tokens.copy()
    changed[:, known:] = (changed[:, known:] + 17) % c.vocab_size
    out = run(changed)
    np.testing.assert_array_equal(out.keep_LxBxT[..., :known], base.keep_LxBxT[..., :known])
    np.testing.assert_array_equal(out.margin_LxBxT[..., :known], base.margin_LxBxT[..., :known])


def test_continuation_tokens_skip_no_block_of_which_nothing_is_asked():
  c = tiny.config()
  router = dynamic(c)
  skips = jax.tree.map(jnp.zeros_like, router.params)
  skips["out"]["bias"] = jnp.array([5.0, -5.0])
  tokens, context, length = tiny.batch(c, [4], [9], 9)
  keep = tiny.forward(
      c, RoutingConfig(decode_sparsity=0.3), tiny.params(c), routers.Router("dynamic", router.config, skips), tokens,
      context, length, jnp.array([0.0, 0.5, 0.0, 0.5]),
  ).keep_LxBxT[:, 0, 4:]
  np.testing.assert_array_equal(keep.all(axis=1), [True, False, True, False])
  np.testing.assert_array_equal(keep.any(axis=1), [True, False, True, False])


def test_margins_have_no_gradient_from_later_embeddings():
  """Through the hidden states; scores and ranks carry no gradient, they are covered by value just above."""
  c = tiny.config()
  p = tiny.params(c)
  router = dynamic(c, hidden_states=True)
  tokens = np.arange(1, 11, dtype=np.int32)[None]  # distinct tokens: an embedding row is a position

  def margins(embedding):
    weights = {**p, "embed": {**p["embed"], "embedding": embedding}}
    return tiny.forward(
        c, RoutingConfig("evict", decode_sparsity=0.4), weights, router, tokens, jnp.array([5]), jnp.array([10]),
        jnp.full(4, 0.4),
    ).margin_LxBxT[:, 0]

  jacobian = np.abs(jax.jacrev(margins)(p["embed"]["embedding"])).sum(-1)[..., 1:11]  # (L, T, source)
  for t in range(10):
    last_known = max(t, 4)
    assert (jacobian[:, t, last_known + 1 :] == 0).all()
  assert (jacobian[1:, 9, :9].max(axis=-1) > 0).all()  # and the test can see dependence where it exists


@pytest.mark.parametrize("kv_mode", ["evict", "project"])
def test_straight_through_changes_no_value_and_reaches_the_router(kv_mode):
  c = tiny.config()
  p = tiny.params(c)
  router = dynamic(c)
  tokens, context, length = tiny.batch(c, [9, 7], [12, 12], 12)
  run = lambda router_params, st: tiny.forward(
      c, RoutingConfig(kv_mode), p, routers.Router("dynamic", router.config, router_params), tokens, context, length,
      jnp.array([0.0, 0.5, 0.5, 0.3]), straight_through=st,
  ).hidden_BxTxD
  np.testing.assert_allclose(run(router.params, True), run(router.params, False), atol=1e-5)
  grads = jax.grad(lambda r: jnp.sum(jnp.square(run(r, True)[:, -3:])))(router.params)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  assert np.abs(grads["out"]["kernel"]).max() > 0


def test_no_gradient_passes_the_gates_of_recent_tokens():
  """A router whose margins are 0 for the last tokens and saturated before them: all of its gradient is of those."""
  c, at = tiny.config(), 11.5 / 15
  p = tiny.params(c)
  tokens, context, length = tiny.batch(c, [16], [20], 20)
  step = {"kernel": jnp.full((1, 2), 3e3), "bias": jnp.array([-3e3 * at, -3e3 * at - 1])}  # silus 1 apart behind `at`
  out = {"kernel": jnp.array([[0.0, -100.0], [0.0, 100.0]]), "bias": jnp.array([0.0, 100.0])}

  def gradient(recent):
    def total(bias):
      params = {"hidden": step, "out": out | {"bias": bias}}
      router = routers.Router("dynamic", RouterConfig(factors=("position",), hidden_size=2), params)
      routing = RoutingConfig(recent_tokens=recent)
      return jnp.sum(tiny.forward(
          c, routing, p, router, tokens, context, length, jnp.array([0.0, 0.5, 0.5, 0.0]), straight_through=True
      ).hidden_BxTxD)

    return np.abs(jax.grad(total)(out["bias"])).max()

  assert gradient(0) > 0.1 and gradient(4) == 0


@pytest.mark.parametrize("through", [True, False])
def test_gradients_pass_through_what_routers_read_or_not(through):
  c = tiny.config()
  p, router = tiny.params(c), dynamic(c, hidden_states=True, kind="per_block")
  tokens, context, length = np.arange(1, 11, dtype=np.int32)[None], jnp.array([8]), jnp.array([10])

  def margins(params):
    return masked.forward(
        c, RoutingConfig(), p, router._replace(params=params), tokens, context, length, jnp.full(4, 0.4),
        straight_through=True, input_gradient=through,
    ).margin_LxBxT.sum(axis=(1, 2))

  jacobian = jax.jit(jax.jacrev(margins))(router.params)
  kernel = np.abs(jacobian["out"]["kernel"]).sum(axis=(2, 3))  # (block, router of block)
  assert (np.diag(kernel) > 0).all() and (np.triu(kernel, 1) == 0).all()
  assert (np.tril(kernel, -1).any()) == through


def test_evict_gradient_knows_what_a_removed_key_was_worth():
  """At a closed gate the derivative equals the finite difference of opening it a little."""
  c = tiny.config(num_blocks=1)
  p = tiny.params(c)
  tokens, context, length = tiny.batch(c, [6], [8], 8)

  def loss(g):
    gate = jnp.ones((1, 1, 8)).at[0, 0, 3].set(g)
    out = tiny.forward(
        c, RoutingConfig("evict"), p, routers.Router("given", None, gate), tokens, context, length, jnp.zeros(1)
    )
    return jnp.sum(jnp.sin(out.hidden_BxTxD[0, 6:]))

  step = 1e-2
  difference = (loss(step) - loss(0.0)) / step
  assert abs(difference) > 1e-3
  np.testing.assert_allclose(jax.grad(loss)(0.0), difference, rtol=0.1)


def test_continuation_tokens_are_asked_for_their_own_sparsity():
  schedule = jnp.array([0.0, 0.2, 0.6, 0.8])
  np.testing.assert_allclose(decode_schedule(schedule, 0.2), [0, 0.1, 0.3, 0.4], atol=1e-6)
  np.testing.assert_allclose(decode_schedule(schedule, 0.8), [0, 0.4, 0.99, 0.99], atol=1e-6)
  np.testing.assert_array_equal(decode_schedule(jnp.zeros(3), 0.5), 0)
  c = tiny.config()
  tokens, context, length = tiny.batch(c, [4], [40], 40)
  share = lambda asked: 1 - np.mean(tiny.forward(
      c, RoutingConfig(decode_sparsity=asked), tiny.params(c), routers.Router("random", None, jax.random.key(0)),
      tokens, context, length, jnp.full(4, 0.5),
  ).keep_LxBxT[:, 0, 4:])
  assert share(0.0) == 0 and 0.1 < share(0.2) < 0.3 and 0.5 < share(0.7) < 0.85


@pytest.mark.parametrize("kind", KINDS)
def test_router_size_and_inputs(kind):
  count = lambda **changes: sum(p.size for p in jax.tree.leaves(dynamic(tiny.config(), kind=kind, **changes).params))
  expected = {"global": 450, "per_block": 4 * 450, "recurrent": 450 + 64 * 64}[kind]
  assert count() == expected
  per = {"global": 64, "per_block": 256, "recurrent": 64}[kind]
  assert count() - count(factors=("score",)) == 3 * per
  assert count(hidden_states=True) - count() == 32 * per


def test_wrong_settings_are_named():
  with pytest.raises(UserError, match="router.factors"):
    RouterConfig(factors=("position", "colour"))
  with pytest.raises(UserError, match="no input"):
    RouterConfig(factors=())
  with pytest.raises(UserError, match="kv_mode"):
    RoutingConfig(kv_mode="drop")
  with pytest.raises(UserError, match="evict_from=-1 must be a block"):
    RoutingConfig("evict", evict_from=-1)
  with pytest.raises(UserError, match="evict_from=2 needs routing.kv_mode=evict; set it to 0"):
    RoutingConfig("project", evict_from=2)
  for name in ("one_pass_block", "evict_from"):
    routing = RoutingConfig("evict", **{name: 4})
    routing.check_blocks(5)
    with pytest.raises(UserError, match=f"{name}=4 does not exist: the model has blocks 0 to 3"):
      routing.check_blocks(4)
  with pytest.raises(UserError, match="router.kind"):
    dataclasses.replace(RouterConfig(), kind="local")
