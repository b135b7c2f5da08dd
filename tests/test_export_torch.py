"""Export to PyTorch: routes, logits and generations of the runtime are those of JAX; weights, round trips, refusals."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import save_file

from ftp_jax import cli
from ftp_jax.errors import UserError
from ftp_jax.export import artifact as artifacts
from ftp_jax.export import pytorch, torch_runtime
from ftp_jax.export.torch_runtime import PrunedCache, load_pruned
from ftp_jax.inference import Engine
from ftp_jax.models import decoder
from ftp_jax.models.config import ModelConfig
from ftp_jax.models.huggingface import fingerprint, load_params, save_params
from ftp_jax.models.sources import Model
from ftp_jax.routing import routers, selection, stand_in
from ftp_jax.routing.config import RouterConfig, RoutingConfig
from tests import tiny
from tests.test_bucketed import random_maps
from tests.test_data import byte_tokenizer
from tests.test_models import random_model

ROOT = pathlib.Path(__file__).parent.parent
SCHEDULE = (0.3, 0.5, 0.6)  # of the three blocks of the tiny models
LENGTHS, NEW = (17, 9, 3), 10
unembed = jax.jit(decoder.unembed, static_argnums=0)

# The reference of every case is compiled anew, so that a case has several options at once: every value of each is
# there, and most pairs of them.
CASES = {
    "rope_llama3_argmax": (
        "llama-rope-llama3", RoutingConfig("evict", "argmax", recent_tokens=2), RouterConfig(factors=("rank",))
    ),
    "rope_linear_multiple": (
        "llama-rope-linear", RoutingConfig("project", "argmax", bucket_multiple=4, score_window=3),
        RouterConfig("recurrent", ("score", "sparsity")),
    ),
    "window_evict_quantile": (
        "mistral-window", RoutingConfig("evict", decode_sparsity=0.4, decode_rule="quantile"),
        RouterConfig(hidden_states=True),
    ),
    "one_pass_recurrent": ("qwen2", RoutingConfig("evict", one_pass_block=1), RouterConfig("recurrent")),
    "one_pass_quantile": (
        "qwen2-tied", RoutingConfig("project", one_pass_block=1, decode_sparsity=0.3, decode_rule="quantile"),
        RouterConfig(),
    ),
    "one_pass_hidden_alone": (
        "qwen3", RoutingConfig("project", one_pass_block=0, decode_sparsity=0.4, decode_threshold=0.4),
        RouterConfig(factors=(), hidden_states=True),
    ),
    "one_pass_evict_from_2": (
        "llama-gqa", RoutingConfig("evict", one_pass_block=1, evict_from=2), RouterConfig(hidden_states=True)
    ),
    "evict_from_1_skipping": (
        "mistral-window", RoutingConfig("evict", evict_from=1, decode_sparsity=0.4, decode_threshold=0.4),
        RouterConfig("per_block"),
    ),
    "some_blocks_dense": (
        "mistral-full", RoutingConfig("evict", decode_sparsity=0.2, decode_threshold=0.1),
        RouterConfig("recurrent", hidden_states=True), (0.0, 0.7, 0.0),
    ),
    "late_plan_quantile": (
        "mistral-window",
        RoutingConfig("project", one_pass_block=2, decode_sparsity=0.4, decode_rule="quantile", recent_tokens=4),
        RouterConfig("per_block", ("rank", "score"), hidden_states=True), (0.0, 0.0, 0.7),
    ),
    "dense_between": (
        "llama-mha", RoutingConfig("evict", decode_sparsity=0.3, decode_threshold=0.4),
        RouterConfig(factors=("score", "rank")), (0.6, 0.0, 0.7),
    ),
}
WITH_MAPS = {  # ranks of the maps that stand in for skipped blocks
    "maps_project": ("llama-mqa", RoutingConfig("project"), RouterConfig(hidden_states=True), (0.3, 0.2, 1.0), 5),
    "maps_evict_skipping": (
        "qwen3", RoutingConfig("evict", decode_sparsity=0.4, decode_threshold=0.3), RouterConfig("per_block"),
        (0.3, 0.0, 0.7), 3,
    ),
}
CASES |= WITH_MAPS
WITH_ENGINE = ("maps_project", "rope_llama3_argmax", "late_plan_quantile", "window_evict_quantile")


@functools.cache
def directory_of(model: str) -> str:
  """A tiny random model of the family, with a tokenizer, as transformers writes it; kept for all tests."""
  directory = _Directories.root / model
  base = random_model(model)
  base.generation_config.eos_token_id = base.generation_config.bos_token_id = None
  base.save_pretrained(directory)
  return str(directory)


class _Directories:
  root: pathlib.Path


@pytest.fixture(scope="module", autouse=True)
def directories(tmp_path_factory):
  _Directories.root = tmp_path_factory.mktemp("models")
  yield
  directory_of.cache_clear()


def make(model, routing, router, schedule=SCHEDULE, rank=0, figures=None):
  """An artifact with random weights, large enough for margins on both sides of 0, and its model's config."""
  config = ModelConfig.from_directory(directory_of(model))
  init = routers.init_router(router, jax.random.key(1), config.num_blocks, config.hidden_size)
  weights = jax.tree.map(lambda a: np.asarray(a) * 3, init)
  made = artifacts.Artifact(
      "org/tiny", fingerprint(directory_of(model)), config.family, schedule, routing, router, weights, figures or {},
      stand_in=random_maps(config, rank, np.random.default_rng(0)) if rank else None,
  )
  return made, config


def exported(
    tmp_path, model, routing, router, schedule=SCHEDULE, rank=0, figures=None, with_weights=False
) -> pathlib.Path:
  artifacts.save(make(model, routing, router, schedule, rank, figures)[0], tmp_path / "artifact")
  return pytorch.export(str(tmp_path / "artifact"), str(tmp_path / "out"), directory_of(model), with_weights)


def prompts_of(lengths=LENGTHS, size=97):
  rng = np.random.default_rng(0)
  return [rng.integers(0, size, n).tolist() for n in lengths]


def padded(rows, side):
  longest = max(map(len, rows))
  missing = lambda row, value: [value] * (longest - len(row))
  fill = lambda row, value: missing(row, value) + row if side == "left" else row + missing(row, value)
  return {
      "input_ids": torch.tensor([fill(row, 0) for row in rows]),
      "attention_mask": torch.tensor([fill([1] * len(row), 0) for row in rows]),
  }


def generate(model, prompts, new=NEW, **options):
  return model.generate(
      **padded(prompts, "left"), max_new_tokens=new, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
      **({"do_sample": False} | options),
  )


# --- parity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_routes_logits_and_generations_are_those_of_jax(case, tmp_path, monkeypatch):
  name, routing, router, *rest = CASES[case]
  made, config = make(name, routing, router, *rest)
  model = load_pruned(directory_of(name), exported(tmp_path, name, routing, router, *rest))
  prompts = prompts_of()
  out = generate(model, prompts)
  new, logits = out.sequences[:, -NEW:].tolist(), torch.stack(out.logits, 1).numpy()
  routes = out.past_key_values.keep_LxBxT.numpy()

  params = stand_in.attach(load_params(directory_of(name), config), made.stand_in)
  context = np.array(LENGTHS, np.int32)
  rows = [prompt + row for prompt, row in zip(prompts, new)]
  tokens = padded(rows, "right")["input_ids"].numpy().astype(np.int32)
  jax_router = routers.Router("dynamic", router, jax.tree.map(jnp.asarray, made.params))
  schedule = jnp.asarray(made.schedule, jnp.float32)
  reference = tiny.forward(config, routing, params, jax_router, tokens, context, context + NEW, schedule)
  expected, keep = np.asarray(unembed(config, params, reference.hidden_BxTxD)), np.asarray(reference.keep_LxBxT)
  for b, m in enumerate(LENGTHS):
    np.testing.assert_array_equal(routes[:, b, :m], keep[:, b, :m])
    np.testing.assert_allclose(logits[b], expected[b, m - 1 : m - 1 + NEW], rtol=0, atol=1e-4)
    assert new[b] == expected[b, m - 1 : m - 1 + NEW].argmax(-1).tolist()
  after = np.concatenate([keep[:, b, m : m + NEW - 1].ravel() for b, m in enumerate(LENGTHS)])
  assert 0.05 < 1 - after.mean() < 0.95 if routing.decode_sparsity else after.all()
  assert 0.2 < 1 - routes[:, 0].mean() < 0.7 and len({token for row in new for token in row}) > 5

  # All logits at once, with the contexts' ends given; and a prefill in chunks of the kept queries alone.
  at_once = lambda: model(**padded(rows, "right"), context_length=torch.tensor(context)).logits.numpy()
  first = at_once()
  monkeypatch.setattr(torch_runtime, "_CHUNK", 4)
  monkeypatch.setattr(torch_runtime, "_WHOLE", 2)
  for found in (first, at_once()):
    for b, row in enumerate(rows):
      np.testing.assert_allclose(found[b, : len(row)], expected[b, : len(row)], rtol=0, atol=1e-4)
  if case in WITH_ENGINE:
    check_engine(tmp_path, name, prompts, routes, logits, new)


def check_engine(tmp_path, name, prompts, routes, logits, new):
  """The bucketed prefill and the decode loop say the same; the engine reads what was exported for torch."""
  config = ModelConfig.from_directory(directory_of(name))
  model = Model(config, load_params(directory_of(name), config), byte_tokenizer(), pathlib.Path(directory_of(name)))
  engine = Engine(model, artifacts.load(tmp_path / "out"), fallback="never")
  prefix = engine.prefill(prompts)
  cache = prefix.groups[0].prefilled
  for b, m in enumerate(LENGTHS):
    np.testing.assert_array_equal(np.asarray(cache.cache.keep_LxBxT)[:, b, :m], routes[:, b, :m])
  np.testing.assert_allclose(cache.logits_BxV, logits[:, 0], rtol=0, atol=1e-4)
  assert [list(g.tokens) for g in engine.generate(prefix, NEW, stop_tokens=())] == new


def test_capacity_and_ties_are_those_of_jax():
  contexts = [1, 2, 3, 7, 50, 101, 2048, 40_000, 100_003]
  for sparsity in np.float32([0.0001, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.7, 0.975, 0.99, 1.0]):
    for multiple in (1, 4, 128):
      expected = selection.capacity(sparsity, np.array(contexts, np.int32), multiple).tolist()
      assert torch_runtime.capacity(float(sparsity), contexts, multiple) == expected
  # Equal margins: the later token is kept; the first and the last always are; padding never is.
  margin = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0, -9.0], [5.0, 5.0, -1.0, 5.0, 9.0, 9.0]])
  keep = torch_runtime.select(margin, [4, 3], [6, 4], "topk").int().tolist()
  assert keep == [[1, 1, 0, 0, 1, 1], [1, 1, 0, 1, 0, 0]]
  keep = torch_runtime.select(margin - 4, [4, 3], [6, 4], "argmax").int().tolist()
  assert keep == [[1, 0, 0, 0, 0, 1], [1, 1, 0, 1, 0, 0]]


@pytest.mark.parametrize("chosen", ["topk", "argmax"])
def test_recent_tokens_are_those_of_jax(chosen):
  rng, contexts, routing = np.random.default_rng(0), [20, 12, 11, 3], RoutingConfig(selection=chosen, recent_tokens=3)
  for sparsity in np.float32([0.2, 0.5, 0.8]):  # at the last not all of them have slots
    margin = np.round(rng.normal(size=(4, 20)), 1).astype(np.float32)  # ties
    expected = np.asarray(selection.keep_context(margin, jnp.float32(sparsity), np.array(contexts), routing))
    count = torch_runtime.capacity(float(sparsity), contexts, 1)
    keep = torch_runtime.select(torch.tensor(margin), count, contexts, chosen, recent=3).numpy()
    np.testing.assert_array_equal(keep, expected)
    without = torch_runtime.select(torch.tensor(margin), count, contexts, chosen).numpy()
    assert (keep != without).any(axis=1).tolist()[2:] == [False, False] and (keep != without)[:2].any()


@pytest.mark.parametrize("window", [0, 6])
def test_queries_masked_in_chunks_see_all_their_keys_whatever_the_other_rows_are(window, monkeypatch):
  # The shorter row stands later than the longer one in the last chunk, which it fills in part.
  positions = [[0, 1, 2, 3, 4, 5], [0, 7, 9, 20, 29]]
  row, position = (torch.tensor(a) for a in ([0] * 6 + [1] * 5, sum(positions, [])))
  queries, draw = torch_runtime.Packed(row, position, [6, 5]), torch.Generator().manual_seed(0)
  q, k, v = (torch.randn(*shape, generator=draw) for shape in ((11, 4, 8), (2, 2, 30, 8), (2, 2, 30, 8)))
  where = torch.arange(30).expand(2, 30).clone()
  where[0, 6:] = torch_runtime.EMPTY
  slots = torch_runtime.Slots(k, v, where, where < 30)
  found = []
  for chunk in (512, 3):
    monkeypatch.setattr(torch_runtime, "_CHUNK", chunk)
    found.append(torch_runtime.attend(queries, q, slots, window, ordered=True, same=False))
  for n, (r, p) in enumerate(zip(row.tolist(), position.tolist())):
    seen = slice(max(0, p + 1 - window) if window else 0, p + 1)
    keys, values = (a[r, :, seen].repeat_interleave(2, 0) for a in (k, v))
    weights = (torch.einsum("hn,hsn->hs", q[n], keys) * 8**-0.5).softmax(-1)
    for out in found:
      torch.testing.assert_close(out[n], torch.einsum("hs,hsn->hn", weights, values), rtol=0, atol=1e-5)


# --- what is saved ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_mode", ["evict", "project"])
def test_a_prefill_computes_and_stores_what_it_keeps_alone(kv_mode, tmp_path):
  model = load_pruned(directory_of("qwen3"), exported(tmp_path, "qwen3", RoutingConfig(kv_mode), RouterConfig()))
  computed = []
  for block in model.model.layers:
    block.mlp.register_forward_hook(lambda _, inputs, __: computed.append(len(inputs[0])))
  cache = model(**padded(prompts_of(), "left"), logits_to_keep=1).past_key_values
  kept = cache.keep_LxBxT.sum((1, 2)).tolist()
  assert kept == [12 + 7 + 3, 9 + 5 + 2, 7 + 4 + 2]  # ceil((1 - s) m), at least 2
  assert computed == [*kept[:2], 3]  # of the last block the last token of each row alone
  slots = [slots.k_BxGxSxN.shape[2] for slots in cache.slots]
  assert slots == ([12, 9, 7] if kv_mode == "evict" else [17] * 3)  # of the longest row
  assert cache.nbytes == sum(2 * 3 * 2 * n * 20 * 4 for n in slots)
  computed.clear()
  model(**padded(prompts_of(), "left"))
  assert computed == kept  # all logits are asked for


def test_a_block_that_all_new_tokens_skip_is_not_computed(tmp_path):
  routing = RoutingConfig("project", decode_sparsity=0.5, decode_threshold=1e-9)
  model = load_pruned(directory_of("qwen2"), exported(tmp_path, "qwen2", routing, RouterConfig()))
  cache = model(**padded(prompts_of(), "left")).past_key_values
  computed = []
  for block in model.model.layers:
    block.mlp.register_forward_hook(lambda _, inputs, __: computed.append(len(inputs[0])))
  logits = model(torch.tensor([[1], [2], [3]]), past_key_values=cache).logits
  assert computed == [] and logits.isfinite().all()
  assert [slots.k_BxGxSxN.shape[2] for slots in cache.slots] == [18] * 3  # under `project` it still has keys


def test_the_base_model_stays_dense_and_shares_its_weights(tmp_path):
  base = transformers.AutoModelForCausalLM.from_pretrained(directory_of("llama-gqa"))
  inputs = padded(prompts_of(), "left")
  before = base(**inputs).logits
  out = exported(tmp_path, "llama-gqa", RoutingConfig("evict"), RouterConfig())
  base.train()
  model = load_pruned(base, out)
  assert base.model.layers[0].training
  assert isinstance(model, transformers.LlamaForCausalLM) and model.lm_head is base.lm_head
  assert type(load_pruned(model, out)).__mro__[1:] == type(model).__mro__[1:]
  assert not torch.allclose(model(**inputs).logits[:, -1], before[:, -1], atol=0.1)
  torch.testing.assert_close(base(**inputs).logits, before, rtol=0, atol=0)
  model.save_pretrained(tmp_path / "saved")
  assert fingerprint(tmp_path / "saved") == fingerprint(directory_of("llama-gqa"))


# --- use -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
  """A model whose new tokens skip as well."""
  routing = RoutingConfig("evict", decode_sparsity=0.4, decode_threshold=0.3)
  router = RouterConfig("recurrent", hidden_states=True)
  out = exported(tmp_path_factory.mktemp("skipping"), "llama-tied", routing, router)
  return load_pruned(directory_of("llama-tied"), out)


def test_either_side_of_padding_and_rows_alone_give_the_same(skipping):
  prompts = prompts_of()
  left = skipping(**padded(prompts, "left")).logits
  right = skipping(**padded(prompts, "right")).logits
  for b, prompt in enumerate(prompts):
    alone = skipping(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(left[b, -len(prompt) :], alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(right[b, : len(prompt)], alone, rtol=0, atol=1e-4)
  with pytest.raises(ValueError, match="use padding_side='left'"):
    skipping.generate(**padded(prompts, "right"), max_new_tokens=2, do_sample=False)


def test_a_filled_cache_continues_and_its_rows_can_be_repeated_and_reordered(skipping):
  prompts, more = prompts_of(), torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
  rows = [prompt + new for prompt, new in zip(prompts, more.tolist())]
  whole = skipping(**padded(rows, "left"), context_length=torch.tensor(LENGTHS))
  cache = skipping(**padded(prompts, "left")).past_key_values
  assert cache.get_seq_length() == 17
  cache.batch_repeat_interleave(2)  # rows 0 0 1 1 2 2
  cache.reorder_cache(torch.tensor([4, 3, 0]))  # rows 2 1 0
  for step in range(3):
    logits = skipping(more.flip(0)[:, step : step + 1], past_key_values=cache).logits[:, 0]
    torch.testing.assert_close(logits.flip(0), whole.logits[:, step - 3], rtol=0, atol=1e-4)
  assert cache.get_seq_length() == 20 == whole.past_key_values.get_seq_length()


def test_generation_options(skipping):
  prompts = prompts_of()
  greedy = generate(skipping, prompts).sequences
  draw = lambda seed: (torch.manual_seed(seed), generate(skipping, prompts, do_sample=True, top_p=0.9).sequences)[1]
  assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
  # Of several beams the best is at least as likely as the greedy one; its likelihood is what one pass says.
  beams = generate(skipping, prompts, num_beams=3, output_scores=True)
  rows = [p + row[17:].tolist() for p, row in zip(prompts, beams.sequences)]
  logits = skipping(**padded(rows, "left"), context_length=torch.tensor(LENGTHS)).logits[:, -NEW - 1 : -1]
  total = logits.log_softmax(-1).gather(2, beams.sequences[:, 17:, None]).sum((1, 2))
  torch.testing.assert_close(beams.sequences_scores * NEW, total, rtol=0, atol=1e-3)
  plain = skipping.generate(torch.tensor([prompts[0]]), max_new_tokens=NEW, do_sample=False)
  assert torch.equal(plain[0, 17:], greedy[0, 17:])


def test_loss_tuple_embeddings_and_no_cache(skipping):
  tokens = torch.tensor(prompts_of((12, 12)))
  with pytest.raises(ValueError, match="gates which have seen its later tokens; pass context_length"):
    skipping(tokens, labels=tokens)
  out = skipping(tokens, labels=tokens, use_cache=False, context_length=12)
  expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
  torch.testing.assert_close(out.loss, expected)
  assert out.past_key_values is None
  logits, cache = skipping(inputs_embeds=skipping.get_input_embeddings()(tokens), return_dict=False)
  assert torch.equal(logits, out.logits) and isinstance(cache, PrunedCache)
  some = skipping(tokens, logits_to_keep=torch.tensor([3, 7])).logits
  torch.testing.assert_close(some, out.logits[:, [3, 7]])


def test_bfloat16_routes_in_fp32(tmp_path):
  out = exported(tmp_path, "llama-gqa", RoutingConfig("evict"), RouterConfig(hidden_states=True))
  model, half = (load_pruned(directory_of("llama-gqa"), out, dtype=d) for d in (None, torch.bfloat16))
  inputs = padded(prompts_of(), "left")
  a, b = model(**inputs), half(**inputs)
  assert b.logits.dtype == b.past_key_values.slots[0].k_BxGxSxN.dtype == torch.bfloat16
  assert {w.dtype for w in half.pruning.weights.values()} == {torch.float32}
  assert torch.equal(half.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)  # bf16 would turn late positions
  assert torch.equal(a.past_key_values.keep_LxBxT.sum(2), b.past_key_values.keep_LxBxT.sum(2))
  torch.testing.assert_close(a.logits.softmax(-1)[:, -1], b.logits.float().softmax(-1)[:, -1], rtol=0, atol=0.1)
  with torch.autocast("cpu", dtype=torch.bfloat16):  # its blocks alone: routers and scores stay in fp32
    assert torch.equal(a.past_key_values.keep_LxBxT.sum(2), model(**inputs).past_key_values.keep_LxBxT.sum(2))
  with pytest.raises(ValueError, match="by its directory to have it cast"):
    load_pruned(transformers.AutoModelForCausalLM.from_pretrained(directory_of("llama-gqa")), out, dtype=torch.bfloat16)
  with pytest.raises(ValueError, match="by its directory if you cast"):
    load_pruned(transformers.AutoModelForCausalLM.from_pretrained(directory_of("llama-gqa"), dtype=torch.bfloat16), out)


@pytest.mark.parametrize("case", ["some_blocks_dense", "rope_linear_multiple", "window_evict_quantile"])
def test_everything_is_made_on_the_device_of_the_model(case, tmp_path):
  name, *rest = CASES[case]
  model = load_pruned(directory_of(name), exported(tmp_path, name, *rest))
  context, more = padded(prompts_of(), "left"), torch.tensor([[5, 6], [7, 8], [9, 10]])
  scored = padded([prompt + new for prompt, new in zip(prompts_of(), more.tolist())], "right")
  order = torch.tensor([2, 0, 1])

  def run():
    cache = model(**context).past_key_values
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(order)
    return model(**scored, context_length=LENGTHS).logits, model(more, past_key_values=cache).logits

  expected = run()
  with torch.device("meta"):  # where a tensor without a device of its own would land; nothing can be computed from it
    found = run()
  for a, b in zip(expected, found):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(output_hidden_states=True), "no hidden states"),
        (dict(attention_mask=torch.ones(1, 3)), "attention_mask must have the shape"),
        (dict(attention_mask=torch.zeros(1, 4)), "at least one token"),
        (dict(position_ids=torch.arange(1, 5)[None]), "position_ids must count"),
        (dict(context_length=5), "at most its length"),
        (dict(context_length=0), "at least one token"),
        (dict(past_key_values=transformers.StaticCache(transformers.LlamaConfig(), max_cache_len=8)), "its own cache"),
    ],
)
def test_what_a_pruned_model_cannot_do_is_refused(skipping, arguments, message):
  with pytest.raises(ValueError, match=message):
    skipping(torch.tensor([[1, 2, 3, 4]]), **arguments)


def test_what_a_cache_cannot_do_is_refused(skipping):
  cache = skipping(torch.tensor([[1, 2, 3, 4]])).past_key_values
  with pytest.raises(ValueError, match="belongs to the first call"):
    skipping(torch.tensor([[5]]), past_key_values=cache, context_length=1)
  with pytest.raises(ValueError, match="cache is of 1 rows, but 2 are given"):
    skipping(torch.tensor([[5], [6]]), past_key_values=cache)
  with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
    skipping(past_key_values=cache)
  for kind in ("static", "quantized", "offloaded"):
    with pytest.raises(ValueError, match="keeps its own cache"):
      options = {"cache_config": {"backend": "fp8"}} if kind == "quantized" else {}
      skipping.generate(torch.tensor([[1, 2]]), max_new_tokens=2, cache_implementation=kind, **options)
  with pytest.raises(ValueError, match="cannot be cropped"):
    cache.crop(-1)
  with pytest.raises(ValueError, match="leave the cache on"):
    skipping.generate(torch.tensor([[1, 2]]), max_new_tokens=2, use_cache=False)


# --- the exported directory --------------------------------------------------------------------------


def same_bits(a, b):
  return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("kind", ["global", "per_block", "recurrent"])
def test_the_way_back_gives_the_identical_artifact(kind, tmp_path):
  router = RouterConfig(kind, ("rank", "sparsity"), hidden_states=True, hidden_size=5)
  figures = {"kl": 0.1, "perplexity": None, "method": "dynamic_finetuned"}
  out = exported(tmp_path, "qwen2", RoutingConfig("evict", one_pass_block=1), router, figures=figures)
  before, after = artifacts.load(tmp_path / "artifact"), artifacts.load(out)
  assert dataclasses.replace(before, params=None) == dataclasses.replace(after, params=None)
  told = dataclasses.replace(after, figures={}, crossover={"context": 9})  # what is told of it does not compute
  other = dataclasses.replace(after, params=jax.tree.map(lambda a: a + 1, after.params))
  assert before.digest == told.digest != other.digest != dataclasses.replace(other, schedule=(0.5,) * 3).digest
  recent = dataclasses.replace(before, routing=dataclasses.replace(before.routing, recent_tokens=8))
  artifacts.save(recent, tmp_path / "recent")
  assert artifacts.load(tmp_path / "recent").routing.recent_tokens == 8 and recent.digest != before.digest
  assert all(jax.tree.leaves(jax.tree.map(same_bits, before.params, after.params)))
  weights = torch_runtime.read_artifact(out).weights
  lead = (3,) if kind == "per_block" else ()
  assert weights["hidden.weight"].shape == lead + (5, 2 + 48) and weights["out.weight"].shape == lead + (2, 5)
  again = pytorch.export(str(out), str(tmp_path / "again"))  # exported once more, without the base model
  for name in ("ftp_config.json", "router.safetensors", "README.md"):
    assert (again / name).read_bytes() == (out / name).read_bytes()


def test_an_export_that_says_nothing_of_evict_from_and_recent_tokens_evicts_everywhere_and_has_none(tmp_path):
  out = exported(tmp_path, "llama-gqa", RoutingConfig("evict"), RouterConfig(), with_weights=True)
  said = json.loads((out / "ftp_config.json").read_text())
  logits = lambda: load_pruned(out)(torch.tensor([prompts_of()[0]])).logits
  expected = logits()
  assert "recent_tokens" not in said["routing"]  # earlier readers know of none
  del said["routing"]["evict_from"]
  (out / "ftp_config.json").write_text(json.dumps(said))
  assert torch.equal(logits(), expected) and artifacts.load(out).routing == RoutingConfig("evict")
  for key, value in (("evict_from", 2), ("recent_tokens", 4)):
    (out / "ftp_config.json").write_text(json.dumps(said | {"routing": said["routing"] | {key: value}}))
    assert not torch.equal(logits(), expected)


def test_shards_of_any_name_are_read_and_strays_are_not(tmp_path):
  made, config = make("llama-gqa", RoutingConfig("evict"), RouterConfig())
  source = tmp_path / "source"
  hf = json.loads((pathlib.Path(directory_of("llama-gqa")) / "config.json").read_text())
  save_params(load_params(directory_of("llama-gqa"), config), config, source, hf, max_shard_bytes=50_000)
  index = source / "model.safetensors.index.json"
  described = json.loads(index.read_text())
  for name in set(described["weight_map"].values()):
    (source / name).rename(source / name.replace("model", "weights"))
  described["weight_map"] = {k: name.replace("model", "weights") for k, name in described["weight_map"].items()}
  index.write_text(json.dumps(described))
  letters(source)
  save_file({"stray": torch.zeros(1)}, source / "model.fp16.safetensors")
  artifacts.save(made, tmp_path / "artifact")
  out = pytorch.export(str(tmp_path / "artifact"), str(tmp_path / "out"), str(source), False)
  tokens = torch.tensor([prompts_of()[0]])
  expected = load_pruned(directory_of("llama-gqa"), out)(tokens).logits
  assert torch.equal(load_pruned(source, out)(tokens).logits, expected)
  index.write_text("{}")
  with pytest.raises(ValueError, match="index.json cannot be read .*; export or download it again"):
    load_pruned(source, out)


def test_weights_are_those_of_the_source_bit_for_bit_and_in_its_shards(tmp_path, capsys):
  made, config = make("llama-gqa", RoutingConfig("evict", evict_from=1), RouterConfig(), figures={"kl": 0.25})
  source = tmp_path / "source"
  hf = json.loads((pathlib.Path(directory_of("llama-gqa")) / "config.json").read_text())
  save_params(load_params(directory_of("llama-gqa"), config), config, source, hf, max_shard_bytes=50_000)
  letters(source)
  (source / "custom_code.py").write_text("raise SystemExit")
  artifacts.save(made, tmp_path / "artifact")
  flags = [f"--artifact={tmp_path / 'artifact'}", f"--model={source}"]
  capsys.readouterr()  # progress bars of the models made
  assert cli.main(["export", *flags, f"--out={tmp_path / 'new' / 'out'}", "--with-weights"]) == 0
  out = pathlib.Path(capsys.readouterr().out.strip())
  own = {"ftp_config.json", "router.safetensors", "torch_runtime.py", "README.md"}
  assert {file.name for file in out.iterdir()} - own == {file.name for file in source.iterdir()} - {"custom_code.py"}
  assert len(list(out.glob("model-*.safetensors"))) > 3
  for file in source.glob("*[!y]"):
    assert (out / file.name).read_bytes() == file.read_bytes()
  card = (out / "README.md").read_text()
  assert card.startswith("---\n") and "| kl | 0.25 |" in card and "0.3, 0.5, 0.6" in card
  assert "| evict from block 1 on |" in card and "| a skipped token | keeps its state |" in card
  with_maps = dataclasses.replace(made, stand_in=random_maps(config, 3, np.random.default_rng(0)))
  assert "| is moved by a linear map of rank 3 of the block |" in pytorch.card(with_maps, True)
  # The directory alone is enough, for both frameworks.
  model, engine = load_pruned(out), Engine.load(str(out), str(out), fallback="never")
  logits = model(torch.tensor([prompts_of()[0]])).logits[0, -1]
  expected = engine.prefill(prompts_of()[:1]).groups[0].prefilled.logits_BxV[0]
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
  # Without weights it is small.
  assert cli.main(["export", *flags, f"--out={tmp_path / 'small'}"]) == 0
  assert {file.name for file in (tmp_path / "small").iterdir()} == own
  assert sum(file.stat().st_size for file in (tmp_path / "small").iterdir()) < 60_000


def test_copying_weights_takes_no_memory(tmp_path):
  config = ModelConfig.from_hf(HF := dict(
      model_type="llama", vocab_size=400_000, hidden_size=128, intermediate_size=16, num_hidden_layers=1,
      num_attention_heads=2, tie_word_embeddings=True,
  ))
  zeros = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), decoder.abstract_params(config))
  save_params(zeros, config, tmp_path / "source", HF)
  router = RouterConfig()
  weights = jax.device_get(routers.init_router(router, jax.random.key(0), 1, 128))
  found = fingerprint(tmp_path / "source")
  made = artifacts.Artifact("big", found, "llama", (0.5,), RoutingConfig(), router, weights, {})
  artifacts.save(made, tmp_path / "artifact")
  code = (
      "import resource; from ftp_jax.export import pytorch\n"
      "for name, weights in (('small', False), ('whole', True)):\n"
      "  pytorch.export('artifact', name, 'source', weights)\n"
      "  print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
  )
  done = subprocess.run(
      [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
      env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  before, after = map(int, done.stdout.split())
  assert (tmp_path / "whole" / "model.safetensors").stat().st_size > 200_000_000
  assert after - before < 30_000  # KiB


def test_the_runtime_runs_from_the_directory_without_this_package(tmp_path):
  out = exported(tmp_path, "qwen3", RoutingConfig("evict"), RouterConfig(), with_weights=True)
  code = (
      "import sys; from torch_runtime import load_pruned; import torch\n"
      f"tokens = torch.tensor([{prompts_of()[0]}])\n"
      "print(load_pruned('out').generate(tokens, max_new_tokens=5, do_sample=False).tolist())\n"
      "print([name for name in ('jax', 'flax', 'ftp_jax') if name in sys.modules])"
  )
  done = subprocess.run(
      [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
      env=os.environ | {"PYTHONPATH": str(out)},
  )
  tokens = load_pruned(out).generate(torch.tensor([prompts_of()[0]]), max_new_tokens=5, do_sample=False)
  assert done.stdout.splitlines() == [str(tokens.tolist()), "[]"]


def test_nothing_else_of_the_package_imports_torch():
  imports = [
      str(file.relative_to(ROOT / "ftp_jax"))
      for file in sorted((ROOT / "ftp_jax").rglob("*.py"))
      if re.search(r"^\s*(import|from) torch\b", file.read_text(encoding="utf-8"), re.MULTILINE)
  ]
  assert imports == ["bench/torch_dense.py", "export/torch_runtime.py"]


# --- refusals ----------------------------------------------------------------------------------------


def edit(**changes):
  def damage(directory):
    file = directory / "ftp_config.json"
    described = json.loads(file.read_text())
    for path, value in changes.items():
      *outer, name = path.split("__")
      node = functools.reduce(lambda d, k: d[k], outer, described)
      node[name] = value
    file.write_text(json.dumps(described))

  return damage


def without(name):
  return lambda directory: (directory / name).unlink()


def cut(name):
  return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:-5])


DAMAGES = {
    "no config": (without("ftp_config.json"), "has no ftp_config.json"),
    "cut config": (cut("ftp_config.json"), "cannot be read"),
    "no object": (lambda d: (d / "ftp_config.json").write_text("[1]"), "cannot be read"),
    "no router": (without("router.safetensors"), "router.safetensors cannot be read"),
    "cut router": (cut("router.safetensors"), "router.safetensors cannot be read"),
    "newer": (edit(format_version=2), "format 2, but 1 is read here; update"),
    "jax layout": (edit(layout="flax"), "layout 'flax'; convert it with `ftp-jax export"),
    "unknown choice": (edit(routing__selection="threshold"), "selection"),
    "unknown kind": (edit(router__kind="tree"), "kind"),
    "unknown field": (edit(routing__temperature=2), "temperature"),
    "unknown factor": (edit(router__factors=["age"]), "age"),
    "number as text": (edit(routing__recent_tokens="32"), r"known here \(recent_tokens\)"),
    "number as bool": (edit(routing__one_pass_block=True), r"known here \(one_pass_block\)"),
    "bool as number": (edit(router__hidden_states=2), r"known here \(hidden_states\)"),
    "number out of range": (edit(routing__bucket_multiple=0), r"known here \(bucket_multiple\)"),
    "no number": (edit(routing__decode_sparsity=float("nan")), r"known here \(decode_sparsity\)"),
    "no such block": (edit(routing__one_pass_block=99), "'one_pass_block': 99, .* this model of . has not"),
    "same factor twice": (edit(router__factors=["rank", "rank"]), r"known here \(factors\)"),
    "one number for all": (edit(schedule=0.3), r"known here \(its schedule\)"),
    "a number in brackets": (edit(schedule=[[0.3], [0.5], [0.2]]), r"known here \(its schedule\)"),
    "bad schedule": (edit(schedule=[0.3, 1.1, 0.2]), "schedule"),
    "short schedule": (edit(schedule=[0.3, 0.2]), "schedule of 2 blocks do not fit"),
    "other router": (edit(router__hidden_size=65), "do not fit"),
    "other model": (edit(fingerprint="0" * 16), "made for org/tiny .fingerprint 0000000000000000."),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_runtime_refuses_in_one_sentence(damage, tmp_path):
  out = exported(tmp_path, "qwen2", RoutingConfig("evict"), RouterConfig())
  spoil, message = DAMAGES[damage]
  spoil(out)
  with pytest.raises(ValueError, match=message) as error:
    load_pruned(directory_of("qwen2"), out)
  assert "\n" not in str(error.value) and type(error.value) is ValueError


def test_the_runtime_refuses_models_that_do_not_fit(tmp_path):
  out = exported(tmp_path, "qwen2", RoutingConfig("evict"), RouterConfig())
  with pytest.raises(ValueError, match="load the base model it belongs to"):
    load_pruned(directory_of("qwen2-tied"), out)
  small = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=8)
  with pytest.raises(ValueError, match="model_type='gpt2' is not supported"):
    load_pruned(transformers.GPT2LMHeadModel(small), out)
  with pytest.raises(ValueError, match="as the second argument"):
    load_pruned(transformers.GPT2LMHeadModel(small))
  with pytest.raises(ValueError, match="org/tiny cannot be read .*; export or download it again") as error:
    load_pruned("org/tiny", out)  # no network
  assert "\n" not in str(error.value)
  (tmp_path / "empty").mkdir()
  shutil.copyfile(pathlib.Path(directory_of("qwen2")) / "config.json", tmp_path / "empty/config.json")
  with pytest.raises(ValueError, match="holds no model; pass the base model first"):
    load_pruned(tmp_path / "empty", out)
  with pytest.raises(ValueError, match="holds no model; pass the base model first"):
    load_pruned(out)
  shutil.copyfile(pathlib.Path(directory_of("qwen2")) / "model.safetensors", tmp_path / "empty/model.safetensors")
  (tmp_path / "empty/config.json").write_text("{")
  with pytest.raises(ValueError, match="cannot be read .*valid JSON") as error:
    load_pruned(tmp_path / "empty", out)
  assert "\n" not in str(error.value)
  spread = transformers.AutoModelForCausalLM.from_pretrained(directory_of("qwen2"))
  spread.hf_device_map = {"model": 0, "lm_head": 1}
  with pytest.raises(ValueError, match="several devices"):
    load_pruned(spread, out)


@pytest.mark.parametrize("damage", ["no config", "cut config", "no router", "cut router", "newer", "unknown choice"])
def test_jax_refuses_a_damaged_export_in_one_sentence(damage, tmp_path):
  out = exported(tmp_path, "qwen2", RoutingConfig("evict"), RouterConfig())
  DAMAGES[damage][0](out)
  with pytest.raises(UserError):
    artifacts.load(out)
  edit_layout = tmp_path / "layout"
  artifacts.save(make("qwen2", RoutingConfig("evict"), RouterConfig())[0], edit_layout, "torch")
  edit(layout="other")(edit_layout)
  with pytest.raises(UserError, match="layout 'other'"):
    artifacts.load(edit_layout)


def test_mistakes_of_the_command_are_one_sentence_and_leave_nothing(tmp_path, capsys, monkeypatch):
  artifacts.save(make("qwen2", RoutingConfig("evict"), RouterConfig())[0], tmp_path / "artifact")
  full = tmp_path / "full"
  full.mkdir()
  (full / "x").touch()
  monkeypatch.chdir(tmp_path)

  def mistake(*flags):
    capsys.readouterr()  # progress bars of the models made
    assert cli.main(["export", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("ftp-jax: ")
    return err

  assert "has no ftp_config.json" in mistake("--artifact=none", "--out=new")
  assert "not empty" in mistake("--artifact=artifact", "--out=full")
  assert "not empty" in mistake("--artifact=artifact", "--out=full/x")
  assert "'--fast' is not understood" in mistake("--artifact=artifact", "--out=new", "--fast")
  assert "'org/tiny'" in mistake("--artifact=artifact", "--out=new", "--with-weights")  # no network: no such model
  other = f"--model={directory_of('qwen3')}"
  assert "made for org/tiny" in mistake("--artifact=artifact", "--out=new", other)
  assert "cannot write" in mistake("--artifact=artifact", "--out=full/x/new")
  fits = f"--model={directory_of('qwen2')}"
  copy = shutil.copyfile

  def no_space(source, target):
    if str(source).endswith(".safetensors"):
      raise OSError(28, "No space left on device")
    return copy(source, target)

  monkeypatch.setattr(pytorch.shutil, "copyfile", no_space)
  assert "No space left on device" in mistake("--artifact=artifact", "--out=new", fits, "--with-weights")
  assert {path.name for path in tmp_path.iterdir()} == {"artifact", "full"}


def test_the_example_of_the_document_runs(tmp_path, monkeypatch, capsys):
  text = (ROOT / "docs" / "pytorch.md").read_text(encoding="utf-8")
  router = RouterConfig(hidden_states=True)
  source = tmp_path / "source"
  shutil.copytree(directory_of("llama-gqa"), source)
  config = json.loads((source / "config.json").read_text()) | {"vocab_size": 97}
  (source / "config.json").write_text(json.dumps(config))
  monkeypatch.chdir(tmp_path)
  artifacts.save(make("llama-gqa", RoutingConfig("project"), router)[0], "artifact")
  letters(source)
  commands = re.findall(r"^ftp-jax (export .*)$", text, re.MULTILINE)
  assert len(commands) == 2
  for command in commands:
    command = command.replace("runs/quickstart/S0.30/seed0/artifact", "artifact").replace("smollm2-135m", str(source))
    assert cli.main(command.split()) == 0
  shutil.copytree(source, tmp_path / "base")
  scope = {}
  blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  assert len(blocks) >= 3
  for block in blocks:
    exec(compile(block, "docs/pytorch.md", "exec"), scope)
  assert capsys.readouterr().out


def letters(directory):
  """A tokenizer of 97 tokens, one a character, into a model directory."""
  vocab = {chr(32 + i): i for i in range(95)} | {"<|end|>": 95, "\n": 96}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token=" "))
  backend.decoder = tokenizers.decoders.Fuse()
  made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
  made.save_pretrained(directory)
