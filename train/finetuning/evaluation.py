"""Evaluation of an encoder on the rows of splits: predictions, loss, metrics."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import special

from models.encoder_config import EncoderConfig
from train.config.tasks import Task
from train.finetuning import batches, task_metrics
from train.finetuning.encoded import Split
from train.finetuning.task_data import answers
from train.finetuning.task_metrics import Outcome
from train.step import encoder_task, placement

_FIRST_SPLITS = ("validation", "held out")


class Scores(NamedTuple):
    """Evaluation of a split: mean loss and metrics of the rows with labels."""

    loss: float
    outcome: Outcome


class Evaluator:
    """Predicts rows with given parameters.

    Args:
      model: the model's config.
      buckets: lengths of batches.
      size: rows of a batch.
      mesh: the devices; None: the default device.
      part: rows of each batch for this process.
    """

    def __init__(
        self,
        model: EncoderConfig,
        buckets: tuple[int, ...],
        size: int,
        mesh: Mesh | None,
        part: slice,
    ):
        self._model, self._buckets, self._size = model, buckets, size
        self._mesh, self._part = mesh, part
        everywhere = mesh and NamedSharding(mesh, PartitionSpec())
        self._outputs = jax.jit(
            functools.partial(encoder_task.outputs, model), out_shardings=everywhere
        )

    def begin(self, params: Any, split: Split) -> Callable[[], np.ndarray]:
        """Dispatches predictions of a split.

        Returns:
          A function that waits for the logits: float32 (rows, outputs).
        """
        found = [
            (rows, self._outputs(params, self._place(batch)))
            for rows, batch in self._batches(split)
        ]

        def finish() -> np.ndarray:
            logits = np.zeros((len(split), found[0][1].shape[-1]), np.float32)
            for rows, values in found:
                logits[rows] = np.asarray(jax.device_get(values))[: len(rows)]
            return logits

        return finish

    def _batches(self, split: Split) -> Iterator[tuple[np.ndarray, batches.Batch]]:
        padding = batches.Padding(
            split, self._buckets, self._model.padding_id, self._size, self._part
        )
        return batches.ordered_batches(padding)

    def _place(self, batch: batches.Batch) -> Any:
        if self._mesh is None:
            return jax.device_put(batch)
        return placement.place_batch(batch, self._mesh)


def predictions(task: Task, classes: Sequence[str], logits: np.ndarray) -> list[Any]:
    """Names of the likeliest classes, or numbers."""
    if task.head == "regression":
        return answers(task, classes, logits[:, 0])
    return answers(task, classes, logits.argmax(axis=-1))


def score(
    task: Task, classes: Sequence[str], split: Split, logits: np.ndarray
) -> Scores:
    """Loss and metrics of the rows with labels.

    Args:
      task: the task.
      classes: names of the classes by id.
      split: the rows.
      logits: (rows, outputs).
    """
    rows = np.flatnonzero(split.is_labelled)
    truth, logits = split.labels[rows], logits[rows].astype(np.float64)
    if task.head == "regression":
        losses = np.square(logits[:, 0] - truth)
    else:
        log_likelihoods = special.log_softmax(logits, axis=-1)
        losses = -log_likelihoods[np.arange(len(rows)), truth]
    groups = None if split.groups is None else [split.groups[i] for i in rows]
    outcome = task_metrics.measure(
        task,
        answers(task, classes, truth),
        predictions(task, classes, logits),
        groups,
    )
    return Scores(float(losses.mean()), outcome)


def named(split: Split, values: dict[str, float]) -> dict[str, float]:
    """Metrics named by their split: eval_accuracy, eval_mismatched_accuracy."""
    part = split.name.removeprefix("validation_")
    prefix = "" if part in (*_FIRST_SPLITS, "matched") else f"{part}_"
    return {f"eval_{prefix}{name}": value for name, value in values.items()}
