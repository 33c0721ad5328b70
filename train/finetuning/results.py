"""Results of a fine-tuning run: results.json."""

import json
import operator
import pathlib
import statistics
from typing import Any

import jax

from train.config import methods
from train.config.finetune_config import FinetuneConfig
from train.finetuning.evaluation import Scores
from train.finetuning.task_data import TaskData
from train.finetuning.task_metrics import majority
from train.step.train_state import TrainState
from train.system.files import write_whole

RESULTS_FILE = "results.json"
Row = dict[str, Any]


def metric_of(data: TaskData) -> str:
    """Name, in metrics.jsonl, of the metric that selects the best checkpoint."""
    return f"eval_{data.task.metrics[0]}"


def best_row(rows: list[Row], metric: str) -> Row:
    """Row of the best evaluation of a step; the earlier one of equals."""
    evaluated = [row for row in rows if metric in row and row["step"] > 0]
    return max(evaluated, key=lambda row: (row[metric], -row["step"]))


def is_over(rows: list[Row], metric: str, patience_evals: int | None) -> bool:
    """Whether the last evaluations are all without a better metric.

    >>> rows = [{"step": i, "eval_f1": x} for i, x in enumerate([0, 0.5, 0.4, 0.5])]
    >>> is_over(rows, "eval_f1", 2), is_over(rows, "eval_f1", 3)
    (True, False)
    """
    if patience_evals is None:
        return False
    values = [row[metric] for row in rows if metric in row and row.get("step") != 0]
    return (
        bool(values) and len(values) - 1 - values.index(max(values)) >= patience_evals
    )


def make(
    config: FinetuneConfig,
    data: TaskData,
    state: TrainState,
    rows: list[Row],
    test: dict[str, Scores],
    test_step: int,
) -> dict[str, Any]:
    """Values of results.json.

    Args:
      config: the run.
      data: its rows.
      state: its last state.
      rows: rows of metrics.jsonl.
      test: evaluations of the test splits.
      test_step: step of the checkpoint that was tested.
    """
    metric, first = metric_of(data), data.validation[0]
    optimizer = methods.resolved(config.optimizer)
    read = methods.settings_of(optimizer)
    best = best_row(rows, metric)
    last = [row for row in rows if metric in row][-1]
    label = lambda split: data.answers(split.labels[split.is_labelled])
    return {
        "task": data.task.name,
        "source": data.source,
        "init_from": config.init_from,
        "optimizer": config.optimizer.name,
        "settings": {name: getattr(optimizer, name) for name in sorted(read)},
        "rank": optimizer.rank if "rank" in read else None,
        "learning_rate": config.optimizer.learning_rate,
        "freeze": config.freeze,
        "metric": data.task.metrics[0],
        "best": best[metric],
        "last": last[metric],
        "best_step": best["step"],
        "steps": int(state.step),
        "majority": majority(data.task, label(data.train), label(first)),
        "validation": _evaluation(best),
        "test": {name: _values(scores) for name, scores in test.items()},
        "test_step": test_step if test else None,
        "rows": {
            "train": len(data.train),
            **{split.name: len(split) for split in (*data.validation, *data.test)},
        },
        "params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)),
        "seconds": rows[-1]["elapsed_seconds"],
        "training_seconds": training_seconds(rows),
        "examples_per_second": statistics.median(_rates(rows)),
        "seed": config.seed,
    }


def _evaluation(row: Row) -> dict[str, float]:
    return {name[5:]: row[name] for name in row if name.startswith("eval_")}


def _values(scores: Scores) -> dict[str, float]:
    return {"loss": scores.loss, **scores.outcome.values}


def training_seconds(rows: list[Row]) -> float:
    """Seconds of the steps with their compilation, without evaluations and saving."""
    counts = [row["examples"] for row in rows if "loss" in row]
    taken = map(operator.sub, counts, [0, *counts])
    return sum(count / rate for count, rate in zip(taken, _rates(rows), strict=False))


def _rates(rows: list[Row]) -> list[float]:
    return [row["examples_per_second"] for row in rows if "loss" in row]


def save(directory: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes results.json."""
    text = json.dumps(results, indent=2) + "\n"
    write_whole(directory / RESULTS_FILE, text)


def load(directory: pathlib.Path) -> dict[str, Any] | None:
    """Results of a run; None if it has none.

    Raises:
      ValueError: the file is damaged.
    """
    path = directory / RESULTS_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict) or "metric" not in found:
        raise ValueError(f"{path} holds no results of a run")
    return found


def describe(results: dict[str, Any]) -> str:
    """Results in words."""
    metric = results["metric"].replace("_", " ")
    lines = [
        f"Best       {metric} {results['best']:.4f} on held-out rows, after step "
        f"{results['best_step']:,}; last {results['last']:.4f}, majority class "
        f"{results['majority']:.4f}"
    ]
    for name, values in results["test"].items():
        shown = ", ".join(
            f"{each.replace('_', ' ')} {value:.4f}" for each, value in values.items()
        )
        lines.append(f"Test       {name} with step {results['test_step']:,}: {shown}")
    size = results["state_bytes"] / 2**20
    lines.append(
        f"State      {size:.1f} MiB; {results['training_seconds']:.0f} seconds of steps"
    )
    return "\n".join(lines)
