"""Weights between Hugging Face checkpoints and our tree: bit-exact, streamed, refused in one sentence."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from ftp_jax.errors import UserError
from ftp_jax.models import huggingface
from ftp_jax.models.config import ModelConfig
from ftp_jax.models.decoder import abstract_params
from ftp_jax.models.fingerprint import fingerprint_tensors
from ftp_jax.models.huggingface import fingerprint, hf_tensors, load_params, save_params
from ftp_jax.models.sources import load_model
from tests import scripts
from tests.test_data import byte_tokenizer

HF = dict(
    model_type="qwen2",  # biases: every kind of leaf but the q/k norms
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
CONFIG = ModelConfig.from_hf(HF)


def fingerprint_params(params, config) -> str:
  """That of a directory from which they were loaded without loss."""
  arrays = ((name, make()) for name, _, make in hf_tensors(params, config))
  return fingerprint_tensors((name, array.shape, array.__getitem__) for name, array in arrays)


def tensor_shapes(hf: dict) -> dict[str, tuple[int, ...]]:
  """Names and shapes as Hugging Face writes them, spelled out by hand."""
  D, F, V, H, G, N = 16, 24, 32, 4, 2, 4
  shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
  if not hf["tie_word_embeddings"]:
    shapes["lm_head.weight"] = (V, D)
  for i in range(3):
    block = {
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (H * N, D),
        "self_attn.k_proj.weight": (G * N, D),
        "self_attn.v_proj.weight": (G * N, D),
        "self_attn.o_proj.weight": (D, H * N),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
    }
    if hf["model_type"] == "qwen2":
      block |= {"self_attn.q_proj.bias": (H * N,), "self_attn.k_proj.bias": (G * N,), "self_attn.v_proj.bias": (G * N,)}
    if hf["model_type"] == "qwen3":
      block |= {"self_attn.q_norm.weight": (N,), "self_attn.k_norm.weight": (N,)}
    shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
  return shapes


def write(directory, hf=HF, dtype=np.float32, **changes) -> dict[str, np.ndarray]:
  """Writes a random checkpoint; `changes` replace tensors, None removes one. Returns the tensors."""
  rng = np.random.default_rng(0)
  tensors = {name: rng.normal(size=shape).astype(dtype) for name, shape in tensor_shapes(hf).items()}
  tensors = {name: value for name, value in (tensors | changes).items() if value is not None}
  directory.mkdir(exist_ok=True)
  safetensors_numpy.save_file(tensors, directory / "model.safetensors")
  (directory / "config.json").write_text(json.dumps(hf))
  return tensors


def read(directory) -> dict[str, np.ndarray]:
  files = sorted(directory.glob("*.safetensors"))
  return {name: value for file in files for name, value in safetensors_numpy.load_file(file).items()}


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
  return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True), dict(model_type="qwen3", head_dim=4)])
def test_round_trip_is_bit_exact(changes, dtype, max_shard_bytes, tmp_path):
  hf = HF | changes
  # NaN payloads and negative zeros are bits too.
  odd = np.full(16, -0.0, dtype)
  odd[1:3] = np.nan, np.inf
  tensors = write(tmp_path / "in", hf, dtype, **{"model.norm.weight": odd})
  config = ModelConfig.from_hf(hf)
  params = load_params(tmp_path / "in", config, dtype)
  save_params(params, config, tmp_path / "out", hf, max_shard_bytes)
  back = read(tmp_path / "out")
  assert back.keys() == tensors.keys()
  assert all(same_bits(back[name], tensors[name]) for name in tensors)
  assert json.loads((tmp_path / "out/config.json").read_text()) == hf
  files = list((tmp_path / "out").glob("*.safetensors"))
  if max_shard_bytes == 4000:
    assert len(files) > 3 and all(f.stat().st_size < 4000 + 2000 for f in files)  # 2000: header
    weight_map = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map == {name: f.name for f in files for name in safetensors_numpy.load_file(f)}
  else:
    assert [f.name for f in files] == ["model.safetensors"]
  # The written checkpoint, shards included, loads as the first one did.
  again = load_params(tmp_path / "out", config, dtype)
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: same_bits(np.asarray(a), np.asarray(b)), params, again)))


def test_tree_and_layout(tmp_path):
  tensors = write(tmp_path)
  params = load_params(tmp_path, CONFIG)
  want = abstract_params(CONFIG)
  assert jax.tree.structure(params) == jax.tree.structure(want)
  assert jax.tree.map(lambda p: (p.shape, p.dtype), params) == jax.tree.map(lambda p: (p.shape, p.dtype), want)
  np.testing.assert_array_equal(params["blocks"]["down"]["kernel"][2], tensors["model.layers.2.mlp.down_proj.weight"].T)
  np.testing.assert_array_equal(params["blocks"]["k"]["bias"][1], tensors["model.layers.1.self_attn.k_proj.bias"])
  np.testing.assert_array_equal(params["embed"]["lm_head"], tensors["lm_head.weight"])


def test_casts_to_the_dtype_asked_for(tmp_path):
  tensors = write(tmp_path, dtype=np.float16)
  params = load_params(tmp_path, CONFIG, jnp.bfloat16)
  head = params["embed"]["lm_head"]
  assert head.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(head), tensors["lm_head.weight"].astype(ml_dtypes.bfloat16))


def test_sharded_load_equals_plain_and_reads_each_part_once(tmp_path, monkeypatch):
  write(tmp_path)
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def sharding(leaf):
    # The last axis over "tensor", with a copy on either row of "data".
    return jax.sharding.NamedSharding(mesh, jax.P(*[None] * (len(leaf.shape) - 1), "tensor"))

  shardings = jax.tree.map(sharding, abstract_params(CONFIG))
  plain = load_params(tmp_path, CONFIG)
  sizes = []
  original = huggingface._read
  monkeypatch.setattr(huggingface, "_read", lambda *args: sizes.append(args[-1].size) or original(*args))
  sharded = load_params(tmp_path, CONFIG, shardings=shardings)
  jax.tree.map(np.testing.assert_array_equal, sharded, plain)
  assert all(jax.tree.leaves(jax.tree.map(lambda p, s: p.sharding == s, sharded, shardings)))
  total = sum(p.size for p in jax.tree.leaves(plain))
  assert sum(sizes) == total  # each of the 4 parts once, not once a device
  assert max(sizes) == max(p.size for p in jax.tree.leaves(plain)) // 4  # never a whole leaf


def test_blocks_can_be_sharded_too(tmp_path):
  hf = HF | dict(num_hidden_layers=2)
  dropped = {name: None for name in tensor_shapes(HF) if ".2." in name}
  write(tmp_path, hf, **dropped)
  config = ModelConfig.from_hf(hf)
  mesh = jax.make_mesh((2,), ("blocks",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
  axes = lambda leaf: jax.P("blocks") if len(leaf.shape) == 3 else jax.P()
  shardings = jax.tree.map(lambda leaf: jax.sharding.NamedSharding(mesh, axes(leaf)), abstract_params(config))
  sharded = load_params(tmp_path, config, shardings=shardings)
  jax.tree.map(np.testing.assert_array_equal, sharded, load_params(tmp_path, config))
  assert sharded["blocks"]["q"]["kernel"].addressable_shards[0].data.shape == (1, 16, 16)


def test_harmless_extras_are_ignored(tmp_path):
  hf = HF | dict(tie_word_embeddings=True)
  inv = np.ones(2, np.float32)
  extras = {"model.layers.0.self_attn.rotary_emb.inv_freq": inv, "model.rotary_emb.inv_freq": inv}
  tensors = write(tmp_path, hf)
  plain = load_params(tmp_path, ModelConfig.from_hf(hf))
  for dtype in (np.float32, np.float64):  # the same values in another type are no other head
    write(tmp_path, hf, **extras, **{"lm_head.weight": tensors["model.embed_tokens.weight"].astype(dtype)})
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, ModelConfig.from_hf(hf)), plain)


def test_a_head_of_its_own_where_the_config_ties_it_is_refused(tmp_path):
  hf = HF | dict(tie_word_embeddings=True)
  head = write(tmp_path, hf)["model.embed_tokens.weight"].copy()
  head[-1, -1] += 1
  write(tmp_path, hf, **{"lm_head.weight": head})
  with pytest.raises(UserError, match="lm_head.weight of its own.*set tie_word_embeddings to false"):
    load_params(tmp_path, ModelConfig.from_hf(hf))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model.norm.weight": None}, "lacks model.norm.weight"),
        ({"model.layers.1.mlp.up_proj.weight": None}, "lacks model.layers.1.mlp.up_proj.weight"),
        ({"model.layers.3.mlp.up_proj.weight": np.ones((24, 16), np.float32)}, "no place for"),
        ({"model.layers.0.self_attn.o_proj.bias": np.ones(16, np.float32)}, "o_proj.bias.*no place for"),
        ({"model.norm.weight": np.ones(8, np.float32)}, r"model.norm.weight has shape \(8,\).*\(16,\)"),
        ({"lm_head.weight": np.ones((16, 32), np.float32)}, "lm_head.weight has shape"),
        ({"model.norm.weight": np.ones(16, np.int8)}, "model.norm.weight is stored as I8"),
        ({"model.norm.weight": np.ones(16, ml_dtypes.float8_e4m3fn)}, "model.norm.weight is stored as F8"),
    ],
)
def test_wrong_tensors_are_refused(changes, named, tmp_path):
  write(tmp_path, **changes)
  with pytest.raises(UserError, match=named) as error:
    load_params(tmp_path, CONFIG)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file_is_refused(keep, tmp_path):
  write(tmp_path)
  file = tmp_path / "model.safetensors"
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(UserError, match="truncated or not a safetensors file"):
    load_params(tmp_path, CONFIG)


def test_pickles_are_refused(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
  with pytest.raises(UserError, match="pickled weights, which are never read; convert them to safetensors"):
    load_params(tmp_path, CONFIG)


def test_empty_directory_is_refused(tmp_path):
  with pytest.raises(UserError, match="holds no model.safetensors"):
    load_params(tmp_path, CONFIG)


@pytest.mark.parametrize(
    "index",
    ["{", "[]", "{}", '{"weight_map": {"a": "gone.safetensors"}}', '{"weight_map": {"a": "../model.safetensors"}}'],
)
def test_bad_index_is_refused(index, tmp_path):
  write(tmp_path)
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub/model.safetensors.index.json").write_text(index)
  with pytest.raises(UserError, match="index"):
    load_params(tmp_path / "sub", CONFIG)


def test_save_refuses_to_mix_checkpoints_or_architectures(tmp_path):
  write(tmp_path / "in")
  params = load_params(tmp_path / "in", CONFIG)
  with pytest.raises(UserError, match="already holds weights"):
    save_params(params, CONFIG, tmp_path / "in", HF)
  with pytest.raises(UserError, match="another architecture"):
    save_params(params, CONFIG, tmp_path / "out", HF | dict(rope_theta=5.0))
  with pytest.raises(ValueError, match="shape"):
    save_params(jax.tree.map(lambda p: p[..., :1], params), CONFIG, tmp_path / "out", HF)
  assert not (tmp_path / "out").exists()


def test_save_onto_an_impossible_place_is_one_sentence(tmp_path):
  write(tmp_path / "in")
  params = load_params(tmp_path / "in", CONFIG)
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot create"):
    save_params(params, CONFIG, tmp_path / "file/out", HF)


def test_fingerprint_follows_values_not_files(tmp_path):
  write(tmp_path / "a")
  params = load_params(tmp_path / "a", CONFIG)
  save_params(params, CONFIG, tmp_path / "sharded", HF, max_shard_bytes=4000)
  mark = fingerprint(tmp_path / "a")
  assert len(mark) == 16 and mark == fingerprint(tmp_path / "sharded") == fingerprint_params(params, CONFIG)
  other = np.ones(16, np.float32)
  write(tmp_path / "b", **{"model.layers.1.input_layernorm.weight": other})
  assert fingerprint(tmp_path / "b") != mark


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_a_tensor_that_is_no_weight_has_no_fingerprint(tmp_path, shape):
  write(tmp_path, **{"model.scale": np.zeros(shape, np.float32)})
  with pytest.raises(UserError, match="holds 'model.scale' of shape .* which is no weight of a supported model"):
    fingerprint(tmp_path)


def test_fingerprint_of_a_tied_model_ignores_the_duplicate_head(tmp_path):
  hf = HF | dict(tie_word_embeddings=True)
  tensors = write(tmp_path / "a", hf, ml_dtypes.bfloat16)
  write(tmp_path / "b", hf, ml_dtypes.bfloat16, **{"lm_head.weight": tensors["model.embed_tokens.weight"]})
  config = ModelConfig.from_hf(hf)
  params = load_params(tmp_path / "b", config, np.float32)  # widening is lossless
  assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b") == fingerprint_params(params, config)


@pytest.mark.parametrize("vocabulary", [32, 500])
def test_a_random_checkpoint_loads_with_an_embedding_for_every_token(vocabulary, tmp_path, monkeypatch):
  script = scripts.load("random_checkpoint")
  monkeypatch.setitem(script.ARCHITECTURES, "tiny", HF | {"vocab_size": vocabulary})
  byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
  script.write("tiny", tmp_path / "tokenizer", tmp_path / "model")
  model = load_model(str(tmp_path / "model"), "bfloat16")
  assert model.config.vocab_size == max(vocabulary, len(model.tokenizer))
  assert model.params["embed"]["embedding"].dtype == jnp.bfloat16
  kernel = np.asarray(model.params["blocks"]["down"]["kernel"], np.float32)
  assert (kernel.std(axis=(1, 2)) > 0.01).all() and not np.array_equal(kernel[0], kernel[1])
  with pytest.raises(UserError, match="is not empty"):
    script.write("tiny", tmp_path / "tokenizer", tmp_path / "model")
