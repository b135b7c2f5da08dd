"""Run configs, the keys of the base config, and the large models by abstract evaluation."""

import ast
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from ftp_jax import launch
from ftp_jax.config import get_config, needs_gate_scores
from ftp_jax.data.records import embedded_documents
from ftp_jax.errors import UserError
from ftp_jax.models import decoder
from ftp_jax.models.architectures import ARCHITECTURES, architecture
from ftp_jax.pipeline import checks
from ftp_jax.routing import routers, stand_in
from ftp_jax.routing.config import RouterConfig, RoutingConfig
from ftp_jax.search.genetic import SearchSettings
from ftp_jax.training import step
from ftp_jax.training.fisher import gate_fisher

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = ROOT / "ftp_jax" / "config.py"
CONFIGS = (
    "llama2_13b", "llama2_7b", "llama2_7b_stand_in", "llama3_8b", "paper_smollm2_135m", "quickstart", "qwen1_5_7b",
    "qwen2_5_coder_0_5b", "smollm2_135m", "smollm2_135m_late", "smollm2_135m_late_more", "smollm2_135m_long",
    "smollm2_135m_long_stand_in", "smollm2_135m_mixed", "smollm2_135m_stand_in",
)
LARGE = {"llama2-7b": 6.74e9, "llama2-13b": 13.02e9, "llama3-8b": 8.03e9, "qwen1.5-7b": 7.72e9}
KEYS = sorted(launch.keys(get_config()))


def test_the_configs_that_are_there():
  assert tuple(launch.config_names()) == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_config_loads_is_locked_and_changes_only_known_keys(name):
  config, _ = launch.load_config(name, None, [])
  assert sorted(launch.keys(config)) == KEYS
  assert config.is_locked
  with pytest.raises(AttributeError):
    config.train.nothing = 1
  with pytest.raises(UserError, match="no key 'train.nothing'"):
    launch.load_config(name, None, ["--config.train.nothing=1"])


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_within_range(name):
  """What the modules that read a config would refuse at the start of a run."""
  config, _ = launch.load_config(name, None, [])
  checks.check_config(config)
  SearchSettings.from_config(config.search)
  step.TrainSettings.from_config(config.train)
  RoutingConfig(**config.routing)
  RouterConfig(config.router.kind, tuple(config.router.factors), config.router.hidden_states, config.router.hidden_size)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_without_a_text_asks_for_no_more_perplexity_windows_than_the_embedded_one_has(name):
  evaluation = launch.load_config(name, None, [])[0].evaluation
  if not evaluation.perplexity_path:
    letters = len("\n\n".join(embedded_documents(held=True)))
    assert letters / 5 > evaluation.perplexity_windows * evaluation.perplexity_length  # a token is some four of English


@pytest.mark.parametrize("name", CONFIGS)
def test_header_gives_command_time_and_result(name):
  header = ast.get_docstring(ast.parse((ROOT / "experiments" / "configs" / f"{name}.py").read_text()))
  assert f"ftp-jax run --config={name} --workdir=runs/{name}" in header
  said = re.search(r"^Wall time.*esult: .*", header, re.M | re.S)[0]
  assert re.search(r"\d", said) or "not run" in said


def test_every_key_has_a_comment():
  described = set()
  for line in CONFIG.read_text().splitlines():
    if match := re.match(r"  c\.([\w.]+) = .*[^ ]  # \w..", line):
      described.add(match.group(1))
  assert described == set(KEYS)


def _name(node: ast.AST) -> str:
  return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _aliases(function: ast.AST) -> dict[str, str]:
  """Local names of config sections: {"c": "search"} where a function says `c = self.config.search`."""
  found = {}
  for node in ast.walk(function):
    if isinstance(node, ast.Assign):
      target, value = node.targets[0], node.value
      unpacked = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
      pairs = zip(target.elts, value.elts) if unpacked else [(target, value)]
      found |= {t.id: v.attr for t, v in pairs if isinstance(t, ast.Name) and isinstance(v, ast.Attribute)}
  return found


def _reads() -> set[tuple[str, str]]:
  """(section, key or pattern of keys) of every read in ftp_jax, found in the syntax trees."""
  trees = [ast.parse(path.read_text()) for path in (ROOT / "ftp_jax").rglob("*.py") if path != CONFIG]
  nodes = [node for tree in trees for node in ast.walk(tree)]
  loads = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
  found = {(_name(node.value), node.attr) for node in loads}
  settings = {attr for name, attr in found if name in ("settings", "self")}
  for node in nodes:
    if isinstance(node, ast.FunctionDef):
      aliases = _aliases(node)
      inner = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
      found |= {(aliases[_name(n.value)], n.attr) for n in inner if _name(n.value) in aliases}
    elif isinstance(node, ast.ClassDef):
      # A dataclass made of a section by its field names: a field counts if something reads it.
      makers = [f.args.args[1].arg for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "from_config"]
      fields = {f.target.id for f in node.body if isinstance(f, ast.AnnAssign)}
      found |= {(maker.removesuffix("_config"), name) for maker in makers for name in fields & settings}
      if node.name == "RoutingConfig":  # the section itself: what its methods read, but for those that only check
        functions = [f for f in node.body if isinstance(f, ast.FunctionDef)]
        methods = [f for f in functions if f.name not in ("__post_init__", "check_blocks")]
        inner = [n for f in methods for n in ast.walk(f) if isinstance(n, ast.Attribute)]
        found |= {("routing", n.attr) for n in inner if _name(n.value) == "self"}
    elif isinstance(node, ast.Call) and _name(node.func) == "getattr" and isinstance(node.args[1], ast.JoinedStr):
      parts = (re.escape(part.value) if isinstance(part, ast.Constant) else r"\w+" for part in node.args[1].values)
      found.add((_name(node.args[0]), "".join(parts)))
  return found


READS = _reads()


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_read(key):
  """As `section.key`, whatever object the section hangs on; keys of no section as `config.key`."""
  section, _, name = key.rpartition(".")
  assert any(where == (section or "config") and re.fullmatch(pattern, name) for where, pattern in READS)


def test_unknown_architecture_is_refused():
  with pytest.raises(UserError, match="no architecture is known as 'gpt2'; known are smollm2-135m, llama2-7b"):
    architecture("gpt2")


def test_models_of_the_configs():
  sources = {launch.load_config(name, None, [])[0].model.source for name in CONFIGS}
  assert sources == {
      "smollm2-135m", "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf", "meta-llama/Meta-Llama-3-8B",
      "Qwen/Qwen1.5-7B", "Qwen/Qwen2.5-Coder-0.5B-Instruct",
  }
  assert set(ARCHITECTURES) == {"smollm2-135m", *LARGE}


@pytest.mark.parametrize("name, count", [("smollm2-135m", 134_515_008), *LARGE.items()])
def test_parameter_count(name, count):
  leaves = jax.tree.leaves(decoder.abstract_params(architecture(name)))
  assert sum(leaf.size for leaf in leaves) == pytest.approx(count, rel=0.01)


@pytest.mark.parametrize("name, maps", [*((name, "") for name in LARGE), ("llama2-7b", "_stand_in")])
def test_full_size_model_by_abstract_evaluation(name, maps):
  """Dense pass, gate scores and one training step, with the settings of the model's own run config."""
  run, _ = launch.load_config(name.replace("-", "_").replace(".", "_") + maps, None, [])
  config = architecture(name)
  dtype = {"bfloat16": jnp.bfloat16}[run.model.dtype]
  params = decoder.abstract_params(config, dtype)
  batch, positions = run.train.batch, run.data.max_context + run.data.continuation
  tokens = jax.ShapeDtypeStruct((batch, positions), jnp.int32)
  lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
  scores = jax.ShapeDtypeStruct((config.num_blocks, batch, positions), jnp.float32)
  schedule = jax.ShapeDtypeStruct((config.num_blocks,), jnp.float32)
  routing = RoutingConfig(**run.routing)

  dense = jax.eval_shape(lambda p, t, n: decoder.forward(config, p, t, n, dtype=dtype), params, tokens, lengths)
  assert dense.shape == (batch, positions, config.hidden_size) and dense.dtype == dtype

  fisher = lambda params, tokens, context, length: gate_fisher(
      config, routing, params, tokens, context, length, jax.random.key(0), num_scored=run.data.continuation,
      draws=run.train.fisher_draws, dtype=dtype,
  )
  assert jax.eval_shape(fisher, params, tokens, lengths, lengths).shape == scores.shape

  router_config = RouterConfig(
      run.router.kind, tuple(run.router.factors), run.router.hidden_states, run.router.hidden_size
  )
  settings = step.TrainSettings.from_config(run.train)
  spec = step.StepSpec(
      config, routing, router_config, settings, run.data.continuation, start=8, dtype=dtype, remat=run.model.remat
  )
  rank, size = run.stand_in.rank, config.hidden_size
  shapes = {"bias": (size,), "down": (size, rank), "up": (rank, size)}
  zeros = lambda: {name: jnp.zeros((config.num_blocks, *shape)) for name, shape in shapes.items()}
  state = jax.eval_shape(
      lambda key: step.init_state(
          settings, stand_in.join(
              routers.init_router(router_config, key, config.num_blocks, config.hidden_size), zeros() if rank else None
          )
      ),
      jax.random.key(0),
  )
  inputs = len(run.router.factors) + config.hidden_size
  a_block = (inputs + 1) * 64 + 65 * 2 + (size * (2 * rank + 1) if rank else 0)
  assert sum(leaf.size for leaf in jax.tree.leaves(state.router)) == config.num_blocks * a_block
  assert bool(rank) == bool(maps)
  rows = step.Batch(tokens, lengths, lengths, scores)
  after, metrics = jax.eval_shape(lambda *args: step.train_step(spec, *args), params, state, rows, schedule)
  shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
  assert shapes(after) == shapes(state)
  assert metrics["loss"].shape == () and metrics["achieved"].shape == (config.num_blocks,)


@pytest.mark.parametrize("guide, schedule, seeds, needed", [
    ("fisher", "late", ("late",), True), ("static", "fisher", ("late",), True),
    ("static", "ga", ("late", "fisher"), True), ("static", "ga", ("late",), False),
    ("static", "late", ("late", "fisher"), False),  # nothing is searched from these
])
def test_gate_scores_are_made_where_something_reads_them(guide, schedule, seeds, needed):
  config = get_config()
  config.train.guide, config.search.schedule, config.search.seed_schedules = guide, schedule, seeds
  assert needs_gate_scores(config) is needed
