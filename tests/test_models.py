"""The decoder against transformers + torch in fp32, and what ModelConfig refuses."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from ftp_jax import hardware
from ftp_jax.errors import UserError
from ftp_jax.models.attention import attend
from ftp_jax.models.config import ModelConfig, RopeScaling
from ftp_jax.models.decoder import abstract_params, angles, forward, init_params, logical_axes, product, unembed
from ftp_jax.models.huggingface import load_params
from ftp_jax.models.rope import apply_rope

TINY = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    # Short enough for tiny heads to have wavelengths below, on and beyond the ramp.
    original_max_position_embeddings=32,
)
CASES = {
    "llama-mha": (transformers.LlamaConfig, dict(num_key_value_heads=4)),
    "llama-gqa": (transformers.LlamaConfig, {}),
    "llama-mqa": (transformers.LlamaConfig, dict(num_key_value_heads=1)),
    "llama-tied": (transformers.LlamaConfig, dict(tie_word_embeddings=True)),
    "llama-head-dim": (transformers.LlamaConfig, dict(head_dim=20)),
    "llama-theta-eps": (
        transformers.LlamaConfig,
        dict(rms_norm_eps=1e-2, rope_parameters=dict(rope_type="default", rope_theta=50.0)),
    ),
    "llama-rope-llama3": (transformers.LlamaConfig, dict(rope_parameters=LLAMA3)),
    "llama-rope-linear": (
        transformers.LlamaConfig,
        dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
    ),
    "mistral-window": (transformers.MistralConfig, dict(sliding_window=5)),
    "mistral-full": (transformers.MistralConfig, dict(sliding_window=None)),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2-tied": (transformers.Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen3": (transformers.Qwen3Config, dict(head_dim=20)),
}


def random_model(case: str):
  """A torch model whose every weight, norms and biases included, is random and matters."""
  make_config, changes = CASES[case]
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(make_config(**(TINY | changes)), dtype=torch.float32).eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if weight.ndim == 2:
        weight.normal_(std=0.2)
      elif name.endswith("bias"):
        weight.normal_(std=0.5)
      else:
        weight.normal_(mean=1.0, std=0.3)
  return model


random_params = jax.jit(init_params, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens, lengths):
  return unembed(config, params, forward(config, params, tokens, lengths))


def ours(config: ModelConfig, params, tokens, lengths) -> np.ndarray:
  return np.asarray(_logits(config, params, jnp.asarray(tokens), jnp.asarray(lengths)))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
  model = random_model(case)
  model.save_pretrained(tmp_path)
  config = ModelConfig.from_directory(tmp_path)
  params = load_params(tmp_path, config)
  lengths = np.array([16, 9, 1])
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, 16))
  valid = np.arange(16) < lengths[:, None]
  with torch.no_grad():
    theirs = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(valid).long()).logits.numpy()
  logits = ours(config, params, tokens, lengths)
  assert 1 <= np.abs(theirs[valid]).max() <= 50  # else the tolerance below would say nothing
  np.testing.assert_allclose(logits[valid], theirs[valid], rtol=0, atol=1e-4)
  # The padding's content must not matter.
  padded = np.where(valid, tokens, 0)
  np.testing.assert_array_equal(ours(config, params, padded, lengths)[valid], logits[valid])


def test_sliding_window_changes_logits_only_beyond_it():
  config = ModelConfig.from_hf(TINY | dict(model_type="mistral", sliding_window=5))
  full = ModelConfig.from_hf(TINY | dict(model_type="mistral", sliding_window=None))
  params = jax.tree.map(lambda p: 10 * p, random_params(config, jax.random.key(0)))
  tokens = np.arange(12)[None]
  difference = np.abs(ours(config, params, tokens, [12]) - ours(full, params, tokens, [12])).max(axis=(0, 2))
  assert (difference[:5] == 0).all() and (difference[5:] > 1e-3).all()


def chain(x, kernel):
  """Root mean square error of fp32 products (R,F) whose terms are added up one by one."""
  terms = x[:, :, None] * kernel
  return np.sqrt(np.mean((np.cumsum(terms, axis=1, dtype=np.float32)[:, -1] - np.float64(x) @ np.float64(kernel)) ** 2))


@pytest.mark.parametrize("rows, precision", [
    ((1,), None), ((2, 3), None), ((4, 16), "highest"), ((4, 16), "float32"), ((2, 3), "highest")
])
def test_products_in_parts_round_less_than_one_chain(rows, precision):
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(*rows, 1536)).astype(np.float32), rng.normal(size=(1536, 64)).astype(np.float32)
  with jax.default_matmul_precision(precision):
    error = np.asarray(jax.jit(product)(x, kernel), np.float64) - np.float64(x) @ np.float64(kernel)
  assert np.sqrt(np.mean(error**2)) < 0.6 * chain(x.reshape(-1, 1536), kernel)


def test_products_are_plain_elsewhere_and_have_the_same_gradients():
  x, kernel = jnp.ones((3, 64)), jnp.ones((64, 8))
  lowered = jax.jit(product).trace(x, kernel).lower(lowering_platforms=("tpu",)).as_text()
  assert lowered.count("dot_general") == 1 and "batching_dims" not in lowered
  grads = jax.grad(lambda x, k: (product(x, k) ** 2).sum(), (0, 1))(x, kernel)
  np.testing.assert_allclose(grads[0], 64 * 8 * 2 * np.ones((3, 64)))
  np.testing.assert_allclose(grads[1], 64 * 3 * 2 * np.ones((64, 8)))


@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 1, 64), (2, 3, 64), (1, 9, 64)])
def test_products_of_few_rows_have_eight_on_a_tpu(shape):
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=shape).astype(np.float32), rng.normal(size=(64, 5)).astype(np.float32)
  with hardware.tracing_for("tpu"):
    program = jax.jit(product).trace(x, kernel)
    np.testing.assert_allclose(product(x, kernel), x @ kernel, rtol=1e-5, atol=1e-5)
  (multiplied,) = [eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "dot_general"]
  assert np.prod(multiplied.invars[0].aval.shape[:-1]) >= 8


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 0)])
def test_rope_is_the_same_as_a_product(dtype, tolerance):
  """For a TPU; in bf16, too, nothing but the sum is rounded, once."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3, 8)), dtype)
  config = ModelConfig.from_hf(TINY | {"model_type": "llama", "head_dim": 8})
  turned = functools.partial(jax.jit(lambda *a: apply_rope(*a)), x, *angles(config, jnp.arange(5)[None] + 90))
  with hardware.tracing_for("tpu"):
    got = turned()
  assert got.dtype == dtype
  np.testing.assert_allclose(np.float32(got), np.float32(turned()), rtol=0, atol=tolerance)


def test_products_of_bfloat16_are_added_up_in_fp32():
  rng = np.random.default_rng(0)
  x, kernel = jnp.asarray(rng.normal(size=(2, 512)), jnp.bfloat16), jnp.asarray(rng.normal(size=(512, 8)), jnp.bfloat16)
  with jax.default_matmul_precision("highest"):
    np.testing.assert_array_equal(jax.jit(product)(x, kernel), jax.jit(jnp.matmul)(x, kernel))


def test_logits_in_parts_round_less_than_one_chain():
  config = ModelConfig.from_hf(TINY | {"model_type": "llama", "hidden_size": 512, "vocab_size": 1024})
  head = np.random.default_rng(0).normal(size=(1024, 512)).astype(np.float32)
  x = np.random.default_rng(1).normal(size=(16, 512)).astype(np.float32)
  params = {"embed": {"lm_head": head, "embedding": head, "final_norm": {"scale": np.ones(512, np.float32)}}}
  y = x / np.sqrt(np.mean(np.float64(x) ** 2, axis=1, keepdims=True) + config.norm_eps)
  with jax.default_matmul_precision("highest"):
    found = np.asarray(jax.jit(unembed, static_argnums=0)(config, params, x), np.float64)
  assert np.sqrt(np.mean((found - y @ np.float64(head).T) ** 2)) < 0.6 * chain(y.astype(np.float32), head.T)


def test_collect_gives_the_states_between_blocks():
  config = ModelConfig.from_hf(TINY | dict(model_type="llama"))
  params, tokens = random_params(config, jax.random.key(0)), jnp.arange(6)[None]
  run = jax.jit(functools.partial(forward, config), static_argnames="collect")
  states = run(params, tokens, jnp.array([6]), collect=True)
  assert states.shape == (4, 1, 6, 48)
  np.testing.assert_array_equal(states[0], params["embed"]["embedding"][tokens])
  np.testing.assert_array_equal(states[-1], run(params, tokens, jnp.array([6])))


def test_trees_of_parameters_agree():
  config = ModelConfig.from_hf(TINY | dict(model_type="qwen3"))
  params, shapes, axes = random_params(config, jax.random.key(0)), abstract_params(config), logical_axes(config)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, shapes)
  jax.tree.map(lambda s, a: None if len(s.shape) == len(a) else pytest.fail(f"{s} {a}"), shapes, axes)


def test_key_gate_zero_removes_a_key():
  q, k, v = (jax.random.normal(key, (1, 3, 2, 4)) for key in jax.random.split(jax.random.key(0), 3))
  mask = jnp.ones((1, 3, 3), bool)
  gated = attend(q, k, v, mask, jnp.array([[1.0, 0.0, 1.0]]))
  np.testing.assert_allclose(gated, attend(q, k, v, mask.at[:, :, 1].set(False)), atol=1e-6)
  slope = jax.grad(lambda g: attend(q, k, v, mask, g).sum())(jnp.array([[1.0, 0.0, 1.0]]))
  assert np.isfinite(slope).all() and (slope[0, 1] != 0)


def test_query_that_sees_nothing_gets_zeros():
  q = k = v = jnp.ones((1, 2, 1, 4))
  assert (attend(q, k, v, jnp.zeros((1, 2, 2), bool)) == 0).all()


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(model_type="gpt2"), "model_type"),
        (dict(model_type=None), "model_type"),
        (dict(vocab_size=None), "vocab_size"),
        (dict(num_hidden_layers=0), "num_hidden_layers"),
        (dict(hidden_act="gelu"), "hidden_act"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(mlp_bias=True), "mlp_bias"),
        (dict(quantization_config={"bits": 4}), "quantization_config"),
        (dict(model_type="qwen2", use_sliding_window=True), "use_sliding_window"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
        (dict(num_key_value_heads=3), "num_key_value_heads"),
        (dict(head_dim=15), "head_dim"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)), "partial_rotary_factor"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "yarn"),
        (dict(rope_scaling=dict(type="dynamic", factor=4.0)), "dynamic"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "low_freq_factor"),
        (dict(rope_scaling=dict(rope_type="linear", factor=None)), "factor"),
        (dict(rope_scaling="linear"), "rope_scaling"),
        (dict(rope_theta="x"), "rope_theta"),
        (dict(num_key_value_heads="2"), "num_key_value_heads"),
        (dict(num_key_value_heads=0.5), "num_key_value_heads"),
        (dict(head_dim=-4), "head_dim"),
        (dict(rms_norm_eps="small"), "rms_norm_eps"),
        (dict(max_position_embeddings=0), "max_position_embeddings"),
    ],
)
def test_config_refuses_what_is_not_computed(change, named):
  with pytest.raises(UserError, match=named) as error:
    ModelConfig.from_hf(TINY | dict(model_type="llama") | change)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_a_config_leaves_out_is_as_transformers_has_it(family):
  left_out = ("max_position_embeddings", "sliding_window", "rms_norm_eps", "rope_theta")
  hf = {key: value for key, value in TINY.items() if key not in left_out}
  config = ModelConfig.from_hf(hf | {"model_type": family})
  theirs = transformers.AutoConfig.for_model(family)
  assert (config.max_positions, config.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
  assert config.sliding_window == (theirs.sliding_window if family == "mistral" else 0)


def test_config_reads_both_spellings_of_rope():
  old = dict(rope_theta=5e5, rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"})
  new = dict(rope_parameters=LLAMA3 | dict(rope_theta=5e5))
  read = lambda rope: ModelConfig.from_hf(TINY | dict(model_type="llama") | rope)
  assert read(old) == read(new)
  assert read(old).rope_theta == 5e5 and read(old).rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)


@pytest.mark.parametrize("content", [None, "{", "[]", "\xff"])
def test_unreadable_config_is_one_sentence(content, tmp_path):
  if content is not None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
  with pytest.raises(UserError, match="config.json"):
    ModelConfig.from_directory(tmp_path)


def test_config_is_hashable_and_json_is_read(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(TINY | dict(model_type="llama")))
  config = ModelConfig.from_directory(tmp_path)
  assert hash(config) == hash(ModelConfig.from_hf(TINY | dict(model_type="llama")))
  assert (config.num_blocks, config.num_kv_heads, config.head_dim) == (3, 2, 12)
