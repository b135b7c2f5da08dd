"""Guided warm-up: the router learns the guide's decisions before any gradient passes the model.

The router's inputs are collected once in a dense pass, so a step costs the router alone and a few
hundred steps take seconds. The target of a block is the set of tokens of highest Fisher score that
fills its capacity.
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
from ftp_jax.data.prompts import Prompts, batches, in_order, indices_at
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import masked, routers
from ftp_jax.routing.config import FACTORS, RouterConfig, RoutingConfig
from ftp_jax.routing.factors import context_factors
from ftp_jax.training import losses
from ftp_jax.training.fisher import gate_fisher


class GuideData(NamedTuple):
  """Router inputs and targets of N prompts, on the host.

  U blocks have inputs of their own: all, or under one-pass routing the one that decides and those before it.

  Attributes:
    context_N: context lengths.
    score_UxNxT: prefill attention scores that enter each of these blocks in the dense model.
    hidden_UxNxTxD: root-mean-square normed hidden states, float16; None for routers without them.
    fisher_LxNxT: gate scores, for a global router as `joint_scores` gives them.
  """

  context_N: np.ndarray
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
  made_of = list(batches(prompts, batch, length_buckets))
  with sharding.over(params):
    scores, states = [], []
    for rows, *_ in made_of:
      placed = sharding.place(params, rows, "batch")
      score, hidden = _inputs(config, routing, params, *placed, with_hidden=with_hidden, dtype=dtype)
      scores.append(np.asarray(score))
      states.append(sharding.fetch(params, hidden))
  shape = (len(scores[0]), *prompts.tokens.shape)
  hidden = in_order(states, made_of, (*shape, config.hidden_size), 1) if with_hidden else None
  return in_order(scores, made_of, shape, 1), hidden


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
      )  # fmt: skip
    return np.asarray(scores)

  made_of = list(batches(prompts, batch, length_buckets))
  parts = [keep(i, functools.partial(make, i, rows)) for i, (rows, *_) in enumerate(progress(made_of))]
  return in_order(parts, made_of, (config.num_blocks, *prompts.tokens.shape), 1)


def joint_scores(fisher_LxNxT: np.ndarray, one_pass_block: int) -> np.ndarray:
  """What a global router's guide ranks tokens by, (L,N,T): own scores, or under one-pass routing sums over blocks.

  From block p = `one_pass_block` on one ranking serves all blocks, so that a token is worth the sum of its scores
  there. A block before p decides by the sum over all blocks from itself on, as what skips it enters those.
  """
  if one_pass_block < 0:
    return fisher_LxNxT
  onward = np.cumsum(fisher_LxNxT[::-1], axis=0)[::-1]
  return onward[np.minimum(np.arange(len(onward)), one_pass_block)]


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
    count = min(round(target * scores.size), scores.size - 1)
    threshold = np.partition(scores.ravel(), count)[count]
    skipped.append((scores < threshold).mean(axis=1))
  return np.mean(skipped, axis=0)


def margins(router: RouterConfig, params: Any, factors_LxBxTxF, hidden_LxBxTxD) -> jax.Array:
  """Margins (L,B,T) from collected inputs: what routed execution computes block by block."""
  chosen = factors_LxBxTxF[..., [FACTORS.index(name) for name in router.factors]]
  _, batch, num_positions, _ = factors_LxBxTxF.shape

  def body(state, xs):
    features, hidden, slice_params = xs
    slice_params = slice_params if router.kind == "per_block" else params
    margin, state = routers.margin_of_inputs(router, slice_params, features, hidden, state)
    return state, margin

  xs = (chosen, hidden_LxBxTxD, params if router.kind == "per_block" else None)
  return jax.lax.scan(body, routers.init_state(routers.Router("dynamic", router), batch, num_positions), xs)[1]


@dataclasses.dataclass(frozen=True)
class WarmupSettings:
  """Steps, prompts a step, and peak learning rate of the warm-up; `config.train.warmup_guide_*`."""

  steps: int
  batch: int
  learning_rate: float


def warm_up(
    router: RouterConfig,
    routing: RoutingConfig,
    settings: WarmupSettings,
    params: Any,
    data: GuideData,
    schedule_L: np.ndarray,
    seed: int,
    progress: Any = lambda steps: steps,
) -> tuple[Any, list[float]]:
  """Fits the router to the Fisher targets under one schedule; `progress` wraps the range of steps.

  Returns:
    The parameters and the loss of every step.
  """
  optimizer = optax.adamw(optax.cosine_decay_schedule(settings.learning_rate, settings.steps), weight_decay=1e-3)
  num_inputs, _, num_positions = data.score_UxNxT.shape
  # The loss is of `blocks`, which read `inputs` (of U). Margins are computed for `like` (of blocks) from `input_of`
  # (of inputs), and `margin_of` says which are a block's.
  blocks = np.arange(len(schedule_L)) if router.kind == "recurrent" else np.flatnonzero(schedule_L)
  inputs, like, input_of = np.unique(np.minimum(blocks, num_inputs - 1), return_index=True, return_inverse=True)
  if router.kind == "global" and "sparsity" not in router.factors:  # equal inputs give equal margins
    input_of, margin_of = np.arange(len(inputs)), input_of
  else:
    like = margin_of = np.arange(len(blocks))

  def loss_fn(params, context, score, hidden, fisher, schedule):
    in_context = jnp.arange(num_positions)[None] < context[:, None]
    features = jax.vmap(lambda score, s: context_factors(FACTORS, score, s, context))(score[input_of], schedule[like])
    target = losses.top_targets(fisher, schedule, context, routing.bucket_multiple)
    if router.kind == "per_block":
      params = jax.tree.map(lambda a: a[blocks], params)
    margin = margins(router, params, features, None if hidden is None else hidden[input_of])[margin_of]
    return losses.guide_loss(margin, target, schedule, in_context)

  @jax.jit
  def step(params, state, *batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  schedule = jnp.asarray(schedule_L[blocks], jnp.float32)
  state, history = optimizer.init(params), []
  for number in progress(range(settings.steps)):
    rows = indices_at(len(data.context_N), settings.batch, number, seed)
    pick = lambda array, which: None if array is None else array[np.ix_(which, rows)]
    params, state, loss = step(
        params, state, data.context_N[rows], pick(data.score_UxNxT, inputs), pick(data.hidden_UxNxTxD, inputs),
        pick(data.fisher_LxNxT, blocks), schedule,
    )
    history.append(loss)
  return params, [float(loss) for loss in history]
