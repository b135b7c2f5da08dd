"""Bucketed prefill, cache and decode against the masked reference and the dense decoder.

What is static (model, router, routing, plan) comes from a small table, since compiling takes all the time;
weights, routers, tokens, contexts and schedules of that plan are drawn.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftp_jax import hardware
from ftp_jax.models import attention, decoder, kernels
from ftp_jax.models.attention import EMPTY
from ftp_jax.routing import bodies, bucketed, decode, factors, routers, stand_in
from ftp_jax.routing.cache import empty_recent
from ftp_jax.routing.config import RouterConfig, RoutingConfig
from ftp_jax.routing.plan import make_plan
from tests import tiny
from tests.conftest import DEFAULT_COMPILATION, drawn

STATIC = ("config", "routing", "plan", "dtype", "attention")
prefill = jax.jit(bucketed.prefill, static_argnames=STATIC)
extend = jax.jit(decode.extend, static_argnames=("config", "routing", "plan", "dtype"))
dense_forward = jax.jit(decoder.forward, static_argnums=0)
unembed = jax.jit(decoder.unembed, static_argnums=0)
init_params = jax.jit(tiny.params, static_argnums=0)
init_router = jax.jit(routers.init_router, static_argnums=(0, 2, 3))

ROWS, CONTEXT, NEW, ROOM = 3, 12, 4, 6  # B, T, continuation tokens and the slots reserved for them
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)

GQA = tiny.config()
MHA = tiny.config(num_kv_heads=4, tie_embeddings=False)
WINDOW = tiny.config(sliding_window=3, num_kv_heads=1)  # shorter than a continuation, too
QWEN = tiny.config(qkv_bias=True, qk_norm=True, tie_embeddings=False)
DENSE = None  # a block of which nothing is asked


@dataclasses.dataclass(frozen=True)
class Case:
  """`slots`: what each block computes of a context of CONTEXT tokens; `router`: a RouterConfig or a kind."""

  name: str
  model: object
  router: object
  routing: RoutingConfig
  slots: tuple
  max_buckets: int = 4
  at_once: bool = True  # also extend by all tokens at once, one more program
  rank: int = 0  # of the maps that stand in for skipped blocks

  @property
  def dynamic(self):
    return isinstance(self.router, RouterConfig)


ROUTED = (
    Case("one_block", tiny.config(num_blocks=1), "random", RoutingConfig("evict"), (7,), at_once=False),
    Case(
        "random_evict", QWEN, "random",
        RoutingConfig("evict", "argmax", bucket_multiple=4, decode_sparsity=0.2, recent_tokens=2),
        (12, 2, DENSE, 12),
    ),
    Case("global_project", GQA, RouterConfig(), RoutingConfig("project", decode_sparsity=0.4), (DENSE, 4, 10, 6)),
    Case(
        "global_evict", WINDOW, RouterConfig(),
        RoutingConfig("evict", "argmax", score_window=3, decode_sparsity=0.4, decode_rule="quantile"), (8, DENSE, 5, 3),
        1,
    ),
    Case(
        "hidden_project", WINDOW, RouterConfig(factors=(), hidden_states=True),
        RoutingConfig("project", decode_sparsity=0.5, decode_threshold=0.6, one_pass_block=0, recent_tokens=2),
        (12, 6, 6, 5), 1,
    ),
    Case(
        "recurrent_evict", QWEN, RouterConfig("recurrent", hidden_states=True, hidden_size=16),
        RoutingConfig("evict", bucket_multiple=4, decode_sparsity=0.4), (DENSE, 4, 7, DENSE),
    ),
    Case(
        "recurrent_project", QWEN, RouterConfig("recurrent", ("score", "position")),
        RoutingConfig("project", decode_sparsity=0.3, one_pass_block=1), (8, 4, 8, DENSE), 2,
    ),
    Case(
        "per_block_project", GQA, RouterConfig("per_block", ("rank", "position")),
        RoutingConfig("project", "argmax", score_window=1, one_pass_block=3), (10, 5, DENSE, 3), 1, at_once=False,
    ),
    Case(
        "per_block_evict", MHA, RouterConfig("per_block", ("sparsity", "score"), hidden_states=True, hidden_size=8),
        RoutingConfig("evict", "topk", bucket_multiple=3, decode_sparsity=0.4, one_pass_block=2), (8, 3, 3, 11), 2,
    ),
    Case(
        "global_evict_late", GQA, RouterConfig(factors=("score",), hidden_states=True), RoutingConfig("evict"),
        (DENSE, DENSE, 7, 4), at_once=False,
    ),
    Case(
        "global_evict_from_2", GQA, RouterConfig(factors=("position", "score", "rank")),
        RoutingConfig("evict", decode_sparsity=0.4, one_pass_block=1, evict_from=2), (DENSE, 6, 4, 3),
    ),
    Case(
        "per_block_evict_from_3", QWEN, RouterConfig("per_block", ("rank", "score")),
        RoutingConfig("evict", "argmax", decode_sparsity=0.4, decode_rule="quantile", one_pass_block=1, evict_from=3),
        (8, 5, 5, 6), 2,
    ),
    Case(
        "hidden_evict_from_the_plan", GQA, RouterConfig(factors=(), hidden_states=True),
        RoutingConfig("evict", one_pass_block=2, evict_from=2), (DENSE, 9, 6, 3), at_once=False,
    ),
    Case(
        "per_block_told_new_tokens", GQA, RouterConfig("per_block", ("sparsity", "position"), hidden_states=True),
        RoutingConfig("project", decode_sparsity=0.3, one_pass_block=1), (DENSE, 5, 8, DENSE), rank=4,
    ),
    Case("static_maps", GQA, "static", RoutingConfig("evict"), (DENSE, 6, 9, 6), at_once=False, rank=3),
    Case(
        "global_evict_maps", WINDOW, RouterConfig(hidden_states=True), RoutingConfig("evict", decode_sparsity=0.4),
        (8, 10, 5, 3), 2, rank=32,
    ),
    Case(
        "per_block_late_plan_maps", WINDOW, RouterConfig("per_block", ("rank",), hidden_states=True),
        RoutingConfig("project", decode_sparsity=0.4, decode_rule="quantile", one_pass_block=2, recent_tokens=3),
        (DENSE, DENSE, 5, 9), rank=5,
    ),
)
CASE = {case.name: case for case in ROUTED}
all_cases = pytest.mark.parametrize("case", ROUTED, ids=lambda case: case.name)


# --- drawing and running ------------------------------------------------------------------------


@functools.cache
def model_params(config, seed, rank=0):
  """Random norms and biases too: their initial values, one and zero, would hide mistakes."""
  params = init_params(config, seed)
  rng = np.random.default_rng(seed)
  shift = lambda a: a + rng.normal(0, 0.2, a.shape).astype(np.float32) if a.ndim == 2 else a
  params = {"embed": params["embed"], "blocks": jax.tree.map(shift, params["blocks"])}
  return stand_in.attach(params, random_maps(config, rank, rng)) if rank else params


def random_maps(config, rank, rng):
  """Maps that change states about as much as a block does."""
  size = config.num_blocks, config.hidden_size
  draw = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)
  return {"bias": draw(*size), "down": draw(*size, rank), "up": draw(config.num_blocks, rank, config.hidden_size)}


@functools.cache
def make_router(case, seed):
  """Margins of both signs, of contexts and of continuations, with every seed."""
  if not case.dynamic:
    return routers.Router(case.router, None, jax.random.key(seed) if case.router == "random" else None)
  params = init_router(case.router, jax.random.key(seed), case.model.num_blocks, case.model.hidden_size)
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda a: 2 * a + rng.normal(0, 0.3, a.shape).astype(np.float32), params)
  return routers.Router("dynamic", case.router, params)


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
  """One draw. `tokens`: contexts, each followed by its continuation and zeros, (B, CONTEXT + NEW)."""

  params: object
  router: object
  schedule: np.ndarray
  tokens: np.ndarray
  context: np.ndarray
  padding: int

  def _repr_pretty_(self, printer, cycle):  # what hypothesis prints of a failing draw
    printer.text(f"context={self.context}, schedule={self.schedule}, padding={self.padding}, weights not shown")

  @property
  def prompts(self):
    return np.where(np.arange(CONTEXT)[None] < self.context[:, None], self.tokens[:, :CONTEXT], self.padding)

  @property
  def continuation(self):
    return np.take_along_axis(self.tokens, self.context[:, None] + np.arange(NEW)[None], axis=1)


def schedule_of(slots, below):
  """Sparsities of which contexts of CONTEXT tokens need `slots`; `below` in (0, 1) places them in that range."""
  return np.array([0 if n is DENSE else 1 - (n - u) / CONTEXT for n, u in zip(slots, below)], np.float32)


@st.composite
def inputs(draw, case):
  seed = draw(st.integers(0, 2))
  lengths = st.sampled_from((1, 2, 3, 5, 7, 10, 11, CONTEXT))
  context = np.array(draw(st.lists(lengths, min_size=ROWS, max_size=ROWS)), np.int32)
  below = draw(st.lists(st.floats(0.05, 0.9), min_size=len(case.slots), max_size=len(case.slots)))
  tokens, *_ = tiny.batch(case.model, context, context + NEW, CONTEXT + NEW, draw(st.integers(0, 999)))
  router = make_router(case, draw(st.integers(0, 2)))
  return Inputs(
      model_params(case.model, seed, case.rank), router, schedule_of(case.slots, below), tokens, context,
      draw(st.sampled_from((0, 17))),
  )


def plan_of(case, schedule, num_positions=CONTEXT):
  return make_plan(schedule, num_positions, case.routing, case.max_buckets)


def reference(case, x):
  """Logits (B,T,V) and routes (L,B,T) of the masked execution."""
  out = tiny.forward(case.model, case.routing, x.params, x.router, x.tokens, x.context, x.context + NEW, x.schedule)
  return np.asarray(unembed(case.model, x.params, out.hidden_BxTxD)), np.asarray(out.keep_LxBxT)


def run_prefill(case, x):
  plan = plan_of(case, x.schedule)
  return plan, prefill(case.model, case.routing, plan, x.params, x.router, x.prompts, x.context, x.schedule)


def run_extend(case, x, plan, cache, tokens, chunk):
  """Logits (B,C,V) and routes (L,B,C) of `tokens`, `chunk` at a time."""
  recent = empty_recent(case.model, len(tokens), ROOM, jnp.float32)
  logits, keep = [], []
  for begin in range(0, tokens.shape[1], chunk):
    out = extend(
        case.model, case.routing, plan, x.params, x.router, cache, recent, tokens[:, begin : begin + chunk], x.schedule
    )
    recent = out.recent
    logits.append(unembed(case.model, x.params, out.hidden_BxCxD))
    keep.append(out.keep_LxBxC)
  return np.concatenate(logits, axis=1), np.concatenate(keep, axis=2)


# --- equal to the reference ---------------------------------------------------------------------


@all_cases
def test_prefill_equals_masked_and_the_cache_holds_what_is_kept(case):
  kept = []

  @drawn(max_examples=8)
  @given(inputs(case))
  def law(x):
    logits, keep = reference(case, x)
    plan, out = run_prefill(case, x)
    in_context = np.arange(CONTEXT)[None] < x.context[:, None]
    keep = keep[:, :, :CONTEXT] & in_context
    np.testing.assert_array_equal(out.cache.keep_LxBxT, keep)
    assert_close(out.logits_BxV, logits[np.arange(ROWS), x.context - 1])

    evicts = np.arange(len(keep)) >= (case.routing.evict_from if case.routing.kv_mode == "evict" else len(keep))
    held = np.where(evicts[:, None, None], keep, in_context)
    position = np.asarray(out.cache.position_BxS)
    assert position.shape[1] == sum(plan.cache_slots) == out.cache.k_BxGxNxS.shape[3] == out.cache.v_BxGxSxN.shape[2]
    for i, (offset, slots) in enumerate(zip(plan.offsets, plan.cache_slots)):
      for b in range(ROWS):
        own = np.flatnonzero(held[i, b])
        expected = np.concatenate([own, np.full(slots - len(own), EMPTY)])
        np.testing.assert_array_equal(position[b, offset : offset + slots], expected)
    assert plan.cache_slots == tuple(own if evict else CONTEXT for own, evict in zip(plan.slots, evicts))
    kept.append(keep[:, in_context].mean())

  law()
  assert 0.2 < np.mean(kept) < 0.95  # the draws do skip tokens, and not all


# Sizes at which prompts of CONTEXT tokens are computed as long ones are: several tiles of queries and of keys, parts of
# the MLP, and two attentions, for bodies of few slots and of many.
LONG = (
    (bodies, dict(_MLP_SLOTS=5, _FEW_SLOTS=5)),
    (attention, dict(_QUERY_TILE=4, _KEY_PART=4, _KEY_GRAIN=2)),
)


@pytest.mark.parametrize("name", [
    "global_evict", "per_block_evict_from_3", "per_block_late_plan_maps",
])
def test_long_prompts_are_computed_as_short_ones(name, monkeypatch):
  case = CASE[name]
  for module, sizes in LONG:
    for name, size in sizes.items():
      monkeypatch.setattr(module, name, size)
  long_prefill = jax.jit(functools.partial(bucketed.prefill), static_argnames=STATIC)  # traced anew

  @drawn(max_examples=4)
  @given(inputs(case))
  def law(x):
    plan, short = run_prefill(case, x)
    out = long_prefill(case.model, case.routing, plan, x.params, x.router, x.prompts, x.context, x.schedule)
    np.testing.assert_array_equal(out.cache.keep_LxBxT, short.cache.keep_LxBxT)
    np.testing.assert_array_equal(out.cache.position_BxS, short.cache.position_BxS)
    assert_close(out.logits_BxV, short.logits_BxV)
    filled = np.asarray(short.cache.position_BxS) < EMPTY
    for name, axes in (("k_BxGxNxS", (0, 3, 1, 2)), ("v_BxGxSxN", (0, 2, 1, 3))):
      own, theirs = (np.asarray(getattr(cache, name)).transpose(axes)[filled] for cache in (out.cache, short.cache))
      assert_close(own, theirs)

  law()


@pytest.mark.parametrize("few, name, called", [
    (3, "global_project", {(CONTEXT, True), (1, False)}),
    (2, "global_project", {(CONTEXT, True), (4, False), (1, False)}),
    (3, "global_evict_from_2", {(CONTEXT, True), (4, True), (1, False)}),
    (3, "recurrent_evict", {(CONTEXT, True), (4, True), (8, True), (1, False)}),
    (3, "global_evict_maps", {(10, True), (5, True), (1, False)}),
    (3, "recurrent_project", {(CONTEXT, True), (1, False)}),
    # In a window shorter than the context there is no causal kernel.
    (3, "per_block_late_plan_maps", {(CONTEXT, True), (5, False), (1, False)}),
    (None, "per_block_evict_from_3", set()),
])
def test_programs_for_a_gpu_compute_the_same(few, name, called, monkeypatch):
  """Every block in a phase of its own or of its like, slots by a scatter, and cuDNN's calls, computed by XLA.

  Args:
    few: see `bodies`; None: XLA's attention, as in fp32.
  """
  case, calls = CASE[name], set()

  def cudnn(q, *args, aligned, **options):
    calls.add((q.shape[1], aligned))
    return run_cudnn(q, *args, aligned=aligned, implementation="xla", **options)

  run_cudnn = kernels.cudnn
  monkeypatch.setattr(kernels, "cudnn", cudnn)
  monkeypatch.setattr(kernels, "backend_name", lambda: "cuda")
  if few:
    monkeypatch.setattr(kernels, "choose", lambda *args, **options: "cudnn")
    monkeypatch.setitem(bodies._FEW_QUERIES, "cudnn", few)
  assert_programs_compute_the_same(case, "gpu", monkeypatch)
  assert calls == called


@pytest.mark.parametrize("few, name, called", [
    (3, "global_project", {CONTEXT}),
    (2, "global_project", {CONTEXT}),  # the block of 4 slots asks XLA
    (3, "global_evict_from_2", {CONTEXT, 4}),
    (3, "recurrent_evict", {CONTEXT, 4, 8}),
    (3, "per_block_evict_from_3", {CONTEXT}),
    # In a window there is no causal kernel.
    (3, "global_evict_maps", set()),
    (3, "per_block_late_plan_maps", set()),
])
def test_programs_for_a_tpu_compute_the_same(few, name, called, monkeypatch):
  """Every block in a phase of its own or of its like, rows of at least 8, and in splash's place what it computes.

  Args:
    few: see `bodies`.
    called: slots of splash's calls.
  """
  calls = set()

  def splash(q, k, v):
    rows, slots = q.shape[:2]
    calls.add(slots)
    return attention.attend(q, k, v, jnp.broadcast_to(jnp.tri(slots, dtype=bool), (rows, slots, slots)))

  monkeypatch.setattr(kernels, "splash", splash)
  monkeypatch.setattr(kernels, "LANES", 1)  # pads nothing
  monkeypatch.setitem(bodies._FEW_QUERIES, "splash", few)
  monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))  # as memory may be
  assert_programs_compute_the_same(CASE[name], "tpu", monkeypatch)
  assert calls == called


def assert_programs_compute_the_same(case, platform, monkeypatch):
  """Prefill and decoding, traced for a platform, have the routes and logits of the masked execution on a CPU."""

  def traced(function, static):
    jitted = jax.jit(functools.partial(function), static_argnames=static)

    def run(*args):
      with hardware.tracing_for(platform):
        return jitted(*args)

    return run

  monkeypatch.setitem(globals(), "prefill", traced(bucketed.prefill, STATIC))
  monkeypatch.setitem(globals(), "extend", traced(decode.extend, STATIC[:-1]))

  @drawn(max_examples=4)
  @given(inputs(case))
  def law(x):
    logits, keep = reference(case, x)
    plan, out = run_prefill(case, x)
    in_context = np.arange(CONTEXT)[None] < x.context[:, None]
    np.testing.assert_array_equal(out.cache.keep_LxBxT, keep[:, :, :CONTEXT] & in_context)
    assert_close(out.logits_BxV, logits[np.arange(ROWS), x.context - 1])
    at = x.context[:, None] + np.arange(NEW)[None]
    new_logits, new_keep = run_extend(case, x, plan, out.cache, x.continuation, NEW)
    np.testing.assert_array_equal(new_keep, np.take_along_axis(keep, at[None], axis=2))
    assert_close(new_logits, np.take_along_axis(logits, at[:, :, None], axis=1))

  law()


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_programs_for_accelerators_branch_nowhere(platform, monkeypatch):
  """But where a plan changes too often; a loop is a scan of known length."""
  monkeypatch.setattr(kernels, "backend_name", lambda: "cuda")
  monkeypatch.setattr(kernels, "cudnn", functools.partial(kernels.cudnn, implementation="xla"))
  routing = RoutingConfig("evict", one_pass_block=1)
  router_config = RouterConfig("per_block", hidden_states=True)

  def branches(schedule, platform=platform):
    config = tiny.config(num_blocks=len(schedule))
    plan = make_plan(schedule, CONTEXT, routing)
    router = routers.Router("dynamic", router_config, init_router(router_config, jax.random.key(0), len(schedule), 32))
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)
    run = lambda params, tokens, context: bucketed.prefill(
        config, routing, plan, params, router, tokens, context, np.asarray(schedule, np.float32), dtype=jnp.bfloat16
    )
    with hardware.tracing_for(platform):
      prefilled = jax.make_jaxpr(run, return_shape=True)(decoder.abstract_params(config), shape(2, CONTEXT), shape(2))
    more = lambda params, cache, tokens: decode.extend(
        config, routing, plan, params, router, cache, empty_recent(config, 2, ROOM, jnp.bfloat16), tokens,
        np.asarray(schedule, np.float32), dtype=jnp.bfloat16,
    )
    with hardware.tracing_for(platform):
      extended = jax.make_jaxpr(more)(decoder.abstract_params(config), prefilled[1].cache, shape(2, 1))
    return ["cond[" in str(program) for program in (prefilled[0], extended)]

  assert branches([0, 0.5, 0.5, 0.3, 0.3, 0.6]) == [False, False]
  assert branches([0, *[0.5, 0.3] * 5]) == [True, True]
  assert branches([0, 0.5, 0.5, 0.3, 0.3, 0.6], "cpu") == [True, True]


@all_cases
def test_teacher_forcing_equals_prefill_and_decode(case):
  """One token at a time and all at once; and repeated rows of one cache continue as the row does."""
  kept = []

  @drawn(max_examples=6)
  @given(inputs(case), st.permutations([0, 0, 1, 2]))
  def law(x, rows):
    logits, keep = reference(case, x)
    at = x.context[:, None] + np.arange(NEW)[None]
    logits, keep = np.take_along_axis(logits, at[:, :, None], axis=1), np.take_along_axis(keep, at[None], axis=2)
    plan, out = run_prefill(case, x)
    for chunk in (1, NEW) if case.at_once else (1,):
      new_logits, new_keep = run_extend(case, x, plan, out.cache, x.continuation, chunk)
      np.testing.assert_array_equal(new_keep, keep)
      assert_close(new_logits, logits)
    kept.append(keep.mean())

    rows = np.array(rows[:ROWS])
    new_logits, new_keep = run_extend(case, x, plan, out.cache.rows(rows), x.continuation[rows], 1)
    np.testing.assert_array_equal(new_keep, keep[:, rows])
    assert_close(new_logits, logits[rows])

  law()
  if case.routing.decode_sparsity:
    assert 0.1 < np.mean(kept) < 0.98
  else:
    assert np.mean(kept) == 1


@pytest.mark.parametrize("name", ["random_evict", "per_block_evict_from_3", "global_evict_maps"])
def test_neighbours_change_nothing(name):
  case = CASE[name]

  @drawn(max_examples=4)
  @given(inputs(case), inputs(case), st.integers(0, ROWS - 1))
  def law(x, other, row):
    y = dataclasses.replace(x, tokens=other.tokens.copy(), context=other.context.copy(), padding=other.padding)
    y.tokens[row], y.context[row] = x.tokens[row], x.context[row]
    results = []
    for case_inputs in (x, y):
      plan, out = run_prefill(case, case_inputs)
      logits, keep = run_extend(case, case_inputs, plan, out.cache, case_inputs.continuation, 1)
      results.append((out.logits_BxV[row], out.cache.keep_LxBxT[:, row], logits[row], keep[:, row]))
    for a, b in zip(*results):
      (np.testing.assert_array_equal if a.dtype == bool else assert_close)(a, b)

  law()


@pytest.mark.parametrize("name", ["global_evict", "recurrent_project"])
def test_more_padding_and_another_plan_change_nothing(name):
  """Every row alone in a longer context, which needs other buckets."""
  case, longer = CASE[name], CONTEXT + 5
  schedule = schedule_of(case.slots, [0.5] * len(case.slots))
  plan = plan_of(case, schedule, longer)
  assert plan.slots != plan_of(case, schedule).slots

  @drawn(max_examples=3)
  @given(inputs(case))
  def law(x):
    x = dataclasses.replace(x, schedule=schedule)
    own_plan, together = run_prefill(case, x)
    logits, keep = run_extend(case, x, own_plan, together.cache, x.continuation, 1)
    for b in range(ROWS):
      prompt = np.pad(x.prompts[b : b + 1], ((0, 0), (0, longer - CONTEXT)), constant_values=29)
      alone = prefill(case.model, case.routing, plan, x.params, x.router, prompt, x.context[b : b + 1], schedule)
      np.testing.assert_array_equal(alone.cache.keep_LxBxT[:, 0, :CONTEXT], together.cache.keep_LxBxT[:, b])
      assert_close(alone.logits_BxV[0], together.logits_BxV[b])
      own_logits, own_keep = run_extend(case, x, plan, alone.cache, x.continuation[b : b + 1], 1)
      np.testing.assert_array_equal(own_keep[:, 0], keep[:, b])
      assert_close(own_logits[0], logits[b])

  law()


@pytest.mark.parametrize("name", ["recurrent_evict", "hidden_project"])
def test_schedule_zero_equals_dense(name):
  case = dataclasses.replace(CASE[name], slots=(DENSE,) * 4)

  @drawn(max_examples=4)
  @given(inputs(case))
  def law(x):
    dense = np.asarray(unembed(case.model, x.params, dense_forward(case.model, x.params, x.tokens, x.context + NEW)))
    plan, out = run_prefill(case, x)
    assert plan.bodies == ((CONTEXT, False),)
    assert_close(out.logits_BxV, dense[np.arange(ROWS), x.context - 1])
    logits, keep = run_extend(case, x, plan, out.cache, x.continuation, 1)
    assert keep.all()
    assert_close(logits, np.take_along_axis(dense, (x.context[:, None] + np.arange(NEW)[None])[:, :, None], axis=1))

  law()


# --- skipped means not computed -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,read",
    [("recurrent_evict", ()), ("per_block_evict", ()), ("recurrent_project", ("attn_norm", "k", "v", "k_norm")),
     ("global_project", ("attn_norm", "k", "v"))],
)
def test_a_skipped_block_reads_no_weight_but_those_of_keys_and_values(name, read):
  case = CASE[name]
  skips = jax.tree.map(jnp.zeros_like, make_router(case, 0).params)
  skips["out"]["bias"] += jnp.broadcast_to(jnp.array([5.0, -5.0]), skips["out"]["bias"].shape)
  router = routers.Router("dynamic", case.router, skips)
  asked = np.array([slots is not DENSE for slots in case.slots])

  def spoil(params, blocks, spared=()):
    hurt = lambda a: jnp.where(blocks.reshape((-1,) + (1,) * (a.ndim - 1)), jnp.nan, a)
    hurt_all = {k: v if k in spared else jax.tree.map(hurt, v) for k, v in params["blocks"].items()}
    return {**params, "blocks": hurt_all}

  @drawn(max_examples=3)
  @given(inputs(case))
  def law(x):
    x = dataclasses.replace(x, router=router)
    plan, out = run_prefill(case, x)
    run = lambda params: run_extend(
        case, dataclasses.replace(x, params=params), plan, out.cache, x.continuation, 1
    )
    logits, keep = run(x.params)
    np.testing.assert_array_equal(keep, np.broadcast_to(~asked[:, None, None], keep.shape))
    np.testing.assert_array_equal(run(spoil(x.params, asked, read))[0], logits)
    if not asked.all():
      assert np.isnan(run(spoil(x.params, ~asked))[0]).all()  # the test can see what is computed

  law()


@pytest.mark.parametrize("name, scored", [("per_block_late_plan_maps", 1), ("global_evict_late", 2)])
def test_scores_are_computed_where_a_router_reads_them_alone(name, scored, monkeypatch):
  case, calls, window_scores = CASE[name], [], factors.window_scores

  def counted(*arguments):
    jax.debug.callback(lambda: calls.append(None))
    return window_scores(*arguments)

  monkeypatch.setattr(factors, "window_scores", counted)
  fresh = jax.jit(functools.partial(bucketed.prefill), static_argnames=STATIC)  # traced with the counter
  schedule = schedule_of(case.slots, np.full(len(case.slots), 0.5))
  tokens, context = np.ones((1, CONTEXT), np.int32), np.array([CONTEXT], np.int32)
  fresh(
      case.model, case.routing, plan_of(case, schedule), model_params(case.model, 0, case.rank), make_router(case, 0),
      tokens, context, schedule,
  )
  jax.effects_barrier()
  assert len(calls) == scored


# --- compiled programs ----------------------------------------------------------------------------


# Products that a body more adds: those of its seven weights under `evict`, of five under `project`, where keys and
# values are made outside. Attention is shared: there are two of them once bodies have few slots and others many.
@pytest.mark.parametrize("kv_mode, of_body", [("evict", 7), ("project", 5)])
def test_a_program_has_a_body_for_each_bucket_and_none_for_each_block(kv_mode, of_body, monkeypatch):
  fresh = jax.jit(functools.partial(bucketed.prefill), static_argnames=STATIC)

  def products(schedule, max_buckets=4):
    config, routing = tiny.config(num_blocks=len(schedule)), RoutingConfig(kv_mode)
    plan = make_plan(schedule, CONTEXT, routing, max_buckets)
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)
    lowered = fresh.lower(
        config, routing, plan, decoder.abstract_params(config), routers.STATIC, shape(2, CONTEXT), shape(2),
        np.asarray(schedule, np.float32),
    )
    return len(plan.bodies), lowered.as_text().count("stablehlo.dot_general")

  two, few = products([0.5, 0.25] * 2)
  assert (two, few) == products([0.5, 0.25] * 6)
  assert (two, few) == products([0.5, 0.3, 0.4, 0.25], max_buckets=2)
  three, more = products([0.5, 0.25, 0.75, 0.5])
  assert (two, three) == (2, 3)
  assert more - few == of_body
  monkeypatch.setattr(bodies, "_FEW_SLOTS", CONTEXT // 2)
  fresh = jax.jit(functools.partial(bucketed.prefill), static_argnames=STATIC)
  assert products([0.5, 0.25, 0.75, 0.5]) == (3, more + 2)


# As users compile, but with no effort in LLVM, which comes when memory is laid out: the sizes are the same.
LAID_OUT = DEFAULT_COMPILATION | {"xla_backend_optimization_level": 0}


@pytest.mark.parametrize("kv_mode", ["evict", "project"])
def test_a_prefill_needs_no_second_cache(kv_mode, monkeypatch):
  """Branches that read or write a part of the cache could make the compiler copy it for each block."""
  batch, blocks = 2, 16
  config, routing = tiny.config(num_blocks=blocks), RoutingConfig(kv_mode)
  fresh = jax.jit(functools.partial(bucketed.prefill), static_argnames=STATIC)

  def needed(schedule):
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)
    plan = make_plan(schedule, 64, routing)
    found = fresh.lower(
        config, routing, plan, decoder.abstract_params(config), routers.STATIC, shape(batch, 64), shape(batch),
        np.asarray(schedule, np.float32),
    ).compile(LAID_OUT).memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes

  states = batch * 64 * config.hidden_size * 4
  cache = 2 * batch * blocks * 64 * config.num_kv_heads * config.head_dim * 4
  assert cache == 16 * states
  dense = needed([0.0] * blocks)
  assert needed([0.5, 0.25] * (blocks // 2)) < dense + 3 * states
  monkeypatch.setattr(bodies, "_FEW_SLOTS", 33)
  fresh = jax.jit(functools.partial(bucketed.prefill), static_argnames=STATIC)
  assert needed(([0.5, 0.25, 0.75] * blocks)[:blocks]) < dense + 6 * states
