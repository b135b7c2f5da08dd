"""Every jitted function gives on a mesh what it gives on one device, and lies there as it should."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ftp_jax import sharding
from ftp_jax.data.prompts import Prompts
from ftp_jax.errors import UserError
from ftp_jax.evaluation import perplexity, redundancy
from ftp_jax.evaluation.judge import Frozen, Judge
from ftp_jax.inference import programs
from ftp_jax.models import decoder
from ftp_jax.models.attention import EMPTY
from ftp_jax.routing import routers, stand_in
from ftp_jax.routing.config import RouterConfig, RoutingConfig
from ftp_jax.training import allotment, guide, step
from ftp_jax.training import stand_in as fitting
from tests import tiny
from tests.test_bucketed import random_maps

MESHES = ((8, 1, 1), (2, 2, 2), (1, 2, 4))
# 8 divides the embedding, 4 the heads, 2 the heads of keys and values.
MODEL = tiny.config(vocab_size=64)
ROUTER = RouterConfig("global", ("position", "score", "rank", "sparsity"), True, 8)
PER_BLOCK = dataclasses.replace(ROUTER, kind="per_block")
OF_NEW_TOKENS = dataclasses.replace(PER_BLOCK, factors=("sparsity",))  # the only one here whose new tokens may skip
SCHEDULE = np.array([0.0, 0.5, 0.75, 0.25], np.float32)
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


@functools.cache
def params():
  return tiny.params(MODEL)


@functools.cache
def router_params(router=ROUTER):
  return routers.init_router(router, jax.random.key(1), MODEL.num_blocks, MODEL.hidden_size)


def prompts() -> Prompts:
  rng = np.random.default_rng(0)
  context, length = rng.integers(6, 13, 16), rng.integers(16, 21, 16)
  return Prompts(*tiny.batch(MODEL, context, length, 20))


def on_mesh(sizes):
  mesh = sharding.make_mesh(*sizes)
  return jax.device_put(params(), decoder.param_shardings(mesh, MODEL))


def routing(kv_mode="project", router=ROUTER):
  skipped = 0.3 if router is OF_NEW_TOKENS else 0.0
  return RoutingConfig(kv_mode=kv_mode, selection="topk", score_window=4, decode_sparsity=skipped)


def equal(got, want):
  got, want = jax.device_get(got), jax.device_get(want)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), got, want)


# --- rules --------------------------------------------------------------------------------------


def test_axes_lie_where_the_rules_say():
  mesh = sharding.make_mesh(2, 2, 2)
  shardings = decoder.param_shardings(mesh, MODEL)
  specs = jax.tree.map(lambda s: s.spec, shardings)
  assert specs["embed"]["embedding"] == P("tensor", "fsdp")
  assert specs["blocks"]["q"]["kernel"] == P(None, "fsdp", "tensor")
  assert specs["blocks"]["o"]["kernel"] == P(None, "tensor", "fsdp")
  assert specs["blocks"]["down"]["kernel"] == P(None, "tensor", "fsdp")
  assert specs["blocks"]["mlp_norm"]["scale"] == P(None, None)
  assert sharding.named(mesh, ("batch", None), (8, 20)).spec == P(("data", "fsdp"), None)


def test_a_head_is_never_split():
  """Two heads of keys on four devices stay whole, although 16 columns would divide."""
  specs = jax.tree.map(lambda s: s.spec, decoder.param_shardings(sharding.make_mesh(1, 2, 4), MODEL))
  assert specs["blocks"]["k"]["kernel"] == P(None, "fsdp", None)
  assert specs["blocks"]["q"]["kernel"] == P(None, "fsdp", "tensor")


def test_two_axes_on_one_mesh_axis_collide():
  with pytest.raises(ValueError, match="claim a mesh axis twice.*tensor"):
    sharding.RULES.spec(("heads", "mlp"), (4, 4), {"tensor": 2})


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 8, 1), (16, 1, 1), (-1, 9, 1), (1, -1, 3)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
  with pytest.raises(UserError, match="mesh.data, mesh.fsdp"):
    sharding.make_mesh(*sizes)


def test_the_rest_of_the_devices():
  assert dict(sharding.make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert sharding.make_mesh(1, 3, 1).devices.size == 3


def test_replication_is_reported():
  abstract = decoder.abstract_params(MODEL)
  shardings = decoder.param_shardings(sharding.make_mesh(1, 2, 4), MODEL)
  found = dict(sharding.replicated_bytes(abstract, shardings))
  assert set(found) == {f"{where}/scale" for where in ("blocks/attn_norm", "blocks/mlp_norm", "embed/final_norm")}
  sharding.check_replication(abstract, shardings, sum(found.values()))
  with pytest.raises(UserError, match=r"whole on every device.*blocks/attn_norm/scale.*mesh.replicated_mib"):
    sharding.check_replication(abstract, shardings, sum(found.values()) - 1)


def test_replicas_are_no_mistake():
  sharding.check_replication(
      decoder.abstract_params(MODEL), decoder.param_shardings(sharding.make_mesh(8, 1, 1), MODEL), 0
  )


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
  with pytest.raises(ValueError, match="do not divide a batch"):
    sharding.place(on_mesh((8, 1, 1)), np.zeros((6, 4)), "batch")


# --- the same result everywhere -----------------------------------------------------------------


def with_maps(parameters):
  """The parameters with maps that stand in for skipped blocks."""
  return stand_in.attach(parameters, sharding.place(parameters, random_maps(MODEL, 3, np.random.default_rng(4))))


def training(kv_mode, router):
  """Spec, state and batch of a training step."""
  settings = step.TrainSettings(4, 1e-2, 0, 1.0, "kl", 1.0, 1.0, False, "fisher", 1.0, "cosine")
  spec = step.StepSpec(MODEL, routing(kv_mode, router), router, settings, 6, remat="full")
  rows = prompts()
  scores = np.random.default_rng(1).random((MODEL.num_blocks, *rows.tokens.shape), np.float32)
  return spec, step.init_state(settings, jax.tree.map(np.array, router_params(router))), step.Batch(*rows, scores)


def train(parameters, kv_mode, router):
  spec, state, batch = training(kv_mode, router)
  for _ in range(2):
    state, metrics = step.jitted_step(spec, parameters, state, batch, SCHEDULE)
  return state, metrics


@pytest.mark.parametrize(
    "kv_mode, router, meshes, extend",
    [
        ("project", ROUTER, MESHES[::2], lambda p: p), ("evict", PER_BLOCK, MESHES[1:2], with_maps),
        ("project", OF_NEW_TOKENS, MESHES[1:2], with_maps),
    ],
    ids=["project, one router", "evict, a router a block, maps", "project, of new tokens, maps"],
)
def test_training_steps(kv_mode, router, meshes, extend):
  want = train(extend(params()), kv_mode, router)
  for sizes in meshes:
    got = train(extend(on_mesh(sizes)), kv_mode, router)
    equal(got, want)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(got))


def judged(parameters):
  parameters = with_maps(parameters)
  judge = Judge(Frozen(MODEL, parameters), routing(), prompts(), 8, 6)
  rng = np.random.default_rng(2)
  candidates = np.concatenate([SCHEDULE[None], rng.choice([0.0, 0.25, 0.5], (4, 4)).astype(np.float32)])
  router = routers.Router("dynamic", ROUTER, router_params())
  quality = judge.quality(router, SCHEDULE)
  random = judge.quality(routers.Router("random", None, jax.random.key(3)), SCHEDULE).kl
  return judge, (judge.kl(router, candidates), judge.kl(routers.STATIC, candidates[:3]), random, *quality)


def test_a_generation_of_the_search_and_an_evaluation():
  _, want = judged(params())
  for sizes in MESHES[1:]:
    judge, got = judged(on_mesh(sizes))
    equal(got, want)
    teacher = judge._teacher[0]  # rows over data, the vocabulary over the rest: an eighth on every device
    assert math.prod(teacher.sharding.shard_shape(teacher.shape)) * 8 == teacher.size


def test_scores_inputs_and_texts():
  def all_of(parameters):
    frozen, rows = Frozen(MODEL, parameters), prompts()
    scores = guide.collect_fisher(
        MODEL, routing(), parameters, rows, 8, 0, num_scored=6, draws=2, dtype=np.float32
    )
    inputs = guide.collect_inputs(MODEL, routing(), parameters, rows, 8, with_hidden=True, dtype=np.float32)
    router = routers.Router("dynamic", ROUTER, router_params())
    warm = [
        guide.warm_up(  # small steps: of a gradient near 0 Adam makes the rounding a share of the step
            config, routing(router=config), guide.WarmupSettings(4, 8, 1e-3), router_params(config),
            guide.GuideData(rows.context, rows.length, *inputs, scores), SCHEDULE, 0, frozen=parameters,
            remat_policy="full",
        )
        for config in (PER_BLOCK, OF_NEW_TOKENS)
    ]
    assert all(leaf.is_fully_replicated for weights, _ in warm for leaf in jax.tree.leaves(weights))
    lost = allotment.expected_loss(
        PER_BLOCK, routing(router=PER_BLOCK), warm[0][0], guide.GuideData(rows.context, rows.length, *inputs, scores),
        scores, SCHEDULE, np.arange(4) / 4, np.arange(len(rows.context) - 1), 8, parameters,
    )
    maps = fitting.fit(MODEL, parameters, rows, 8, rank=MODEL.hidden_size, ridge=0.1, dtype=np.float32)
    moved = maps["bias"], maps["down"] @ maps["up"]  # the axes of a part of the rank may turn with rounding
    return inputs[1], (
        moved, warm, np.nan_to_num(lost), scores, inputs[0], redundancy.token_similarity(frozen, rows, 8),
        perplexity.routed_perplexity(frozen, routing(), router, SCHEDULE, rows, 8),
        perplexity.truncated_perplexity(frozen, 0.5, rows, 8),
    )

  hidden, want = all_of(params())
  for sizes in ((8, 1, 1), (2, 2, 2)):
    other, got = all_of(on_mesh(sizes))
    equal(got, want)
    assert hidden.dtype == np.float16
    np.testing.assert_allclose(other.astype(np.float32), hidden.astype(np.float32), rtol=2**-10, atol=1e-5)  # an ulp


@pytest.mark.parametrize("kv_mode, meshes", [("project", MESHES), ("evict", MESHES[1:2])])
def test_a_bucketed_prefill(kv_mode, meshes):
  def prefilled(parameters):
    spec = programs.Spec(MODEL, routing(kv_mode))
    weights = programs.Weights(parameters, routers.Router("dynamic", ROUTER, router_params()), SCHEDULE)
    rows = prompts()
    plan = spec.plan(weights, rows.tokens.shape[1])
    with sharding.over(parameters):
      placed = sharding.place(parameters, (rows.tokens, rows.context), "batch")
      out = programs.prefill(spec, plan, weights, *placed)
    cache, held = out.cache, out.cache.position_BxS < EMPTY
    return (
        out.logits_BxV, cache.keep_LxBxT, cache.position_BxS, jnp.where(held[:, None, None], cache.k_BxGxNxS, 0),
        jnp.where(held[:, None, :, None], cache.v_BxGxSxN, 0),
    )

  want = prefilled(params())
  for sizes in meshes:
    equal(prefilled(on_mesh(sizes)), want)


@pytest.mark.parametrize("sizes", [*MESHES, (1, 8, 1)])
def test_no_weight_is_gathered_whole(sizes):
  """The compiled step holds one block's weights at a time: no array of it is as large as a stacked matrix."""
  parameters, (spec, state, batch) = on_mesh(sizes), training("project", ROUTER)
  rows = sharding.place(parameters, (batch.tokens_BxT, batch.context_B, batch.length_B), "batch")
  placed = *rows, sharding.place(parameters, batch.fisher_LxBxT, None, "batch")
  with sharding.over(parameters):
    lowered = step.compiled_step(spec, sharding.mesh_of(parameters)).lower(
        parameters, state, step.Batch(*placed), SCHEDULE
    )
  compiled = lowered.compile()
  text, parts = compiled.as_text(), math.prod(sizes[1:])
  whole = f"f32[{MODEL.num_blocks},{MODEL.hidden_size},{MODEL.intermediate_size}]"
  assert (whole in text) == (parts == 1)
