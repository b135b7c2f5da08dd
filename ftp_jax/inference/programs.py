"""The compiled programs of inference: prefill, decode loop, scores. Pure functions of arrays, jitted once a shape.

A `Spec` is everything static about them but the plan: a dense model is the spec of a static router under
the schedule 0, so that dense and pruned inference run the same code. Another way to run a model is a subclass with
its own `plan`, `prefill` and `extend`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax.inference.sampling import Sampling, sample
from ftp_jax.models import decoder
from ftp_jax.models.config import ModelConfig
from ftp_jax.routing import bucketed, decode, routers, stand_in
from ftp_jax.routing.cache import Cache, Recent, empty_recent
from ftp_jax.routing.config import RoutingConfig
from ftp_jax.routing.plan import MAX_BUCKETS, Plan, make_plan
from ftp_jax.routing.routers import Router


class Weights(NamedTuple):
  """Arrays that every program reads: the frozen model, the router and its schedule (L)."""

  params: Any
  router: Router
  schedule_L: jax.Array


@dataclasses.dataclass(frozen=True)
class Spec:
  """Static description of a model and how it is routed; hashable."""

  model: ModelConfig
  routing: RoutingConfig
  dtype: Any = jnp.float32
  attention: str = "auto"

  def plan(
      self, weights: Weights, num_positions: int, max_buckets: int = MAX_BUCKETS, buckets: Sequence[int] | None = None
  ) -> Plan:
    """Static shapes for contexts of up to `num_positions` tokens; see `routing.plan.make_plan`."""
    return make_plan(np.asarray(weights.schedule_L), num_positions, self.routing, max_buckets, buckets)

  def prefill(self, plan: Plan, weights: Weights, tokens_BxT: jax.Array, context_B: jax.Array) -> bucketed.Prefilled:
    """Runs contexts of lengths `context_B`, right-padded to T = `plan.num_positions`; plan and weights belong together.

    Other executions replace this and `extend`, each with a plan and a cache of its own kind.
    """
    return bucketed.prefill(
        self.model, self.routing, plan, *weights[:2], tokens_BxT, context_B, weights.schedule_L, dtype=self.dtype,
        attention=self.attention,
    )

  def extend(self, plan: Plan, weights: Weights, cache: Cache, recent: Recent, tokens_BxC) -> decode.Extended:
    """Runs C further tokens of every row behind what `prefill` and earlier calls left; `recent` has room for them."""
    return decode.extend(
        self.model, self.routing, plan, *weights[:2], cache, recent, tokens_BxC, weights.schedule_L, dtype=self.dtype
    )

  def continuing(self, plan: Any, weights: Weights) -> tuple["Spec", Any, Weights]:
    """Of all (spec, plan, weights) that extend a cache alike, one, so that they share its compiled programs.

    Where every continuation token is computed, its router, KV mode and maps for skipped blocks do not matter, and of
    the plan no more than how many slots the blocks have: under `project` a pruned model continues with the programs of
    the dense one.
    """
    if self.routing.decode_sparsity and weights.router.kind != "static":
      return self, plan, weights
    bodies = tuple((slots, False) for slots in sorted(set(plan.cache_slots)))
    plan = Plan(plan.num_positions, bodies, tuple(bodies.index((n, False)) for n in plan.cache_slots), evict_from=0)
    weights = weights._replace(params=stand_in.detach(weights.params), router=routers.STATIC)
    return dataclasses.replace(self, routing=RoutingConfig()), plan, weights


class Execution(NamedTuple):
  """How a model runs prompts: what is static, and the arrays."""

  spec: Spec
  weights: Weights


class Stream(NamedTuple):
  """State of a decode loop.

  Attributes:
    token_B: the newest token of each row, not yet run through the model.
    done_B: the row has met a stop token.
    recent: keys and values of the tokens run so far.
    step: tokens sampled so far, the newest included.
  """

  token_B: jax.Array
  done_B: jax.Array
  recent: Recent
  step: jax.Array


@functools.partial(jax.jit, static_argnames=("spec", "plan"))
def prefill(spec: Spec, plan: Plan, weights: Weights, tokens_BxT: jax.Array, context_B: jax.Array):
  """`Spec.prefill` of a batch of contexts."""
  return spec.prefill(plan, weights, tokens_BxT, context_B)


@functools.partial(jax.jit, static_argnames="sampling")
def first_token(sampling: Sampling, logits_BxV: jax.Array, seed_B: jax.Array, stop_K: jax.Array):
  """The first token (B,) after the context, and whether it stops the row."""
  token_B = sample(sampling, logits_BxV, seed_B, jnp.zeros((), jnp.int32))
  return token_B, jnp.any(token_B[:, None] == stop_K[None], axis=1)


@functools.partial(jax.jit, static_argnames=("spec", "plan", "sampling"), donate_argnames="stream")
def decode_steps(
    spec: Spec, plan: Plan, weights: Weights, sampling: Sampling, steps, cache: Cache, stream: Stream, seed_B, stop_K
):
  """Samples up to `steps` further tokens, fewer once every row is done; one program whatever `steps` is.

  Returns:
    (stream, tokens_BxM, count): the first `count` columns of the tokens are sampled; those of a row after its stop
    token are meaningless. M is the room of `stream.recent`.
  """

  def more(carry):
    stream, _, count = carry
    return (count < steps) & ~jnp.all(stream.done_B)

  def step(carry):
    stream, tokens, count = carry
    out = spec.extend(plan, weights, cache, stream.recent, stream.token_B[:, None])
    logits = decoder.unembed(spec.model, weights.params, out.hidden_BxCxD[:, 0])
    token_B = sample(sampling, logits, seed_B, stream.step)
    done_B = stream.done_B | jnp.any(token_B[:, None] == stop_K[None], axis=1)
    tokens = jax.lax.dynamic_update_slice(tokens, token_B[:, None], (0, count))
    return Stream(token_B, done_B, out.recent, stream.step + 1), tokens, count + 1

  tokens = jnp.zeros(stream.recent.computed_LxBxM.shape[1:], jnp.int32)
  return jax.lax.while_loop(more, step, (stream, tokens, jnp.zeros((), jnp.int32)))


def continuation_logits(
    spec: Spec, plan: Plan, weights: Weights, cache: Cache, recent: Recent, logits_BxV, tokens_BxC
) -> jax.Array:
  """Logits (B,C,V) that predict each token of a continuation, teacher forced.

  Args:
    logits_BxV: after each row's context.
    tokens_BxC: right-padded continuations; `recent` is empty and has room for all but the last token.
  """
  logits = logits_BxV[:, None]
  if tokens_BxC.shape[1] == 1:
    return logits
  out = spec.extend(plan, weights, cache, recent, tokens_BxC[:, :-1])
  return jnp.concatenate([logits, decoder.unembed(spec.model, weights.params, out.hidden_BxCxD)], axis=1)


@functools.partial(jax.jit, static_argnames=("spec", "plan"))
def score(spec: Spec, plan: Plan, weights: Weights, cache: Cache, logits_BxV, row_R, tokens_RxC, length_R):
  """Log-probabilities of continuations, teacher forced.

  Args:
    logits_BxV: after each context.
    row_R: the context, a row of the cache, that each continuation follows.
    tokens_RxC: right-padded continuations.
    length_R: their lengths, at least 1.

  Returns:
    (logprob_RxC, greedy_RxC): of each token, and whether it was the most likely; 0 and False at padding.
  """
  recent = empty_recent(spec.model, len(row_R), max(tokens_RxC.shape[1] - 1, 1), spec.dtype)
  logits = continuation_logits(
      spec, plan, weights, cache.rows(row_R), recent, jnp.take(logits_BxV, row_R, axis=0), tokens_RxC
  )
  # In sums and comparisons that need no array of the logits' size; argmax and log_softmax take three times as long.
  own = jnp.take_along_axis(logits, tokens_RxC[:, :, None], axis=2)
  top = jnp.max(logits, axis=-1, keepdims=True)
  logprob = (own - top)[..., 0] - jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1))
  later = jnp.arange(logits.shape[-1])[None, None] >= tokens_RxC[:, :, None]  # of equal logits the first counts
  greedy = jnp.all((logits < own) | ((logits == own) & later), axis=-1)
  valid = jnp.arange(tokens_RxC.shape[1])[None] < length_R[:, None]
  return jnp.where(valid, logprob, 0.0), valid & greedy
