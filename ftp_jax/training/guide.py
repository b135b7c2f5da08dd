"""Guided warm-up: the router learns the guide's decisions before any gradient passes the model.

The router's inputs are collected once in a dense pass and stay in host memory, so a step costs the
router alone and a few hundred steps take seconds. The target of a block is the set of tokens of highest
Fisher score that fills its capacity; what new tokens are to do, where they are trained, `with_new_tokens` says.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftp_jax import sharding
from ftp_jax.data.prompts import Prompts, batches, indices_at, put_back
from ftp_jax.errors import UserError
from ftp_jax.models import decoder
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import masked, routers
from ftp_jax.routing.config import SCORE_FACTORS, RouterConfig, RoutingConfig
from ftp_jax.routing.selection import decode_schedule
from ftp_jax.training import losses
from ftp_jax.training.fisher import gate_fisher


class GuideData(NamedTuple):
  """Router inputs and targets of N prompts, on the host.

  U blocks have inputs of their own: all, or under one-pass routing the one that decides and those before it.

  Attributes:
    context_N, length_N: lengths of contexts and in all.
    score_UxNxT: prefill attention scores that enter each of these blocks in the dense model.
    hidden_UxNxTxD: root-mean-square normed hidden states, float16; None for routers without them.
    fisher_LxNxT: gate scores, for a global router as `joint_scores` gives them; to `warm_up` as `with_new_tokens` does.
  """

  context_N: np.ndarray
  length_N: np.ndarray
  score_UxNxT: np.ndarray
  hidden_UxNxTxD: np.ndarray | None
  fisher_LxNxT: np.ndarray


@functools.partial(jax.jit, static_argnames=("config", "routing", "with_hidden", "dtype"))
def _inputs(config, routing, params, tokens, context, length, *, with_hidden, dtype):
  entries, _ = masked.dense_entries(config, routing, params, tokens, context, length, dtype=dtype)
  if routing.one_pass_block >= 0:  # later blocks decide from what enters this one
    entries = jax.tree.map(lambda a: a[: routing.one_pass_block + 1], entries)
  hidden = routers.normed(entries.x_BxTxD).astype(jnp.float16) if with_hidden else None
  return sharding.replicate(entries.score_BxT), hidden


def collect_inputs(
    config: ModelConfig,
    routing: RoutingConfig,
    params: Any,
    prompts: Prompts,
    batch: int,
    *,
    with_hidden: bool,
    dtype: Any,
    length_buckets: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray | None]:
  """(score_UxNxT, hidden_UxNxTxD or None) of a dense pass over all prompts, as GuideData has them."""
  inputs = config.num_blocks if routing.one_pass_block < 0 else routing.one_pass_block + 1
  scores = np.zeros((inputs, *prompts.tokens.shape), np.float32)
  states = np.zeros((*scores.shape, config.hidden_size), np.float16) if with_hidden else None
  with sharding.over(params):
    for rows in batches(prompts, batch, length_buckets):
      placed = sharding.place(params, rows.prompts, "batch")
      score, hidden = _inputs(config, routing, params, *placed, with_hidden=with_hidden, dtype=dtype)
      put_back(scores, np.asarray(score), rows, 1)
      if with_hidden:
        put_back(states, sharding.fetch(params, hidden), rows, 1)
  return scores, states


def collect_fisher(
    config: ModelConfig,
    routing: RoutingConfig,
    params: Any,
    prompts: Prompts,
    batch: int,
    seed: int,
    *,
    num_scored: int,
    draws: int,
    dtype: Any,
    remat_policy: str = "none",
    length_buckets: Sequence[int] = (),
    progress: Any = lambda rows: rows,
    keep: Callable[[int, Callable[[], np.ndarray]], np.ndarray] = lambda i, make: make(),
) -> np.ndarray:
  """Fisher scores (L,N,T) of all prompts.

  Args:
    progress: wraps the list of batches.
    keep: gives the scores (L,B,W) of batch i: those that it kept, or what the function makes, which it may keep.
  """

  def make(i: int, rows: Prompts) -> np.ndarray:
    key = jax.random.fold_in(jax.random.key(seed), i)
    with sharding.over(params):
      scores = gate_fisher(
          config, routing, params, *sharding.place(params, rows, "batch"), key,
          num_scored=num_scored, draws=draws, dtype=dtype, remat_policy=remat_policy,
      )
    return np.asarray(scores)

  result = np.zeros((config.num_blocks, *prompts.tokens.shape), np.float32)
  for i, rows in enumerate(progress(list(batches(prompts, batch, length_buckets)))):
    put_back(result, keep(i, functools.partial(make, i, rows.prompts)), rows, 1)
  return result


def check_scores(fisher_LxNxT: np.ndarray) -> None:
  """UserError where gate scores are no finite numbers, or so large that sums of them are none."""
  if not np.isfinite(fisher_LxNxT.sum(axis=(1, 2), dtype=np.float32)).all():
    raise UserError("The gate scores have overflowed; take model.dtype=float32 and another --workdir.")


def joint_scores(fisher_LxNxT: np.ndarray, one_pass_block: int) -> np.ndarray:
  """What a global router's guide ranks tokens by, (L,N,T): own scores, or under one-pass routing sums over blocks.

  From block p = `one_pass_block` on one ranking serves all blocks, so that a token is worth the sum of its scores
  there. A block before p decides by the sum over all blocks from itself on, as what skips it enters those.
  """
  if one_pass_block < 0:
    return fisher_LxNxT
  onward = np.cumsum(fisher_LxNxT[::-1], axis=0)[::-1]
  return onward[np.minimum(np.arange(len(onward)), one_pass_block)]


def share_of_new_tokens(schedule_L: np.ndarray, decode_sparsity: float) -> float:
  """What new tokens skip of the blocks of which a schedule asks anything, where they skip `decode_sparsity` of all.

  Raises:
    UserError: these blocks are too few.
  """
  routed = int(np.sum(np.asarray(schedule_L) > 0))
  if decode_sparsity * len(schedule_L) >= routed:
    raise UserError(
        f"routing.decode_sparsity={decode_sparsity:g} would take all of the {routed} blocks that the schedule lets "
        "tokens skip, or more; choose a smaller one."
    )
  return decode_sparsity * len(schedule_L) / routed


def with_new_tokens(
    scores_LxNxT: np.ndarray, context_N: np.ndarray, length_N: np.ndarray, schedule_L: np.ndarray,
    routing: RoutingConfig,
) -> np.ndarray:
  """Scores as training takes them: those of new tokens, where these are trained, become 1, computed, or 0, skipped.

  Of their pairs in blocks of which the schedule asks anything those with the lowest scores skip, as many as
  `share_of_new_tokens` says.

  Raises:
    UserError: these blocks are too few, or the scores are of contexts alone.
  """
  if not routing.trains_continuation:
    return scores_LxNxT
  routed_L, num_positions = np.asarray(schedule_L) > 0, scores_LxNxT.shape[2]
  after_NxT = np.asarray(losses.new_tokens(context_N, length_N, num_positions))
  share = share_of_new_tokens(schedule_L, routing.decode_sparsity)
  known_N = (scores_LxNxT * after_NxT[None]).any(axis=(0, 2))
  if not known_N[after_NxT.any(axis=1)].all():
    raise UserError(
        "The gate scores know of contexts alone, as earlier versions made them, and routing.decode_sparsity trains new "
        "tokens as well; delete the folder importance and those of later stages, or give another --workdir."
    )
  if not after_NxT.any():
    raise UserError(
        "No answer has two tokens, so that routing.decode_sparsity has no new token to train; give longer answers, or "
        "set it to 0."
    )
  least = np.quantile(scores_LxNxT[routed_L][:, after_NxT], share)
  in_context = np.arange(num_positions)[None] < context_N[:, None]
  return np.where(in_context, scores_LxNxT, scores_LxNxT >= least).astype(np.float32)


def fisher_schedule(
    fisher_LxNxT: np.ndarray, context_N: np.ndarray, target: float, first_block: int = 0
) -> np.ndarray:
  """Sparsity (L,) of each block when every prompt skips its pairs of lowest score, averaged over prompts.

  Nothing is asked of the blocks before `first_block`.
  """
  skipped = []
  for n, m in enumerate(context_N):
    scores = fisher_LxNxT[:, n, :m].astype(np.float64)
    scores[:, [0, m - 1]] = scores[:first_block] = np.inf
    count = min(round(target * scores.size), np.isfinite(scores).sum())
    lowest = np.argsort(scores, axis=None, kind="stable")[:count]
    skipped.append(np.bincount(lowest // m, minlength=len(scores)) / m)
  return np.mean(skipped, axis=0)


def margins(
    router: RouterConfig, params: Any, factors_LxBxTxF, hidden_LxBxTxD, remat_policy: str = "none"
) -> jax.Array:
  """Margins (L,B,T) from collected inputs: what routed execution computes block by block.

  Args:
    factors_LxBxTxF: those that the router reads; None if it reads none.
    hidden_LxBxTxD: normed states; None if it reads none.
  """
  _, batch, num_positions, _ = (hidden_LxBxTxD if factors_LxBxTxF is None else factors_LxBxTxF).shape

  def body(state, xs):
    features, hidden, slice_params = xs
    slice_params = slice_params if router.kind == "per_block" else params
    margin, state = routers.margin_of_inputs(router, slice_params, features, hidden, state)
    return state, margin

  xs = (factors_LxBxTxF, hidden_LxBxTxD, params if router.kind == "per_block" else None)
  state = routers.init_state(routers.Router("dynamic", router), batch, num_positions)
  return jax.lax.scan(decoder.remat(body, remat_policy), state, xs)[1]


@dataclasses.dataclass(frozen=True)
class WarmupSettings:
  """Steps, prompts a step, and peak learning rate of the warm-up, and `config.train.guide_stakes`."""

  steps: int
  batch: int
  learning_rate: float
  stakes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Reading:
  """Which blocks' guide losses count, and what their margins are computed from; tuples of indices, hashable.

  Attributes:
    blocks: those whose loss counts.
    inputs: of the U blocks with inputs of their own those that are read.
    like, input_of: margins are computed for the blocks `like` (of `blocks`) from the inputs `input_of` (of `inputs`).
    margin_of: of these margins, which is a block's.
  """

  blocks: tuple[int, ...]
  inputs: tuple[int, ...]
  like: tuple[int, ...]
  input_of: tuple[int, ...]
  margin_of: tuple[int, ...]

  @classmethod
  def of(cls, router: RouterConfig, num_inputs: int, schedule_L: np.ndarray) -> "Reading":
    blocks = np.arange(len(schedule_L)) if router.kind == "recurrent" else np.flatnonzero(schedule_L)
    inputs, like, input_of = np.unique(np.minimum(blocks, num_inputs - 1), return_index=True, return_inverse=True)
    every = np.arange(len(blocks))
    fields = blocks, inputs, every, input_of, every
    if router.kind == "global" and "sparsity" not in router.factors:  # equal inputs give equal margins
      fields = blocks, inputs, like, np.arange(len(inputs)), input_of
    return cls(*(tuple(field.tolist()) for field in fields))


def make_optimizer(settings: WarmupSettings) -> optax.GradientTransformation:
  """AdamW with cosine decay to 0."""
  return optax.adamw(optax.cosine_decay_schedule(settings.learning_rate, settings.steps), weight_decay=1e-3)


def asked_of(reading: Reading, routing: RoutingConfig, schedule_L: np.ndarray) -> tuple[jax.Array, jax.Array]:
  """What a schedule asks of context and of new tokens in `reading.blocks`."""
  asked = jnp.asarray(schedule_L, jnp.float32)
  blocks = np.array(reading.blocks, int)
  return asked[blocks], decode_schedule(asked, routing.decode_sparsity)[blocks]


def inputs_of(data: GuideData, reading: Reading, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
  """`score` and `hidden` of `reading.inputs` and of some of the prompts."""
  pick = lambda array: None if array is None else array[np.ix_(reading.inputs, rows)]
  return pick(data.score_UxNxT), pick(data.hidden_UxNxTxD)


def make_margins(router: RouterConfig, reading: Reading, remat_policy: str) -> Any:
  """A function of params, context_B, score and hidden (`inputs_of`), and what is asked (`asked_of`).

  It gives the margins of `reading.blocks`, (blocks,B,T).
  """
  blocks, like, input_of = reading.blocks, reading.like, reading.input_of

  def pick(array, index):
    as_it_is = index == tuple(range(len(array)))  # not copied
    return array if as_it_is else array[np.array(index, int)]

  def of_inputs(params, context, score, hidden, schedule, decode_schedule):
    of_block = lambda score, *asked: masked.factors(router.factors, masked.Scores(score, None), *asked, context)
    asked = pick(schedule, like), pick(decode_schedule, like)
    features = jax.vmap(of_block)(pick(score, input_of), *asked) if router.factors else None
    if router.kind == "per_block":
      params = jax.tree.map(lambda a: pick(a, blocks), params)
    hidden = None if hidden is None else pick(hidden, input_of)
    return pick(margins(router, params, features, hidden, remat_policy), reading.margin_of)

  return of_inputs


@functools.lru_cache(maxsize=None)
def compiled_step(
    router: RouterConfig, routing: RoutingConfig, settings: WarmupSettings, reading: Reading, remat_policy: str
) -> Any:
  """A step of the warm-up, jitted once for equal arguments.

  params, state, context_B, length_B, then arrays -> params, state, loss. The arrays: those of `inputs_of`; `fisher` of
  `reading.blocks`; what is asked, of `asked_of`.
  """
  scored = not SCORE_FACTORS.isdisjoint(router.factors)
  optimizer, margins_of = make_optimizer(settings), make_margins(router, reading, remat_policy)

  def loss_fn(params, context, length, score, hidden, fisher, schedule, decode_schedule):
    in_context = jnp.arange(score.shape[2])[None] < context[:, None]
    # What new tokens have paid is not collected.
    guided = losses.guided_tokens(context, length, score.shape[2], routing)
    guided = guided & in_context if scored else guided
    target = losses.targets(fisher, schedule, context, routing)
    margin = margins_of(params, context, score, hidden, schedule, decode_schedule)
    stake = losses.stakes(fisher, target, context, routing, settings.stakes) if settings.stakes else 1.0
    return losses.guide_loss(margin, target, schedule, guided, stake)

  @jax.jit
  def step(params, state, *batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
    updates, state = optimizer.update(grads, state, params)
    return sharding.replicate((optax.apply_updates(params, updates), state, loss))

  return step


def warm_up(
    router: RouterConfig,
    routing: RoutingConfig,
    settings: WarmupSettings,
    params: Any,
    data: GuideData,
    schedule_L: np.ndarray,
    seed: int,
    progress: Any = lambda steps: steps,
    frozen: Any = None,
    remat_policy: str = "none",
    rows: np.ndarray | None = None,
) -> tuple[Any, list[float]]:
  """Fits the router to the Fisher targets under one schedule.

  Args:
    progress: wraps the range of steps.
    rows: the prompts of `data` that it learns from; None: all.
    frozen: parameters of the model; batches are split over the mesh that they lie on. None: there is none.
    remat_policy: what the backward pass recomputes, as `config.model.remat`.

  Returns:
    The parameters and the loss of every step.
  """
  frozen = params if frozen is None else frozen
  reading = Reading.of(router, len(data.score_UxNxT), schedule_L)
  step, state = compiled_step(router, routing, settings, reading, remat_policy), make_optimizer(settings).init(params)
  params, state, asked = sharding.place(frozen, (params, state, asked_of(reading, routing, schedule_L)))
  rows = np.arange(len(data.context_N)) if rows is None else rows
  history = []
  for number in progress(range(settings.steps)):
    some = rows[indices_at(len(rows), settings.batch, number, seed)]
    fisher = data.fisher_LxNxT[np.ix_(reading.blocks, some)]
    arrays = sharding.place(frozen, (*inputs_of(data, reading, some), fisher), None, "batch")
    with sharding.over(frozen):
      lengths = sharding.place(frozen, (data.context_N[some], data.length_N[some]), "batch")
      params, state, loss = step(params, state, *lengths, *arrays, *asked)
    history.append(loss)
  return params, [float(loss) for loss in history]
