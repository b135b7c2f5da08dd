"""Baselines: hand-worked removals, equality with the masked judge and the zeroed full model, costs, files."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftp_jax.data.prompts import Prompts, take
from ftp_jax.errors import UserError
from ftp_jax.evaluation import baselines, flops, methods
from ftp_jax.evaluation.baselines import Calibration, Yardstick, registry
from ftp_jax.evaluation.judge import Frozen, Judge
from ftp_jax.evaluation.perplexity import truncated_perplexity
from ftp_jax.export.artifact import Artifact
from ftp_jax.inference import Engine
from ftp_jax.models.sources import Model
from ftp_jax.routing import routers
from ftp_jax.routing.config import RouterConfig, RoutingConfig
from tests import tiny
from tests.test_data import byte_tokenizer

BLOCKS = 5
CONFIG = tiny.config(num_blocks=BLOCKS, vocab_size=262, max_positions=64)
TOKENIZER = byte_tokenizer()
IN_MEMORY = pathlib.Path("a tiny model that stands in no directory")
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", autouse=True)
def fingerprints():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(registry, "fingerprint", str)
    yield


def model_of(params):
  return Model(CONFIG, params, TOKENIZER, IN_MEMORY)


def silenced(params, attention=(), mlp=()):
  """The model with these sub-blocks' output projections zeroed."""
  blocks = {**params["blocks"]}
  for name, removed in (("o", attention), ("down", mlp)):
    blocks[name] = {"kernel": blocks[name]["kernel"].at[jnp.array(removed, int)].set(0.0)}
  return {**params, "blocks": blocks}


@pytest.fixture(scope="module")
def model():
  return model_of(tiny.params(CONFIG))


@pytest.fixture(scope="module")
def prompts():
  return Prompts(*tiny.batch(CONFIG, [12, 7, 9, 12, 12], [16, 10, 13, 13, 15], 16))  # one length a batch of two


@pytest.fixture(scope="module")
def windows():
  return Prompts(*tiny.batch(CONFIG, [1, 1], [14, 11], 14, seed=7))


@pytest.fixture(scope="module")
def calibration(prompts):
  return Calibration(prompts, take(prompts, [0, 1]), batch=2)


@pytest.fixture(scope="module")
def yardstick(model, prompts):
  return Yardstick(model, prompts, 2)


def dense_flops(blocks, contexts):
  smaller = dataclasses.replace(CONFIG, num_blocks=blocks)
  return sum(flops.prefill_flops(smaller, np.ones((blocks, m)), m, "project") for m in contexts)


def scores(engine):
  found = engine.score([5, 9, 2, 7, 7, 3, 1, 8, 6, 4, 2, 9], [[4, 3, 9], [8]])
  return np.concatenate([s.logprobs for s in found])


def test_dense_is_no_different(model, yardstick, windows):
  record = yardstick.record(baselines.build("dense", model, 0.0), windows)
  assert record["kl"] == pytest.approx(0, abs=1e-6) and record["agreement"] == 1
  assert record["achieved"] == record["flops_saved"] == record["perplexity_achieved"] == 0
  assert record["cache_ratio"] == 1 and record["prompts"] == 5
  expected = truncated_perplexity(Frozen(CONFIG, model.params), 0.0, windows, 2)
  assert record["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_truncation_reads_the_sink_and_the_latest_tokens(model, yardstick, prompts):
  baseline = baselines.build("truncation", model, 0.4)
  prompt = [5, 6, 7, 8, 9]
  assert list(baseline.prompt(prompt)) == [5, 8, 9]
  dense = Engine(model)
  assert baseline.engine.score(prompt, [[1, 2]]) == dense.score([5, 8, 9], [[1, 2]])
  assert baseline.engine.generate([prompt], 4)[0].tokens == dense.generate([[5, 8, 9]], 4)[0].tokens
  record = yardstick.record(baseline)
  judge = Judge(Frozen(CONFIG, model.params), RoutingConfig(), prompts, 2, 4)
  expected = judge.quality(routers.STATIC, np.zeros(BLOCKS), methods.truncate(prompts, 0.4))
  assert record["kl"] == pytest.approx(expected.kl.mean(), rel=1e-3) and record["kl"] > 1e-3
  kept = [8, 5, 6, 8, 8]
  assert record["achieved"] == pytest.approx(1 - sum(kept) / prompts.context.sum())
  assert record["flops_saved"] == pytest.approx(1 - dense_flops(BLOCKS, kept) / dense_flops(BLOCKS, prompts.context))
  assert record["cache_ratio"] < 0.8


@pytest.mark.parametrize("name", ["random", "static", "late"])
def test_routed_methods_measure_as_the_masked_judge(name, model, yardstick, prompts):
  baseline = baselines.build(name, model, 0.3, seed=3)
  routing = RoutingConfig(**baseline.facts["routing"])
  judge = Judge(Frozen(CONFIG, model.params), routing, prompts, 2, 4)
  expected = judge.quality(baseline.router, np.asarray(baseline.facts["schedule"], np.float32))
  found, _ = yardstick.compare(baseline.engine)
  assert_close(found.kl, expected.kl, rtol=1e-3)
  assert_close(found.nll, expected.nll, rtol=1e-4)
  assert_close(found.agreement, expected.agreement)
  record = yardstick.record(baseline)
  assert record["achieved"] == pytest.approx(flops.skipped_share(expected.keep_LxNxT, prompts.context))
  saved = flops.saved_share(CONFIG, expected.keep_LxNxT, prompts.context, routing.kv_mode)
  assert record["flops_saved"] == pytest.approx(saved)
  assert (record["cache_ratio"] < 0.8) == (routing.kv_mode == "evict")


def test_random_tokens_follow_the_seed(model):
  first, again, other = (baselines.build("random", model, 0.5, seed=seed) for seed in (0, 0, 1))
  assert_close(scores(first.engine), scores(again.engine))
  assert np.abs(scores(first.engine) - scores(other.engine)).max() > 1e-3


def test_late_blocks_compute_the_forced_tokens_alone(model):
  baseline = baselines.build("late", model, 0.3)
  assert baseline.facts["schedule"] == [0, 0, 0, 0.5, 1]
  (group,) = baseline.engine.prefill([[5, 9, 2, 7, 7, 3, 1, 8]]).groups
  keep = np.asarray(group.prefilled.cache.keep_LxBxT)[:, 0]
  np.testing.assert_array_equal(keep[:3], True)
  np.testing.assert_array_equal(keep[3], [1, 0, 0, 0, 0, 1, 1, 1])
  np.testing.assert_array_equal(keep[4], [1, 0, 0, 0, 0, 0, 0, 1])
  assert group.plan.slots == (8, 8, 8, 4, 2) and group.plan.cache_slots == (8,) * 5


def test_shortgpt_removes_silent_blocks_at_no_cost(model, prompts, calibration, windows):
  quiet = model_of(silenced(model.params, (1, 3), (1, 3)))
  baseline = baselines.build("shortgpt", quiet, 0.4, calibration)
  assert baseline.facts["removed"] == [1, 3] and baseline.engine.model.config.num_blocks == 3
  record = Yardstick(quiet, prompts, 2).record(baseline, windows)
  assert record["kl"] == pytest.approx(0, abs=1e-5) and record["agreement"] == 1
  assert record["achieved"] == pytest.approx(0.4) and record["cache_ratio"] == pytest.approx(0.6)
  assert record["flops_saved"] == pytest.approx(1 - dense_flops(3, prompts.context) / dense_flops(5, prompts.context))
  whole = truncated_perplexity(Frozen(CONFIG, quiet.params), 0.0, windows, 2)
  assert record["perplexity"] == pytest.approx(whole, rel=1e-5)
  assert baselines.build("shortgpt", model, 0.95, calibration).engine.model.config.num_blocks == 1


def test_a_trained_artifact_is_measured_alike(model, yardstick, prompts):
  router = RouterConfig()
  weights = jax.tree.map(lambda a: np.asarray(a) * 3, routers.init_router(router, jax.random.key(1), BLOCKS, 32))
  schedule = (0.0, 0.5, 0.5, 0.25, 0.5)
  artifact = Artifact("tiny", "", "llama", schedule, RoutingConfig(), router, weights, {}, {"context": 100})
  baseline = baselines.from_artifact(model, artifact)
  judge = Judge(Frozen(CONFIG, model.params), artifact.routing, prompts, 2, 4)
  expected = judge.quality(routers.Router("dynamic", router, weights), np.array(schedule, np.float32))
  found, _ = yardstick.compare(baseline.engine)
  assert_close(found.kl, expected.kl, rtol=1e-3)
  assert baseline.sparsity == 0.35 and baseline.engine.prunes(3)


ALL = ("truncation", "random", "static", "late", "shortgpt")


@pytest.mark.parametrize("name", ALL)
def test_saved_and_loaded_gives_identical_scores(name, model, calibration, tmp_path):
  baseline = baselines.build(name, model, 0.4, calibration, seed=2)
  baselines.save(baseline, tmp_path)
  loaded = baselines.load(tmp_path, model)
  assert (loaded.name, loaded.sparsity, loaded.seed) == (name, 0.4, 2)
  np.testing.assert_array_equal(scores(loaded.engine), scores(baseline.engine))


def test_mistakes_name_the_fix(model, calibration, tmp_path):
  with pytest.raises(UserError, match="unknown; choose one of dense, truncation"):
    baselines.build("nothing", model, 0.3)
  with pytest.raises(UserError, match="pass a Calibration"):
    baselines.build("shortgpt", model, 0.3)
  with pytest.raises(UserError, match=r"choose one in \[0, 1\)"):
    baselines.build("random", model, 1.0)
  with pytest.raises(UserError, match="baselines.save"):
    baselines.load(tmp_path, model)
  baselines.save(baselines.build("random", model, 0.3), tmp_path)
  with pytest.raises(UserError, match="fingerprint"):
    baselines.load(tmp_path, dataclasses.replace(model, directory=pathlib.Path("another")))
