"""Stages of a run directory: what they write, and what a full disk leaves."""

import errno
import os

import numpy as np
import pytest

from ftp_jax import files, stages
from ftp_jax.errors import UserError, check_target


def test_a_link_stays_one_and_what_is_no_file_is_written_to(tmp_path):
  (tmp_path / "real").mkdir()
  link, pipe = tmp_path / "link.json", tmp_path / "pipe"
  link.symlink_to(tmp_path / "real" / "file.json")
  for text in (b"one", b"two"):
    with files.replacing(link) as file:
      file.write(text)
    assert link.is_symlink() and (tmp_path / "real" / "file.json").read_bytes() == text
  os.mkfifo(pipe)
  reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
  with files.replacing(pipe) as file:
    file.write(b"through")
  assert os.read(reader, 10) == b"through" and pipe.is_fifo()
  os.close(reader)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "pipe", "real"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("name", ["figures.json", "arrays.npz"])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, monkeypatch, name, code):
  path = tmp_path / name
  write = {
      "figures.json": lambda value: stages.write_json(path, value),
      "arrays.npz": lambda value: stages.save_arrays(path, value=np.array(value)),
  }[name]
  write([1, 2])
  before = path.read_bytes()

  def full(_):
    raise OSError(code, os.strerror(code))

  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"no space left to write to .*{name}; free some and run again") as caught:
      write([3, 4])
  assert "\n" not in str(caught.value)
  assert path.read_bytes() == before and os.listdir(tmp_path) == [name]


def test_dev_full_is_a_full_disk():
  with pytest.raises(UserError, match="no space left to write to /dev/full"):
    with files.writing("/dev/full"), open("/dev/full", "wb") as file:
      file.write(b"x")


def test_other_errors_stay_what_they_are(tmp_path):
  with pytest.raises(PermissionError), files.writing(tmp_path):
    raise PermissionError(errno.EACCES, "Permission denied")


def test_a_stage_is_run_until_it_is_done(tmp_path):
  here, runs = tmp_path / "stage", []

  def interrupted(directory):
    runs.append(directory)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    stages.run_stage(here, lambda: {"a": 1}, interrupted)
  with pytest.raises(UserError, match="was made with a=1, now it is 2"):
    stages.run_stage(here, lambda: {"a": 2}, runs.append)
  stages.run_stage(here, lambda: {"a": 1}, runs.append)
  stages.run_stage(here, lambda: {"a": 1}, runs.append)
  assert runs == [here, here] and (here / stages.DONE).exists()


def test_a_stage_that_a_mistake_ended_goes_on_with_other_settings_if_it_has_nothing(tmp_path):
  here = tmp_path / "stage"

  def mistaken(makes):
    def work(directory):
      for name in makes:
        (directory / name).touch()
      raise UserError("lower it.")

    return work

  for value, makes in ((1, ()), (2, ["part"])):
    with pytest.raises(UserError, match="lower it"):
      stages.run_stage(here, lambda: {"a": value}, mistaken(makes))
  with pytest.raises(UserError, match="was made with a=2, now it is 3"):
    stages.run_stage(here, lambda: {"a": 3}, mistaken(()))


def test_a_setting_that_an_earlier_version_did_not_have_stands_at_its_default(tmp_path):
  stages.run_stage(tmp_path / "stage", lambda: {"a": 1}, lambda _: None)
  stages.check_stage(tmp_path / "stage", {"a": 1, "new": 5}, {"new": 5, "other": 6})
  with pytest.raises(UserError, match="was made with new=5, now it is 7"):
    stages.check_stage(tmp_path / "stage", {"a": 1, "new": 7}, {"new": 5})
  with pytest.raises(UserError, match="was made with new=None"):
    stages.check_stage(tmp_path / "stage", {"a": 1, "new": 7})
  with pytest.raises(UserError, match="was made with a=1, now it is 2"):
    stages.check_stage(tmp_path / "stage", {"a": 2}, {"a": 2})


def test_a_stage_that_is_missing_before_later_ones_is_named(tmp_path):
  first, second, third = (tmp_path / name for name in ("first", "second", "third"))
  stages.check_order([first, second])
  stages.run_stage(first, lambda: {}, lambda _: None)
  stages.check_order([first, second, third])
  stages.run_stage(third, lambda: {}, lambda _: None)
  with pytest.raises(UserError, match="third was made from .*second, which is missing; delete the folders"):
    stages.check_order([first, second, third])


def test_a_target_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
  check_target(tmp_path / "a.json")
  asked = []
  monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))
  with pytest.raises(UserError, match="a.json cannot be written; name a file in a directory of yours"):
    check_target(tmp_path / "a.json")
  assert asked == [(tmp_path, os.W_OK)]
