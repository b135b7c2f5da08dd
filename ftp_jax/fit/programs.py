"""The programs of a run, traced over shapes that say where each array lies: what is compiled is what runs.

  train    a step of the router that the base config trains, Fisher guide, schedule as data
  warmup   a step of its guided warm-up, all blocks
  search   the judge's call for one chunk of candidates, every block routed
  prefill  the bucketed prefill under a built-in schedule
  decode   one token on top of such a prefill's cache
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ftp_jax import hardware, sharding
from ftp_jax.config import get_config
from ftp_jax.errors import UserError
from ftp_jax.evaluation import judge
from ftp_jax.evaluation.flops import computed_flops
from ftp_jax.inference import programs
from ftp_jax.inference.sampling import Sampling
from ftp_jax.models import decoder, scoring
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import cache, masked, routers, stand_in
from ftp_jax.routing.config import RouterConfig, RoutingConfig
from ftp_jax.search import schedule as schedules
from ftp_jax.training import guide, step

PROGRAMS = ("train", "warmup", "search", "prefill", "decode")
SERVING = ("prefill", "decode")
SHAPES = ("late", "middle")
_ROOM = 16  # slots for new tokens beside a cache


@dataclasses.dataclass(frozen=True)
class Case:
  """What is compiled.

  Attributes:
    batch: rows, of all chips together.
    context: T, positions of a row, scored continuation included.
    scored: C, continuation positions whose distributions are compared.
    candidates: schedules of one call of the search.
    sparsity, shape: of the built-in schedule of prefill and decode; a sparsity of 0 is the dense model.
    attention: full or splash.
    stand_in: R of the maps that stand in for skipped blocks, 0 for none.
  """

  model: ModelConfig
  program: str
  batch: int
  context: int = 2048
  scored: int = 64
  candidates: int = 20
  sparsity: float = 0.3
  shape: str = "late"
  dtype: Any = jnp.bfloat16
  remat: str = "full"
  kv_mode: str = "project"
  attention: str = "splash"
  stand_in: int = 0
  router: RouterConfig = dataclasses.field(default_factory=lambda: RouterConfig.from_config(get_config().router))


class Traced(NamedTuple):
  """A program before it is compiled.

  Attributes:
    trace: with `jaxpr` and `lower()`.
    forward: the jaxpr of one dense forward pass over the same rows, scored positions included; None if no multiple
      of it is of interest.
    passes: how many masked forward passes the program asks for.
    flops: where it is not to be counted from the trace.
    beside: bytes of a chip that are taken while it runs, though they are no argument.
  """

  trace: Any
  forward: Any = None
  passes: int = 1
  flops: float | None = None
  beside: int = 0


def default_mesh(devices: Sequence[Any]) -> tuple[int, int, int]:
  """Sizes (data, fsdp, tensor): weights over all chips, gathered block by block."""
  return 1, len(devices), 1


def check(case: Case, mesh: Mesh) -> None:
  """UserError where batch, positions, candidates or mesh cannot be had."""
  if case.scored < 1 or case.candidates < 1:
    raise UserError("--scored and --candidates must be at least 1.")
  if not 0 <= case.stand_in <= case.model.hidden_size:
    raise UserError(
        f"--stand-in={case.stand_in} is no rank of maps of {case.model.hidden_size} columns; use 0 to that."
    )
  if case.program in SERVING and not 0 <= case.sparsity <= schedules.MAX_SPARSITY:
    raise UserError(f"--sparsity={case.sparsity} must be from 0 to {schedules.MAX_SPARSITY}.")
  parts = sharding.batch_parts(mesh)
  if case.batch < 1 or case.batch % parts:
    raise UserError(
        f"--batch={case.batch} is not a multiple of the {parts} parts of a batch (data x fsdp); choose "
        f"{-(-max(case.batch, 1) // parts) * parts}."
    )
  if case.context < 1:
    raise UserError(f"--context={case.context} must be at least 1.")
  if case.program in ("train", "search") and case.context <= case.scored + 1:
    raise UserError(f"--context={case.context} leaves nothing before the {case.scored} scored positions; raise it.")
  if case.program in SERVING:
    return
  with jax.set_mesh(mesh):
    masked.choose_attention(case.attention, case.model, RoutingConfig(case.kv_mode), case.context)


def trace(case: Case, mesh: Mesh) -> Traced:
  """Traces a program; `check` the case first."""
  of_program = {"train": _train, "warmup": _warmup, "search": _search, "prefill": _prefill, "decode": _decode}
  return of_program[case.program](case, mesh)


def _trace(mesh: Mesh, jitted: Any, *args: Any, **options: Any) -> Any:
  with jax.set_mesh(mesh), hardware.tracing_for("tpu"):  # only here: described devices can hold no array
    return jitted.trace(*args, **options)


def params_of(case: Case, mesh: Mesh) -> Any:
  """The frozen parameters, maps for skipped blocks included, as shapes with shardings."""
  abstract = decoder.abstract_params(case.model, case.dtype)
  give = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
  params = jax.tree.map(give, abstract, decoder.param_shardings(mesh, case.model))
  blocks, width, rank = case.model.num_blocks, case.model.hidden_size, case.stand_in
  shapes = {"bias": (blocks, width), "down": (blocks, width, rank), "up": (blocks, rank, width)}
  return stand_in.attach(params, {k: _like(mesh, shape, jnp.float32) for k, shape in shapes.items()} if rank else None)


def _like(mesh: Mesh, shape: Sequence[int], dtype: Any, *logical: str | None) -> jax.ShapeDtypeStruct:
  names = logical + (None,) * (len(shape) - len(logical))
  return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding.named(mesh, names, shape))


def _rows(case: Case, mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Tokens, context lengths and lengths."""
  shapes = ((case.batch, case.context), (case.batch,), (case.batch,))
  return tuple(_like(mesh, shape, jnp.int32, "batch") for shape in shapes)


def _router(case: Case, mesh: Mesh) -> routers.Router:
  init = lambda key: routers.init_router(case.router, key, case.model.num_blocks, case.model.hidden_size)
  shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
  return routers.Router("dynamic", case.router, jax.tree.map(lambda a: _like(mesh, a.shape, a.dtype), shapes))


def _forward(case: Case, mesh: Mesh) -> Any:
  """A dense forward pass over the rows, with the distributions at the scored positions."""

  def run(params, tokens, context, length):
    _, last = masked.dense_entries(
        case.model, RoutingConfig(case.kv_mode), params, tokens, context, length, (), dtype=case.dtype,
        attention=case.attention,
    )
    source, _, _ = scoring.continuation(tokens, context, length, case.scored)
    return scoring.log_probs(case.model, params, last, source)

  return _trace(mesh, jax.jit(run), params_of(case, mesh), *_rows(case, mesh)).jaxpr


def _train(case: Case, mesh: Mesh) -> Traced:
  settings = step.TrainSettings.from_config(get_config().train)
  spec = step.StepSpec(
      case.model, RoutingConfig(case.kv_mode), case.router, settings, case.scored, dtype=case.dtype, remat=case.remat,
      attention=case.attention,
  )
  router = _router(case, mesh).params
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), router)
  state = jax.eval_shape(lambda router: step.init_state(settings, router), shapes)
  state = jax.tree.map(lambda a: _like(mesh, a.shape, a.dtype), state)
  blocks = case.model.num_blocks
  fisher = _like(mesh, (blocks, case.batch, case.context), jnp.float32, None, "batch")
  batch = step.Batch(*_rows(case, mesh), fisher)
  traced = _trace(
      mesh, step.compiled_step(spec, mesh), params_of(case, mesh), state, batch, _like(mesh, (blocks,), jnp.float32)
  )
  return Traced(traced, _forward(case, mesh))


def _warmup(case: Case, mesh: Mesh) -> Traced:
  blocks, rows = case.model.num_blocks, (case.batch, case.context)
  settings = guide.WarmupSettings(300, case.batch, 1e-3)
  reading = guide.Reading.of(case.router, blocks, np.full(blocks, 0.3))
  warmup = guide.compiled_step(case.router, RoutingConfig(case.kv_mode), settings, reading, case.remat)
  params = _router(case, mesh).params
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
  state = jax.eval_shape(guide.make_optimizer(settings).init, shapes)
  state = jax.tree.map(lambda a: _like(mesh, a.shape, a.dtype), state)
  of_blocks = lambda shape, dtype: _like(mesh, (blocks, *shape), dtype, None, "batch")
  hidden = of_blocks((*rows, case.model.hidden_size), jnp.float16) if case.router.hidden_states else None
  asked = _like(mesh, (blocks,), jnp.float32)
  traced = _trace(
      mesh, warmup, params, state, *_rows(case, mesh)[1:], of_blocks(rows, jnp.float32), hidden,
      of_blocks(rows, jnp.float32), asked, asked,
  )
  held = lambda a: math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
  return Traced(traced, beside=sum(map(held, jax.tree.leaves(params_of(case, mesh)))))


def _search(case: Case, mesh: Mesh) -> Traced:
  vocab = (case.batch, case.scored, case.model.vocab_size)
  parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
  lies = ("batch", None, "vocab") if case.model.vocab_size % parts else ("replica", None, "logits")
  traced = _trace(
      mesh, judge.batch_quality, case.model, RoutingConfig(case.kv_mode), params_of(case, mesh), _router(case, mesh),
      _rows(case, mesh),
      _like(mesh, vocab, jnp.float32, *lies), _like(mesh, (case.candidates, case.model.num_blocks), jnp.float32), None,
      num_scored=case.scored, start=0, dtype=case.dtype, attention=case.attention,
  )
  return Traced(traced, _forward(case, mesh), case.candidates)


def _inference(case: Case, mesh: Mesh):
  spec = programs.Spec(
      case.model, RoutingConfig(case.kv_mode), case.dtype, "splash" if case.attention == "splash" else "xla"
  )
  shape = {"late": schedules.late, "middle": schedules.middle}[case.shape]
  schedule_L = shape(case.model.num_blocks, case.sparsity, schedules.MAX_SPARSITY)
  weights = programs.Weights(params_of(case, mesh), _router(case, mesh), np.asarray(schedule_L, np.float32))
  with hardware.tracing_for("tpu"):
    return spec, spec.plan(weights, case.context), weights


def _prefill(case: Case, mesh: Mesh) -> Traced:
  spec, plan, weights = _inference(case, mesh)
  tokens, context, _ = _rows(case, mesh)
  abstract = weights._replace(schedule_L=_like(mesh, weights.schedule_L.shape, jnp.float32))
  # Whether a tile of attention is computed depends on data here, so the FLOPs are counted from the plan.
  slots = np.arange(case.context)[None] < np.asarray(plan.slots)[:, None]
  computed = slots.copy()
  computed[-1, 1:] = False
  keys = np.arange(case.context)[None] < np.asarray(plan.cache_slots)[:, None]
  count = case.batch * computed_flops(case.model, computed, computed, keys)
  return Traced(_trace(mesh, programs.prefill, spec, plan, abstract, tokens, context), flops=count)


def _decode(case: Case, mesh: Mesh) -> Traced:
  spec, plan, weights = _inference(case, mesh)
  rows = ("batch",)
  like = lambda a, *logical: _like(mesh, a.shape, a.dtype, *logical)
  k, v, position = jax.eval_shape(lambda: cache.empty_cache(case.model, plan, case.batch, case.dtype))
  blocks, batch, context = case.model.num_blocks, case.batch, case.context
  context_cache = cache.Cache(
      like(k, "batch", "kv_heads"), like(v, "batch", "kv_heads"), like(position, *rows),
      _like(mesh, (blocks, batch, context), bool, None, *rows), _like(mesh, (batch,), jnp.int32, *rows),
      _like(mesh, (batch,), jnp.int32, *rows), _like(mesh, (blocks, batch), jnp.float32, None, *rows),
  )
  recent = jax.eval_shape(lambda: cache.empty_recent(case.model, batch, _ROOM, case.dtype))
  recent = cache.Recent(
      like(recent.k_LxBxGxMxN, None, "batch", "kv_heads"), like(recent.v_LxBxGxMxN, None, "batch", "kv_heads"),
      like(recent.computed_LxBxM, None, *rows), like(recent.count),
  )
  integers = _like(mesh, (batch,), jnp.int32, *rows)
  stream = programs.Stream(integers, _like(mesh, (batch,), bool, *rows), recent, _like(mesh, (), jnp.int32))
  abstract = weights._replace(schedule_L=_like(mesh, weights.schedule_L.shape, jnp.float32))
  traced = _trace(
      mesh, programs.decode_steps, spec, plan, abstract, Sampling(), _like(mesh, (), jnp.int32), context_cache, stream,
      integers, _like(mesh, (1,), jnp.int32),
  )
  return Traced(traced)
