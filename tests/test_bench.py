"""The bench command: the clock, the rules, every kind end to end on a tiny model, and mistakes."""

import dataclasses
import importlib.util
import json
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftp_jax import cli
from ftp_jax.bench import cases, command, compiling, crossover, overhead, records, timing, torch_dense
from ftp_jax.errors import UserError
from ftp_jax.data.windows import running_text
from ftp_jax.evaluation.baselines import METHODS
from ftp_jax.evaluation.baselines import save as save_baseline
from ftp_jax.evaluation.flops import prefill_flops
from ftp_jax.export import artifact as artifacts
from ftp_jax.export.artifact import Artifact
from ftp_jax.inference import programs
from ftp_jax.inference.engine import Engine
from ftp_jax.inference.programs import Spec, Weights
from ftp_jax.inference.sampling import Sampling
from ftp_jax.machine import describe_machine
from ftp_jax.models import decoder
from ftp_jax.models.attention import visible
from ftp_jax.models.huggingface import fingerprint, save_params
from ftp_jax.models.sources import load_model
from ftp_jax.routing.bucketed import block_inputs, decide_context
from ftp_jax.routing.cache import empty_recent
from ftp_jax.routing.config import RouterConfig, RoutingConfig
from ftp_jax.routing.factors import window_scores
from ftp_jax.routing.plan import make_plan
from ftp_jax.routing.routers import Router, init_router, init_state
from ftp_jax.search import schedule as schedules
from tests import tiny
from tests.test_data import byte_tokenizer

KEYS = {
    "bench", "method", "context", "batch", "sparsity", "seconds_median", "seconds_min", "seconds_max", "runs",
    "speedup", "ideal_speedup", "efficiency", "shape", "kv", "router", "dtype",
}
SCHEDULE = (0.0, 0.0, 0.75, 0.75)
# One size for all tests, so that programs are compiled once. Late: the last two of four blocks skip all they can.
SIZE = ["--context=16", "--batch=2", "--runs=1"]
LATE = [*SIZE, "--sparsity=0.4875"]


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
  monkeypatch.setattr(timing, "_REST", 0)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
  directory = tmp_path_factory.mktemp("model")
  tokenizer = byte_tokenizer()
  c = tiny.config(vocab_size=len(tokenizer), max_positions=64)
  hf = dict(
      model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=c.vocab_size, hidden_size=c.hidden_size,
      intermediate_size=c.intermediate_size, num_hidden_layers=c.num_blocks, num_attention_heads=c.num_heads,
      num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim, rms_norm_eps=c.norm_eps, tie_word_embeddings=True,
      max_position_embeddings=64,
  )
  save_params(jax.jit(tiny.params, static_argnums=0)(c), c, directory, hf)
  tokenizer.save_pretrained(directory)
  return directory


@pytest.fixture
def artifact_directory(model_directory, tmp_path):
  config = RouterConfig()
  params = jax.device_get(init_router(config, jax.random.key(1), 4, 32))
  made = Artifact(
      str(model_directory), fingerprint(model_directory), "llama", SCHEDULE, RoutingConfig(kv_mode="evict"), config,
      params, {},
  )
  artifacts.save(made, tmp_path / "artifact")
  return tmp_path / "artifact"


def bench(tmp_path, model_directory, kind, *flags):
  """Machine and records that a command writes."""
  target = tmp_path / "bench.json"
  assert cli.main(["bench", kind, f"--model={model_directory}", f"--json={target}", *flags]) == 0
  found = json.loads(target.read_text())
  assert set(found) == {"machine", "records"} and found["machine"]["cores"] >= 1 and found["machine"]["jax"]
  assert not list(tmp_path.glob("*.tmp"))
  for record in found["records"]:
    assert KEYS <= set(record) and record["bench"] == kind
    assert 0 < record["seconds_min"] <= record["seconds_median"] <= record["seconds_max"]
    if record["efficiency"] is not None:
      assert record["efficiency"] == pytest.approx(record["speedup"] / record["ideal_speedup"])
  return found


def mistake(capsys, *argv) -> str:
  assert cli.main(["bench", *argv]) == 2
  out, err = capsys.readouterr()
  assert err.startswith("ftp-jax: ") and err.count("\n") == 1 and "Traceback" not in err
  return err


def test_methods_take_turns_and_the_first_round_is_not_counted():
  calls = []

  def fake(name, seconds):
    def measure():
      calls.append(name)
      return seconds[sum(c == name for c in calls) - 1]

    return types.SimpleNamespace(name=name, measure=measure)

  found = timing.interleave([fake("dense", [90, 4, 6, 8]), fake("a", [80, 1, 3, 2]), fake("b", [70, 5, 5, 5])], 3, "")
  assert calls == ["dense", "a", "b"] * 4
  assert found == [[4, 6, 8], [1, 3, 2], [5, 5, 5]]
  assert timing.speedup(found[1], found[0]) == 3  # of medians: 6 / 2


def test_a_record_holds_median_extremes_and_efficiency():
  record = records.make("prefill", "ftp", 16, 2, [4.0, 1.0, 2.0], [6.0, 5.0, 9.0, 6.0], 4.0, kv="evict")
  assert (record["seconds_median"], record["seconds_min"], record["seconds_max"], record["runs"]) == (2, 1, 4, 3)
  assert (record["speedup"], record["ideal_speedup"], record["efficiency"]) == (3, 4, 0.75)
  assert record["kv"] == "evict" and record["shape"] is None and record["sparsity"] == 0
  alone = records.make("compile", "dense", 16, 2, [1.0, 2.0])
  assert alone["seconds_median"] == 1.5
  assert alone["speedup"] is alone["ideal_speedup"] is alone["efficiency"] is None
  table = records.format_table([record, alone]).splitlines()
  assert len(table) == 3 and "2000.00" in table[1] and "evict" in table[1] and "tokens/s" not in table[0]
  assert len(set(map(len, table))) == 1


@pytest.mark.parametrize(
    "measured, expected",
    [
        ([[64, 0.9], [128, 1.1], [256, 1.3]], 128),
        ([[256, 1.3], [64, 0.9], [128, 1.1]], 128),
        ([[64, 1.2], [128, 0.9], [256, 1.3]], 256),  # a slower one in between counts
        ([[64, 1.2], [128, 1.1]], 64),
        ([[64, 1.2], [128, 1.0]], None),  # as fast is not faster
        ([], None),
    ],
)
def test_crossover_is_where_every_longer_context_is_faster_too(measured, expected):
  assert crossover.crossover(measured) == expected


@pytest.mark.parametrize("sparsity", [0.26, 0.3, 0.325, 0.5, 0.9])  # of 0.26 blocks could keep a remainder of 1e-16
def test_builtin_schedules_have_their_mean(sparsity):
  late, middle, ramp = (cases.builtin(shape, 30, sparsity) for shape in ("late", "middle", "ramp"))
  for schedule in (late, middle, ramp):
    assert np.mean(schedule) == pytest.approx(sparsity, abs=1e-4) and schedule.max() <= schedules.MAX_SPARSITY + 1e-6
  assert np.all(np.diff(late) >= 0) and np.sum(late > 0) == np.ceil(round(sparsity * 30 / schedules.MAX_SPARSITY, 6))
  assert len(set(ramp[ramp > 0])) > 4
  assert sparsity > 0.8 or not middle[[0, 1, 2, -3, -2, -1]].any()


def test_prefill(model_directory, tmp_path, capsys):
  found = bench(tmp_path, model_directory, "prefill", *LATE, "--kv=evict", "--runs=2")
  assert found["machine"]["torch"] and found["machine"]["torch_threads"] >= 1
  dense, torch, evict = found["records"]
  assert [(r["method"], r["kv"]) for r in found["records"]] == [
      ("dense", None), ("torch_dense", None), ("ftp", "evict"),
  ]
  for record in found["records"]:
    assert (record["context"], record["batch"], record["runs"], record["dtype"]) == (16, 2, 2, "float32")
    assert record["speedup"] == dense["seconds_median"] / record["seconds_median"]
  assert dense["speedup"] == dense["ideal_speedup"] == 1 and dense["sparsity"] == 0
  assert torch["ideal_speedup"] is None and torch["efficiency"] is None and torch["device"] == "cpu"
  config = load_model(str(model_directory)).config
  all_kept = prefill_flops(config, np.ones((4, 16), bool), 16)
  assert (evict["sparsity"], evict["shape"], evict["router"]) == (0.4875, "late", "static")
  assert evict["achieved_sparsity"] == pytest.approx(1 - late_routes().mean())
  taken = prefill_flops(config, late_routes(), 16, RoutingConfig("evict"))
  assert evict["ideal_speedup"] == pytest.approx(all_kept / taken)
  assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
  out, err = capsys.readouterr()
  assert "torch_dense" in out and "efficiency" in out and "bench.png" in out and "as fast as dense" in err


def late_routes():
  """LATE's: the last two blocks keep the first and the last token."""
  keep = np.ones((4, 16), bool)
  keep[2:, 1:15] = False
  return keep


def test_prefill_with_an_untrained_router_in_bfloat16(model_directory, tmp_path):
  plot = tmp_path / "other.png"
  flags = [*LATE, "--kv=evict", "--router=dynamic", "--dtype=bfloat16", "--no-torch", f"--plot={plot}"]
  dense, ftp = bench(tmp_path, model_directory, "prefill", *flags)["records"]
  assert (dense["method"], ftp["method"], ftp["router"], ftp["dtype"]) == ("dense", "ftp", "dynamic", "bfloat16")
  assert plot.stat().st_size > 5_000 and not (tmp_path / "bench.png").exists()
  config, router = load_model(str(model_directory)).config, RouterConfig(hidden_states=True)
  taken = prefill_flops(config, late_routes(), 16, RoutingConfig("evict"), router)  # with the router's own
  assert ftp["ideal_speedup"] == pytest.approx(prefill_flops(config, np.ones((4, 16), bool), 16) / taken)


def test_an_artifact_replaces_the_built_in_schedules(model_directory, artifact_directory, tmp_path, capsys):
  flags = [*LATE, f"--artifact={artifact_directory}", "--no-torch"]
  _, ftp = bench(tmp_path, model_directory, "prefill", *flags)["records"]
  assert (ftp["method"], ftp["shape"], ftp["kv"], ftp["router"]) == ("ftp", "artifact", "evict", "dynamic")
  assert ftp["sparsity"] == np.mean(SCHEDULE) and ftp["achieved_sparsity"] == pytest.approx(0.375)
  assert "--sparsity is not used" in capsys.readouterr().out


def test_artifacts_are_timed_side_by_side(model_directory, artifact_directory, tmp_path):
  first, second = artifacts.load(artifact_directory), tmp_path / "second"
  half = dataclasses.replace(first, schedule=(0.0, 0.0, 0.0, 0.75), routing=RoutingConfig("project"))
  artifacts.save(half, second)
  found = bench(tmp_path, model_directory, "prefill", *SIZE, f"--artifact={artifact_directory},{second}", "--no-torch")
  assert [(r["shape"], r["kv"], r["sparsity"]) for r in found["records"]] == [
      (None, None, 0), ("artifact 1", "evict", np.mean(SCHEDULE)), ("artifact 2", "project", 0.1875),
  ]


def test_baselines_stand_beside_dense(model_directory, tmp_path, monkeypatch):
  facts = {"removed": [1, 2]}
  smaller = METHODS["shortgpt"].kind("shortgpt", 0.5, 0, load_model(str(model_directory)), facts)
  save_baseline(smaller, tmp_path / "shortgpt")
  found = bench(
      tmp_path, model_directory, "prefill", *SIZE, "--sparsity=0.25", "--no-torch",
      f"--baseline=truncation,random,{tmp_path}/shortgpt",
  )["records"]
  assert [r["method"] for r in found] == ["dense", "ftp", "truncation", "random", "shortgpt"]
  cost = lambda blocks, tokens: prefill_flops(
      tiny.config(num_blocks=blocks, vocab_size=len(byte_tokenizer())), np.ones((blocks, tokens)), tokens
  )
  _, _, truncation, chance, shortgpt = found
  assert truncation["ideal_speedup"] == pytest.approx(cost(4, 16) / cost(4, 12))
  assert shortgpt["ideal_speedup"] == pytest.approx(cost(4, 16) / cost(2, 16))
  assert [r["achieved_sparsity"] for r in (truncation, chance, shortgpt)] == [0.25, 0.25, 0.5]
  assert all(set(r) >= KEYS for r in found) and shortgpt["sparsity"] == 0.5


def test_torch_runs_the_same_model(model_directory):
  model = load_model(str(model_directory))
  tokens = cases.random_tokens(model, 3, 16)
  worker = torch_dense._Worker(str(model_directory), "float32", False)
  assert worker.start(tokens) == 3 * 4 * 2 * 16 * 2 * 8 * 4  # rows, blocks, keys and values, slots, heads, size, bytes
  ours = cases.Prefill(cases.dense(model, "float32"), tokens).run()
  first, _ = programs.first_token(Sampling(), ours.logits_BxV, jnp.zeros(3, jnp.uint32), jnp.full(1, -1))
  np.testing.assert_array_equal(worker.first[:, 0].numpy(), first)
  assert worker.decode(5) > 0 and worker.past.get_seq_length() == 16  # the next measurement starts from the prefill


class TorchInThisProcess(torch_dense.TorchDense):
  def __init__(self, directory, dtype, gpu):
    self.worker = torch_dense._Worker(str(directory), dtype, gpu)
    self.info = self.worker.info

  def call(self, name, *arguments):
    return getattr(self.worker, name)(*arguments)

  def close(self):
    pass


def test_decode(model_directory, tmp_path, monkeypatch):
  monkeypatch.setattr(command, "TorchDense", TorchInThisProcess)
  found = bench(tmp_path, model_directory, "decode", *LATE, "--kv=evict", "--steps=4")["records"]
  dense, torch, evict = found
  assert [r["method"] for r in found] == ["dense", "torch_dense", "ftp"]
  for record in found:
    assert record["steps"] == 4 and record["ideal_speedup"] is None and record["efficiency"] is None
    assert record["tokens_per_second"] == pytest.approx(2 / record["seconds_median"])
    assert record["cache_ratio"] == record["cache_bytes"] / dense["cache_bytes"]
    assert record["speedup"] == pytest.approx(dense["seconds_median"] / record["seconds_median"])
  slot = 2 * (2 * 2 * 8 * 4 + 4)  # rows; keys and values of two heads of 8 floats; a position
  assert dense["cache_bytes"] == slot * 4 * 16 and evict["cache_bytes"] == slot * (2 * 16 + 2 * 2)
  assert torch["cache_bytes"] == 2 * 2 * 2 * 8 * 4 * 4 * 16
  assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_decode_of_a_text_says_what_new_tokens_skipped(model_directory, artifact_directory, tmp_path):
  """The threshold is between what new tokens are given, so that some skip; dense computes all."""
  text = tmp_path / "text.txt"
  text.write_text("Some words, and others after them. " * 3)
  trained = artifacts.load(artifact_directory)
  skipping = dataclasses.replace(trained, routing=RoutingConfig(decode_sparsity=0.3, decode_threshold=0.4))
  artifacts.save(skipping, tmp_path / "skipping")
  flags = f"--text={text}", "--context=24", "--batch=2", "--steps=6", "--runs=1", "--no-torch"
  found = bench(tmp_path, model_directory, "decode", f"--artifact={artifact_directory},{tmp_path / 'skipping'}", *flags)
  strict, skipped = [record["decode_achieved"] for record in found["records"]][1:]
  assert found["records"][0]["decode_achieved"] == strict == 0
  assert all(record["text"] == str(text) for record in found["records"])
  engine = Engine(load_model(str(model_directory)), skipping)
  ids = running_text([text.read_text().strip()], engine.model.tokenizer)
  (group,) = (prefix := engine.prefill([ids[:24], ids[24:48]])).groups
  tokens = [generation.tokens for generation in engine.generate(prefix, 7, stop_tokens=())]
  out = group.spec.extend(
      group.plan, group.weights, group.prefilled.cache, empty_recent(group.spec.model, 2, 8, jnp.float32),
      jnp.asarray(tokens)[:, :6],
  )
  assert skipped == pytest.approx(1 - float(np.mean(out.keep_LxBxC)), abs=1e-6) and 0.02 < skipped < 0.48


def test_gather_scatter_moves_the_kept_tokens_alone():
  plan = make_plan((0.0, 0.5, 0.5, 0.75), 8, RoutingConfig())
  rng = np.random.default_rng(0)
  keep = np.zeros((4, 2, 8), bool)
  for i, slots in enumerate(plan.slots):
    for b in range(2):
      keep[i, b, rng.permutation(8)[: slots - b]] = True  # the second row leaves a slot empty
  x = rng.normal(size=(2, 8, 3)).astype(np.float32)
  moved = overhead.gather_scatter(plan, jnp.asarray(x), jnp.asarray(keep))
  np.testing.assert_allclose(moved, x + keep[1:].sum(0)[:, :, None], rtol=1e-6)  # the first block moves nothing


@pytest.mark.parametrize("flags, router", [([], "dynamic"), (["--router=factors"], "factors")])
def test_overhead(model_directory, tmp_path, flags, router):
  found = bench(tmp_path, model_directory, "overhead", *LATE, "--kv=evict", "--runs=2", *flags)
  dense, s0, ftp, deciding, moving = found["records"]
  assert [r["method"] for r in found["records"]] == ["dense", "s0", "ftp", "decide", "gather_scatter"]
  assert (s0["sparsity"], s0["achieved_sparsity"], s0["ideal_speedup"], s0["router"]) == (0, 0, 1, router)
  assert ftp["router"] == deciding["router"] == router and ftp["achieved_sparsity"] > 0.4
  seconds = lambda record: record["seconds_median"]
  for record, extra, whole in (
      (s0, seconds(s0) - seconds(dense), s0), (deciding, seconds(deciding), ftp), (moving, seconds(moving), ftp),
  ):
    assert record["extra_seconds"] == pytest.approx(extra)
    assert record["share"] == pytest.approx(extra / seconds(whole))
    assert record["share_of_dense"] == pytest.approx(extra / seconds(dense))
  assert dense["extra_seconds"] is ftp["extra_seconds"] is moving["speedup"] is deciding["speedup"] is None
  assert moving["slots"] == [2, 2]


@pytest.mark.parametrize("one_pass, kind", [(-1, "per_block"), (2, "per_block"), (1, "recurrent"), (-1, "global")])
def test_decisions_alone_are_those_of_the_router(model_directory, one_pass, kind):
  """With a router that reads no scores, of states that stay as they are."""
  model = load_model(str(model_directory))
  config = RouterConfig(kind, ("position", "sparsity"), hidden_states=True)
  router = Router("dynamic", config, init_router(config, jax.random.key(1), 4, model.config.hidden_size))
  spec = Spec(model.config, RoutingConfig(one_pass_block=one_pass))
  weights = Weights(model.params, router, jnp.array([0.0, 0.25, 0.5, 0.5]))
  x = np.random.default_rng(2).standard_normal((2, 16, model.config.hidden_size)).astype(np.float32)
  keys = np.zeros((2, 16, model.config.num_kv_heads, model.config.head_dim), np.float32)
  context, plan = jnp.array([16, 9]), spec.plan(weights, 16)
  keep, least = overhead.decide(spec, plan, weights, x, keys, context)
  state, inputs, expected = init_state(router, 2, 16), block_inputs(spec.routing, router, weights.schedule_L), []
  position = jnp.broadcast_to(jnp.arange(16), (2, 16))
  for index in range(4):
    own = jax.tree.map(lambda a: a[index], inputs)
    kept, _, state = decide_context(
        spec.routing, router, own, x, jnp.zeros((2, 16)), state, position, context, jnp.zeros(2, int)
    )
    expected += [kept] if index or kind == "recurrent" else []
  np.testing.assert_array_equal(keep, expected)
  assert keep[-1].sum(axis=1).tolist() == [8, 5] and least.shape == (len(keep), 2)


def test_decisions_alone_are_made_anew_in_every_block(model_directory):
  """Not once for all, although their states are the same: the norm of the states is in the loop over blocks."""
  model, config = load_model(str(model_directory)), RouterConfig("per_block", (), hidden_states=True)
  router = Router("dynamic", config, init_router(config, jax.random.key(1), 4, model.config.hidden_size))
  spec, weights = Spec(model.config, RoutingConfig()), Weights(model.params, router, jnp.full(4, 0.5))
  x = jnp.ones((1, 16, model.config.hidden_size))
  keys = jnp.ones((1, 16, model.config.num_kv_heads, model.config.head_dim))
  program = overhead.decide.lower(spec, spec.plan(weights, 16), weights, x, keys, jnp.array([16])).compile().as_text()
  computations = [part for part in program.split("\n\n") if "rsqrt(" in part]
  entry = program[program.index("\nENTRY") :]
  assert computations and not any(part.split()[0] in entry for part in computations)


@pytest.mark.parametrize("one_pass, schedule, decided", [
    (-1, (0.0, 0.5, 0.5, 0.0), (1, 2)), (2, (0.0, 0.0, 0.5, 0.0), (2, 3)), (-1, (0.0, 0.0, 0.0, 0.0), ()),
])
def test_decisions_alone_read_scores_of_the_block_before(model_directory, one_pass, schedule, decided):
  model = load_model(str(model_directory))
  config = RouterConfig("global", ("score", "rank"))
  router = Router("dynamic", config, init_router(config, jax.random.key(1), 4, model.config.hidden_size))
  spec = Spec(model.config, RoutingConfig(one_pass_block=one_pass))
  weights, rng = Weights(model.params, router, jnp.array(schedule)), np.random.default_rng(2)
  x = rng.standard_normal((1, 16, model.config.hidden_size)).astype(np.float32)
  keys = rng.standard_normal((1, 16, model.config.num_kv_heads, model.config.head_dim)).astype(np.float32)
  keep, _ = overhead.decide(spec, spec.plan(weights, 16), weights, x, keys, jnp.array([16]))
  block, at, position = decoder.Block(model.config), jnp.arange(8, 16)[None], jnp.arange(16)[None]
  expected = []
  for index in decided:  # the states of the late tokens, whose queries score, are those given; one plan for its blocks
    before = (index if one_pass < 0 else one_pass) - 1
    of_block = {"params": decoder.block_at(model.params["blocks"], before)}
    q = block.apply(of_block, x[:, 8:], *decoder.angles(model.config, at), method=decoder.Block.queries)
    score = window_scores(q, keys, visible(at, position, 0), jnp.ones((1, 8), bool))
    own = jax.tree.map(lambda a: a[index], block_inputs(spec.routing, router, weights.schedule_L))
    state = init_state(router, 1, 16)
    expected.append(decide_context(
        spec.routing, router, own, x, score, state, position, jnp.array([16]), jnp.zeros(1, int)
    )[0])
  assert keep.shape == (len(decided), 1, 16)
  np.testing.assert_array_equal(keep, np.reshape(expected, keep.shape))


@pytest.mark.parametrize("router, config", [
    ("dynamic", RouterConfig("per_block", hidden_states=True)), ("factors", RouterConfig("global")),
])
def test_every_shape_kv_mode_and_sparsity_is_a_case(model_directory, router, config):
  asked = types.SimpleNamespace(
      sparsity=(0.3, 0.5), shape=("late", "middle"), kv=("evict", "project"), router=router, dtype="float32"
  )
  made = cases.pruned(load_model(str(model_directory)), asked, [])
  assert len({case.name for case in made}) == 8
  for case in made:
    labels = case.labels
    np.testing.assert_allclose(case.weights.schedule_L, cases.builtin(labels["shape"], 4, labels["sparsity"]))
    assert case.spec.routing.kv_mode == labels["kv"] and labels["router"] == router
    assert (case.weights.router.kind, case.weights.router.config) == ("dynamic", config)


def test_plans_to_compile(model_directory):
  model = load_model(str(model_directory))
  asked = types.SimpleNamespace(
      sparsity=(0.3, 0.5), shape=("late", "middle"), kv=("evict",), router="static", dtype="float32", artifact=()
  )
  plans = compiling._plans(model, cases.pruned(model, asked, []), asked, 32)
  assert [(case.labels["shape"], case.labels["sparsity"], compiling.buckets(plan)) for case, plan in plans] == [
      (None, 0, 0), ("late", 0.3, 2), ("late", 0.5, 2), ("middle", 0.3, 1), ("middle", 0.5, 1),
      ("ramp", 0.3, 1), ("ramp", 0.3, 2), ("ramp", 0.3, 3),  # its first block skips nothing
      ("ramp", 0.5, 1), ("ramp", 0.5, 2), ("ramp", 0.5, 3), ("ramp", 0.5, 4),  # what its last cannot hold, it does
  ]


def test_crossover_is_written_into_the_artifact_and_obeyed(model_directory, artifact_directory, tmp_path, capsys):
  before = artifacts.load(artifact_directory)
  flags = [*SIZE, f"--artifact={artifact_directory}", "--context=32,16"]
  lines = bench(tmp_path, model_directory, "crossover", *flags)["records"]
  assert [(r["method"], r["context"]) for r in lines] == [("dense", 16), ("ftp", 16), ("dense", 32), ("ftp", 32)]
  after = artifacts.load(artifact_directory)
  measured = [[r["context"], round(r["speedup"], 4)] for r in lines if r["method"] == "ftp"]
  assert after.crossover["measured"] == measured and after.crossover["context"] == crossover.crossover(measured)
  assert (after.crossover["batch"], after.crossover["dtype"]) == (2, "float32") and after.crossover["machine"]["cores"]
  jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
  assert after.digest == before.digest
  assert (before.schedule, before.routing, before.router) == (after.schedule, after.routing, after.router)
  assert str(artifact_directory) in capsys.readouterr().out

  model = load_model(str(model_directory))
  options = types.SimpleNamespace(artifact=(str(artifact_directory),), batch=(1,), dtype="float32")
  for speedups, pruned in (((0.9, 1.2), (False, True)), ((1.1, 1.2), (True, True)), ((1.1, 0.9), (False, False))):
    faked = [{"method": "ftp", "context": c, "speedup": s} for c, s in zip((16, 32), speedups)]
    crossover.write(faked, options, describe_machine())
    engine = Engine(model, artifacts.load(artifact_directory), fallback="auto")
    assert (engine.prunes(16), engine.prunes(32)) == pruned


def test_without_torch_its_rows_are_left_out(model_directory, tmp_path, capsys, monkeypatch):
  found = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else found(name, *rest))
  lines = bench(tmp_path, model_directory, "prefill", *LATE, "--kv=evict")["records"]
  assert [r["method"] for r in lines] == ["dense", "ftp"]
  assert capsys.readouterr().out.count("No torch_dense rows: torch is not installed") == 1


@pytest.mark.parametrize(
    "argv, words",
    [
        (["speed"], ["'speed'", "prefill, decode, overhead, compile, crossover"]),
        (["prefill", "--shape=late,early"], ["'early'", "middle, late"]),
        (["prefill", "--kv=drop"], ["'drop'", "evict, project"]),
        (["prefill", "--router=random"], ["'random'", "static, dynamic, factors"]),
        (["overhead", "--router=static"], ["decides nothing", "--router=dynamic"]),
        (["prefill", "--dtype=float16"], ["'float16'", "float32, bfloat16"]),
        (["prefill", "--sparsity=0.3,1"], ["--sparsity=1", "between 0 and 0.975"]),
        (["prefill", "--sparsity=-0.1"], ["--sparsity=-0.1", "at least 0"]),
        (["prefill", "--sparsity=nan"], ["--sparsity=nan", "at least 0"]),
        (["prefill", "--context=long"], ["--context=long", "whole numbers"]),
        (["prefill", "--context=0"], ["--context=0", "at least 1"]),
        (["prefill", "--runs=1,2"], ["--runs=1,2", "one whole number"]),
        (["prefill", "--json=missing/b.json"], ["--json=missing/b.json", "create missing"]),
        (["prefill", "--plot=missing/b.png"], ["--plot=missing/b.png", "create missing"]),
        (["prefill", "--json=b.png"], ["--json=b.png", ".json"]),
        (["prefill", "--plot=b.pdf"], ["--plot=b.pdf", ".png"]),
        (["prefill", "--json=."], ["is a directory"]),
        (["compile", "--plot=b.png"], ["leave out --plot"]),
        (["crossover"], ["--artifact=DIR"]),
        (["prefill", "--artifact="], ["has an empty name", "leave it out"]),
        (["crossover", "--artifact=here", "--batch=1,2"], ["single --batch"]),
        (["crossover", "--artifact=here,there"], ["single --artifact"]),
        (["decode", "--baseline=late"], ["bench decode", "bench prefill"]),
        (["compile", "--text=t.txt"], ["bench compile reads no text"]),
        (["crossover", "--artifact=here", "--text=t.txt"], ["bench crossover reads no text"]),
        (["decode", "--text="], ["has an empty name", "leave it out"]),
        (["decode", "--text=t.txt"], ["t.txt is no file"]),
        (["prefill", "--depth=3"], ["--depth=3", "--help"]),
    ],
)
def test_mistakes_end_in_one_sentence(capsys, argv, words, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  said = mistake(capsys, *argv)
  assert all(word in said for word in words), said


def test_mistakes_that_the_model_shows(capsys, model_directory, artifact_directory, tmp_path):
  model = f"--model={model_directory}"
  assert "--context=64" in mistake(capsys, "prefill", model, "--context=65")
  assert "--context=32" in mistake(capsys, "decode", model, "--context=64")  # 32 steps follow
  assert "static, late" in mistake(capsys, "prefill", model, "--context=16", "--no-torch", "--baseline=shortgpt")
  (tmp_path / "short.txt").write_text("Too short.")
  assert "a longer text" in mistake(capsys, "prefill", model, "--context=16", f"--text={tmp_path / 'short.txt'}")
  described = json.loads((artifact_directory / "ftp_config.json").read_text())
  (artifact_directory / "ftp_config.json").write_text(json.dumps(described | {"fingerprint": "0" * 16}))
  assert "fingerprint" in mistake(capsys, "prefill", model, "--context=16", f"--artifact={artifact_directory}")


def test_what_goes_wrong_in_torch_is_told(tmp_path, monkeypatch):
  monkeypatch.setattr(torch_dense.signal, "signal", lambda *_: None)
  sent = []
  torch_dense._serve(types.SimpleNamespace(send=sent.append), str(tmp_path), "float32", False)  # no model there
  ((status, _),) = sent
  assert status == "failed"
  ours = object.__new__(torch_dense.TorchDense)
  for answer, error, words in (
      (sent[0], UserError, "--no-torch"),
      (("missing", "no torch"), torch_dense.TorchMissing, "no torch"),
      (EOFError(), UserError, "the process ended"),
  ):
    ours._pipe = mock.Mock(recv=mock.Mock(side_effect=[answer]))
    with pytest.raises(error, match=words):
      ours._answer()


def test_compile(model_directory, tmp_path, monkeypatch):
  """The last one: it throws away what the others compiled."""
  plans = compiling._plans
  # Compiling is slow: two plans, and no warm-up.
  monkeypatch.setattr(compiling, "_plans", lambda *arguments: plans(*arguments)[:2])
  monkeypatch.setattr(compiling, "interleave", lambda methods, *_: [[method.measure()] for method in methods])
  cache = tmp_path / "cache"
  names = (
      "jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
      "jax_persistent_cache_min_entry_size_bytes",
  )
  before = {name: getattr(jax.config, name) for name in names}
  try:
    for name, value in zip(names, (True, str(cache), 0, -1)):
      jax.config.update(name, value)
    lines = bench(tmp_path, model_directory, "compile", *LATE, "--kv=evict")["records"]
    assert not list(cache.rglob("*prefill*"))
    assert jax.config.jax_enable_compilation_cache
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
  assert [(r["method"], r["shape"], r["buckets"], r["bodies"]) for r in lines] == [
      ("dense", None, 0, 1), ("ftp", "late", 1, 2),
  ]
  for record in lines:
    assert record["compile_ratio"] == pytest.approx(record["seconds_median"] / lines[0]["seconds_median"])
    assert record["peak_bytes"] == record["temp_bytes"] + record["output_bytes"] > 0 and record["speedup"] is None
  assert lines[1]["output_bytes"] < lines[0]["output_bytes"]  # the smaller cache
  assert not (tmp_path / "bench.png").exists()
