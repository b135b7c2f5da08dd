"""Router training: losses by hand, gradients, Fisher scores and guide, and a loop that resumes bit for bit."""

import dataclasses
import errno
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ftp_jax import cli, distributed, sharding
from ftp_jax.data.prompts import Prompts, buckets_of, indices_at, take, turns
from ftp_jax.errors import UserError
from ftp_jax.models import decoder, scoring
from ftp_jax.routing import factors, masked, routers
from ftp_jax.routing import stand_in as maps_lib
from ftp_jax.routing.config import FACTORS, RouterConfig, RoutingConfig
from ftp_jax.training import checkpoint, guide, loop, losses, step
from tests import tiny
from tests.test_bucketed import random_maps

CONFIG = tiny.config()
frozen_params = functools.cache(tiny.params)
SCHEDULE = np.array([0, 0, 0.5, 0.25], np.float32)
ROUTER = RouterConfig(hidden_size=8)
SETTINGS = step.TrainSettings(
    steps=24, learning_rate=0.1, warmup=2, clip=1.0, distill="kl", distill_weight=1.0, sparsity_weight=1.0,
    sparsity_two_sided=False, guide="static", guide_weight=1.0, guide_decay="cosine",
)
SPEC = step.StepSpec(CONFIG, RoutingConfig(), ROUTER, SETTINGS, num_scored=4, start=2)


def prompts(count, seed=0):
  return Prompts(*tiny.batch(CONFIG, [12, 9] * (count // 2), [16, 13] * (count // 2), 16, seed))


def long_prompts(count, seed):
  return Prompts(*tiny.batch(CONFIG, [12] * count, [16] * count, 16, seed))


@functools.cache
def new_router(config=ROUTER, seed=0):
  return routers.init_router(config, jax.random.key(seed), CONFIG.num_blocks, CONFIG.hidden_size)


def stand_in(router):
  """In place of a validation KL: lowest in the middle of the training below."""
  return abs(float(sum(np.square(np.asarray(leaf)).sum() for leaf in jax.tree.leaves(router))) - 17)


def train(directory, **changes):
  """A training of 24 steps with checkpoints at 0, 6, .., 24 and validations at 0, 8, 16, 24."""
  arguments = dict(
      spec=SPEC, params=frozen_params(CONFIG), router_params=new_router(), prompts=prompts(10), fisher_LxNxT=None,
      schedule_L=SCHEDULE, batch_size=4, seed=3, validate=stand_in, validate_every=8, checkpoint_every=6,
      progress=False,
  )
  return loop.train_router(directory=str(directory), **{**arguments, **changes})


def lines(directory):
  return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def same(tree, other):
  return jax.tree.all(jax.tree.map(np.array_equal, tree, other))


def saved_steps(directory):
  return sorted(int(name) for name in os.listdir(directory / "checkpoints") if name.isdigit())


# --- losses ----------------------------------------------------------------------------------


def test_sparsity_loss_by_hand():
  asked, achieved = jnp.array([0.5, 0.2, 0.0]), jnp.array([0.25, 0.3, 0.1])
  np.testing.assert_allclose(losses.sparsity_loss(asked, achieved, False), 0.25, rtol=1e-6)
  np.testing.assert_allclose(losses.sparsity_loss(asked, achieved, True), 0.45, rtol=1e-6)


def test_skipped_share_counts_the_tokens_that_are_named():
  gate = jnp.array([[[1.0, 0.0, 0.5, 0.0], [1.0, 1.0, 1.0, 0.0]]])
  in_context = jnp.array([[True, True, True, False], [True, False, False, False]])
  np.testing.assert_allclose(losses.skipped_share(gate, in_context), [1.5 / 4])


def test_guide_loss_by_hand_over_guided_tokens_of_blocks_that_skip():
  margin = jnp.array([[[9.0, -9.0, 9.0]], [[0.0, np.log(3.0), 9.0]]])
  target = jnp.array([[[0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0]]])
  in_context = jnp.array([[True, True, False]])
  loss = losses.guide_loss(margin, target, jnp.array([0.0, 0.5]), in_context)
  np.testing.assert_allclose(loss, (np.log(2) + np.log(4)) / 2, rtol=1e-6)
  assert losses.guide_loss(margin, target, jnp.zeros(2), in_context) == 0
  stake = jnp.zeros(target.shape).at[1, 0, 1].set(3.0)
  np.testing.assert_allclose(
      losses.guide_loss(margin, target, jnp.array([0.0, 0.5]), in_context, stake),
      jnp.logaddexp(0.0, margin[1, 0, 1]) - margin[1, 0, 1] * target[1, 0, 1], rtol=1e-6,
  )


def test_distillation_losses_by_hand():
  teacher = jnp.log(jnp.array([[[0.5, 0.5], [0.9, 0.1]]]))
  student = jnp.log(jnp.array([[[0.25, 0.75], [0.1, 0.9]]]))
  first = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
  np.testing.assert_allclose(losses.distill_kl(teacher, student, jnp.array([[1.0, 0.0]])), first, rtol=1e-5)
  np.testing.assert_allclose(
      losses.distill_kl(teacher, student, jnp.ones((1, 2))), (first + 0.8 * np.log(9)) / 2, rtol=1e-5
  )
  assert losses.distill_kl(teacher, teacher, jnp.ones((1, 2))) == 0
  states = jnp.array([[[1.0, 2.0], [0.0, 0.0]]])
  np.testing.assert_allclose(losses.distill_mse(states, jnp.zeros((1, 2, 2)), jnp.array([[1.0, 0.0]])), 2.5)


def test_targets_fill_the_capacity_with_forced_tokens_then_the_highest_scores():
  score = jnp.array([[[0.0, 5.0, 3.0, 5.0, 0.0, 9.0], [0.0, 1.0, 0.0, 9.0, 0.5, 0.0]]])
  target = lambda s, m=1, recent=0: losses.targets(
      score, jnp.array([s]), jnp.array([5, 3]), RoutingConfig(bucket_multiple=m, recent_tokens=recent)
  )[0].tolist()
  after = [1], [1, 1, 0]  # those behind the context: whether the score is above 0
  rows = lambda first, second: [first + after[0], second + after[1]]
  assert target(0.4) == rows([1, 0, 0, 1, 1], [1, 0, 1])  # 3 slots: forced 0 and 4, tie 1 ~ 3: the later
  assert target(0.2) == rows([1, 1, 0, 1, 1], [1, 1, 1])
  assert target(0.9) == rows([1, 0, 0, 0, 1], [1, 0, 1])
  assert target(0.4, 4) == rows([1, 1, 0, 1, 1], [1, 1, 1])
  assert target(0.0) == rows([1, 1, 1, 1, 1], [1, 1, 1])
  assert target(0.4, recent=1) == target(0.4)
  score = jnp.tile(score, 2).at[0, 0, 6:].set(jnp.arange(6.0)[::-1])
  recent = losses.targets(score, jnp.array([0.6]), jnp.array([12, 3]), RoutingConfig(recent_tokens=3))[0]
  assert recent[0].tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1]  # 5 slots: forced 0 and 11, recent 10 and 9, then 5
  assert recent[1].tolist()[:3] == [1, 0, 1]  # a short context has none
  few = losses.targets(score, jnp.array([0.8]), jnp.array([12, 3]), RoutingConfig(recent_tokens=3))[0, 0]
  assert np.flatnonzero(few).tolist() == [0, 10, 11]  # not all recent ones have slots


def test_the_guide_knows_of_new_tokens_where_these_are_trained():
  guided = lambda **routing: losses.guided_tokens(
      jnp.array([3, 1]), jnp.array([6, 3]), 7, RoutingConfig(**routing)
  ).astype(int).tolist()
  context = [[1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
  assert guided() == guided(decode_sparsity=0.2, decode_rule="quantile") == context
  assert guided(recent_tokens=1)[0] == [1, 1, 1, 0, 0, 0, 0]  # the context is too short
  many = losses.guided_tokens(jnp.array([8]), jnp.array([9]), 9, RoutingConfig(recent_tokens=2))
  assert many.astype(int).tolist() == [[1, 1, 1, 1, 1, 1, 0, 0, 0]]
  assert guided(decode_sparsity=0.2) == [[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]]  # but for the last, unread


def test_guide_weight_decays_to_zero():
  weight = lambda decay, k: float(
      step.guide_weight(dataclasses.replace(SETTINGS, steps=8, guide_weight=2.0, guide_decay=decay), k)
  )
  assert [weight("none", k) for k in (0, 4, 8)] == [2, 2, 2]
  np.testing.assert_allclose([weight("linear", k) for k in (0, 4, 8)], [2, 1, 0])
  np.testing.assert_allclose([weight("cosine", k) for k in (0, 2, 4, 8)], [2, 1 + 0.5**0.5, 1, 0], atol=1e-6)


@pytest.mark.parametrize(
    "change, name",
    [(dict(distill="l1"), "distill"), (dict(guide="none"), "guide"), (dict(guide_decay="exp"), "guide_decay"),
     (dict(steps=0), "steps"), (dict(learning_rate=0.0), "learning_rate")],
)
def test_wrong_settings_are_refused(change, name):
  with pytest.raises(UserError, match=f"train.{name}"):
    dataclasses.replace(SETTINGS, **change)


# --- the step and what training reaches --------------------------------------------------------


GUIDED = dataclasses.replace(
    SPEC, router=RouterConfig(kind="per_block", hidden_size=8), routing=RoutingConfig("evict"),
    train=dataclasses.replace(SETTINGS, guide="fisher", guide_decay="none", distill_weight=0.0, learning_rate=0.1),
)
# Early tokens are the precious ones, against the static order.
EARLY = np.broadcast_to(np.linspace(1.0, 0.0, 16, dtype=np.float32), (4, 10, 16))


def test_training_reduces_the_guide_loss_towards_fisher_targets(tmp_path):
  router = new_router(GUIDED.router)
  result = train(tmp_path, spec=GUIDED, router_params=router, fisher_LxNxT=EARLY, validate=lambda _: 0.0)
  guide_losses = [line["guide"] for line in lines(tmp_path) if "loss" in line]
  assert guide_losses[-1] < 0.65 * guide_losses[0]
  assert {line["guide_weight"] for line in lines(tmp_path) if "loss" in line} == {1.0}
  assert (result.step, result.validation) == (0, 0.0)  # equal figures: the earlier router
  assert same(result.router, router)


def test_starting_after_the_dense_prefix_gives_the_same_losses_and_router_gradients():
  router = new_router(GUIDED.router)
  batch = step.Batch(*prompts(4), EARLY[:, :4])
  after = {}
  for start in (0, 2):
    spec = dataclasses.replace(GUIDED, start=start)
    state = step.init_state(spec.train, jax.tree.map(jnp.copy, router))
    after[start] = step.jitted_step(spec, frozen_params(CONFIG), state, batch, SCHEDULE)
  for name in ("loss", "distill", "sparsity", "guide", "achieved", "grad_norm"):
    np.testing.assert_allclose(after[2][1][name], after[0][1][name], rtol=1e-4, atol=1e-7)
  assert after[0][1]["grad_norm"] > 0
  moments = [after[start][0].optimizer[1][0].mu for start in (0, 2)]  # 0.1 x the gradients
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-7), *moments)


def test_without_the_gradient_through_inputs_every_router_still_learns_from_the_output():
  settings = dataclasses.replace(SETTINGS, sparsity_weight=0.0, guide_weight=0.0)
  config = RouterConfig("per_block", hidden_states=True, hidden_size=8)
  schedule, grads = np.array([0.25, 0, 0.5, 0], np.float32), []  # in the last block nothing that is scored can skip
  for through in (True, False):
    spec = step.StepSpec(
        CONFIG, RoutingConfig(), config, dataclasses.replace(settings, input_gradient=through), num_scored=4
    )
    loss = functools.partial(step.loss_fn, spec)
    inputs = frozen_params(CONFIG), new_router(config), step.Batch(*prompts(4), None), schedule, 0
    grads.append(jax.jit(jax.grad(loss, argnums=1, has_aux=True))(*inputs)[0]["out"]["kernel"])
  size = jnp.abs(jnp.stack(grads)).max(axis=(2, 3))
  assert (size[:, schedule > 0] > 0).all() and (size[:, schedule == 0] == 0).all()
  change = jnp.abs(grads[0] - grads[1]).max(axis=(1, 2))
  assert change[0] > 1e-3 * size[0, 0] and change[2] <= 1e-5 * size[0, 2]  # after block 2 no router decides


def test_new_tokens_learn_what_is_asked_of_them_where_they_are_trained():
  """By the guide and by the sparsity loss; where they are all computed they say nothing to either."""
  config, rows = RouterConfig("per_block", ("sparsity",), hidden_states=True, hidden_size=8), prompts(4)
  scores, t = np.array(EARLY[:, :4]), np.arange(16)[None]
  after = (t >= rows.context[:, None]) & (t < rows.length[:, None] - 1)
  settings = dataclasses.replace(GUIDED.train, distill_weight=0.0, sparsity_weight=0.0)

  @functools.partial(jax.jit, static_argnums=0)
  def differentiate(spec, params, router, batch):
    return jax.value_and_grad(step.loss_fn, argnums=2, has_aux=True)(spec, params, router, batch, SCHEDULE, 0)

  def figures(routing, new_token_score=0.0, **changes):
    spec = dataclasses.replace(GUIDED, router=config, routing=routing, train=dataclasses.replace(settings, **changes))
    batch = step.Batch(*rows, np.where(after[None], new_token_score, scores).astype(np.float32))
    (_, parts), gradient = differentiate(spec, frozen_params(CONFIG), new_router(config), batch)
    return parts, np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])

  strict, trained = RoutingConfig(), RoutingConfig(decode_sparsity=0.15)
  guides = {(r.decode_sparsity, s): float(figures(r, s)[0]["guide"]) for r in (strict, trained) for s in (0.0, 1.0)}
  assert guides[0.0, 0.0] == guides[0.0, 1.0] and abs(guides[0.15, 0.0] - guides[0.15, 1.0]) > 0.01
  only = dict(guide_weight=0.0, sparsity_weight=1.0)
  parts, gradient = figures(trained, **only)
  of_context, of_context_gradient = figures(strict, **only)
  expected = of_context["sparsity"]
  assert 0 < parts["decode_achieved"] < 0.5 and figures(strict)[0]["decode_achieved"] == 0
  quantile = figures(dataclasses.replace(trained, decode_rule="quantile"), **only)[0]
  assert 0 < quantile["decode_achieved"] < 0.5 and quantile["sparsity"] == expected
  router = routers.Router("dynamic", config, new_router(config))
  margin = tiny.forward(CONFIG, trained, frozen_params(CONFIG), router, *rows, SCHEDULE).margin_LxBxT
  soft = np.mean((1 / (1 + np.exp(margin)))[:, after] * (SCHEDULE > 0)[:, None])
  np.testing.assert_allclose(parts["sparsity"] - expected, abs(0.15 - soft), rtol=1e-4)
  assert np.abs(gradient - of_context_gradient).max() > 1e-3


def test_stakes_by_hand():
  scores = jnp.array([[[9.0, 7.0, 1.0, 4.0, 0.0, 8.0], [5.0, 6.0, 2.0, 9.0, 9.0, 9.0]]])
  context = jnp.array([5, 3])
  target = losses.targets(scores, jnp.array([0.4]), context, RoutingConfig())
  assert target[0].tolist() == [[1, 1, 0, 0, 1, 1], [1, 0, 1, 1, 1, 1]]  # of the second row nothing else could skip
  apart = np.array([[0, 3, 3, 0, 0], [0, 0, 0, 0, 0]])  # from the 4 and the 6; the first and the last have no choice
  relative = apart / (6 / 8)  # eight context tokens
  for share in (1.0, 0.25):
    found = np.asarray(losses.stakes(scores, target, context, RoutingConfig(), share)[0])
    expected = 1 - share + share * relative
    np.testing.assert_allclose(found[0, :5], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1, :3], expected[1, :3], rtol=1e-6)
    assert (found[0, 5:] == 1).all() and (found[1, 3:] == 1).all()
    np.testing.assert_allclose(np.concatenate([found[0, :5], found[1, :3]]).mean(), 1, rtol=1e-6)
  recent, twelve = RoutingConfig(recent_tokens=3), jnp.array([12])
  row = jnp.arange(12.0)[None, None, ::-1]
  found = np.asarray(losses.stakes(row, losses.targets(row, jnp.array([0.5]), twelve, recent), twelve, recent, 1.0))
  assert (found[0, 0, [0, 9, 10, 11]] == 0).all() and (np.delete(found[0, 0], [0, 3, 9, 10, 11]) > 0).all()  # cut: 3
  few = row.at[0, 0, 9].set(50.0)  # one of the recent has no slot: it is no measure of the cut
  found = np.asarray(losses.stakes(few, losses.targets(few, jnp.array([0.8]), twelve, recent), twelve, recent, 1.0))
  assert (found[0, 0, [0, 1, 9, 10, 11]] == 0).all() and found[0, 0, 2] > 0
  nothing = losses.stakes(scores, jnp.ones_like(target), context, RoutingConfig(), 0.5)  # none skips, none is at stake
  np.testing.assert_array_equal(nothing, 1.0)


def test_stakes_let_the_few_tokens_that_matter_most_decide():
  """A router that sees two kinds of tokens: of one most are worth keeping, of the other a few are worth far more."""
  rows, rng = prompts(10), np.random.default_rng(0)
  often = rng.random((4, 10, 16)) < 0.6
  hidden = np.zeros((4, 10, 16, CONFIG.hidden_size), np.float16)
  hidden[..., 0] = np.where(often, 1, -1)
  scores = np.where(often, 1.0, np.where(rng.random(often.shape) < 0.2, 50.0, 0.1)).astype(np.float32)
  config = RouterConfig("per_block", (), hidden_states=True, hidden_size=8)
  data = guide.GuideData(rows.context, rows.length, np.zeros((4, 10, 16), np.float32), hidden, scores)
  schedule = np.full(4, 0.4, np.float32)

  def preferred(stakes):
    settings = guide.WarmupSettings(120, 8, 2e-2, stakes)
    router, _ = guide.warm_up(config, RoutingConfig(), settings, new_router(config), data, schedule, seed=0)
    margin = np.asarray(guide.margins(config, router, None, jnp.asarray(hidden, jnp.float32)))
    return margin[often].mean() > margin[~often].mean()

  assert preferred(0.0) and not preferred(1.0)


def test_a_warm_up_teaches_new_tokens_to_skip_and_tells_them_from_the_context():
  rows, rng, routing = prompts(10), np.random.default_rng(0), RoutingConfig(decode_sparsity=0.1)
  hidden = rng.standard_normal((4, 10, 16, CONFIG.hidden_size)).astype(np.float16)
  after = np.arange(16)[None] >= rows.context[:, None]
  scores = np.where(after, hidden[..., 1] > 0, hidden[..., 0]).astype(np.float32)
  config = RouterConfig("per_block", ("sparsity",), hidden_states=True, hidden_size=16)
  schedule = np.full(4, 0.5, np.float32)
  data = guide.GuideData(rows.context, rows.length, np.zeros((4, 10, 16), np.float32), hidden, scores)
  settings = guide.WarmupSettings(steps=300, batch=8, learning_rate=2e-2)
  router, _ = guide.warm_up(config, routing, settings, new_router(config), data, schedule, seed=0)
  asked = jnp.where(after, 0.1, 0.5)[None, :, :, None] * jnp.ones((4, 1, 1, 1))
  margin = np.asarray(guide.margins(config, router, asked, jnp.asarray(hidden, jnp.float32)))
  guided = np.asarray(losses.guided_tokens(*rows[1:], 16, routing)) & after
  assert (np.sign(margin) == np.where(hidden[..., 1] > 0, 1, -1))[:, guided].mean() > 0.95
  target = np.asarray(losses.targets(scores, schedule, rows.context, RoutingConfig()))
  assert ((margin > 0) == target)[:, ~after].mean() > 0.85


def test_a_step_weighs_tokens_by_their_stakes():
  scores = jnp.asarray(np.random.default_rng(0).random((4, 2, 16)), jnp.float32)
  rows = prompts(2)
  batch = step.Batch(*rows, scores)
  settings = dataclasses.replace(SETTINGS, guide="fisher", distill_weight=0.0, sparsity_weight=0.0)
  spec = dataclasses.replace(SPEC, train=settings, start=0)
  weighed = dataclasses.replace(spec, train=dataclasses.replace(settings, guide_stakes=0.5))
  guide_of = lambda spec: jax.jit(step.loss_fn, static_argnums=0)(
      spec, frozen_params(CONFIG), new_router(), batch, jnp.full(4, 0.5), 0
  )[1]["guide"]
  guides = guide_of(spec), guide_of(weighed)
  assert abs(guides[0] - guides[1]) > 1e-3


def test_two_sided_sparsity_loss_brings_achieved_to_asked(tmp_path):
  settings = dataclasses.replace(
      SETTINGS, steps=48, distill="mse", distill_weight=0.0, sparsity_two_sided=True, guide_weight=0.0
  )
  spec = dataclasses.replace(SPEC, routing=RoutingConfig(selection="argmax"), train=settings, start=0)
  initial = new_router()
  router = initial | {"out": initial["out"] | {"bias": jnp.array([2.0, 0.0])}}  # skips whatever is not forced
  train(tmp_path, spec=spec, router_params=router, schedule_L=[0.1, 0.2, 0.4, 0.3], checkpoint_every=48)
  steps = [line for line in lines(tmp_path) if "loss" in line]
  away = [np.abs(np.subtract(line["asked"], line["achieved"])).mean() for line in steps]
  assert away[0] > 0.5 and np.mean(away[-5:]) < 0.15
  assert steps[-1]["sparsity"] < 0.2 * steps[0]["sparsity"]


def test_distillation_alone_reduces_held_out_kl(tmp_path):
  """Half of the vocabulary is so large that a block hardly turns it; the router can learn to skip those tokens."""
  c = dataclasses.replace(CONFIG, tie_embeddings=False)
  params = tiny.params(c)
  table = params["embed"]["embedding"] / params["embed"]["embedding"].std() * 0.3
  loud = jnp.where(jnp.arange(c.vocab_size) % 2 == 0, 30.0, 1.0)[:, None]
  params["embed"] |= {"embedding": table * loud, "lm_head": params["embed"]["lm_head"] * 50}
  router_config = RouterConfig(hidden_size=8, hidden_states=True)
  settings = dataclasses.replace(SETTINGS, steps=50, learning_rate=1e-2, sparsity_weight=0.0, guide_weight=0.0)
  spec = dataclasses.replace(SPEC, model=c, router=router_config, train=settings, start=1)
  schedule = np.array([0, 0.5, 0.5, 0.5], np.float32)
  held = long_prompts(32, seed=99)

  @jax.jit
  def kl(router, params):
    dynamic = routers.Router("dynamic", router_config, router)
    student = masked.forward(c, spec.routing, params, dynamic, *held, schedule).hidden_BxTxD
    source, _, weight = scoring.continuation(*held, 4)
    dense = decoder.forward(c, params, held.tokens, held.length)
    return losses.distill_kl(*(scoring.log_probs(c, params, x, source) for x in (dense, student)), weight)

  initial = new_router(router_config, seed=2)
  train(
      tmp_path, spec=spec, params=params, router_params=initial, prompts=long_prompts(64, seed=1), schedule_L=schedule,
      batch_size=8, validate=lambda router: float(kl(router, params)), validate_every=50, checkpoint_every=50,
  )
  first, last = [line["validation_kl"] for line in lines(tmp_path) if "validation_kl" in line]
  assert last < 0.85 * first


# --- the loop ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """(directory, result) of the training that the tests below interrupt."""
  directory = tmp_path_factory.mktemp("undisturbed")
  return directory, train(directory)


def check_equal(directory, result, undisturbed):
  expected_directory, expected = undisturbed
  assert (directory / "metrics.jsonl").read_bytes() == (expected_directory / "metrics.jsonl").read_bytes()
  assert (result.step, result.validation) == (expected.step, expected.validation)
  assert same(result.router, expected.router)


def test_metrics_are_complete_and_training_reduces_the_guide_loss(undisturbed):
  directory, result = undisturbed
  found = lines(directory)
  steps = [line for line in found if "loss" in line]
  expected = [(k, kind) for k in range(25) for kind in (["validation"] if k % 8 == 0 else []) + ["step"] * (k < 24)]
  assert [(line["step"], "step" if "loss" in line else "validation") for line in found] == expected
  for line in steps:
    assert set(line) == {
        "step", "loss", "distill", "sparsity", "guide", "guide_weight", "grad_norm", "asked", "achieved",
        "decode_achieved",
    }
    np.testing.assert_allclose(
        line["loss"], line["distill"] + line["sparsity"] + line["guide_weight"] * line["guide"], rtol=1e-5
    )
    assert line["asked"] == SCHEDULE.tolist()
    assert line["achieved"][:2] == [0, 0]
    # topk skips 6 of 12 and 4 of 9, then 3 of 12 and 2 of 9 context tokens, whatever the router says.
    assert 4 / 9 <= line["achieved"][2] <= 6 / 12 and 2 / 9 <= line["achieved"][3] <= 3 / 12
    assert line["grad_norm"] > 0 and line["distill"] > 0
  assert np.mean([line["guide"] for line in steps[-6:]]) < 0.7 * steps[0]["guide"]
  validations = {line["step"]: line["validation_kl"] for line in found if "loss" not in line}
  assert result.validation == min(validations.values()) == validations[result.step]
  assert result.step == 16  # neither the first nor the last
  assert stand_in(result.router) == result.validation
  assert saved_steps(directory) == [18, 24]


def test_maps_beside_the_router_are_trained_at_their_own_rate(tmp_path):
  maps = random_maps(CONFIG, 3, np.random.default_rng(0))
  settings = dataclasses.replace(SETTINGS, steps=2, warmup=0, stand_in_learning_rate=SETTINGS.learning_rate / 8)
  spec, params = dataclasses.replace(SPEC, train=settings), maps_lib.attach(frozen_params(CONFIG), maps)
  validate = lambda trained: -float(trained["hidden"]["bias"].std())  # whatever falls
  arguments = dict(spec=spec, params=params, validate_every=2, validate=validate)
  start = maps_lib.join(new_router(), jax.tree.map(np.copy, maps))
  result = train(tmp_path, router_params=start, **arguments)
  moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b), result.router, start)
  router, by = maps_lib.split(moved)
  assert result.step == 2 and same(params["blocks"]["stand_in"], maps)
  # Adam moves a weight by about its rate, at first and at half of it. Nobody reads what leaves the last block of tokens
  # that skip it, and blocks that compute all feel the weight decay alone.
  of_router = max(leaf.max() for leaf in jax.tree.leaves(router))
  for name in ("down", "up"):
    assert (by[name].max((1, 2)) > 1e-5).tolist() == [False, False, True, False]
    assert 0.5 < by[name].max() / (of_router / 8) < 2
  assert same(train(tmp_path, router_params=start, **arguments).router, result.router)
  start["stand_in"]["bias"] += 1
  with pytest.raises(UserError, match="the fingerprint of the initial router was"):
    train(tmp_path, router_params=start, **arguments)


def test_the_best_router_is_kept_and_a_finished_training_is_not_repeated(tmp_path):
  figures, seen = iter([3.0, 1.0, 2.0, 1.0]), []

  def validate(router):
    seen.append(jax.tree.map(np.array, router))
    return next(figures)

  router, params = new_router(), frozen_params(CONFIG)
  before = jax.tree.map(np.array, (router, params))
  result = train(tmp_path, router_params=router, params=params, validate=validate)
  assert (result.step, result.validation) == (8, 1.0)
  assert same(result.router, seen[1]) and not same(seen[1], seen[2])
  assert same((router, params), before)  # neither changed nor donated
  again = train(tmp_path, validate=validate)  # figures are used up: another validation would fail
  assert again.step == 8 and same(again.router, result.router)


def test_a_checkpoint_holds_the_router_and_nothing_of_the_model(undisturbed):
  directory, _ = undisturbed
  with ocp.CheckpointManager(directory / "checkpoints", item_names=("arrays", "facts")) as manager:
    arrays = manager.restore(24, args=ocp.args.Composite(arrays=ocp.args.StandardRestore())).arrays
  size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  assert set(arrays) == {"state", "best_router"}
  assert size(arrays) <= 4 * size(new_router()) + 4  # router, two moments, best router, and counters


def test_a_step_is_dispatched_before_the_metrics_of_the_one_before_are_fetched(tmp_path, monkeypatch):
  real, known = step.jitted_step, []

  def spy(*args):
    known.append(sum("loss" in line for line in lines(tmp_path)))
    return real(*args)

  monkeypatch.setattr(step, "jitted_step", spy)
  train(tmp_path)
  boundaries = {0, 6, 8, 12, 16, 18}
  assert known == [k if k in boundaries else k - 1 for k in range(24)]


class Killed(Exception):
  pass


def killing(function, call):
  """`function`, but its call number `call` (from 0) raises instead."""
  calls = iter(range(10**6))

  def killed(*args, **kwargs):
    if next(calls) == call:
      raise Killed
    return function(*args, **kwargs)

  return killed


@pytest.mark.parametrize(
    "where, call", [("step", 0), ("step", 23), ("validate", 2), ("save", 0), ("save", 4)]
)
def test_a_killed_training_resumes_bit_for_bit(where, call, tmp_path, monkeypatch, undisturbed):
  with monkeypatch.context() as patch, pytest.raises(Killed):
    if where == "step":
      patch.setattr(step, "jitted_step", killing(step.jitted_step, call))
    if where == "save":
      patch.setattr(checkpoint.Checkpoints, "save", killing(checkpoint.Checkpoints.save, call))
    train(tmp_path, validate=killing(stand_in, call) if where == "validate" else stand_in)
  check_equal(tmp_path, train(tmp_path), undisturbed)


def test_checkpoints_of_before_a_key_go_on_without_it(tmp_path, monkeypatch, undisturbed):
  identity, new = loop._identity, ("train.stand_in_learning_rate", "train.guide_stakes", "routing.recent_tokens")
  earlier = lambda *args: {name: value for name, value in identity(*args).items() if name not in new}
  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(loop, "_identity", earlier)
    train(tmp_path, validate=killing(stand_in, 2))
  check_equal(tmp_path, train(tmp_path), undisturbed)
  for name in new:
    section, key = name.split(".")
    settings = {"train": step.TrainSettings, "routing": RoutingConfig}[section]
    assert key in {field.name for field in dataclasses.fields(settings)}


def test_batches_of_length_buckets_train_as_padded_ones_do_and_resume_bit_for_bit(tmp_path, monkeypatch):
  buckets, rows = (13,), prompts(10)
  guided = dataclasses.replace(GUIDED, train=dataclasses.replace(GUIDED.train, distill_weight=1.0))
  setup = dict(
      spec=guided, router_params=new_router(guided.router), fisher_LxNxT=EARLY, length_buckets=buckets
  )
  result = train(tmp_path / "whole", **setup)
  shapes = []
  count = lambda spec, params, state, batch, schedule: shapes.append(batch.tokens_BxT.shape) or real(
      spec, params, state, batch, schedule
  )
  real = step.jitted_step
  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(step, "jitted_step", killing(count, 15))
    train(tmp_path / "killed", **setup)
  assert shapes[:4] == [(4, 16), (4, 13), (4, 16), (4, 13)] and len(shapes) == 15
  check_equal(tmp_path / "killed", train(tmp_path / "killed", **setup), (tmp_path / "whole", result))
  # The same prompts, every batch padded to the longest.
  state = step.init_state(guided.train, jax.tree.map(jnp.copy, new_router(guided.router)))
  written = [line for line in lines(tmp_path / "whole") if "loss" in line]
  for line, (bucket, turn) in zip(written, turns(buckets_of(rows, buckets, 4), 24), strict=True):
    picked = bucket.rows[indices_at(5, 4, turn, 3)]
    batch = step.Batch(*take(rows, picked), EARLY[:, picked])
    state, metrics = real(guided, frozen_params(CONFIG), state, batch, SCHEDULE)
    for name in ("loss", "distill", "guide", "grad_norm"):
      np.testing.assert_allclose(line[name], metrics[name], rtol=1e-3, atol=1e-6)


def test_killed_twice_with_a_line_cut_short(tmp_path, monkeypatch, undisturbed):
  for call in (15, 5):
    with monkeypatch.context() as patch, pytest.raises(Killed):
      patch.setattr(step, "jitted_step", killing(step.jitted_step, call))
      train(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
      file.write('{"step": 14, "lo')
  check_equal(tmp_path, train(tmp_path), undisturbed)


def test_a_process_killed_by_the_system_resumes_bit_for_bit(tmp_path, undisturbed):
  program = f"""
import jax, time
jax.config.update("jax_numpy_rank_promotion", "raise")
from tests import test_training as t
calls = iter(range(99))
t.train({str(tmp_path)!r}, validate=lambda router: time.sleep(600) if next(calls) == 2 else t.stand_in(router))
"""
  process = subprocess.Popen([sys.executable, "-c", program], cwd=os.path.dirname(os.path.dirname(__file__)))
  try:
    deadline = time.monotonic() + 240
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and '"step": 15' in metrics.read_text() and saved_steps(tmp_path) == [6, 12]):
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.1)
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  (tmp_path / "checkpoints" / "18.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)  # a save cut short
  check_equal(tmp_path, train(tmp_path), undisturbed)


def test_losses_that_are_not_finite_stop_the_training_and_never_reach_a_checkpoint(tmp_path, monkeypatch, undisturbed):
  real = step.jitted_step
  poisoned = jax.tree.map(lambda a: a * np.nan, frozen_params(CONFIG))

  def overflowing(spec, params, state, batch, schedule):
    return real(spec, poisoned if int(state.step) == 11 else params, state, batch, schedule)

  with monkeypatch.context() as patch:
    patch.setattr(step, "jitted_step", overflowing)
    for _ in range(2):  # a second run stops at the same place
      remedies = "lower train.learning_rate, or set train.input_gradient=False"
      with pytest.raises(UserError, match=f"Training step 11 has loss nan .* {remedies} .* of step 6"):
        train(tmp_path)
      assert saved_steps(tmp_path) == [0, 6]
      assert max(line["step"] for line in lines(tmp_path)) == 10
  check_equal(tmp_path, train(tmp_path), undisturbed)


def test_a_validation_that_is_not_finite_stops_the_training(tmp_path):
  with pytest.raises(UserError, match="validation KL after 0 training steps is nan; lower train.learning_rate"):
    train(tmp_path, validate=lambda _: float("nan"))


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(seed=4), "the seed was 3"),
        (dict(batch_size=2), "train.batch was 4"),
        (dict(validate_every=4), "train.validate_every was 8"),
        (dict(length_buckets=(13,)), "data.length_buckets was "),
        (dict(schedule_L=[0, 0, 0.25, 0.5]), "the fingerprint of the schedule"),
        (dict(prompts=prompts(10, seed=1)), "the fingerprint of the training prompts"),
        (dict(router_params=new_router(seed=1)), "the fingerprint of the initial router"),
        (dict(spec=dataclasses.replace(SPEC, start=0)), "the first routed block was 2"),
        (dict(spec=dataclasses.replace(SPEC, routing=RoutingConfig("evict"))), "routing.kv_mode was project"),
        (dict(spec=dataclasses.replace(SPEC, train=dataclasses.replace(SETTINGS, steps=30))), "train.steps was 24"),
        (dict(spec=dataclasses.replace(SPEC, router=RouterConfig(hidden_size=4)), router_params=new_router(
            RouterConfig(hidden_size=4))), "router.hidden_size was 8"),
    ],
)
def test_another_training_is_refused_naming_what_changed(change, name, undisturbed):
  directory, _ = undisturbed
  before = (directory / "metrics.jsonl").read_bytes()
  with pytest.raises(UserError, match=f"{name}.* restore it, or delete that directory"):
    train(directory, **change)
  assert (directory / "metrics.jsonl").read_bytes() == before


# Orbax closes its event loop while a failing read or write of another thread still reports to it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damaged_file", ["arrays/manifest.ocdbt", "facts/metadata"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(
    damaged_file, tmp_path, monkeypatch, capsys, undisturbed
):
  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(step, "jitted_step", killing(step.jitted_step, 21))
    train(tmp_path)
  damage = lambda k: (tmp_path / "checkpoints" / str(k) / damaged_file).write_bytes(b"{")
  damage(18)
  result = train(tmp_path)
  assert "18 is damaged" in capsys.readouterr().err
  check_equal(tmp_path, result, undisturbed)
  damage(24)
  check_equal(tmp_path, train(tmp_path), undisturbed)  # from 18, which was written anew
  damage(18), damage(24)
  with pytest.raises(UserError, match="No checkpoint in .* can be read; delete that directory"):
    train(tmp_path)


@pytest.mark.parametrize("where", ["metrics", "checkpoint"])
def test_a_full_disk_is_one_sentence_and_training_goes_on_with_space(where, tmp_path, monkeypatch, undisturbed):
  def full(*_, **__):
    raise error

  with monkeypatch.context() as patch:
    if where == "metrics":
      error = OSError(errno.ENOSPC, "No space left on device")
      patch.setattr(os, "fsync", full)
    else:
      error = ValueError("RESOURCE_EXHAUSTED: Failed to write 204 bytes: No space left on device [os_error_code='28']")
      patch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(UserError, match="no space left to write .*; free some and run again") as caught:
      train(tmp_path)
    assert "\n" not in str(caught.value)
  check_equal(tmp_path, train(tmp_path), undisturbed)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_fills_up_behind_the_training_is_told_and_costs_nothing_saved(tmp_path, caplog):
  """The files of a checkpoint are too large for the limit; those of the metrics are not."""
  config = RouterConfig(hidden_size=1024)
  arguments = dict(spec=dataclasses.replace(SPEC, router=config), router_params=new_router(config))
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  calls = iter(range(99))

  def filling(_):
    if next(calls) == 1:  # after 8 steps
      while saved_steps(tmp_path) != [0, 6]:
        time.sleep(0.01)
      resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    return 0.0

  try:
    with pytest.raises(UserError, match="no space left to write to .*checkpoints; free some and run again") as caught:
      train(tmp_path, validate=filling, **arguments)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert "\n" not in str(caught.value)
  assert saved_steps(tmp_path) == [0, 6] and not caplog.records
  train(tmp_path, validate=lambda _: 0.0, **arguments)
  assert saved_steps(tmp_path) == [18, 24]
  assert [line["step"] for line in lines(tmp_path) if "loss" in line] == list(range(24))


def test_sigterm_saves_and_the_training_goes_on_bit_for_bit(tmp_path, undisturbed):
  calls = iter(range(99))

  def terminated(router):
    if next(calls) == 1:  # after 8 steps
      os.kill(os.getpid(), signal.SIGTERM)
    return stand_in(router)

  with pytest.raises(distributed.Stopped):
    with distributed.together(distributed.Launch(mode="off"), cli.outcome):
      train(tmp_path, validate=terminated)
  assert saved_steps(tmp_path) == [6, 9]
  assert [line["step"] for line in lines(tmp_path) if "loss" in line] == list(range(9))
  check_equal(tmp_path, train(tmp_path), undisturbed)


def test_a_checkpoint_is_restored_to_the_bit_on_another_mesh(tmp_path, monkeypatch):
  mesh = sharding.make_mesh(2, 2, 2)
  one, many = frozen_params(CONFIG), jax.device_put(frozen_params(CONFIG), decoder.param_shardings(mesh, CONFIG))

  def first_state(directory, params):
    """The state that a resumed training starts from."""
    seen = []

    def spy(spec, params, state, *_):
      seen.append((state, checkpoint.to_host(state)))
      raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
      patch.setattr(step, "jitted_step", spy)
      train(directory, params=params)
    return seen[0]

  def until(directory, params, call):
    with monkeypatch.context() as patch, pytest.raises(Killed):
      patch.setattr(step, "jitted_step", killing(step.jitted_step, call))
      train(directory, params=params)
    return max(saved_steps(directory))

  assert until(tmp_path, one, 9) == 6
  _, on_one = first_state(tmp_path, one)
  placed, on_many = first_state(tmp_path, many)
  assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(placed)} == {8}
  assert same(on_one, on_many) and on_one.step == 6
  assert until(tmp_path, many, 8) == 12  # goes on there, is saved, and comes back
  _, back = first_state(tmp_path, one)
  _, there = first_state(tmp_path, many)
  assert same(back, there) and back.step == 12 and not same(back.router, on_one.router)


def test_lost_metrics_are_reported_and_training_goes_on(tmp_path, monkeypatch, capsys):
  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(step, "jitted_step", killing(step.jitted_step, 20))
    train(tmp_path)
  (tmp_path / "metrics.jsonl").unlink()
  train(tmp_path)
  assert "lacks lines of the 18 steps" in capsys.readouterr().err
  assert [line["step"] for line in lines(tmp_path) if "loss" in line] == list(range(18, 24))


@pytest.mark.parametrize("change", [dict(validate_every=0), dict(batch_size=0), dict(prompts=prompts(0))])
def test_numbers_below_one_are_refused(change, tmp_path):
  with pytest.raises(UserError, match="must be at least 1"):
    train(tmp_path, **change)


# --- Fisher scores and the guide -----------------------------------------------------------------


@pytest.mark.parametrize("kv_mode, buckets", [("evict", ()), ("project", ()), ("project", (4,))])
def test_fisher_scores_against_the_exact_expectation(kv_mode, buckets):
  """All answers y of two scored positions are enumerated; the second row has only one such position.

  Collected in batches of two: the second batch is filled up, with a bucket of four tokens the first.
  """
  c = tiny.config(num_blocks=2, vocab_size=11, tie_embeddings=False)
  params = tiny.params(c)
  params["embed"]["lm_head"] *= 30
  tokens, context, length = rows = Prompts(*tiny.batch(c, [4, 3, 4], [6, 4, 6], 6))
  routing, draws = RoutingConfig(kv_mode), 1000

  def log_probs(gate, params):
    given = routers.Router("given", None, gate)
    hidden = masked.forward(c, routing, params, given, tokens, context, length, jnp.zeros(2)).hidden_BxTxD
    return scoring.log_probs(c, params, hidden, scoring.continuation(tokens, context, length, 2)[0])

  gates = jnp.ones((2, 3, 6))
  p_BxCxV = np.exp(jax.jit(log_probs)(gates, params))
  jacobian = np.asarray(jax.jit(jax.jacrev(log_probs))(gates, params))  # (B,C,V, L,B,T)
  estimate = guide.collect_fisher(
      c, routing, params, rows, 2, seed=0, num_scored=2, draws=draws, dtype=jnp.float32, length_buckets=buckets
  )
  assert estimate.shape == gates.shape
  for b, num_scored in enumerate([2, 1, 2]):
    slope_CxVxLxT = jacobian[b, :num_scored, :, :, b, : length[b]]
    exact = np.einsum("cv,cvlt->lt", p_BxCxV[b, :num_scored], slope_CxVxLxT**2)
    # The fourth moment of one draw, for the error of the mean: signs make the sum of two positions symmetric.
    first, last = slope_CxVxLxT[0][:, None], slope_CxVxLxT[-1][None] * (num_scored == 2)
    fourth = 0.5 * ((first + last) ** 4 + (first - last) ** 4)
    fourth = np.einsum("v,w,vwlt->lt", p_BxCxV[b, 0], p_BxCxV[b, num_scored - 1], fourth)
    error = np.sqrt((fourth - exact**2) / draws)
    assert (np.abs(estimate[:, b, : length[b]] - exact) < 5 * error + 1e-9).all()
    assert (num_scored == 1) == (exact[:, context[b]] == 0).all()  # the first new token leads to the second
    told = (5 * error < 0.5 * exact)[:, : context[b]]
    assert (exact > 1e-6).any() and told.mean() > 0.5  # the test can tell
    assert (estimate[:, b, length[b] :] == 0).all()


def test_scores_of_new_tokens_become_what_they_are_to_do():
  score = np.arange(2.0 * 2 * 6).reshape(2, 2, 6)  # (L, N, T)
  decide = lambda schedule, **routing: guide.with_new_tokens(
      score, np.array([2, 3]), np.array([6, 5]), np.array(schedule), RoutingConfig(**routing)
  )
  assert decide([0.5, 0.5]) is score and decide([0.5, 0.5], decode_sparsity=0.5, decode_rule="quantile") is score
  decided = decide([0.5, 0.5], decode_sparsity=0.5)
  np.testing.assert_array_equal(decided[:, 0, :2], score[:, 0, :2])
  np.testing.assert_array_equal(decided[:, 1, :3], score[:, 1, :3])
  # Pairs that count: tokens 2 to 4 of the first row and 3 of the second. Half of these eight are in block 0.
  assert decided[:, 0, 2:5].tolist() == [[0, 0, 0], [1, 1, 1]] and decided[:, 1, 3].tolist() == [0, 1]
  decided = decide([0, 0.5], decode_sparsity=0.375)  # three of the four pairs of block 1, which alone may be skipped
  assert decided[1, 0, 2:5].tolist() == [0, 0, 0] and decided[1, 1, 3] == 1
  for asked in (0.5, 0.6):
    with pytest.raises(UserError, match=f"decode_sparsity={asked} would take all of the 1 blocks"):
      decide([0, 0.5], decode_sparsity=asked)
  score[:, 1, 3:] = 0  # as of an earlier version, which scored contexts alone
  with pytest.raises(UserError, match="know of contexts alone"):
    decide([0.5, 0.5], decode_sparsity=0.5)


def test_joint_scores_by_hand():
  score = np.array([1.0, 2.0, 4.0, 8.0]).reshape(4, 1, 1)
  joint = lambda p: guide.joint_scores(score, p).ravel().tolist()
  assert joint(-1) == [1, 2, 4, 8]
  assert joint(0) == [15, 15, 15, 15]
  assert joint(2) == [15, 14, 12, 12]


def test_fisher_schedule_by_hand():
  score = np.array([[[9, 1, 2, 9, 0], [9, 1, 5, 9, 9]], [[9, 3, 4, 9, 0], [9, 2, 9, 9, 9]]], np.float64)  # (L, N, T)
  # Row 0: m = 4, a quarter of 8 pairs: the scores 1 and 2, both of block 0. Row 1: 1 of block 0 and 2 of block 1.
  np.testing.assert_allclose(guide.fisher_schedule(score, np.array([4, 4]), 0.25), [(2 + 1) / 8, 1 / 8])
  np.testing.assert_allclose(guide.fisher_schedule(score, np.array([4, 4]), 0.0), [0, 0])
  np.testing.assert_allclose(guide.fisher_schedule(score, np.array([4, 4]), 0.25, first_block=1), [0, 2 / 4])


def test_fisher_schedule_has_the_asked_mean_where_scores_are_alike():
  score = np.concatenate([np.ones((3, 2, 10)), np.zeros((1, 2, 10))])  # what the last block does is read by nobody
  np.testing.assert_allclose(guide.fisher_schedule(score, np.array([10, 10]), 0.1), [0, 0, 0, 0.4])
  np.testing.assert_allclose(guide.fisher_schedule(score, np.array([10, 10]), 0.3).mean(), 0.3)


def test_fisher_schedule_has_the_asked_mean():
  score = np.random.default_rng(0).random((6, 5, 20)) * np.arange(1, 7)[:, None, None]
  schedule = guide.fisher_schedule(score, np.array([20, 10, 20, 10, 20]), 0.3)
  np.testing.assert_allclose(schedule.mean(), 0.3)
  assert schedule[0] > schedule[5]


def test_inputs_under_one_pass_routing_are_those_of_the_blocks_that_decide():
  collect = lambda routing: guide.collect_inputs(
      CONFIG, routing, frozen_params(CONFIG), prompts(6), 4, with_hidden=True, dtype=jnp.float32
  )
  for all_blocks, deciding in zip(collect(RoutingConfig()), collect(RoutingConfig(one_pass_block=2))):
    assert (len(all_blocks), len(deciding)) == (4, 3)
    np.testing.assert_array_equal(deciding, all_blocks[:3])


def test_inputs_of_length_buckets_are_those_of_padded_batches():
  rows = prompts(6)
  collect = lambda *buckets: guide.collect_inputs(
      CONFIG, RoutingConfig(), frozen_params(CONFIG), rows, 4, with_hidden=True, dtype=jnp.float32,
      length_buckets=buckets,
  )
  (score, hidden), (expected_score, expected_hidden) = collect(13), collect()
  valid = np.arange(16)[None] < rows.length[:, None]
  np.testing.assert_allclose(score, expected_score, atol=1e-6)
  np.testing.assert_allclose(hidden[:, valid], expected_hidden[:, valid], atol=2e-3)  # in float16
  assert hidden.dtype == np.float16 and np.abs(expected_hidden[:, valid]).max() > 1


@pytest.mark.parametrize("kind, factors", [
    ("global", FACTORS), ("global", ("position", "score", "rank")), ("per_block", FACTORS), ("recurrent", ("rank",)),
])
def test_a_warm_up_under_one_pass_routing_reads_what_enters_the_block_that_decides(kind, factors):
  """As if every later block had that block's inputs, which is what the data of two blocks stand for."""
  rows, rng = prompts(10), np.random.default_rng(0)
  hidden = rng.standard_normal((2, 10, 16, CONFIG.hidden_size)).astype(np.float16)
  score, scores = rng.random((2, 10, 16), np.float32), rng.random((4, 10, 16), np.float32)
  router_config = RouterConfig(kind, factors=factors, hidden_states=True, hidden_size=8)
  settings = guide.WarmupSettings(steps=3, batch=4, learning_rate=1e-3)
  fit = lambda *inputs: guide.warm_up(
      router_config, RoutingConfig(one_pass_block=1), settings, new_router(router_config),
      guide.GuideData(rows.context, rows.length, *inputs, scores), schedule, seed=0,
  )
  for schedule in np.array([[0, 0.5, 0.25, 0.75], [0.25, 0.5, 0.25, 0.75]]):
    (router, history), (spelled_out, expected) = fit(score, hidden), fit(score[[0, 1, 1, 1]], hidden[[0, 1, 1, 1]])
    np.testing.assert_allclose(history, expected, rtol=1e-4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), router, spelled_out)


@pytest.mark.parametrize("kind, hidden", [("global", True), ("per_block", False), ("recurrent", True)])
def test_guide_margins_are_those_of_routed_execution(kind, hidden):
  router_config, params = RouterConfig(kind=kind, hidden_states=hidden, hidden_size=8), frozen_params(CONFIG)
  router, rows = new_router(router_config), prompts(6)
  dynamic = routers.Router("dynamic", router_config, router)
  routed = jax.jit(lambda dynamic: masked.forward(CONFIG, RoutingConfig(), params, dynamic, *rows, jnp.zeros(4)))
  out = routed(dynamic)
  score, states = guide.collect_inputs(
      CONFIG, RoutingConfig(), params, rows, 4, with_hidden=hidden, dtype=jnp.float32
  )
  assert (states is not None) == hidden
  read = router_config.factors
  features = jnp.stack([factors.context_factors(read, jnp.asarray(s), 0.0, rows.context) for s in score])
  margins = guide.margins(router_config, router, features, states)
  in_context = np.arange(16)[None] < rows.context[:, None]
  tolerance = 5e-3 if hidden else 1e-5  # states are kept in float16
  np.testing.assert_allclose(margins[:, in_context], out.margin_LxBxT[:, in_context], atol=tolerance)


def test_remat_changes_memory_not_gradients_of_the_router():
  router_config, params, rows = RouterConfig(hidden_states=True, hidden_size=8), frozen_params(CONFIG), prompts(2)

  @functools.partial(jax.jit, static_argnums=1)
  def pullback(router, policy):
    """The gradient as a pytree function, whose leaves are what the backward pass keeps."""

    def states(router):
      dynamic = routers.Router("dynamic", router_config, router)
      return masked.forward(
          CONFIG, RoutingConfig(), params, dynamic, *rows, jnp.full(4, 0.5), straight_through=True, remat_policy=policy
      ).hidden_BxTxD

    return jax.vjp(states, router)[1]

  kept, gradients = {}, {}
  for policy in decoder.REMAT:
    backward = pullback(new_router(router_config), policy)
    kept[policy] = sum(leaf.nbytes for leaf in jax.tree.leaves(backward))
    gradients[policy] = jax.jit(lambda f: f(jnp.ones((2, 16, CONFIG.hidden_size))))(backward)
  assert kept["full"] < kept["dots"] < kept["none"]
  assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients["none"]))
  for policy in decoder.REMAT:
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, gradients[policy], gradients["none"])


def test_warm_up_reduces_the_loss_and_learns_the_order_of_the_scores():
  rows = prompts(10)
  rng = np.random.default_rng(0)
  hidden = rng.standard_normal((4, 10, 16, CONFIG.hidden_size)).astype(np.float16)
  precious = hidden[..., 0].astype(np.float32)  # what decides is in the hidden state
  data = guide.GuideData(rows.context, rows.length, rng.random((4, 10, 16), np.float32), hidden, precious)
  router_config = RouterConfig(kind="recurrent", hidden_states=True, hidden_size=8)
  settings = guide.WarmupSettings(steps=120, batch=8, learning_rate=2e-2)
  run = lambda asked: guide.warm_up(
      router_config, RoutingConfig(), settings, new_router(router_config), data, np.full(4, asked), seed=0
  )
  router, history = run(0.5)
  assert len(history) == 120 and np.mean(history[-10:]) < 0.5 * history[0]
  again, _ = run(0.5)
  assert same(router, again)
  other, _ = run(0.25)
  assert not same(router, other)
  reading = guide.Reading.of(router_config, 4, np.full(4, 0.5))
  step = guide.compiled_step(router_config, RoutingConfig(), settings, reading, "none")
  assert step._cache_size() == 1  # other schedules of the same blocks compile nothing
