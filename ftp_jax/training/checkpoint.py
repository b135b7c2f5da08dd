"""Checkpoints of router training: Orbax, small (the router only), the newest two are kept.

Arrays go through the host as numpy, so that a checkpoint knows nothing of the devices or the mesh
it was written on. The frozen model is never in one.
"""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from ftp_jax.errors import UserError


class Progress(NamedTuple):
  """Where training stands.

  Attributes:
    step: optimizer steps done.
    state: the TrainState after them.
    best_router: router parameters of the best validation so far, from step `best_step`.
    best_validation: its held-out KL in nats.
  """

  step: int
  state: Any
  best_router: Any
  best_step: int
  best_validation: float


def to_host(tree: Any) -> Any:
  """A numpy copy: on CPU the arrays themselves may alias buffers that the next step takes over."""
  return jax.tree.map(lambda a: np.array(a, copy=True), tree)


@contextlib.contextmanager
def writing(directory: str) -> Iterator[None]:
  """Turns a full disk into a UserError that names `directory`."""
  try:
    yield
  except Exception as error:
    if not _out_of_space(error):
      raise
    raise UserError(
        f"There is no space left to write to {directory}; free some and run again, training goes on from the last "
        "checkpoint."
    ) from error


def _out_of_space(error: BaseException) -> bool:
  # TensorStore, below Orbax, raises ValueError and keeps the reason in its text.
  named = ("No space left on device", "Disk quota exceeded")
  return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(name in str(error) for name in named)


class Checkpoints:
  """The checkpoints of one training, a context manager.

  Args:
    directory: where they lie; created if missing.
    identity: JSON values by name (settings, seed, schedule, data) that make this training what it is.
  """

  def __init__(self, directory: str, identity: dict):
    self.directory = os.path.abspath(directory)
    self._identity = json.loads(json.dumps(identity))
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with writing(self.directory):
      self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=("arrays", "facts"))

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_) -> None:
    self._manager.close()

  def save(self, progress: Progress) -> None:
    """Writes a checkpoint, atomically. Raises UserError if the disk is full."""
    arrays = to_host({"state": progress.state, "best_router": progress.best_router})
    facts = {
        "step": progress.step,
        "best_step": progress.best_step,
        "best_validation": progress.best_validation,
        "identity": self._identity,
    }
    with writing(self.directory):
      self._manager.save(
          progress.step, args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), facts=ocp.args.JsonSave(facts))
      )

  def restore(self, state: Any) -> Progress | None:
    """The newest readable checkpoint, on the host, or None if there is none at all.

    A damaged one is reported on stderr and removed, and the one before it is taken.

    Args:
      state: a TrainState of the right structure, shapes and types.

    Raises:
      UserError: no checkpoint can be read, or they belong to another training (names what differs).
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    target = to_host({"state": state, "best_router": state.router})
    for step in steps:
      try:
        facts = self._manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore())).facts
        saved = facts["identity"]
        differing = [name for name in self._identity | saved if saved.get(name) != self._identity.get(name)]
        if not differing:
          arrays = self._manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(target))).arrays
          found = Progress(
              facts["step"], arrays["state"], arrays["best_router"], facts["best_step"], facts["best_validation"]
          )
      except Exception as error:  # a damaged file fails to read in any way
        path = os.path.join(self.directory, str(step))
        print(f"checkpoint {path} is damaged ({type(error).__name__}); trying the one before it.", file=sys.stderr)
        continue
      if differing:
        name = differing[0]
        was, now = saved.get(name), self._identity.get(name)
        raise UserError(
            f"{name} was {was} when the training in {self.directory} began and is {now} now; restore it, or delete "
            "that directory to train anew."
        )
      for damaged in [s for s in steps if s > step]:  # or their steps could not be saved again
        self._manager.delete(damaged)
      return found
    if steps:
      raise UserError(f"No checkpoint in {self.directory} can be read; delete that directory to train anew.")
    return None
