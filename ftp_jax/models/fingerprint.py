"""A short hash of a model's weights, to notice that an artifact meets another base model.

It depends on values only: not on how the checkpoint is cut into files, nor on a lossless change
of its dtype. `export/torch_runtime.py`, which stands alone, has it once more.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

_COLUMNS = 64


def fingerprint_tensors(tensors: Iterable[tuple[str, Sequence[int], Callable[[tuple[slice, ...]], np.ndarray]]]) -> str:
  """Hash (16 hex digits) over names, shapes and a sample (start of three rows) of every tensor.

  Args:
    tensors: (Hugging Face name, shape, function that reads one part as an array), any order;
      without the output head where it is tied to the embedding.
  """
  digest = hashlib.sha256()
  for name, shape, read in sorted(tensors, key=lambda entry: entry[0]):
    digest.update(f"{name} {tuple(shape)}\n".encode())
    for row in sorted({0, shape[0] // 2, shape[0] - 1}):
      rest = tuple(slice(0, min(_COLUMNS, size)) for size in shape[1:])
      part = read((slice(row, row + 1),) + rest)
      digest.update(np.ascontiguousarray(part, dtype="<f4").tobytes())
  return digest.hexdigest()[:16]
