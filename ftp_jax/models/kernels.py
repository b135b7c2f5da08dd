"""Fused kernels that mean the same as `attention.attend_positions`: cuDNN on NVIDIA GPUs, splash on TPUs.

What a kernel cannot do (dtype, head size, mask, window) falls back to XLA. On a mesh every device
runs the kernel on its rows and heads; XLA cannot partition one. Where the mesh has more devices for heads than there
are key and value heads, these are repeated; where it divides the heads in neither way, XLA computes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from ftp_jax import hardware, sharding
from ftp_jax.errors import UserError
from ftp_jax.models import attention

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")
# Which backend, as `backend_name` has it, and in words which hardware, each kernel needs.
_NEEDS = {"cudnn": ("cuda", "an NVIDIA GPU of compute capability 8.0 or more"), "splash": ("tpu", "a TPU")}
LANES = hardware.LANES
_LARGEST_BLOCK = 512


def attend(
    q_BxTxHxN: jax.Array,
    k_BxSxGxN: jax.Array,
    v_BxSxGxN: jax.Array,
    query_BxT: jax.Array,
    key_BxS: jax.Array,
    window: int | None = None,
    *,
    aligned: bool,
    implementation: str,
) -> jax.Array:
  """Attended values (B,T,H,N) of queries and keys that stand at given positions.

  Args:
    query_BxT, key_BxS, window: as in `attention.attend_positions`.
    aligned: the queries are the keys: T = S, the same position in each slot, padding slots last. Then
      "the key stands at or before the query" and "the key's slot comes at or before the query's" agree.
    implementation: one of IMPLEMENTATIONS; "auto" is the kernel of the backend. A named kernel is what the program
      calls on whatever backend it is traced, see `check_runs`.

  Raises:
    UserError: there is no such implementation.
  """
  name = chosen(q_BxTxHxN, k_BxSxGxN, window, aligned=aligned, implementation=implementation)
  if name == "splash":
    return on_mesh(_padded_splash, q_BxTxHxN, k_BxSxGxN, v_BxSxGxN)
  if name == "cudnn":
    run = functools.partial(cudnn, window=window, aligned=aligned)
    return on_mesh(run, q_BxTxHxN, k_BxSxGxN, v_BxSxGxN, query_BxT, key_BxS)
  in_xla = attention.attend_chunks if hardware.platform() == "tpu" else attention.attend_positions
  return in_xla(q_BxTxHxN, k_BxSxGxN, v_BxSxGxN, query_BxT, key_BxS, window)


def chosen(
    q_BxTxHxN: jax.Array, k_BxSxGxN: jax.Array, window: int | None, *, aligned: bool, implementation: str
) -> str:
  """What `attend` runs of such arrays: "xla", "cudnn" or "splash"; its UserError."""
  return choose(
      implementation, backend_name(), dtype=q_BxTxHxN.dtype, head_dim=q_BxTxHxN.shape[3],
      aligned=aligned, window=window,
      partitioned=_partitioned(q_BxTxHxN) and not (
          sharding.context() and divides(q_BxTxHxN.shape[2], k_BxSxGxN.shape[2])
      ),
  )


def choose(
    implementation: str,
    backend: str,
    *,
    dtype: Any,
    head_dim: int,
    aligned: bool,
    window: int | None,
    partitioned: bool = False,
) -> str:
  """`chosen`, of what it depends on.

  Args:
    backend: see `backend_name`.
    partitioned: XLA partitions the arrays over several devices in a way that leaves none whole heads.

  Raises:
    UserError: see `attend`.
  """
  implementation = resolve(implementation, backend)
  if partitioned:
    return "xla"
  if implementation == "cudnn" and dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128:
    return "cudnn"
  # The TPU compiler refuses the kernel in fp16.
  if implementation == "splash" and dtype in (jnp.bfloat16, jnp.float32) and aligned and not window:
    return "splash"
  return "xla"


def resolve(implementation: str, backend: str | None = None) -> str:
  """The implementation that "auto" stands for on a backend, None: on this one; which `choose` may find unfit.

  Raises:
    UserError: there is no such implementation.
  """
  if implementation not in IMPLEMENTATIONS:
    raise UserError(f"There is no attention={implementation}; choose one of {', '.join(IMPLEMENTATIONS)}.")
  if implementation != "auto":
    return implementation
  backend = backend or backend_name()
  return next((name for name, (needed, _) in _NEEDS.items() if needed == backend), "xla")


def check_runs(implementation: str, backend: str) -> None:
  """Raises UserError where a program that calls this kernel could not run; programs for elsewhere can be compiled."""
  if implementation in _NEEDS and backend != _NEEDS[implementation][0]:
    raise UserError(
        f"attention={implementation} needs {_NEEDS[implementation][1]} and jax runs on {backend} here; "
        "choose attention=auto or attention=xla."
    )


def backend_name() -> str:
  """"cuda" where cuDNN has fused attention, else jax's name of the backend ("cpu", "tpu", "gpu")."""
  name = hardware.platform()
  if name != "gpu":
    return name
  # "9.0" on an NVIDIA GPU; "gfx942" on an AMD one, which jax calls "gpu" too.
  major = str(getattr(jax.local_devices()[0], "compute_capability", "")).split(".")[0]
  return "cuda" if major.isdigit() and int(major) >= 8 else "gpu"


def divides(heads: int, groups: int) -> bool:
  """Whether each device of the mesh of this trace can have whole query heads with their own key and value heads."""
  tensor = sharding.context().get("tensor", 1)
  return heads % tensor == 0 and (groups % tensor == 0 or tensor % groups == 0)


def on_mesh(kernel: Any, q_BxTxHxN: jax.Array, k_BxSxGxN: jax.Array, v_BxSxGxN: jax.Array, *rows: jax.Array):
  """`kernel(q, k, v, *rows)`, (B,T,H,N), on every device with its rows and heads; see `divides`."""
  repeats = max(sharding.context().get("tensor", 1) // k_BxSxGxN.shape[2], 1)
  k_BxSxGxN, v_BxSxGxN = (jnp.repeat(a, repeats, axis=2) if repeats > 1 else a for a in (k_BxSxGxN, v_BxSxGxN))
  names = ("batch", None, "heads", None)
  logical = [names, names, names] + [("batch",) + (None,) * (a.ndim - 1) for a in rows]
  return sharding.map_devices(kernel, (q_BxTxHxN, k_BxSxGxN, v_BxSxGxN, *rows), logical, names)


def _partitioned(a: jax.Array) -> bool:
  mesh = jax.typeof(a).sharding.mesh
  return any(size > 1 for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)


def cudnn(
    q_BxTxHxN: jax.Array,
    k_BxSxGxN: jax.Array,
    v_BxSxGxN: jax.Array,
    query_BxT: jax.Array,
    key_BxS: jax.Array,
    window: int | None = None,
    *,
    aligned: bool,
    implementation: str = "cudnn",
) -> jax.Array:
  """`attend` on cuDNN; arrays of fp16 or bf16.

  Unless aligned and without a window it holds a mask of (B,T,S), one number for all heads. Else a causal mask does:
  padding comes last, where no valid query sees it. Telling the kernel how long rows are takes longer (on an H200 12 to
  25 %, with the zeroing of the other rows), and as it is these hold what any tokens would.

  Args:
    implementation: of `jax.nn.dot_product_attention`: "xla" computes the same without a GPU.
  """
  run = functools.partial(jax.nn.dot_product_attention, q_BxTxHxN, k_BxSxGxN, v_BxSxGxN, implementation=implementation)
  if aligned and not window:
    return run(is_causal=True)
  # A window counts positions, and after eviction slots know nothing of the positions between them.
  out = run(mask=attention.visible(query_BxT, key_BxS, window)[:, None])
  # Queries of padding see no key: their rows hold whatever the kernel left there.
  return jnp.where((query_BxT >= 0)[:, :, None, None], out, 0)


def splash(q_BxTxHxN: jax.Array, k_BxTxGxN: jax.Array, v_BxTxGxN: jax.Array, *, interpret: bool = False) -> jax.Array:
  """`attend` on the splash kernel: aligned, without a window, T a multiple of 128; has a gradient.

  Padding needs no segment ids. It comes last, so that under a causal mask no valid query sees a key of
  padding, and a query of padding sees at least itself, which keeps its row finite.

  Args:
    interpret: run the kernel's body without a TPU, slowly.
  """
  num_queries, heads, dim = q_BxTxHxN.shape[1:]
  block = splash_block(num_queries)
  names = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
  causal = splash_attention.CausalMask((num_queries, num_queries))
  kernel = splash_attention.make_splash_mha_single_device(
      splash_attention.MultiHeadMask([causal] * heads),
      block_sizes=splash_attention.BlockSizes(**{f"block_{name}": block for name in names}),
      interpret=interpret,
  )
  heads_first = lambda a: a.swapaxes(1, 2)
  out = jax.vmap(kernel)(heads_first(q_BxTxHxN * dim**-0.5), heads_first(k_BxTxGxN), heads_first(v_BxTxGxN))
  return heads_first(out)


def _padded_splash(q_BxTxHxN: jax.Array, k_BxTxGxN: jax.Array, v_BxTxGxN: jax.Array) -> jax.Array:
  """`splash` of any number of slots, padded to as few tiles as hold them, and these no larger than that takes."""
  num_slots = q_BxTxHxN.shape[1]
  tiles = -(-num_slots // _LARGEST_BLOCK)
  size = tiles * LANES  # a multiple of what each tile is a multiple of
  pad = lambda a: jnp.pad(a, ((0, 0), (0, -num_slots % size), (0, 0), (0, 0)))
  return splash(*map(pad, (q_BxTxHxN, k_BxTxGxN, v_BxTxGxN)))[:, :num_slots]


def splash_block(num_queries: int) -> int:
  """Side of the square tiles of (query, key) pairs that the kernel computes or leaves out."""
  return max(size for size in range(LANES, _LARGEST_BLOCK + 1, LANES) if num_queries % size == 0)
