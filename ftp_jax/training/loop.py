"""The host loop of router training: batches, metrics, validation and checkpoints; resumes bit for bit.

Everything a step needs follows from its number and the state: the batch (`data.prompts.turns` and `indices_at`),
the weight of the guide, the learning rate. So a checkpoint holds the state and the best router, and a
training that was killed repeats the steps since, down to the bytes of its metrics file.

Step n is dispatched before the metrics of step n - 1 are fetched. States are validated and saved only
when the metrics of all steps before them are known to be finite. Saves go on in the background.

SIGTERM makes the training save after the step that runs or the one behind it and stop (`distributed.Stopped`).
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from ftp_jax import distributed, sharding
from ftp_jax.data.prompts import Prompts, buckets_of, indices_at, take, turns
from ftp_jax.errors import UserError
from ftp_jax.files import replacing, writing
from ftp_jax.training import step as step_lib
from ftp_jax.training.checkpoint import Checkpoints, Progress, to_host

CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"


class TrainResult(NamedTuple):
  """The best router by validation and its maps, as numpy; the number of steps behind it; its held-out KL in nats."""

  router: Any
  step: int
  validation: float


def train_router(
    *,
    directory: str,
    spec: step_lib.StepSpec,
    params: Any,
    router_params: Any,
    prompts: Prompts,
    fisher_LxNxT: np.ndarray | None,
    schedule_L: np.ndarray,
    batch_size: int,
    seed: int,
    validate: Callable[[Any], float],
    validate_every: int,
    checkpoint_every: int,
    length_buckets: Sequence[int] = (),
    progress: bool = True,
) -> TrainResult:
  """Trains a router for `spec.train.steps` steps; continues exactly where an earlier call was stopped.

  A line of metrics.jsonl is either a step (its losses before the update, and the sparsity asked of and achieved by
  every block on its batch, and by all on new tokens) or a validation of the router after so many steps. With several
  processes all call this with the same arguments; only the first reads and writes the directory.

  Args:
    directory: where `checkpoints/` and metrics.jsonl are kept; created if missing.
    spec: what a step does.
    params: the frozen model; never written, changed or donated.
    router_params: the router to start from, and maps to be trained with it (`routing.stand_in.join`).
    prompts: N training prompts.
    fisher_LxNxT: gate scores of all of them, as `guide.with_new_tokens` gives them; read if the guide is `fisher`.
    schedule_L: sparsity asked of each block.
    batch_size: prompts a step.
    seed: of the order of the prompts.
    validate: router parameters -> held-out KL in nats, lower is better; called at step 0, every
      `validate_every` steps and at the end. Of equal routers the earlier one is kept.
    checkpoint_every: steps between two checkpoints; there is one at step 0 and at the end as well.
    length_buckets: see `config.data`; a batch holds prompts of one bucket.
    progress: show a progress bar.

  Raises:
    UserError: the loss, its gradient or a validation is not finite; the disk is full; the directory
      holds another training, or no readable checkpoint.
  """
  if min(validate_every, checkpoint_every, batch_size, len(prompts.tokens)) < 1:
    raise UserError("train.validate_every, train.checkpoint_every, train.batch and data.num_train must be at least 1.")
  guided = spec.train.guide == "fisher"
  if guided and (fisher_LxNxT is None or fisher_LxNxT.shape != (spec.model.num_blocks, *prompts.tokens.shape)):
    raise ValueError("the Fisher guide needs the scores (L,N,T) of all training prompts")
  schedule_L = np.asarray(schedule_L, np.float32)
  identity = _identity(spec, router_params, prompts, fisher_LxNxT if guided else None, schedule_L) | {
      "train.batch": batch_size,
      "the seed": seed,
      "train.validate_every": validate_every,
  }
  if length_buckets:  # checkpoints from before there were any are of trainings without
    identity["data.length_buckets"] = tuple(length_buckets)
  num_steps = spec.train.steps
  path = os.path.join(directory, METRICS_FILE)
  initial = step_lib.init_state(spec.train, jax.tree.map(jnp.asarray, router_params))

  with distributed.stoppable() as votes, Checkpoints(os.path.join(directory, CHECKPOINTS), identity) as checkpoints:
    at = checkpoints.restore(initial)
    state = _placed(initial if at is None else at.state, params)
    with _Metrics(directory, path, None if at is None else at.step) as metrics:

      def settle(done: int, state: Any, at: Progress | None, stop: bool = False) -> Progress:
        """Validates and saves the state after `done` steps, where that is due; saves it if training stops here."""
        best = at
        if done % validate_every == 0 or done == num_steps:
          router = to_host(state.router)
          validation = float(distributed.of_first(float(validate(jax.tree.map(jnp.asarray, router)))))
          if not np.isfinite(validation):
            raise UserError(
                f"The validation KL after {done} training steps is {validation}; lower train.learning_rate or check "
                f"the validation prompts, then delete {directory} to train anew."
            )
          metrics.write({"step": done, "validation_kl": validation})
          if at is None or validation < at.best_validation:
            best = Progress(done, state, router, done, validation)
        at = best._replace(step=done, state=to_host(state))
        if done % checkpoint_every == 0 or done == num_steps or stop:
          metrics.sync()  # or a lost machine could leave a checkpoint ahead of its metrics
          checkpoints.save(at)
          metrics.saved = done
        return at

      if at is None:
        at = settle(0, state, None)
      metrics.saved = at.step
      silent = not (progress and distributed.is_first())
      bar = tqdm.tqdm(total=num_steps, initial=at.step, desc="training", disable=silent, mininterval=0.5)
      with bar:
        pending = ballot = None
        order = turns(buckets_of(prompts, length_buckets, batch_size), num_steps)
        for step, ((width, members), turn) in itertools.islice(enumerate(order), at.step, None):
          rows = members[indices_at(len(members), batch_size, turn, seed)]
          batch = step_lib.Batch(*take(prompts, rows, width), fisher_LxNxT[:, rows, :width] if guided else None)
          state, outputs = step_lib.jitted_step(spec, params, state, batch, schedule_L)
          # Like its metrics, the vote cast during a step is read during the next one: nobody waits for it.
          stop, ballot = ballot is not None and ballot(), votes.cast()
          if pending is not None:
            metrics.record(bar, *pending)
          pending = (step, outputs)
          done = step + 1
          if done % validate_every == 0 or done % checkpoint_every == 0 or done == num_steps or stop:
            metrics.record(bar, *pending)
            pending = None
            at = settle(done, state, at, stop)
          if stop and done < num_steps:
            raise distributed.Stopped
  return TrainResult(at.best_router, at.best_step, at.best_validation)


def _placed(state: Any, params: Any) -> Any:
  """A copy of the state, which the step may take over, on every device of the model's mesh if it has one."""
  if sharding.mesh_of(params) is None:
    return jax.tree.map(lambda a: jnp.array(a, copy=True), state)
  return sharding.place(params, to_host(state))  # as the step returns it; anything else would compile it a second time


class _Metrics:
  """The metrics file, of the first process: as a checkpoint of `step` knows it, then growing by a line a step.

  saved: step of the last checkpoint.
  """

  def __init__(self, directory: str, path: str, step: int | None):
    self.saved = 0
    self._directory = directory
    self._file = None
    if distributed.is_first():
      lines = [] if step is None else _lines_before(path, step)
      with replacing(path) as file:
        file.writelines(line.encode() for line in lines)
      with writing(directory):
        self._file = open(path, "a", encoding="utf-8")

  def __enter__(self) -> "_Metrics":
    return self

  def __exit__(self, *_) -> None:
    if self._file:
      with contextlib.suppress(OSError):  # what it holds back for want of space was reported by `write`
        self._file.close()

  def write(self, line: dict) -> None:
    if self._file:
      with writing(self._directory):
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

  def sync(self) -> None:
    if self._file:
      with writing(self._directory):
        os.fsync(self._file.fileno())

  def record(self, bar: tqdm.tqdm, step: int, outputs: dict) -> None:
    """Fetches the metrics of a step, writes them and moves the bar. UserError if they are not finite."""
    values = {name: value.tolist() for name, value in jax.device_get(outputs).items()}
    if not np.isfinite([values["loss"], values["grad_norm"]]).all():
      raise UserError(
          f"Training step {step} has loss {values['loss']} and gradient norm {values['grad_norm']}; lower "
          "train.learning_rate, or set train.input_gradient=False where hidden states are read and the loss is finite, "
          f"and delete {self._directory} to train anew (it keeps its last good checkpoint, of step "
          f"{self.saved})."
      )
    names = (
        "loss", "distill", "sparsity", "guide", "guide_weight", "grad_norm", "asked", "achieved", "decode_achieved",
    )
    self.write({"step": step, **{name: values[name] for name in names}})
    bar.set_postfix(distill=f"{values['distill']:.4f}", skipped=f"{np.mean(values['achieved']):.1%}", refresh=False)
    bar.update()


def _lines_before(path: str, step: int) -> list[str]:
  """Lines of the metrics file that a checkpoint of `step` knows of: what came later is done again."""
  kept, steps = [], 0
  try:
    with open(path, encoding="utf-8") as file:
      for line in file:
        values = json.loads(line)
        if values["step"] < step or (values["step"] == step and "validation_kl" in values):
          kept.append(line)
          steps += "loss" in values
  except (OSError, ValueError, KeyError, TypeError):  # a line cut short by a kill is the last one, and of a later step
    pass
  if steps < step:
    print(f"{path} lacks lines of the {step} steps already trained; training goes on.", file=sys.stderr)
  return kept


def _identity(spec, router_params, prompts, fisher_LxNxT, schedule_L) -> dict:
  # remat is left out: it may be changed when memory runs short.
  named = {
      f"{section}.{name}": value
      for section in ("model", "routing", "router", "train")
      if getattr(spec, section) is not None
      for name, value in dataclasses.asdict(getattr(spec, section)).items()
  }
  for key in ("train.stand_in_learning_rate", "train.guide_stakes", "routing.recent_tokens"):  # earlier ones have none
    if not named[key]:
      del named[key]
  return named | {
      "model.dtype": jnp.dtype(spec.dtype).name,
      "the number of scored tokens": spec.num_scored,
      "the first routed block": spec.start,
      "the number of training prompts": len(prompts.tokens),
      "the fingerprint of the schedule": _fingerprint(schedule_L),
      "the fingerprint of the training prompts": _fingerprint(prompts),
      "the fingerprint of the Fisher scores": _fingerprint(fisher_LxNxT),
      "the fingerprint of the initial router": _fingerprint(router_params),
  }


def _fingerprint(tree: Any) -> str:
  digest = hashlib.sha256()
  for array in jax.tree.leaves(jax.device_get(tree)):
    digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()[:12]
