"""Whether a run fits and what it costs: counts by hand, programs compiled for a TPU, the command's answers."""

import dataclasses
import functools
import json
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ftp_jax import cli, hardware, sharding
from ftp_jax.config import get_config, large_preset, plan_preset
from ftp_jax.fit import compiling, cost, counts, expected, hlo, programs, topologies
from ftp_jax.models import attention, decoder, kernels
from ftp_jax.models.architectures import architecture
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import masked, routers
from ftp_jax.routing.config import RouterConfig, RoutingConfig
from tests import tiny

LARGE = ("llama2-7b", "llama2-13b", "llama3-8b", "qwen1.5-7b")
PARTS = ("arguments", "outputs", "temporaries", "code")  # of what a chip holds
# Heads that 4 devices divide, keys and values that they have to repeat, and a vocabulary for all 8.
SMALL = tiny.config(vocab_size=96, head_dim=16, num_blocks=2, tie_embeddings=False)


# --- FLOPs --------------------------------------------------------------------------------------


def counted(function, *shapes, **options):
  return counts.flops(jax.jit(function).trace(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr, **options)


def test_a_product_counts_two_for_each_multiply_add():
  assert counted(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
  assert counted(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 4 * 2 * 3 * 5 * 7
  assert counted(lambda a: jnp.sort(jnp.exp(a)), (3, 5)) == 0


def test_loops_count_as_often_as_they_run():
  square = 2 * 4**3
  assert counted(lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, length=6)[0], (4, 4)) == 6 * square
  assert counted(lambda a: jax.lax.map(lambda row: a @ row, a), (4, 4)) == 4 * 2 * 4**2
  remat = jax.grad(lambda a: jnp.sum(jax.checkpoint(lambda a: jnp.sin(a @ a))(a)))
  assert counted(remat, (4, 4)) == 4 * square  # the product, the product again, and its two gradients
  unknown = lambda a: jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ a, a)
  assert counted(unknown, (4, 4), unknown_trips=3) == 3 * square
  with pytest.raises(ValueError, match="loop of unknown length"):
    counted(unknown, (4, 4))


def test_the_dearest_branch_counts_and_every_device():
  branch = lambda a: jax.lax.cond(a[0, 0] > 0, lambda a: a @ a @ a, lambda a: a @ a, a)
  assert counted(branch, (4, 4)) == 2 * 2 * 4**3
  mesh = sharding.make_mesh(2, 2, 2)
  rows = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False)
  # 8 rows on two groups of four devices, each of which computes its group's four.
  assert counted(rows, (8, 3), (3, 5)) == 8 * 2 * 4 * 3 * 5


def test_splash_counts_the_tiles_it_computes():
  assert counts.causal_pairs(256) == 256**2 and counts.causal_pairs(2048) == 10 * 512**2
  assert counts.causal_pairs(640) == 15 * 128**2
  shape, groups = (3, 2048, 4, 64), (3, 2048, 2, 64)
  product = 2 * 3 * 4 * 64 * 10 * 512**2
  assert counted(kernels.splash, shape, groups, groups) == 2 * product
  gradient = jax.grad(lambda *a: jnp.sum(kernels.splash(*a)), argnums=(0, 1, 2))
  rows = 2 * 3 * 4 * 2048 * 64  # the values with their cotangents
  assert counted(gradient, shape, groups, groups) == (2 + 3 + 4) * product + rows


@functools.cache
def traced(name, program, sizes=(1, 8, 1), **changes):
  mesh = sharding.make_mesh(*sizes)
  case = programs.Case(architecture(name), program, 8, **changes)
  programs.check(case, mesh)
  return case, mesh, programs.trace(case, mesh)


@pytest.mark.parametrize("name", LARGE)
def test_a_training_step_costs_little_more_than_four_forward_passes(name):
  case, mesh, found = traced(name, "train")
  count = compiling.flops(found, "train", mesh)
  assert 4 < count["forwards"] < 4.2
  assert count["forwards"] == pytest.approx(cost.TRAIN_FORWARDS, rel=0.01)
  assert count["chip"] == count["step"] / 8
  # The cost model's formula is the count.
  assert 8 * cost.forward_flops(case.model, 2048, 64) == pytest.approx(count["forward"], rel=1e-9)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (4, 2, 1), (2, 2, 2)])
def test_the_search_judges_a_candidate_in_one_forward_pass(sizes):
  case, mesh, found = traced("llama2-7b", "search", sizes)
  assert 1 <= compiling.flops(found, "search", mesh)["forwards"] < 1.01


def test_full_attention_computes_all_pairs():
  """What evict costs more: it needs scores that key gates can enter."""
  case, mesh, found = traced("llama2-7b", "train", kv_mode="evict", attention="full")
  count = compiling.flops(found, "train", mesh)
  attention = 8 * 32 * 4 * 4096 * (2048**2 - counts.causal_pairs(2048))
  assert count["forward"] - 8 * cost.forward_flops(case.model, 2048, 64) == attention


@pytest.mark.parametrize("program, passes", [
    ("train", 3),  # the student's, recomputed, and the gradient of its states
    ("search", 1), ("prefill", None), ("decode", None),
])
def test_maps_for_skipped_blocks_are_compiled_with_the_rest(program, passes):
  _, mesh, plain = traced("llama2-7b", program)
  case, _, found = traced("llama2-7b", program, stand_in=64)
  shapes = {a.shape for a in jax.tree.leaves(programs.params_of(case, mesh))}
  assert {(32, 4096), (32, 4096, 64), (32, 64, 4096)} <= shapes
  if passes:
    more, less = (compiling.flops(f, program, mesh)["forwards"] for f in (found, plain))
    maps = 2 * 2 * 2048 * 4096 * 64 * 32 * 8 / compiling.flops(plain, program, mesh)["forward"]
    assert more - less == pytest.approx(passes * maps, rel=0.02)
    assert compiling.gradients(found, case, mesh) == []


# --- the frozen model has no gradient ---------------------------------------------------------


def test_no_product_of_a_step_has_the_shape_of_a_weight():
  for name in LARGE:
    case, mesh, found = traced(name, "train")
    assert compiling.gradients(found, case, mesh) == []


def test_a_gradient_of_a_weight_would_be_found():
  c = tiny.config(tie_embeddings=False)
  params, tokens = decoder.abstract_params(c), jnp.zeros((2, 7), jnp.int32)

  def loss(params):
    return jnp.sum(decoder.unembed(c, params, decoder.forward(c, params, tokens, jnp.full(2, 7))))

  found = counts.weight_gradients(jax.make_jaxpr(jax.grad(loss))(params), counts.weight_shapes(params))
  d, f, kv, v = c.hidden_size, c.intermediate_size, c.num_kv_heads * c.head_dim, c.vocab_size
  assert {tuple(sorted(shape)) for shape in found} == {(d, d), (d, f), (kv, d), (d, v)}
  assert counts.weight_gradients(jax.make_jaxpr(loss)(params), counts.weight_shapes(params)) == []


# --- splash in masked execution -------------------------------------------------------------


def splash_batch():
  return tiny.batch(SMALL, [60, 90, 2, 127], [100, 128, 70, 128], 128)


@pytest.fixture
def causal(monkeypatch):
  """In the kernel's place what it computes, see tests/test_kernels.py: causal, with no regard to padding."""

  def attend(q, k, v):
    return attention.attend(q, k, v, jnp.broadcast_to(jnp.tri(128, dtype=bool)[None], (len(q), 128, 128)))

  monkeypatch.setattr(kernels, "splash", attend)


def test_routed_blocks_with_splash_are_those_with_all_scores(causal):
  """Values, and the gradient that reaches the router."""
  config = RouterConfig(hidden_states=True, hidden_size=8)
  router, params = routers.init_router(config, jax.random.key(1), 2, SMALL.hidden_size), tiny.params(SMALL)
  rows, schedule = splash_batch(), np.array([0.25, 0.5], np.float32)
  valid = np.arange(128)[None] < rows[2][:, None]

  def states(router, attention):
    out = masked.forward(
        SMALL, RoutingConfig(), params, routers.Router("dynamic", config, router), *rows, schedule,
        straight_through=True, remat_policy="full", attention=attention,
    )
    states = out.hidden_BxTxD * valid[:, :, None]
    return jnp.sum(jnp.sin(states)), states

  run = jax.jit(jax.value_and_grad(states, has_aux=True), static_argnums=1)
  got, want = run(router, "splash"), run(router, "full")
  assert np.abs(want[1]["hidden"]["kernel"]).max() > 1e-3
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernel", [False, True])
def test_candidates_over_data_run_the_kernel_on_their_own_devices(kernel, request):
  """shard_map inside the shard_map that spreads candidates: the same values, and the kernel in a program for TPUs."""
  if not kernel:
    request.getfixturevalue("causal")
  mesh = sharding.make_mesh(2, 2, 2)
  params = tiny.params(SMALL)
  rows, schedules = splash_batch(), np.array([[0.0, 0.5], [0.5, 0.5], [0.25, 0.75]], np.float32)

  def traced(params, attention):
    def one(schedule, params, rows):
      return masked.forward(
          SMALL, RoutingConfig(), params, routers.STATIC, *rows, schedule, attention=attention
      ).hidden_BxTxD

    placed = sharding.place(params, rows, "batch")
    return jax.jit(lambda *a: sharding.map_candidates(one, *a)).trace(schedules, params, placed), placed

  spread = jax.device_put(params, decoder.param_shardings(mesh, SMALL))
  with sharding.over(spread):
    run, placed = traced(spread, "splash")
    if kernel:
      assert "tpu_custom_call" in run.lower(lowering_platforms=("tpu",)).as_text()
      return
    got = run.lower().compile()(schedules, spread, placed)
  want = traced(params, "full")[0].lower().compile()(schedules, params, rows)
  valid = np.arange(128)[None] < rows[2][:, None]
  assert got.shape == (3, 4, 128, SMALL.hidden_size)
  np.testing.assert_allclose(np.asarray(got)[:, valid], np.asarray(want)[:, valid], rtol=1e-4, atol=1e-4)


def test_attention_is_chosen_by_backend_and_need(monkeypatch):
  choose = lambda attention="auto", config=SMALL, kv="project", positions=128, **options: masked.choose_attention(
      attention, config, RoutingConfig(kv), positions, **options
  )
  windowed = dataclasses.replace(SMALL, sliding_window=16)
  assert choose() == "full" and choose("splash") == "splash" and choose(backend="tpu") == "splash"
  monkeypatch.setattr(kernels, "backend_name", lambda: "tpu")
  assert choose() == "splash" and choose("full") == "full"
  for change in (dict(kv="evict"), dict(positions=100), dict(config=windowed)):
    assert choose(**change) == "full"
    with pytest.raises(cli.UserError, match="attention=splash .*; choose .* or attention=full"):
      choose("splash", **change)
  with jax.set_mesh(sharding.make_mesh(1, 1, 8)):
    assert choose() == "full"
    with pytest.raises(cli.UserError, match="whole heads on every device.*mesh.tensor"):
      choose("splash")
  with pytest.raises(cli.UserError, match="no attention=flash; choose one of auto, full, splash"):
    choose("flash")


# --- what the compiled program does ---------------------------------------------------------

TEXT = """\
HloModule step

%fused (p: f32[8,4]) -> f32[64,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %g = f32[64,4]{1,0} all-gather(%p), channel_id=1, replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}
}

%fused.clone (p: f32[8,4]) -> f32[64,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %g = f32[64,4]{1,0} all-gather(%p), channel_id=1, replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}
}

%body (s: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %s = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[8,4]{1,0} get-tuple-element(%s), index=1
  %a = f32[64,4]{1,0} fusion(%x), kind=kCustom, calls=%fused, metadata={op_name="gathered"}
  %b = f32[64,4]{1,0} fusion(%x), kind=kCustom, calls=%fused.clone
  %r = f32[8,4]{1,0} reduce-scatter(%a), channel_id=2, replica_groups=[2,8]<=[16], dimensions={0}, to_apply=%sum
  %q = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[]) collective-permute-start(%r), channel_id=3, source_target_pairs={{0,1}}
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%next, %r)
}

%condition (s: (s32[], f32[8,4])) -> pred[] {
  %s = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %end = s32[] constant(9)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %one = s32[] constant(1)
  %start = (s32[], f32[8,4]{1,0}) tuple(%one, %p)
  %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%condition, body=%body
  %y = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  ROOT %z = bf16[8,4]{1,0} all-reduce(%y), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
}
"""


def test_a_compiled_program_by_hand():
  """Four trips, from 1 below 9 by 2; two fusions with one channel are one collective."""
  found = hlo.Program(TEXT).collectives()
  part = 8 * 4 * 4
  assert found["all-gather"] == {"count": 4, "bytes": 4 * 7 * part}
  assert found["reduce-scatter"] == {"count": 4, "bytes": 4 * 7 * part}
  assert found["collective-permute"] == {"count": 4, "bytes": 4 * part}
  assert found["all-reduce"] == {"count": 1, "bytes": 2 * 3 / 4 * 8 * 4 * 2}
  assert hlo.Program(TEXT).largest(1) == [{"shape": "f32[64,4]", "bytes": 64 * 4 * 4, "origin": "gathered"}]


TIMED = """
%fused (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %s = bf16[8,128]{1,0} negate(%p), backend_config={"estimated_cycles":"999"}
}

%dear (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %n = bf16[8,128]{1,0} fusion(%p), kind=kLoop, calls=%fused, ORIGIN, ESTIMATE
}

%cheap (p: bf16[8,128]) -> bf16[8,128] {
  ROOT %p = bf16[8,128]{1,0} parameter(0)
}

%body (s: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %s = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[8,128]{1,0} get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %y = bf16[8,128]{1,0} conditional(%i, %x, %x), branch_computations={%cheap, %dear}
  ROOT %out = (s32[], bf16[8,128]{1,0}) tuple(%next, %y)
}

%condition (s: (s32[], bf16[8,128])) -> pred[] {
  %s = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %end = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,128]{1,0}) tuple(%zero, %p)
  %loop = (s32[], bf16[8,128]{1,0}) while(%start), condition=%condition, body=%body
  %y = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
  %turned = bf16[8,128]{0,1} copy(%y), backend_config={"estimated_cycles":"3"}
  %moved = bf16[8,128]{0,1} copy(%turned), backend_config={"estimated_cycles":"50000"}
  %large = bf16[64,128]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %written = bf16[64,128]{1,0} dynamic-update-slice(%large, %moved, %zero, %zero)
  %q = bf16[2,256,64]{2,1,0} constant(0)
  %splash_mha_fwd.3 = (f32[256,128]{1,0}, bf16[2,256,64]{2,1,0}) custom-call(%q, %q, %q), custom_call_target="tpu"
  ROOT %z = bf16[8,128]{1,0} fusion(%written), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/last"}
}
""".replace("ORIGIN, ESTIMATE", 'metadata={op_name="jit(f)/cond/branch_1_fun/dear"}, {"estimated_cycles":"70"}')


def test_what_a_compiler_expects_by_hand():
  """Five trips of the dearer branch; what has no estimate, and copies that have too small ones, by their bytes."""
  chip = topologies.Chip(hbm=2**30, peak=1e12, hbm_rate=1e9, ici_rate=2e8, clock=2e9)
  found = expected.expected(hlo.Program(TIMED), chip)
  moved = 2 * (8 * 128 * 2) / 1e9 * 2e9  # there and back, in cycles
  scalars = 5 * 2 * 4 / 1e9 * 2e9 + 6 * 2 * 1 / 1e9 * 2e9  # the counter, and whether it goes on
  splash = 2 * 2 * 2 * 64 * 256**2 / 1e12 * 2e9
  below = 3 * moved + splash + scalars  # a copy, what is written, the last fusion
  assert found["cycles"] == pytest.approx(5 * 70 + 50000 + below)
  assert found["seconds"] == found["cycles"] / 2e9
  assert found["without_estimate"] == pytest.approx(below / found["cycles"])
  kinds = {kind["origin"]: kind for kind in found["dearest"]}
  assert kinds["dear bf16[8,128]"]["count"] == 5 and "custom-call splash_mha_fwd f32[256,128]" in kinds
  assert found["dearest"][0]["share"] == max(kind["share"] for kind in kinds.values())


def test_a_loop_that_xla_compiled():
  mesh = sharding.make_mesh(2, 4, 1)

  def several(x):
    add = lambda x, _: (jnp.sin(jax.lax.psum(x, "fsdp")), None)
    return jax.lax.scan(add, x, length=5)[0]

  f = jax.shard_map(several, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
  program = hlo.Program(jax.jit(f).lower(jax.ShapeDtypeStruct((6, 7), jnp.float32)).compile().as_text())
  assert program.collectives() == {"all-reduce": {"count": 5, "bytes": 5 * 2 * 3 / 4 * 3 * 7 * 4}}
  assert program.unknown_loops == 0


@pytest.mark.parametrize("rows, moved", [(64, "all-to-all"), (1, "all-reduce")])
def test_the_head_is_not_gathered(rows, moved):
  """On 8 devices no array has all of the vocabulary and all of the width, be it parts of the head that move or sums."""
  params = {"embed": tiny.params(SMALL)["embed"]}
  hidden = jax.random.normal(jax.random.key(0), (rows, 1, SMALL.hidden_size))
  run = lambda params, hidden: decoder.unembed(SMALL, params, hidden)
  want = run(params, hidden)
  mesh = sharding.make_mesh(1, 2, 4)
  shardings = decoder.param_shardings(mesh, SMALL)
  params = jax.device_put(params, {"embed": shardings["embed"]})
  with sharding.over(params):
    compiled = jax.jit(run).lower(params, sharding.place(params, hidden, "batch" if rows > 1 else None)).compile()
  np.testing.assert_allclose(compiled(params, hidden), want, rtol=1e-5, atol=1e-5)
  v, d = SMALL.vocab_size, SMALL.hidden_size
  text = compiled.as_text()
  assert f"f32[{v // 4},{d // 2}]" in text and not any(f"f32[{n},{d}]" in text for n in (v, v // 4))
  assert moved in text


def test_logits_stay_where_their_rows_are():
  params = {"embed": tiny.params(SMALL)["embed"]}
  hidden = jax.random.normal(jax.random.key(0), (16, 3, SMALL.hidden_size))
  run = lambda params, hidden: jax.nn.logsumexp(decoder.unembed(SMALL, params, hidden), axis=-1)
  want = run(params, hidden)
  mesh = sharding.make_mesh(8, 1, 1)
  params = jax.device_put(params, {"embed": decoder.param_shardings(mesh, SMALL)["embed"]})
  with sharding.over(params):
    compiled = jax.jit(run).lower(params, sharding.place(params, hidden, "batch")).compile()
  np.testing.assert_allclose(compiled(params, sharding.place(params, hidden, "batch")), want, rtol=1e-5, atol=1e-5)
  assert "all-gather" not in compiled.as_text()


# --- compiled for a TPU -----------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
  """A directory with the config.json of a small Llama."""
  config = dict(
      model_type="llama", vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
      num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
  )
  (tmp_path / "config.json").write_text(json.dumps(config))
  return str(tmp_path)


@pytest.fixture(autouse=True)
def quick():
  before = jax.config.jax_optimization_level
  jax.config.update("jax_optimization_level", "O0")
  yield
  jax.config.update("jax_optimization_level", before)


def check(model, *options):
  return cli.main(["compile-check", f"--model={model}", "--topology=v5e:2x2", "--batch=4", "--context=256", *options])


def test_a_training_step_is_compiled_for_a_tpu(model, tmp_path, capsys):
  file = tmp_path / "record.json"
  assert check(model, "--mesh=1,2,2", f"--json={file}") == 0
  out = capsys.readouterr().out
  assert "fits: needs " in out and "products shaped like a weight of the frozen model: none" in out
  record = json.loads(file.read_text())
  held = record["memory"]
  assert record["fits"] and record["attention"] == "splash" and record["chips"] == 4
  assert held["limit"] == int(15.75 * 2**30) and 0 < held["peak"] < 2**27
  assert held["beside"] == 0
  assert held["peak"] == sum(held[part] for part in PARTS) - held["aliased"]
  assert sum(total["bytes"] for total in record["collectives"].values()) > 0
  assert record["unknown_loops"] == 0 and record["involuntary_rematerializations"] == 0


def test_a_prefill_for_a_tpu_has_loops_of_known_length(model, tmp_path, capsys, monkeypatch):
  """Unlike the form for a CPU, whose attention loops as often as the data say."""
  found = {}
  assert check(model, "--program=prefill") == 0
  assert "expected" not in capsys.readouterr().out  # of what was compiled at O0
  jax.config.update("jax_optimization_level", "UNKNOWN")
  tracing_for = hardware.tracing_for
  for form in ("tpu", "cpu"):
    monkeypatch.setattr(hardware, "tracing_for", lambda _: tracing_for(form))
    options = ("--program=prefill", "--kv=evict", "--sparsity=0.5", "--shape=middle", "--mesh=2,1,2")
    assert check(model, *options, f"--json={tmp_path / form}") == 0
    found[form] = json.loads((tmp_path / form).read_text())
  out = capsys.readouterr().out
  assert "attention splash" in out and "S = 0.5 middle" in out and "expected by the compiler, not measured: " in out
  assert found["tpu"]["sparsity"] == 0.5 and found["tpu"]["shape"] == "middle"
  assert found["tpu"]["expected"]["cycles"] > 0
  assert found["tpu"]["unknown_loops"] == 0 < found["cpu"]["unknown_loops"]
  assert set(found["tpu"]["collectives"]) == {"all-reduce"}  # the cache stays where its rows and heads are


def test_a_step_of_the_guided_warm_up_splits_its_rows_and_recomputes_its_states(model, tmp_path, capsys):
  """Of the states of all blocks, which are most of its arguments, a chip holds its own rows."""
  held = {}
  for name, options in (("split", ()), ("kept", ("--remat=none",)), ("double", ("--batch=8",))):
    assert check(model, "--program=warmup", f"--json={tmp_path / name}", *options) == 0
    held[name] = json.loads((tmp_path / name).read_text())["memory"]
  capsys.readouterr()
  config = ModelConfig.from_directory(model)
  states = config.num_blocks * 256 * config.hidden_size * 2  # of a row, in float16
  more = held["double"]["arguments"] - held["split"]["arguments"]  # four rows more on four chips
  assert states <= more < 1.5 * states
  assert held["kept"]["temporaries"] > held["split"]["temporaries"]
  weights = sum(a.size * 2 for a in jax.tree.leaves(decoder.abstract_params(config)))
  for own in held.values():  # the frozen model stays where it is meanwhile, on four chips
    assert weights / 4 <= own["beside"] < 1.1 * weights / 4
    assert own["peak"] == own["beside"] + sum(own[part] for part in PARTS) - own["aliased"]


def test_what_does_not_fit_is_said_and_is_the_exit_status(model, capsys):
  """One row more than all scores of its heads in fp32 would take."""
  assert check(model, "--batch=4096", "--context=2048", "--attention=full") == 1
  assert "does not fit: needs " in (out := capsys.readouterr().out)
  assert "of 15.75 GiB a chip" in out


def test_a_kernel_without_room_is_no_lack_of_memory(monkeypatch):
  case, mesh, _ = traced("llama2-7b", "search")

  class Lowered:
    def compile(self):
      raise RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.10M of 16.00M vmem.")

  nothing = types.SimpleNamespace(trace=types.SimpleNamespace(lower=Lowered))
  monkeypatch.setattr(compiling, "flops", lambda *_: {})
  monkeypatch.setattr(compiling, "gradients", lambda *_: [])
  monkeypatch.setattr(programs, "trace", lambda *_: nothing)
  with pytest.raises(cli.UserError, match="no room for a part of the program .*vmem.*; try --attention=full"):
    compiling.compile_case(case, mesh, "v5e:4x4")


@pytest.mark.parametrize("message, want", [
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
     "Used 18.92G of 15.75G hbm. Exceeded hbm capacity by 3.17G.", (18.92, 15.75)),
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (400.00G) exceeds "
     "available HBM (95.74G).", (400, 95.74)),
    ("RESOURCE_EXHAUSTED: something else", (None, None)),
])
def test_what_a_compiler_says_of_memory(message, want):
  assert compiling.exhausted(message) == tuple(w and int(w * 2**30) for w in want)


@pytest.mark.parametrize("options, words", [
    (["--topology=v9:2x2"], "No topology is known as 'v9:2x2'; write for instance v5e:4x4"),
    (["--topology=v5e:3x5"], "libtpu describes no topology 'v5e:3x5'"),
    (["--topology=v5e"], "libtpu describes no topology 'v5e'"),
    (["--model=gpt-7"], "--model=gpt-7 is neither a known architecture .*llama2-7b.* nor a directory"),
    (["--program=serve"], "--program=serve is unknown; choose one of train, warmup, search, prefill, decode"),
    (["--mesh=1,3,1"], "--mesh=1,3,1 does not use the topology's 4 chips exactly; one size may be -1"),
    (["--mesh=-1,3,1"], "fsdp=3, tensor=1 does not fit the 4 devices"),
    (["--mesh=0,-1,1"], "makes no sense"),
    (["--mesh=4"], "--mesh=4 must be three numbers data,fsdp,tensor"),
    (["--batch=6"], "--batch=6 is not a multiple of the 4 parts of a batch .*; choose 8"),
    (
        ["--context=200", "--attention=splash"],
        "needs a multiple of 128 positions, not 200; choose 256 or attention=full",
    ),
    (["--context=64"], "--context=64 leaves nothing before the 64 scored positions"),
    (["--attention=auto"], "--attention=auto is unknown; choose one of full, splash"),
    (["--candidates=0"], "--candidates must be at least 1"),
    (["--kv=evict", "--attention=splash"], "cannot leave out the keys of skipped tokens"),
    (["--dtype=int8"], "--dtype=int8 is unknown"),
    (["--program=prefill", "--shape=tall"], "--shape=tall is unknown; choose one of late, middle"),
    (["--program=prefill", "--sparsity=1.2"], "--sparsity=1.2 must be from 0 to 0.975"),
    (["--json=nowhere/x.json"], "lies in no existing directory"),
    (["--speed=9"], "'--speed=9' is not understood"),
])
def test_mistakes_are_one_sentence(model, options, words, capsys):
  assert check(model, *options) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.count("\n") == 1 and re.search(words, err), err


def test_without_libtpu_the_command_says_how_to_get_it(model, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  assert check(model) == 2
  assert "libtpu is missing; install it with: pip install 'jax[tpu]'" in capsys.readouterr().err


def test_the_environment_is_prepared_but_not_overruled():
  environment = {"TPU_WORKER_HOSTNAMES": "mine"}
  topologies.prepare(environment)
  assert environment["TPU_WORKER_HOSTNAMES"] == "mine" and environment["JAX_PLATFORMS"] == "cpu"
  assert environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1" and environment["TPU_SKIP_MDS_QUERY"] == "1"


# --- the cost model ---------------------------------------------------------------------------

CHIP = topologies.Chip(hbm=2**30, peak=1e12, hbm_rate=1e9, ici_rate=2e8, clock=1e9)
TOY = tiny.config(vocab_size=100, hidden_size=10, intermediate_size=20, num_blocks=3, num_heads=2, num_kv_heads=1,
                  head_dim=5, tie_embeddings=False)


def test_flops_by_hand():
  # A block: q 10x10, k and v 10x5 each, o 10x10, gate, up and down 10x20 each.
  assert cost.block_parameters(TOY) == 100 + 50 + 50 + 100 + 3 * 200
  assert cost.parameters(TOY) == 3 * 900 + 2 * 1000
  # 7 positions: 49 pairs, scores of 8 queries and their weighted sum over both heads, a 5x5 for each of two heads and
  # one of keys that is turned, and 2 scored positions.
  blocks = 3 * (2 * 7 * 900 + 4 * 10 * 49 + 2 * (10 + 2) * 8 * 7 + 2 * 7 * 3 * 5 * 5)
  assert cost.forward_flops(TOY, 7, 2) == blocks + 2 * 2 * 1000


def test_terms_by_hand():
  slice_ = cost.Slice(CHIP, data=2, fsdp=4, tensor=2)
  assert slice_.chips == 16
  terms = cost.forward(TOY, slice_, 9, 7, 2)  # 9 rows on 8 parts: some have 2
  assert terms.compute == pytest.approx(2 * cost.forward_flops(TOY, 7, 2) / 2 / 1e12)
  weights = 2 * 3 * 900 / 2
  # Numbers in and out of q 20, k 15, v 15, attention 10 + 5 + 5 + 10, o 20, gate 30, up 30, down 30.
  activations = 2 * 3 * 14 * (20 + 15 + 15 + 30 + 20 + 30 + 30 + 30) / 2
  assert terms.memory == pytest.approx((2 * weights + activations) / 1e9)
  summed = 2 * 2 * 1 / 2 * 2 * 3 * 14 * 10
  assert terms.communication == pytest.approx((weights * 3 / 4 + summed) / 1e8)
  assert terms.overlapped == max(dataclasses.astuple(terms)) and terms.serial == sum(dataclasses.astuple(terms))
  alone = cost.forward(TOY, cost.Slice(CHIP), 1, 7, 2)
  assert alone.communication == 0 and alone.memory == pytest.approx((2 * weights + activations) / 1e9)


def test_a_step_moves_the_weights_four_times():
  slice_ = cost.Slice(CHIP, fsdp=4)
  once, four = cost.forward(TOY, slice_, 4, 7, 2), cost.train_step(TOY, slice_, 4, 7, 2)
  assert four.communication == 4 * once.communication and four.memory == 4 * once.memory
  assert four.compute == pytest.approx(4.13 * once.compute)


def test_candidates_are_shared_out_over_data():
  size = (4, 7, 2)
  one = cost.candidates(TOY, cost.Slice(CHIP, fsdp=4), 1, *size)
  assert cost.candidates(TOY, cost.Slice(CHIP, data=3, fsdp=4), 7, *size) == one * 3


def test_the_numbers_of_a_run():
  run = cost.of_config(large_preset(get_config()))
  assert (run.cells, run.positions, run.scored, run.steps, run.validations) == (3, 384, 64, 400, 17)
  # 20 children: a pool of 2 calls and 24 generations, then 2 calls and 16 generations of fine-tuning.
  assert (run.calls, run.children) == (2 + 24 + 2 + 16, 20)
  assert run.validated == 5 + 4 * 25 + 5 + 4 * 17
  planned = cost.of_config(plan_preset(large_preset(get_config()), 14))  # is not searched
  assert (planned.calls, planned.validated, planned.fisher_draws) == (0, 0, 2)
  slice_ = cost.Slice(CHIP, fsdp=4)
  assert (run.search_batch, run.train_batch) == (16, 16)
  terms = cost.run_terms(run, TOY, slice_)
  once, one = cost.forward(TOY, slice_, 16, 384, 64), cost.train_step(TOY, slice_, 16, 384, 64)
  # Sets of 64, 64, 1024 and 64 prompts are 4, 4, 64 and 4 batches; two draws are five passes.
  for name in ("compute", "memory", "communication"):
    of = lambda terms, name=name: getattr(terms, name)
    assert of(terms["training"]) == pytest.approx(3 * (400 * of(one) + 17 * 4 * of(once)))
    assert of(terms["teacher and gate scores"]) == pytest.approx(of(once) * (4 + 4 + 64 * 5 + 4))
    assert of(terms["search and fine-tuning"]) == pytest.approx(3 * 4 * of(once) * (44 * 20 + run.validated))
