"""The dense model as transformers runs it on torch, in a process of its own.

Its thread pool must neither share a process with ours nor be at work while ours is measured: the process
waits for a command, measures, answers and waits again.
"""

import copy
import importlib.util
import multiprocessing
import pathlib
import signal
import time
from typing import Any

from ftp_jax.errors import UserError


class TorchMissing(Exception):
  """torch or transformers cannot be imported."""


class TorchDense:
  """The process; a context manager.

  Attributes:
    info: torch version, threads and device.
  """

  def __init__(self, directory: pathlib.Path, dtype: str, gpu: bool):
    """
    Args:
      directory: of the model, in Hugging Face layout.
      dtype: "float32" or "bfloat16".
      gpu: run on CUDA if torch can.

    Raises:
      TorchMissing: there is no torch.
      UserError: the model does not load.
    """
    if importlib.util.find_spec("torch") is None:
      raise TorchMissing("torch is not installed")
    context = multiprocessing.get_context("spawn")
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs, str(directory), dtype, gpu), daemon=True)
    self._process.start()
    theirs.close()  # so that its death ends our waiting
    try:
      self.info = self._answer()
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> "TorchDense":
    return self

  def __exit__(self, *exception) -> None:
    self.close()

  def close(self) -> None:
    self._pipe.close()
    self._process.join(timeout=10)
    self._process.terminate()

  def call(self, name: str, *arguments: Any) -> Any:
    """Runs a method of `_Worker` there; waits for its result. UserError if it fails."""
    self._pipe.send((name, arguments))
    return self._answer()

  def describe(self) -> dict[str, Any]:
    """What records say of it."""
    return {"method": "torch_dense", "device": self.info["device"]}

  def _answer(self) -> Any:
    try:
      status, value = self._pipe.recv()
    except EOFError:
      status, value = "failed", "the process ended"
    if status == "missing":
      raise TorchMissing(value)
    if status == "failed":
      raise UserError(f"torch_dense could not be measured ({value}); pass --no-torch to leave it out.")
    return value


def _serve(pipe, directory: str, dtype: str, gpu: bool) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the command, whose end of the pipe then closes
  try:
    try:
      worker = _Worker(directory, dtype, gpu)
    except ImportError as error:
      pipe.send(("missing", str(error)))
      return
    pipe.send(("done", worker.info))
    while True:
      name, arguments = pipe.recv()
      pipe.send(("done", getattr(worker, name)(*arguments)))
  except (EOFError, BrokenPipeError):
    pass
  except Exception as error:
    pipe.send(("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))


class _Worker:
  """Runs in the process."""

  def __init__(self, directory: str, dtype: str, gpu: bool):
    import torch
    import transformers

    from ftp_jax.export.torch_runtime import CACHE

    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")  # on GPUs TF32, which is jax's default there; no change elsewhere
    self.torch, self.device, self.cache = torch, device, CACHE
    self.model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="sdpa", use_safetensors=True
    ).to(device).eval()
    self.info = {"torch": torch.__version__, "torch_threads": torch.get_num_threads(), "device": device}

  def _ready(self) -> float:
    """The time when all that was asked of the device is done."""
    if self.device == "cuda":
      self.torch.cuda.synchronize()
    return time.perf_counter()

  def _run(self, tokens, past=None):
    """The logits behind `tokens`, and the cache with them in it."""
    out = self.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{self.cache: past})
    return out.logits, getattr(out, self.cache)

  def _tokens(self, tokens_BxT):
    return self.torch.as_tensor(tokens_BxT).long().to(self.device)

  def prefill(self, tokens_BxT) -> float:
    """Seconds to the last token's logits and the cache."""
    with self.torch.inference_mode():
      tokens = self._tokens(tokens_BxT)
      start = self._ready()
      self._run(tokens)
      return self._ready() - start

  def start(self, tokens_BxT) -> int:
    """Prefills for `decode`; bytes of the cache."""
    with self.torch.inference_mode():
      logits, self.past = self._run(self._tokens(tokens_BxT))
      self.first = logits[:, -1].argmax(-1, keepdim=True)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.past.layers)

  def decode(self, steps: int) -> float:
    """Seconds of `steps` greedy steps, each time from the same prefill."""
    with self.torch.inference_mode():
      past, token = copy.deepcopy(self.past), self.first
      start = self._ready()
      for _ in range(steps):
        logits, past = self._run(token, past)
        token = logits[:, -1].argmax(-1, keepdim=True)
      return self._ready() - start
