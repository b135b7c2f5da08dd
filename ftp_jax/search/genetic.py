"""One generation of the genetic algorithm over schedules, jitted and seeded.

Candidates are schedules in integer units (see schedule.py), all of the same sum; crossover and
mutation keep the sum and the box exactly. Good schedules sit in corners (a block pays in full or not
at all), so crossover never raises a block that both parents leave dense, and mutation may move all
that a block holds at once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from ftp_jax.errors import UserError
from ftp_jax.search import schedule

_WHOLE_MOVE_RATE = 0.25  # share of transfers that move as much as can be moved
_DISTINCT_TRIES = 16  # mutations spent on one duplicate; tiny search spaces may have no new candidate left


@dataclasses.dataclass(frozen=True)
class SearchSettings:
  """The keys of config.search that shape the genetic algorithm; see config.py for each."""
  grid: int
  max_sparsity: float
  population: int
  elite: int
  tournament: int
  crossover_rate: float
  mutation_moves: int

  def __post_init__(self):
    schedule.max_units(self.grid, self.max_sparsity)
    if not 0 <= self.elite < self.population:
      raise UserError(f"search.elite must be at least 0 and below search.population {self.population}, "
                      f"not {self.elite}.")
    for name in ("tournament", "mutation_moves"):
      if getattr(self, name) < 1:
        raise UserError(f"search.{name} must be at least 1, not {getattr(self, name)}.")
    if not 0 <= self.crossover_rate <= 1:
      raise UserError(f"search.crossover_rate must be in [0, 1], not {self.crossover_rate}.")

  @classmethod
  def from_config(cls, search_config) -> "SearchSettings":
    """From `config.search`. UserError for impossible values."""
    return cls(**{field.name: search_config[field.name] for field in dataclasses.fields(cls)})

  @property
  def u_max(self) -> int:
    return schedule.max_units(self.grid, self.max_sparsity)

  @property
  def num_children(self) -> int:
    """Candidates judged in every generation (C)."""
    return self.population - self.elite


@functools.partial(jax.jit, static_argnames=("size", "settings"))
def start(key: jax.Array, seeds_KxL: jax.Array, size: int, settings: SearchSettings) -> jax.Array:
  """`size` >= K candidates: the seeds, then mutations of them in turn; duplicates among seeds are mutated too."""
  num_seeds, num_blocks = seeds_KxL.shape
  pool = seeds_KxL[jnp.arange(size) % num_seeds]
  return _make_distinct(key, pool, jnp.zeros((0, num_blocks), jnp.int32), settings)


@functools.partial(jax.jit, static_argnames=("settings",))
def propose(key: jax.Array, units_PxL: jax.Array, fitness_P: jax.Array, settings: SearchSettings) -> jax.Array:
  """The children of a population: int32 (C, L), C = population - elite.

  Parents win tournaments (lower fitness is better). A child is a clone of one parent, or a crossover of
  two with probability `crossover_rate`; then up to `mutation_moves` transfers of units between two
  blocks. Children differ from the population and from each other, as far as the search space allows.
  """
  key_parents, key_cross, key_moves, key_mutate, key_distinct = jax.random.split(key, 5)
  num_children = settings.num_children
  drawn = jax.random.randint(key_parents, (num_children, 2, settings.tournament), 0, settings.population)
  winner = jnp.argmin(fitness_P[drawn], axis=-1, keepdims=True)
  parents_Cx2 = jnp.take_along_axis(drawn, winner, axis=-1)[..., 0]
  first_CxL, second_CxL = units_PxL[parents_Cx2[:, 0]], units_PxL[parents_Cx2[:, 1]]
  crossed_C, children_CxL = _crossover(key_cross, first_CxL, second_CxL, settings)
  # A crossover is new already and may go without mutation; a clone may not.
  moves_C = jax.random.randint(key_moves, (num_children,), jnp.where(crossed_C, 0, 1), settings.mutation_moves + 1)
  children_CxL = _mutate(key_mutate, children_CxL, moves_C, settings)
  return _make_distinct(key_distinct, children_CxL, units_PxL, settings)


def _crossover(key, first_CxL, second_CxL, settings):
  """Which children are crossovers (C,), and the children (C, L): mixed block by block or in one segment."""
  key_whether, key_kind, key_blocks, key_cuts = jax.random.split(key, 4)
  num_children, num_blocks = first_CxL.shape
  crossed_C = jax.random.bernoulli(key_whether, settings.crossover_rate, (num_children,))
  by_segment_C = jax.random.bernoulli(key_kind, 0.5, (num_children,))
  cuts_Cx2 = jnp.sort(jax.random.randint(key_cuts, (num_children, 2), 0, num_blocks + 1), axis=-1)
  block_1xL = jnp.arange(num_blocks)[None]
  in_segment_CxL = (cuts_Cx2[:, :1] <= block_1xL) & (block_1xL < cuts_Cx2[:, 1:])
  at_random_CxL = jax.random.bernoulli(key_blocks, 0.5, (num_children, num_blocks))
  from_second_CxL = crossed_C[:, None] & jnp.where(by_segment_C[:, None], in_segment_CxL, at_random_CxL)
  mixed_CxL = jnp.where(from_second_CxL, second_CxL, first_CxL)
  # Between the parents there is always a schedule of the right sum, and corners they share survive.
  lower_CxL, upper_CxL = jnp.minimum(first_CxL, second_CxL), jnp.maximum(first_CxL, second_CxL)
  total = first_CxL[0].sum()
  return crossed_C, schedule.project(mixed_CxL, total, lower_CxL, upper_CxL)


def _pick(key, allowed_L):
  """A random index among the allowed ones (0 if there is none)."""
  return jax.random.categorical(key, jnp.where(allowed_L, 0.0, -jnp.inf))


def _move(key, units_L, u_max):
  """Transfers units between two blocks: log-uniform from 1 to as many as fit, or as many as fit at once."""
  key_source, key_sink, key_amount, key_whole = jax.random.split(key, 4)
  source = _pick(key_source, units_L > 0)
  sink = _pick(key_sink, (units_L < u_max) & (jnp.arange(units_L.shape[0]) != source))
  most = jnp.minimum(units_L[source], u_max - units_L[sink])
  amount = jnp.exp(jax.random.uniform(key_amount) * jnp.log1p(most.astype(jnp.float32))).astype(jnp.int32)
  amount = jnp.where(jax.random.bernoulli(key_whole, _WHOLE_MOVE_RATE), most, jnp.minimum(amount, most))
  return units_L.at[source].add(-amount).at[sink].add(amount)


def _mutate(key, units_KxL, moves_K, settings):
  """Applies moves_K random transfers (at most mutation_moves) to each candidate."""

  def one(key, units_L, moves):
    keys = jax.random.split(key, settings.mutation_moves)
    return jax.lax.fori_loop(0, moves, lambda i, units: _move(keys[i], units, settings.u_max), units_L)

  return jax.vmap(one)(jax.random.split(key, units_KxL.shape[0]), units_KxL, moves_K)


def _make_distinct(key, units_CxL, known_KxL, settings):
  """Mutates every candidate that equals a known or an earlier one until none does, or the tries are spent."""
  num = units_CxL.shape[0]
  earlier_CxC = jnp.tril(jnp.ones((num, num), bool), k=-1)

  def equal(a_AxL, b_BxL):
    return jnp.all(a_AxL[:, None] == b_BxL[None], axis=-1)

  def duplicates(units):
    return equal(units, known_KxL).any(axis=1) | (equal(units, units) & earlier_CxC).any(axis=1)

  def step(carry):
    tries, units, duplicate_C = carry
    key_moves, key_mutate = jax.random.split(jax.random.fold_in(key, tries))
    moves_C = jax.random.randint(key_moves, (num,), 1, settings.mutation_moves + 1)
    units = _mutate(key_mutate, units, jnp.where(duplicate_C, moves_C, 0), settings)
    return tries + 1, units, duplicates(units)

  def unfinished(carry):
    tries, _, duplicate_C = carry
    return (tries < _DISTINCT_TRIES) & duplicate_C.any()

  return jax.lax.while_loop(unfinished, step, (0, units_CxL, duplicates(units_CxL)))[1]
