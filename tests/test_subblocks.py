"""Sub-blocks: fast prefill, decoding and scores against the masked reference; removal, and routing by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftp_jax.evaluation.baselines import subblock_inference, subblocks
from ftp_jax.inference import programs
from ftp_jax.inference.programs import Weights
from ftp_jax.models import decoder
from ftp_jax.routing.cache import empty_recent
from tests import tiny

CONTEXT, NEW, ROOM = 12, 4, 6
reference = jax.jit(subblocks.routed_forward, static_argnames=("config", "dtype"))
extend = jax.jit(subblock_inference.extend, static_argnums=(0, 1))
unembed = jax.jit(decoder.unembed, static_argnums=0)
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)

GQA = tiny.config()
WINDOW = tiny.config(num_blocks=5, sliding_window=3, num_kv_heads=1, tie_embeddings=False)
QWEN = tiny.config(qkv_bias=True, qk_norm=True)
NONE = ((False, False),) * 4
CASES = {  # model, removed, schedule
    "removed": (GQA, ((False, True), (True, False), (True, True), (False, False)), None),
    "late attention removed": (
        WINDOW, ((True, False), (False, False), (True, False), (True, True), (True, False)), None,
    ),
    "routed, many buckets": (QWEN, NONE, [(0.9, 0.1), (0.2, 0.8), (0.3, 0.7), (0.6, 0.4)]),
    "routed and removed": (
        WINDOW, ((False, False), (False, True), (True, False), (False, False), (True, False)),
        [(0.5, 0.25), (0.75, 0), (0, 0.5), (0.5, 0.5), (0, 0)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_fast_execution_equals_the_masked_one(name):
  config, removed, schedule = CASES[name]
  params = tiny.params(config)
  router = None
  if schedule:
    kernel = jax.random.normal(jax.random.key(5), (config.num_blocks, 2, config.hidden_size))
    router = {"kernel": kernel, "bias": jnp.zeros((config.num_blocks, 2))}
  schedule = jnp.asarray(schedule or np.zeros((config.num_blocks, 2)), jnp.float32)
  context = np.array([12, 9, 4], np.int32)
  length = context + NEW
  tokens, _, _ = tiny.batch(config, context, length, CONTEXT + NEW)
  hidden, keep = reference(config, np.array(removed), params, router, tokens, context, length, schedule)
  expected = np.asarray(unembed(config, params, hidden))

  spec, weights = subblock_inference.spec(config, np.array(removed)), Weights(params, router, schedule)
  plan = spec.plan(weights, CONTEXT)
  rows = np.where(np.arange(CONTEXT)[None] < context[:, None], tokens[:, :CONTEXT], 0)
  prefilled = programs.prefill(spec, plan, weights, rows, context)
  at = lambda offset: np.take_along_axis(expected, (context - 1 + offset)[:, None, None], axis=1)[:, 0]
  assert_close(prefilled.logits_BxV, at(0))

  final = max(i for i, (gone, _) in enumerate(removed) if not gone)
  inside = np.arange(CONTEXT)[None] < context[:, None]
  found, wanted = np.asarray(prefilled.cache.keep_Lx2xBxT), np.asarray(keep)[..., :CONTEXT] & inside
  np.testing.assert_array_equal(found[:final], wanted[:final])
  last = np.arange(CONTEXT)[None] == context[:, None] - 1
  np.testing.assert_array_equal(found[final:], wanted[final:] & last)  # nothing else is used there
  assert prefilled.cache.k_AxBxGxNxT.shape[0] == sum(not gone for gone, _ in removed)

  continuation = np.take_along_axis(tokens, context[:, None] + np.arange(NEW)[None], axis=1)
  recent = empty_recent(config, 3, ROOM, jnp.float32)
  run = lambda recent, some: extend(config, removed, params, prefilled.cache, recent, some)
  together = unembed(config, params, run(recent, continuation).hidden_BxCxD)
  for j in range(NEW):
    out = run(recent, continuation[:, j : j + 1])
    recent = out.recent
    assert_close(unembed(config, params, out.hidden_BxCxD[:, 0]), at(j + 1))
    assert_close(together[:, j], at(j + 1))
  assert int(recent.count) == NEW


def test_nothing_removed_nothing_asked_is_the_dense_model():
  params, (tokens, context, length) = tiny.params(GQA), tiny.batch(GQA, [6, 3], [9, 9], 9)
  hidden, keep = reference(GQA, np.zeros((4, 2), bool), params, None, tokens, context, length, jnp.zeros((4, 2)))
  assert_close(hidden, decoder.forward(GQA, params, tokens, length))
  assert np.asarray(keep).all()


def test_plans_hold_the_buckets_of_each_kind_of_sub_block():
  spec = subblock_inference.spec(GQA, np.zeros((4, 2), bool))
  schedule = jnp.array([(0, 0.5), (0.5, 0.25), (0.25, 0), (0.5, 0.5)], jnp.float32)
  plan = spec.plan(Weights(None, None, schedule), 12)
  assert plan.attention.slots == (12, 6, 9, 6) and plan.mlp.slots == (6, 9, 12, 6)


def test_shares_are_those_of_the_parameters():
  share = subblocks.shares(GQA)
  size = lambda names: sum(np.size(tiny.params(GQA)["blocks"][name]["kernel"]) for name in names)
  attention, mlp = size(("q", "k", "v", "o")), size(("gate", "up", "down"))
  assert_close(share, [attention / (attention + mlp), mlp / (attention + mlp)])


def test_gates_of_a_context_depend_on_its_own_tokens_when_each_decides_alone():
  params, (tokens, _, length) = tiny.params(GQA), tiny.batch(GQA, [1], [9], 9)
  router = {"kernel": jax.random.normal(jax.random.key(0), (4, 2, 32)), "bias": jnp.zeros((4, 2))}
  forward = functools.partial(subblocks.causal_forward, GQA, np.zeros((4, 2), bool), params, router)
  hidden, keep = forward(tokens, length, jnp.zeros((4, 2)))
  changed = tokens.copy()
  changed[0, 6] = (tokens[0, 6] + 1) % 61
  other, other_keep = forward(changed, length, jnp.zeros((4, 2)))
  np.testing.assert_array_equal(keep[..., :6], other_keep[..., :6])
  np.testing.assert_array_equal(hidden[:, :6], other[:, :6])
  keep = np.asarray(keep)
  assert keep[..., 0].all() and 0.2 < keep[..., 1:].mean() < 0.8
  assert np.abs(np.asarray(hidden - other)[:, 6:]).max() > 1e-3
