"""Plans of bucketed prefills: hand-worked ones, and what every plan must hold."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftp_jax import hardware
from ftp_jax.errors import UserError
from ftp_jax.routing.config import RoutingConfig
from ftp_jax.routing.plan import Plan, make_plan, merge
from ftp_jax.routing.selection import capacity
from tests.conftest import DEFAULT_COMPILATION, drawn


def test_a_plan_by_hand():
  routing = RoutingConfig("evict")
  plan = make_plan([0.0, 0.5, 0.3, 0.5, 0.0], 10, routing)
  assert plan == Plan(10, ((5, True), (7, True), (10, False)), (2, 0, 1, 0, 2), 0)
  assert plan.slots == plan.cache_slots == (10, 5, 7, 5, 10)
  assert plan.offsets == (0, 10, 15, 22, 27)
  project = make_plan([0.0, 0.5, 0.3, 0.5, 0.0], 10, RoutingConfig("project"))
  assert project.slots == plan.slots and project.cache_slots == (10,) * 5
  assert project.offsets == (0, 10, 20, 30, 40) and project.evict_from == 5
  later = make_plan([0.0, 0.5, 0.3, 0.5, 0.0], 10, RoutingConfig("evict", evict_from=2))
  assert (later.slots, later.cache_slots, later.offsets) == (plan.slots, (10, 10, 7, 5, 10), (0, 10, 20, 27, 32))
  assert make_plan([0.0, 0.5, 0.3], 10, RoutingConfig("evict", bucket_multiple=4)).slots == (10, 8, 8)
  assert make_plan([0.9, 0.99, 0.05], 10, routing).slots == (2, 2, 10)
  # A block that is asked for a little needs every slot, but its gates are still decided.
  assert make_plan([0.0, 0.05], 10, routing).bodies == ((10, False), (10, True))
  assert hash(plan) == hash(make_plan([0.0, 0.5, 0.3, 0.5, 0.0], 10, routing))
  with hardware.tracing_for("tpu"):  # in tiles of 16 rows, unless the user says otherwise
    assert make_plan([0.0, 0.6, 0.5, 0.97], 100, routing).slots == (100, 48, 64, 16)
    assert make_plan([0.0, 0.1], 20, routing).slots == (20, 20)
    assert make_plan([0.0, 0.5], 100, routing, buckets=(50, 100)).slots == (100, 50)


@pytest.mark.parametrize("routed, routing, want", [
    ("0011000", {}, [(0, 2), (2, 4), (4, 7)]),
    ("0110100", {}, [(0, 7)]),  # one dense block before, one but the last after
    ("0001111", {}, [(0, 3), (3, 7)]),
    ("0000000", {}, [(0, 7)]),
    ("0001111", dict(one_pass_block=3), [(0, 3), (3, 7)]),
    ("0001111", dict(one_pass_block=2, kv_mode="evict", evict_from=5), [(0, 2), (2, 3), (3, 5), (5, 7)]),
])
def test_phases_by_hand(routed, routing, want):
  routing = RoutingConfig(**routing)
  assert make_plan([0.5 * int(r) for r in routed], 10, routing).phases(routing) == want


def test_phases_without_branches_by_hand():
  plan = make_plan([0.0, 0.0, 0.5, 0.5, 0.3, 0.3, 0.5], 10, RoutingConfig())
  assert plan.phases(RoutingConfig(), [False] * 7) == [(0, 2), (2, 4), (4, 7)]
  scored = [False, False, True, True, False, True, False]
  assert plan.phases(RoutingConfig(one_pass_block=1), scored) == [(0, 1), (1, 2), (2, 4), (4, 5), (5, 7)]
  # Nine kinds in a row, before the last block, are too many phases; eight are not.
  for blocks, want in ((10, [(0, 10)]), (9, [(i, i + 1) for i in range(7)] + [(7, 9)])):
    plan = make_plan(([0.5, 0.3] * 5)[:blocks], 10, RoutingConfig())
    assert plan.phases(RoutingConfig(), [0] * blocks) == want
  # Where scored and unscored blocks take turns too often, the bodies alone count.
  plan = make_plan([0.5] * 6 + [0.3] * 6, 10, RoutingConfig())
  assert plan.phases(RoutingConfig(), [0, 1] * 6) == [(0, 6), (6, 12)]


def test_merged_buckets_by_hand():
  # 3 and 4 merge at the cost of one slot, 7 and 10 would cost three.
  assert make_plan([0.7, 0.6, 0.3, 0.0], 10, RoutingConfig(), 2).slots == (4, 4, 7, 10)
  # Three blocks of 3 slots weigh more than one of 4: 4 joins 6.
  assert make_plan([0.7, 0.7, 0.7, 0.6, 0.4], 10, RoutingConfig(), 2).slots == (3, 3, 3, 6, 6)
  assert make_plan([0.7, 0.6, 0.3, 0.0], 10, RoutingConfig(), 1).slots == (7, 7, 7, 10)


@drawn(max_examples=150)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5)), min_size=1, max_size=7, unique_by=lambda p: p[0]),
       st.integers(1, 5))
def test_merge_costs_the_fewest_slots(pairs, most):
  sizes = sorted(size for size, _ in pairs)
  count = np.zeros(21, int)
  for size, number in pairs:
    count[size] = number
  cost = lambda rooms: sum(count[s] * (min(room for room in rooms if room >= s) - s) for s in sizes)
  chosen = merge(sizes, count, most)
  assert len(chosen) <= most and chosen == sorted(set(chosen)) and set(chosen) <= set(sizes)
  every = (c for n in range(1, most + 1) for c in itertools.combinations(sizes, n) if c[-1] == sizes[-1])
  assert cost(chosen) == min(map(cost, every))


@drawn(max_examples=60)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(0.001, 0.99)), min_size=6, max_size=6),
    st.sampled_from((5, 16, 33)), st.sampled_from((1, 4)), st.integers(1, 4), st.sampled_from(("evict", "project")),
)
def test_a_plan_holds_every_context_in_few_bodies(schedule, num_positions, multiple, max_buckets, kv_mode):
  routing = RoutingConfig(kv_mode, bucket_multiple=multiple)
  plan = make_plan(schedule, num_positions, routing, max_buckets)
  routed = list(plan.routed)
  assert routed == [s > 0 for s in schedule]
  assert len({body for body in plan.bodies if body[1]}) <= max_buckets and len(plan.bodies) <= max_buckets + 1
  contexts = np.arange(1, num_positions + 1)
  for sparsity, slots in zip(schedule, plan.slots):
    assert slots == num_positions if sparsity == 0 else slots <= num_positions
    assert np.max(np.asarray(capacity(np.float32(sparsity), contexts, multiple))) <= slots
  sizes = plan.cache_slots
  assert plan.offsets == tuple(sum(sizes[:i]) for i in range(len(sizes)))


def test_buckets_given_by_the_user():
  plan = make_plan([0.0, 0.5, 0.3, 0.8], 10, RoutingConfig(), buckets=[16, 4, 6])
  assert plan.slots == (10, 6, 10, 4)  # none has more slots than the prompt has tokens
  assert plan.bodies == ((4, True), (6, True), (10, False), (10, True))
  with pytest.raises(UserError, match="fewer than the 7 tokens .* prompt of 10"):
    make_plan([0.5, 0.3], 10, RoutingConfig(), buckets=[4, 6])
  with pytest.raises(UserError, match="fewer than the 10 tokens"):
    make_plan([0.5, 0.0], 10, RoutingConfig(), buckets=[4, 6])
  with pytest.raises(UserError, match="buckets"):
    make_plan([0.5], 10, RoutingConfig(), buckets=[])


@pytest.mark.parametrize("sparsity,length", [(0.001, 999), (0.627, 437), (0.733, 603), (0.797, 867), (0.931, 2029)])
def test_a_plan_reserves_what_the_compiled_program_keeps(sparsity, length):
  """(1 - s) m comes close above a whole number, where fp32 and a compiler's fused operations would disagree."""
  slots = make_plan([sparsity], length, RoutingConfig()).slots[0]
  compiled = jax.jit(capacity, compiler_options=DEFAULT_COMPILATION)
  assert compiled(jnp.float32(sparsity), jnp.array([length]))[0] == slots
