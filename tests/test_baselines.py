"""Baselines: hand-worked removals, equality with the masked judge and the zeroed full model, costs, files."""

import dataclasses
import functools
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftp_jax.data.prompts import Prompts, pack
from ftp_jax.errors import UserError
from ftp_jax.evaluation import baselines, flops, methods
from ftp_jax.evaluation.baselines import (
    Calibration, Yardstick, blockpruner, kinds, late_maps, mod, registry, skipgpt, subblocks,
)
from ftp_jax.evaluation.judge import Frozen, Judge
from ftp_jax.evaluation.perplexity import truncated_perplexity
from ftp_jax.export import artifact as artifacts
from ftp_jax.export.artifact import Artifact
from ftp_jax.inference import Engine, Sampling
from ftp_jax.inference import engine as engine_module
from ftp_jax.machine import describe_machine
from ftp_jax.models.sources import Model
from ftp_jax.routing import masked, routers
from ftp_jax.routing.config import RouterConfig, RoutingConfig
from ftp_jax.stages import save_arrays
from tests import scripts, tiny
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
  return Calibration(prompts, prompts, batch=2)


@pytest.fixture(scope="module")
def yardstick(model, prompts):
  return Yardstick(model, prompts, 2)


def dense_flops(blocks, contexts):
  smaller = dataclasses.replace(CONFIG, num_blocks=blocks)
  return sum(flops.prefill_flops(smaller, np.ones((blocks, m)), m) for m in contexts)


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


@pytest.mark.parametrize("name", ["random", "static", "late", "fastv"])
def test_routed_methods_measure_as_the_masked_judge(name, model, yardstick, prompts, calibration):
  baseline = baselines.build(name, model, 0.3, calibration, seed=3)
  routing = RoutingConfig(**baseline.facts["routing"])
  judge = Judge(Frozen(CONFIG, model.params), routing, prompts, 2, 4)
  expected = judge.quality(baseline.router, np.asarray(baseline.facts["schedule"], np.float32))
  found, _ = yardstick.compare(baseline.engine)
  assert_close(found.kl, expected.kl, rtol=1e-3)
  assert_close(found.nll, expected.nll, rtol=1e-4)
  assert_close(found.agreement, expected.agreement)
  record = yardstick.record(baseline)
  assert record["achieved"] == pytest.approx(flops.skipped_share(expected.keep_LxNxT, prompts.context))
  saved = flops.saved_share(CONFIG, expected.keep_LxNxT, prompts.context, routing, baseline.router.config)
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


def test_fastv_keeps_what_the_last_queries_look_at(model, prompts, calibration):
  baseline = baselines.build("fastv", model, 0.3, calibration)
  tried, k = baseline.facts["validation_kl"], baseline.routing.one_pass_block
  assert sorted(tried) == ["1", "2", "3"] and tried[str(k)] == min(tried.values())
  assert np.mean(baseline.facts["schedule"]) == pytest.approx(0.3)
  tokens, context = np.array([[5, 9, 2, 7, 7, 3, 1, 8, 6, 4]]), np.array([10])
  entries, _ = masked.dense_entries(CONFIG, baseline.routing, model.params, tokens, context, context)
  score = np.array(entries.score_BxT[k, 0])
  score[[0, 9]] = np.inf  # forced
  kept = np.sort(np.argsort(-score)[: np.ceil(10 * (1 - baseline.facts["schedule"][-1]) - 1e-4).astype(int)])
  (group,) = baseline.engine.prefill(tokens.tolist()).groups
  keep = np.asarray(group.prefilled.cache.keep_LxBxT)[:, 0]
  for block in range(BLOCKS):
    np.testing.assert_array_equal(np.flatnonzero(keep[block]), kept if block >= k else np.arange(10))
  assert baseline.perplexity(prompts, 2) == (None, None)  # would be the dense model's: no continuation token skips
  with pytest.raises(UserError, match="ask for less"):
    baselines.build("fastv", model, 0.9, calibration)


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


def test_blockpruner_removes_silent_subblocks_first_at_no_cost(model, windows):
  assert_close(subblocks.shares(CONFIG), [0.4, 0.6])
  sharp = {**model.params["embed"], "final_norm": {"scale": model.params["embed"]["final_norm"]["scale"] * 30}}
  quiet = model_of({**silenced(model.params, attention=(2,), mlp=(1,)), "embed": sharp})
  starts = [[5, 9, 2], [7, 7, 3], [1, 8, 6], [4, 2, 9]]
  said = Engine(quiet).generate(starts, 13, Sampling(1.0))  # a text that the whole model finds likely
  text = pack([(start + list(row.tokens), 3) for start, row in zip(starts, said)], 16)
  baseline = baselines.build("blockpruner", quiet, 0.2, Calibration(text, text, batch=2))
  assert sorted(baseline.facts["order"]) == [[1, 1], [2, 0]]
  whole = truncated_perplexity(Frozen(CONFIG, quiet.params), 0.0, text, 2)
  assert_close(baseline.facts["perplexity"], [whole, whole])
  perplexity, achieved = baseline.perplexity(windows, 2)
  assert achieved == pytest.approx(0.2)
  assert perplexity == pytest.approx(truncated_perplexity(Frozen(CONFIG, quiet.params), 0.0, windows, 2), rel=1e-5)


def test_blockpruner_takes_the_best_subblock_at_every_step_and_resumes(model, prompts, calibration, tmp_path):
  calibration = dataclasses.replace(calibration, directory=tmp_path)
  baseline = baselines.build("blockpruner", model, 0.3, calibration)
  removed = {"attention": [], "mlp": []}
  for block, sub in baseline.facts["order"]:
    gone = 0.4 * len(removed["attention"]) + 0.6 * len(removed["mlp"])
    without = {}
    for b in range(BLOCKS):
      for name, share in (("attention", 0.4), ("mlp", 0.6)):
        if b not in removed[name] and abs(gone + share - 1.5) < abs(gone - 1.5):
          tried = {**removed, name: [*removed[name], b]}
          without[b, name] = truncated_perplexity(Frozen(CONFIG, silenced(model.params, **tried)), 0.0, prompts, 5)
    best = min(without, key=without.get)
    assert best == (block, ("attention", "mlp")[sub])
    removed[best[1]].append(block)
  assert gone + (0.4, 0.6)[sub] == pytest.approx(1.4) or gone + (0.4, 0.6)[sub] == pytest.approx(1.6)

  with pytest.MonkeyPatch.context() as patch:  # every table that S = 0.3 needs is on disk
    patch.setattr(blockpruner, "_nll_from", None)
    again = baselines.build("blockpruner", model, 0.3, calibration)
  assert again.facts == baseline.facts


def test_removed_subblocks_equal_the_full_model_with_zeroed_projections(model, calibration, yardstick, prompts):
  baseline = baselines.build("blockpruner", model, 0.5, calibration)
  gone = np.array(baseline.facts["removed"])
  zeroed = Engine(model_of(silenced(model.params, *map(np.flatnonzero, gone.T))))
  assert_close(scores(baseline.engine), scores(zeroed), atol=1e-4)
  prompt = [5, 9, 2, 7, 7, 3, 1, 8, 6, 4, 2, 9]
  assert baseline.engine.generate([prompt], 6)[0].tokens == zeroed.generate([prompt], 6)[0].tokens
  record, (expected, _) = yardstick.record(baseline), yardstick.compare(zeroed)
  assert record["kl"] == pytest.approx(expected.kl.mean(), rel=1e-3)
  assert record["achieved"] == pytest.approx((gone @ [0.4, 0.6]).mean()) == pytest.approx(0.5, abs=0.061)
  attentions = BLOCKS - gone[:, 0].sum()
  assert record["cache_ratio"] == pytest.approx(attentions / BLOCKS, abs=0.03)  # positions are stored once


def test_flops_of_removed_subblocks_by_hand(model, calibration):
  removed = [[True, False], [False, True], [False, False], [False, True], [True, False]]
  zeros = np.zeros((BLOCKS, 2)).tolist()
  facts = {"removed": removed, "schedule": zeros, "threshold": zeros}
  baseline = registry.METHODS["blockpruner"].kind("blockpruner", 0.4, 0, model, facts)
  (group,) = baseline.engine.prefill([[5, 9, 2, 7]]).groups
  costs = baseline.costs(np.asarray(baseline.routes(group.prefilled.cache))[..., 0, :], 4)
  query, key, mlp = 4 * 32 * 32, 4 * 32 * 16, 6 * 32 * 48
  pairs = 4 * 32 * (2 * 10 + 4)  # two causal attentions of four tokens, and the last token in block 3
  expected = 2 * 32 * 262 + query * (4 + 4 + 1) + key * 12 + mlp * (4 + 4 + 1) + pairs
  assert costs.flops == expected and costs.skipped == pytest.approx((2 * 0.4 + 2 * 0.6) / 5)


def test_a_trained_artifact_is_measured_alike(model, yardstick, prompts, monkeypatch):
  router = RouterConfig()
  weights = jax.tree.map(lambda a: np.asarray(a) * 3, routers.init_router(router, jax.random.key(1), BLOCKS, 32))
  schedule = (0.0, 0.5, 0.5, 0.25, 0.5)
  made_for, crossover = str(IN_MEMORY), {"context": 10, "dtype": "float32", "machine": describe_machine()}
  artifact = Artifact("tiny", made_for, "llama", schedule, RoutingConfig(), router, weights, {}, crossover)
  baseline = baselines.from_artifact(model, artifact)
  judge = Judge(Frozen(CONFIG, model.params), artifact.routing, prompts, 2, 4)
  expected = judge.quality(routers.Router("dynamic", router, weights), np.array(schedule, np.float32))
  found, _ = yardstick.compare(baseline.engine)
  assert_close(found.kl, expected.kl, rtol=1e-3)
  assert baseline.sparsity == 0.35 and baseline.engine.prunes(3)
  monkeypatch.setattr(engine_module, "fingerprint", str)
  mixed, _ = yardstick.compare(Engine(model, artifact))  # shorter prompts fall back to the dense model
  assert_close(mixed.kl, np.where(prompts.context >= 10, found.kl, 0), atol=1e-5)


@pytest.mark.parametrize("name", ["static", "late_maps", "fastv", "mod"])
def test_a_baseline_runs_as_an_artifact(name, model, prompts, calibration, trained, yardstick, tmp_path, monkeypatch):
  """Written, read and run by the engine that serves FTP: the same routes and the same answers."""
  for module in (kinds, engine_module):
    monkeypatch.setattr(module, "fingerprint", str)
  baseline = trained[name] if name in trained else baselines.build(name, model, 0.4, calibration)
  artifacts.save(baselines.to_artifact(baseline, "tiny", {"kl": 0.5}), tmp_path)
  artifact = artifacts.load(tmp_path)
  assert artifact.base_model == "tiny" and artifact.figures == {"kl": 0.5}
  want, ours = yardstick.compare(baseline.engine)
  found, theirs = yardstick.compare(Engine(model, artifact))
  assert_close(found.kl, want.kl)
  for one, other in zip(theirs, ours):
    keep = [np.asarray(group.prefilled.cache.keep_LxBxT) for group in (*one.groups, *other.groups)]
    np.testing.assert_array_equal(*keep)


@pytest.mark.parametrize("name", ["random", "truncation", "skipgpt"])
def test_what_has_no_router_is_no_artifact(name, model, trained):
  baseline = trained[name] if name in trained else baselines.build(name, model, 0.4)
  with pytest.raises(UserError, match="cannot be an artifact, .* choose static, late, late_maps, fastv or mod"):
    baselines.to_artifact(baseline, "tiny", {})


def test_the_script_writes_late_maps_as_an_artifact(model, prompts, trained, yardstick, tmp_path, monkeypatch):
  script, asked = scripts.load("late_maps"), []
  monkeypatch.setattr(kinds, "fingerprint", str)
  monkeypatch.setattr(script, "run_config", lambda run: {"model": {"source": "tiny", "dtype": "float32"}})
  monkeypatch.setattr(script, "load_model", lambda source, dtype: model)
  monkeypatch.setattr(script.baselines, "build", lambda *args: asked.append(args) or trained["late_maps"])
  monkeypatch.setattr(script.baselines, "Yardstick", lambda *args: yardstick)
  flag = lambda name, value: monkeypatch.setattr(script, f"_{name}", types.SimpleNamespace(value=value))
  for name, value in dict(SPARSITY=1.0, STEPS=3, PROMPTS=4, BATCH=2, SEED=5).items():
    flag(name, value)
  run, out = tmp_path / "run", tmp_path / "made" / "here"
  with pytest.raises(UserError, match="must lie between 0 and 1"):
    script.make(run, out)
  flag("SPARSITY", 0.4)
  with pytest.raises(UserError, match="has no prompts yet; begin `ftp-jax run`"):
    script.make(run, out)
  (run / "data").mkdir(parents=True)
  for split in ("train", "validation", "test"):
    save_arrays(run / "data" / f"{split}.npz", **prompts._asdict())
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot be made or written"):
    script.make(run, tmp_path / "file" / "under")
  figures = script.make(run, out)
  flag("STEPS", 4)
  with pytest.raises(UserError, match="training was made with steps=3, now it is 4; name another --out"):
    script.make(run, out)
  (name, _, sparsity, calibration, seed), = asked
  assert (name, sparsity, seed) == ("late_maps", 0.4, 5) and calibration.directory == out / "training"
  assert (len(calibration.prompts.tokens), calibration.batch, calibration.steps) == (4, 2, 3)
  made = artifacts.load(out)
  assert made.digest == baselines.to_artifact(trained["late_maps"], "tiny", {}).digest and made.figures == figures
  assert figures["kl"] == pytest.approx(yardstick.record(trained["late_maps"])["kl"]) and "perplexity" not in figures


def test_mod_routes_every_other_block():
  np.testing.assert_allclose(mod.every_other(5, 0.2), [0, 0.5, 0, 0.5, 0])
  with pytest.raises(UserError, match="ask for less"):
    mod.every_other(4, 0.5)


@pytest.fixture(scope="module")
def trained(model, calibration):
  calibration = dataclasses.replace(calibration, steps=4)
  asked = {"mod": 0.2, "skipgpt": 0.2, "late_maps": 0.4}
  return {name: baselines.build(name, model, sparsity, calibration) for name, sparsity in asked.items()}


def test_mod_is_what_its_validation_saw(yardstick, trained):
  baseline = trained["mod"]
  assert baseline.facts["schedule"] == [0, 0.5, 0, 0.5, 0] and baseline.facts["routing"]["kv_mode"] == "evict"
  found, (prefix, *_) = yardstick.compare(baseline.engine)
  assert found.kl.mean() == pytest.approx(baseline.facts["validation_kl"], rel=1e-3)
  keep = np.asarray(prefix.groups[0].prefilled.cache.keep_LxBxT)[:, 0, :12]
  assert keep.sum(axis=1).tolist() == [12, 6, 12, 6, 12]


def test_skipgpt_is_what_its_validation_saw(yardstick, trained, windows):
  baseline = trained["skipgpt"]
  record = yardstick.record(baseline, windows)
  assert record["kl"] == pytest.approx(baseline.facts["validation_kl"], rel=1e-3)
  assert record["achieved"] == pytest.approx(0.2, abs=0.05)  # capacities are whole tokens of short contexts
  assert record["cache_ratio"] == pytest.approx(1, abs=0.04) and record["perplexity"] > 1


def test_skipgpt_validates_four_times_by_the_threshold_of_the_first_prompts(model, calibration, monkeypatch):
  found, capacities = [], skipgpt.capacities

  def counted(model, router, sparsity, prompts, batch):
    found.append(len(prompts.tokens))
    return capacities(model, router, sparsity, prompts, batch)

  monkeypatch.setattr(skipgpt, "capacities", counted)
  monkeypatch.setattr(skipgpt, "_VALIDATION_PROMPTS", 2)
  baselines.build("skipgpt", model, 0.2, dataclasses.replace(calibration, steps=4))
  assert found == [2, 2, 2, 2, len(calibration.prompts.tokens)] and len(calibration.prompts.tokens) > 2


def test_late_maps_move_what_late_blocks_skip(model, prompts, calibration):
  sharp = {**model.params["embed"], "final_norm": {"scale": model.params["embed"]["final_norm"]["scale"] * 30}}
  model = model_of({**model.params, "embed": sharp})
  baseline = baselines.build("late_maps", model, 0.4, dataclasses.replace(calibration, steps=4))
  late, yardstick = baselines.build("late", model, 0.4), Yardstick(model, prompts, 2)
  assert baseline.facts["schedule"] == late.facts["schedule"] == [0, 0, 0, 1, 1]
  found, (prefix, *_) = yardstick.compare(baseline.engine)
  assert found.kl.mean() == pytest.approx(baseline.facts["validation_kl"], rel=1e-3)
  plain, (of_late, *_) = yardstick.compare(late.engine)
  keep = lambda of: np.asarray(of.groups[0].prefilled.cache.keep_LxBxT)
  np.testing.assert_array_equal(keep(prefix), keep(of_late))
  assert found.kl.mean() < plain.kl.mean() / 2
  rank = CONFIG.hidden_size  # smaller than the method's 64
  assert baseline.arrays["stand_in"]["down"].shape == (BLOCKS, CONFIG.hidden_size, rank)
  more = baseline.costs(keep(prefix)[:, 0], 12).flops - late.costs(keep(prefix)[:, 0], 12).flops
  assert more == 4 * 12 * CONFIG.hidden_size * rank  # of block 3: nothing reads what the last block makes of them


def test_late_maps_begin_with_those_of_their_own_model_and_prompts(model, prompts, calibration, tmp_path, monkeypatch):
  begun = []

  def killed(**arguments):
    begun.append(arguments["router_params"])
    raise KeyboardInterrupt

  monkeypatch.setattr(late_maps, "train_router", killed)
  calibration = dataclasses.replace(calibration, directory=tmp_path)
  reversed_prompts = prompts._replace(tokens=np.flip(prompts.tokens, axis=0).copy())
  twice = model_of(jax.tree.map(lambda a: a * 2, model.params))
  for which, of in ((model, prompts), (model, prompts), (model, reversed_prompts), (twice, prompts)):
    with pytest.raises(KeyboardInterrupt):
      baselines.build("late_maps", which, 0.4, dataclasses.replace(calibration, prompts=of))
  first, again, *others = [maps["stand_in"]["up"] for maps in begun]
  np.testing.assert_array_equal(first, again)
  assert all(np.abs(other - first).max() > 1e-3 for other in others)
  assert len(list(tmp_path.glob("late_maps-*"))) == 2  # a folder a model


def test_an_interrupted_skipgpt_training_goes_on_to_the_same_router(model, calibration, trained, tmp_path, monkeypatch):
  calibration = dataclasses.replace(calibration, steps=4, directory=tmp_path)
  begun, indices_at = [], skipgpt.indices_at

  def killed_at_the_last_step(size, batch, number, seed):
    begun.append(number)
    if begun == [0, 1, 2, 3]:
      raise KeyboardInterrupt
    return indices_at(size, batch, number, seed)

  monkeypatch.setattr(skipgpt, "indices_at", killed_at_the_last_step)
  with pytest.raises(KeyboardInterrupt):
    baselines.build("skipgpt", model, 0.2, calibration)
  done = baselines.build("skipgpt", model, 0.2, calibration)
  assert begun == [0, 1, 2, 3, 3]  # the first three are not repeated
  assert done.facts == trained["skipgpt"].facts
  jax.tree.map(np.testing.assert_array_equal, done.arrays, trained["skipgpt"].arrays)
  with pytest.raises(UserError, match="the batch was 2 when the training"):
    baselines.build("skipgpt", model, 0.2, dataclasses.replace(calibration, batch=1))


def test_skipgpt_gives_the_sparsity_to_the_smallest_margins(model, prompts):
  bias = np.full((BLOCKS, 2), 3.0)
  bias[2, 1], bias[4, 0], bias[1, 0] = -1.0, -0.5, 0.0
  router = {"kernel": jnp.zeros((BLOCKS, 2, 32)), "bias": jnp.asarray(bias)}
  free = (prompts.context - 2).sum() / prompts.context.sum()  # the first and the last token are always computed
  asked = (0.6 + 0.4) * free / BLOCKS
  schedule, threshold = skipgpt.capacities(Frozen(CONFIG, model.params), router, asked, prompts, 2)
  expected = np.zeros((BLOCKS, 2))
  expected[2, 1] = expected[4, 0] = free
  assert_close(schedule, expected)
  np.testing.assert_array_equal(threshold, 0.0)


def test_skipgpt_learns_what_does_nothing(model, prompts, monkeypatch):
  monkeypatch.setattr(skipgpt, "LEARNING_RATE", 3e-3)
  sharp = {**model.params["embed"], "final_norm": {"scale": model.params["embed"]["final_norm"]["scale"] * 30}}
  quiet = model_of({**silenced(model.params, attention=(1,), mlp=(3,)), "embed": sharp})
  calibration = Calibration(prompts, prompts, batch=5, steps=80)
  schedule = np.array(baselines.build("skipgpt", quiet, 0.15, calibration).facts["schedule"])
  skipped = schedule * [0.4, 0.6] / BLOCKS
  assert skipped.sum() == pytest.approx(0.15, abs=0.02)
  # Of the last block's context outputs nothing is used.
  assert skipped[1, 0] + skipped[3, 1] + skipped[4].sum() > 0.7 * skipped.sum()


ALL = ("truncation", "random", "static", "late", "late_maps", "fastv", "shortgpt", "blockpruner", "mod", "skipgpt")


@pytest.mark.parametrize("name", ALL)
def test_what_is_saved_is_what_is_loaded(name, model, calibration, trained, tmp_path):
  baseline = trained[name] if name in trained else baselines.build(name, model, 0.4, calibration, seed=2)
  baselines.save(baseline, tmp_path)
  loaded = baselines.load(tmp_path, model)
  assert type(loaded) is type(baseline) and loaded.facts == json.loads(json.dumps(baseline.facts))
  assert (loaded.name, loaded.sparsity, loaded.seed) == (name, baseline.sparsity, baseline.seed)
  jax.tree.map(np.testing.assert_array_equal, loaded.arrays, baseline.arrays)
  if name in ("truncation", "shortgpt", "late_maps", "mod", "skipgpt"):  # every way to an engine
    np.testing.assert_array_equal(scores(loaded.engine), scores(baseline.engine))


def test_a_cell_is_built_once(model, yardstick, calibration, tmp_path, monkeypatch):
  first = yardstick.record(registry.baseline_at(tmp_path / "cell", "shortgpt", model, 0.4, calibration), None)
  assert first["method"] == "shortgpt" and first["achieved"] == pytest.approx(0.4) and first["perplexity"] is None
  monkeypatch.setattr(registry, "build", None)
  assert yardstick.record(registry.baseline_at(tmp_path / "cell", "shortgpt", model, 0.4, None), None) == first


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
