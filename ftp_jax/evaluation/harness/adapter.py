"""lm-eval's model interface over an engine: likelihoods of continuations and of texts, and generation.

  lm = EngineLM(Engine.load("smollm2-135m", "runs/quickstart/S0.30/seed0/artifact"))
  lm_eval.simple_evaluate(lm, tasks=["hellaswag"])

It uses `model`, `prefill`, `score` and `generate` of the engine and takes anything that has them. A context is
routed with the prefill view and its continuation causally; a text is scored after a context of one token, so that
all of it is causal. Tokens, cuts and windows are those of lm-eval's Hugging Face model, for comparable figures.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, simple_parse_args_string
from tqdm import tqdm

from ftp_jax.errors import UserError, brief
from ftp_jax.evaluation.harness.generation import read_options
from ftp_jax.export.artifact import base_model
from ftp_jax.inference import Engine, Score
from ftp_jax.inference.padding import Padding

DEFAULT_BATCH = 8
_POSITIONS = 2048  # continuation positions whose logits exist at once, unless one row alone has more
_ARGUMENTS = {
    "model": str, "artifact": str, "dtype": str, "fallback": str, "attention": str, "decode_sparsity": float,
    "decode_threshold": float, "tensor": int, "max_length": int, "batch_size": int, "seed": int,
}

Pair = tuple[list[int], list[int]]  # token ids of a context and of what follows it


@register_model("ftp_jax")
class EngineLM(TemplateLM):
  """An engine as a model of lm-eval.

  Attributes:
    engine: the model, dense or pruned.
    batch_size: contexts that are prefilled, and continuations that are scored, at once.
    max_length: most positions of one pass; longer contexts lose their beginning.
  """

  def __init__(
      self, engine: Engine, *, batch_size: int = DEFAULT_BATCH, max_length: int | None = None, seed: int = 0,
      progress: bool = True,
  ):
    """
    Args:
      max_length: None: the positions of the model.
      seed: sampled generation i of those with the same options draws from seed + i.
      progress: show bars on stderr.

    Raises:
      UserError: batch_size or max_length is out of range.
    """
    super().__init__()
    positions = engine.model.config.max_positions
    if batch_size < 1:
      raise UserError(f"batch_size={batch_size} must be at least 1.")
    if max_length is not None and not 1 <= max_length <= positions:
      raise UserError(f"max_length={max_length} must lie in 1..{positions}, the positions of the model.")
    self.engine, self.tokenizer = engine, engine.model.tokenizer
    self.batch_size, self.max_length, self.seed = batch_size, max_length or positions, seed
    self._progress = progress

  @classmethod
  def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "EngineLM":
    """From `--model_args` as one text; see `create_from_arg_obj`."""
    return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

  @classmethod
  def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict | None = None) -> "EngineLM":
    """From `--model_args` and the options of lm-eval's command that concern models.

    Raises:
      UserError: an argument is unknown or has a wrong value, or the model does not load.
    """
    given = {**(additional_config or {}), **arg_dict}
    given.pop("max_batch_size", None)  # it bounds the search that "auto" asks for
    if str(given.get("batch_size")).startswith("auto"):
      given.pop("batch_size")  # there is nothing to search for: the default
    given.pop("device", None)  # lm-eval's command always names one; jax has its own
    given = {name: _value(name, value) for name, value in given.items() if value is not None}
    own = {name: given.pop(name) for name in ("max_length", "batch_size", "seed") if name in given}
    artifact = given.pop("artifact", None)
    engine = Engine.load(given.pop("model", None) or base_model(artifact), artifact, **given)
    return cls(engine, **own)

  # --- tokens ------------------------------------------------------------------------------------

  @property
  def eot_token_id(self) -> int | None:
    return self.tokenizer.eos_token_id

  @property
  def prefix_token_id(self) -> int:
    """What stands before a text without context: the beginning or else the end of a text."""
    for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
      if token is not None:
        return token
    raise UserError("The tokenizer has no begin-of-text and no end-of-text token, so that nothing can stand before an "
                    "empty context; use a task with a context.")

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused) -> list[int]:
    """Token ids; None: special tokens as the tokenizer adds them, but no second prefix token."""
    if add_special_tokens is None:
      tokens = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
      prefix = next((self.tokenizer.decode([token]) for token in tokens if token is not None), None)
      add_special_tokens = prefix is None or not string.startswith(prefix)
    return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

  @property
  def tokenizer_name(self) -> str:
    return str(self.engine.model.directory).replace("/", "__")

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """The text of a conversation; without generation prompt its last turn stays open.

    Where the template knows no system turn it is left out, as lm-eval's own classes do.
    """
    rendered = lambda turns: self.tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
    )
    try:
      return rendered(chat_history)
    except Exception as error:  # a template is a program of the checkpoint's, and may fail in any way
      turns = [turn for turn in chat_history if turn["role"] != "system"]
      if turns == chat_history:
        raise UserError(f"The tokenizer's chat template fails ({brief(error)}); leave it out.") from error
      return rendered(turns)

  # --- likelihoods ---------------------------------------------------------------------------------

  def _loglikelihood_tokens(
      self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **unused
  ) -> list[tuple[float, bool]]:
    pairs = []
    for texts, context, continuation in requests:
      if not 1 <= len(continuation) <= self.max_length:
        raise UserError(
            f"The continuation {texts[1][:40]!r} has {len(continuation)} tokens, but 1 to {self.max_length} can be "
            "scored; mend the item or raise max_length."
        )
      room = self.max_length + 1 - len(continuation)  # the last token is scored, not run
      pairs.append((context[-room:], continuation))
    with self._bar(len(pairs), "log-likelihoods", disable_tqdm) as bar:
      answers = [(score.total, score.greedy) for score in self._scores(pairs, bar)]
    for (texts, _, _), answer in zip(requests, answers):
      self.cache_hook.add_partial("loglikelihood", texts, answer)
    return answers

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
    """Log-likelihood (nats) of whole texts, every window behind a context of one token.

    Raises:
      UserError: the tokens of texts should skip, but a context of one token is below the artifact's crossover.
    """
    skips = self.engine.execution.spec.routing.decode_sparsity and getattr(self.engine, "fallback", "auto") == "auto"
    if skips and not self.engine.prunes(1) and self.engine.crossover:
      raise UserError(
          "Texts stand behind a context of one token, which is below the artifact's crossover, so that none of their "
          "tokens would skip; set --fallback=never, or --decode-sparsity=0."
      )
    pairs, scored, owner = [], [], []
    for index, request in enumerate(requests):
      windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1)
      for inputs, targets in windows:
        pairs.append((inputs[:1], inputs[1:] + targets[-1:]))
        scored.append(len(targets))  # the last ones; those before are context that an earlier window scored
        owner.append(index)
    totals = [0.0] * len(requests)
    with self._bar(len(pairs), "windows of texts", disable_tqdm) as bar:
      for index, count, score in zip(owner, scored, self._scores(pairs, bar)):
        totals[index] += sum(score.logprobs[-count:])
    for request, total in zip(requests, totals):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args[:1], total)
    return totals

  def _scores(self, pairs: Sequence[Pair], bar: tqdm) -> list[Score]:
    """Scores of pairs. Each distinct context is prefilled once; the longest go first, those of one length together.

    A batch that is not full is filled with its first row: of every width there is one program.
    """
    pairs_of: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(pairs):
      pairs_of.setdefault(tuple(context), []).append(index)
    contexts = sorted(pairs_of, key=len, reverse=True)
    padding = padding_for(len(contexts))
    results: list[Score | None] = [None] * len(pairs)
    for at in range(0, len(contexts), self.batch_size):
      batch = contexts[at : at + self.batch_size]
      filled = _fill(batch, min(self.batch_size, len(contexts)))
      prefix = self.engine.prefill([list(context) for context in filled], padding)
      waiting = [(index, row) for row, context in enumerate(batch) for index in pairs_of[context]]
      waiting.sort(key=lambda entry: -len(pairs[entry[0]][1]))
      while waiting:
        width = padding.continuation(len(pairs[waiting[0][0]][1]))
        # A power of two: an engine fills others up to one.
        count = min(self.batch_size, 1 << max(_POSITIONS // max(width - 1, 1), 1).bit_length() - 1)
        chunk, waiting = waiting[:count], waiting[count:]
        filled = _fill(chunk, min(count, len(pairs)))
        scores = self.engine.score(prefix, [pairs[index][1] for index, _ in filled], [row for _, row in filled])
        for (index, _), score in zip(chunk, scores):
          results[index] = score
        bar.update(len(chunk))
      del prefix  # its cache, before that of the next batch is made
    return results

  # --- generation ----------------------------------------------------------------------------------

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """Continuations, cut before the first of their stop strings; options as lm-eval's tasks name them.

    Raises:
      UserError: an option is not supported, or leaves no room for the context.
    """
    groups: dict[Any, list[int]] = {}
    for index, request in enumerate(requests):
      groups.setdefault(read_options(request.args[1]), []).append(index)
    texts: list[str | None] = [None] * len(requests)
    with self._bar(len(requests), "generations", disable_tqdm) as bar:
      for options, members in groups.items():
        room = self.max_length - options.max_new_tokens
        if room < 1:
          raise UserError(
              f"max_gen_toks={options.max_new_tokens} leaves no room for a context within {self.max_length} positions; "
              "ask for fewer tokens or raise max_length."
          )
        contexts = {i: (self.tok_encode(requests[i].args[0]) or [self.prefix_token_id])[-room:] for i in members}
        if not options.sampling.temperature:  # the draws of a sampled request follow from its place
          members.sort(key=lambda i: -len(contexts[i]))
        padding = padding_for(len(members))
        for at in range(0, len(members), self.batch_size):
          chunk = members[at : at + self.batch_size]
          done = self.engine.generate(
              self.engine.prefill([contexts[i] for i in chunk], padding), options.max_new_tokens, options.sampling,
              stop_strings=options.until, seed=self.seed + at,
          )
          for i, generation in zip(chunk, done):
            texts[i] = generation.text
            self.cache_hook.add_partial("generate_until", requests[i].args, generation.text)
          bar.update(len(chunk))
    return texts

  def _bar(self, total: int, what: str, disabled: bool) -> tqdm:
    return tqdm(total=total, desc=what, disable=disabled or not self._progress)


def padding_for(contexts: int) -> Padding:
  """Widths for this many contexts: one an octave for a sample, where compiling takes longest, up to eight for many.

  No width is more than 256 positions above the next: a batch of longer texts computes that many in less time than it
  takes to compile.
  """
  return Padding(1 << min(max(contexts.bit_length() - 8, 0) // 2, 3), 32, 8, 256)


def _fill(rows: Sequence[Any], size: int) -> list[Any]:
  """The rows, and the first one again until there are `size`."""
  return [*rows, *[rows[0]] * (size - len(rows))]


def _value(name: str, value: Any) -> Any:
  """The value of a model argument as its type; lm-eval has guessed a type from the text."""
  if name not in _ARGUMENTS:
    raise UserError(f"model_args has no {name!r}; it knows {', '.join(_ARGUMENTS)}.")
  kind = _ARGUMENTS[name]
  try:
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):
      raise ValueError
    return kind(value)
  except (TypeError, ValueError):
    what = {int: "a whole number", float: "a number", str: "a text"}[kind]
    raise UserError(f"model_args {name}={value!r} must be {what}.") from None


def registered() -> None:
  """What ftp_jax.yaml names, so that lm-eval imports this module."""
