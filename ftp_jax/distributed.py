"""Several processes, usually one a host, that run one command together (docs/pods.md).

The same command is started on every host. `together` finds the other processes, lets only the first one print, and
sees to it that whatever ends one process ends all. What the processes have to agree on besides arrays goes through
jax's coordination service (a small key-value store in process 0): it needs no device and cannot collide with a
computation. All processes make the calls below in the same order. Alone, every one of them is a plain function call.

SIGTERM, the notice of pre-emption, makes a search or a training (`stoppable`) save and stop at the same step in all
processes; anything else has nothing to save and stops at once.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from ftp_jax.errors import UserError, brief
from ftp_jax.peers import LOST, Watch, deadline

__all__ = ["LOST", "STOPPED", "Launch", "Stopped", "barrier", "exists", "from_first", "is_first", "num_processes",
           "of_first", "on_first", "process_id", "stoppable", "together", "unique_name"]

STOPPED = 143  # exit status after SIGTERM, as the shell would say it: saved, but not finished
_PIECE = 1 << 20  # bytes of one value in the store; a message of gRPC holds four times as much
_FOUND = ("slurm", "ompi", "gketpu", "gcetpu")  # jax's names of the clusters that it can tell from the environment


@dataclasses.dataclass(frozen=True)
class Launch:
  """How the processes of a run find each other.

  coordinator (HOST:PORT of process 0), num_processes and process_id: all three, or none. Without them, mode `auto`
  asks SLURM, Open MPI or the TPU pod, if there is one with several processes; `on` insists on what jax can find;
  `off` runs alone. peer_timeout: seconds after which a silent process counts as lost. start_timeout: seconds to wait
  for all processes at the start.
  """

  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  mode: str = "auto"
  peer_timeout: int = 30
  start_timeout: int = 300

  def __post_init__(self):
    explicit = (self.coordinator, self.num_processes, self.process_id)
    if self.mode not in ("auto", "on", "off"):
      raise UserError(f"--distributed={self.mode} is none of auto, on and off.")
    if any(value is None for value in explicit) and any(value is not None for value in explicit):
      raise UserError("give all of --coordinator, --num-processes and --process-id, or none of them.")
    if self.coordinator is not None and self.mode == "off":
      raise UserError("--distributed=off contradicts --coordinator; drop one of them.")
    if self.coordinator is not None and not re.fullmatch(r".+:\d{1,5}", self.coordinator):
      raise UserError(f"--coordinator={self.coordinator} must be HOST:PORT of process 0, with a port free there.")
    if self.coordinator is not None and not 0 <= self.process_id < self.num_processes:
      raise UserError(
          f"--process-id={self.process_id} must lie between 0 and --num-processes - 1 = {self.num_processes - 1}."
      )
    if self.peer_timeout < 2 or self.start_timeout < 1:
      raise UserError("--peer-timeout must be at least 2 seconds and --start-timeout at least 1.")


class Stopped(BaseException):
  """SIGTERM ended the work; everything due is saved. Like KeyboardInterrupt no `except Exception` holds it up."""


class _Process:
  """What belongs to the process as a whole: signals and the watch over the others are not of any one object."""

  def __init__(self):
    self.watch: Watch | None = None
    self.stop_asked = False
    self.stoppable = False
    self.calls = itertools.count()
    self.used = ""  # name of the last call that the store still holds


_process = _Process()


# --- who is there ------------------------------------------------------------------------------


def _jax_state() -> Any:
  from jax._src import distributed  # the only place that knows the client; Orbax takes it from there as well

  return distributed.global_state


def num_processes() -> int:
  """Processes that run this command together; 1: alone."""
  state = _jax_state()
  return state.num_processes if state.client is not None else 1


def process_id() -> int:
  """Which process this is. Unlike `jax.process_index()` it waits for no other one."""
  return _jax_state().process_id or 0


def is_first() -> bool:
  """Whether this is process 0, the one that prints and writes."""
  return process_id() == 0


@contextlib.contextmanager
def together(launch: Launch, outcome: Callable[[BaseException], tuple[int, str] | None]) -> Iterator[None]:
  """Runs the body in all processes of a launch; must be entered before jax touches a device.

  Alone, errors pass through. With others, an error ends the process here, with its message, and all others with it.

  Args:
    launch: where the others are.
    outcome: exit status and sentence of an error; None: a defect, which gets a traceback and status 1.

  Raises:
    UserError: the others cannot be reached, or the environment is not understood.
  """
  previous = signal.signal(signal.SIGTERM, _on_sigterm)
  try:
    _initialise(launch)
    if _process.watch is None:
      yield
      return
    try:
      with contextlib.ExitStack() as stack:
        if not is_first():
          os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, which commands do later
          stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield
        barrier()
    except BaseException as error:
      _leave(error, outcome)
    import jax

    _process.watch.close()
    _process.watch = None
    jax.distributed.shutdown()
  finally:
    signal.signal(signal.SIGTERM, previous)
    _process.stop_asked = False


def _leave(error: BaseException, outcome: Callable[[BaseException], tuple[int, str] | None]) -> None:
  """Ends this process because of an error, and so all others. Does not return."""
  ending = outcome(error)
  if ending is None:
    import jax

    if isinstance(error, jax.errors.JaxRuntimeError):  # most likely what a lost process leads to
      _process.watch.wait_for_verdict()
    traceback.print_exception(error)
    ending = 1, f"{type(error).__name__}, see its traceback."
  else:
    print(f"\nftp-jax: {ending[1]}", file=sys.stderr)
  sys.stderr.flush()
  _process.watch.give_up(*ending)


def _initialise(launch: Launch) -> None:
  if launch.mode == "off" or launch.num_processes == 1:
    return
  import jax

  explicit = {}
  if launch.coordinator is not None:
    explicit = {
        "coordinator_address": launch.coordinator, "num_processes": launch.num_processes,
        "process_id": launch.process_id, "cluster_detection_method": "deactivate",
    }
  elif launch.mode == "auto" and _found_processes() < 2:
    return
  jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
  apart = (
      f"the processes did not come together within {launch.start_timeout} s{{}}; start the same command on every host, "
      "each with its own --process-id, and see that they reach the port of --coordinator."
  )
  try:
    with deadline(launch.start_timeout, apart.format("")):  # jax would abort
      jax.distributed.initialize(
          **explicit, initialization_timeout=launch.start_timeout + 10, heartbeat_timeout_seconds=launch.peer_timeout,
          shutdown_timeout_seconds=launch.peer_timeout,
      )
  except (RuntimeError, ValueError, OSError) as error:
    reason = brief(error, 200)
    raise UserError(apart.format(f" ({reason})")) from error
  state = _jax_state()
  _process.watch = Watch(
      state.client, state.process_id, state.num_processes, state.coordinator_address, launch.peer_timeout
  )


def _found_processes() -> int:
  """How many processes the environment (SLURM, Open MPI, TPU pod) says there are; 1: it says nothing."""
  from jax._src.clusters import ClusterEnv

  for cluster in ClusterEnv._cluster_types:
    if cluster.name in _FOUND and cluster.is_env_present():
      # Inside an allocation but outside `srun`, SLURM_NTASKS counts processes that nobody starts.
      step = os.environ.get("SLURM_STEP_NUM_TASKS") if cluster.name == "slurm" else None
      try:
        return int(step) if step else cluster.get_process_count()
      except Exception as error:  # of the network: a TPU host asks a server of its cloud
        reason = brief(error)
        raise UserError(
            f"the {cluster.name} environment does not say how many processes there are ({reason}); give "
            "--distributed=off if there is one, or --coordinator, --num-processes and --process-id."
        ) from error
  return 1


# --- agreement -----------------------------------------------------------------------------------


def from_first(make: Callable[[], bytes]) -> bytes:
  """What `make()` returns in process 0, the only one that calls it. If it raises UserError, all do."""
  if num_processes() == 1:
    return make()
  client, name = _jax_state().client, f"ftp_jax/call{next(_process.calls)}"
  if is_first():
    try:
      data = make()
    except UserError as error:
      client.key_value_set(f"{name}/head", f"error {error}")
      raise
    pieces = range(0, len(data), _PIECE)
    for at in pieces:
      client.key_value_set_bytes(f"{name}/{at}", data[at : at + _PIECE])
    client.key_value_set(f"{name}/head", f"bytes {len(data)}")
  else:
    kind, _, text = _wait_for(client, f"{name}/head").partition(" ")
    if kind == "error":
      raise UserError(text)
    data = b"".join(client.blocking_key_value_get_bytes(f"{name}/{at}", 60_000) for at in range(0, int(text), _PIECE))
  _meet(client, f"{name}/read")
  if is_first() and _process.used:
    client.key_value_delete(_process.used)  # not yet this one: others may still be reading that all have met
  _process.used = name
  return data


def on_first(function: Callable[[], Any]) -> None:
  """Calls `function()` in process 0; the others go on when it is done. If it raises UserError, all do."""

  def make() -> bytes:
    function()
    return b""

  from_first(make)


def exists(path: pathlib.Path) -> bool:
  """Whether the first process sees a file: what all of them act upon."""
  return from_first(lambda: b"yes" if path.exists() else b"") == b"yes"


def of_first(array: Any) -> Any:
  """The numpy array of process 0; those of the others have its shape and type, and may differ by rounding."""
  import numpy as np

  array = np.asarray(array)
  return np.frombuffer(from_first(array.tobytes), array.dtype).reshape(array.shape).copy()


def barrier() -> None:
  """Returns when all processes have called it."""
  from_first(bytes)


def unique_name() -> str:
  """A name that no other call gets, the same in all processes: for those that meet by other means."""
  return f"ftp_jax_{next(_process.calls)}"


def _meet(client: Any, name: str) -> None:
  if client.key_value_increment(f"{name}/count", 1) == num_processes():
    client.key_value_set(f"{name}/all", "here")
  _wait_for(client, f"{name}/all")


def _wait_for(client: Any, key: str) -> str:
  while True:  # short waits: a signal is handled between two of them
    try:
      return client.blocking_key_value_get(key, 1000)
    except RuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise


# --- SIGTERM -------------------------------------------------------------------------------------


def _on_sigterm(*_) -> None:
  _process.stop_asked = True
  if not _process.stoppable:
    raise Stopped


class Votes:
  """Whether to stop, decided by all processes alike, without holding up the devices."""

  def __init__(self):
    self._thread = concurrent.futures.ThreadPoolExecutor(1) if num_processes() > 1 else None
    self._round = itertools.count()
    self._number = next(_process.calls)

  def cast(self) -> Callable[[], bool]:
    """Casts a vote; the function that is returned tells the result. Same number of calls in all processes."""
    if self._thread is None:
      return lambda: _process.stop_asked
    return self._thread.submit(self._count, next(self._round), _process.stop_asked).result

  def _count(self, number: int, stop: bool) -> bool:
    client, name = _jax_state().client, f"ftp_jax/votes{self._number}"
    if stop:
      client.key_value_set(f"{name}/{number}/stop", "yes", allow_overwrite=True)
    _meet(client, f"{name}/{number}")
    try:
      client.key_value_try_get(f"{name}/{number}/stop")
      return True
    except RuntimeError as error:
      if "NOT_FOUND" not in str(error):
        raise
      return False
    finally:
      if is_first() and number:  # all have read the round before: they voted again
        client.key_value_delete(f"{name}/{number - 1}")


@contextlib.contextmanager
def stoppable() -> Iterator[Votes]:
  """Work that saves and stops by itself when a vote says so; SIGTERM does not interrupt it."""
  _process.stoppable = True
  try:
    votes = Votes()
    yield votes
    if votes.cast()():  # asked too late for the work, which is done; what comes next has not begun
      raise Stopped
  finally:
    _process.stoppable = False
