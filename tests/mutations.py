"""Seeded faults: applies each to a copy of the tree and sees whether tests fail.

Run by hand, before tests are taken away and after: `python -m tests.mutations`. A
name or a part of one chooses faults: `python -m tests.mutations limiter geodesic`.
A fault is found by its text, which stands exactly once in library, models and
programs; where the text has changed, the fault has to be written anew.

Each fault is tried in a forked process, which has imported the libraries already.
"""

import argparse
import contextlib
import importlib
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]
COPIED = ("subtrack_jax", "models", "train", "tests", "pyproject.toml", "README.md")
MISSED = "MISSED: no test fails"
SEARCHED = ("subtrack_jax", "models", "train")


class Fault(NamedTuple):
    """A fault and the tests of which at least one has to fail."""

    name: str
    old: str
    new: str
    tests: tuple[str, ...]


def _fault(name: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, old, new, tests)


ORACLE = "tests/optimizers/test_oracle_parity.py"
GRASSMANN = "tests/test_grassmann.py"
EDGES = "tests/test_edge_cases.py"
EIGHT_BIT = "tests/stages/test_eight_bit.py"
COMMUNICATION = "tests/sharding/test_communication.py"
LLAMA = "tests/models/test_llama.py"
ENCODER = "tests/models/test_encoder.py"
ENCODER_WEIGHTS = "tests/models/test_encoder_weights.py"

GEOMETRY = [
    _fault(
        "tangent keeps what lies in the basis",
        "return product - basis @ (basis.T @ product)",
        "return product",
        f"{GRASSMANN}::test_tangent",
    ),
    _fault(
        "line search takes the whole angle",
        "jnp.where((sine == 0) & (cosine == 0), 1, cosine)) / 2",
        "jnp.where((sine == 0) & (cosine == 0), 1, cosine))",
        f"{GRASSMANN}::test_line_search_captures_the_most",
    ),
    _fault(
        "geodesic turns away from u",
        "* (jnp.cos(angle) - 1) + u * jnp.sin(angle)",
        "* (jnp.cos(angle) - 1) - u * jnp.sin(angle)",
        f"{GRASSMANN}::test_geodesic",
    ),
    _fault(
        "exponential map sums one term wrongly",
        "((2 * k) * (2 * k + 1))",
        "((2 * k) * (2 * k + 2))",
        f"{GRASSMANN}::test_exponential_map",
    ),
    _fault(
        "captured energy is a root",
        "jnp.where(total > 0, captured / jnp.where(total > 0, total, 1), 1)",
        "jnp.where(total > 0, (captured / jnp.where(total > 0, total, 1)) ** 0.5, 1)",
        f"{GRASSMANN}::test_captured_energy",
    ),
    _fault(
        "range finder stops after one power iteration",
        "        power_iterations + 1,\n",
        "        1,\n",
        f"{GRASSMANN}::test_range_finder_captures_what_the_svd_captures",
        ORACLE,
    ),
    _fault(
        "panels of the blocked factorisation are not freed of those before",
        "panel = _unit_columns(panel - dot(before, overlap))",
        "panel = _unit_columns(panel)",
        "tests/internal/test_orthonormal.py",
    ),
    _fault(
        "the basis never gets its rounding removed",
        "    return basis + basis @ error\n",
        "    return basis\n",
        f"{GRASSMANN}::test_orthonormalize",
        f"{EDGES}::test_orthonormal_after_ten_thousand_updates",
    ),
]
STAGES = [
    _fault(
        "the second moment forgets the turned mean",
        "jnp.abs(variance + ratio * rotated * rotated)",
        "jnp.abs(variance)",
        ORACLE,
    ),
    _fault(
        "the second moment is not made positive",
        "jnp.abs(variance + ratio * rotated * rotated)",
        "variance + ratio * rotated * rotated",
        f"{ORACLE}::test_a_variance_that_comes_out_negative",
    ),
    _fault(
        "a rank-one rotation bends twice",
        "return self.cosine - 1",
        "return 2 * (self.cosine - 1)",
        ORACLE,
    ),
    _fault(
        "a dense rotation is transposed",
        "return dot(self.basis.mT, self.previous_basis)",
        "return dot(self.previous_basis.mT, self.basis)",
        ORACLE,
    ),
    _fault(
        "the limiter lets everything through",
        "is_limited = has_last & (norm > limit)",
        "is_limited = has_last & (norm > limit) & False",
        ORACLE,
        "tests/optimizers/test_golden.py",
    ),
    _fault(
        "the limiter remembers the norm before it",
        "limited = jnp.where(is_limited, limit, norm)",
        "limited = norm",
        ORACLE,
    ),
    _fault(
        "the recovered part keeps what is inside",
        "inside_energy = removed * (2 - removed) * energy",
        "inside_energy = 0 * energy",
        ORACLE,
    ),
    _fault(
        "the published residual removes all",
        'removed = scale if residual == "published" else 1',
        "removed = 1",
        f"{ORACLE}::test_float64",
    ),
    _fault(
        "error feedback forgets the moments' loss",
        "after = record.coordinates + record.rotation.rotate(before)",
        "after = record.coordinates + before",
        ORACLE,
    ),
    _fault(
        "the momentum for trackers is not corrected",
        "return mean.astype(dtype) / jnp.where(weight > 0, weight, 1)",
        "return mean.astype(dtype)",
        ORACLE,
    ),
    _fault(
        "a walk ignores its angle",
        "tangent = angle * grassmann.random_tangent(context.key, basis)",
        "tangent = 0.1 * grassmann.random_tangent(context.key, basis)",
        "tests/stages/test_tracker.py",
    ),
    _fault(
        "a switch goes over one step late",
        "is_first = context.count < after_steps",
        "is_first = context.count <= after_steps",
        "tests/stages/test_tracker.py",
    ),
    _fault(
        "a projection is drawn on every step",
        "drawn_at = state.count - state.count % update_interval",
        "drawn_at = state.count",
        ORACLE,
    ),
    _fault(
        "a bad gradient moves the error",
        "return jnp.where(usable, new, old)",
        "return new",
        f"{EDGES}::test_a_bad_gradient_leaves_the_error_as_it_was",
    ),
    _fault(
        "the monitor measures a zero gradient as lost",
        "captured = jnp.where(total > 0, inside / jnp.where(total > 0, total, 1), 1)",
        "captured = inside / jnp.where(total > 0, total, 1)",
        "tests/stages/test_monitor.py",
    ),
    _fault(
        "gradients stay narrower than their parameters",
        "    if dtype.itemsize != other.itemsize:\n",
        "    if dtype.itemsize == other.itemsize:\n",
        "tests/stages/test_stages.py",
    ),
    _fault(
        "rows of a slice are dithered from its start",
        "row = rows.astype(jnp.uint32)[:, None, None]",
        "row = place(blocks.ndim - 3)",
        "tests/stages/test_slices.py::test_equal_to_the_chain",
    ),
    _fault(
        "slices of a stack are not held",
        "parts = hold(barrier(jax.tree.map(pick, stacks, axes)), k < 0)",
        "parts = barrier(jax.tree.map(pick, stacks, axes))",
        "tests/stages/test_slices.py::test_temporaries_of_an_embedding_in_eight_bits",
    ),
    _fault(
        "dither is the same on every step",
        "dither = count.astype(jnp.uint32) * jnp.uint32(2654435769)",
        "dither = count.astype(jnp.uint32) * jnp.uint32(0)",
        f"{EIGHT_BIT}",
        "tests/internal/test_dynamic_map.py",
    ),
    _fault(
        "the second moment is coded as it is",
        "nu, nu_scale = coded(jnp.sqrt, jnp.uint8, moments.nu, before.nu_scale)",
        "nu, nu_scale = coded(lambda nu: nu, jnp.uint8, moments.nu, before.nu_scale)",
        f"{EIGHT_BIT}",
    ),
    _fault(
        "a conditional update runs always",
        "(jnp.asarray(predicate, bool), operand),",
        "(jnp.asarray(True), operand),",
        "tests/test_step_cost.py",
    ),
]
MESH_FAULTS = [
    _fault(
        "bases are not replicated for products",
        "return replicated(basis) if is_less else basis",
        "return basis",
        COMMUNICATION,
    ),
    _fault(
        "coordinates stay split along their rank",
        "return replicated(coordinates, axes=(-2,))",
        "return coordinates",
        COMMUNICATION,
    ),
    _fault(
        "a basis is split as its gradient",
        "long, short = _split(view.basis_shape[-2:], spec, mesh, own + other)",
        "long, short = _split(view.basis_shape[-2:], spec, mesh, own)",
        "tests/sharding/test_state_sharding.py",
    ),
    _fault(
        "one large matrix after another is never taken",
        "if on_mesh and math.prod(view.coordinates_shape[-2:]) >= LARGE:",
        "if False:",
        "tests/internal/test_matrix_view.py::"
        "test_large_matrices_on_a_mesh_are_mapped_in_a_loop",
    ),
]
BACKWARD = [
    _fault(
        "no update writes the shared state",
        "join(new_state, part, last.keys(), shared=True)",
        "join(new_state, part, last.keys())",
        "tests/test_update_in_backward.py",
    ),
    _fault(
        "the head adds nothing to the gradient of a tied embedding",
        "{key: _sum(own[key], gradients[key]) for key in shared}",
        "{}",
        "tests/test_update_in_backward.py",
    ),
    _fault(
        "each layer is updated, finite or not, and its stacks are copied",
        'return *apply_if(ok, update, (params, state), "update"), squares, ok',
        "return *update((params, state)), squares, ok",
        "tests/test_update_in_backward.py",
    ),
    _fault(
        "a gradient that all layers share is taken for one layer's",
        "if any(a and b for a, b in zip(used, own, strict=True)):",
        "if False:",
        "tests/test_update_in_backward.py",
    ),
]
MODELS = [
    _fault(
        "rotary pairs turn the other way",
        "(first * cos - second * sin, second * cos + first * sin)",
        "(first * cos + second * sin, second * cos - first * sin)",
        f"{LLAMA}::test_logits_equal_the_equations_in_numpy",
        "tests/models/test_llama_parity.py",
    ),
    _fault(
        "a cache reads one position too many",
        "seen = jnp.arange(cache.keys.shape[1]) <= positions[:, None]",
        "seen = jnp.arange(cache.keys.shape[1]) <= positions[:, None] + 1",
        f"{LLAMA}::test_decoding_step_by_step_equals_reading_at_once",
    ),
    _fault(
        "padding counts in the loss",
        "return jnp.sum(losses, where=mask), jnp.sum(log_z**2, where=mask)",
        "return jnp.sum(losses), jnp.sum(log_z**2, where=mask)",
        "tests/models/test_loss.py",
    ),
    _fault(
        "the nucleus leaves out its last token",
        "above = jnp.cumsum(probabilities, axis=-1) - probabilities",
        "above = jnp.cumsum(probabilities, axis=-1)",
        "tests/models/test_generation.py::"
        "test_probabilities_are_those_of_the_definition",
    ),
]
ENCODERS = [
    _fault(
        "encoder: a choice of GELU that is not exact",
        "jax.nn.gelu(self.up(x), approximate=False)",
        "jax.nn.gelu(self.up(x), approximate=True)",
        f"{ENCODER}::test_logits_equal_those_that_transformers_recorded",
    ),
    _fault(
        "encoder: RoBERTa counts positions from 0",
        'return 0 if self.family == "bert" else self.padding_id + 1',
        "return 0",
        f"{ENCODER}::test_logits_equal_those_that_transformers_recorded",
    ),
    _fault(
        "encoder: a relative bias by query minus key",
        "offsets = positions[None, :] - positions[:, None]",
        "offsets = positions[:, None] - positions[None, :]",
        f"{ENCODER}::test_logits_equal_those_that_transformers_recorded",
    ),
    _fault(
        "encoder: padding is read",
        "mask = (jnp.arange(length) < lengths[:, None])[:, None, None]",
        "mask = (jnp.arange(length) <= lengths[:, None])[:, None, None]",
        f"{ENCODER}::test_padding_changes_nothing",
    ),
    _fault(
        "encoder: dropout in training reads padding",
        "logits = jnp.where(scope.mask, logits, jnp.finfo(jnp.float32).min)",
        "pass",
        "tests/train/step/test_encoder_step.py",
        f"{ENCODER}::test_attention_with_and_without_dropout_is_the_same_where_nothing"
        "_drops",
    ),
    _fault(
        "encoder: dropout forgets the attention weights",
        "dropout(jax.nn.softmax(logits), self.dropout, key)",
        "jax.nn.softmax(logits)",
        f"{ENCODER}::test_each_rate_drops_out_by_the_key",
    ),
    _fault(
        "encoder: labels in the order of their text",
        "tuple(names[str(index)] for index in range(len(names)))",
        "tuple(sorted(names[str(index)] for index in range(len(names))))",
        f"{ENCODER_WEIGHTS}::test_labels_keep_their_order",
    ),
    _fault(
        "encoder: a head for other labels is taken",
        "if stored == (config.head, config.labels):",
        "if stored.head == config.head:",
        f"{ENCODER_WEIGHTS}::test_a_stored_head_for_something_else_is_refused_unless_"
        "replaced",
    ),
    _fault(
        "encoder: missing layers may be new",
        "(name.startswith(POOLER) and not has_pooler)",
        "name not in names",
        f"{ENCODER_WEIGHTS}::test_tensors_that_do_not_fit_are_refused",
    ),
    _fault(
        "encoder: biases decay",
        'return "norm" not in name and "bias" not in name',
        'return "norm" not in name',
        "tests/train/step/test_encoder_step.py::test_norms_and_biases_do_not_decay",
    ),
]
TRAINING = [
    _fault(
        "parts of a batch have weights of their own",
        "found = _gradient(loss_sums, params, part, own, count)[:2]",
        "found = _gradient(loss_sums, params, part, own)[:2]",
        "tests/train/step/test_train_step.py",
    ),
    _fault(
        "a step that is not finite is taken",
        'is_finite = jnp.isfinite(means["loss"]) & jnp.isfinite(norm)',
        "is_finite = jnp.bool_(True)",
        "tests/train/step/test_train_step.py",
    ),
    _fault(
        "skipped steps count for the schedule",
        '"learning_rate": schedule(state.step - state.skipped_steps)',
        '"learning_rate": schedule(state.step)',
        "tests/train/step/test_train_step.py",
    ),
    _fault(
        "gradients are never clipped",
        "factor = jnp.minimum(max_gradient_norm / norm, 1)",
        "factor = jnp.float32(1)",
        "tests/train/step/test_train_step.py",
    ),
    _fault(
        "an evaluation is the mean of batches",
        "return float(sum(totals) / sum(counts))",
        "return float(sum(t / c for t, c in zip(totals, counts)) / len(counts))",
        "tests/train/step/test_train_step.py",
    ),
    _fault(
        "norms decay like kernels",
        "        mask=_is_decayed,\n",
        "        mask=None,\n",
        "tests/train/step/test_optimizers.py",
    ),
    _fault(
        "the seed of a run does not reach random subspaces",
        "        seed=seed,\n        mask",
        "        seed=0,\n        mask",
        "tests/train/step/test_optimizers.py",
    ),
    _fault(
        "rows overlap by nothing",
        "stops = np.minimum(starts + length + 1, ends)",
        "stops = np.minimum(starts + length, ends)",
        "tests/train/data/test_dataset.py",
    ),
    _fault(
        "a stream begins a document again when it continues",
        '        self._used = state["used_tokens"]\n',
        "        self._used = 0\n",
        "tests/train/data/test_dataset.py",
        "tests/train/data/test_streams.py",
        "tests/train/loop/test_continuation.py",
    ),
    _fault(
        "the tokenizer reads the held-out text",
        "pieces = itertools.takewhile(lambda part: not part[0], self._divided())",
        "pieces = self._divided()",
        "tests/train/data/test_dataset.py::test_tokenizer_never_saw_the_held_out_text",
    ),
    _fault(
        "a checkpoint is not compared with its checksums",
        "if unlike and _unlike(tree, check[name], whole=False):",
        "if False:",
        "tests/train/rundir/test_checkpoints.py",
    ),
    _fault(
        "checksums do not know positions",
        "mixed = _mix(mixed + index * np.uint32(2_654_435_761) + np.uint32(size))",
        "mixed = _mix(mixed + np.uint32(size))",
        "tests/train/rundir/test_checkpoints.py",
    ),
    _fault(
        "the position in the data is not restored",
        "batches.set_state(_own_position(positions))",
        "_own_position(positions)",
        "tests/train/rundir/test_checkpoints.py",
        "tests/train/test_resume.py",
    ),
    _fault(
        "a damaged checkpoint stays where it is",
        "(self._directory / str(step)).rename(target)",
        "target.mkdir()",
        "tests/train/rundir/test_checkpoints.py",
    ),
    _fault(
        "the row of a checkpoint's step is written after it",
        "                journal.record(*previous)\n                previous = None\n",
        "                pass\n",
        "tests/train/test_resume.py",
        "tests/train/test_pretrain.py",
        "tests/train/loop/test_journal.py",
    ),
    _fault(
        "the wrong exit code after Ctrl-C",
        "return 130 if self.received == signal.SIGINT else 0",
        "return 0",
        "tests/train/system/test_interruption.py",
    ),
    _fault(
        "a file is written in place",
        "            sync(partial)\n            os.replace(partial, path)\n",
        "            path.write_bytes(partial.read_bytes())\n",
        "tests/train/system/test_files.py",
    ),
    _fault(
        "a line that did not fit stays",
        "            file.truncate(before)\n",
        "            pass\n",
        "tests/train/system/test_files.py",
    ),
    _fault(
        "a shorter run may be continued",
        "    if newest > config.steps:\n",
        "    if False:\n",
        "tests/train/rundir/test_directory.py",
    ),
    _fault(
        "skipped steps in a row are counted from the start",
        "self._skipped = [skipped, in_a_row + 1 if skipped > before else 0]",
        "self._skipped = [skipped, in_a_row + (skipped > before)]",
        "tests/train/loop/test_journal.py",
    ),
    _fault(
        "a model's later seeds choose its rate",
        "if trial.optimizer == chosen]",
        "if trial.optimizer == chosen or trial.seed in self.later_seeds]",
        "tests/train/comparison/test_search.py",
        "tests/train/comparison/test_comparing.py",
    ),
    _fault(
        "planned bytes are those of all devices",
        "math.prod(leaf.sharding.shard_shape(leaf.shape))\n",
        "math.prod(leaf.shape)\n",
        "tests/train/test_plan.py",
    ),
    _fault(
        "a batch that does not divide is let through",
        "    if rows % (parts * pieces):\n",
        "    if False:\n",
        "tests/train/step/test_mesh.py::test_a_batch_that_does_not_divide",
    ),
    _fault(
        "attention is counted half",
        "scores = 12 * config.num_layers",
        "scores = 6 * config.num_layers",
        "tests/train/step/test_throughput.py",
    ),
]
FAULTS = GEOMETRY + STAGES + MESH_FAULTS + BACKWARD + MODELS + ENCODERS + TRAINING


def _place(tree: pathlib.Path, fault: Fault) -> pathlib.Path | None:
    """The one file that has a fault's old text; None if it is not just one."""
    files = [path for top in SEARCHED for path in (tree / top).rglob("*.py")]
    counts = {path: path.read_text().count(fault.old) for path in files}
    found = [path for path, count in counts.items() if count]
    return found[0] if sum(counts.values()) == 1 else None


class _Failures:
    """Plugin of pytest that keeps the names of tests that fail."""

    def __init__(self):
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.names.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.names.append(f"{report.nodeid} (not collected)")


def _preload() -> None:
    """Imports modules that tests of programs need; none starts threads of JAX."""
    for name in ("optax", "flax.nnx", "orbax.checkpoint", "grain", "scipy.linalg"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _test(tree: pathlib.Path, tests: tuple[str, ...]) -> tuple[int, list[str]]:
    """Runs tests of a tree in this process; returns pytest's code and what failed."""
    for name in [name for name in sys.modules if name.split(".")[0] in COPIED]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(p for p in sys.path if pathlib.Path(p) != ROOT)]
    os.chdir(tree)
    failures = _Failures()
    options = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["-o", "addopts=", f"--basetemp={tree.parent / 'temporary'}"]
    code = pytest.main([*options, *tests], plugins=[failures])
    return int(code), failures.names


def _start(work: Callable[[], Any], result: pathlib.Path) -> int:
    """Forks a process that writes what `work` returns; returns its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    with open(os.devnull, "r+") as nothing:
        for stream in (0, 1, 2):
            os.dup2(nothing.fileno(), stream)
    code = 1
    try:
        os.setsid()
        result.write_text(json.dumps(work()))
        code = 0
    finally:
        os._exit(code)


def _try(fault: Fault, directory: pathlib.Path) -> tuple[int, list[str]]:
    """Writes a tree with the fault and runs its tests; "" for "" is no fault."""
    tree = directory / "tree"
    tree.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    if fault.old:
        path = tree / _place(ROOT, fault).relative_to(ROOT)
        path.write_text(path.read_text().replace(fault.old, fault.new))
    return _test(tree, fault.tests)


def _outcome(result: pathlib.Path) -> str:
    """Name of the first failed test, or the reason why no test failed."""
    if not result.exists():
        return "LOST: the process ended"
    code, failed = json.loads(result.read_text())
    if code == pytest.ExitCode.OK:
        return MISSED
    return failed[0] if failed else f"LOST: pytest ended with {code}"


def _report(fault: Fault, seconds: float, outcome: str) -> None:
    """Prints a line of the table."""
    place = _place(ROOT, fault) if fault.old else None
    file = place.relative_to(ROOT) if place else "-"
    print(f"{seconds:4.0f} s | {fault.name} | {file} | {outcome}", flush=True)


def _try_all(faults: list[Fault], jobs: int, seconds: float) -> list[str]:
    """Tries faults, some at a time; returns the outcome of each."""
    waiting, running, outcomes = list(faults), {}, []
    with tempfile.TemporaryDirectory() as directory:
        while waiting or running:
            while waiting and len(running) < jobs:
                fault = waiting.pop(0)
                if fault.old and _place(ROOT, fault) is None:
                    outcomes.append("LOST: its text is not there just once")
                    _report(fault, 0, outcomes[-1])
                    continue
                own = pathlib.Path(tempfile.mkdtemp(dir=directory))
                child = _start(lambda f=fault, d=own: _try(f, d), own / "result")
                running[child] = fault, own, time.monotonic()
            for child, (fault, own, began) in tuple(running.items()):
                took = time.monotonic() - began
                if took > seconds:
                    os.killpg(child, signal.SIGKILL)
                if took > seconds or os.waitpid(child, os.WNOHANG)[0]:
                    outcome = _outcome(own / "result")
                    if took > seconds:
                        os.waitpid(child, 0)
                        outcome = "LOST: no end in time"
                    _report(fault, took, outcome)
                    outcomes.append(outcome)
                    shutil.rmtree(own, ignore_errors=True)
                    del running[child]
            time.sleep(0.05)
    return outcomes


def main() -> int:
    """Prints which test catches each fault; returns 1 if one is missed or lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of faults")
    parser.add_argument("--seconds", type=float, default=600, help="limit for each")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--list", action="store_true", help="look for their texts only")
    asked = parser.parse_args()
    chosen = [
        fault
        for fault in FAULTS
        if not asked.names or any(name in fault.name for name in asked.names)
    ]
    if asked.list:
        for fault in chosen:
            _report(fault, 0, "found" if _place(ROOT, fault) else "LOST")
        return 0
    _preload()
    outcomes = _try_all(chosen, asked.jobs, asked.seconds)
    caught = [outcome for outcome in outcomes if outcome.startswith("tests/")]
    print(f"{len(caught)} of {len(chosen)} caught; the same tests without a fault:")
    tests = tuple(sorted(set(caught)))
    sound = _try_all([Fault("none", "", "", tests)], 1, 10 * asked.seconds)
    return 0 if len(caught) == len(chosen) and sound == [MISSED] else 1


if __name__ == "__main__":
    sys.exit(main())
