"""Loads scripts of experiments/ as modules."""

import importlib.util
import pathlib
import sys
import types

from absl import flags


def load(name: str) -> types.ModuleType:
  """The module, without its flags: absl knows one of a name, and the scripts share names."""
  path = pathlib.Path(__file__).parent.parent / "experiments" / f"{name}.py"
  spec, before = importlib.util.spec_from_file_location(name, path), set(flags.FLAGS)
  module = importlib.util.module_from_spec(spec)
  sys.path.insert(0, str(path.parent))  # as Python does for a script, which may import others beside it
  try:
    spec.loader.exec_module(module)
  finally:
    sys.path.remove(str(path.parent))
  flags.FLAGS.remove_flag_values(set(flags.FLAGS) - before)
  return module
