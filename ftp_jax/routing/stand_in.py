"""What a token's state becomes in a block that it skips: unchanged, or moved by a linear map that stands in for it.

  s(x) = x + b + (n(x) A) C,   n(x) = x / rms(x),   b (D), A (D,R), C (R,D) of each block

Where there are such maps they are leaves of the frozen blocks, (L,...), which every execution slices as the weights.
A dense model never reads them. `training.stand_in` fits them, and where they are trained with a router they are kept
beside its layers.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ftp_jax.routing.routers import norm_factor

NAME = "stand_in"


def attach(params: Any, stand_in: Any) -> Any:
  """The frozen parameters with the maps {"bias" (L,D), "down" (L,D,R), "up" (L,R,D)}; as they are for None."""
  return params if stand_in is None else params | {"blocks": params["blocks"] | {NAME: stand_in}}


def detach(params: Any) -> Any:
  """The frozen parameters without maps."""
  return params | {"blocks": {name: a for name, a in params["blocks"].items() if name != NAME}}


def split(weights: Any) -> tuple[Any, Any]:
  """A router's parameters and the maps that are kept beside its layers, None where there are none."""
  return {layer: own for layer, own in weights.items() if layer != NAME}, weights.get(NAME)


def join(router_params: Any, stand_in: Any) -> Any:
  """What `split` takes apart."""
  return router_params if stand_in is None else router_params | {NAME: stand_in}


def fits(stand_in: Any, num_blocks: int, hidden_size: int) -> bool:
  """Whether these are maps for such a model, or none at all."""
  if stand_in is None:
    return True
  shapes = {name: jnp.shape(a) for name, a in stand_in.items()}
  size = (num_blocks, hidden_size)
  rank = (0, *shapes.get("down", ()))[-1]
  return shapes == {"bias": size, "down": (*size, rank), "up": (num_blocks, rank, hidden_size)}


def rank(params: Any) -> int:
  """R of the maps of frozen parameters, 0 where there are none."""
  return params["blocks"][NAME]["down"].shape[-1] if NAME in params["blocks"] else 0


def moved(block_params: Any, x_BxTxD: jax.Array) -> jax.Array:
  """The states of tokens that skip a block with these parameters. Products are in the type of the states."""
  if NAME not in block_params:
    return x_BxTxD
  own = jax.tree.map(lambda a: a.astype(x_BxTxD.dtype), block_params[NAME])
  factor = norm_factor(x_BxTxD.astype(jnp.float32)).astype(x_BxTxD.dtype)
  return x_BxTxD + (factor * (x_BxTxD @ own["down"])) @ own["up"] + own["bias"].reshape(1, 1, -1)
