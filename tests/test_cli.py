"""The console command: what reaches the pipeline, and mistakes that end in one sentence."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from ftp_jax import cli, launch, pipeline
from ftp_jax.config import get_config
from ftp_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def calls(monkeypatch, tmp_path):
  """(config, workdir, stages) of every call that reaches the pipeline; the working directory is empty."""
  made = []
  monkeypatch.setattr(pipeline, "run", lambda *arguments: made.append(arguments))
  monkeypatch.chdir(tmp_path)
  return made


def mistake(capsys, *argv) -> str:
  """The sentence that a mistake in the arguments gives."""
  assert cli.main(argv) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.startswith("ftp-jax: ") and err.count("\n") == 1 and "Traceback" not in err
  return err


def test_run_without_arguments_is_the_quickstart(calls):
  assert cli.main(["run"]) == 0
  ((config, workdir, stages),) = calls
  assert config == launch.load_config("quickstart", None, [])[0] and config.is_locked
  assert workdir == "runs/quickstart" and tuple(stages) == pipeline.STAGES


@pytest.mark.parametrize("name", ["smollm2_135m", str(ROOT / "experiments" / "configs" / "smollm2_135m.py")])
def test_config_by_name_or_file_with_overrides(calls, name):
  overrides = ["--config.train.steps=7", "--config.sparsities=(0.1, 0.5)", "--config.data.chat=False"]
  assert cli.main(["run", f"--config={name}", *overrides]) == 0
  ((config, workdir, _),) = calls
  assert (config.train.steps, config.sparsities, config.data.chat) == (7, (0.1, 0.5), False)
  assert config.seeds == (0, 1, 2) and workdir == "runs/smollm2_135m"


@pytest.mark.parametrize(
    "command, stages",
    [
        ("search", ("data", "importance", "search")),
        ("train", ("data", "importance", "search", "train")),
        ("finetune", ("data", "importance", "search", "train", "finetune")),
        ("report", ("report",)),
    ],
)
def test_single_stages_run_what_comes_before(calls, command, stages):
  assert cli.main([command, "--workdir=here"]) == 0
  assert calls[0][1:] == ("here", stages)


def test_a_run_directory_brings_its_config(calls, tmp_path):
  config = get_config()
  config.train.steps, config.seeds, config.router.factors = 11, (4, 5), ("score",)
  (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
  assert cli.main(["report", f"--workdir={tmp_path}"]) == 0
  assert calls[0][0] == config
  assert cli.main(["train", f"--workdir={tmp_path}", "--config.train.steps=12"]) == 0
  assert calls[1][0].train.steps == 12 and calls[1][0].seeds == (4, 5)
  assert cli.main(["run", f"--workdir={tmp_path}", "--config=quickstart"]) == 0
  assert calls[2][0].seeds == (0,)


@pytest.mark.parametrize("text", ['{"train": {"nothing": 1}}', '{"train": 3}', '{"seeds": "a"}', "[1]", "{"])
def test_a_foreign_config_json_is_refused(calls, capsys, tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  assert "is not a config of this version" in mistake(capsys, "report", f"--workdir={tmp_path}")
  assert not calls


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.train.step=3", "no key 'train.step'; did you mean 'train.steps'?"),
        ("-config.train.step=3", "no key 'train.step'; did you mean 'train.steps'?"),
        ("--config.zzz=3", "no key 'zzz'; ftp_jax/config.py lists all keys."),
        ("--config.train=3", "no key 'train'"),
        ("--config.train.steps=many", "--config.train.steps=many"),
        ("--config.train.steps", "Missing value"),
        ("--config=nothing", "there is no config 'nothing'; pass a file or one of llama2_13b,"),
        ("--workdirectory=x", "there is no option --workdirectory"),
        ("stray", "'stray' is not understood"),
        ("--json=no/such/figures.json", "create no/such first"),
    ],
)
def test_mistakes_are_one_sentence(calls, capsys, argument, message):
  assert message in mistake(capsys, "run", argument)
  assert not calls


@pytest.mark.parametrize(
    "text, message",
    [
        ("x =", "SyntaxError"),
        ("x = 1", "AttributeError"),
        ("def get_config():\n  return {}", "gives a dict"),
        ("from ftp_jax import config\ndef get_config():\n  c = config.get_config()\n  c.nothing = 1", "nothing"),
    ],
    ids=["syntax", "no function", "no config", "unknown key"],
)
def test_a_broken_config_file_is_one_sentence(calls, capsys, tmp_path, text, message):
  (tmp_path / "mine.py").write_text(text)
  assert message in mistake(capsys, "run", "--config=mine.py")


def test_mistakes_found_by_the_pipeline_are_one_sentence(monkeypatch, capsys):
  def refuse(*_):
    raise UserError("The model\n is missing; fetch it.")

  monkeypatch.setattr(pipeline, "run", refuse)
  assert mistake(capsys, "train") == "ftp-jax: The model is missing; fetch it.\n"


@pytest.mark.parametrize("error, message", [
    (OSError(28, "No space left on device", "runs/x/config.json"), "runs/x/config.json: No space left on device"),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "set model.remat=full, or begin in another"),
])
def test_a_full_disk_and_a_full_device_are_one_sentence(monkeypatch, capsys, error, message):
  def fail(*_):
    raise error

  monkeypatch.setattr(pipeline, "run", fail)
  assert message in mistake(capsys, "run")
  monkeypatch.setattr(pipeline, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("a defect of ours")))
  with pytest.raises(RuntimeError, match="a defect of ours"):
    cli.main(["run"])


def test_report_of_no_run_makes_no_directory(capsys, tmp_path):
  assert "does not exist" in mistake(capsys, "report", f"--workdir={tmp_path / 'typo'}")
  assert not (tmp_path / "typo").exists()


def test_interruption_says_how_to_go_on(monkeypatch, capsys):
  def interrupt(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(pipeline, "run", interrupt)
  assert cli.main(["run"]) == 130
  assert "goes on from the last saved state" in capsys.readouterr().err


def test_evaluate_prints_the_table_and_writes_json(calls, capsys, tmp_path):
  record = {
      "method": "truncation", "schedule": None, "asked": 0.3, "seed": None, "kl": 0.5, "kl_stderr": 0.1, "nll": 2.0,
      "agreement": 0.75,
      "perplexity": None, "achieved": 0.3, "flops_saved": 0.25, "prompts": 8,
  }
  (tmp_path / "w" / "evaluate").mkdir(parents=True)
  (tmp_path / "w" / "evaluate" / "records.json").write_text(json.dumps([record]))
  assert cli.main(["evaluate", "--workdir=w", "--json=figures.json", "--config.seeds=(3,)"]) == 0
  assert calls[0][2][-1] == "evaluate"
  table = capsys.readouterr().out
  assert re.search(r"^truncation +0\.30 +30\.0 % +25\.0 % +0\.5000 +2\.0000 +75\.0 % +- +1$", table, re.M)
  figures = json.loads(pathlib.Path("figures.json").read_text())
  assert figures["records"] == [record] and figures["aggregated"][0]["kl"] == 0.5
  assert figures["config"]["seeds"] == [3] and figures["machine"]["jax"]


def test_fetch_prints_the_directory(monkeypatch, capsys, tmp_path):
  from ftp_jax.models import fetch

  monkeypatch.setattr(fetch, "fetch", lambda name, cache_dir=None: pathlib.Path(cache_dir) / name)
  assert cli.main(["fetch", "smollm2-135m", f"--out={tmp_path}"]) == 0
  assert capsys.readouterr().out == f"{tmp_path}/smollm2-135m\n"


def test_fetch_refuses_unknown_names_and_options(capsys):
  assert "no model is known as 'gpt'" in mistake(capsys, "fetch", "gpt")
  assert "'--force' is not understood" in mistake(capsys, "fetch", "smollm2-135m", "--force")


@pytest.mark.parametrize("name", ["", "export", "fetch", "run", "search", "train", "finetune", "evaluate", "report"])
def test_every_command_has_help(capsys, name):
  command = name.split()
  with pytest.raises(SystemExit) as exit_info:
    cli.main([*command, "--help"])
  assert exit_info.value.code == 0
  assert capsys.readouterr().out.startswith(f"usage: {' '.join(['ftp-jax', *command])} ")


def test_help_does_not_import_the_heavy_libraries():
  code = (
      "import sys; from ftp_jax import cli\n"
      "try: cli.main(['run', '--help'])\n"
      "except SystemExit: pass\n"
      "print([name for name in ('jax', 'flax', 'transformers', 'matplotlib', 'torch') if name in sys.modules])"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
  assert done.stdout.splitlines()[-1] == "[]"


def test_the_script_of_experiments_is_the_same_command():
  done = subprocess.run(
      [sys.executable, "experiments/run.py", "--config=experiments/configs/quickstart.py", "--config.train.step=1"],
      capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 2
  assert done.stderr == "ftp-jax: the config has no key 'train.step'; did you mean 'train.steps'?\n"


SCRIPT = """
from absl import flags
from ftp_jax import launch
from ftp_jax.errors import UserError

flags.DEFINE_string("json", "", "")
flags.DEFINE_string("fails", "", "")

def main():
  print("work")
  if flags.FLAGS.fails == "user":
    raise UserError("--that is wrong; name another.")
  if flags.FLAGS.fails == "disk":
    open("/proc/nothing/here", "w")

launch.script(main)
"""


@pytest.mark.parametrize("arguments, works, said", [
    ([], True, ""),
    (["--fails=user"], True, "script: --that is wrong; name another.\n"),
    (["--fails=disk"], True, "script: /proc/nothing/here: No such file or directory; free space or choose another"),
    (["--json=no/file.json"], False, "script: --json=no/file.json lies in no existing directory; create no first.\n"),
    (["stray"], False, "The argument 'stray' is not understood."),
])
def test_a_script_ends_in_one_sentence(tmp_path, arguments, works, said):
  (tmp_path / "script.py").write_text(SCRIPT)
  done = subprocess.run(
      [sys.executable, "script.py", *arguments], cwd=tmp_path, capture_output=True, text=True,
      env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
  )
  assert (done.returncode == 0, "work\n" in done.stdout) == (not said, works)
  assert said in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_ci_runs_the_command_of_the_readme():
  command = "pip install torch==2.13.0 && pip install '.[test]' && pytest -q -n 2"
  assert command in (ROOT / "README.md").read_text() and command in (ROOT / ".ci" / "run").read_text()
