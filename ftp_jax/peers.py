"""Watching the other processes of a run: one that is lost, or that ended with an error, ends this one too.

jax notices a lost process by its missing heartbeats and then aborts all others from a C++ thread, with a stack
trace. A callback in Python is not possible (its status has no Python type in jaxlib 0.10.2), so this module looks by
itself, in two threads that only wait:

- `get_live_nodes` returns when jax's own heartbeats have decided who is alive;
- process 0, which all others talk to, is probed by connecting to its port: when it dies, every call to it hangs.

Whoever finds something prints one sentence and ends the process, whatever its main thread is blocked in.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from ftp_jax.errors import brief

LOST = 75  # exit status: a process was lost; the same command on all hosts goes on (EX_TEMPFAIL of sysexits.h)
_PERIOD = 1.0  # seconds between two looks
_LINGER = 3 * _PERIOD  # how long a process that gives up stays, so that all others read why
_NOTICES = "ftp_jax/left/"


class Watch:
  """The two threads of a process.

  Args:
    client: jax's client of the coordination service.
    process_id, num_processes: who this is, of how many.
    coordinator: HOST:PORT of process 0.
    timeout: seconds without an answer after which process 0 counts as lost.
  """

  def __init__(self, client: Any, process_id: int, num_processes: int, coordinator: str, timeout: float):
    self._client, self._process_id, self._num_processes = client, process_id, num_processes
    host, _, port = coordinator.rpartition(":")
    self._address = (host.strip("[]"), int(port))
    self._timeout = timeout
    self._over = threading.Event()
    self._leaving = False
    self._last_words = threading.Lock()
    _delay_abort()
    targets = [self._look_at_all] + [self._probe_first] * (process_id != 0)
    for target in targets:
      threading.Thread(target=target, daemon=True, name=f"ftp_jax {target.__name__}").start()

  def close(self) -> None:
    """The run is over: processes may go in any order."""
    self._over.set()

  def wait_for_verdict(self) -> None:
    """Returns if no process turns out to be lost within the time that takes; otherwise the process ends here.

    For errors of jax itself: a collective operation with a lost process fails long before the heartbeats tell.
    """
    self._over.wait(self._timeout + 3 * _PERIOD)

  def give_up(self, code: int, reason: str) -> None:
    """Tells the others why this process ends, and ends it with `code`."""
    self._leaving = True  # whoever goes first because of it is not lost
    try:
      self._client.key_value_set(f"{_NOTICES}{self._process_id}", json.dumps([code, reason]), allow_overwrite=True)
      time.sleep(_LINGER)
    except Exception:  # nobody left to tell
      pass
    self._end(code, None)

  def _look_at_all(self) -> None:
    others = set(range(self._num_processes)) - {self._process_id}
    try:
      while not self._over.wait(_PERIOD):
        for key, notice in self._client.key_value_dir_get(_NOTICES):
          if (left := int(key.rpartition("/")[2])) in others:
            code, reason = json.loads(notice)
            self._end(code, f"process {left} of {self._num_processes} ended, and so does this one: {reason}")
        lost = others - set(self._client.get_live_nodes(list(range(self._num_processes))))
        if lost:
          self._end_lost(lost)
    except Exception as error:  # calls fail when the service goes: at the end of the run, or with process 0
      if not self._over.is_set() and self._process_id == 0:
        self._end(LOST, f"jax's coordination service failed ({brief(error)}); start the same command again on all "
                  "hosts, it goes on from the last saved state.")

  def _probe_first(self) -> None:
    refused, answered = 0, time.monotonic()
    while not self._over.wait(_PERIOD):
      try:
        socket.create_connection(self._address, timeout=2 * _PERIOD).close()
        refused, answered = 0, time.monotonic()
      except ConnectionRefusedError:
        refused += 1
      except OSError:
        pass
      if refused > 1 or time.monotonic() - answered > self._timeout:
        self._end_lost({0})

  def _end_lost(self, lost: set[int]) -> None:
    names = " and ".join(str(process) for process in sorted(lost))
    self._end(
        LOST, f"process {names} of {self._num_processes} was lost (killed, or its host or network failed), so the run "
        "ends; start the same command again on all hosts, it goes on from the last saved state.",
    )

  def _end(self, code: int, message: str | None) -> None:
    if message and (self._over.is_set() or self._leaving):
      return
    self._last_words.acquire()  # never released: one message is enough
    sys.stdout.flush()
    if message:
      os.write(2, f"\nftp-jax: {message}\n".encode())
    os._exit(code)


@contextlib.contextmanager
def deadline(seconds: float, message: str) -> Iterator[None]:
  """Ends the process with a sentence (status 2) if the body takes longer, whatever it is blocked in."""

  def end() -> None:
    os.write(2, f"\nftp-jax: {message}\n".encode())
    os._exit(2)

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _delay_abort() -> None:
  """Gives the threads above a few seconds before jax's abort takes the process.

  SIGABRT gets the C library's own sleep() as its handler: the aborting thread calls sleep(6), 6 being the number of
  the signal, and when it returns the abort goes on as ever. So nothing that should end the process is kept from it.
  """
  libc = ctypes.CDLL(None)
  libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
  libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
