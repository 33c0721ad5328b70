"""Trials and their records: settings, results, times, and the files that keep them."""

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
from typing import Any

import pydantic

from train.config.methods import canonical, matrix_scale_field, resolved, settings_of
from train.config.optimizer_config import OptimizerConfig, migrated
from train.rundir.saved_config import first_problem
from train.system.files import write_whole


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run of a comparison."""

    optimizer: OptimizerConfig  # method and all its settings, as `canonical` gives them
    seed: int  # of initial parameters, order of the data and random subspaces

    @property
    def matrix_scale(self) -> float:
        """The method's factor on matrices, under whichever name it has it."""
        field = matrix_scale_field(self.optimizer.name)
        return getattr(resolved(self.optimizer), field)


@dataclasses.dataclass(frozen=True)
class Record:
    """Settings, results and times of a finished trial."""

    trial: Trial
    diverged: bool  # ended early: an evaluation, or ten steps in a row, not finite
    skipped_steps: int  # without effect, as their loss or gradient was not finite
    evaluations: list[tuple[int, float | None]]  # step, loss in nats; None: not finite
    curve: list[tuple[int, dict[str, float | None]]]  # last step, averages of a stretch
    step_seconds: dict[str, float]  # median of each of `step_kinds`
    measured_seconds: float  # of all steps, without compilation and evaluation
    compile_seconds: float  # of the method's program; less if it was in the cache
    state_bytes: int  # the optimizer's
    parameters: int  # the model's
    versions: dict[str, str]  # of packages
    machine: dict[str, Any]  # where it ran
    command: str  # the command line

    @property
    def final_loss(self) -> float:
        """Held-out loss after the last step; infinite if it diverged."""
        _, loss = self.evaluations[-1]
        return math.inf if self.diverged or loss is None else loss


_PARSER = pydantic.TypeAdapter(Record)


def save(record: Record, directory: pathlib.Path) -> None:
    """Writes a record atomically, into a file of its own."""
    trial, text = record.trial, json.dumps(dataclasses.asdict(record), indent=1)
    name = f"{trial.optimizer.name}-{trial.optimizer.learning_rate:g}-seed{trial.seed}"
    digest = hashlib.sha256(repr(trial).encode()).hexdigest()
    write_whole(directory / f"{name}-{digest[:12]}.json", text + "\n")


def load(directory: pathlib.Path) -> dict[Trial, Record]:
    """All records in a directory, whatever their files are called.

    Raises:
      ValueError: a file is no record.
      OSError: a file cannot be read.
    """
    records = map(_read, sorted(directory.glob("*.json")))
    return {record.trial: record for record in records}


def _read(path: pathlib.Path) -> Record:
    """A record, also one of an earlier version with other settings and defaults."""
    try:
        values = json.loads(path.read_bytes())
        with contextlib.suppress(KeyError, TypeError):  # the parser tells of them
            values["trial"]["optimizer"] = migrated(values["trial"]["optimizer"])
        record = _PARSER.validate_python(values)
    except ValueError as error:
        raise ValueError(
            f"{path} is not the record of a trial: {first_problem(error)}; delete it "
            "to run the trial again"
        ) from error
    # Defaults may be written out.
    trial = Trial(canonical(record.trial.optimizer), record.trial.seed)
    return dataclasses.replace(record, trial=trial)


def step_kinds(optimizer: OptimizerConfig, steps: int) -> list[str]:
    """Kind of each step: the first, one that moves subspaces, or a steady one."""
    has_interval = "update_interval" in settings_of(optimizer)
    interval = resolved(optimizer).update_interval if has_interval else steps
    kinds = ["steady" if step % interval else "moving" for step in range(steps)]
    return ["first", *kinds[1:]]


def finite(value: float) -> float | None:
    """A number that JSON knows, or None."""
    return value if math.isfinite(value) else None
