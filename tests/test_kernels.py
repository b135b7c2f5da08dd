"""Tests of attention by positions: the tiled XLA form against the mask, the fused kernels against the tiled form."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ftp_jax import sharding
from ftp_jax.errors import UserError
from ftp_jax.models import attention, kernels

_CHOICE = dict(dtype=jnp.bfloat16, head_dim=64, aligned=True, window=None)


def _positions(rng, counts, slots, span, padding):
  """(B, slots): in each row as many ascending positions below `span` as it counts, then padding."""
  rows = [np.sort(rng.choice(span, size=n, replace=False)) for n in counts]
  return np.stack([np.pad(r, (0, slots - len(r)), constant_values=padding) for r in rows]).astype(np.int32)


def _inputs(counts, slots, *, heads=4, groups=2, dim=8, span=None, queries=None, query_counts=None, seed=0):
  """q, k, v, query and key positions; `queries` slots hold `query_counts` of the keys' positions, None all."""
  rng = np.random.default_rng(seed)
  batch = len(counts)
  key = _positions(rng, counts, slots, span or slots, attention.EMPTY)
  if queries is None:
    query = np.where(key < attention.EMPTY, key, -1).astype(np.int32)
  else:
    picks = [np.sort(rng.choice(n, size=m, replace=False)) for n, m in zip(counts, query_counts)]
    rows = [np.pad(key[b, p], (0, queries - len(p)), constant_values=-1) for b, p in enumerate(picks)]
    query = np.stack(rows).astype(np.int32)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q = normal(batch, query.shape[1], heads, dim) * 2
  return q, normal(batch, slots, groups, dim), normal(batch, slots, groups, dim), jnp.asarray(query), jnp.asarray(key)


def _assert_close(got, want, query, tolerance):
  """Equal on the rows of valid queries, finite everywhere."""
  assert got.shape == want.shape and got.dtype == want.dtype
  assert np.isfinite(np.asarray(got, np.float32)).all()
  valid = np.asarray(query) >= 0
  np.testing.assert_allclose(
      np.asarray(got, np.float32)[valid], np.asarray(want, np.float32)[valid], atol=tolerance, rtol=tolerance
  )


# With tiles of 4 queries and parts of 8 keys, the last a multiple of 2: tiles that end inside padding, tiles of padding
# only, one part and many, and keys that fill the parts.
_ALIGNED = dict(slots=21, groups=2)
_CHOSEN = dict(slots=43, queries=10, groups=1)
_CASES = {
    "full": _ALIGNED | dict(counts=(21, 21)),
    "full parts": dict(slots=24, groups=2, counts=(24, 23)),
    "ragged": _ALIGNED | dict(counts=(17, 1)),
    "an empty sequence": _ALIGNED | dict(counts=(0, 9)),
    "evicted": _ALIGNED | dict(counts=(21, 6), span=60),
    "chosen queries": _CHOSEN | dict(counts=(43, 29), query_counts=(10, 2)),
    "chosen late": _CHOSEN | dict(counts=(40, 33), query_counts=(3, 10), seed=3),
}
_ONE_QUERY = dict(slots=19, queries=1, groups=4, counts=(19, 12), query_counts=(1, 1))


def _set_tiles(monkeypatch):
  for name, size in dict(_QUERY_TILE=4, _KEY_PART=8, _KEY_GRAIN=2, _CHUNK_BYTES=2000).items():
    monkeypatch.setattr(attention, name, size)


@functools.cache
def _forms(window, aligned):
  """The tiled form, that of a TPU, cuDNN's very call computed by XLA, and the mask: one compilation a shape."""

  def run(q, k, v, query, key):
    return (
        attention.attend_positions(q, k, v, query, key, window),
        attention.attend_chunks(q, k, v, query, key, window),
        kernels.cudnn(q, k, v, query, key, window, aligned=aligned, implementation="xla"),
        attention.attend(q, k, v, attention.visible(query, key, window)),
    )

  return jax.jit(run)


@pytest.mark.parametrize(
    "values, window",
    [pytest.param(values, w, id=f"{name}-{w}") for name, values in _CASES.items() for w in (None, 6)]
    + [pytest.param(_ONE_QUERY, 1, id="one query-1")],
)
def test_tiles_and_the_call_to_cudnn_equal_the_mask(values, window, monkeypatch):
  _set_tiles(monkeypatch)
  q, k, v, query, key = _inputs(**values)
  # Were a key of padding seen, it would win the softmax of many a query.
  k = jnp.where((key < attention.EMPTY)[:, :, None, None], k, 50.0)
  tiled, chunks, cudnn, want = _forms(window, "queries" not in values)(q, k, v, query, key)
  _assert_close(tiled, want, query, 1e-5)
  _assert_close(chunks, want, query, 1e-5)
  _assert_close(cudnn, want, query, 1e-5)
  of_padding = np.asarray(cudnn)[np.asarray(query) < 0]
  causal = window is None and "queries" not in values
  assert np.isfinite(of_padding).all() if causal else (of_padding == 0).all()


@pytest.mark.parametrize("queries, keys, loops", [(4, 16, 3), (1, 32, 1), (1, 48, 3)])
def test_the_last_query_of_whole_parts_sees_each_key_once(queries, keys, loops, monkeypatch):
  """One query takes four times as many keys at once as a tile of four: of 32 it needs one part, and no loop over it."""
  _set_tiles(monkeypatch)
  one, at = jnp.ones((1, keys, 1, 8)), jnp.arange(keys)[None]
  v = one * jnp.arange(1.0 * keys).reshape(1, keys, 1, 1) ** 2
  arguments = one[:, :queries], one, v, at[:, -queries:], at
  np.testing.assert_allclose(
      attention.attend_positions(*arguments)[0, -1, 0], np.mean(np.arange(1.0 * keys) ** 2), rtol=1e-6
  )
  assert str(jax.make_jaxpr(attention.attend_positions)(*arguments)).count("while[") == loops


@pytest.mark.parametrize(
    "query, window, unseen, unharmed",
    [
        ([0, 1, 2, 3, 4], None, slice(6, None), slice(5)),  # keys behind the last query
        ([12, 13, 14, 15], 3, slice(10), slice(4)),  # keys before the window
        ([0, 20, 21, 22, 23], None, slice(2, None), slice(1)),  # what the first tile holds of the second
    ],
)
def test_what_no_query_of_a_tile_sees_is_not_computed(query, window, unseen, unharmed, monkeypatch):
  """Values that are not numbers would show even with a weight of 0."""
  _set_tiles(monkeypatch)
  one = jnp.ones((1, 24, 1, 8))
  padded = jnp.asarray([query + [-1] * (24 - len(query))])
  out = attention.attend_positions(one, one, one.at[:, unseen].set(jnp.nan), padded, jnp.arange(24)[None], window)
  np.testing.assert_allclose(out[:, unharmed], 1.0, rtol=1e-6)
  assert (np.asarray(out[:, len(query) :]) == 0).all()


def test_a_window_counts_positions_not_slots():
  # Positions 0, 1, 5: with a window of 4 the query at 5 sees itself only, though 1 is the slot before.
  one = jnp.ones((1, 3, 1, 8))
  v = one * jnp.asarray([1.0, 2.0, 4.0]).reshape(1, 3, 1, 1)
  at = jnp.asarray([[0, 1, 5]])
  for out in _forms(4, True)(one, one, v, at, at):
    np.testing.assert_allclose(out[0, :, 0, 0], [1.0, 1.5, 4.0], atol=1e-6)


@jax.jit
def _splash_and_tiles(q, k, v, query, key):
  return kernels.splash(q, k, v, interpret=True), attention.attend_positions(q, k, v, query, key)


# 640 slots are five blocks of 128 each way; the others are one block.
@pytest.mark.parametrize(
    "slots, counts, heads, groups, dim, dtype, tolerance",
    [
        (128, (128, 70), 4, 2, 64, jnp.float32, 1e-5),
        (128, (128, 70), 4, 2, 64, jnp.bfloat16, 2e-2),
        (256, (256, 3), 2, 1, 128, jnp.float32, 1e-5),
        (640, (520,), 1, 1, 64, jnp.float32, 1e-5),
    ],
)
def test_splash_equals_tiles(slots, counts, heads, groups, dim, dtype, tolerance):
  q, k, v, query, key = _inputs(counts, slots, heads=heads, groups=groups, dim=dim, span=4 * slots)
  splash, tiled = _splash_and_tiles(q.astype(dtype), k.astype(dtype), v.astype(dtype), query, key)
  assert splash.dtype == dtype
  _assert_close(splash, tiled, query, tolerance)


def _lowered(platform, inputs, **options):
  run = lambda *args: kernels.attend(*args, **options)
  return jax.jit(run).trace(*inputs).lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def on(monkeypatch):
  """Makes `attend` believe in a backend that is not here; programs for it can be lowered, not run."""

  def set_backend(name):
    monkeypatch.setattr(kernels, "backend_name", lambda: name)
    # jax asks for cuDNN's version before it lowers a call to it.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91100)

  return set_backend


@pytest.mark.parametrize("implementation", ["auto", "cudnn"])
def test_a_gpu_program_calls_cudnn(implementation, on):
  on("cuda")
  inputs = _inputs((30, 20), 32, dim=64)
  half = tuple(a.astype(jnp.bfloat16) for a in inputs[:3]) + inputs[3:]
  options = dict(implementation=implementation, aligned=True)
  causal = _lowered("cuda", half, **options)
  assert "__cudnn$fmhaSoftmax(" in causal and "PADDING" not in causal and "CAUSAL" in causal
  # A mask reaches the kernel as a bias of one head for all.
  for masked in (_lowered("cuda", half, **options | dict(aligned=False)), _lowered("cuda", half, window=8, **options)):
    assert "__cudnn$fmhaScaleBiasSoftmax(" in masked and "NO_MASK" in masked and "tensor<2x1x32x32xbf16>" in masked
  assert "__cudnn" not in _lowered("cuda", inputs, **options)


@pytest.mark.parametrize("implementation", ["auto", "splash"])
def test_a_tpu_program_calls_splash(implementation, on):
  on("tpu")
  options = dict(implementation=implementation, aligned=True)
  whole = _inputs((128, 20), 128, dim=64)
  assert "tpu_custom_call" in _lowered("tpu", whole, **options)
  half = tuple(a.astype(jnp.bfloat16) for a in whole[:3]) + whole[3:]
  assert "tpu_custom_call" in _lowered("tpu", half, **options)
  assert "tpu_custom_call" in _lowered("tpu", _inputs((100,), 100, dim=64), **options)
  for changes in (dict(aligned=False), dict(window=8)):
    assert "tpu_custom_call" not in _lowered("tpu", whole, **options | changes)


@pytest.mark.parametrize("slots, tiles", [(100, 128), (130, 256), (513, 768)])
def test_splash_of_other_numbers_of_slots_is_padded_to_whole_tiles(slots, tiles, monkeypatch):
  """To as few tiles of up to 512 as hold them."""
  q, k, v, query, key = _inputs((slots, slots - 60), slots, heads=2, groups=1, dim=64, span=4 * slots)
  run, seen = functools.partial(kernels.splash, interpret=True), []
  monkeypatch.setattr(kernels, "splash", lambda *args: seen.append(args[0].shape[1]) or run(*args))
  out = kernels.attend(q, k, v, query, key, aligned=True, implementation="splash")
  _assert_close(out, attention.attend_positions(q, k, v, query, key), query, 1e-5)
  assert seen == [tiles]


def test_arrays_over_several_devices_take_a_kernel_only_inside_shard_map(on):
  on("tpu")
  inputs = _inputs((128, 20), 128)
  rows = PartitionSpec("data")
  run = lambda *args: kernels.attend(*args, aligned=True, implementation="splash")

  def calls(f, mesh):
    placed = [jax.device_put(a, NamedSharding(mesh, rows)) for a in inputs]
    return "tpu_custom_call" in jax.jit(f).trace(*placed).lower(lowering_platforms=("tpu",)).as_text()

  several = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  one = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
  assert not calls(run, several)
  assert calls(jax.shard_map(run, mesh=several, in_specs=(rows,) * 5, out_specs=rows, check_vma=False), several)
  assert calls(run, one)


# On 4 devices for heads: heads of their own, keys and values repeated, and heads that divide in no way.
@pytest.mark.parametrize("heads, groups, on_mesh", [(8, 4, True), (4, 2, True), (4, 1, True), (6, 3, False)])
def test_on_a_mesh_every_device_runs_the_kernel_on_its_rows_and_heads(heads, groups, on_mesh, on):
  q, k, v, query, key = _inputs((128, 20), 128, heads=heads, groups=groups, dim=16)
  mesh = sharding.make_mesh(2, 1, 4)
  rows = NamedSharding(mesh, PartitionSpec("data"))
  placed = [jax.device_put(a, rows) for a in (q, k, v, query, key)]
  kernel = functools.partial(kernels.splash, interpret=True)
  kinds = {"tpu": ("splash", "tpu_custom_call"), "cuda": ("cudnn", "__cudnn")}
  with jax.set_mesh(mesh):
    assert kernels.divides(heads, groups) == on_mesh
    for platform, (implementation, call) in kinds.items():
      on(platform)
      half = [a.astype(jnp.bfloat16) for a in placed[:3]] + placed[3:]
      assert (call in _lowered(platform, half, aligned=True, implementation=implementation)) == on_mesh
    if on_mesh:
      run = lambda q, k, v: kernels.on_mesh(kernel, q, k, v)
      got = jax.jit(run)(*placed[:3])
      assert tuple(got.sharding.spec)[:3] == ("data", None, "tensor")
      _assert_close(got, attention.attend_positions(q, k, v, query, key), query, 1e-5)


def test_splash_has_the_gradient_of_the_mask():
  q, k, v, query, key = _inputs((256, 70), 256, dim=64)
  weight = jax.random.normal(jax.random.key(0), q.shape) * (query >= 0)[:, :, None, None]
  loss = lambda form: lambda q, k, v: jnp.sum(form(q, k, v) * weight)
  splash = loss(functools.partial(kernels.splash, interpret=True))
  full = loss(lambda q, k, v: attention.attend(q, k, v, attention.visible(query, key, None)))
  grads = [jax.jit(jax.grad(f, argnums=(0, 1, 2)))(q, k, v) for f in (splash, full)]
  for got, want in zip(*grads):
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
    "implementation, backend, changes, want",
    [
        ("auto", "cpu", {}, "xla"),
        ("auto", "gpu", {}, "xla"),  # not NVIDIA, or too old
        ("auto", "cuda", {}, "cudnn"),
        ("auto", "tpu", {}, "splash"),
        ("xla", "cuda", {}, "xla"),
        ("xla", "tpu", {}, "xla"),
        ("cudnn", "cuda", dict(dtype=jnp.float16), "cudnn"),
        ("cudnn", "cuda", dict(dtype=jnp.dtype("float32")), "xla"),
        ("cudnn", "cuda", dict(head_dim=60), "xla"),
        ("cudnn", "cuda", dict(head_dim=256), "xla"),
        ("cudnn", "cuda", dict(aligned=False, window=7), "cudnn"),
        ("cudnn", "cuda", dict(partitioned=True), "xla"),
        ("splash", "tpu", dict(dtype=jnp.dtype("float32")), "splash"),
        ("splash", "tpu", dict(dtype=jnp.float16), "xla"),
        ("splash", "tpu", dict(aligned=False), "xla"),
        ("splash", "tpu", dict(window=7), "xla"),
        ("splash", "tpu", dict(partitioned=True), "xla"),
    ],
)
def test_choice(implementation, backend, changes, want):
  assert kernels.choose(implementation, backend, **_CHOICE | changes) == want


@pytest.mark.parametrize(
    "implementation, backend",
    [("cudnn", "cpu"), ("cudnn", "tpu"), ("cudnn", "gpu"), ("splash", "cpu"), ("splash", "cuda")],
)
def test_a_kernel_the_backend_cannot_run_is_refused(implementation, backend):
  with pytest.raises(UserError, match=f"attention={implementation} needs .* on {backend} .*attention=auto"):
    kernels.check_runs(implementation, backend)
  for other in ("auto", "xla"):
    kernels.check_runs(other, backend)


def test_a_named_kernel_is_what_a_program_for_elsewhere_calls():
  assert kernels.choose("splash", "cpu", **_CHOICE) == "splash"
  options = dict(implementation="splash", aligned=True)
  assert "tpu_custom_call" in _lowered("tpu", _inputs((128, 20), 128, dim=64), **options)


def test_unknown_names_are_refused_here_too():
  inputs = _inputs((5,), 5)
  with pytest.raises(UserError, match="no attention=flash; choose one of auto, xla, cudnn, splash"):
    kernels.attend(*inputs, aligned=True, implementation="flash")


def test_on_a_cpu_attend_is_the_tiled_form():
  inputs = _inputs(**_CASES["chosen queries"])
  forms = [
      functools.partial(kernels.attend, aligned=False, implementation="auto"),
      functools.partial(kernels.attend, aligned=False, implementation="xla"),
      attention.attend_positions,
  ]
  auto, xla, want = (str(jax.make_jaxpr(functools.partial(form, window=6))(*inputs)) for form in forms)
  assert auto == xla == want


@pytest.mark.parametrize("capability, want", [("9.0", "cuda"), ("8.0", "cuda"), ("7.5", "gpu"), ("gfx942", "gpu")])
def test_backend_name_tells_gpus_apart(capability, want, monkeypatch):
  class Device:
    compute_capability = capability

  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
  assert kernels.backend_name() == want


def test_backend_name_of_this_machine():
  assert kernels.backend_name() == "cpu"


def test_the_parity_script_compares_every_way_of_attending(tmp_path):
  """Here both sides are XLA; with a GPU or a TPU the first is its kernel."""
  report, root = tmp_path / "parity.json", pathlib.Path(__file__).parent.parent
  small = ["--lengths=40,128", "--batch=2", "--heads=4", "--groups=2", "--dim=8", "--runs=1"]
  command = [sys.executable, root / "experiments/kernel_parity.py", *small]
  env = os.environ | {"PYTHONPATH": str(root)}
  ended = subprocess.run([*command, f"--json={report}"], stderr=subprocess.PIPE, text=True, env=env)
  assert ended.returncode == 1 and "no kernel but XLA's attention ran" in ended.stderr
  records = json.loads(report.read_text())["records"]
  assert len({(r["case"], r["slots"]) for r in records}) == 8
  for r in records:
    assert r["finite"] and r["kernel"] == "xla"
    assert 0 < r["kernel_difference"] == r["xla_difference"] < 0.01 * r["largest"]
