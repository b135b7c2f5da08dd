"""Schedules and their repair, the genetic algorithm, and the host loop."""

import errno
import itertools
import json
import os
import signal

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ftp_jax import cli, distributed
from ftp_jax.config import get_config
from ftp_jax.errors import UserError
from ftp_jax.search import genetic, loop, schedule

L, GRID, MAX_SPARSITY = 8, 10, 0.9
U_MAX = 9
COST_L = np.array([8, 7, 6, 5, 4, 3, 2, 1], np.float32)  # linear toy cost: the last blocks are the cheapest


def make_settings(**overrides):
  values = dict(grid=GRID, max_sparsity=MAX_SPARSITY, population=10, elite=3, tournament=3, crossover_rate=0.5,
                mutation_moves=3)
  return genetic.SearchSettings(**{**values, **overrides})


def cost(sparsity_KxL):
  return sparsity_KxL @ COST_L


def units_of(target, named):
  return schedule.to_units(named, target, GRID, MAX_SPARSITY)


def search(directory, *, fitness=cost, validate=cost, num_generations=8, key_seed=0, seeds=None, **overrides):
  seeds = [units_of(0.3, schedule.uniform(L, 0.3))] if seeds is None else seeds
  return loop.run_search(directory=str(directory), seeds_units=seeds, settings=make_settings(**overrides),
                         key_seed=key_seed, fitness=fitness, validate=validate, num_generations=num_generations,
                         progress=False)


# Schedules.


def test_total_units():
  assert schedule.total_units(0.3, 30, 40, 0.975) == 360
  assert schedule.max_units(40, 0.975) == 39
  assert schedule.max_units(100, 0.29) == 29  # 0.29 * 100 = 28.999...
  assert schedule.max_units(40, 0.99999999999) == 39  # never a whole block
  assert schedule.total_units(0.9, L, GRID, MAX_SPARSITY) == L * U_MAX


@pytest.mark.parametrize("target", [0.93, 1.0, -0.1, float("nan")])
def test_impossible_sparsity_names_the_largest_possible(target):
  with pytest.raises(UserError, match="between 0 and 0.9, the largest possible"):
    schedule.total_units(target, L, GRID, MAX_SPARSITY)


@pytest.mark.parametrize("grid,max_sparsity", [(0, 0.5), (10, 1.0), (10, -0.1), (10, 0.05), (40_001, 0.5), (1, 0.999)])
def test_impossible_grid(grid, max_sparsity):
  with pytest.raises(UserError, match="search.grid"):
    schedule.max_units(grid, max_sparsity)


def repair(real_KxL, total, u_max):
  """The feasible schedules nearest to some real ones."""
  zeros = np.zeros(np.shape(real_KxL), np.int32)
  return schedule.project(real_KxL, total, zeros, zeros + u_max)


@pytest.mark.parametrize("real,total,expected", [
    ([0, 3, 6, 9], 18, [0, 3, 6, 9]),  # feasible: unchanged
    ([1, 1, 1, 1], 6, [1, 1, 2, 2]),  # ties: the later blocks get the odd units
    ([0, 0, 12, 12], 20, [1, 1, 9, 9]),  # what the box cuts off is spread evenly
    ([0, 1, 5, 5], 8, [0, 0, 4, 4]),  # too much: shifted down, clipped at 0
    ([0.5, 0.7, 0.9, 0.9], 3, [0, 1, 1, 1]),  # largest fractions round up
    ([-5, -5, -5, 100], 0, [0, 0, 0, 0]),
    ([-5, -5, -5, 100], 36, [9, 9, 9, 9]),
])
def test_repair_by_hand(real, total, expected):
  assert repair(np.array([real], np.float32), total, U_MAX).tolist() == [expected]


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.data())
def test_repair_laws(data):
  u_max = data.draw(st.integers(1, 1000))
  total = data.draw(st.integers(0, L * u_max))
  reals = st.floats(-5000, 5000, width=32)
  real_3xL = np.array(data.draw(st.lists(st.lists(reals, min_size=L, max_size=L), min_size=3, max_size=3)), np.float32)
  units = np.asarray(repair(real_3xL, total, u_max))
  assert units.dtype == np.int32
  assert units.min() >= 0 and units.max() <= u_max
  assert (units.sum(axis=1) == total).all()
  np.testing.assert_array_equal(repair(units, total, u_max), units)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-40, 90), min_size=3, max_size=3), st.integers(0, 12))
def test_repair_is_the_nearest_feasible_schedule(sixteenths, total):
  real_L = np.array(sixteenths) / 16  # exact in float32
  feasible = np.array([u for u in itertools.product(range(5), repeat=3) if sum(u) == total])
  nearest = ((feasible - real_L) ** 2).sum(axis=1).min()
  units_L = np.asarray(repair(real_L[None].astype(np.float32), total, 4))[0]
  assert ((units_L - real_L) ** 2).sum() == pytest.approx(nearest, abs=1e-9)


def test_units_round_trip_on_a_fine_grid():
  units = np.array([[0, 1, 333, 666, 999, 7, 123, 500]], np.int32)
  sparsity = schedule.to_sparsity(units, 1000)
  assert sparsity.dtype == np.float32
  np.testing.assert_array_equal(repair(sparsity * 1000, int(units.sum()), 999), units)


def test_named_schedules_by_hand():
  np.testing.assert_allclose(schedule.late(5, 0.4, 0.9), [0, 0, 0.2, 0.9, 0.9])
  np.testing.assert_allclose(schedule.middle(8, 0.1, 0.9), [0, 0, 0, 0.4, 0.4, 0, 0, 0])
  np.testing.assert_allclose(schedule.middle(8, 0.3, 0.9), [0, 0, 0.6, 0.6, 0.6, 0.6, 0, 0])
  np.testing.assert_allclose(schedule.middle(8, 0.8, 0.9), [0.8] * 8)
  assert units_of(0.3, schedule.uniform(L, 0.3)).tolist() == [3] * 8
  assert units_of(0.3, schedule.late(L, 0.3, 0.9)).tolist() == [0, 0, 0, 0, 0, 6, 9, 9]


def test_nothing_is_put_before_a_plan_that_can_hold_it_all():
  shares = np.array([0.70, 0.75, 0.82, 0.85, 0.92, 0.98, 0.985, 0.985] + [0.99] * 5)
  real, target = np.concatenate([np.zeros(17), shares]), shares.sum() / 30
  units = schedule.to_units(real, target, 40, 0.975, first_block=17)
  assert units[:17].sum() == 0 and units.sum() == round(shares.sum() * 40) and units.max() == 39
  assert schedule.to_units(real, target, 40, 0.975)[:17].any()  # the nearest of all schedules does
  beyond = schedule.to_units(real, 0.5, 40, 0.975, first_block=17)
  assert beyond.sum() == 600 and beyond[:17].any()


def test_importance_shares_the_computed_tokens():
  # Kept shares proportional to 4 : 2 : 1 : 1, of sum 2.
  np.testing.assert_allclose(schedule.from_importance([4, 2, 1, 1], 0.5, 0.9), [0, 0.5, 0.75, 0.75], atol=1e-9)
  # The first block cannot compute more than all: the others share the rest.
  np.testing.assert_allclose(schedule.from_importance([100, 2, 1, 1], 0.5, 0.9), [0, 0.5, 0.75, 0.75], atol=1e-9)
  # No block goes beyond max_sparsity.
  np.testing.assert_allclose(schedule.from_importance([1, 1, 0, 0], 0.5, 0.9), [0.1, 0.1, 0.9, 0.9], atol=1e-6)
  np.testing.assert_allclose(schedule.from_importance([0, 0, 0], 0.2, 0.9), [0.2] * 3)
  with pytest.raises(ValueError, match="not negative"):
    schedule.from_importance([1, -1], 0.2, 0.9)


def test_schedule_file_round_trip(tmp_path):
  path = tmp_path / "schedule.json"
  schedule.save(path, np.array([0, 0.3, 0.975], np.float32))
  assert json.loads(path.read_text()) == [0.0, 0.3, 0.975]
  assert schedule.from_file(path, 3).tolist() == [0.0, 0.3, 0.975]
  assert [p.name for p in tmp_path.iterdir()] == ["schedule.json"]


@pytest.mark.parametrize("text,message", [
    ("[0.1, 0.2]", "holds 2 entries; it must hold a list of 3"),
    ('{"s": [0, 0, 0]}', "holds a dict"),
    ("[0.1, 0.2, 1.0]", "asks 1.0 of block 2"),
    ("[0.1, -0.2, 0]", "asks -0.2 of block 1"),
    ("[NaN, 0, 0]", "asks nan of block 0"),
    ("[true, 0, 0]", "asks True of block 0"),
    ('["0.1", 0, 0]', "asks '0.1' of block 0"),
    ("0.1 0.2 0.3", "is not JSON"),
])
def test_bad_schedule_files(tmp_path, text, message):
  path = tmp_path / "schedule.json"
  path.write_text(text)
  with pytest.raises(UserError, match=message):
    schedule.from_file(path, 3)
  with pytest.raises(UserError, match="cannot be read"):
    schedule.from_file(tmp_path / "missing.json", 3)


# Genetic algorithm.


def random_population(seed, total=24):
  real = np.random.default_rng(seed).uniform(0, U_MAX, (10, L)).astype(np.float32)
  return np.asarray(repair(real, total, U_MAX)), np.arange(10, dtype=np.float32)


def test_settings_come_from_the_config():
  settings = genetic.SearchSettings.from_config(get_config().search)
  assert (settings.population, settings.grid, settings.u_max, settings.num_children) == (16, 40, 39, 12)


@pytest.mark.parametrize("overrides", [
    dict(elite=10), dict(elite=-1), dict(tournament=0), dict(crossover_rate=1.5), dict(mutation_moves=0)])
def test_impossible_settings(overrides):
  with pytest.raises(UserError, match=f"search.{next(iter(overrides))}"):
    make_settings(**overrides)


@pytest.mark.parametrize("seed", range(5))
def test_children_are_feasible_new_and_seeded(seed):
  settings = make_settings()
  units, fitness = random_population(seed)
  children = np.asarray(genetic.propose(jax.random.key(seed), units, fitness, settings))
  assert children.shape == (7, L) and children.dtype == np.int32
  assert children.min() >= 0 and children.max() <= U_MAX and (children.sum(axis=1) == 24).all()
  assert len(np.unique(np.concatenate([units, children]), axis=0)) == len(np.unique(units, axis=0)) + 7
  np.testing.assert_array_equal(genetic.propose(jax.random.key(seed), units, fitness, settings), children)
  assert (genetic.propose(jax.random.key(seed + 100), units, fitness, settings) != children).any()


def test_tournament_prefers_fit_parents():
  # Without crossover and with one move a child differs from its parent in two blocks at most.
  settings = make_settings(population=40, elite=0, crossover_rate=0.0, mutation_moves=1, tournament=4)
  late, uniform = units_of(0.3, schedule.late(L, 0.3, 0.9)), units_of(0.3, schedule.uniform(L, 0.3))
  units = np.stack([late] * 20 + [uniform] * 20)
  fitness = np.repeat(np.float32([1, 2]), 20)
  children = np.asarray(genetic.propose(jax.random.key(0), units, fitness, settings))
  from_late = children[:, :5].sum(axis=1) <= 9  # 0 in the late parent, 15 in the uniform one
  assert from_late.sum() >= 34  # 1 - 0.5^4 of 40, less three standard deviations


def test_one_mutation_reaches_corners():
  settings = make_settings(population=200, elite=0, crossover_rate=0.0, mutation_moves=1)
  units = np.full((200, L), 4, np.int32)
  children = np.asarray(genetic.propose(jax.random.key(0), units, np.zeros(200, np.float32), settings))
  one_move = children[(children != 4).sum(axis=1) == 2]
  sizes = set((one_move.max(axis=1) - 4).tolist())
  assert sizes == {1, 2, 3, 4}  # up to all that a block holds
  whole = one_move[one_move.max(axis=1) == 8]
  assert set(whole.argmax(axis=1).tolist()) == set(range(L)) and (whole.min(axis=1) == 0).all()


def test_crossover_keeps_the_corners_parents_share():
  settings = make_settings(crossover_rate=1.0)
  rng = np.random.default_rng(0)
  parents = np.zeros((2, 64, L), np.float32)
  parents[..., 3:] = rng.uniform(0, U_MAX, (2, 64, 5))
  lower, upper = np.zeros((64, L), np.int32), np.zeros((64, L), np.int32)
  upper[:, 3:] = U_MAX
  first, second = (np.asarray(schedule.project(p, 24, lower, upper)) for p in parents)
  crossed, children = genetic._crossover(jax.random.key(0), first, second, settings)
  assert crossed.all()
  assert (children[:, :3] == 0).all() and (np.asarray(children).sum(axis=1) == 24).all()
  assert (children >= np.minimum(first, second)).all() and (children <= np.maximum(first, second)).all()
  new = (children != first).any(axis=1) & (children != second).any(axis=1)
  assert new.sum() > 40


@pytest.mark.parametrize("everywhere", [0, U_MAX])
def test_a_space_of_one_schedule_is_no_endless_loop(everywhere):
  units = np.full((10, L), everywhere, np.int32)
  children = genetic.propose(jax.random.key(0), units, np.zeros(10, np.float32), make_settings())
  np.testing.assert_array_equal(children, units[:7])


def test_start_keeps_the_seeds_and_mutates_the_rest():
  seeds = np.stack([units_of(0.3, schedule.uniform(L, 0.3)), units_of(0.3, schedule.late(L, 0.3, 0.9))])
  pool = np.asarray(genetic.start(jax.random.key(0), seeds, 14, make_settings()))
  np.testing.assert_array_equal(pool[:2], seeds)
  assert len(np.unique(pool, axis=0)) == 14 and (pool.sum(axis=1) == 24).all()


# Host loop.


def test_finds_the_optimum_of_a_separable_problem(tmp_path):
  result = search(tmp_path, num_generations=40)
  assert result.units.tolist() == [0, 0, 0, 0, 0, 6, 9, 9]
  uniform = schedule.to_sparsity(units_of(0.3, schedule.uniform(L, 0.3)), GRID)
  assert result.fitness < 0.5 * float(cost(uniform[None])[0])
  assert result.fitness == result.validation == pytest.approx(0.6 * 3 + 0.9 * 2 + 0.9 * 1)


def test_same_seed_same_search(tmp_path):
  first, again, other = (search(tmp_path / name, key_seed=seed, num_generations=3)
                         for name, seed in [("a", 0), ("b", 0), ("c", 1)])
  assert first.history == again.history and first.units.tolist() == again.units.tolist()
  assert first.history != other.history


@pytest.mark.parametrize("num_seeds", [1, 25])
def test_fitness_sees_one_shape_and_children_only(tmp_path, num_seeds):
  seeds = np.asarray(repair(np.random.default_rng(1).uniform(0, 9, (num_seeds, L)), 24, U_MAX))
  calls = []

  def fitness(sparsity):
    calls.append(sparsity)
    return cost(sparsity)

  search(tmp_path, seeds=seeds, fitness=fitness, num_generations=4)
  assert {(c.shape, c.dtype) for c in calls} == {((7, L), np.dtype(np.float32))}
  judged = np.concatenate(calls)
  first_calls = {1: 2, 25: 4}[num_seeds]  # calls of 7 that hold the population of 10 and the seeds
  assert len(calls) == first_calls + 4
  np.testing.assert_array_equal(judged[:num_seeds], schedule.to_sparsity(seeds, GRID))
  np.testing.assert_allclose(judged.mean(axis=1), 0.3, atol=1e-6)


def test_the_elite_is_never_lost(tmp_path):
  # The uniform seed is best by far; every child is worse, so only survival keeps it.
  seed = units_of(0.3, schedule.uniform(L, 0.3))
  calls = []

  def fitness(sparsity):
    calls.append(len(sparsity))
    return np.where(np.ptp(sparsity, axis=1) < 1e-6, 0.0, len(calls) + sparsity @ COST_L)

  result = search(tmp_path, seeds=[seed], fitness=fitness, validate=lambda s: np.ptp(s, axis=1), num_generations=5)
  assert [line["best_fitness"] for line in result.history] == [0.0] * 6
  with np.load(tmp_path / loop.STATE_FILE, allow_pickle=False) as state:
    assert (state["units_PxL"] == seed[None]).all(axis=1).sum() == 1
    assert state["fitness_P"].shape == (10,)
  assert result.units.tolist() == seed.tolist()


def test_validation_chooses(tmp_path):
  # Fitness wants the sparsity late, the held-out figure wants it even.
  seed = units_of(0.3, schedule.uniform(L, 0.3))
  validated = []

  def validate(sparsity):
    assert 1 <= len(sparsity) <= 3 + 1 and sparsity.dtype == np.float32
    validated.extend(map(bytes, sparsity))
    return sparsity.max(axis=1)

  result = search(tmp_path, seeds=[seed], validate=validate, num_generations=10)
  assert result.units.tolist() == seed.tolist()
  assert result.validation == pytest.approx(0.3) and result.fitness == pytest.approx(0.3 * COST_L.sum())
  assert result.history[-1]["best_fitness"] < result.fitness
  assert len(set(validated)) == len(validated) > 4  # nothing is validated twice


def read_metrics(directory):
  return [json.loads(line) for line in (directory / loop.METRICS_FILE).read_text().splitlines()]


def state_arrays(directory):
  with np.load(directory / loop.STATE_FILE, allow_pickle=False) as state:
    return {name: state[name].tobytes() for name in state.files}


@pytest.mark.parametrize("calls_before_death", [1, 2, 3, 6])
def test_resume_is_bit_exact(tmp_path, calls_before_death):
  undisturbed = search(tmp_path / "undisturbed")
  calls = []

  def dying(sparsity):
    calls.append(1)
    if len(calls) > calls_before_death:
      raise KeyboardInterrupt
    return cost(sparsity)

  with pytest.raises(KeyboardInterrupt):
    search(tmp_path / "resumed", fitness=dying)
  # A process that died between the state and the metrics leaves too few lines, a torn or a premature one.
  with open(tmp_path / "resumed" / loop.METRICS_FILE, "a", encoding="utf-8") as f:
    f.write('{"generation": 99}\n{"gener')
  resumed_calls = []
  resumed = search(tmp_path / "resumed", fitness=lambda s: resumed_calls.append(1) or cost(s))
  assert resumed.units.tolist() == undisturbed.units.tolist()
  assert resumed[1:] == undisturbed[1:]
  assert state_arrays(tmp_path / "resumed") == state_arrays(tmp_path / "undisturbed")
  assert read_metrics(tmp_path / "resumed") == undisturbed.history == read_metrics(tmp_path / "undisturbed")
  assert [line["generation"] for line in undisturbed.history] == list(range(9))
  done = max(0, calls_before_death - 1)  # generation 0 takes two calls; half of it is not kept
  assert len(resumed_calls) == (10 if done == 0 else 9 - done)


def test_more_generations_continue_a_finished_search(tmp_path):
  whole = search(tmp_path / "whole", num_generations=6)
  search(tmp_path / "parts", num_generations=2)
  assert search(tmp_path / "parts", num_generations=6).history == whole.history

  def never(sparsity):
    raise AssertionError("a finished search judges nothing")

  assert search(tmp_path / "parts", num_generations=6, fitness=never, validate=never).history == whole.history
  with pytest.raises(UserError, match="already has 6 generations and 5 are asked"):
    search(tmp_path / "parts", num_generations=5)


@pytest.mark.parametrize("changed,name", [
    (dict(population=12), "search.population was 10"),
    (dict(elite=2), "search.elite was 3"),
    (dict(crossover_rate=0.25), "search.crossover_rate was 0.5"),
    (dict(max_sparsity=0.8), "search.max_sparsity was 0.9"),
    (dict(key_seed=7), "the seed was 0"),
    (dict(seeds=[[0, 0, 0, 0, 0, 6, 9, 9]]), "starting schedules was"),
    (dict(seeds=[[6, 6]]), "the number of blocks was 8"),
])
def test_changed_settings_are_refused(tmp_path, changed, name):
  search(tmp_path, num_generations=1)
  before = state_arrays(tmp_path)
  with pytest.raises(UserError, match=name):
    search(tmp_path, num_generations=2, **changed)
  assert state_arrays(tmp_path) == before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "missing array"])
def test_a_damaged_state_is_reported_and_the_one_before_it_used(tmp_path, capsys, damage):

  def harm(path):
    data = bytearray(path.read_bytes())
    if damage == "missing array":
      with np.load(path) as state:
        arrays = {name: state[name] for name in state.files if name != "fitness_P"}
      with open(path, "wb") as file:
        np.savez(file, **arrays)
    elif damage == "flipped":
      data[data.index(b"units_PxL") + 150] ^= 0xFF
      path.write_bytes(data)
    else:
      path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "text": b"not a state"}[damage])

  undisturbed = search(tmp_path / "undisturbed")
  resumed, calls = tmp_path / "resumed", []
  search(resumed, num_generations=3)
  harm(resumed / loop.STATE_FILE)
  counted = search(resumed, fitness=lambda s: calls.append(1) or cost(s))
  assert "is damaged; going on from the one before it, of generation 2" in capsys.readouterr().err
  assert len(calls) == 8 - 2
  assert counted.units.tolist() == undisturbed.units.tolist() and counted[1:] == undisturbed[1:]
  assert state_arrays(resumed) == state_arrays(tmp_path / "undisturbed")
  assert (resumed / loop.METRICS_FILE).read_bytes() == (tmp_path / "undisturbed" / loop.METRICS_FILE).read_bytes()
  # What was damaged must not have become the one before.
  harm(resumed / loop.STATE_FILE)
  assert search(resumed).history == undisturbed.history
  harm(resumed / loop.STATE_FILE), harm(resumed / (loop.STATE_FILE + loop.state_lib.PREVIOUS))
  with pytest.raises(UserError, match=f"{loop.STATE_FILE} is damaged; delete it and"):
    search(resumed)


def test_sigterm_stops_after_a_generation(tmp_path):
  undisturbed = search(tmp_path / "undisturbed")
  calls = []

  def terminated(sparsity):
    calls.append(1)
    if len(calls) == 4:
      os.kill(os.getpid(), signal.SIGTERM)
    return cost(sparsity)

  resumed = tmp_path / "resumed"
  with pytest.raises(distributed.Stopped):
    with distributed.together(distributed.Launch(mode="off"), cli.outcome):
      search(resumed, fitness=terminated)
  assert len(calls) == 4 and len(read_metrics(resumed)) == 3  # generation 0 takes two calls
  assert search(resumed).history == undisturbed.history
  assert state_arrays(resumed) == state_arrays(tmp_path / "undisturbed")


def test_killed_between_the_two_files_of_a_save(tmp_path):
  undisturbed = search(tmp_path / "undisturbed")
  search(tmp_path / "resumed", num_generations=3)
  (tmp_path / "resumed" / loop.STATE_FILE).unlink()
  assert search(tmp_path / "resumed").history == undisturbed.history


@pytest.mark.parametrize("call", [0, 1, 4, 5])
def test_a_full_disk_is_one_sentence_and_costs_nothing_saved(tmp_path, monkeypatch, call):
  undisturbed = search(tmp_path / "undisturbed")
  real, calls = os.fsync, itertools.count()

  def full(descriptor):
    if next(calls) >= call:
      raise OSError(errno.ENOSPC, "No space left on device")
    real(descriptor)

  resumed = tmp_path / "resumed"
  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", full)  # metrics, state 0, its copy, state 1, its copy, state 2
    with pytest.raises(UserError, match="no space left to write to .*; free some and run again") as caught:
      search(resumed)
  assert "\n" not in str(caught.value) and not list(resumed.glob("*.tmp"))
  calls = []
  assert search(resumed, fitness=lambda s: calls.append(1) or cost(s)).history == undisturbed.history
  assert len(calls) == {0: 10, 1: 10, 4: 7, 5: 7}[call]  # generation 0 takes two calls
  assert state_arrays(resumed) == state_arrays(tmp_path / "undisturbed")


def test_nan_is_worst(tmp_path):

  def fitness(sparsity):
    figures = cost(sparsity)
    return np.where(figures < 8, np.nan, figures)  # the best region is broken

  result = search(tmp_path, fitness=fitness, validate=fitness, num_generations=15)
  assert result.fitness == pytest.approx(8, abs=0.5) and result.fitness >= 8
  assert all(np.isfinite(list(line.values())).all() for line in result.history)


def test_all_nan_is_an_error_and_leaves_no_state(tmp_path):
  with pytest.raises(UserError, match="Every candidate's fitness is NaN"):
    search(tmp_path, fitness=lambda s: np.full(len(s), np.nan))
  with pytest.raises(UserError, match="Every validated schedule's figure is NaN"):
    search(tmp_path, validate=lambda s: np.full(len(s), np.nan))
  assert not (tmp_path / loop.STATE_FILE).exists()


def test_wrong_callers_are_told(tmp_path):
  with pytest.raises(ValueError, match="as many figures"):
    search(tmp_path, fitness=lambda s: s)
  with pytest.raises(ValueError, match="alike in length and sum"):
    search(tmp_path, seeds=[[3] * L, [2] * L])
