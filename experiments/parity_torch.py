"""Shows that a trained artifact does in PyTorch what it does in JAX, and what time it saves there.

  python experiments/parity_torch.py --artifact=runs/NAME/S0.30/seed0/artifact --part=exact --prompts=FILE
  python experiments/parity_torch.py --artifact=runs/NAME/S0.30/seed0/artifact --part=speed --prompts=FILE
  python experiments/parity_torch.py --artifact=... --part=rounding --context=400 --prompts=FILE

The artifact is exported with its weights and loaded by `export.torch_runtime`. `exact` compares routes, logits of
prefill and of every decode step of the engine, and greedy generations of a left-padded batch; its flags and prompts are
those of exactness.py. So that a difference can be told from rounding, it also says how far JAX and torch, pruned and
dense, are from the logits in fp64. `speed` prefills one row of `--context` tokens, prompts one behind the other: the
dense model as transformers runs it, and pruned in both kv modes, in turns; the ideal is the ratio of FLOPs. `rounding`
says which operations of the dense model make the difference from fp64.

JAX's products round less with JAX_DEFAULT_MATMUL_PRECISION=highest in the environment (docs/pytorch.md).

SmolLM2-135M, S = 0.30, fp32, 2 CPU cores, torch 2.13. `exact` so, three seeds of --config=smollm2_135m_mixed without
maps (Fisher schedule, guide_stakes=0), 32 prompts, 64 tokens, six minutes each: routes and generations of all 32
identical, largest logit difference over all steps 8.1e-5 to 8.5e-5, of logits up to 44. `speed` (a searched artifact),
2,048 tokens, a minute: evict 1.37 times as fast as dense (ideal 1.41), project 1.34 (1.34).
"""

import collections
import dataclasses
import functools
import itertools
import json
import tempfile
import time

import exactness
import jax
import numpy as np
import torch
import transformers
from absl import flags
from torch.nn import functional

from ftp_jax import launch
from ftp_jax.bench.timing import interleave, speedup
from ftp_jax.data.records import check_file
from ftp_jax.evaluation.flops import prefill_flops
from ftp_jax.export import artifact as artifacts
from ftp_jax.export import pytorch
from ftp_jax.export.torch_runtime import load_pruned
from ftp_jax.inference import Engine
from ftp_jax.models import decoder
from ftp_jax.models.config import ModelConfig
from ftp_jax.models.rope import rope_frequencies
from ftp_jax.models.tokenizer import load_tokenizer
from ftp_jax.routing.cache import empty_recent
from ftp_jax.routing.config import KV_MODES

_PART = flags.DEFINE_enum("part", "exact", ["exact", "rounding", "speed"], "What to show.")
_CONTEXT = flags.DEFINE_integer("context", 2048, "Tokens of `speed` and `rounding`.")
_RUNS = flags.DEFINE_integer("runs", 5, "Measurements of each method.")


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
  """Token ids and attention mask (B,T) as a tokenizer with padding_side="left" gives them."""
  longest = max(map(len, prompts))
  pad = lambda row, fill: [fill] * (longest - len(row)) + row
  return {
      "input_ids": torch.tensor([pad(row, 0) for row in prompts]),
      "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in prompts]),
  }


def in_fp64(directory: str):
  """The dense model in fp64 throughout; transformers computes norms and rotary angles in fp32 whatever the dtype."""
  base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
  for module in base.modules():
    if type(module).__name__.endswith("RMSNorm"):
      module.forward = lambda x, m=module: functional.rms_norm(x, m.weight.shape, m.weight, m.variance_epsilon)
  frequencies = base.model.rotary_emb.inv_freq.float()

  def rotary(x, position_ids):
    # The angles themselves are defined in fp32 in both frameworks; their sine and cosine are exact here.
    angle = (position_ids[..., None].float() * frequencies).double().repeat(1, 1, 2)
    return angle.cos(), angle.sin()

  base.model.rotary_emb.forward = rotary
  return base


def apart(a, b) -> tuple[float, float, int]:
  """Largest and mean difference of the logits (T,V) of some steps, and how many steps have one above 1e-4."""
  difference = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
  return difference.max(), difference.mean(), int((difference.max(axis=-1) > 1e-4).sum())


@functools.partial(jax.jit, static_argnames=("spec", "plan"))
def decode_steps(spec, plan, weights, cache, tokens_NxB):
  """Logits (N,B,V) after each of N given tokens, one step of the decode loop each."""

  def step(recent, token_B):
    out = spec.extend(plan, weights, cache, recent, token_B[:, None])
    return out.recent, decoder.unembed(spec.model, weights.params, out.hidden_BxCxD[:, 0])

  steps, batch = tokens_NxB.shape
  return jax.lax.scan(step, empty_recent(spec.model, batch, max(steps, 1), spec.dtype), tokens_NxB)[1]


def decoded(engine: Engine, prompts: list[list[int]], new_BxN: np.ndarray) -> np.ndarray:
  """Logits (B,N,V) that predict N given tokens after each prompt: one prefill, then single steps of the decode loop."""
  (group,) = engine.prefill(prompts).groups
  later = decode_steps(group.spec, group.plan, group.weights, group.prefilled.cache, new_BxN.T[:-1])
  later = np.asarray(later).swapaxes(0, 1)
  return np.concatenate([np.asarray(group.prefilled.logits_BxV)[:, None], later], axis=1)


def exact(directory: str, engine: Engine, prompts: list[list[int]], new_tokens: int) -> dict:
  """Figures over all prompts; `engine` must not fall back."""
  base, base64 = transformers.AutoModelForCausalLM.from_pretrained(directory), in_fp64(directory)
  model, model64 = load_pruned(base, directory), load_pruned(base64, directory)
  prefix = engine.prefill(prompts)
  (group,) = prefix.groups
  expected = [list(generation.tokens) for generation in engine.generate(prefix, new_tokens, stop_tokens=())]
  out = model.generate(
      **left_padded(prompts), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
      return_dict_in_generate=True, output_logits=True,
  )
  found = out.sequences[:, -new_tokens:].tolist()
  logits = torch.stack(out.logits, dim=1).numpy()
  keep, routes = np.asarray(group.prefilled.cache.keep_LxBxT), out.past_key_values.keep_LxBxT.numpy()
  context = np.array([len(p) for p in prompts], np.int32)
  length = context + new_tokens
  tokens = np.zeros((len(prompts), length.max()), np.int32)
  for row, prompt, new in zip(tokens, prompts, found):
    row[: len(prompt) + new_tokens] = prompt + new
  dense_engine = Engine(engine.model)

  # Every step, from the prompt's last token on, of our engine, of torch and of torch in fp64, on the same tokens; a few
  # rows at a time, as all their logits are held.
  differences, same_routes64 = collections.defaultdict(list), 0
  for at in range(0, len(prompts), 4):
    rows = slice(at, at + 4)
    inputs = tokens[rows], context[rows], length[rows]
    pruned, dense = (decoded(one, prompts[rows], np.array(found[rows], np.int32)) for one in (engine, dense_engine))
    with torch.inference_mode():
      ids, contexts, lengths = map(torch.from_numpy, inputs)
      present = torch.arange(ids.shape[1])[None] < lengths[:, None]
      out64 = model64(ids, attention_mask=present, context_length=contexts)
      dense_torch, dense64 = base(ids).logits, base64(ids).logits
    routes64 = out64.past_key_values.keep_LxBxT.numpy()
    for b, m in enumerate(context[rows]):
      same_routes64 += np.array_equal(routes64[:, b, :m], keep[:, at + b, :m])
      scored = slice(m - 1, m - 1 + new_tokens)
      for name, ours, theirs, exactly in (
          ("pruned", pruned[b], logits[at + b], out64.logits[b, scored]),
          ("dense", dense[b], dense_torch[b, scored], dense64[b, scored]),
      ):
        differences[name, "jax_torch"].append(apart(ours, theirs))
        differences[name, "jax_fp64"].append(apart(ours, exactly))
        differences[name, "torch_fp64"].append(apart(theirs, exactly))
  figures = collections.defaultdict(dict)
  for (name, between), found_of_rows in differences.items():
    largest, mean, steps = zip(*found_of_rows)
    figures[name][between] = {
        "largest": float(max(largest)), "mean": float(np.mean(mean)), "steps_above_1e-4": sum(steps),
        "prompts_above_1e-4": sum(map(bool, steps)),
    }
  same_routes = [np.array_equal(keep[:, b, :m], routes[:, b, :m]) for b, m in enumerate(context)]
  kept = sum(keep[:, b, :m].sum() for b, m in enumerate(context))
  return {
      "prompts": len(prompts),
      "new_tokens": new_tokens,
      "identical_routes": sum(same_routes),
      "identical_routes_of_fp64": int(same_routes64),
      "identical_generations": sum(a == b for a, b in zip(expected, found)),
      "largest_prefill_logit_difference": float(np.abs(np.asarray(group.prefilled.logits_BxV) - logits[:, 0]).max()),
      "logit_differences_of_all_steps": figures,
      "largest_logit": float(np.abs(logits).max()),
      "skipped": float(1 - kept / (len(keep) * context.sum())),
      "kv_mode": group.spec.routing.kv,
  }


def rounding(directory: str, tokens_BxT: torch.Tensor) -> dict:
  """Relative error (root mean square) of single operations in fp32, on the inputs that they get in the fp64 model."""
  base, base64 = transformers.AutoModelForCausalLM.from_pretrained(directory), in_fp64(directory)
  product = jax.jit(decoder.product)
  errors = collections.defaultdict(lambda: collections.defaultdict(list))

  def measure(name, module, inputs):
    x, weight = inputs[0].float(), module.weight.float()
    exactly, arrays = module.forward(x.double()).numpy(), (x.numpy(), weight.numpy().T.copy())
    if isinstance(module, torch.nn.Linear):
      found = {}
      for name_of, precision in (("jax", None), ("jax_highest", "highest")):
        with jax.default_matmul_precision(precision):
          found[name_of] = product(*arrays)
    else:
      norm = decoder.RMSNorm(module.variance_epsilon)
      found = {"jax": norm.apply({"params": {"scale": arrays[1]}}, arrays[0])}
    found["torch"] = base.get_submodule(name)(x).numpy()
    for side, y in found.items():
      error = np.linalg.norm(np.asarray(y, np.float64) - exactly) / np.linalg.norm(exactly)
      errors[name.rpartition(".")[2]][side].append(error)

  for name, module in base64.named_modules():
    if isinstance(module, torch.nn.Linear) or type(module).__name__.endswith("RMSNorm"):
      module.register_forward_pre_hook(functools.partial(measure, name))
  with torch.inference_mode():
    base64(tokens_BxT)
  config = ModelConfig.from_directory(directory)
  same = np.array_equal(rope_frequencies(config), base.model.rotary_emb.inv_freq.numpy())
  means = {op: {side: float(np.mean(e)) for side, e in sides.items()} for op, sides in errors.items()}
  return {"tokens": tokens_BxT.shape[1], "identical_rotary_frequencies": same, "relative_errors": means}


class TorchPrefill:
  """Time to the last token's logits and the cache; a `bench.timing.Method`."""

  def __init__(self, name: str, model, tokens_BxT: torch.Tensor):
    self.name, self.model, self.tokens_BxT, self.cache = name, model, tokens_BxT, None

  def measure(self) -> float:
    with torch.inference_mode():
      start = time.perf_counter()
      self.cache = self.model(input_ids=self.tokens_BxT, use_cache=True, logits_to_keep=1).past_key_values
      return time.perf_counter() - start


def speed(directory: str, tokens_BxT: torch.Tensor, runs: int) -> dict:
  """Medians of interleaved prefills, and each speedup beside the ideal by the FLOPs of the routes taken."""
  base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa").eval()
  config, artifact = ModelConfig.from_directory(directory), artifacts.load(directory)
  context = tokens_BxT.shape[1]
  methods = [TorchPrefill("dense", base, tokens_BxT)]
  for kv_mode in KV_MODES:
    pruned = load_pruned(base, directory)
    pruned.pruning.routing = pruned.pruning.routing | {"kv_mode": kv_mode, "evict_from": 0}
    methods.append(TorchPrefill(kv_mode, pruned, tokens_BxT))
  seconds = interleave(methods, runs, f"prefill of {context} tokens")
  figures = {"context": context, "torch": torch.__version__, "threads": torch.get_num_threads()}
  figures["dense_seconds"] = sorted(seconds[0])
  flops = lambda keep, kv_mode, router=None: prefill_flops(
      config, keep, context, dataclasses.replace(artifact.routing, kv_mode=kv_mode, evict_from=0), router
  )
  rank = 0 if artifact.stand_in is None else artifact.stand_in["down"].shape[-1]
  moved = lambda keep: 4.0 * config.hidden_size * rank * np.sum(~keep[:-1])  # maps of tokens that skip, and no others
  for method, own in zip(methods[1:], seconds[1:]):
    keep = method.cache.keep_LxBxT[:, 0].numpy()
    routed = flops(keep, method.name, artifact.router) + moved(keep)
    ideal = flops(np.ones_like(keep), method.name) / routed
    found = speedup(own, seconds[0])
    figures[method.name] = {
        "seconds": sorted(own), "skipped": float(1 - keep.mean()), "speedup": found, "ideal_speedup": ideal,
        "share_of_ideal": found / ideal, "cache_bytes": method.cache.nbytes,
    }
  figures["dense_cache_bytes"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in methods[0].cache.layers)
  return figures


def main() -> None:
  options = flags.FLAGS
  check_file(options.prompts)
  with tempfile.TemporaryDirectory() as directory:
    pytorch.export(options.artifact, directory, options.model, with_weights=True)
    tokenizer = load_tokenizer(directory)
    read = lambda count: exactness.read_prompts(options.prompts, tokenizer, count, options.longest)
    text = lambda: torch.tensor([list(itertools.chain(*read(_CONTEXT.value // 16)))[: _CONTEXT.value]])
    if _PART.value == "speed":
      figures = speed(directory, text(), _RUNS.value)
    elif _PART.value == "rounding":
      figures = rounding(directory, text())
    else:
      engine = Engine.load(directory, directory, fallback="never")
      figures = exact(directory, engine, read(options.count), options.new_tokens)
  precision = jax.config.jax_default_matmul_precision or "default"
  figures = {"artifact": options.artifact, "part": _PART.value, "jax_matmul_precision": precision, **figures}
  print(json.dumps(figures, indent=2))
  if options.json:
    with open(options.json, "w", encoding="utf-8") as file:
      json.dump(figures, file, indent=2)


if __name__ == "__main__":
  launch.script(main)
