"""The cells of the main table: what each is made of, and computed once for."""

import json
import types

import numpy as np
import pytest

from ftp_jax.config import get_config
from ftp_jax.data.prompts import pack, take
from ftp_jax.errors import UserError
from ftp_jax.stages import save_arrays
from tests import scripts
from tests.test_data import CHAT, byte_tokenizer


@pytest.fixture(scope="module")
def script():
  return scripts.load("main_table")


@pytest.fixture
def chats(script, tmp_path, monkeypatch):
  """A table of a run whose answers have 3 tokens, and a function that writes the --long file of some contexts."""
  data = get_config().data
  data.chat, data.min_context, data.max_context, data.continuation = True, 2, 6, 3
  table = object.__new__(script.Table)
  table.run = table.out = tmp_path
  table.runs = {"ftp": tmp_path}
  table.config, table.dtype = {"data": data.to_dict()}, "bfloat16"
  table.model = types.SimpleNamespace(tokenizer=byte_tokenizer(CHAT), config=types.SimpleNamespace(max_positions=30))
  (tmp_path / "data").mkdir()
  for split in ("search", "train", "validation"):
    save_arrays(tmp_path / "data" / f"{split}.npz", **pack([([1, 2, 3], 2)], 4)._asdict())
  path = tmp_path / "chats.jsonl"
  monkeypatch.setattr(script, "_LONG", types.SimpleNamespace(value=[str(path)]))

  def write(*contexts):
    path.write_text("".join(json.dumps({"context": text, "continuation": "good"}) + "\n" for text in contexts))
    return table

  return write


def test_long_prompts_are_wrapped_as_the_runs_and_as_wide_as_needed(chats):
  table = chats("x" * 4, "x" * 60, "x" * 9)  # the second does not fit 30 positions
  prompts = table.long_prompts(str(table.run / "chats.jsonl"))
  texts = [table.model.tokenizer.decode(row[:m]) for row, m in zip(prompts.tokens, prompts.context)]
  frame = texts[0].partition("xxxx")
  assert texts[1] == frame[0] + "x" * 9 + frame[2] and "<|user|>" in frame[0] and "<|assistant|>" in frame[2]
  assert (prompts.length - prompts.context).tolist() == [3, 3]
  assert prompts.tokens.shape == (2, prompts.length.max())
  table.model.config.max_positions = 5
  with pytest.raises(UserError, match="has no prompt that fits the model"):
    table.long_prompts(str(table.run / "chats.jsonl"))


def test_long_prompts_that_the_run_was_trained_on_are_refused(chats):
  table = chats("x" * 4, "y" * 5)
  prompts = table.long_prompts(str(table.run / "chats.jsonl"))
  save_arrays(table.run / "data" / "train.npz", **take(prompts, [1])._asdict())
  with pytest.raises(UserError, match="holds prompts of the train set of"):
    table.long_prompts(str(table.run / "chats.jsonl"))


def test_long_prompts_are_measured_once_a_cell(script, chats, monkeypatch):
  table = chats("x" * 4)
  table.cells = [("late", 0.3, 0), ("ftp", 0.3, 1)]
  table.baseline = lambda method, sparsity, seed: method
  for cell in table.cells:
    table.directory(*cell).mkdir(parents=True)
  measured = []
  yardstick = types.SimpleNamespace(record=lambda name, windows: measured.append(name) or {"kl": 0.5, "seed": 0})
  monkeypatch.setattr(script.baselines, "Yardstick", lambda model, prompts, batch, dtype: yardstick)
  read = lambda cell: json.loads((table.directory(*cell) / "long-chats.json").read_text())
  table.long()
  assert measured == ["late", "ftp"] and read(table.cells[1])["seed"] == 1 and read(table.cells[1])["kl"] == 0.5
  (table.directory(*table.cells[0]) / "long-chats.json").unlink()
  table.long()
  table.long()
  assert measured == ["late", "ftp", "late"]
  other = table.run / "manuals.jsonl"
  other.write_text((table.run / "chats.jsonl").read_text())
  script._LONG.value.append(str(other))
  table.long()
  assert measured == ["late", "ftp", "late", "late", "ftp"]
  assert script.long_files(table.directory(*table.cells[0]))[1].name == "long-manuals.json"
  chats("x" * 5)
  with pytest.raises(UserError, match="was measured on another file"):
    table.long()


def test_a_cell_is_not_reused_with_other_settings(script, tmp_path, monkeypatch):
  stages = types.SimpleNamespace(value=["quality", "latency"])
  monkeypatch.setattr(script, "_STAGES", stages)
  table = object.__new__(script.Table)
  table.out, table.runs, steps, prompts = tmp_path, {}, 24, "these"
  table.settings = lambda method, sparsity, seed: {"method": method, "--steps": steps, "test prompts": prompts}
  table.claim(("skipgpt", 0.3, 0))
  steps = 32  # nothing was made yet, so that a command may still be mended
  table.claim(("skipgpt", 0.3, 0))
  steps = 24
  table.claim(("skipgpt", 0.3, 0))
  (tmp_path / "S0.30" / "skipgpt-seed0" / "weights.safetensors").write_text("")
  table.claim(("skipgpt", 0.3, 0))
  steps = 48
  with pytest.raises(UserError, match="S0.30/skipgpt-seed0 was made with --steps=24, now it is 48"):
    table.claim(("skipgpt", 0.3, 0))
  stages.value = ["latency", "report"]  # neither depends on how it was trained, once it is
  with pytest.raises(UserError, match="was made with --steps=24, now it is 48"):
    table.claim(("skipgpt", 0.3, 0))
  (tmp_path / "S0.30" / "skipgpt-seed0" / script.BASELINE_FILE).write_text("{}")
  table.claim(("skipgpt", 0.3, 0))
  assert table.made_with(("skipgpt", 0.3, 0))["--steps"] == 24
  prompts = "others"
  with pytest.raises(UserError, match="made with test prompts='these', now it is 'others'"):
    table.claim(("skipgpt", 0.3, 0))
  (tmp_path / "S0.30" / "mod-seed0").mkdir()
  (tmp_path / "S0.30" / "mod-seed0" / "quality.json").write_text("{}")
  with pytest.raises(UserError, match="mod-seed0 has figures but no settings.json"):
    table.claim(("mod", 0.3, 0))


def test_the_run_must_be_one(script, tmp_path, monkeypatch):
  monkeypatch.setattr(script, "_RUN", types.SimpleNamespace(value=str(tmp_path)))
  monkeypatch.setattr(script, "_OUT", types.SimpleNamespace(value=str(tmp_path)))
  monkeypatch.setattr(script, "_CONTEXTS", types.SimpleNamespace(value=["512"]))
  monkeypatch.setattr(script, "_SPARSITIES", types.SimpleNamespace(value=["0.3"]))
  monkeypatch.setattr(script, "_METHODS", types.SimpleNamespace(value=None))
  monkeypatch.setattr(script, "_OTHERS", types.SimpleNamespace(value=[]))
  with pytest.raises(UserError, match="holds no config.json; name the directory of a run"):
    script.Table()
  (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
  with pytest.raises(UserError, match="is not a config of this version .*; name the directory of another run"):
    script.Table()


def test_other_runs_are_rows_of_their_names(script, monkeypatch):
  named = types.SimpleNamespace(value=["ftp_no_maps=runs/late", "searched=runs/a=b"])
  monkeypatch.setattr(script, "_OTHERS", named)
  found = script.other_runs()
  assert {name: str(run) for name, run in found.items()} == {"ftp_no_maps": "runs/late", "searched": "runs/a=b"}
  for entry in ("runs/late", "ftp=runs/late", "dense=runs/late", "late=runs/late", "two words=runs/late", "=runs/late"):
    named.value = [entry]
    with pytest.raises(UserError, match=f"--others={entry} must be NAME=RUN"):
      script.other_runs()
  named.value = ["same=runs/late", "same=runs/other"]
  with pytest.raises(UserError, match="that no other row has"):
    script.other_runs()
  with pytest.raises(UserError, match="--methods=maps is unknown; choose among late, ftp"):
    script.check_known("methods", ["late", "maps"], ("late", "ftp"))


def test_another_run_has_the_same_prompts_and_model(script, tmp_path, monkeypatch):
  table = object.__new__(script.Table)
  table.run, other = tmp_path / "run", tmp_path / "other"
  models = {table.run: "float32", other: "float32"}
  config = lambda run: {"model": {"source": "smollm2-135m", "dtype": models[run]}}
  monkeypatch.setattr(script, "run_config", config)
  table.config = config(table.run)
  for run in models:
    (run / "data").mkdir(parents=True)
    for split in ("test", "windows", "train"):
      rows = [([1, 2, 3], 2)] * (2 if split == "train" and run == other else 1)  # may be others
      save_arrays(run / "data" / f"{split}.npz", **pack(rows, 4)._asdict())
  table.check_same_prompts(other)
  models[other] = "bfloat16"
  with pytest.raises(UserError, match="other of --others has other test prompts or another model than --run"):
    table.check_same_prompts(other)
  models[other] = "float32"
  save_arrays(other / "data" / "test.npz", **pack([([1, 2, 4], 2)], 4)._asdict())
  with pytest.raises(UserError, match="other of --others has other test prompts"):
    table.check_same_prompts(other)


def test_a_run_whose_new_tokens_skip_is_refused(script, tmp_path, monkeypatch):
  asked = {"strict": 0.0, "skipping": 0.1}
  monkeypatch.setattr(script, "run_config", lambda run: {"routing": {"decode_sparsity": asked[run.name]}})
  script.Table.check_new_tokens(tmp_path / "strict")
  with pytest.raises(UserError, match="New tokens of .*skipping may skip"):
    script.Table.check_new_tokens(tmp_path / "skipping")


def test_a_later_call_keeps_the_times_of_earlier_cells_and_measures_in_the_runs_dtype(script, tmp_path, monkeypatch):
  measured = []
  monkeypatch.setattr(script, "random_tokens", lambda *_: None)
  prefill = lambda baseline, tokens: types.SimpleNamespace(describe=lambda: baseline)
  monkeypatch.setattr(script, "BaselinePrefill", prefill)
  interleave = lambda methods, runs, what: measured.append(len(methods)) or [[1.0]] * len(methods)
  monkeypatch.setattr(script, "interleave", interleave)
  monkeypatch.setattr(script, "speedup", lambda own, dense: 1.0)
  monkeypatch.setattr(script, "_RUNS", types.SimpleNamespace(value=1))
  monkeypatch.setattr(script, "_TASKS", types.SimpleNamespace(value=[]))
  monkeypatch.setattr(script, "load_artifact", lambda path: None)
  for module, name in ((script.baselines, "from_artifact"), (script, "baseline_at")):
    monkeypatch.setattr(module, name, lambda *_, dtype: {"dtype": dtype})
  table = object.__new__(script.Table)
  table.out, table.runs, table.methods = tmp_path, {"ftp": tmp_path}, script.METHODS
  table.model, table.dtype, table.sparsities, table.contexts, version = None, "bfloat16", [0.3], [512], 1
  table.calibration = lambda method, where: None
  table.settings = lambda method, sparsity, seed: {
      "method": method, "sparsity": sparsity, "seed": seed, "version": version * (method == "late"),
  }
  table.made_with = lambda cell: table.settings(*cell)

  def latency(*methods):
    table.cells = [("dense", 0.0, 0), *((method, 0.3, 0) for method in methods)]
    table.latency()
    stored = json.loads((tmp_path / "S0.30" / "latency512.json").read_text())
    assert all(record["dtype"] == "bfloat16" for record in stored["records"])
    return [settings["method"] for settings in stored["settings"]]

  assert latency("late", "static", "ftp") == ["dense", "late", "static", "ftp"]
  assert latency("mod") == ["dense", "mod", "late", "static", "ftp"] and measured == [4, 5]
  assert latency("late", "ftp") == ["dense", "mod", "late", "static", "ftp"] and measured == [4, 5]
  speedup = lambda: table._row(("late", 0.3, 0))["speedup"][512]
  assert speedup() == 1.0
  version = 2  # what was made with other settings is another cell
  assert speedup() is None
  assert latency("random") == ["dense", "random", "mod", "static", "ftp"]
  settings = table.settings

  def of_those_left(method, *rest):
    if method == "ftp":
      raise UserError("its artifact is gone")
    return settings(method, *rest)

  table.settings = of_those_left
  assert latency("late") == ["dense", "late", "random", "mod", "static"]
  table.methods = ("late", "random", "mod", "ftp")
  assert latency("late") == ["dense", "late", "random", "mod", "static"]  # nothing to measure
  version = 3
  with pytest.raises(UserError, match="latency512.json has times of static; name their runs with --others as well"):
    latency("late")


def test_a_report_is_of_the_cells_that_were_begun(script, tmp_path, monkeypatch):
  stages = types.SimpleNamespace(value=["quality", "report"])
  monkeypatch.setattr(script, "_STAGES", stages)
  monkeypatch.setattr(script, "_SEEDS", types.SimpleNamespace(value=["0", "1"]))
  table = object.__new__(script.Table)
  table.out, table.sparsities, table.runs = tmp_path, [0.22, 0.3], {"ftp": tmp_path, "ftp_no_maps": tmp_path}
  named = table.named_cells(["late", "late", "ftp_no_maps"])
  assert named == [("dense", 0.0, 0)] + [
      (method, s, seed) for s in (0.22, 0.3) for method, seed in (("late", 0), ("ftp_no_maps", 0), ("ftp_no_maps", 1))
  ]
  begun = [named[0], named[2]]
  for cell in begun:
    table.directory(*cell).mkdir(parents=True)
    (table.directory(*cell) / script.SETTINGS).write_text("{}")
  stages.value = ["report"]
  assert table.named_cells(["late", "ftp_no_maps"]) == begun
  table.out = tmp_path / "empty"
  with pytest.raises(UserError, match="empty has none of the cells that are named; run their other --stages first"):
    table.named_cells(["late"])


def test_an_artifact_that_is_not_there_yet_is_named(script, tmp_path):
  table = object.__new__(script.Table)
  table.runs = {"ftp": tmp_path / "maps", "ftp_no_maps": tmp_path / "none"}
  table.check_artifact("late", 0.3, 0)
  for name, run in (("ftp", "maps"), ("ftp_no_maps", "none")):
    with pytest.raises(UserError, match=f"{run}/S0.30/seed1/artifact is not there; let its run end"):
      table.check_artifact(name, 0.3, 1)
  where = table.artifact("ftp_no_maps", 0.3, 1)
  where.mkdir(parents=True)
  (where / script.CONFIG_FILE).write_text("{}")
  table.check_artifact("ftp_no_maps", 0.3, 1)


def test_a_row_compares_its_items_with_those_of_dense(script, tmp_path, monkeypatch):
  """Two items: of the pruned model one turns to another choice, none is right; a cell without tasks has none of it."""
  monkeypatch.setattr(script, "_TASKS", types.SimpleNamespace(value=["hellaswag"]))
  monkeypatch.setattr(script, "_DATA", types.SimpleNamespace(value=""))
  table = object.__new__(script.Table)
  table.out, table.contexts = tmp_path, [512]
  table.cells = [("dense", 0.0, 0), ("ftp", 0.3, 0), ("late", 0.3, 0)]

  def write(cell, name, content):
    table.directory(*cell).mkdir(parents=True, exist_ok=True)
    (table.directory(*cell) / name).write_text(json.dumps(content))

  def items(*likelihoods, right):
    records = [{"id": i, "loglikelihoods": own, "acc_norm": float(right)} for i, own in enumerate(likelihoods)]
    return {"tasks": {
        "hellaswag": {"records": records, "skipped": 0.25}, "retrieval": {"figures": {"acc": {"value": 0.5}}},
    }}

  write(table.cells[1], "tasks.json", items([-1.0, -2.0], [-2.0, -1.0], right=False))
  assert table._row(table.cells[1])["choice_kl"] == {}  # dense is not there
  write(table.cells[0], "tasks.json", items([-1.0, -2.0], [-1.0, -2.0], right=True))
  write(table.cells[2], "quality.json", {"kl": 0.5})
  dense, ftp, late = map(table._row, table.cells)
  assert dense["same_choice"] == {"hellaswag": {"0": 1.0, "1": 1.0}} and late["same_choice"] == {}
  assert ftp["same_choice"] == {"hellaswag": {"0": 1.0, "1": 0.0}}
  assert ftp["correct"]["hellaswag"] == {"0": 0.0, "1": 0.0} and ftp["skipped"] == 0.25 and late["skipped"] is None
  assert ftp["retrieval"] == 0.5 and late["retrieval"] is None
  table.report()
  cells = json.loads((tmp_path / "table.json").read_text())["cells"]
  assert cells[1]["same_choice"] == {"hellaswag": 0.5} and cells[2]["choice_kl"] == {}
  assert cells[1]["choice_kl"]["hellaswag"] == pytest.approx(np.tanh(0.5) / 2)  # of 0 and p log(p / q) + q log(q / p)
  assert "| late | 0.30 | - |" in (tmp_path / "table.md").read_text()
  write(table.cells[1], "tasks.json", items([-1.0, -2.0], [-2.0, -1.0], [-1.0, -1.0], right=False))
  with pytest.raises(UserError, match="S0.30/ftp-seed0 has other items of hellaswag than the dense cell"):
    table.report()


def test_what_tasks_skip_counts_contexts_and_continuations(script):
  """Two prompts of 4 and 2 tokens, whose contexts skip half; a tenth of the continuation is gone; copies fill up."""
  engine = types.SimpleNamespace(model=None, max_buckets=8)
  cache = types.SimpleNamespace(cache=np.ones((3, 3, 4)))
  engine.prefill = lambda prompts, padding: types.SimpleNamespace(
      groups=[types.SimpleNamespace(index=tuple(range(len(prompts))), prefilled=cache)]
  )
  engine.score = lambda prefix, continuations, rows: "scores"
  baseline = types.SimpleNamespace(
      engine=engine, routes=lambda cache: cache, skipped_after=0.1,
      costs=lambda keep, length: types.SimpleNamespace(skipped=0.5),
  )
  counted = script.Counted(baseline)
  prefix = counted.prefill([[1, 2, 3, 4], [5, 6], [1, 2, 3, 4]])
  assert (counted.pairs, counted.skipped) == (6, 3)
  rows = [[1] * 6, [2] * 7, [2] * 6, [1] * 6]
  assert counted.score(prefix, rows, [0, 1, 1, 0]) == "scores"  # 16 tokens run
  assert counted.pairs == 22 and counted.skipped == pytest.approx(3 + 1.6)


def test_numbers_of_a_flag(script):
  assert script.numbers("seeds", ["0", "2"], int) == [0, 2]
  for values in (["a"], [], ["1.5"]):
    with pytest.raises(UserError, match="--seeds=.* must be numbers"):
      script.numbers("seeds", values, int)


def test_jobs_are_those_that_were_asked_for(script, tmp_path):
  item = {"context": "Which is a metal?", "choices": ["wood", "iron"], "label": 1}
  (tmp_path / "arc_easy.jsonl").write_text(json.dumps(item) + "\n")
  both = script.jobs_of(["arc_easy"], str(tmp_path), 100, 2, [256, 512])
  assert [(job.name, job.settings["limit"]) for job in both] == [("arc_easy", 100), ("retrieval", 2)]
  assert both[1].settings["lengths"] == (256, 512)
  assert [job.name for job in script.jobs_of([], str(tmp_path), 100, 2, [256])] == ["retrieval"]
  assert [job.name for job in script.jobs_of(["arc_easy"], str(tmp_path), 100, 0, [])] == ["arc_easy"]
