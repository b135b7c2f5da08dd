"""FLOPs of a traced program: matrix products by their shapes, times the loops around them.

A multiply-add counts two; elementwise work, sorts and softmax are left out. Loops count as often as they
run, `shard_map` as often as there are devices, of a conditional the dearest branch. Splash attention counts the
(query, key) pairs of the tiles it computes, and its backward kernels the products they repeat.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ftp_jax.models import kernels

# Matrix products of one (query, key) pair in each splash kernel.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def flops(jaxpr: Any, *, unknown_trips: int | None = None) -> float:
  """FLOPs of a closed jaxpr, on all devices together.

  Args:
    unknown_trips: how often to count a loop of which the program alone does not tell; None: refuse.

  Raises:
    ValueError: such a loop holds a matrix product.
  """
  return _flops(jaxpr.jaxpr, unknown_trips)


def _flops(jaxpr: core.Jaxpr, unknown: int | None) -> float:
  total = 0.0
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
      total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * depth
    elif name == "conv_general_dilated":
      raise ValueError("convolutions are not counted: the models have none")
    elif name == "pallas_call":
      total += _splash(eqn)
    elif name == "scan":
      total += params["length"] * _flops(params["jaxpr"].jaxpr, unknown)
    elif name == "while":
      inner = _flops(params["body_jaxpr"].jaxpr, unknown)
      if inner and unknown is None:
        raise ValueError("a loop of unknown length holds matrix products")
      total += inner * (unknown or 0)
    elif name == "cond":
      total += max(_flops(branch.jaxpr, unknown) for branch in params["branches"])
    elif name == "shard_map":
      groups = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
      total += groups * _flops(params["jaxpr"], unknown)
    else:
      total += sum(_flops(inner, unknown) for inner in _inner(params))
  return total


def _inner(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
  """The jaxprs that an equation calls once."""
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item


def _splash(eqn: Any) -> float:
  queries = next(v.aval for v in eqn.invars if v.aval.ndim > 2 and jnp.issubdtype(v.aval.dtype, jnp.floating))
  return splash_flops(str(eqn.params["name"]), queries.shape)


def splash_flops(name: str, queries: Sequence[int]) -> float:
  """FLOPs of one call of the splash kernel of that name, with queries of the shape (..., heads, positions, head size).

  Raises:
    ValueError: it is none of splash's kernels.
  """
  kind = next((kind for kind in ("dkv", "dq", "fwd") if "splash" in name and f"_{kind}" in name), None)
  if kind is None:
    raise ValueError(f"the kernel {name} is not counted")
  *rows, positions, dim = queries
  return 2.0 * _PRODUCTS[kind] * math.prod(rows) * dim * causal_pairs(positions)


def causal_pairs(positions: int) -> int:
  """(query, key) pairs in the tiles that splash computes under a causal mask."""
  block = kernels.splash_block(positions)
  tiles = positions // block
  return tiles * (tiles + 1) // 2 * block**2


def equations(jaxpr: core.Jaxpr) -> Iterator[Any]:
  """All equations of a jaxpr and of those inside it, kernels left out: these work in tiles."""
  for eqn in jaxpr.eqns:
    yield eqn
    if eqn.primitive.name != "pallas_call":
      for inner in _inner(eqn.params):
        yield from equations(inner)


def weight_gradients(jaxpr: Any, shapes: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
  """Shapes of the matrix products of a closed jaxpr that are those of a weight, either way round.

  A gradient with respect to a weight is such a product, rows and positions summed; products of activations have a
  leading axis of rows. Frozen weights must have none.

  Args:
    shapes: of the weights, stacked ones without their leading axis.
  """
  weights = {tuple(sorted(shape)) for shape in shapes if len(shape) == 2}
  found = []
  for eqn in equations(jaxpr.jaxpr):
    if eqn.primitive.name == "dot_general":
      shape = tuple(eqn.outvars[0].aval.shape)
      if tuple(sorted(shape)) in weights:
        found.append(shape)
  return found


def weight_shapes(params: Any) -> set[tuple[int, ...]]:
  """Shapes of the matrices of the frozen model: of one block, and of the embedding."""
  blocks = (leaf.shape[1:] for leaf in jax.tree.leaves(params["blocks"]))
  embed = (leaf.shape for leaf in jax.tree.leaves(params["embed"]))
  return {tuple(shape) for shape in (*blocks, *embed) if len(shape) == 2}
