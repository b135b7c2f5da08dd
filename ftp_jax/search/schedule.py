"""Sparsity schedules: the integer grid they live on, the exact projection onto it, and named schedules.

A schedule asks sparsity s_i in [0, 1) of block i, with mean S. Inside the search it is integer units
u_i = s_i * grid with 0 <= u_i <= u_max and sum u = round(S * L * grid) exactly. Named schedules are
real vectors (L,) of sparsities, to be put on the grid by `to_units`.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax.errors import UserError
from ftp_jax.files import replacing

MAX_SPARSITY = 0.975  # of a block in schedules that come without a search
_EDGE_BLOCKS = 3  # the paper finds the first and last three blocks far less redundant than the rest
_FINEST_GRID = 40_000  # capacities count in no finer steps
_LARGEST_UNIT = 2**20  # reals are clipped here, so that their floors and shifts fit int32 and float32
_BISECTIONS = 24  # halvings that exhaust any range of integers between -2 and 2 * _LARGEST_UNIT


def max_units(grid: int, max_sparsity: float) -> int:
  """u_max = floor(max_sparsity * grid); UserError unless a block can skip something, but not everything."""
  if not 1 <= grid <= _FINEST_GRID or not 0 <= max_sparsity < 1:
    raise UserError(
        f"search.grid must be from 1 to {_FINEST_GRID} and search.max_sparsity in [0, 1), not {grid} and "
        f"{max_sparsity}."
    )
  units = min(math.floor(max_sparsity * grid + 1e-9), grid - 1)  # 0.29 * 100 is 28.999..., which means 29
  if units < 1:
    raise UserError(f"search.max_sparsity {max_sparsity} is below one step of search.grid {grid}; raise the grid.")
  return units


def total_units(target: float, num_blocks: int, grid: int, max_sparsity: float) -> int:
  """Units that schedules of mean sparsity `target` hold together; UserError if the blocks cannot hold them."""
  most = num_blocks * max_units(grid, max_sparsity)
  if not 0 <= target < 1 or round(target * num_blocks * grid) > most:
    raise UserError(f"Sparsity {target} is out of reach: choose one between 0 and {most / (num_blocks * grid):g}, "
                    f"the largest possible with search.max_sparsity {max_sparsity} and search.grid {grid}.")
  return round(target * num_blocks * grid)


@jax.jit
def project(real_KxL: jax.Array, total, lower_KxL: jax.Array, upper_KxL: jax.Array) -> jax.Array:
  """The integer schedules nearest to real ones.

  Minimises sum_i (u_i - real_i)^2 over integers with sum `total` and lower <= u <= upper. The problem
  is separable and convex, so its solution is clip(floor(real - tau), lower, upper) for some shift tau;
  the integer part of tau is found by bisection and the rest by ranking fractional parts, so nothing
  depends on rounding errors. Ties go to the later block.

  Args:
    real_KxL: any finite numbers, in units.
    total: integer; sum of lower <= total <= sum of upper for every schedule.
    lower_KxL, upper_KxL: int32 bounds.

  Returns:
    int32 (K, L).
  """
  return jax.vmap(_project_one, in_axes=(0, None, 0, 0))(real_KxL, total, lower_KxL, upper_KxL)


def _project_one(real_L, total, lower_L, upper_L):
  real_L = jnp.clip(jnp.asarray(real_L, jnp.float32), -_LARGEST_UNIT, _LARGEST_UNIT)
  whole_L = jnp.floor(real_L).astype(jnp.int32)

  def shifted(tau):
    return jnp.clip(whole_L - tau, lower_L, upper_L)

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) // 2
    enough = shifted(middle).sum() >= total
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  # At `low` everything sits on its upper bound, at `high` on its lower one.
  bounds = (whole_L - upper_L).min(), (whole_L - lower_L).max() + 1
  tau, _ = jax.lax.fori_loop(0, _BISECTIONS, halve, bounds)
  base_L = shifted(tau + 1)
  can_grow_L = shifted(tau) > base_L
  fraction_L = jnp.where(can_grow_L, real_L - whole_L, -1.0)
  num_blocks = real_L.shape[0]
  order = num_blocks - 1 - jnp.argsort(-fraction_L[::-1], stable=True)
  rank_L = jnp.zeros(num_blocks, jnp.int32).at[order].set(jnp.arange(num_blocks, dtype=jnp.int32))
  return base_L + (rank_L < total - base_L.sum()).astype(jnp.int32)


def to_units(sparsity_L, target: float, grid: int, max_sparsity: float, first_block: int = 0) -> np.ndarray:
  """Puts one real schedule (L,) on the grid with mean sparsity `target`: int32 (L,) units. Raises as `total_units`.

  Nothing is asked of the blocks before `first_block`, where those from it on can hold the target alone.
  """
  sparsity_L = np.asarray(sparsity_L, np.float64)
  num_blocks = len(sparsity_L)
  total = total_units(target, num_blocks, grid, max_sparsity)
  upper_L = np.full(num_blocks, max_units(grid, max_sparsity), np.int32)
  if total <= upper_L[first_block:].sum():
    upper_L[:first_block] = 0
  return np.asarray(project((sparsity_L * grid)[None], total, np.zeros((1, num_blocks), np.int32), upper_L[None]))[0]


def to_sparsity(units, grid: int) -> np.ndarray:
  """Sparsities of a schedule in units, same shape, float32."""
  return (np.asarray(units, np.float64) / grid).astype(np.float32)


def uniform(num_blocks: int, target: float) -> np.ndarray:
  """The same sparsity in every block: (L,)."""
  return np.full(num_blocks, target, np.float64)


def late(num_blocks: int, target: float, max_sparsity: float) -> np.ndarray:
  """All sparsity in the last blocks, each at `max_sparsity`, one block the rest, nothing before: (L,).

  `max_sparsity` should be what the grid can express (max_units / grid), else the projection spreads what is cut off.
  """
  blocks_after = np.arange(num_blocks)[::-1]
  rest = target * num_blocks - blocks_after * max_sparsity
  return np.clip(rest, 0, max_sparsity).round(6)  # a remainder of 1e-16 is no sparsity


def middle(num_blocks: int, target: float, max_sparsity: float) -> np.ndarray:
  """The first and last three blocks dense, the others alike; fewer stay dense where the others cannot hold it: (L,)."""
  schedule_L = uniform(num_blocks, target)
  for edge in range(1, _EDGE_BLOCKS + 1):
    inner = num_blocks - 2 * edge
    if inner < 1 or target * num_blocks > inner * max_sparsity:
      break
    schedule_L = np.zeros(num_blocks)
    schedule_L[edge:-edge] = target * num_blocks / inner
  return schedule_L


def from_importance(importance_L, target: float, max_sparsity: float) -> np.ndarray:
  """A schedule in which a block computes a share of tokens proportional to its importance: (L,).

  1 - s_i = clip(c * importance_i, 1 - max_sparsity, 1), with c such that the mean is `target`. Meant for
  block influence, BI_i = 1 - mean cosine(x_i, x_{i+1}): less influence, more sparsity. Importances are
  finite and not negative; where all are equal (or zero) the schedule is uniform.
  """
  importance_L = np.asarray(importance_L, np.float64)
  if importance_L.ndim != 1 or not np.all(np.isfinite(importance_L)) or importance_L.min() < 0:
    raise ValueError("importance must be a vector of finite numbers that are not negative")
  # A block that changes nothing must still be able to compute, where the target asks for it.
  weight_L = np.maximum(importance_L / importance_L.max(), 1e-9) if importance_L.any() else np.ones_like(importance_L)

  def schedule(scale):
    return 1 - np.clip(scale * weight_L, 1 - max_sparsity, 1)

  low, high = 0.0, 1 / weight_L.min()
  for _ in range(100):
    scale = (low + high) / 2
    low, high = (scale, high) if schedule(scale).mean() > target else (low, scale)
  return schedule(high)


def from_file(path, num_blocks: int) -> np.ndarray:
  """Reads a schedule, a JSON list of L sparsities: (L,). UserError if it is none for `num_blocks` blocks."""
  try:
    with open(path, encoding="utf-8") as f:
      values = json.load(f)
  except OSError as e:
    raise UserError(f"Schedule file {path} cannot be read ({e.strerror}); check search.schedule_path.") from e
  except (ValueError, RecursionError) as e:  # not JSON, nested too deep, or not text at all
    raise UserError(f"Schedule file {path} is not JSON; it must hold a list of {num_blocks} sparsities.") from e
  if not isinstance(values, list) or len(values) != num_blocks:
    found = f"{len(values)} entries" if isinstance(values, list) else f"a {type(values).__name__}"
    raise UserError(f"Schedule file {path} holds {found}; it must hold a list of {num_blocks} sparsities.")
  for i, value in enumerate(values):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
      raise UserError(f"Schedule file {path} asks {value!r} of block {i}; sparsities must be numbers in [0, 1).")
  return np.asarray(values, np.float64)


def save(path, sparsity_L) -> None:
  """Writes a schedule (L,) as `from_file` reads it, atomically."""
  # The shortest decimals of float32: 0.3, not 0.30000001192092896.
  text = json.dumps([float(str(s)) for s in np.asarray(sparsity_L, np.float32)])
  with replacing(path) as file:
    file.write(text.encode())
