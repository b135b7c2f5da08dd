"""`ftp-jax compile-check`: whether a program fits a topology."""

import argparse
import json
import pathlib
from typing import Any

from ftp_jax.errors import UserError, check_target
from ftp_jax.fit import topologies

_GIB = 2**30


def run(arguments: argparse.Namespace) -> int:
  """Compiles and prints; returns 0 if it fits, 1 if not."""
  topologies.prepare()  # before jax is imported
  target = pathlib.Path(arguments.json) if arguments.json else None
  if target:
    check_target(target)

  import jax

  from ftp_jax.fit import compiling, programs

  jax.config.update("jax_platforms", "cpu")
  if arguments.program not in programs.PROGRAMS:
    raise UserError(f"--program={arguments.program} is unknown; choose one of {', '.join(programs.PROGRAMS)}.")
  model = _model(arguments.model)
  with compiling.captured():  # libtpu looks for the machine it runs on, and says that there is none
    devices = topologies.devices(arguments.topology)
  mesh = _mesh(arguments.mesh, devices)
  case = _case(arguments, model, mesh)
  programs.check(case, mesh)
  record = describe(arguments, case, mesh) | compiling.compile_case(case, mesh, arguments.topology)
  print(report(record))
  if target:
    target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
  return 0 if record["fits"] else 1


def describe(arguments: argparse.Namespace, case: Any, mesh: Any) -> dict[str, Any]:
  """What was asked, in plain values."""
  from ftp_jax.fit import programs

  own = {"search": {"candidates": case.candidates}} | {
      name: {"sparsity": case.sparsity, "shape": case.shape} for name in programs.SERVING
  }
  return {
      "model": arguments.model, "program": case.program, "topology": arguments.topology, "chips": mesh.size,
      "mesh": dict(mesh.shape), "batch": case.batch, "context": case.context, "scored": case.scored,
      "dtype": arguments.dtype, "remat": case.remat, "kv": case.kv_mode, "attention": case.attention,
      "stand_in": case.stand_in,
  } | own.get(case.program, {})


def _model(name: str) -> Any:
  from ftp_jax.models import architectures
  from ftp_jax.models.config import ModelConfig

  if name in architectures.ARCHITECTURES:
    return architectures.architecture(name)
  if pathlib.Path(name).is_dir():
    return ModelConfig.from_directory(name)
  raise UserError(
      f"--model={name} is neither a known architecture ({', '.join(architectures.ARCHITECTURES)}) nor a directory "
      "with a config.json."
  )


def _mesh(text: str | None, devices: list[Any]) -> Any:
  from ftp_jax import sharding
  from ftp_jax.fit import programs

  try:
    data, fsdp, tensor = map(int, text.split(",")) if text else programs.default_mesh(devices)
  except ValueError:
    raise UserError(f"--mesh={text} must be three numbers data,fsdp,tensor, for instance 1,16,1.") from None
  if -1 not in (data, fsdp, tensor) and data * fsdp * tensor != len(devices):
    raise UserError(
        f"--mesh={text} does not use the topology's {len(devices)} chips exactly; one size may be -1 for what is left."
    )
  return sharding.make_mesh(data, fsdp, tensor, devices=devices)


def _case(arguments: argparse.Namespace, model: Any, mesh: Any) -> Any:
  import jax

  from ftp_jax.fit import programs
  from ftp_jax.models.decoder import REMAT
  from ftp_jax.models.sources import DTYPES
  from ftp_jax.routing.config import RoutingConfig
  from ftp_jax.routing.masked import ATTENTIONS, choose_attention

  for name, known in (("dtype", DTYPES), ("remat", REMAT), ("kv", ("evict", "project")),
                      ("attention", (None, *ATTENTIONS[1:])), ("shape", programs.SHAPES)):
    if getattr(arguments, name) not in known:
      names = ", ".join(filter(None, known))
      raise UserError(f"--{name}={getattr(arguments, name)} is unknown; choose one of {names}.")
  attention = arguments.attention or "splash"
  if arguments.program not in programs.SERVING:  # an engine asks splash for what it can compute, and XLA for the rest
    with jax.set_mesh(mesh):  # what a run there would choose
      attention = choose_attention(
          arguments.attention or "auto", model, RoutingConfig(arguments.kv), arguments.context, backend="tpu"
      )
  return programs.Case(
      model, arguments.program, arguments.batch, arguments.context, dtype=DTYPES[arguments.dtype],
      remat=arguments.remat, kv_mode=arguments.kv, scored=arguments.scored, candidates=arguments.candidates,
      sparsity=arguments.sparsity, shape=arguments.shape, attention=attention, stand_in=arguments.stand_in,
  )


def report(record: dict[str, Any]) -> str:
  """The record in words."""
  gib = lambda size: f"{size / _GIB:.2f} GiB"
  mesh = ",".join(f"{name}={size}" for name, size in record["mesh"].items())
  lines = [
      f"{record['program']} of {record['model']} on {record['topology']} ({record['chips']} chips, {mesh}): "
      f"batch {record['batch']}, T {record['context']}, {record['dtype']}, {record['kv']}, attention "
      f"{record['attention']}, remat {record['remat']}"
      + (f", S = {record['sparsity']} {record['shape']}" if "sparsity" in record else "")
      + (f", maps of rank {record['stand_in']} for skipped blocks" if record["stand_in"] else "")
  ]
  if "memory" in record:
    held = record["memory"]
    verdict = "fits" if record["fits"] else "does not fit"
    lines.append(
        f"{verdict}: needs {gib(held['peak'])} of {gib(held['limit'])} a chip (arguments {gib(held['arguments'])}, "
        f"temporaries {gib(held['temporaries'])}, code {gib(held['code'])}"
        + (f", weights beside it {gib(held['beside'])})" if held["beside"] else ")")
    )
  elif record["needs"]:
    lines.append(f"does not fit: needs {gib(record['needs'])} of {gib(record['limit'])} a chip")
  else:
    lines.append(f"does not fit: needs more than the {gib(record['limit'])} of a chip")
  found = record["flops"]
  compared = f", {found['forwards']:.3f} dense forward passes" if "forwards" in found else ""
  compared += " a candidate" if record["program"] == "search" else ""
  lines.append(f"FLOPs: {found['step']:.4g} a step, {found['chip']:.4g} a chip{compared}")
  shapes = record["weight_gradients"]
  lines.append(f"products shaped like a weight of the frozen model: {shapes if shapes else 'none'}")
  if "memory" in record:
    if took := record.get("expected"):
      lines.append(
          f"expected by the compiler, not measured: {1e3 * took['seconds']:.3g} ms ({took['cycles']:.4g} cycles, "
          f"{took['without_estimate']:.0%} of them by bytes and peak alone), mostly"
      )
      for kind in took["dearest"]:
        lines.append(f"  {kind['share']:>6.1%} in {kind['count']:.0f}  {kind['origin'][:90]}")
    lines.append("collectives, bytes that a chip receives in a step:")
    for kind, total in sorted(record["collectives"].items(), key=lambda item: -item[1]["bytes"]):
      lines.append(f"  {kind:<20}{gib(total['bytes']):>12} in {total['count']:.0f}")
    if record["unknown_loops"]:
      lines.append(f"  not counted: how often {record['unknown_loops']} loops run, each taken once")
    lines.append("largest arrays of a chip beside its arguments:")
    for array in record["largest"]:
      lines.append(f"  {array['shape']:<28}{array['bytes'] / 2**20:>10.1f} MiB  {array['origin'][-60:]}")
    lines.append(f"involuntary full rematerializations: {record['involuntary_rematerializations']}")
    lines.append(f"compiled in {record['seconds']['compile']:.0f} s")
  return "\n".join(lines)
