"""The artifact: what a user ships, a small router beside the untouched base model.

`ftp_config.json` describes schedule, routing and router, the base model's id and fingerprint, and the
figures measured; `router.safetensors` holds the router's weights, and as `stand_in.*` those of the maps that stand in
for skipped blocks, where there are any. It loads without the training code.

There are two layouts of the same numbers: `flax` as the router's own parameters ("hidden.kernel", (in, out)), and
`torch` as `torch.nn.Linear` names and shapes them ("hidden.weight", (out, in)), which `ftp-jax export` writes.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from ftp_jax.errors import UserError
from ftp_jax.files import replacing
from ftp_jax.routing.config import RouterConfig, RoutingConfig

_AGAIN = "copy the artifact again"
FORMAT_VERSION = 1
LAYOUTS = ("flax", "torch")
CONFIG_FILE, WEIGHTS_FILE = "ftp_config.json", "router.safetensors"
_STAND_IN = "stand_in"  # beside the router's layers in the file of weights


@dataclasses.dataclass(frozen=True)
class Artifact:
  """A trained router with its schedule.

  Attributes:
    base_model, fingerprint, family: which model it was made for.
    schedule: sparsity (L,) asked of each block for context tokens.
    params: the router's parameters, numpy, as `routing.routers.init_router` shapes them.
    stand_in: the maps of `routing.stand_in`, numpy; None: a token that skips keeps its state.
    figures: what was measured (asked and achieved sparsity, KL, ...).
    crossover: {"context": shortest prompt in tokens from which a pruned prefill was faster than a dense one,
      None if it never was, "machine": where, "dtype": in which}; None if not measured.
  """

  base_model: str
  fingerprint: str
  family: str
  schedule: tuple[float, ...]
  routing: RoutingConfig
  router: RouterConfig
  params: Any
  figures: dict[str, Any]
  crossover: dict[str, Any] | None = None
  stand_in: Any = None

  @property
  def digest(self) -> str:
    """Hash (16 hex digits) of all that decides what it computes: neither figures nor crossover, nor the layout."""
    decides = (self.fingerprint, self.schedule, _described(self.routing), dataclasses.asdict(self.router))
    found = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
    for name, a in sorted(_flat(_weights(self)).items()):
      found.update(f"{name}{a.dtype}{a.shape}".encode() + np.ascontiguousarray(a).tobytes())
    return found.hexdigest()[:16]


def save(artifact: Artifact, directory: str | os.PathLike, layout: str = "flax") -> None:
  """Writes both files; the config last, so that a half-written artifact does not load."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  weights = _weights(artifact)
  save_weights(_to_torch(weights) if layout == "torch" else weights, directory / WEIGHTS_FILE)
  described = {
      "format_version": FORMAT_VERSION,
      "layout": layout,
      "base_model": artifact.base_model,
      "fingerprint": artifact.fingerprint,
      "family": artifact.family,
      "schedule": list(artifact.schedule),
      "routing": _described(artifact.routing),
      "router": dataclasses.asdict(artifact.router),
      "figures": artifact.figures,
      "crossover": artifact.crossover,
  }
  with replacing(directory / CONFIG_FILE) as file:
    file.write((json.dumps(described, indent=1) + "\n").encode())


def _described(routing: RoutingConfig) -> dict[str, Any]:
  """The fields as they are written; without `recent_tokens` where there are none, as from before there were any."""
  return {name: value for name, value in dataclasses.asdict(routing).items() if value or name != "recent_tokens"}


def withdraw(directory: pathlib.Path) -> None:
  """Makes an artifact, if there is one, unloadable."""
  (directory / CONFIG_FILE).unlink(missing_ok=True)


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
  """What the config of an artifact says, "layout" included; UserError as `load`."""
  directory = pathlib.Path(directory)
  try:
    described = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"{directory} has no {CONFIG_FILE}; point at the artifact folder of a finished run.") from None
  except (OSError, ValueError) as error:
    raise UserError(f"{directory / CONFIG_FILE} cannot be read ({error}); {_AGAIN}.") from None
  version = described.get("format_version") if isinstance(described, dict) else None
  if version != FORMAT_VERSION:
    raise UserError(f"{directory} has artifact format {version!r}, but {FORMAT_VERSION} is read here; update ftp_jax.")
  layout = described.setdefault("layout", "flax")
  if layout not in LAYOUTS:
    raise UserError(f"{directory} has the layout {layout!r}, but {', '.join(LAYOUTS)} are read here; update ftp_jax.")
  return described


def base_model(directory: str | os.PathLike | None) -> str:
  """The model source where none is named: what the artifact was made for, the smallest known model without one.

  Raises:
    UserError: as `load`.
  """
  if not directory:
    return "smollm2-135m"
  try:
    return _text(read_config(directory), "base_model")
  except (KeyError, TypeError) as error:
    raise UserError(f"{pathlib.Path(directory) / CONFIG_FILE} is incomplete or wrong ({error}); {_AGAIN}.") from None


def load(directory: str | os.PathLike) -> Artifact:
  """Reads an artifact, in either layout.

  Raises:
    UserError: a file is missing, damaged, of a newer format, or holds what its format does not.
  """
  directory = pathlib.Path(directory)
  described = read_config(directory)
  weights = load_weights(directory / WEIGHTS_FILE)
  stand_in = weights.pop(_STAND_IN, None)
  if not isinstance(stand_in, dict | None):
    raise UserError(f"{directory / WEIGHTS_FILE} has {_STAND_IN!r} for a tensor; {_AGAIN}.")
  try:
    router = dict(described["router"])
    return Artifact(
        **{name: _text(described, name) for name in ("base_model", "fingerprint", "family")},
        schedule=_schedule(described),
        routing=_of_types(RoutingConfig, described["routing"]),
        router=_of_types(RouterConfig, router | {"factors": tuple(router["factors"])}),
        params=_from_torch(weights) if described["layout"] == "torch" else weights,
        figures=dict(described["figures"]),
        crossover=_crossover(described),
        stand_in=stand_in,
    )
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(f"{directory / CONFIG_FILE} is incomplete or wrong ({error}); {_AGAIN}.") from None


def _of_types(kind: type, values: dict[str, Any]) -> Any:
  """`kind(**values)`, a description whose values are of the types of its defaults, as JSON need not have them."""
  for field in dataclasses.fields(kind):
    value = values.get(field.name, field.default)
    if type(value) not in ((int, float) if type(field.default) is float else (type(field.default),)):
      raise TypeError(f"{field.name}={value!r} is not of the type of {field.default!r}")
  return kind(**values)


def _crossover(described: dict[str, Any]) -> dict[str, Any] | None:
  found = described.get("crossover")  # absent in artifacts whose crossover was never measured
  if found is not None and not ("device" in dict(found["machine"]) and type(found["context"]) in (int, type(None))):
    raise TypeError(f"crossover={found!r} names no context and machine")
  return found


def _text(described: dict[str, Any], name: str) -> str:
  if not isinstance(described[name], str):
    raise TypeError(f"{name}={described[name]!r} is no text")
  return described[name]


def _schedule(described: dict[str, Any]) -> tuple[float, ...]:
  found = tuple(described["schedule"])
  if not found or not all(type(s) in (int, float) and 0 <= s <= 1 for s in found):
    raise TypeError("schedule is not one number from 0 to 1 for each block")
  return found


def save_weights(params: Any, path: str | os.PathLike) -> None:
  """Writes router parameters (nested dicts of arrays) to a safetensors file, atomically."""
  # Written by us: the library's own writer reports a full disk as its own error, and makes the file private.
  with replacing(path) as file:
    file.write(safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in _flat(params).items()}))


def load_weights(path: str | os.PathLike) -> Any:
  """Reads what `save_weights` wrote; UserError if the file is missing or damaged."""
  try:
    return _nested(safetensors.numpy.load_file(path))
  except (OSError, SafetensorError, IndexError, TypeError) as error:  # the last: a tensor is named as others' group is
    advice = "copy it again, or delete its folder, so that its stage runs again"
    raise UserError(f"{path} cannot be read ({error}); {advice}.") from None


def _weights(artifact: Artifact) -> Any:
  """All arrays of an artifact in one tree."""
  return artifact.params if artifact.stand_in is None else artifact.params | {_STAND_IN: artifact.stand_in}


def _to_torch(params: Any) -> Any:
  """{"hidden": {"kernel", "bias"}, ...} as {"hidden": {"weight", "bias"}, ...}; a leading block axis stays in front."""
  swap = lambda name, a: ("weight", np.swapaxes(a, -1, -2)) if name == "kernel" else (name, a)
  return {layer: dict(swap(name, a) for name, a in leaves.items()) for layer, leaves in params.items()}


def _from_torch(weights: Any) -> Any:
  back = lambda name, a: ("kernel", np.ascontiguousarray(np.swapaxes(a, -1, -2))) if name == "weight" else (name, a)
  return {layer: dict(back(name, a) for name, a in leaves.items()) for layer, leaves in weights.items()}


def _flat(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
  if isinstance(tree, dict):
    return {k: v for name, part in tree.items() for k, v in _flat(part, f"{prefix}{name}.").items()}
  return {prefix[:-1]: np.asarray(tree)}


def _nested(flat: dict[str, np.ndarray]) -> Any:
  tree: dict[str, Any] = {}
  for name, array in flat.items():
    *path, last = name.split(".")
    node = tree
    for part in path:
      node = node.setdefault(part, {})
    node[last] = array
  return tree
