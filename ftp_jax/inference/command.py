"""The command `ftp-jax generate`: prompts in, text out, and one line of figures on stderr."""

import argparse
import contextlib
import io
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from ftp_jax.data.records import read_jsonl, read_text
from ftp_jax.errors import UserError, check_target, short_of_memory
from ftp_jax.inference.engine import Engine, Generation
from ftp_jax.inference.sampling import Sampling


def run(arguments: argparse.Namespace) -> None:
  """Generates; see `ftp-jax generate --help` for the arguments.

  Raises:
    UserError: there is no prompt, or an argument does not fit the model.
  """
  target = pathlib.Path(arguments.json) if arguments.json else None
  if target:
    check_target(target)
  if arguments.batch < 1:
    raise UserError(f"--batch={arguments.batch} must be at least 1.")
  if not arguments.artifact and (arguments.decode_sparsity, arguments.decode_threshold) != (None, None):
    raise UserError("--decode-sparsity and --decode-threshold change a router; name one with --artifact=DIR.")
  sampling = Sampling(arguments.temperature, arguments.top_p)
  texts = read_prompts(arguments.prompt, arguments.prompts)
  if target and arguments.prompts and target.exists() and target.samefile(arguments.prompts):
    raise UserError(f"--json={target} is the file of --prompts; name another.")
  with short_of_memory("set --dtype=bfloat16, or split the weights with --tensor"):
    engine = Engine.load(
        arguments.model, arguments.artifact, dtype=arguments.dtype, fallback=arguments.fallback,
        attention=arguments.attention, decode_sparsity=arguments.decode_sparsity,
        decode_threshold=arguments.decode_threshold, tensor=arguments.tensor,
    )
  prompts = [engine.encode(text, arguments.chat) for text in texts]
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="replace")  # characters that the terminal's encoding has not
  engine.check(prompts, arguments.max_new_tokens)  # all of them, before the first is run
  try:
    with (
        short_of_memory("lower --batch or --max-new-tokens, or set --dtype=bfloat16"),
        target.open("w", encoding="utf-8") if target else contextlib.nullcontext() as file,
    ):
      figures = _generate(engine, texts, prompts, sampling, arguments, file)
  except BrokenPipeError:  # the reader of the pipe has enough; nor must Python's own last flush fail
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return
  print(f"ftp-jax: {figures}", file=sys.stderr)


def read_prompts(prompt: str | None, path: str | None) -> list[str]:
  """The prompts of --prompt, or else of --prompts, or else of stdin.

  A file whose first line begins with a brace holds one JSON object with "prompt" a line; any other holds one
  prompt a line. Blank lines are left out.

  Raises:
    UserError: both are given, or neither and nothing is piped in, or there is no usable prompt.
  """
  if prompt is not None and path is not None:
    raise UserError("--prompt and --prompts exclude each other; pass one of them.")
  if path is not None:
    return _read_file(path)
  if prompt is not None:
    given = os.fsencode(prompt)  # as it was typed, whatever the locale made of it
  elif sys.stdin is None or sys.stdin.isatty():  # None: it was closed
    raise UserError("There is no prompt; pass --prompt=TEXT, --prompts=FILE, or pipe a text in.")
  else:
    given = sys.stdin.buffer.read().rstrip(b"\r\n")
  try:
    text = given.decode("utf-8-sig")
  except UnicodeDecodeError:
    raise UserError("The prompt is not UTF-8; convert it first.") from None
  if not text:
    raise UserError("The prompt is empty; pass some text.")
  return [text]


def _read_file(path: str) -> list[str]:
  if not path:
    raise UserError("--prompts is empty; name a text file.")
  lines = [line.rstrip("\n") for line in io.StringIO(read_text(path)) if line.strip()]
  if not lines:
    raise UserError(f"--prompts={path} holds no prompt; write one a line.")
  if not lines[0].lstrip().startswith("{"):
    return lines
  texts = [(where, record.get("prompt")) for where, record in read_jsonl(path)]
  for where, text in texts:
    if not isinstance(text, str) or not text:
      raise UserError(f'{where} has no text "prompt"; mend or remove it.')
  return [text for _, text in texts]


def _generate(
    engine: Engine, texts: Sequence[str], prompts: Sequence[list[int]], sampling: Sampling,
    arguments: argparse.Namespace, file: TextIO | None,
) -> str:
  """Runs batch by batch, prints and writes every result; returns the line of figures."""
  screen = Screen(engine.decode, arguments.stop, engine.stop_tokens) if len(prompts) == 1 else None
  clock, new_tokens, cache_bytes = Clock(), 0, 0
  for start in range(0, len(prompts), arguments.batch):
    batch = prompts[start : start + arguments.batch]

    def stream(row: int, tokens: list[int]) -> None:
      clock.tick(start + row, len(tokens))
      if screen:
        screen.add(tokens)

    prefix = engine.prefill(batch)
    cache_bytes = max(cache_bytes, prefix.cache_bytes)
    done = engine.generate(
        prefix, arguments.max_new_tokens, sampling, stop_strings=arguments.stop, seed=arguments.seed + start,
        stream=stream,
    )
    del prefix  # its cache, before that of the next batch is made
    clock.pause()
    new_tokens += sum(len(generation.tokens) for generation in done)
    for n, (text, prompt, generation) in enumerate(zip(texts[start:], batch, done), start + 1):
      if screen:
        screen.finish(generation.text)
      else:
        print(f"=== {n}/{len(prompts)}: {_brief(text)}\n{generation.text}", flush=True)
      if file:
        file.write(_record(text, generation, engine.prunes(len(prompt))) + "\n")
        file.flush()
  rate = f" {clock.rate:.1f} tokens/s," if clock.rate else ""
  return (
      f"{sum(map(len, prompts))} prompt tokens, {new_tokens} new tokens, first token after {clock.first:.2f} s,{rate} "
      f"cache {cache_bytes:,} bytes, {reason(engine, [len(prompt) for prompt in prompts])}"
  )


def _record(prompt: str, generation: Generation, pruned: bool) -> str:
  return json.dumps({
      "prompt": prompt, "text": generation.text, "tokens": generation.tokens, "stopped": generation.stopped,
      "pruned": pruned,
  }, ensure_ascii=False)


def _brief(text: str) -> str:
  line = " ".join(text.split())
  return line if len(line) <= 60 else line[:57] + "..."


def reason(engine: Engine, lengths: Sequence[int]) -> str:
  """Whether prompts of these lengths are computed densely or pruned, and why."""
  if engine.artifact is None:
    return "dense: there is no --artifact"
  if engine.fallback != "auto":
    return f"{'pruned' if engine.fallback == 'never' else 'dense'}: --fallback={engine.fallback}"
  if engine.crossover is None:
    return "pruned: no crossover was measured on this kind and number of devices in this dtype"
  if engine.artifact.crossover["context"] is None:
    return "dense: pruning was faster at no length that was measured"
  pruned = sum(map(engine.prunes, lengths))
  if 0 < pruned < len(lengths):
    return f"{pruned} of {len(lengths)} pruned: the others are below the crossover of {engine.crossover} tokens"
  return f"{'pruned: not' if pruned else 'dense:'} below the crossover of {engine.crossover} tokens"


class Screen:
  """Prints the text of a row as its tokens come.

  Held back is what later tokens may change: the replacement characters of an incomplete UTF-8 sequence, and
  what may become a stop string. Neither stop strings nor stop tokens are printed.
  """

  def __init__(self, decode, stop_strings: Sequence[str], stop_tokens: Sequence[int] = ()):
    self._decode, self._stop_strings = decode, [text for text in stop_strings if text]
    self._stop_tokens = frozenset(stop_tokens)
    self._tokens, self._printed = [], 0

  def add(self, tokens: list[int]) -> None:
    self._tokens += [token for token in tokens if token not in self._stop_tokens]
    text = self._decode(self._tokens)
    whole = text.rstrip("\ufffd")
    ends = [len(whole)]
    for stop in self._stop_strings:
      ends += [text.index(stop)] if stop in text else []
      # Behind the whole characters a stop goes on with any, or with the one of which the first bytes are there.
      goes_on = lambda size: whole == text or not stop[size].isascii()
      ends += [len(whole) - size for size in range(1, len(stop)) if whole.endswith(stop[:size]) and goes_on(size)]
    self._print(text[: min(ends)])

  def finish(self, text: str) -> None:
    """Prints the rest of the row's final text, and ends the line."""
    self._print(text)
    print()

  def _print(self, text: str) -> None:
    print(text[self._printed :], end="", flush=True)
    self._printed = max(self._printed, len(text))


class Clock:
  """Time to the first token, and tokens a second after the second of each row.

  Before a row's first token stand prefill and compilation, before its second the compilation of the decode step.
  """

  def __init__(self):
    self.first: float | None = None
    self._begin, self._calls = time.perf_counter(), {}
    self._since, self._last, self._seconds, self._tokens = None, None, 0.0, 0

  def tick(self, row: int, tokens: int) -> None:
    """New tokens of a row have come."""
    now = time.perf_counter()
    self.first = now - self._begin if self.first is None else self.first
    calls = self._calls[row] = self._calls.get(row, 0) + 1
    if calls == 1:
      self.pause()  # the rows that come now compile programs of their own
    if calls == 2 and self._since is None:
      self._since = now
    elif calls > 2:
      self._last, self._tokens = now, self._tokens + tokens

  def pause(self) -> None:
    """A batch is done, or its pruned rows are."""
    if self._last is not None:
      self._seconds += self._last - self._since
    self._since = self._last = None

  @property
  def rate(self) -> float | None:
    """None after too few tokens."""
    return self._tokens / self._seconds if self._seconds else None
