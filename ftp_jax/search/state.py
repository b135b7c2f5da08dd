"""The state of a search: one file, replaced atomically after every generation. NumPy arrays, never pickle."""

import dataclasses
import json
import os
import zipfile
import zlib

import numpy as np

from ftp_jax.errors import UserError


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
  """Writes the state and what identifies the search (see `load`), atomically."""
  temporary = f"{path}.tmp"
  with open(temporary, "wb") as f:
    np.savez(f, identity=np.array(json.dumps(identity)), **dataclasses.asdict(state))
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)


def load(path: str, identity: dict) -> SearchState | None:
  """Reads the state, or None if there is none.

  Args:
    path: the file.
    identity: scalars by name (settings, seed, starting schedules) that must be those of the saved search.

  Raises:
    UserError: the file is damaged, or belongs to another search (the message names what differs).
  """
  if not os.path.exists(path):
    return None
  try:
    with np.load(path, allow_pickle=False) as arrays:
      saved_identity = json.loads(str(arrays["identity"]))
      state = SearchState(**{field.name: arrays[field.name] for field in dataclasses.fields(SearchState)})
    state = dataclasses.replace(state, generation=int(state.generation))
    damaged = not isinstance(saved_identity, dict) or not _consistent(state)
  except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError):
    damaged = True
  if damaged:
    raise UserError(f"The search state {path} is damaged; delete it to start the search anew.")
  for name, value in identity.items():
    if saved_identity.get(name) != value:
      raise UserError(f"{name} was {saved_identity.get(name)} when the search in {path} began and is {value} now; "
                      "restore it, or delete that file to start anew.")
  return state


def _consistent(state: SearchState) -> bool:
  num_validated = len(state.validation_V)
  return (state.units_PxL.ndim == 2 and state.fitness_P.shape == state.units_PxL.shape[:1]
          and state.validated_units_VxL.shape == (num_validated, state.units_PxL.shape[1])
          and state.validated_fitness_V.shape == (num_validated,)
          and state.history_Gx3.shape == (state.generation + 1, 3))
