"""Held-out losses stored with checkpoints; selection of a checkpoint to read."""

import math
import pathlib
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from train.config.run_config import CheckpointChoice

METRICS = "metrics"  # Orbax's name of the item

KEEP_BEST: checkpoint_managers.PreservationPolicy = checkpoint_managers.BestN(
    get_metric_fn=lambda metrics: _quality(metrics),
    n=1,
    keep_checkpoints_without_metrics=False,
)


class Manager(ocp.CheckpointManager):
    """Orbax checkpoint manager that tolerates damaged metrics."""

    def __init__(self, directory: pathlib.Path, **options: Any):
        options = ocp.CheckpointManagerOptions(best_fn=_quality, **options)
        super().__init__(directory, options=options)

    def metrics(self, step: int) -> dict[str, Any] | None:
        """Metrics of a step, from `metrics_of`; None if absent or damaged."""
        try:
            metrics = super().metrics(step)
            is_sound = metrics == metrics_of(metrics["eval_loss"], step)
        except Exception:  # damaged JSON, which Orbax does not handle
            return None
        return metrics if is_sound else None

    @property
    def eval_losses(self) -> dict[int, float]:
        """Held-out losses by step, best first; steps without one are absent."""
        found = [self.metrics(step) for step in self.all_steps()]
        known = sorted(filter(None, found), key=_quality, reverse=True)
        return {each["step"]: each["eval_loss"] for each in known}

    @property
    def lowest_loss(self) -> float:
        """Held-out loss of the best checkpoint; infinite if there is none."""
        return min(self.eval_losses.values(), default=math.inf)

    @property
    def with_damaged_loss(self) -> list[int]:
        """Steps whose held-out loss is damaged."""
        known = self.eval_losses
        return [
            step
            for step in self.all_steps()
            if step not in known
            and pathlib.Path(self.directory, str(step), METRICS).exists()
        ]

    def report_damaged_losses(self, report: Callable[[str], None]) -> None:
        """Reports each step in `with_damaged_loss`."""
        for step in self.with_damaged_loss:
            report(
                f"the held-out loss of the checkpoint of step {step} is damaged: it "
                "cannot be chosen as the best; --step reads it"
            )


def metrics_of(eval_loss: float, step: int) -> dict[str, Any]:
    """Metrics to store with a checkpoint: held-out loss in nats, checksum."""
    content = f"{step} {eval_loss!r}".encode()
    return {"step": step, "eval_loss": eval_loss, "crc32": zlib.crc32(content)}


def candidates(
    choice: CheckpointChoice, steps: Iterable[int], eval_losses: dict[int, float]
) -> list[int]:
    """Steps to try in order: the chosen one, then fallbacks if it is damaged.

    Args:
      choice: the checkpoint to read.
      steps: existing steps, at least one.
      eval_losses: held-out losses by step, best first.

    Raises:
      ValueError: there is no such checkpoint.

    >>> from train.config.run_config import CheckpointChoice
    >>> candidates(CheckpointChoice(), [100, 200, 250], {200: 1.5, 100: 1.75})
    [200, 100, 250]
    >>> candidates(CheckpointChoice(which="newest"), [100, 200, 250], {200: 1.5})
    [250, 200, 100]
    """
    newest_first = sorted(steps, reverse=True)
    if choice.step is not None:
        if choice.step not in newest_first:
            known = ", ".join(map(str, reversed(newest_first)))
            raise ValueError(
                f"--step {choice.step}: no checkpoint has this step; there are {known}"
            )
        return [choice.step]
    if choice.which == "newest":
        return newest_first
    if choice.which == "best" and not eval_losses:
        raise ValueError(
            "--which best: no checkpoint has a held-out loss; give --which newest or "
            "--step"
        )
    return [*eval_losses, *(step for step in newest_first if step not in eval_losses)]


def _quality(metrics: dict[str, Any]) -> Any:
    """Sort key of a checkpoint: higher is better; earlier wins a tie."""
    return (-metrics["eval_loss"], -metrics["step"])
