"""Imports point downwards in the list of rooms that docs/architecture.md draws."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ftp_jax"


def rooms() -> list[str]:
  """Names as in the drawing, from the top: `cli`, `launch`, `pipeline`, ..."""
  drawing = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1].split("ftp_jax/\n")[1]
  lines = re.findall(r"^  ([^\s,]+(?:, [^\s,]+)*)", drawing, re.MULTILINE)
  return [name.removesuffix(".py").removesuffix("/") for line in lines for name in line.split(", ")]


def imported(path: pathlib.Path) -> set[str]:
  """Modules of this package that a file imports, anywhere in it, without the package's name."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return {name.removeprefix("ftp_jax.") for name in found if name.startswith("ftp_jax.")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
  known = rooms()
  own = path.relative_to(PACKAGE).with_suffix("").parts[0]
  if own not in known:
    assert own in ("__init__", "peers")  # the last is drawn with `distributed`
    return
  above = known[: known.index(own)]
  assert not {name for name in imported(path) if name.partition(".")[0] in above}
