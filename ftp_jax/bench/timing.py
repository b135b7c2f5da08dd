"""The clock of every bench: methods take turns, so that what slows the machine down meets all of them alike."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import tqdm

_REST = 0.1  # seconds between two measurements: idle threads of either runtime spin for a while after their work


class Method(Protocol):
  """What is measured. `measure` does it once and returns seconds; its first call may compile and is not counted."""

  name: str

  def measure(self) -> float: ...


def seconds_of(run: Callable[[], Any]) -> tuple[float, Any]:
  """Wall-clock seconds until the arrays that `run` returns are ready, and the arrays."""
  start = time.perf_counter()
  result = jax.block_until_ready(run())
  return time.perf_counter() - start, result


def interleave(
    methods: Sequence[Method],
    runs: int,
    title: str,
    show: Callable[[float], str] = lambda speedup: f"{speedup:.2f}x as fast as dense",
) -> list[list[float]]:
  """Measures every method once a round: a warm-up round, which is dropped, then `runs` rounds.

  Args:
    methods: the first is the dense one, to which the progress bar compares the others.
    title: of the progress bar.
    show: what the bar says of a speedup.

  Returns:
    The seconds of each method, one a round.
  """
  seconds: list[list[float]] = [[] for _ in methods]
  with tqdm.tqdm(total=(runs + 1) * len(methods), desc=title) as bar:
    for number in range(runs + 1):
      for method, own in zip(methods, seconds):
        if not number:
          bar.set_postfix_str(f"warming up {method.name}")
        time.sleep(_REST)
        taken = method.measure()
        if number:
          own.append(taken)
          bar.set_postfix_str(f"{method.name}: {show(speedup(own, seconds[0]))}", refresh=False)
        bar.update()
  return seconds


def speedup(seconds: Sequence[float], dense: Sequence[float]) -> float:
  """Ratio of the medians: how many times faster than dense."""
  return statistics.median(dense) / statistics.median(seconds)
