"""Files that are whole or not there: a killed process, a full disk or lost power leaves the old one."""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

from ftp_jax.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def out_of_space(error: BaseException) -> bool:
  """Whether a full disk, a quota or a limit of file sizes is what an error is about."""
  # TensorStore, below Orbax, raises ValueError and keeps the reason in its text.
  return getattr(error, "errno", None) in _FULL or any(os.strerror(code) in str(error) for code in _FULL)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
  """Turns a full disk into a UserError that names `path`."""
  try:
    yield
  except Exception as error:
    if not out_of_space(error):
      raise
    raise UserError(f"There is no space left to write to {path}; free some and run again.") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """A file that becomes `path` when the body ends; until then, and if it fails or is killed, the old one stays.

  Where `path` is a link the file that it names is replaced, and what is no file, such as a pipe, is written to as it
  stands. Raises UserError if the disk is full; what was written so far is removed then.
  """
  if os.path.exists(path) and not os.path.isfile(path):
    with writing(path), open(path, "wb") as file:
      yield file
    return
  path = pathlib.Path(os.path.realpath(path))
  temporary = path.with_name(path.name + ".tmp")
  try:
    with writing(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
