"""The state of a search: one file, replaced atomically after every generation. NumPy arrays, never pickle.

The file of the generation before is kept beside it and used if the newest turns out to be damaged.
"""

import dataclasses
import io
import json
import os
import sys
import zipfile
import zlib
from typing import Any, BinaryIO

import numpy as np

from ftp_jax.errors import UserError
from ftp_jax.files import replacing

PREVIOUS = ".previous"  # added to the name of the file


@dataclasses.dataclass(frozen=True)
class SearchState:
  """Everything a search needs to continue.

  generation is the last finished one; key_data is the PRNG key of the next. `history` holds, for
  generations 0..generation, best fitness, mean fitness and best validation.
  """
  generation: int
  key_data: np.ndarray
  units_PxL: np.ndarray
  fitness_P: np.ndarray
  validated_units_VxL: np.ndarray
  validated_fitness_V: np.ndarray
  validation_V: np.ndarray
  history_Gx3: np.ndarray


def save(path: str, state: SearchState, identity: dict) -> None:
  """Writes the state and what identifies the search (see `load`), atomically; keeps the one before.

  Raises:
    UserError: the disk is full; what was saved before is still there.
  """
  if os.path.exists(path):
    with replacing(path + PREVIOUS) as file, open(path, "rb") as newest:
      file.write(newest.read())
  with replacing(path) as file:
    _write(file, state, identity)


def load(path: str, identity: dict) -> SearchState | None:
  """Reads the state, or None if there is none. A damaged newest file is reported and removed.

  Args:
    path: the file.
    identity: scalars by name (settings, seed, starting schedules) that must be those of the saved search.

  Raises:
    UserError: no file can be read, or they belong to another search (the message names what differs).
  """
  there = [name for name in (path, path + PREVIOUS) if os.path.exists(name)]
  for name in there:
    found = _read(name)
    if found is None:
      continue
    state, saved_identity = found
    for key, value in identity.items():
      if saved_identity.get(key) != value:
        raise UserError(f"{key} was {saved_identity.get(key)} when the search in {path} began and is {value} now; "
                        f"restore it, or delete that file and {path + PREVIOUS}.")
    if name != path and path in there:
      print(f"search state {path} is damaged; going on from the one before it, of generation {state.generation}.",
            file=sys.stderr)
      os.remove(path)  # or it would become the one before when the next is saved
    return state
  if there:
    raise UserError(f"The search state {path} is damaged; delete it and {path + PREVIOUS} to start the search anew.")
  return None


def pack(state: SearchState | None) -> bytes:
  """The state as bytes, for other processes."""
  file = io.BytesIO()
  if state is not None:
    _write(file, state, {})
  return file.getvalue()


def unpack(data: bytes) -> SearchState | None:
  """The state that was packed."""
  return _read(io.BytesIO(data))[0] if data else None


def _write(file: BinaryIO, state: SearchState, identity: dict) -> None:
  np.savez(file, identity=np.array(json.dumps(identity)), **dataclasses.asdict(state))


def _read(file: Any) -> tuple[SearchState, dict] | None:
  """State and identity of a file; None: it is damaged."""
  try:
    with np.load(file, allow_pickle=False) as arrays:
      identity = json.loads(str(arrays["identity"]))
      state = SearchState(**{field.name: arrays[field.name] for field in dataclasses.fields(SearchState)})
    state = dataclasses.replace(state, generation=int(state.generation))
    return (state, identity) if isinstance(identity, dict) and _consistent(state) else None
  except (OSError, EOFError, ValueError, TypeError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error):
    return None


def _consistent(state: SearchState) -> bool:
  num_validated = len(state.validation_V)
  return (state.units_PxL.ndim == 2 and state.fitness_P.shape == state.units_PxL.shape[:1]
          and state.validated_units_VxL.shape == (num_validated, state.units_PxL.shape[1])
          and state.validated_fitness_V.shape == (num_validated,)
          and state.history_Gx3.shape == (state.generation + 1, 3))
