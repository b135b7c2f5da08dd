"""The one exception for mistakes a user can make: one sentence, with the fix."""

import os
import pathlib


class UserError(Exception):
  """Something the user can correct; command-line entries print it without a traceback."""


def check_target(path: pathlib.Path, flag: str = "json") -> None:
  """Raises UserError unless the flag can name this file, before there is anything to write."""
  if not path.absolute().parent.is_dir():
    raise UserError(f"--{flag}={path} lies in no existing directory; create {path.parent} first.")
  if path.is_dir():
    raise UserError(f"--{flag}={path} is a directory; name a file.")
  if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
    raise UserError(f"--{flag}={path} cannot be written; name a file in a directory of yours.")
