"""The whole pipeline on a tiny model: stages, resuming, changed settings, the artifact."""

import dataclasses
import importlib
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from ftp_jax import distributed, pipeline
from ftp_jax.config import get_config, paper_preset
from ftp_jax.data.prompts import Prompts
from ftp_jax.errors import UserError
from ftp_jax.evaluation.baselines import Yardstick, from_artifact
from ftp_jax.export import artifact
from ftp_jax.models.huggingface import fingerprint, save_params
from ftp_jax.models.sources import describe, load_model
from ftp_jax.pipeline import cells, checks, preparation
from ftp_jax.pipeline.directory import RunDirectory
from ftp_jax.routing import masked, routers, stand_in
from ftp_jax.stages import alone_in, load_arrays
from ftp_jax.training import allotment, guide
from tests import tiny
from tests.test_data import byte_tokenizer


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
  directory = tmp_path_factory.mktemp("model")
  tokenizer = byte_tokenizer()
  c = tiny.config(vocab_size=len(tokenizer), max_positions=128)
  hf = dict(
      model_type="llama", vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
      num_hidden_layers=c.num_blocks, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
      head_dim=c.head_dim, rms_norm_eps=c.norm_eps, tie_word_embeddings=True, max_position_embeddings=128,
  )
  save_params(tiny.params(c), c, directory, hf)
  tokenizer.save_pretrained(directory)
  return directory


def tiny_run(model_directory):
  config = get_config()
  config.sparsities = (0.25,)
  config.model.source = str(model_directory)
  with config.data.ignore_type():
    config.data.update(
        min_context=16, max_context=16, continuation=8, min_continuation=8, num_search=4, num_train=8,
        num_validation=4, num_test=5,
    )
  config.search.update(population=5, elite=2, generations=2, grid=8, max_sparsity=0.875, batch=4)
  config.train.update(steps=4, batch=4, validate_every=2, checkpoint_every=2, warmup=1, warmup_guide_steps=5)
  config.finetune.generations = 1
  config.evaluation.update(batch=4, perplexity_windows=2, perplexity_length=24, redundancy_prompts=4)
  return config


@pytest.fixture(scope="module")
def finished(model_directory, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  pipeline.run(tiny_run(model_directory), str(workdir))
  return workdir


def test_a_run_leaves_every_figure_and_the_artifact(finished, model_directory):
  records = json.loads((finished / "results.json").read_text())["records"]
  assert {r["method"] for r in records} == {
      "dense", "truncation", "static_uniform", "random", "static_ga", "dynamic_ga", "dynamic_finetuned",
  }
  for record in records:
    assert all(np.isfinite(record[k]) for k in ("kl", "nll", "agreement", "achieved", "flops_saved"))
    assert record["method"].startswith("static") or record["perplexity"] > 1
  assert (finished / "results.csv").read_text().count("\n") == len(records) + 1
  assert (finished / "report.html").stat().st_size > 10_000
  assert len(list((finished / "plots").glob("*.png"))) >= 5
  made = artifact.load(finished / "S0.25" / "seed0" / "artifact")
  assert made.fingerprint == fingerprint(model_directory)
  assert np.mean(made.schedule) == pytest.approx(0.25) and len(made.schedule) == 4
  assert made.figures["kl"] == [r for r in records if r["method"] == "dynamic_finetuned"][0]["kl"]
  trained = artifact.load_weights(finished / "S0.25" / "seed0" / "finetune" / "router.safetensors")
  jax.tree.map(np.testing.assert_array_equal, made.params, trained)
  assert made.params["out"]["kernel"].shape == (4, 64, 2)


def test_finished_stages_are_not_repeated(finished, model_directory):
  watched = [p for p in finished.rglob("*") if p.is_file() and p.name in ("done", "search_state.npz", "schedule.json")]
  before = {p: p.stat().st_mtime_ns for p in watched}
  pipeline.run(tiny_run(model_directory), str(finished))
  assert {p: p.stat().st_mtime_ns for p in watched} == before


def test_a_deleted_stage_is_made_again_with_the_same_result(finished, model_directory, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(finished, copy)
  cell = copy / "S0.25" / "seed0"
  for stage in ("search", "train", "finetune", "evaluate"):
    shutil.rmtree(cell / stage)
  pipeline.run(tiny_run(model_directory), str(copy), pipeline.STAGES[:-1])
  for name in ("search/schedule.json", "train/metrics.jsonl", "finetune/schedule.json", "evaluate/records.json"):
    assert (cell / name).read_text() == (finished / "S0.25" / "seed0" / name).read_text()


def test_a_run_with_maps_that_stand_in_for_skipped_blocks(finished, model_directory, tmp_path, monkeypatch):
  config = tiny_run(model_directory)
  config.stand_in.rank = 6
  config.train.stand_in_learning_rate = 1e-4
  train_router = cells.train_router

  def moved(**arguments):
    """A training whose best maps are far from those it began with."""
    found = train_router(**arguments)
    return found._replace(router=jax.tree.map(lambda a: a * 1.5, found.router))

  monkeypatch.setattr(cells, "train_router", moved)
  config.data.length_buckets = (20,)
  pipeline.run(config, str(tmp_path), pipeline.STAGES[:-1])
  made = artifact.load(tmp_path / "S0.25" / "seed0" / "artifact")
  assert stand_in.fits(made.stand_in, 4, 32) and made.stand_in["up"].shape[1] == 6
  fitted = artifact.load_weights(tmp_path / "importance" / "stand_in.safetensors")
  np.testing.assert_allclose(made.stand_in["up"], 1.5 * fitted["up"], atol=1e-6)
  records = {r["method"]: r for r in json.loads((tmp_path / "evaluate" / "records.json").read_text())}
  others = {r["method"]: r for r in json.loads((finished / "evaluate" / "records.json").read_text())}
  for method in ("dense", "truncation", "static_uniform", "random"):  # they have none
    assert records[method]["kl"] == pytest.approx(others[method]["kl"], rel=1e-3, abs=1e-6)
  model = load_model(str(model_directory))
  prompts = Prompts(**load_arrays(tmp_path / "data" / "test.npz"))
  found = Yardstick(model, prompts, 4).record(from_artifact(model, made))
  for name in ("kl", "flops_saved"):  # what is shipped computes what was judged
    assert found[name] == pytest.approx(records["dynamic_finetuned"][name], rel=1e-3, abs=1e-6)
  without = Yardstick(model, prompts, 4).record(from_artifact(model, dataclasses.replace(made, stand_in=None)))
  assert abs(without["kl"] / found["kl"] - 1) > 0.01 and without["flops_saved"] > found["flops_saved"]


def test_maps_of_too_high_a_rank_are_refused_before_weights_are_read(model_directory, tmp_path, monkeypatch):
  config = tiny_run(model_directory)
  config.stand_in.rank = 33
  monkeypatch.setattr(RunDirectory, "mesh", property(lambda self: pytest.fail("weights are asked for")))
  with pytest.raises(UserError, match="stand_in.rank=33 is more than the model's hidden size; use at most 32"):
    RunDirectory(config, tmp_path).model


def test_interrupted_gate_scores_go_on_with_the_next_batch(finished, model_directory, tmp_path, monkeypatch):
  config, asked, score = tiny_run(model_directory), [], guide.gate_fisher

  def stopped_at(call):
    def gate_fisher(*arguments, **options):
      asked.append(arguments)
      if len(asked) == call:
        raise KeyboardInterrupt
      return score(*arguments, **options)

    return gate_fisher

  monkeypatch.setattr(guide, "gate_fisher", stopped_at(2))
  with pytest.raises(KeyboardInterrupt):
    pipeline.run(config, str(tmp_path), pipeline.STAGES[:2])
  asked.clear()
  monkeypatch.setattr(guide, "gate_fisher", stopped_at(None))
  pipeline.run(config, str(tmp_path), pipeline.STAGES[:2])
  assert len(asked) == 1  # of two batches
  found, want = (np.load(path / "importance" / "fisher.npz")["fisher_LxNxT"] for path in (tmp_path, finished))
  np.testing.assert_array_equal(found, want)
  assert not list((tmp_path / "importance").glob("batch*"))


def test_scores_that_are_complete_are_kept_however_late_the_run_was_killed(finished, model_directory, tmp_path):
  copy = tmp_path / "run"
  for stage in ("data", "importance"):
    shutil.copytree(finished / stage, copy / stage)
  left = copy / "importance" / "batch0.npz"
  left.touch()
  pipeline.run(tiny_run(model_directory), str(copy), pipeline.STAGES[:2])
  before, after = (path / "importance" / "fisher.npz" for path in (finished, copy))
  assert not left.exists() and before.stat().st_mtime_ns == after.stat().st_mtime_ns


def test_a_file_that_is_needed_no_more_may_be_out_of_sight_but_not_changed(model_directory, tmp_path):
  config, text = tiny_run(model_directory), tmp_path / "text.txt"
  config.evaluation.perplexity_path = str(text)
  text.write_text("The quick brown fox jumps over the lazy dog. " * 10)
  pipeline.run(config, str(tmp_path / "run"), ("data",))
  text.rename(tmp_path / "elsewhere.txt")
  pipeline.run(config, str(tmp_path / "run"), ("data",))
  text.write_text("Another text.")
  with pytest.raises(UserError, match="was made with content of evaluation.perplexity_path="):
    pipeline.run(config, str(tmp_path / "run"), ("data",))


def test_passages_said_twice_are_trained_on_and_their_text_may_not_change(model_directory, tmp_path):
  config, text = tiny_run(model_directory), tmp_path / "book.txt"
  with config.data.ignore_type():
    config.data.update(max_context=30, num_repeats=4, repeats_path=str(text))
  config.train.warmup_guide_prompts = 12
  text.write_text("".join(chr(33 + n % 89) for n in range(300)))
  pipeline.run(config, str(tmp_path / "run"), pipeline.STAGES[:4])
  assert len(np.load(tmp_path / "run" / "data" / "train.npz")["tokens"]) == 12
  assert np.load(tmp_path / "run" / "importance" / "fisher.npz")["fisher_LxNxT"].shape[1] == 12
  text.write_text("Another text.")
  with pytest.raises(UserError, match="was made with content of data.repeats_path="):
    pipeline.run(config, str(tmp_path / "run"), pipeline.STAGES[:4])
  config.evaluation.perplexity_path = str(text)
  with pytest.raises(UserError, match="is that of evaluation.perplexity_path as well, which is evaluated on; name"):
    pipeline.run(config, str(tmp_path / "other"), pipeline.STAGES[:1])
  config.evaluation.perplexity_path, config.data.source, config.data.path = "", "text", str(text)
  with pytest.raises(UserError, match="is that of data.path as well"):
    pipeline.run(config, str(tmp_path / "other"), pipeline.STAGES[:1])


def test_two_runs_do_not_share_a_directory(model_directory, tmp_path):
  with alone_in(tmp_path), pytest.raises(UserError, match="Another run is writing to .*; wait for its end, or give an"):
    pipeline.run(tiny_run(model_directory), str(tmp_path), pipeline.STAGES[:1])
  pipeline.run(tiny_run(model_directory), str(tmp_path), pipeline.STAGES[:1])
  pipeline.run(tiny_run(model_directory), str(tmp_path), pipeline.STAGES[:1])  # each gives it back


def test_other_weights_in_the_same_place_are_noticed(finished, model_directory, tmp_path):
  model = tmp_path / "model"
  shutil.copytree(model_directory, model)
  config = tiny_run(model)
  pipeline.run(config, str(tmp_path / "run"), pipeline.STAGES[:1])
  c = tiny.config(vocab_size=len(byte_tokenizer()), max_positions=128)
  (model / "model.safetensors").unlink()
  save_params(tiny.params(c, seed=1), c, model, json.loads((model / "config.json").read_text()))
  with pytest.raises(UserError, match="are not those that .* was begun with; give another --workdir"):
    pipeline.run(config, str(tmp_path / "run"), pipeline.STAGES[:2])


def test_another_config_of_the_same_weights_is_noticed(model_directory, tmp_path):
  """Same weights with other angles or norms are another function: stages of the two do not mix."""
  model, run = tmp_path / "model", tmp_path / "run"
  shutil.copytree(model_directory, model)
  pipeline.run(tiny_run(model), str(run), pipeline.STAGES[:1])
  described = json.loads((model / "config.json").read_text())
  (model / "config.json").write_text(json.dumps(described | {"rope_theta": 1e6, "rope_parameters": None}))
  with pytest.raises(UserError, match=r"now says rope_theta=1000000.0, and \d+.0 when .* was begun; restore it"):
    pipeline.run(tiny_run(model), str(run), pipeline.STAGES[:2])
  remembered = json.loads((run / "data" / "model.json").read_text())
  (run / "data" / "model.json").write_text(json.dumps({"fingerprint": remembered["fingerprint"]}))
  pipeline.run(tiny_run(model), str(run), pipeline.STAGES[:1])  # an earlier version wrote no more


def test_an_artifact_does_not_outlive_what_it_is_made_of(finished, model_directory, tmp_path):
  copy = tmp_path / "run"
  shutil.copytree(finished, copy)
  cell = copy / "S0.25" / "seed0"
  crossover = {"context": 7, "machine": {"device": "cpu"}}
  measured = dataclasses.replace(artifact.load(cell / "artifact"), crossover=crossover)
  artifact.save(measured, cell / "artifact")
  shutil.rmtree(cell / "evaluate")
  pipeline.run(tiny_run(model_directory), str(copy), ("evaluate",))
  assert artifact.load(cell / "artifact").crossover == crossover  # evaluated again, it computes the same
  stages = ("search", "train", "finetune", "evaluate")
  for i, stage in list(enumerate(stages))[2::-1]:
    artifact.save(measured, cell / "artifact")
    for later in stages[i:]:
      shutil.rmtree(cell / later, ignore_errors=True)
    pipeline.run(tiny_run(model_directory), str(copy), (stage,))
    with pytest.raises(UserError, match="has no ftp_config.json"):
      artifact.load(cell / "artifact")


def test_figures_keep_their_machine(finished, model_directory, tmp_path):
  copy = tmp_path / "run"
  shutil.copytree(finished, copy)
  machine = json.loads((finished / "results.json").read_text())["machine"]
  assert json.loads((finished / "evaluate" / "machine.json").read_text()) == machine
  (copy / "evaluate" / "machine.json").write_text(json.dumps(machine | {"cpu": "another"}))
  pipeline.run(tiny_run(model_directory), str(copy), ("report",))
  assert json.loads((copy / "results.json").read_text())["machine"]["cpu"] == "another"


@pytest.mark.parametrize("section,key,value,stage", [
    ("train", "learning_rate", 1e-2, "train"), ("search", "grid", 16, "search"), ("data", "num_test", 6, "data"),
])
def test_changed_settings_of_a_finished_stage_are_named(finished, model_directory, section, key, value, stage):
  config = tiny_run(model_directory)
  config[section][key] = value
  with pytest.raises(UserError, match=rf"{section}.{key}") as error:
    pipeline.run(config, str(finished))
  assert f"/{stage} was made" in str(error.value)
  saved = json.loads((finished / "config.json").read_text())
  assert saved[section][key] != value


def test_methods_without_a_seed_do_not_outlive_the_prompts_they_were_measured_on(finished, model_directory, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(finished, copy)
  for stage in ("data", "importance", "S0.25"):
    shutil.rmtree(copy / stage)
  with pytest.raises(UserError, match="evaluate/S0.00 was made from .*data, which is missing"):
    pipeline.run(tiny_run(model_directory), str(copy))


def test_another_sparsity_and_seed_only_add_cells(finished, model_directory, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(finished, copy)
  config = tiny_run(model_directory)
  config.sparsities, config.seeds = (0.25, 0.5), (0, 1)
  before = (copy / "S0.25" / "seed0" / "search" / "done").stat().st_mtime_ns
  pipeline.run(config, str(copy), pipeline.STAGES[:3])
  for cell in ("S0.25/seed1", "S0.50/seed0", "S0.50/seed1"):
    schedule = json.loads((copy / cell / "search" / "schedule.json").read_text())
    assert np.mean(schedule) == pytest.approx(float(cell[1:5]))
  assert (copy / "S0.25" / "seed0" / "search" / "done").stat().st_mtime_ns == before


def test_an_interrupted_stage_goes_on_only_with_its_own_settings(finished, model_directory, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(finished, copy)
  (copy / "S0.25" / "seed0" / "search" / "done").unlink()
  config = tiny_run(model_directory)
  config.search.batch = 2
  with pytest.raises(UserError, match="search.batch"):
    pipeline.run(config, str(copy))
  pipeline.run(tiny_run(model_directory), str(copy), ("search",))
  assert (copy / "S0.25" / "seed0" / "search" / "done").exists()


def test_a_schedule_file_must_have_the_mean_that_is_asked(finished, model_directory, tmp_path):
  copy, file = tmp_path / "copy", tmp_path / "schedule.json"
  shutil.copytree(finished, copy)
  shutil.rmtree(copy / "S0.25")
  shutil.rmtree(copy / "evaluate")
  config = tiny_run(model_directory)
  config.search.schedule, config.search.schedule_path = "file", str(file)
  file.write_text("[0.0, 0.5, 0.5, 0.5]")
  with pytest.raises(UserError, match="mean sparsity of 0.3750"):
    pipeline.run(config, str(copy), ("search",))
  file.write_text("[0.0, 0.0, 0.01, 0.99]")  # what is cut off would go to the dense blocks
  with pytest.raises(UserError, match="asks 0.99 of block 3, where search.max_sparsity=.* allows 0.875"):
    pipeline.run(config, str(copy), ("search",))
  file.write_text("[0.0, 0.25, 0.5, 0.25]")
  shutil.rmtree(copy / "S0.25")
  pipeline.run(config, str(copy), ("search",))
  assert json.loads((copy / "S0.25" / "seed0" / "search" / "schedule.json").read_text()) == [0.0, 0.25, 0.5, 0.25]
  file.unlink()  # the finished search needs it no more
  pipeline.run(config, str(copy), ("search",))
  file.write_text("[0.25, 0.25, 0.25, 0.25]")
  with pytest.raises(UserError, match="content of search.schedule_path"):
    pipeline.run(config, str(copy), ("search",))


def test_a_damaged_stage_file_is_named(finished, model_directory, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(finished, copy)
  (copy / "data" / "test.npz").write_bytes(b"nonsense")
  shutil.rmtree(copy / "evaluate")
  with pytest.raises(UserError, match="test.npz"):
    pipeline.run(tiny_run(model_directory), str(copy))


def test_paper_preset_with_per_block_router_and_two_rounds(model_directory, tmp_path):
  config = paper_preset(tiny_run(model_directory))
  config.router.kind = "per_block"
  config.finetune.rounds = 2
  pipeline.run(config, str(tmp_path), pipeline.STAGES[:5])
  assert not (tmp_path / "importance" / "fisher.npz").exists()
  finetune = tmp_path / "S0.25" / "seed0" / "finetune"
  assert (finetune / "round1" / "schedule.json").exists()
  assert artifact.load_weights(finetune / "router.safetensors")["hidden"]["kernel"].shape == (4, 4, 64)


def test_one_pass_of_a_global_router_is_trained_for_nested_routes(model_directory, tmp_path):
  config = tiny_run(model_directory)
  config.routing.update(kv_mode="evict", one_pass_block=1)
  config.router.update(kind="global", factors=("position", "score", "rank"))
  config.search.schedule = "fisher"
  pipeline.run(config, str(tmp_path), pipeline.STAGES[:4])
  asked = json.loads((tmp_path / "S0.25" / "seed0" / "search" / "schedule.json").read_text())
  assert asked[0] == 0 and np.mean(asked) == pytest.approx(0.25)
  run = RunDirectory(config, tmp_path)
  trained = artifact.load_weights(tmp_path / "S0.25/seed0/train/router.safetensors")
  own, scores = run.fisher, run.guide_data.fisher_LxNxT
  np.testing.assert_allclose(scores[0], own.sum(axis=0), rtol=1e-5)
  np.testing.assert_allclose(scores[3], own[1:].sum(axis=0), rtol=1e-5)
  prompts, router = run.prompts("test"), routers.Router("dynamic", run.router_config, trained)
  keep = masked.forward(
      run.frozen.config, run.routing, run.frozen.params, router, *prompts, np.array([0.25, 0.5, 0.75, 0.25])
  ).keep_LxBxT[:, :, :16]
  assert keep.sum(axis=(1, 2)).tolist() == [5 * 12, 5 * 8, 5 * 4, 5 * 12]
  assert (keep[2] <= keep[1]).all() and (keep[1] <= keep[3]).all()


def test_an_allotted_schedule_is_where_routers_lose_least(model_directory, tmp_path, monkeypatch):
  config = tiny_run(model_directory)
  config.routing.one_pass_block, config.finetune.rounds = 1, 0
  config.search.schedule, config.router.kind = "allotted", "global"  # whose guide has other scores than the blocks' own
  allotted, allot = [], allotment.allot
  monkeypatch.setattr(allotment, "allot", lambda losses, total: allotted.append(losses) or allot(losses, total))
  pipeline.run(config, str(tmp_path), pipeline.STAGES[:5])
  run, cell = RunDirectory(config, tmp_path), tmp_path / "S0.25" / "seed0"
  asked = run.schedule(cell / "finetune")
  assert asked[0] == 0 and np.mean(asked) == pytest.approx(0.25)
  np.testing.assert_array_equal(asked, run.schedule(cell / "search"))
  uniform = np.full(4, 0.25)
  assert config.train.fisher_share == 0.5 and np.any(run.training_schedule(uniform, 0.25, 0.5) != uniform)
  np.testing.assert_array_equal(run.training_schedule(uniform, 0.25), uniform)  # as it is
  # Routers of one half of the prompts, warmed up in nearly the Fisher schedule, lose least there on the other half.
  grid, rows = config.search.grid, np.arange(8)
  from_fisher = run.named_schedule("fisher", 0.25) / grid
  warm = np.maximum(from_fisher, (np.arange(4) > 0) / grid)
  losses = 0
  for half in (rows % 2 == 0, rows % 2 == 1):
    router = cells.warm_up(run, cells.new_router(run, 0), warm.astype(np.float32), 0, rows[half])
    losses += allotment.expected_loss(
        run.router_config, run.routing, router, run.guide_data, run.fisher, warm, np.arange(8) / grid, rows[~half], 4
    )
  np.testing.assert_allclose(allotted[0], losses / 2, rtol=1e-5)
  np.testing.assert_array_equal(asked * grid, allot(losses / 2, 8))
  assert from_fisher[1:].min() == 0 and np.isfinite(losses[1:]).all()
  # It is found again, and with another warm-up refused: it would be another.
  before = (cell / "search" / "schedule.json").read_bytes()
  shutil.rmtree(cell)
  pipeline.run(config, str(tmp_path), ("search",))
  assert (cell / "search" / "schedule.json").read_bytes() == before
  for section, key, value in (
      ("train", "warmup_guide_steps", 6), ("train", "warmup_guide_learning_rate", 0.1), ("train", "batch", 2),
      ("router", "hidden_size", 8),
  ):
    other = config.copy_and_resolve_references()
    other[section][key] = value
    with pytest.raises(UserError, match=f"{section}.{key}"):
      pipeline.run(other, str(tmp_path), ("search",))
  large = config.copy_and_resolve_references()
  large.train.warmup_guide_prompts = large.data.num_train = 10**12
  with pytest.raises(UserError, match="GB of this machine's"):
    pipeline.run(large, str(tmp_path / "large"), pipeline.STAGES[:3])
  config.train.warmup_guide_learning_rate = 1e30
  with pytest.raises(UserError, match="warm-up has diverged; lower train.warmup_guide_learning_rate"):
    pipeline.run(config, str(tmp_path / "other"), pipeline.STAGES[:3])


def test_new_tokens_that_skip_are_trained_and_reported(model_directory, tmp_path):
  config = tiny_run(model_directory)
  config.routing.update(decode_sparsity=0.15, one_pass_block=1)
  config.router.factors = ("sparsity",)
  config.search.schedule, config.finetune.rounds = "fisher", 0
  pipeline.run(config, str(tmp_path), pipeline.STAGES[:-1])
  cell = tmp_path / "S0.25" / "seed0"
  lines = [json.loads(line) for line in (cell / "train" / "metrics.jsonl").read_text().splitlines()]
  shares = [line["decode_achieved"] for line in lines if "loss" in line]
  assert len(shares) == 4 and all(0 < share < 0.7 for share in shares)
  made, run = artifact.load(cell / "artifact"), RunDirectory(config, tmp_path)
  assert made.routing.decode_sparsity == 0.15
  prompts, (router, model) = run.prompts("test"), run.load_trained(cell / "finetune")
  keep = np.asarray(masked.forward(
      model.config, run.routing, model.params, router, *prompts, run.schedule(cell / "finetune")
  ).keep_LxBxT)
  after = [1 - keep[:, n, 16:23].mean() for n in range(len(prompts.tokens))]
  assert made.figures["decode_achieved"] == pytest.approx(np.mean(after)) and 0 < np.mean(after) < 0.7
  asked = run.schedule(cell / "search")
  decided = run.training_scores(asked)[asked > 0, :, 16:23]
  assert set(np.unique(decided)) == {0, 1}
  assert np.mean(decided == 0) == pytest.approx(0.15 * 4 / np.sum(asked > 0), abs=0.02)


def test_routers_a_block_learn_the_scores_of_their_blocks_whichever_block_evicts_first(model_directory, tmp_path):
  runs = []
  for first in (0, 2):
    config = tiny_run(model_directory)
    config.routing.update(kv_mode="evict", one_pass_block=1, evict_from=first)
    config.router.kind = "per_block"
    pipeline.run(config, str(tmp_path / str(first)), pipeline.STAGES[:2])
    runs.append(RunDirectory(config, tmp_path / str(first)))
  np.testing.assert_array_equal(runs[0].guide_scores, runs[0].fisher)
  np.testing.assert_array_equal(runs[1].guide_scores, runs[0].fisher)


@pytest.mark.parametrize("change,named", [
    (lambda c: c.update(sparsities=(0.99,)), "out of reach"),
    (lambda c: c.update(sparsities=()), "sparsities"),
    (lambda c: c.search.update(schedule="anneal"), "search.schedule"),
    (lambda c: c.search.update(seed_schedules=("early",)), "seed_schedules"),
    (lambda c: c.search.update(seed_schedules=()), "seed_schedules"),
    (lambda c: c.search.update(seed_schedules=([1],)), "seed_schedules"),
    (lambda c: c.router.update(factors=([1],)), "router.factors"),
    (lambda c: c.search.update(grid=40_001), "search.grid must be from 1 to 40000"),
    (lambda c: (c.search.update(grid=2), c.update(sparsities=(0.05,))), "less than half a step of search.grid=2"),
    (lambda c: c.train.update(distill_weight=float("inf")), "train.distill_weight=inf is no finite number"),
    (lambda c: c.stand_in.update(rank=2, ridge=float("inf")), "stand_in.ridge=inf is no finite number"),
    (lambda c: c.update(sparsities=(0.3, 0.304)), "two decimals"),
    (lambda c: c.update(sparsities=(0.0,)), "out of reach"),
    (lambda c: c.update(sparsities=(0.004,)), "out of reach"),  # its folder would be that of dense
    (lambda c: c.train.update(validate_every=0), "train.validate_every"),
    (lambda c: c.train.update(stand_in_learning_rate=1e-3), "stand_in_learning_rate=0.001 has no maps to train; set"),
    (lambda c: c.finetune.update(rounds=0), "finetune.rounds=0 .* search.schedule='fisher'"),
    (lambda c: (c.search.update(schedule="allotted"), c.train.update(guide="static")), "judges routers after .* guide"),
    (lambda c: (c.search.update(schedule="allotted"), c.train.update(warmup_guide_steps=0)), "_guide_steps above 0"),
    (lambda c: (c.search.update(schedule="allotted"), c.train.update(warmup_guide_prompts=1)), "train to at least 2"),
    (lambda c: (c.search.update(schedule="allotted"), c.routing.update(one_pass_block=3), c.update(sparsities=(0.25,))),
     "0.25 is more than the blocks from 3 on can skip, and with search.schedule='allotted'"),
    (lambda c: c.search.update(seed_schedules=("allotted",)), "seed_schedules must name one or more of .*, fisher\\."),
    (lambda c: (c.search.update(schedule="fisher"), c.routing.update(one_pass_block=3), c.update(sparsities=(0.25,))),
     "0.25 is more than the blocks from 3 on can skip"),
    (lambda c: c.update(seeds=(-1,)), "seeds"),
    (lambda c: c.model.update(remat="some"), "model.remat"),
    (lambda c: c.train.update(batch=0), "train.batch"),
    (lambda c: c.train.update(fisher_share=1.5), "fisher_share"),
    (lambda c: c.data.update(chat=True), "data.chat"),
    (lambda c: c.evaluation.update(perplexity_length=500), "perplexity_length"),
    (lambda c: c.model.update(dtype="float8"), "model.dtype"),
    (lambda c: c.data.update(max_context=200, min_context=200), "positions"),
    (lambda c: c.routing.update(kv_mode="evict", evict_from=99), "evict_from=99 does not exist"),
    (lambda c: c.routing.update(one_pass_block=99), "one_pass_block=99 does not exist"),
    (lambda c: c.routing.update(decode_sparsity=0.1, decode_threshold=0.6), "decode_threshold=0.6 is not what"),
    (lambda c: (c.search.update(schedule="fisher"), c.routing.update(decode_sparsity=0.8, one_pass_block=1)),
     "decode_sparsity=0.8 would take all of the 3 blocks that can skip"),
    (lambda c: (c.data.update(continuation=1, min_continuation=1), c.routing.update(decode_sparsity=0.1)),
     "data.continuation=1 leaves no new token"),
    (lambda c: c.routing.update(bucket_multiple=16), "bucket_multiple=16 .* nothing skips"),
    (lambda c: c.update(seeds=(2**32,)), "seeds=.* must be whole numbers from 0 to"),
    (lambda c: c.data.update(seed=2**63), "data.seed=.* must be less than"),
    (lambda c: c.data.update(source="foo"), "data.source='foo' is unknown"),
    (lambda c: c.data.update(continuation=0), "data.continuation=0 are not in order"),
    (lambda c: c.data.update(source="text", path="nowhere.txt"), "nowhere.txt cannot be read"),
    (lambda c: c.evaluation.update(perplexity_path="nowhere.txt"), "nowhere.txt cannot be read"),
    (lambda c: c.evaluation.update(perplexity_windows=0), "0 perplexity windows"),
    (lambda c: c.train.update(clip=float("nan")), "train.clip=nan; give it a value, such as 1.0"),
    (lambda c: c.train.update(guide_weight=-1.0), "train.guide_weight=-1.0 must be at least 0"),
    (lambda c: c.train.update(warmup_guide_learning_rate=-1.0), "warmup_guide_learning_rate=-1.0 must be at least 0"),
    (lambda c: c.train.update(warmup_guide_prompts=10**12, batch=4) or c.data.update(num_train=10**12),
     "hidden states of train.warmup_guide_prompts=1000000000000 take .* GB of this machine's"),
])
def test_impossible_settings_are_one_sentence(model_directory, tmp_path, change, named):
  config = tiny_run(model_directory)
  change(config)
  with pytest.raises(UserError, match=named) as error:
    pipeline.run(config, str(tmp_path), pipeline.STAGES[:4])
  assert not (tmp_path / "data" / "done").exists()
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("section,key", [("train", "steps"), ("evaluation", "perplexity_path"), ("routing", "kv_mode")])
def test_keys_without_a_value_are_one_sentence(model_directory, tmp_path, section, key):
  config = tiny_run(model_directory)
  with config[section].ignore_type():
    config[section][key] = None
  with pytest.raises(UserError, match=f"The config has {section}.{key}=None; give it a value"):
    pipeline.run(config, str(tmp_path))


@pytest.mark.parametrize("change", [
    lambda c: c.data.update(source="prompts", path="nowhere.jsonl"),
    lambda c: c.data.update(min_context=17),
    lambda c: c.evaluation.update(perplexity_path="nowhere.txt"),
])
def test_what_is_wrong_with_the_data_shows_before_a_model_is_fetched(tmp_path, change):
  config = tiny_run("no/such-model-anywhere")
  change(config)
  with pytest.raises(UserError, match="nowhere|not in order"):
    pipeline.run(config, str(tmp_path))


def test_what_only_later_stages_need_stops_no_earlier_one(model_directory, tmp_path):
  config = tiny_run(model_directory)
  config.train.warmup_guide_prompts = config.data.num_train = 10**12
  with pytest.raises(UserError, match="1000000000000 train"):  # too few prompts: it went as far as to look for them
    pipeline.run(config, str(tmp_path), pipeline.STAGES[:3])
  config = tiny_run(model_directory)
  config.evaluation.perplexity_path = "nowhere.txt"
  shutil.rmtree(tmp_path)
  tmp_path.mkdir()
  with pytest.raises(UserError, match="run the stage .evaluate. first"):  # not that the file is missing
    pipeline.run(config, str(tmp_path), ("report",))


def test_a_multiple_above_all_contexts_is_for_argmax_alone(model_directory):
  config = tiny_run(model_directory)
  config.routing.update(bucket_multiple=64, selection="argmax")
  checks.check_config(config)
  config.routing.selection = "topk"
  with pytest.raises(UserError, match="rounds what contexts .* keep up to all of them"):
    checks.check_config(config)


def test_a_stage_that_made_nothing_may_begin_with_other_settings(model_directory, tmp_path, monkeypatch):
  config = tiny_run(model_directory)

  def full(*arguments, **named):
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

  with monkeypatch.context() as patch:
    patch.setattr(preparation.redundancy, "token_similarity", full)
    with pytest.raises(RuntimeError):
      pipeline.run(config, str(tmp_path), ("data", "importance"))
  config.train.batch = 2
  pipeline.run(config, str(tmp_path), ("data", "importance"))


def test_a_foreign_config_is_not_overwritten(finished, model_directory, tmp_path):
  """Of a model, for instance; the report of a run changes no config either."""
  config, path = tiny_run(model_directory), tmp_path / "config.json"
  for text in (json.dumps({"model_type": "llama"}), "[]", "{"):
    path.write_text(text)
    for stages in (pipeline.STAGES, ("report",)):
      with pytest.raises(UserError, match="not the config of a run; give another --workdir"):
        pipeline.run(config, str(tmp_path), stages)
    assert path.read_text() == text and list(tmp_path.iterdir()) == [path]
  before = (finished / "config.json").read_text()
  config.search.batch += 1
  with pytest.raises(UserError):
    pipeline.run(config, str(finished), ("report",))
  assert (finished / "config.json").read_text() == before
  without = tmp_path / "without"
  shutil.copytree(finished, without)
  (without / "config.json").unlink()
  pipeline.run(tiny_run(model_directory), str(without), ("report",))
  assert not (without / "config.json").exists()


def test_a_run_without_finetuning_has_no_row_of_it_and_one_that_trains_no_maps_keeps_those_fitted(
    model_directory, tmp_path
):
  config = tiny_run(model_directory)
  config.stand_in.rank = 6
  config.search.schedule, config.finetune.rounds, config.train.steps = "fisher", 0, 1
  pipeline.run(config, str(tmp_path))
  records = json.loads((tmp_path / "results.json").read_text())["records"]
  trained = [r for r in records if r["method"].startswith("dynamic")]
  assert [(r["method"], r["schedule"]) for r in trained] == [("dynamic_ga", "fisher")]
  made = artifact.load(tmp_path / "S0.25" / "seed0" / "artifact")
  assert made.figures["kl"] == trained[0]["kl"]
  fitted = artifact.load_weights(tmp_path / "importance" / "stand_in.safetensors")
  jax.tree.map(np.testing.assert_array_equal, made.stand_in, fitted)
  assert "dynamic + fisher" in (tmp_path / "report.html").read_text()


def test_damaged_artifacts_are_refused(finished, tmp_path):
  source = finished / "S0.25" / "seed0" / "artifact"
  for name, content, named in [
      (artifact.CONFIG_FILE, "{", "ftp_config.json"),
      (artifact.CONFIG_FILE, json.dumps({"format_version": 99}), "update ftp_jax"),
      (artifact.CONFIG_FILE, json.dumps({"format_version": 1}), "incomplete"),
      (artifact.WEIGHTS_FILE, "x", "router.safetensors"),
  ]:
    copy = tmp_path / named
    shutil.copytree(source, copy)
    (copy / name).write_text(content)
    with pytest.raises(UserError, match=named):
      artifact.load(copy)
  with pytest.raises(UserError, match="no ftp_config.json"):
    artifact.load(tmp_path / "nowhere")


@pytest.mark.parametrize("change, message", [
    ({"routing": {"one_pass_block": 2.0}}, "one_pass_block=2.0 is not of the type of -1"),
    ({"routing": {"score_window": None}}, "incomplete or wrong"),
    ({"routing": {"bucket_multiple": True}}, "bucket_multiple=True is not of the type of 1"),
    ({"routing": {"decode_threshold": "0.5"}}, "incomplete or wrong"),
    ({"router": {"hidden_states": "no"}}, "hidden_states='no' is not of the type of False"),
    ({"router": {"hidden_size": "8"}}, "hidden_size='8' is not of the type of 64"),
    ({"figures": None}, "incomplete or wrong"),
    ({"crossover": {"context": "512", "machine": {}}}, "names no context and machine"),
    ({"crossover": 512}, "incomplete or wrong"),
    ({"crossover": {"context": 512, "machine": {}}}, "names no context and machine"),
    ({"crossover": {"context": 512, "machine": "here"}}, "incomplete or wrong"),
    ({"base_model": None}, "base_model=None is no text"),
    ({"schedule": []}, "schedule is not one number from 0 to 1 for each block"),
    ({"schedule": [0.5, None, 0.5, 0.5]}, "schedule is not one number from 0 to 1 for each block"),
])
def test_an_artifact_whose_config_was_edited_to_something_else_is_refused(finished, tmp_path, change, message):
  copy = tmp_path / "artifact"
  shutil.copytree(finished / "S0.25" / "seed0" / "artifact", copy)
  described = json.loads((copy / artifact.CONFIG_FILE).read_text())
  for key, value in change.items():
    described[key] = described[key] | value if key in ("routing", "router") else value
  (copy / artifact.CONFIG_FILE).write_text(json.dumps(described))
  with pytest.raises(UserError, match=message) as error:
    artifact.load(copy)
  assert str(error.value).startswith(str(copy / artifact.CONFIG_FILE))


@pytest.mark.parametrize("tensor", ["stand_in", "hidden"])
def test_tensors_that_are_named_as_groups_of_others_are_refused(finished, tmp_path, tensor):
  copy = tmp_path / "artifact"
  shutil.copytree(finished / "S0.25" / "seed0" / "artifact", copy)
  weights = safetensors_numpy.load_file(copy / artifact.WEIGHTS_FILE)
  safetensors_numpy.save_file({tensor: np.zeros(1, np.float32)} | weights, copy / artifact.WEIGHTS_FILE)
  with pytest.raises(UserError, match=f"{artifact.WEIGHTS_FILE} (has 'stand_in' for a tensor|cannot be read)"):
    artifact.load(copy)


def test_an_equal_artifact_stays_when_its_second_writing_fails(finished, model_directory, tmp_path, monkeypatch):
  copy = tmp_path / "run"
  shutil.copytree(finished, copy)
  cell = copy / "S0.25" / "seed0"
  crossover = {"context": 7, "machine": {"device": "cpu"}}
  artifact.save(dataclasses.replace(artifact.load(cell / "artifact"), crossover=crossover), cell / "artifact")
  shutil.rmtree(cell / "evaluate")

  def full(*args, **options):
    raise UserError("There is no space left.")

  with monkeypatch.context() as patch:
    patch.setattr(artifact, "save", full)
    with pytest.raises(UserError, match="no space left"):
      pipeline.run(tiny_run(model_directory), str(copy), ("evaluate",))
  assert artifact.load(cell / "artifact").crossover == crossover


def test_whole_numbers_may_stand_for_fractions_in_an_artifact(finished, tmp_path):
  copy = tmp_path / "artifact"
  shutil.copytree(finished / "S0.25" / "seed0" / "artifact", copy)
  described = json.loads((copy / artifact.CONFIG_FILE).read_text())
  described["routing"]["decode_sparsity"] = 0
  (copy / artifact.CONFIG_FILE).write_text(json.dumps(described))
  assert artifact.load(copy).routing.decode_sparsity == 0


def test_a_mesh_that_a_batch_does_not_divide_by_is_refused_before_anything_is_written(model_directory, tmp_path):
  config = tiny_run(model_directory)
  config.mesh.data = 8
  with pytest.raises(UserError, match=r"train.batch=4 must be a multiple of mesh.data \* mesh.fsdp = 8"):
    pipeline.run(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_process_with_another_copy_of_the_model_is_named(model_directory, tmp_path, monkeypatch):
  config, _, directory = describe(str(model_directory))
  checks.check_same_model(config, directory)
  monkeypatch.setattr(distributed, "num_processes", lambda: 2)
  shared = {}
  monkeypatch.setattr(distributed, "from_first", lambda make: shared.setdefault("first", make()))
  checks.check_same_model(config, directory)
  checks.check_same_model(config, directory)
  with pytest.raises(UserError, match="has other weights or another config.json than that of process 0; copy the same"):
    checks.check_same_model(dataclasses.replace(config, norm_eps=1.0), directory)
  other = tmp_path / "other"
  shutil.copytree(model_directory, other)
  (other / "model.safetensors").unlink()
  save_params(tiny.params(config, seed=1), config, other, json.loads((other / "config.json").read_text()))
  with pytest.raises(UserError, match="has other weights"):
    checks.check_same_model(config, other)


def test_processes_that_were_asked_for_different_things_are_named(model_directory, tmp_path, monkeypatch):
  def first(make):
    theirs = json.loads(make())
    return json.dumps(theirs | {"train.steps": 7}).encode()

  monkeypatch.setattr(distributed, "from_first", first)
  with pytest.raises(UserError, match="train.steps is 7 in process 0 and 4 in process 0; start the very same"):
    pipeline.run(tiny_run(model_directory), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_run_directory_that_a_process_does_not_see_is_named(tmp_path):
  with pytest.raises(UserError, match="does not see .*config.json, which process 0 wrote; give a --workdir that all"):
    checks.check_shared(tmp_path / "config.json")


def test_ablations_share_what_a_variant_leaves_alone(finished, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "clear_caches", lambda: None)  # between variants, for the sake of memory
  ablations = importlib.import_module("experiments.ablations")
  table = ablations.run_variants(finished, tmp_path, ["as it is", "uniform", "without score"], 0.25, [0], 6)
  records = json.loads((tmp_path / "ablations_S0.25.json").read_text())["records"]
  assert [(r["part"], r["variant"]) for r in records] == [
      ("", "as it is"), ("schedule", "uniform"), ("inputs", "without score")
  ]
  assert table.count("\n") == 4 and "| schedule | uniform |" in table
  # Unchanged, the stages are those of the run, and so are the figures where the prompts are the same.
  cell = tmp_path / "as_it_is" / "S0.25" / "seed0"
  config = ablations.config_of(json.loads((finished / "config.json").read_text()), 0.25, [0], {})
  own = RunDirectory(config, tmp_path / "as_it_is")
  of_run = {r["method"]: r for r in json.loads((finished / "results.json").read_text())["records"]}
  on_test = ablations.measure(own, own.judge("test", 4), cell)
  for method, figures in zip(("static_ga", "dynamic_ga", "dynamic_finetuned"), on_test):
    for name in ("kl", "agreement", "achieved", "flops_saved"):
      assert figures[name] == pytest.approx(of_run[method][name], rel=1e-6)
  (line,) = [line for line in table.splitlines() if "| uniform |" in line]
  difference = records[1]["figures"][2]["kl"] - records[0]["figures"][2]["kl"]
  assert f"| {difference:+.3f} ± " in line
  # The prompts it is judged on are in no set of the run.
  judged = ablations.development_prompts(own, finished, 6)
  rows = lambda tokens: {row.tobytes() for row in tokens}
  assert len(rows(judged.tokens)) == 6
  for split in ("search", "train", "validation", "test"):
    assert not rows(judged.tokens) & rows(own.prompts(split).tokens)
  with pytest.raises(UserError, match="--prompts=1000000 development prompts are needed"):
    ablations.development_prompts(own, finished, 10**6)
  # Nor may they be in a set of the variant.
  more = tmp_path / "more"
  shutil.copytree(tmp_path / "as_it_is" / "data", more / "data")
  arrays = dict(np.load(more / "data" / "train.npz"))
  np.savez(more / "data" / "train.npz", **arrays | {"tokens": arrays["tokens"] + 1})
  with pytest.raises(UserError, match="has prompts that .* has not, and development prompts may be among them"):
    ablations.development_prompts(RunDirectory(own.config, more), finished, 6)
  # A variant of the router keeps the run's prompts and searched schedule, one of the schedule only the prompts.
  search = "S0.25/seed0/search/schedule.json"
  assert (tmp_path / "without_score" / search).read_text() == (finished / search).read_text()
  assert json.loads((tmp_path / "uniform" / search).read_text()) == [0.25] * 4
  router = artifact.load_weights(tmp_path / "without_score" / "S0.25" / "seed0" / "finetune" / "router.safetensors")
  full = artifact.load_weights(finished / "S0.25" / "seed0" / "finetune" / "router.safetensors")
  assert router["hidden"]["kernel"].shape[1] == full["hidden"]["kernel"].shape[1] - 1
  # Nothing is computed twice, and another seed joins those that are there.
  figures = tmp_path / "uniform" / "S0.25" / "seed0" / "figures.json"
  before = figures.stat().st_mtime_ns
  assert ablations.run_variants(finished, tmp_path, ["uniform"], 0.25, [0], 6) == table
  (line,) = [
      line for line in ablations.run_variants(finished, tmp_path, ["uniform"], 0.25, [0, 1], 6).splitlines()
      if "| uniform |" in line
  ]
  assert line.startswith("| schedule | uniform | 0 1 |") and figures.stat().st_mtime_ns == before
  assert not any("," in name for name in ablations.VARIANTS)  # they are given in a list with commas
  with pytest.raises(UserError, match="'warmer' is unknown"):
    ablations.run_variants(finished, tmp_path, ["warmer"], 0.25, [0], 6)
  with pytest.raises(UserError, match="was made with development prompts"):
    ablations.run_variants(finished, tmp_path, ["uniform"], 0.25, [0], 5)
  # A variant that changes nothing is not computed again; one that this config cannot have stops only itself.
  assert "| per block |" not in ablations.run_variants(finished, tmp_path, ["per block"], 0.25, [0], 6)
  config = json.loads((finished / "config.json").read_text())
  config["router"]["hidden_states"] = False
  other = tmp_path / "four factors"
  shutil.copytree(finished / "data", other / "data")
  (other / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match="The router has no input"):
    ablations.run_variants(other, tmp_path / "out", ["hidden states alone"], 0.25, [0], 6)
  # Data that changed behind a run's back would let its training prompts in.
  arrays = dict(np.load(other / "data" / "train.npz"))
  np.savez(other / "data" / "train.npz", **arrays | {"tokens": arrays["tokens"] + 1})
  with pytest.raises(UserError, match="data.path is not what .* was made from"):
    ablations.development_prompts(own, other, 6)
