"""Static widths: how far rows of tokens are filled up, so that few shapes are compiled.

What is computed never depends on padding. A coarse grid compiles few programs and computes more padding, which pays
for a sample of short texts; a fine one is for serving, where the time to the first token counts.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Padding:
  """A grid of widths: evenly spaced within each octave, multiples of `most_step` where that is finer.

  Attributes:
    per_octave: widths between a power of two and the next, a power of two itself.
    least_context: the smallest width of contexts.
    least_continuation: the smallest number of continuation tokens that run through the model.
    most_step: the largest distance of two widths, a power of two; None: as the octaves have it.
  """

  per_octave: int = 8
  least_context: int = 1
  least_continuation: int = 1
  most_step: int | None = None

  def context(self, length: int, most: int) -> int:
    """Width of contexts of up to `length` tokens, not beyond the model's `most` positions."""
    return max(length, min(self._width(max(length, self.least_context)), most))

  def continuation(self, length: int) -> int:
    """Width of continuations of up to `length` tokens, of which the last is scored, not run; 1 runs none."""
    return 1 + self._width(max(length - 1, self.least_continuation)) if length > 1 else 1

  def _width(self, length: int) -> int:
    step = max(1, power_of_two(length) // (2 * self.per_octave))
    step = min(step, self.most_step or step)
    return -(-length // step) * step


FINE = Padding()


def room(tokens: int) -> int:
  """Slots for new tokens: powers of two from 16 on, so that few programs are compiled."""
  return max(16, power_of_two(tokens))


def power_of_two(n: int) -> int:
  """The smallest one that is at least n."""
  return 1 << (n - 1).bit_length()
