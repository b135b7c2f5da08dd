"""Architecture of a decoder-only LLM, read from a Hugging Face `config.json`.

Supported: Llama 1/2/3.x (with llama3 and linear rope scaling), Mistral (sliding window),
Qwen1.5/2/2.5 (QKV bias), Qwen3 (q/k norm). Everything else is refused by naming the field.
"""

import dataclasses
import json
import pathlib
from typing import Any

from ftp_jax.errors import UserError

# Positions of each family where its config.json does not say, as transformers has it.
_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_MISTRAL_WINDOW = 4096  # likewise; null is no window
FAMILIES = tuple(_POSITIONS)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Frequency scaling of rotary embeddings.

  kind: "none", "linear" (all frequencies divided by `factor`) or "llama3" (long wavelengths
  divided by `factor`, short ones kept, a smooth ramp between).
  """

  kind: str = "none"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Static description of a decoder; hashable, so it can be a static jit argument."""

  family: str
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_blocks: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  norm_eps: float = 1e-5
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling = RopeScaling()
  max_positions: int = 2048
  sliding_window: int = 0  # 0: full attention; else a query sees this many latest positions
  qkv_bias: bool = False
  qk_norm: bool = False
  tie_embeddings: bool = False

  @classmethod
  def from_hf(cls, hf: dict[str, Any]) -> "ModelConfig":
    """Reads a `config.json` as a dict.

    Raises:
      UserError: the config asks for something this decoder does not compute.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
      raise UserError(f"model_type={family!r} is not supported; supported are {', '.join(FAMILIES)}.")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in required:
      if not isinstance(hf.get(name), int) or hf[name] <= 0:
        raise UserError(
            f"config.json has no valid {name!r} (got {hf.get(name)!r}); restore the model's own config.json."
        )
    refused = {
        "hidden_act": lambda v: v not in (None, "silu"),
        "attention_bias": bool,
        "mlp_bias": bool,
        "quantization_config": bool,
        "use_sliding_window": bool,
        "attention_multiplier": bool,
        "partial_rotary_factor": lambda v: v not in (None, 1.0, 1),
        "pretraining_tp": lambda v: v not in (None, 1),
    }
    for name, is_bad in refused.items():
      if is_bad(hf.get(name)):
        raise UserError(
            f"config.json sets {name}={hf[name]!r}, which this decoder does not support; use a checkpoint without it."
        )
    layer_types = set(hf.get("layer_types") or ())
    window = hf.get("sliding_window", _MISTRAL_WINDOW) if family == "mistral" else None
    window = _number(hf, "sliding_window", window) if window else 0
    expected = {"sliding_attention"} if window else {"full_attention"}
    if layer_types - expected:
      raise UserError(
          f"config.json sets layer_types={sorted(layer_types)}, but only {sorted(expected)[0]} in every block is "
          "supported; use another model."
      )
    heads = hf["num_attention_heads"]
    kv_heads = _number(hf, "num_key_value_heads", heads)
    if heads % kv_heads:
      raise UserError(
          f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}; fix config.json."
      )
    head_dim = _number(hf, "head_dim", 128 if family == "qwen3" else hf["hidden_size"] // heads)
    if head_dim % 2:
      raise UserError(f"head_dim={head_dim} is odd, but rotary embeddings need an even one; fix config.json.")
    theta, scaling = _read_rope(hf)
    return cls(
        family=family,
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_blocks=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=_number(hf, "rms_norm_eps", 1e-6, float),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=_number(hf, "max_position_embeddings", _POSITIONS[family]),
        sliding_window=window,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
    )

  @classmethod
  def from_directory(cls, path: str | pathlib.Path) -> "ModelConfig":
    """Reads `config.json` of a Hugging Face model directory."""
    file = pathlib.Path(path) / "config.json"
    try:
      hf = json.loads(file.read_text())
    except FileNotFoundError:
      raise UserError(
          f"{file} does not exist; point the model at a Hugging Face directory, a .gguf file or a hub id."
      ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
      raise UserError(f"{file} is not valid JSON ({error}); download the model again.") from None
    if not isinstance(hf, dict):
      raise UserError(f"{file} holds no JSON object; download the model again.")
    return cls.from_hf(hf)


def _number(hf: dict[str, Any], name: str, default: float | None, kind: type = int) -> Any:
  """A positive number of this kind; the default where it is missing or null. UserError for anything else."""
  value = default if hf.get(name) is None else hf[name]
  positive = not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < value < float("inf")
  if not positive or kind(value) != value:
    raise UserError(f"config.json has no valid {name!r} (got {value!r}); restore the model's own config.json.")
  return kind(value)


def _read_rope(hf: dict[str, Any]) -> tuple[float, RopeScaling]:
  """Rope base and scaling from either spelling (`rope_parameters`, or `rope_theta` + `rope_scaling`)."""
  rope = {}
  for name in ("rope_scaling", "rope_parameters"):
    if not isinstance(hf.get(name) or {}, dict):
      raise UserError(f"config.json has no valid {name!r} (got {hf[name]!r}); restore the model's own config.json.")
    rope |= hf.get(name) or {}
  theta = _number(rope, "rope_theta", _number(hf, "rope_theta", 10_000.0, float), float)
  if rope.get("partial_rotary_factor") not in (None, 1):
    raise UserError(
        "config.json rotates only a part of each head (partial_rotary_factor), which is not supported; "
        "use another model."
    )
  kind = rope.get("rope_type") or rope.get("type") or "default"
  if kind == "default":
    return theta, RopeScaling()
  needed = lambda name, kind=float: _number(rope, name, None, kind)
  if kind == "linear":
    return theta, RopeScaling("linear", needed("factor"))
  if kind == "llama3":
    return theta, RopeScaling(
        "llama3", needed("factor"), needed("low_freq_factor"), needed("high_freq_factor"),
        needed("original_max_position_embeddings", int),
    )
  raise UserError(
      f"config.json asks for rope scaling {kind!r}, but only default, linear and llama3 are supported; "
      "use another model."
  )
