"""Checkpoints of router training: Orbax, in the background, small (the router only), the newest two are kept.

Arrays go through the host as numpy, so that a checkpoint knows nothing of the devices or the mesh it was written
on, nor of the number of processes: the first one reads and writes, the others get what it read. The frozen model is
never in one.
"""

import contextlib
import io
import json
import logging
import os
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from ftp_jax import distributed
from ftp_jax.errors import UserError
from ftp_jax.files import out_of_space, writing


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


class Checkpoints:
  """The checkpoints of one training, a context manager.

  Args:
    directory: where they lie; created if missing. Only the first process touches it.
    identity: JSON values by name (settings, seed, schedule, data) that make this training what it is.
  """

  def __init__(self, directory: str, identity: dict):
    self.directory = os.path.abspath(directory)
    self._identity = json.loads(json.dumps(identity))
    self._manager = None
    name = distributed.unique_name()
    if distributed.is_first():
      # Orbax by itself would have all processes meet for every save.
      alone = ocp.options.MultiprocessingOptions(
          primary_host=0, active_processes={0}, barrier_sync_key_prefix=name
      )
      options = ocp.CheckpointManagerOptions(
          max_to_keep=2, enable_async_checkpointing=True, create=False, multiprocessing_options=alone
      )
      handlers = {
          "arrays": ocp.StandardCheckpointHandler(multiprocessing_options=alone),
          "facts": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
      }
      with writing(self.directory):
        os.makedirs(self.directory, exist_ok=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

  def __enter__(self) -> "Checkpoints":
    logging.getLogger("absl").addFilter(_is_news)
    return self

  def __exit__(self, kind, *_) -> None:
    try:
      if kind is None or issubclass(kind, distributed.Stopped):
        distributed.on_first(self._finish)  # no process leaves before the last save is whole: it would end the first
      elif self._manager is not None:
        with contextlib.suppress(Exception):  # the error under way says more
          self._finish()
    finally:
      logging.getLogger("absl").removeFilter(_is_news)

  def _finish(self) -> None:
    with writing(self.directory):
      self._manager.wait_until_finished()
      self._manager.close()

  def save(self, progress: Progress) -> None:
    """Begins to write a checkpoint in the background; it appears when it is complete, and is there on leaving.

    Raises:
      UserError: the disk is full, also if that ended the save before this one.
    """
    if self._manager is None:
      return
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
    """The newest readable checkpoint, on the host and the same in all processes, or None if there is none at all.

    A damaged one is reported on stderr and removed, and the one before it is taken.

    Args:
      state: a TrainState of the right structure, shapes and types.

    Raises:
      UserError: no checkpoint can be read, or they belong to another training (names what differs).
    """
    if distributed.num_processes() == 1:
      return self._restore(state)
    data = distributed.from_first(lambda: _pack(self._restore(state)))
    return _unpack(data, {"state": state, "best_router": state.router})

  def _restore(self, state: Any) -> Progress | None:
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


def _is_news(record: logging.LogRecord) -> bool:
  """Keeps out of the log the traces that each of Orbax's threads leaves of a full disk, which `save` reports."""
  return not (record.exc_info and record.exc_info[1] and out_of_space(record.exc_info[1]))


def _pack(progress: Progress | None) -> bytes:
  file = io.BytesIO()
  if progress is not None:
    leaves = jax.tree.leaves({"state": progress.state, "best_router": progress.best_router})
    facts = json.dumps([progress.step, progress.best_step, progress.best_validation])
    np.savez(file, *leaves, facts=np.array(facts))
  return file.getvalue()


def _unpack(data: bytes, target: Any) -> Progress | None:
  """What was packed, in the structure of `target`."""
  if not data:
    return None
  with np.load(io.BytesIO(data), allow_pickle=False) as file:
    leaves = [file[f"arr_{i}"] for i in range(len(file.files) - 1)]
    step, best_step, best_validation = json.loads(str(file["facts"]))
  arrays = jax.tree.unflatten(jax.tree.structure(target), leaves)
  return Progress(step, arrays["state"], arrays["best_router"], best_step, best_validation)
