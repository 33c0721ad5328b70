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
from typing import Any

import pytest

from tests.faults import FAULTS
from tests.faults.fault import Fault

ROOT = pathlib.Path(__file__).parents[1]
COPIED = ("subtrack_jax", "models", "train", "tests", "pyproject.toml", "README.md")
MISSED = "MISSED: no test fails"
SEARCHED = ("subtrack_jax", "models", "train")


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
