"""Options of generation as lm-eval's tasks write them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ftp_jax.errors import UserError
from ftp_jax.inference import Sampling

DEFAULT_NEW_TOKENS = 256
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is there
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "top_k": 0, "use_cache": True}


@dataclasses.dataclass(frozen=True)
class Options:
  """How one request is continued; hashable."""

  until: tuple[str, ...]
  max_new_tokens: int
  sampling: Sampling


def read_options(given: Mapping[str, Any]) -> Options:
  """Options from a request's `generation_kwargs`. Without do_sample a temperature above 0 samples.

  Raises:
    UserError: an option is unknown, has a wrong value, or asks for what is not supported.
  """
  rest = {name: value for name, value in given.items() if value is not None}
  until = rest.pop("until", [])
  until = [until] if isinstance(until, str) else until
  if not isinstance(until, (list, tuple)) or not all(isinstance(text, str) for text in until):
    raise UserError(f"until={until!r} must be a text or a list of texts.")
  limits = [rest.pop(name) for name in _NEW_TOKENS if name in rest]
  new_tokens = limits[0] if limits else DEFAULT_NEW_TOKENS
  if isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or new_tokens < 1:
    raise UserError(f"max_gen_toks={new_tokens!r} must be a whole number of at least 1.")
  numbers = {}
  for name, neutral in (("temperature", 0.0), ("top_p", 1.0)):
    try:
      numbers[name] = float(rest.pop(name, neutral))
    except (TypeError, ValueError):
      raise UserError(f"{name}={given[name]!r} must be a number.") from None
  sample = rest.pop("do_sample", numbers["temperature"] > 0)
  if sample and not numbers["temperature"]:
    raise UserError("do_sample=True needs a temperature above 0; add temperature=1.0.")
  for name, value in rest.items():
    if name not in _NEUTRAL or value != _NEUTRAL[name]:
      raise UserError(
          f"{name}={value!r} is not supported in generation; use until, max_gen_toks, do_sample, temperature and top_p."
      )
  return Options(tuple(until), new_tokens, Sampling(**numbers) if sample else Sampling())
