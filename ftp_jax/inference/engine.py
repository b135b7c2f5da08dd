"""The Python API of inference.

  engine = Engine.load("smollm2-135m", "runs/quickstart/S0.30/seed0/artifact")
  engine.generate([engine.encode("The capital of France is")], max_new_tokens=16)
  engine.score(context, [continuation, ...])     # one prefill, many continuations
  engine.generate(engine.prefill(prompts), ...)  # a prefix can be continued several times

Prompts and continuations are lists of token ids. Rows of a batch do not affect each other: whether a row is pruned
or computed densely (`fallback`), which tokens it skips and what it draws are its own.

An engine runs where its model's parameters lie: `Engine.load(..., tensor=4)` splits them over four devices.
"""

import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftp_jax import sharding
from ftp_jax.data.encoding import chat_turn
from ftp_jax.errors import UserError
from ftp_jax.export.artifact import Artifact
from ftp_jax.export.artifact import load as load_artifact
from ftp_jax.inference import programs
from ftp_jax.inference.padding import FINE, Padding, power_of_two, room
from ftp_jax.inference.programs import Execution, Spec, Stream, Weights
from ftp_jax.inference.sampling import Sampling
from ftp_jax.machine import describe_machine
from ftp_jax.models import kernels
from ftp_jax.models.config import ModelConfig
from ftp_jax.models.decoder import param_shardings
from ftp_jax.models.huggingface import fingerprint
from ftp_jax.models.sources import DTYPES, Model, load_model
from ftp_jax.models.tokenizer import generation_ends
from ftp_jax.routing import routers, stand_in
from ftp_jax.routing.bucketed import Prefilled
from ftp_jax.routing.cache import empty_recent
from ftp_jax.routing.config import RoutingConfig
from ftp_jax.routing.plan import MAX_BUCKETS, Plan

FALLBACKS = ("auto", "never", "always")
_STOP_SLOTS = 8  # slots for stop tokens, at least
_STEPS = 16  # decode steps between two looks of the host, where nothing is streamed


@dataclasses.dataclass(frozen=True)
class Score:
  """Of one continuation. logprobs: natural logarithms, one a token; greedy: every token was the most likely one."""

  logprobs: tuple[float, ...]
  greedy: bool

  @property
  def total(self) -> float:
    return math.fsum(self.logprobs)


@dataclasses.dataclass(frozen=True)
class Generation:
  """Of one prompt.

  Attributes:
    tokens: the new ones, those included that ended the row: a stop token, or what completes a stop string.
    text: what they say, cut before the stop token or stop string, without special tokens.
    stopped: a stop token, a stop string or the stream ended the row, not `max_new_tokens`.
  """

  tokens: tuple[int, ...]
  text: str
  stopped: bool


@dataclasses.dataclass(frozen=True)
class Group:
  """Rows of a prefix that were computed the same way. index: which prompts they are."""

  spec: Spec
  weights: Weights
  plan: Plan
  index: tuple[int, ...]
  prefilled: Prefilled


@dataclasses.dataclass(frozen=True)
class Prefix:
  """Prefilled prompts; may be continued any number of times. padding: also of the continuations that are scored."""

  lengths: tuple[int, ...]
  groups: tuple[Group, ...]
  padding: Padding = FINE

  @property
  def cache_bytes(self) -> int:
    """Bytes of the context's keys, values and their positions."""
    return sum(a.nbytes for group in self.groups for a in group.prefilled.cache[:3])


class Engine:
  """A frozen model, dense or pruned by an artifact or another execution.

  Attributes:
    model: the base model.
    artifact: what prunes it, or None.
    execution: how prompts are run that are not computed densely; the dense one where nothing prunes.
    crossover: context length from which pruning was measured to pay; None if it was not measured on this kind of
      device (of CPUs: this model) in this dtype, or the model lies on several devices.
  """

  def __init__(
      self,
      model: Model,
      artifact: Artifact | None = None,
      *,
      execution: Execution | None = None,
      dtype: str | None = None,
      fallback: str = "auto",
      attention: str = "auto",
      max_buckets: int = MAX_BUCKETS,
      buckets: Sequence[int] | None = None,
      decode_sparsity: float | None = None,
      decode_threshold: float | None = None,
  ):
    """
    Args:
      model, artifact: which belong together; their fingerprints are compared.
      execution: what prunes the model in place of an artifact, with weights of this model.
      dtype: of the computation, "float32" or "bfloat16"; None: that of the model's parameters.
      fallback: `auto` computes prompts shorter than the artifact's crossover densely (all are pruned where none was
        measured on this kind of device in this dtype), `never` prunes all, `always` none.
      attention: implementation, see `models.kernels`.
      max_buckets, buckets: capacities of the compiled programs, see `routing.plan.make_plan`.
      decode_sparsity, decode_threshold: replace those of the artifact.

    Raises:
      UserError: the artifact was made for another model or is of mixed files, or an option is unknown or has nothing
        to change.
    """
    dtype = model.dtype if dtype is None else dtype
    _check_options(dtype, fallback, attention)
    changes = {"decode_sparsity": decode_sparsity, "decode_threshold": decode_threshold}
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes and artifact is None:
      raise UserError(f"{' and '.join(changes)} need an artifact, whose settings they replace; pass one.")
    if execution is not None and artifact is not None:
      raise UserError("Both an artifact and an execution say how the model is run; pass one of them.")
    self.model, self.artifact = model, artifact
    self.fallback, self.max_buckets, self.buckets = fallback, max_buckets, buckets
    zeros = self._place(np.zeros(model.config.num_blocks, np.float32))
    self._dense = Execution(
        Spec(model.config, RoutingConfig(), DTYPES[dtype], attention), Weights(model.params, routers.STATIC, zeros)
    )
    self.execution, self.crossover = self._dense, None
    if execution is not None:
      spec = dataclasses.replace(execution.spec, dtype=DTYPES[dtype], attention=attention)
      self.execution = Execution(spec, execution.weights)
    if artifact is None:
      return
    found = fingerprint(model.directory)
    if found != artifact.fingerprint:
      raise UserError(
          f"The artifact was made for {artifact.base_model} (fingerprint {artifact.fingerprint}), but this model has "
          f"{found}; load the base model it belongs to."
      )
    _check_fit(artifact, model.config)
    routing = dataclasses.replace(artifact.routing, **changes)
    if decode_threshold is not None and not (routing.decode_sparsity and routing.decode_rule == "threshold"):
      raise UserError(
          f"decode_threshold has nothing to change where decode_sparsity={routing.decode_sparsity:g} under the rule "
          f"{routing.decode_rule!r}; leave it out, or let new tokens skip by the rule 'threshold'."
      )
    router = routers.Router("dynamic", artifact.router, self._place(artifact.params))
    schedule = self._place(np.asarray(artifact.schedule, np.float32))
    spec = dataclasses.replace(self._dense.spec, routing=routing)
    params = stand_in.attach(model.params, self._place(artifact.stand_in))
    self.execution = Execution(spec, Weights(params, router, schedule))
    measured = None if self._over_devices else artifact.crossover
    if measured and (measured.get("dtype"), _device(measured["machine"])) == (dtype, _device(describe_machine())):
      never = model.config.max_positions + 1  # never faster: no prompt is long enough
      self.crossover = never if measured["context"] is None else measured["context"]

  @classmethod
  def load(
      cls, source: str, artifact: str | None = None, *, dtype: str = "float32", tensor: int = 1, **options
  ) -> "Engine":
    """Loads a model from any source (`models.sources`) and an artifact from its directory; options as above.

    Args:
      tensor: devices over which heads, columns of the MLP and the vocabulary are split, each device holding its part;
        what this number does not divide lies whole on every one.

    Raises:
      UserError: there are not so many devices in this process, or nothing of the blocks can be split so.
    """
    _check_options(dtype, options.get("fallback", "auto"), options.get("attention", "auto"))
    _check_tensor(tensor)
    if artifact == "":
      raise UserError("The artifact has an empty name; give its directory, or none at all for the dense model.")
    loaded = load_artifact(artifact) if artifact else None  # first: a wrong name shows before the weights are read
    shardings = functools.partial(_shardings, tensor) if tensor > 1 else None
    return cls(load_model(source, dtype, shardings), loaded, dtype=dtype, **options)

  @property
  def _over_devices(self) -> bool:
    """Whether the model lies on several devices."""
    mesh = sharding.mesh_of(self.model.params)
    return mesh is not None and mesh.size > 1

  def _place(self, tree: Any) -> Any:
    """Host arrays where the model is, whole on every device."""
    return sharding.place(self.model.params, jax.tree.map(jnp.asarray, tree))

  def _over(self) -> contextlib.AbstractContextManager:
    """The context in which the programs of this model are called."""
    return sharding.over(self.model.params)

  def encode(self, text: str, chat: bool = False) -> list[int]:
    """Token ids of a prompt.

    Args:
      chat: the text is a user's message, and the chat template is put around it as in training; otherwise the
        special tokens that the tokenizer adds to a text are added.

    Raises:
      UserError: `text` is none that UTF-8 can hold, or `chat` and the tokenizer has no usable chat template.
    """
    try:
      text.encode("utf-8")
    except (AttributeError, UnicodeEncodeError):
      raise UserError(f"{repr(text)[:80]} is no text that a tokenizer reads; decode it as UTF-8 first.") from None
    tokenizer = self.model.tokenizer
    if not chat:
      return tokenizer.encode(text)
    if not tokenizer.chat_template:
      raise UserError("The tokenizer has no chat template; leave out chat or use a chat model.")
    turn = chat_turn(tokenizer)
    return tokenizer.encode(turn.before + text.strip() + turn.after, add_special_tokens=False)

  def decode(self, tokens: Sequence[int]) -> str:
    """Text of tokens, without special ones."""
    return self.model.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

  @functools.cached_property
  def stop_tokens(self) -> tuple[int, ...]:
    """Ids that end a row by default.

    The tokenizer's end of sequence, those of the checkpoint's `generation_config.json`, and what ends a turn of its
    chat template.
    """
    tokenizer = self.model.tokenizer
    ends = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    ends += generation_ends(self.model.directory)
    try:
      ends += chat_turn(tokenizer).end if tokenizer.chat_template else ()
    except UserError:  # a template that cannot be read has no known end
      pass
    return tuple(dict.fromkeys(ends))

  def prunes(self, length: int) -> bool:
    """Whether a prompt of `length` tokens is pruned."""
    if self.execution is self._dense or self.fallback == "always":
      return False
    return self.fallback == "never" or self.crossover is None or length >= self.crossover

  def prefill(self, prompts: Sequence[Sequence[int]], padding: Padding = FINE) -> Prefix:
    """Runs prompts through the model: those pruned and those computed densely as one batch each.

    Args:
      padding: widths that are compiled, see `inference.padding`; results do not depend on it.

    Raises:
      UserError: a prompt is empty, or longer than the model's positions, or holds an id that is no token.
    """
    self.check(prompts)
    groups = []
    for pruned, execution in ((True, self.execution), (False, self._dense)):
      index = tuple(i for i, prompt in enumerate(prompts) if self.prunes(len(prompt)) == pruned)
      if index:
        groups.append(self._prefill(*execution, index, [prompts[i] for i in index], padding))
    return Prefix(tuple(map(len, prompts)), tuple(groups), padding)

  def _prefill(self, spec: Spec, weights: Weights, index, prompts, padding: Padding) -> Group:
    longest, buckets = max(map(len, prompts)), None if spec is self._dense.spec else self.buckets
    length = padding.context(longest, self.model.config.max_positions)
    if buckets and longest <= max(buckets):  # a dense block needs as many slots as the context is wide
      length = min(length, max(buckets))
    plan = spec.plan(weights, length, self.max_buckets, buckets)
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts):
      row[: len(prompt)] = prompt
    context = np.array([len(prompt) for prompt in prompts], np.int32)
    with self._over():
      return Group(spec, weights, plan, index, programs.prefill(spec, plan, weights, tokens, context))

  def generate(
      self,
      prompts: Prefix | Sequence[Sequence[int]],
      max_new_tokens: int,
      sampling: Sampling = Sampling(),
      *,
      stop_tokens: int | Sequence[int] | None = None,
      stop_strings: str | Sequence[str] = (),
      seed: int = 0,
      stream: Callable[[int, list[int]], bool | None] | None = None,
  ) -> list[Generation]:
    """Continues every prompt.

    Args:
      prompts: token ids, or what `prefill` gave.
      max_new_tokens: most new tokens of each.
      stop_tokens: ids that end a row, or one; None: those of the attribute `stop_tokens`.
      stop_strings: texts that end a row, or one, found on the host in the decoded new tokens; one that is itself a
        special or added token of the tokenizer counts as a stop token, too.
      seed: row i draws from seed + i.
      stream: called with (prompt, new tokens) as they come, one at a time; returns True to end that row. Rows that
        are pruned come before those computed densely.

    Raises:
      UserError: as `prefill`, or the prompt and the new tokens together exceed the model's positions, or a stop or
        `sampling` is of another type.
    """
    if not isinstance(sampling, Sampling):
      raise UserError(f"sampling={sampling!r} must be a Sampling, such as Sampling(temperature=0.8).")
    stops, seed = self._stops(stop_tokens, stop_strings), _whole("seed", seed)
    max_new_tokens = _whole("max_new_tokens", max_new_tokens, 1)
    if not isinstance(prompts, Prefix):
      self.check(prompts, max_new_tokens)  # before the work
      prompts = self.prefill(prompts)
    self._check_room(max(prompts.lengths), max_new_tokens)
    results: list[Generation | None] = [None] * len(prompts.lengths)
    for group in prompts.groups:
      rows = self._generate(group, max_new_tokens, sampling, stops, seed, stream)
      for index, result in zip(group.index, rows):
        results[index] = result
    return results

  def _stops(self, tokens: int | Sequence[int] | None, strings: str | Sequence[str]) -> "_Stops":
    """The stops of `generate`; UserError where they are of another type."""
    strings = (strings,) if isinstance(strings, str) else strings
    strings = tuple(strings) if isinstance(strings, Iterable) else strings
    if not isinstance(strings, Iterable) or not all(isinstance(text, str) for text in strings):
      raise UserError(f"stop_strings={strings!r} must be a text or several; leave it out for none.")
    ids = set(self.stop_tokens if tokens is None else _ids(tokens))
    added = self.model.tokenizer.get_added_vocab() if strings else {}
    ids |= {added[text] for text in strings if text in added}
    return _Stops(frozenset(ids), tuple(filter(None, strings)))

  def _generate(self, group: Group, max_new_tokens, sampling, stops: "_Stops", seed, stream) -> list[Generation]:
    spec, plan, weights = group.spec.continuing(group.plan, group.weights)
    batch = len(group.index)
    stop_K = np.full(power_of_two(max(len(stops.tokens), _STOP_SLOTS)), -1, np.int32)  # few sizes: each is a program
    stop_K[: len(stops.tokens)] = sorted(stops.tokens)
    seed_B = jnp.asarray([(seed + i) % 2**32 for i in group.index], jnp.uint32)
    with self._over():
      token_B, done_B = programs.first_token(sampling, group.prefilled.logits_BxV, seed_B, stop_K)
      recent = empty_recent(spec.model, batch, room(max_new_tokens), spec.dtype)
    state = Stream(token_B, done_B, recent, jnp.ones((), jnp.int32))
    new: list[list[int]] = [[] for _ in range(batch)]
    ended = [False] * batch
    fresh = np.asarray(token_B)[:, None]
    while True:
      for b, tokens in enumerate(fresh.tolist()):
        if ended[b]:
          continue
        size = stops.find(self.decode, new[b], tokens)
        ended[b] = size is not None
        new[b] += tokens[:size]
        if stream and stream(group.index[b], tokens[:size]):
          ended[b] = True
      left = max_new_tokens - max(map(len, new))
      if all(ended) or left <= 0:
        return [Generation(tuple(row), stops.cut(self.decode, row), end) for row, end in zip(new, ended)]
      state = state._replace(done_B=jnp.asarray(ended))
      steps = 1 if stream else min(_STEPS, left)
      with self._over():
        state, tokens, count = programs.decode_steps(
            spec, plan, weights, sampling, steps, group.prefilled.cache, state, seed_B, stop_K
        )
      fresh = np.asarray(tokens)[:, : int(count)]

  def score(
      self, context: Prefix | Sequence[int], continuations: Sequence[Sequence[int]], rows: Sequence[int] | None = None
  ) -> list[Score]:
    """Log-probabilities of continuations after a context that is prefilled once.

    They are run as one batch, and each holds a copy of its context's cache.

    Args:
      context: token ids of one context, or a prefix.
      continuations: token ids.
      rows: which prompt of the prefix each continues; None: the first.

    Raises:
      UserError: as `prefill`, or a continuation is empty or too long.
    """
    if not isinstance(context, Prefix):
      self.check([context])
    lengths = context.lengths if isinstance(context, Prefix) else (len(context),)
    _check_sized("continuations", continuations)
    try:
      named = [0] * len(continuations) if rows is None else [operator.index(row) for row in rows]
    except TypeError:
      named = []
    if len(named) != len(continuations) or not set(named) <= set(range(len(lengths))):
      raise UserError(f"rows={rows} must name, for each continuation, one of the {len(lengths)} contexts.")
    rows = named
    self._check_rows("Continuation", continuations, "every continuation needs at least one token to score")
    most = self.model.config.max_positions
    for row, continuation in zip(rows, continuations):
      if lengths[row] + len(continuation) - 1 > most:  # the last token is scored, not run
        raise UserError(
            f"A context of {lengths[row]} tokens with a continuation of {len(continuation)} exceeds the model's {most} "
            "positions; shorten the context."
        )
    if not isinstance(context, Prefix):
      context = self.prefill([context])
    results: list[Score | None] = [None] * len(continuations)
    for group in context.groups:
      chosen = [i for i, row in enumerate(rows) if row in group.index]
      if not chosen:
        continue
      # Filled up to a power of two: few shapes to compile.
      filled = chosen + chosen[:1] * (power_of_two(len(chosen)) - len(chosen))
      width = context.padding.continuation(max(len(continuations[i]) for i in chosen))
      tokens = np.zeros((len(filled), width), np.int32)
      length = np.array([len(continuations[i]) for i in filled], np.int32)
      for row, i in zip(tokens, filled):
        row[: len(continuations[i])] = continuations[i]
      of_group = np.array([group.index.index(rows[i]) for i in filled], np.int32)
      with self._over():
        logprob, greedy = jax.device_get(programs.score(
            *group.spec.continuing(group.plan, group.weights), group.prefilled.cache, group.prefilled.logits_BxV,
            of_group, tokens, length,
        ))
      for n, i in enumerate(chosen):
        size = len(continuations[i])
        results[i] = Score(tuple(logprob[n, :size].tolist()), bool(greedy[n, :size].all()))
    return results

  def check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int | None = None) -> None:
    """Raises the UserError of `prefill`, or of `generate` where new tokens are given, without their work."""
    _check_sized("prompts", prompts)
    if not len(prompts):
      raise UserError("There is no prompt; pass at least one.")
    self._check_rows("Prompt", prompts, "a prompt needs at least one token (a begin-of-text token will do)")
    self._check_room(max(map(len, prompts)), max_new_tokens)

  def _check_room(self, length: int, new: int | None) -> None:
    most = self.model.config.max_positions
    new = 0 if new is None else _whole("max_new_tokens", new, 1)
    if length > most:
      raise UserError(f"A prompt of {length} tokens exceeds the model's {most} positions; shorten it.")
    if length + new > most:
      raise UserError(
          f"A prompt of {length} tokens and {new} new ones exceed the model's {most} positions; shorten the prompt or "
          "ask for fewer new tokens."
      )

  def _check_rows(self, what: str, rows: Sequence[Sequence[int]], needs: str) -> None:
    size = self.model.config.vocab_size
    for i, row in enumerate(rows):
      if isinstance(row, str):
        raise UserError(f"{what} {i} is a text; pass its token ids, as Engine.encode gives them.")
      try:
        ids = np.asarray(row)
      except ValueError:  # lists of several lengths
        ids = np.empty((1, 1))
      if ids.ndim == 1 and not ids.size:
        raise UserError(f"{what} {i} is empty; {needs}.")
      if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UserError(f"{what} {i} is no list of token ids; pass a list of lists of whole numbers.")
      if ids.min() < 0 or ids.max() >= size:
        raise UserError(f"A token id lies outside 0..{size - 1}; encode the text with this model's tokenizer.")


@dataclasses.dataclass(frozen=True)
class _Stops:
  """What ends a row: token ids and strings of the text."""

  tokens: frozenset[int]
  strings: tuple[str, ...]

  def find(self, decode, before: list[int], fresh: list[int]) -> int | None:
    """How many of the fresh tokens, which follow those before, complete a stop; None if they do not."""
    hits = [n for n, token in enumerate(fresh, 1) if token in self.tokens][:1]
    if self.strings and self._at(decode(before + fresh)) is not None:
      hits += [n for n in range(1, len(fresh) + 1) if self._at(decode(before + fresh[:n])) is not None][:1]
    return min(hits, default=None)

  def cut(self, decode, tokens: list[int]) -> str:
    """The text of a row's tokens before what stopped it."""
    text = decode(tokens[:-1] if tokens[-1] in self.tokens else tokens)
    return text[: self._at(text)]

  def _at(self, text: str) -> int | None:
    return min((text.index(string) for string in self.strings if string in text), default=None)


def _check_fit(artifact: Artifact, config: ModelConfig) -> None:
  """UserError unless router, schedule and routing have the model's size, as those of mixed or edited files may not."""
  init = functools.partial(
      routers.init_router, artifact.router, num_blocks=config.num_blocks, model_size=config.hidden_size
  )
  want = jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(init, jax.random.key(0)))
  maps = stand_in.fits(artifact.stand_in, config.num_blocks, config.hidden_size)
  if jax.tree.map(np.shape, artifact.params) != want or not maps:
    raise UserError("The artifact's router.safetensors is not of its ftp_config.json; copy the artifact again.")
  fractions = [s for s in artifact.schedule if isinstance(s, int | float) and 0 <= s <= 1]
  if len(artifact.schedule) != config.num_blocks or len(fractions) != config.num_blocks:
    raise UserError(
        f"The artifact's schedule is not one number from 0 to 1 for each of {config.num_blocks} blocks; copy the "
        "artifact again."
    )
  artifact.routing.check_blocks(config.num_blocks)


def _whole(name: str, value: Any, least: int | None = None) -> int:
  """A whole number of any library's type as Python's; UserError where it is none, or less than `least`."""
  try:
    whole = operator.index(value)
  except TypeError:
    whole = None
  if whole is None or (least is not None and whole < least):
    raise UserError(f"{name}={value} must be a whole number{'' if least is None else f', at least {least}'}.")
  return whole


def _ids(tokens: Any) -> list[int]:
  """The ids of stop tokens, of one or of several; UserError where they are none."""
  try:
    several = [operator.index(tokens)]
  except TypeError:
    several = list(tokens) if isinstance(tokens, Iterable) else [tokens]
  try:
    ids = [operator.index(token) for token in several]
  except TypeError:
    ids = [2**31]
  if any(abs(token) >= 2**31 for token in ids) or any(isinstance(token, bool) for token in (tokens, *several)):
    raise UserError(f"stop_tokens={tokens!r} must be a token's id or several; texts belong into stop_strings.")
  return ids


def _check_sized(name: str, rows: Any) -> None:
  try:
    len(rows)
  except TypeError:
    kind = type(rows).__name__
    raise UserError(f"The {name} must be a list of rows of token ids, not {kind}; make it a list.") from None


def _check_tensor(tensor: int) -> None:
  found = jax.local_device_count()
  if not 1 <= tensor <= found:
    raise UserError(f"tensor={tensor} devices cannot be had; this process has {found}, choose 1 to {found}.")
  if tensor > 1 and jax.process_count() > 1:
    raise UserError(f"tensor={tensor} is for one process; start the command on one host alone.")


def _shardings(tensor: int, config: ModelConfig) -> Any:
  """Of the parameters, over so many devices. UserError where each would hold every block whole."""
  placed = param_shardings(sharding.make_mesh(1, 1, tensor, devices=jax.local_devices()[:tensor]), config)
  if all(leaf.is_fully_replicated for leaf in jax.tree.leaves(placed["blocks"])):
    raise UserError(
        f"tensor={tensor} divides neither the {config.num_heads} heads nor the {config.intermediate_size} columns of "
        "the MLP; choose a number that does."
    )
  return placed


def _device(machine: dict[str, Any]) -> tuple[str, str | None]:
  """What must be equal for a measured time to say anything: the kind of device, of CPUs their model."""
  return machine["device"], machine.get("cpu") if machine["device"] == "cpu" else None


def _check_options(dtype: str, fallback: str, attention: str) -> None:
  for name, value, known in (
      ("dtype", dtype, DTYPES), ("fallback", fallback, FALLBACKS), ("attention", attention, kernels.IMPLEMENTATIONS),
  ):
    if value not in known:
      raise UserError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
  kernels.check_runs(attention, kernels.backend_name())
