"""Loads scripts of experiments/ as modules."""

import importlib.util
import pathlib
import types

from absl import flags


def load(name: str) -> types.ModuleType:
  """The module, without its flags: absl knows one of a name, and the scripts share names."""
  path = pathlib.Path(__file__).parent.parent / "experiments" / f"{name}.py"
  spec, before = importlib.util.spec_from_file_location(name, path), set(flags.FLAGS)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  flags.FLAGS.remove_flag_values(set(flags.FLAGS) - before)
  return module
