"""Windows of running text for all-position perplexity."""

from collections.abc import Iterable

from ftp_jax.data.encoding import bos_ids
from ftp_jax.data.prompts import Prompts, pack
from ftp_jax.data.records import embedded_documents, read_documents
from ftp_jax.errors import UserError


def running_text(documents: Iterable[str], tokenizer) -> list[int]:
  """Documents joined with two line ends and tokenised as one text, behind BOS if the tokenizer starts texts so."""
  return bos_ids(tokenizer) + tokenizer("\n\n".join(documents), add_special_tokens=False, verbose=False).input_ids


def check_windows(num_windows: int, length: int) -> None:
  """Raises UserError for windows that score nothing."""
  if num_windows < 1 or length < 2:
    raise UserError(f"{num_windows} perplexity windows of {length} tokens score nothing; use 1 or more of 2 or more.")


def perplexity_windows(path: str, tokenizer, num_windows: int, length: int) -> Prompts:
  """The first `num_windows` consecutive windows of `length` tokens of a text, every one causal.

  The documents of `path` (plain text, WikiText or JSON lines, see records.read_documents) are joined
  with two line ends and tokenised as one text, with BOS in front of the first window only if the
  tokenizer starts texts so: the convention of published WikiText figures. With an empty path the
  text is the embedded prose that `load_splits` leaves out.

  Returns:
    Prompts (num_windows, length) with context = 1 and length = `length` in every row.

  Raises:
    UserError: the text cannot be read or is too short.
  """
  check_windows(num_windows, length)
  ids = running_text(read_documents(path) if path else embedded_documents(held=True), tokenizer)
  if len(ids) < num_windows * length:
    raise UserError(
        f"{num_windows} perplexity windows of {length} tokens need {num_windows * length} tokens, but "
        f"{path or 'the embedded text'} has {len(ids)}; ask for fewer or shorter windows or set a longer "
        "evaluation.perplexity_path."
    )
  return pack([(ids[at : at + length], 1) for at in range(0, num_windows * length, length)], length)
