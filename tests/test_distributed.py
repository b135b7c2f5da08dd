"""Several processes: how they find each other, agree, lose each other, are stopped; kills that leave no trace."""

import importlib.util
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from ftp_jax import cli, distributed
from ftp_jax.distributed import Launch, Stopped
from ftp_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
_SPEC = importlib.util.spec_from_file_location("survival", ROOT / "experiments" / "survival.py")
survival = importlib.util.module_from_spec(_SPEC)
sys.modules["survival"] = survival  # dataclasses look it up
_SPEC.loader.exec_module(survival)


# --- how the processes find each other ---------------------------------------------------------


@pytest.mark.parametrize("arguments, message", [
    (dict(coordinator="a:1"), "all of --coordinator, --num-processes and --process-id"),
    (dict(num_processes=2, process_id=0), "all of --coordinator"),
    (dict(coordinator="a", num_processes=2, process_id=0), "must be HOST:PORT"),
    (dict(coordinator="a:1", num_processes=2, process_id=2), "--process-id=2 must lie between 0 and .* = 1"),
    (dict(coordinator="a:1", num_processes=2, process_id=0, mode="off"), "contradicts"),
    (dict(mode="yes"), "none of auto, on and off"),
    (dict(peer_timeout=0), "--peer-timeout must be at least"),
])
def test_contradicting_flags_are_one_sentence(arguments, message):
  with pytest.raises(UserError, match=message) as caught:
    Launch(**arguments)
  assert "\n" not in str(caught.value)


def test_flags_reach_the_launch_and_mistakes_the_user(monkeypatch, capsys, tmp_path):
  made = []

  def alone(launch, _):
    made.append(launch)
    raise UserError("enough.")

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(distributed, "together", alone)
  flags = ["--coordinator=host:99", "--num-processes=3", "--process-id=1", "--peer-timeout=7", "--start-timeout=9"]
  assert cli.main(["train", *flags]) == 2
  assert cli.main(["run", "--distributed=on"]) == 2
  assert cli.main(["report"]) == 2
  assert made == [Launch("host:99", 3, 1, "auto", 7, 9), Launch(mode="on"), Launch(mode="off")]
  capsys.readouterr()
  assert cli.main(["run", "--process-id=1"]) == 2
  assert capsys.readouterr().err == (
      "ftp-jax: give all of --coordinator, --num-processes and --process-id, or none of them.\n"
  )


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[01-04]", "SLURM_NTASKS": "4", "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
TPU = {"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "1"}
TPU["MEGASCALE_NUM_SLICES"] = "1"  # or jax asks the cloud


@pytest.mark.parametrize("environment, tpu, count", [
    ({}, False, 1), (SLURM, False, 4), (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, False, 1), (TPU, True, 2),
    (TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}, True, 1), (TPU, False, 1),
    ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:9", "OMPI_COMM_WORLD_SIZE": "3"}, False, 3),
])
def test_the_environment_says_how_many_processes_there_are(monkeypatch, environment, tpu, count):
  from jax._src.clusters import cloud_tpu_cluster

  calls = []
  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", tpu)
  monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments) or 1 / 0)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  if count == 1:
    with distributed.together(Launch(), cli.outcome):
      assert distributed.num_processes() == 1
  else:
    with pytest.raises(ZeroDivisionError), distributed.together(Launch(peer_timeout=9), cli.outcome):
      pass
  expected = dict(initialization_timeout=310, heartbeat_timeout_seconds=9, shutdown_timeout_seconds=9)
  assert calls == ([] if count == 1 else [expected])  # jax fills in the rest
  with distributed.together(Launch(mode="off"), cli.outcome):
    pass
  assert len(calls) == (count > 1)


def test_alone_everything_is_a_plain_call():
  assert distributed.from_first(lambda: b"x") == b"x"
  np.testing.assert_array_equal(distributed.of_first(np.arange(3.0)), np.arange(3.0))
  distributed.barrier()
  with pytest.raises(UserError, match="no"), distributed.stoppable():
    distributed.on_first(lambda: (_ for _ in ()).throw(UserError("no")))


# --- processes of a run ------------------------------------------------------------------------


def start(body: str, count: int = 2, timeout: int = 3):
  """Processes that run `body` (which knows `i`, `d` for distributed and `UserError`) together."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  program = f"""
import os, signal, sys, time
from ftp_jax import cli, distributed as d
from ftp_jax.errors import UserError
i = int(sys.argv[1])
launch = d.Launch("localhost:{port}", {count}, i, peer_timeout={timeout}, start_timeout=120)
try:
  with d.together(launch, cli.outcome):
    d.barrier()
{chr(10).join("    " + line for line in body.strip().splitlines())}
except UserError as error:
  sys.exit(str(error))
os.write(1, b"left in order")
"""
  environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
  return [
      subprocess.Popen([sys.executable, "-c", program, str(i)], env=environment, text=True, stdout=subprocess.PIPE,
                       stderr=subprocess.PIPE)
      for i in range(count)
  ]


def ends(processes, timeout=120):
  """(status, stdout, stderr) of each."""
  try:
    texts = [process.communicate(timeout=timeout) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *text) for process, text in zip(processes, texts)]


def test_processes_agree_and_only_the_first_prints():
  found = ends(start(
      """
import numpy as np, tqdm
print("printed by", i)
for _ in tqdm.tqdm(range(3), desc=f"bar of {i}"): pass
big = d.from_first(lambda: bytes(range(256)) * 10_000)
assert big == bytes(range(256)) * 10_000
for n in range(20):
  assert d.of_first(np.array([i + n, 0.5])).tolist() == [n, 0.5]
try:
  d.on_first(lambda: (_ for _ in ()).throw(UserError("the disk is full.")))
except UserError as error:
  assert str(error) == "the disk is full."
else:
  raise AssertionError("no error")
votes = d.Votes()
assert not any(votes.cast()() for _ in range(20))
if i == 1:
  d._process.stop_asked = True
time.sleep(0.3 * i)
assert votes.cast()()
assert d.num_processes() == 2 and d.is_first() == (i == 0)
""".strip()))
  assert [status for status, _, _ in found] == [0, 0], found
  assert found[0][1] == "printed by 0\nleft in order" and found[1][1] == "left in order"
  assert "bar of 0" in found[0][2] and "bar of" not in found[1][2]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_other_within_seconds_with_a_sentence(victim):
  processes = start(f"""
if i == {victim}:
  time.sleep(1.5)
  os.kill(os.getpid(), signal.SIGKILL)
d.barrier()
""")
  processes[victim].wait(120)
  since = time.monotonic()
  found = ends(processes)
  assert time.monotonic() - since < 3 + 8  # the timeout, and what two loaded cores take
  assert found[victim][0] == -signal.SIGKILL
  status, out, err = found[1 - victim]
  assert status == distributed.LOST and out == ""
  sentence = [line for line in err.splitlines() if line.startswith("ftp-jax: ")]
  assert len(sentence) == 1 and re.fullmatch(
      rf"ftp-jax: process {victim} of 2 was lost \(.*\), so the run ends; start the same command again on all hosts, "
      r"it goes on from the last saved state\.", sentence[0]
  )


def test_an_error_in_one_process_ends_all_with_its_reason():
  found = ends(start("""
if i == 1:
  raise UserError("lower train.learning_rate.")
d.barrier()
"""))
  assert [ended[0] for ended in found] == [2, 2], found
  assert "ftp-jax: process 1 of 2 ended, and so does this one: lower train.learning_rate.\n" in found[0][2]
  assert "ftp-jax: lower train.learning_rate.\n" in found[1][2]


@pytest.mark.parametrize("error, status, reason, said", [
    (UserError("lower train.learning_rate."), 2, "lower train.learning_rate.", "ftp-jax: lower train.learning_rate.\n"),
    (Stopped(), 143, "stopped by SIGTERM; the same command goes on from the last saved state.",
     "ftp-jax: stopped by SIGTERM; "),
    (KeyboardInterrupt(), 130, "stopped; the same command goes on from the last saved state.", "ftp-jax: stopped; "),
    (ValueError("a defect"), 1, "ValueError, see its traceback.", "ValueError: a defect\n"),
    (jax.errors.JaxRuntimeError("a peer is gone"), 1, "JaxRuntimeError, see its traceback.",
     "JaxRuntimeError: a peer is gone\n"),
])
def test_each_kind_of_error_has_its_status_and_its_reason_for_the_others(
    monkeypatch, capsys, error, status, reason, said
):
  calls = []

  class Watch:
    def wait_for_verdict(self):
      calls.append("waited")

    def give_up(self, *arguments):
      calls.append(arguments)
      raise SystemExit

  monkeypatch.setattr(distributed._process, "watch", Watch())
  with pytest.raises(SystemExit), distributed.together(Launch(mode="off"), cli.outcome):
    raise error
  waited = ["waited"] if isinstance(error, jax.errors.JaxRuntimeError) else []  # a lost process may be behind it
  assert calls == [*waited, (status, reason)]
  err = capsys.readouterr().err
  assert said in err and ("Traceback" in err) == (status == 1)


@pytest.mark.parametrize("i", [0, 1])
def test_processes_that_do_not_come_together_are_told(i):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    flags = [f"--coordinator=localhost:{free.getsockname()[1]}", "--num-processes=2", f"--process-id={i}"]
  program = f"""
import sys
from ftp_jax import cli
sys.exit(cli.main(["run", "--start-timeout=1", *{flags}]))
"""
  done = subprocess.run(
      [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
      timeout=120,
  )
  assert done.returncode == 2, done
  assert "did not come together within 1 s" in done.stderr and "on every host" in done.stderr


# --- SIGTERM -------------------------------------------------------------------------------------


def test_sigterm_stops_at_once_where_there_is_nothing_to_save(monkeypatch, capsys, tmp_path):
  from ftp_jax import pipeline

  before = signal.getsignal(signal.SIGTERM)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(pipeline, "run", lambda *_: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60)))
  since = time.monotonic()
  assert cli.main(["run"]) == 143
  assert time.monotonic() - since < 30 and signal.getsignal(signal.SIGTERM) == before
  assert "stopped by SIGTERM; the same command goes on from the last saved state." in capsys.readouterr().err


def test_sigterm_waits_for_work_that_saves():
  done = []
  with pytest.raises(Stopped), distributed.together(Launch(mode="off"), cli.outcome):
    with distributed.stoppable() as votes:
      assert not votes.cast()()
      os.kill(os.getpid(), signal.SIGTERM)
      assert votes.cast()()
      done.append("saved")
    done.append("went on")
  assert done == ["saved"]


# --- kills -----------------------------------------------------------------------------------------


def test_a_run_of_two_that_is_killed_and_then_stopped_ends_as_if_nothing_had_been(tmp_path):
  """One process killed in its search and within a save, then the other one told to stop.

  tests/test_training.py kills a run of one.
  """
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  undisturbed = survival.run(whole, 2, light=True)
  assert undisturbed.statuses == [0, 0], undisturbed.stderr

  ended = survival.run(killed, 2, survival.Kill("search", 6, 0.001, 0), light=True)
  assert ended.statuses == [-signal.SIGKILL, distributed.LOST], ended.stderr

  ended = survival.run(killed, 2, survival.Kill("save train", 4, 0.01, 0), light=True)
  assert ended.statuses == [-signal.SIGKILL, distributed.LOST], ended.stderr
  assert "process 0 of 2 was lost" in ended.stderr[1]
  assert ended.after_kill[1] < survival.PEER_TIMEOUT + 10

  ended = survival.run(killed, 2, survival.Kill("train", 8, 0.0, 1, signal.SIGTERM), light=True)
  assert ended.statuses == [distributed.STOPPED] * 2, ended.stderr
  # The save of the step where all stopped is whole: no process left before the first had written it.
  assert max(int(path.name) for path in killed.glob("**/checkpoints/*") if path.name.isdigit()) >= 8

  resumed = survival.run(killed, 2, light=True)
  assert resumed.statuses == [0, 0], resumed.stderr
  assert survival.fingerprint(killed) == survival.fingerprint(whole)
  told = [name for _, name in resumed.events]
  assert "search" not in told and told.count("train") < 24  # it did go on, and not from the start
