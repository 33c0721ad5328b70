"""Records of trials: results, times, and the files that keep them."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pydantic

from train.comparison.variants import Trial
from train.config.methods import canonical, resolved, settings_of
from train.config.optimizer_config import OptimizerConfig, migrated
from train.system.files import write_whole

# Points of the training curve, which is averaged in between.
MAX_CURVE_POINTS = 200


@dataclasses.dataclass(frozen=True)
class Record:
    """Settings, results and times of a finished trial.

    Attributes:
      trial: the trial.
      diverged: whether it ended early, after ten steps in a row, or an evaluation,
        whose loss or gradient was not finite.
      skipped_steps: steps without effect, as their loss or gradient was not finite.
      evaluations: (step, loss in nats) of the held-out text; a loss that is not
        finite is None.
      curve: (last step, metrics) of stretches of training steps, averaged.
      step_seconds: median seconds of a step of each kind: the first, one that moves
        subspaces, one that does not.
      measured_seconds: of all steps together, without compilation and evaluation.
      compile_seconds: to trace and compile the program that trials of one method
        share; less if it was in the compilation cache.
      state_bytes: the optimizer's.
      parameters: the model's.
      versions: of packages.
      machine: where it ran.
      command: the command line.
    """

    trial: Trial
    diverged: bool
    skipped_steps: int
    evaluations: list[tuple[int, float | None]]
    curve: list[tuple[int, dict[str, float | None]]]
    step_seconds: dict[str, float]
    measured_seconds: float
    compile_seconds: float
    state_bytes: int
    parameters: int
    versions: dict[str, str]
    machine: dict[str, Any]
    command: str

    @property
    def final_loss(self) -> float:
        """Held-out loss after the last step; infinite if it diverged."""
        last = self.evaluations[-1][1] if self.evaluations else None
        return math.inf if self.diverged or last is None else last


_PARSER = pydantic.TypeAdapter(Record)


def step_kinds(optimizer: OptimizerConfig, steps: int) -> list[str]:
    """Kind of each step: the first, one that moves subspaces, or a steady one."""
    interval = None
    if "update_interval" in settings_of(optimizer):
        interval = resolved(optimizer).update_interval
    return [
        "first"
        if not step
        else "moving"
        if interval and not step % interval
        else "steady"
        for step in range(steps)
    ]


def by_kind(seconds: Sequence[float], optimizer: OptimizerConfig) -> dict[str, float]:
    """The median seconds of each kind of step."""
    kinds: dict[str, list[float]] = {}
    for kind, each in zip(step_kinds(optimizer, len(seconds)), seconds, strict=True):
        kinds.setdefault(kind, []).append(each)
    return {kind: statistics.median(values) for kind, values in kinds.items()}


def elapsed_seconds(
    optimizer: OptimizerConfig, step_seconds: dict[str, float], steps: int
) -> float:
    """Seconds of so many steps, by the median seconds of each kind of step.

    A median ignores other work of the machine; one for each kind of step keeps the
    cost of moving subspaces.
    """
    kinds = collections.Counter(step_kinds(optimizer, steps))
    return sum(step_seconds[kind] * count for kind, count in kinds.items())


def path_of(trial: Trial, directory: pathlib.Path) -> pathlib.Path:
    """File of a trial's record, named by those settings that are not defaults.

    A new setting thus leaves the names of finished trials as they are.
    """
    optimizer = trial.optimizer
    values = {"seed": trial.seed}
    for field in dataclasses.fields(optimizer):
        if getattr(optimizer, field.name) != field.default:
            values[field.name] = getattr(optimizer, field.name)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return directory / f"{_stem(trial)}-{digest[:12]}.json"


def _stem(trial: Trial) -> str:
    optimizer = trial.optimizer
    return f"{optimizer.name}-{optimizer.learning_rate:g}-seed{trial.seed}"


def save(record: Record, directory: pathlib.Path) -> None:
    """Writes a record atomically."""
    text = json.dumps(dataclasses.asdict(record), indent=1)
    write_whole(path_of(record.trial, directory), text + "\n")


def load(trial: Trial, directory: pathlib.Path) -> Record | None:
    """The record of a trial; None if it has not finished.

    Raises:
      ValueError: the file is no record, or that of another trial.
      OSError: it cannot be read.
    """
    path = path_of(trial, directory)
    if path.exists():
        if record := _read(path, trial):
            return record
        raise ValueError(
            f"{path} is the record of another trial: delete it to run this one"
        )
    # The name differs where a setting had another default in an earlier version.
    for earlier in sorted(directory.glob(f"{_stem(trial)}-*.json")):
        with contextlib.suppress(ValueError):
            if record := _read(earlier, trial):
                return record
    return None


def _read(path: pathlib.Path, trial: Trial) -> Record | None:
    """The record in a file, if it is that of a trial."""
    try:
        values = json.loads(path.read_bytes())
        with contextlib.suppress(KeyError, TypeError):
            settings = values["trial"]["optimizer"]
            values["trial"]["optimizer"] = migrated(settings)
        record = _PARSER.validate_python(values)
    except ValueError as error:
        what = str(error)
        if isinstance(error, pydantic.ValidationError):
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "all of it"
            what = f"{where}: {first['msg']}"
        raise ValueError(
            f"{path} is not the record of a trial: {what}; delete it to run the trial "
            "again"
        ) from error
    # Defaults may be written out in one of them.
    ours, theirs = canonical(trial.optimizer), canonical(record.trial.optimizer)
    if (trial.seed, ours) != (record.trial.seed, theirs):
        return None
    return dataclasses.replace(record, trial=trial)


def load_finished(
    trials: Iterable[Trial], directory: pathlib.Path
) -> dict[Trial, Record]:
    """The records of those trials that have finished; raises as `load` does."""
    found = ((trial, load(trial, directory)) for trial in trials)
    return {trial: record for trial, record in found if record is not None}


def thinned(
    rows: Sequence[dict[str, float]], total: int
) -> list[tuple[int, dict[str, float | None]]]:
    """Averages metrics over chunks of steps: at most MAX_CURVE_POINTS per run."""
    size = math.ceil(total / MAX_CURVE_POINTS)
    left_out = {"count", "learning_rate", "skipped_steps"}
    names = [name for name in rows[0] if name not in left_out]
    table = np.array([[row[name] for name in names] for row in rows])
    points = []
    for start in range(0, len(rows), size):
        stretch = table[start : start + size]
        means = map(finite, stretch.mean(axis=0).tolist())
        points.append((start + len(stretch), dict(zip(names, means, strict=True))))
    return points


def finite(value: float) -> float | None:
    """A number that JSON knows, or None."""
    return value if math.isfinite(value) else None
