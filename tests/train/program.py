"""The program as a user runs it: in a process of its own, from the checkout."""

import contextlib
import json
import math
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import pytest

from train import pretrain
from train.system import out_of_memory

ROOT = pathlib.Path(__file__).parents[2]
SMALL = [
    *["--hidden-size", "32", "--mlp-size", "64", "--num-layers", "2"],
    *["--num-heads", "2", "--vocabulary-size", "300", "--held-out-fraction", "0.01"],
    *["--sequence-length-tokens", "32", "--batch-size-sequences", "4"],
    *["--rank", "8", "--update-interval", "5", "--learning-rate", "1e-2"],
    *["--sample-length-tokens", "20"],
]
CACHE = pathlib.Path(tempfile.gettempdir(), f"subtrack-jax-tests-{os.getuid()}")
# Compile quickly, and each program once for all processes.
ENVIRONMENT = os.environ | {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "XDG_CACHE_HOME": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}
# A run with all that it can write.
STEPS = 100
FLAGS = [*SMALL, "--steps", STEPS, "--eval-every-steps", 40, "--eval-tokens", 500]
FLAGS += ["--checkpoint-every-steps", 20, "--diagnostics", "--tensorboard"]
FLAGS += ["--peak-teraflops", 1]
TIMINGS = {"elapsed_seconds", "tokens_per_second", "peak_memory_bytes", "mfu"}


def command(*argv, program="train.pretrain"):
    return [sys.executable, "-m", program, *map(str, argv)]


def assert_refuses(main, capsys, argv, *messages):
    """The program ends with one line that has these words, and nothing else."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in argv])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    for message in messages:
        assert message in err
    return err


def keeps_memory():
    """Programs in this process do not register what trims memory of later tests."""
    return mock.patch.object(out_of_memory, "trim_after_compilations")


def assert_pretrain_refuses(capsys, argv, *messages):
    """As `assert_refuses`, of train.pretrain on the eight devices of this process."""
    argv = [*argv, "--mesh", "tensor=8"]
    with keeps_memory():
        return assert_refuses(pretrain.main, capsys, argv, *messages)


@contextlib.contextmanager
def limited_file_size(most_bytes):
    """As on a full disk, files of this process cannot grow any further."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run(*argv, program="train.pretrain", devices=1, environment=None, **options):
    """Waits for the program; its output is in the result."""
    return subprocess.run(
        command(*argv, program=program),
        cwd=ROOT,
        env=ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": str(devices)} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=400,
        **options,
    )


def start(*argv, program="train.pretrain"):
    """Starts the program without waiting for it."""
    return subprocess.Popen(
        command(*argv, program=program),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background inherit an ignored Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_rows(rows, process, directory):
    """Waits until so many steps of a run are written down."""
    deadline = time.monotonic() + 240
    metrics = directory / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") <= rows:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.005)


def stop_after(rows, sent, process, directory):
    """Sends a signal once so many steps are written down; returns (code, out, err)."""
    wait_for_rows(rows, process, directory)
    process.send_signal(sent)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def read_rows(path):
    """The rows of a file of JSON lines; NaN for null."""
    return [
        {name: math.nan if value is None else value for name, value in row.items()}
        for row in map(json.loads, path.read_text().splitlines())
    ]


def read_metrics(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def read_values(directory):
    """Rows without the values that depend on how fast the machine is."""
    return [
        {name: value for name, value in row.items() if name not in TIMINGS}
        for row in read_metrics(directory)
    ]


def assert_one_line_error(done, message):
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
