"""Subspace diagnostics of a run: diagnostics.jsonl and subspace.png."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import subtrack_jax as stj
from train.config import methods
from train.config.run_config import RunConfig
from train.step.train_state import TrainState
from train.system import processes
from train.system.json_lines import JsonLines
from train.system.stopwatch import Stopwatch

DIAGNOSTICS_FILE = "diagnostics.jsonl"
PLOT_FILE = "subspace.png"


class Diagnostics:
    """Context manager that records diagnostics of steps, and plots them at its end.

    A row depends only on the bases before a step and the state after it, so that an
    interrupted run has the same rows as an uninterrupted one.

    Args:
      config: the run, with or without diagnostics.
      last_step: the last step whose rows of an earlier process are kept.
      mesh: the devices.
    """

    def __init__(self, config: RunConfig, last_step: int, mesh: Mesh | None):
        self._config = config
        self._is_on = config.report.diagnostics
        self._every = (
            config.report.diagnostics_every_steps
            or config.optimizer.update_interval
            or methods.resolved(config.optimizer).update_interval
        )
        self._before: stj.TrackSubspaceState | None = None
        if self._is_on:
            path = config.output_dir / DIAGNOSTICS_FILE
            self._file = JsonLines(path, last_step, _is_row)
            on_all = mesh and NamedSharding(mesh, PartitionSpec())
            self._measure = jax.jit(_measure, out_shardings=on_all)

    def before(self, step: int, state: TrainState, skipped_steps: int) -> None:
        """Copies the bases before a step that may change them, as it donates its state.

        Args:
          step: the next step.
          state: the state before it.
          skipped_steps: skipped steps, without the last step, whose result may not be
            fetched yet.
        """
        # Refreshes count steps that were not skipped; the last one may have been.
        counts = (step - 1 - skipped_steps, step - 2 - skipped_steps)
        is_due = self._is_on and any(count % self._every == 0 for count in counts)
        self._before = _kept(state.opt_state) if is_due else None

    def after(self, step: int, state: TrainState, watch: Stopwatch) -> None:
        """Writes one row per matrix if the step is due.

        Args:
          step: the step.
          state: the state after it.
          watch: paused meanwhile.
        """
        before, self._before = self._before, None
        if before is None:
            return
        jax.block_until_ready(state)
        with watch.pause():
            count = int(before.count)
            was_skipped = int(_tracked(state.opt_state).count) == count
            if was_skipped or count % self._every:
                return
            values = jax.device_get(self._measure(before, state.opt_state))
            if count == 0:  # the first bases have no predecessors
                for name in ("grassmann_distance", "largest_angle_radians"):
                    values[name] = jax.tree.map(_unknown, values[name])
            self._file.append(*_rows(step, values))

    def sync(self) -> None:
        """Flushes all rows to disk."""
        if self._is_on:
            self._file.sync()

    def __enter__(self) -> "Diagnostics":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if not (self._is_on and self._file.rows and processes.is_first()):
            return
        from train.reports import subspace_plot

        try:
            self.sync()
            subspace_plot.plot(
                self._file.rows,
                f"{self._config.title}, "
                f"rank {methods.resolved(self._config.optimizer).rank}",
                self._config.output_dir / PLOT_FILE,
            )
        except OSError:
            if error is None:  # otherwise the first error is reported
                raise


def check_has_subspaces(config: RunConfig) -> None:
    """Raises a ValueError for diagnostics of an optimizer without subspaces."""
    if not config.report.diagnostics:
        return
    name = config.optimizer.name
    if not methods.has_subspaces(name):
        raise ValueError(
            f"--diagnostics looks at subspaces, which --optimizer {name} does not "
            "have: take a low-rank one, such as subtrack"
        )


def _tracked(opt_state: optax.OptState) -> stj.TrackSubspaceState:
    is_tracked = lambda node: isinstance(node, stj.TrackSubspaceState)
    nodes = jax.tree.leaves(opt_state, is_leaf=is_tracked)
    (tracked,) = filter(is_tracked, nodes)
    return tracked


@jax.jit
def _kept(opt_state: optax.OptState) -> stj.TrackSubspaceState:
    # The next step donates its state.
    return jax.tree.map(jnp.copy, _tracked(opt_state))


def _measure(
    before: stj.TrackSubspaceState, opt_state: optax.OptState
) -> dict[str, Any]:
    """Diagnostics by name, as trees with a number per matrix."""
    angles = stj.diagnostics.principal_angles(opt_state, before)
    values = {
        "captured_energy": optax.tree.get(opt_state, "captured_energy"),
        "grassmann_distance": jax.tree.map(
            lambda each: jnp.linalg.norm(each, axis=-1), angles
        ),
        "largest_angle_radians": jax.tree.map(lambda each: each[..., 0], angles),
    }
    recovered = optax.tree.get(opt_state, "recovery_norm")
    if recovered is not None:
        values["recovery_ratio"] = jax.tree.map(
            lambda part, norm: part / jnp.where(norm > 0, norm, 1),
            recovered,
            optax.tree.get(opt_state, "gradient_norm"),
        )
    return values


def _unknown(numbers: np.ndarray) -> np.ndarray:
    return np.full_like(numbers, np.nan)


def _is_row(row: dict[str, Any]) -> bool:
    """Whether a JSON object has the fields that the plot needs."""
    names = {"matrix": str, "layer": int, "captured_energy": float}
    return all(isinstance(row.get(name), kind) for name, kind in names.items())


def _rows(step: int, values: dict[str, Any]) -> list[dict[str, Any]]:
    columns = {name: jax.tree.leaves(tree) for name, tree in values.items()}
    rows = []
    for k, (path, _) in enumerate(jax.tree.leaves_with_path(values["captured_energy"])):
        matrix = jax.tree_util.keystr(path, simple=True, separator="/")
        numbers = {name: leaves[k].ravel() for name, leaves in columns.items()}
        for layer in range(numbers["captured_energy"].size):
            row = {"step": step, "matrix": matrix, "layer": layer}
            rows.append(
                row | {name: own[layer].item() for name, own in numbers.items()}
            )
    return rows
