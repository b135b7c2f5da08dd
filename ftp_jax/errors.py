"""The one exception for mistakes a user can make: one sentence, with the fix."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


class UserError(Exception):
  """Something the user can correct; command-line entries print it without a traceback."""


def check_target(path: pathlib.Path, flag: str = "json") -> None:
  """Raises UserError unless the flag can name this file, before there is anything to write."""
  if not path.absolute().parent.is_dir():
    raise UserError(f"--{flag}={path} lies in no existing directory; create {path.parent} first.")
  if path.is_dir():
    raise UserError(f"--{flag}={path} is a directory; name a file.")
  # A file is written beside the old one, which it then replaces.
  places = [path] * path.exists() + [path.resolve().parent] * (path.is_file() or not path.exists())
  if not all(os.access(place, os.W_OK) for place in places):
    raise UserError(f"--{flag}={path} cannot be written; name a file in a directory of yours.")


def brief(error: BaseException, most: int | None = 160) -> str:
  """An error's message in one line, for a sentence of ours."""
  return " ".join(str(error).split())[:most]


def of_disk(error: OSError) -> str:
  """The sentence for a full or read-only disk, or a path that is no directory."""
  return f"{error.filename or 'a file'}: {error.strerror or error}; free space or choose another place."


def out_of_memory(error: BaseException) -> bool:
  """Whether the host or a device had no memory left, which jax tells by the text of its error alone."""
  return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


@contextlib.contextmanager
def short_of_memory(advice: str) -> Iterator[None]:
  """Turns a lack of memory into a UserError with this advice."""
  try:
    yield
  except (RuntimeError, MemoryError) as error:
    if not out_of_memory(error):
      raise
    raise UserError(f"There is not enough memory; {advice}.") from None
