"""The mesh, and which mesh axis each logical axis lies on.

Mesh axes: `data` (replicas of the weights), `fsdp` (weights in parts, gathered block by block) and `tensor` (heads,
MLP columns and vocabulary in parts). The frozen weights lie over fsdp x tensor, batches over data x fsdp, and the
router is replicated. The candidates of a search lie over data. Logits lie over fsdp x tensor by their vocabulary,
their rows over data, so that the output head never has to be gathered.

A model on a mesh is known by the shardings of its parameters: every jitted function of the project is called under
`over(params)`, which tells `constrain` inside it of the mesh. Without a mesh all of this does nothing.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ftp_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class Rules:
  """Logical axis -> mesh axes; axes that are not named here are never partitioned."""

  mesh_axes: Mapping[str, tuple[str, ...]]

  def spec(self, logical: Sequence[str | None], sizes: Sequence[int], mesh: Mapping[str, int]) -> PartitionSpec:
    """The partitioning of an array on a mesh of the given axis sizes.

    Args:
      logical: name of each axis of the array, or None.
      sizes: how many indivisible parts each axis has. An axis whose parts the mesh axes do not divide is not
        partitioned: `check_replication` finds what is large and lies whole on every device.

    Raises:
      ValueError: two axes of the array claim the same mesh axis, or a name and a size are not given for each.
    """
    if len(logical) != len(sizes):
      raise ValueError(f"{len(logical)} logical axes are named for {len(sizes)} axes")
    claimed = [axis for name in logical for axis in self.mesh_axes.get(name, ())]
    if len(set(claimed)) < len(claimed):
      raise ValueError(f"the logical axes {tuple(logical)} claim a mesh axis twice: {claimed}")
    entries = []
    for name, size in zip(logical, sizes):
      axes = tuple(axis for axis in self.mesh_axes.get(name, ()) if mesh.get(axis, 1) > 1)
      parts = math.prod(mesh[axis] for axis in axes)
      entries.append((axes if len(axes) > 1 else axes[0]) if axes and size % parts == 0 else None)
    return PartitionSpec(*entries)


RULES = Rules(
    {
        "batch": ("data", "fsdp"),
        "replica": ("data",),
        "embed": ("fsdp",),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "mlp": ("tensor",),
        "vocab": ("tensor",),
        "logits": ("tensor", "fsdp"),
    }
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh over the first data * fsdp * tensor devices; one of the sizes may be -1: all that the others leave.

  Args:
    devices: of which; None: all of the run, and with several processes none may be left out.

  Raises:
    UserError: there are not so many devices.
  """
  found = jax.devices() if devices is None else list(devices)
  sizes = [data, fsdp, tensor]
  asked = f"A mesh of data={data}, fsdp={fsdp}, tensor={tensor}"
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise UserError(f"{asked} makes no sense; set mesh.data, mesh.fsdp and mesh.tensor to positive numbers, one to -1.")
  known = math.prod(size for size in sizes if size != -1)
  sizes = [len(found) // known if size == -1 else size for size in sizes]
  total = math.prod(sizes)
  needs_all = -1 in (data, fsdp, tensor) or (devices is None and jax.process_count() > 1)
  if not 0 < total <= len(found) or (needs_all and total < len(found)):
    raise UserError(
        f"{asked} does not fit the {len(found)} devices of this run; change mesh.data, mesh.fsdp or mesh.tensor, for "
        "instance one of them to -1."
    )
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=found[:total])


def batch_parts(mesh: Mesh | None) -> int:
  """In how many parts a batch is split: every batch size must be a multiple of it."""
  return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def named(mesh: Mesh, logical: Sequence[str | None], sizes: Sequence[int]) -> NamedSharding:
  """The sharding of an array; see `Rules.spec`."""
  return NamedSharding(mesh, RULES.spec(logical, sizes, mesh.shape))


def mesh_of(params: Any) -> Mesh | None:
  """The mesh that parameters lie on, None for a single device."""
  sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
  return sharding.mesh if isinstance(sharding, NamedSharding) else None


def over(params: Any) -> contextlib.AbstractContextManager:
  """The context in which functions of these parameters are called."""
  mesh = mesh_of(params)
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def place(params: Any, tree: Any, *logical: str | None) -> Any:
  """Puts host arrays, alike in all processes, where the parameters are.

  Args:
    logical: of the leading axes of each array, for instance "batch"; none: replicated.

  Raises:
    ValueError: the mesh does not divide a named axis.
  """
  mesh = mesh_of(params)
  if mesh is None:
    return tree

  def put(array):
    names = logical + (None,) * (np.ndim(array) - len(logical))
    sharding = named(mesh, names, np.shape(array))
    if logical.count("batch") and batch_parts(mesh) > 1 and not any(sharding.spec):
      raise ValueError(f"{batch_parts(mesh)} parts of the mesh do not divide a batch of shape {np.shape(array)}")
    if isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(place(params, np.asarray(jax.random.key_data(array)), *logical))
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
      return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

  return jax.tree.map(put, tree)


def park(params: Any, tree: Any) -> Any:
  """Results to be used again: in host memory, or where they are if they are spread over a mesh."""
  return jax.device_get(tree) if mesh_of(params) is None else tree


def context() -> Mapping[str, int]:
  """Axes and sizes of the mesh of this trace that XLA partitions over; empty without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return {} if mesh.empty else {a: size for a, size in mesh.shape.items() if a not in mesh.manual_axes}


def fetch(params: Any, stacked: jax.Array | None) -> np.ndarray | None:
  """A host copy, in every process, of an (L, ...) array of `params`' mesh; one slice at a time is made whole."""
  if stacked is None or mesh_of(params) is None:
    return jax.device_get(stacked)
  return np.stack([np.asarray(_slice(stacked, i)) for i in range(len(stacked))])


@jax.jit
def _slice(stacked: jax.Array, index: int) -> jax.Array:
  return replicate(jax.lax.dynamic_index_in_dim(stacked, index, keepdims=False))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
  """Inside a traced function: lays an array out by the rules."""
  mesh = context()
  if math.prod(mesh.values()) == 1:
    return x
  return jax.lax.with_sharding_constraint(x, RULES.spec(logical, x.shape, mesh))


def replicate(tree: Any) -> Any:
  """Inside a traced function: results that every process reads."""
  if math.prod(context().values()) == 1:
    return tree
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def map_candidates(function: Any, candidates: Any, *operands: Any) -> Any:
  """`lax.map(lambda c: function(c, *operands), candidates)`, the candidates spread over the mesh axis `data`.

  Each group of devices judges its own candidates, with the batch over `fsdp` alone.

  Args:
    candidates: (P, ...) array.
    operands: trees of arrays, gathered over `data`.

  Returns:
    Results with a leading P axis.
  """

  def several(candidates, *operands):
    return jax.lax.map(lambda candidate: function(candidate, *operands), candidates)

  groups, count = context().get("data", 1), candidates.shape[0]
  if groups == 1 or count == 1:
    return several(candidates, *operands)
  short = -count % groups
  padded = jax.numpy.concatenate([candidates, candidates[-1:].repeat(short, axis=0)]) if short else candidates
  split = jax.shard_map(
      several, in_specs=(PartitionSpec("data"),) + (PartitionSpec(),) * len(operands), out_specs=PartitionSpec("data"),
      axis_names={"data"}, check_vma=False,
  )
  return jax.tree.map(lambda a: a[:count], split(padded, *operands))


def look_up(table_VxD: Any, index_BxT: jax.Array) -> jax.Array:
  """`table_VxD[index_BxT]`, of a table that lies as ("vocab", "embed"): (B,T,D), as ("replica", None, "embed").

  Each device looks up what is in its rows, and the parts are added. XLA's partitioner does the same by itself, but from
  jax 0.11 on not inside `map_candidates`, where it fails.
  """
  mesh = context()
  table, index = (RULES.spec(names, a.shape, mesh) for names, a in (
      (("vocab", "embed"), table_VxD), (("replica", None), index_BxT)
  ))
  axis = table[0]
  if axis is None:
    x = table_VxD[constrain(index_BxT, "replica", None)]
    return constrain(x, "replica", None, "embed")

  def own(rows, index):
    index = index - jax.lax.axis_index(axis) * rows.shape[0]
    here = (index >= 0) & (index < rows.shape[0])
    return jax.lax.psum(jax.numpy.where(here[:, :, None], rows[jax.numpy.where(here, index, 0)], 0), axis)

  return jax.shard_map(
      own, in_specs=(table, index), out_specs=PartitionSpec(index[0], None, table[1]), axis_names=set(mesh),
      check_vma=False,
  )(table_VxD, index_BxT)


def map_devices(function: Any, arrays: Sequence[Any], logical: Sequence[Sequence[str | None]], out: Any) -> Any:
  """`function(*arrays)` with each device running it on its own parts: what XLA cannot partition by itself.

  Args:
    logical: the axes of each array; one that the mesh does not divide is whole on every device, so that
      `function` must treat the parts of every named axis independently.
    out: the axes of the result, all of whose sizes are those of the first array.
  """
  mesh = context()
  if math.prod(mesh.values()) == 1:
    return function(*arrays)
  specs = tuple(RULES.spec(names, a.shape, mesh) for names, a in zip(logical, arrays))
  out_spec = RULES.spec(out, arrays[0].shape, mesh)
  return jax.shard_map(
      function, in_specs=specs, out_specs=out_spec, axis_names=set(mesh), check_vma=False
  )(*arrays)


def replicated_bytes(abstract: Any, shardings: Any) -> list[tuple[str, int]]:
  """(path, bytes) of the arrays that would lie whole on every device, largest first."""
  leaves = jax.tree_util.tree_leaves_with_path(abstract)
  found = [
      (jax.tree_util.keystr(path, simple=True, separator="/"), math.prod(leaf.shape) * leaf.dtype.itemsize)
      for (path, leaf), placed in zip(leaves, jax.tree.leaves(shardings)) if placed.is_fully_replicated
  ]
  return sorted(found, key=lambda pair: -pair[1])


def check_replication(abstract: Any, shardings: Any, limit: int) -> None:
  """Raises UserError if weights of more than `limit` bytes would lie whole on every device, and names the largest.

  A mesh of `data` alone asks for exactly that: it passes.
  """
  mesh = jax.tree.leaves(shardings)[0].mesh
  found = replicated_bytes(abstract, shardings)
  total = sum(size for _, size in found)
  if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1 and total > limit:
    largest = ", ".join(f"{path} ({size / 2**20:.0f} MiB)" for path, size in found[:3])
    raise UserError(
        f"{total / 2**20:.0f} MiB of weights would lie whole on every device, above all {largest}; choose mesh.fsdp "
        "and mesh.tensor that divide their axes, or raise mesh.replicated_mib."
    )
