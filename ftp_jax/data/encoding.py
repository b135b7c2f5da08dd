"""Texts to token rows: chat turns, windows, and where a context ends.

A context and its continuation are tokenised apart and their ids concatenated, so that no token
straddles the boundary.
"""

from typing import NamedTuple

from ftp_jax.data.records import Pair
from ftp_jax.errors import UserError

_WITHOUT = "leave it out (in a run: data.chat=False)"


class ChatTurn(NamedTuple):
  """How a chat model's template writes one exchange, without a system turn."""

  before: str  # text in front of the user's message; starts with BOS if the template does
  after: str  # text between the message and the answer (the generation prompt)
  end: tuple[int, ...]  # the id that ends an answer; empty if the template has no such token


def chat_turn(tokenizer) -> ChatTurn:
  """Reads the exchange off the tokenizer's chat template.

  Templates insert a default system turn where a conversation starts; the same in every prompt, it
  would be the cheapest text to skip. So the exchange is read where it comes second: the rendering
  of [user, assistant, user, generation prompt] after that of [user, assistant]. Both are compared
  from the answer on only, because some templates write the last answer's beginning differently.

  Raises:
    UserError: the tokenizer has no chat template, or one that does not write turn after turn.
  """
  if not tokenizer.chat_template:
    raise UserError(
        "The tokenizer has no chat template; set data.chat=False, leave chat=true out of records, or use a chat model."
    )
  question, answer, message = "first question", "first answer", "second question"
  exchange = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

  def after_answer(turns, generation):
    # enable_thinking is for templates of reasoning models; others ignore it.
    text = tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=generation, enable_thinking=False
    )
    return text, text.partition(answer)[2]

  try:
    _, tail = after_answer(exchange, False)
    text, rest = after_answer([*exchange, {"role": "user", "content": message}], True)
  except Exception as error:  # a template is a program of the checkpoint's, and may fail in any way
    raise UserError(f"The tokenizer's chat template fails ({error}); {_WITHOUT}.") from None
  if not rest.startswith(tail) or message not in rest[len(tail) :]:
    raise UserError(f"The tokenizer's chat template does not write turn after turn; {_WITHOUT}.")
  before, _, after = rest[len(tail) :].partition(message)
  bos = tokenizer.bos_token
  if bos and text.startswith(bos) and not before.startswith(bos):
    before = bos + before
  end = tokenizer(tail.strip(), add_special_tokens=False).input_ids[:1]
  return ChatTurn(before, after, tuple(end) if set(end) <= set(tokenizer.added_tokens_decoder) else ())


def encode_pairs(pairs: list[Pair], tokenizer, chat: bool) -> list[tuple[list[int], list[int]]]:
  """(context ids, continuation ids) of each pair, uncut.

  With `chat`, or where a pair asks for it, the prompt is the user's message (stripped) and the answer ends with the
  end-of-turn token. Otherwise the context starts with BOS if the tokenizer starts texts so.
  """
  turns = [chat if pair.chat is None else pair.chat for pair in pairs]
  turn, bos = chat_turn(tokenizer) if any(turns) else None, bos_ids(tokenizer)
  contexts = [
      turn.before + pair.prompt.strip() + turn.after if wrapped else pair.prompt + "\n" * pair.is_instruction
      for pair, wrapped in zip(pairs, turns)
  ]
  context_ids = _encode(contexts, tokenizer)
  answer_ids = _encode([pair.answer for pair in pairs], tokenizer)
  return [
      (context, answer + list(turn.end)) if wrapped else (bos + context, answer)
      for context, answer, wrapped in zip(context_ids, answer_ids, turns)
  ]


def encode_windows(documents: list[str], tokenizer, width: int) -> list[list[list[int]]]:
  """Per document its consecutive windows of `width` ids; the rest of a document is dropped.

  Each window starts with BOS, within `width`, if the tokenizer starts texts so.
  """
  start = bos_ids(tokenizer)
  step = width - len(start)
  return [
      [start + ids[at : at + step] for at in range(0, len(ids) - step + 1, step)]
      for ids in _encode(documents, tokenizer)
  ]


def bos_ids(tokenizer) -> list[int]:
  """[BOS] if the tokenizer puts it in front of a text by itself, else []."""
  ids = tokenizer("").input_ids[:1]
  return list(ids) if ids == [tokenizer.bos_token_id] else []


def _encode(texts: list[str], tokenizer) -> list[list[int]]:
  return tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
