"""Stages of a run directory: finished ones are not repeated, changed settings are named.

A stage is a folder. When work begins it gets `settings.json` with every setting that the stage depends on,
its own and those of the stages before it; when it is through, an empty `done`. So neither a finished nor
an interrupted stage goes on with other settings. A setting that its version did not have stands at its default.

Of several processes only the first writes, and a stage begins and ends in all of them together.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import filelock
import numpy as np

from ftp_jax import distributed
from ftp_jax.errors import UserError
from ftp_jax.files import replacing, writing

SETTINGS, DONE, LOCK = "settings.json", "done", ".lock"


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes JSON atomically, in the first process: a killed process leaves the old file or the new one."""
  if distributed.is_first():
    with replacing(path) as file:
      file.write((json.dumps(value, indent=1) + "\n").encode())


def read_json(path: str | os.PathLike) -> Any:
  """Reads JSON; a missing or damaged file is a UserError that names it."""
  try:
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error}); delete its folder, so that the stage runs again.") from None


def save_arrays(path: str | os.PathLike, **arrays: np.ndarray) -> None:
  """Writes named arrays to an .npz file, in the first process, atomically and without pickle."""
  if distributed.is_first():
    with replacing(path) as file:
      np.savez(file, **arrays)


def load_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads the arrays of `save_arrays`; a missing or damaged file is a UserError that names it."""
  try:
    with np.load(path, allow_pickle=False) as file:
      return {name: file[name] for name in file.files}
  except Exception as error:  # a damaged archive raises zipfile's, zlib's, numpy's and the system's errors
    raise UserError(f"{path} cannot be read ({error}); delete its folder, so that the stage runs again.") from None


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
  """Nested dicts as {"a.b": value}, with tuples as lists: comparable to what JSON gives back."""
  if hasattr(value, "items"):
    return {k: v for name, part in value.items() for k, v in flatten(part, f"{prefix}{name}.").items()}
  return {prefix[:-1]: list(value) if isinstance(value, tuple) else value}


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> str | None:
  """Says what differs between two flat dicts, as part of a sentence; None: nothing does."""
  changed = [name for name in now | before if now.get(name) != before.get(name)]
  if not changed:
    return None
  name = changed[0]
  more = f" (and {len(changed) - 1} more changed: {', '.join(changed[1:4])})" if len(changed) > 1 else ""
  return f"{name}={before.get(name)!r}, now it is {now.get(name)!r}{more}"


@contextlib.contextmanager
def alone_in(directory: pathlib.Path) -> Iterator[None]:
  """Raises UserError while another run has the directory; one that was killed has it no more."""
  lock = filelock.FileLock(directory / LOCK)

  def take() -> None:
    try:
      directory.mkdir(parents=True, exist_ok=True)
      lock.acquire(timeout=0)
    except filelock.Timeout:
      raise UserError(f"Another run is writing to {directory}; wait for its end, or give another --workdir.") from None
    except (OSError, NotImplementedError):
      pass  # a file system without locks, or one where the first write will say what is wrong

  distributed.on_first(take)
  try:
    yield
  finally:
    lock.release()


def check_stage(
    directory: pathlib.Path, settings: dict[str, Any], defaults: dict[str, Any] | None = None,
    advice: str = "use another --workdir, or delete that folder and the later stages to make them again",
) -> None:
  """Raises UserError, which ends with `advice`, if the stage was begun with other settings.

  `defaults`: of settings that may be missing where an earlier version began it, as these do what was done before them.
  """
  if not (directory / SETTINGS).exists():
    return
  defaults = {name: value for name, value in (defaults or {}).items() if name in settings}
  changes = describe_changes(defaults | read_json(directory / SETTINGS), settings)
  if changes:
    raise UserError(f"{directory} was made with {changes}; {advice}.")


def check_order(directories: Iterable[pathlib.Path]) -> None:
  """Raises UserError if a stage is missing that later ones were made from. `directories`: of stages in their order."""
  missing = None
  for directory in directories:
    if not (directory / SETTINGS).exists():
      missing = missing or directory
    elif missing:
      raise UserError(
          f"{directory} was made from {missing}, which is missing; delete the folders of all later stages as well, or "
          "give another --workdir."
      )


def run_stage(
    directory: pathlib.Path,
    settings: Callable[[], dict[str, Any]],
    work: Callable[[pathlib.Path], None],
    defaults: dict[str, Any] | None = None,
) -> None:
  """Runs `work(directory)` unless the stage is done. Raises as `check_stage`.

  With several processes the first decides whether there is anything to do, and none goes on to what reads the
  stage before all have finished it. The others look at no file before: what is not there yet a shared file system
  may take for missing long after it was written. So the first alone asks for the `settings`.

  A stage that an error ends before it has made anything is not begun: the mended command has other settings.
  """

  def begin() -> bytes:
    wanted = settings()
    check_stage(directory, wanted, defaults)
    if (directory / DONE).exists():
      return b"done"
    write_json(directory / SETTINGS, wanted)
    return b""

  def end() -> None:
    with writing(directory):
      (directory / DONE).touch()

  if distributed.from_first(begin):
    return
  try:
    work(directory)
  except Exception:  # nothing was made: other settings may begin it
    if distributed.is_first() and [path.name for path in directory.iterdir()] == [SETTINGS]:
      (directory / SETTINGS).unlink()
    raise
  distributed.barrier()
  distributed.on_first(end)
