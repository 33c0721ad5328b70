"""Two processes of four devices each, on this machine, against one with eight."""

import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.train.program import (
    ENVIRONMENT,
    ROOT,
    SMALL,
    read_metrics,
    read_rows,
    run,
)
from train.loop.subspace_report import DIAGNOSTICS_FILE

pytestmark = pytest.mark.slow

STEPS = 40
FLAGS = [*SMALL, "--steps", STEPS, "--eval-every-steps", 20, "--eval-tokens", 500]
FLAGS += ["--batch-size-sequences", 8, "--checkpoint-every-steps", 10]
FLAGS += ["--mesh", "fsdp=4,tensor=2", "--diagnostics"]


# Cannot read the arrays of one step.
HALF_BLIND = """
import sys
from train import pretrain
from train.rundir import checkpoint_reading as reading
read = reading.read_arrays
def fail(reader, step, items):
    if step == {step}:
        raise {error}
    return read(reader, step, items)
reading.read_arrays = fail
pretrain.main(sys.argv[1:])
"""


def start_two(directory, *, argv=FLAGS, second=("-m", "train.pretrain"), folders=None):
    """`second` is what the second process runs, `folders` is where both do."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = ["--coordinator-address", f"localhost:{port}", "--num-processes", 2]
    return [
        subprocess.Popen(
            [
                *(sys.executable, *program),
                *map(str, [*argv, *flags, "--process-id", index]),
                *("--output-dir", str(directory)),
            ],
            cwd=(folders or [ROOT, ROOT])[index],
            env=ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Tests that run in the background inherit an ignored Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        for index, program in enumerate([("-m", "train.pretrain"), second])
    ]


def wait_for_rows(count, processes, directory):
    metrics = directory / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert all(process.poll() is None for process in processes), [
            process.communicate() for process in processes
        ]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finish(processes, codes=(0, 0)):
    results = [process.communicate(timeout=400) for process in processes]
    for process, code, (_, err) in zip(processes, codes, results, strict=True):
        assert process.returncode == code, err[-3000:]
    return [out for out, _ in results]


def assert_same_numbers(directory, want):
    rows, want_rows = read_metrics(directory), read_metrics(want)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    for name in ("loss", "gradient_norm", "learning_rate", "captured_energy"):
        got, expected = ([row[name] for row in each[1:]] for each in (rows, want_rows))
        np.testing.assert_allclose(got, expected, rtol=2e-3, err_msg=name)
    assert rows[-1]["eval_loss"] == pytest.approx(want_rows[-1]["eval_loss"], rel=1e-3)
    looks, want_looks = (
        read_rows(each / DIAGNOSTICS_FILE) for each in (directory, want)
    )
    for row, want_row in zip(looks, want_looks, strict=True):
        for name, value in want_row.items():
            if isinstance(value, float):
                value = pytest.approx(value, rel=2e-2, abs=2e-3, nan_ok=True)
            assert row[name] == value, row


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one") / "run"
    done = run(*FLAGS, "--output-dir", directory, devices=8)
    assert done.returncode == 0, done.stderr
    return directory


def test_two_processes_killed_and_started_again(one_process, tmp_path):
    processes = start_two(tmp_path)
    wait_for_rows(15, processes, tmp_path)
    processes[1].kill()
    time.sleep(1)
    processes[0].kill()  # it would wait for the other for a while
    for process in processes:
        process.communicate()
    out, silent = finish(start_two(tmp_path))
    assert "Continued after step 10." in out
    assert "held-out loss" in out and "held-out loss" not in silent
    assert_same_numbers(tmp_path, one_process)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)]
)
def test_a_signal_for_one_stops_both_after_the_same_step(tmp_path, number, code):
    processes = start_two(tmp_path)
    wait_for_rows(5, processes, tmp_path)
    processes[1].send_signal(number)
    out, _ = finish(processes, codes=(0, code))
    stopped = read_metrics(tmp_path)[-1]["step"]
    assert f"Stopped by SIGTERM after step {stopped}" in out
    assert (tmp_path / "checkpoints" / str(stopped)).is_dir()


def test_both_go_on_from_what_both_can_read(one_process, tmp_path):
    copy = shutil.copytree(one_process, tmp_path / "copy")
    resume = {"argv": ["--resume", "--mesh", "fsdp=4,tensor=2"]}
    blind = HALF_BLIND.format(step=STEPS, error="MemoryError()")
    for process in start_two(copy, **resume, second=("-c", blind)):
        _, err = process.communicate(timeout=200)
        assert process.returncode == 2
        assert "cannot be read: process 1: MemoryError. It is not known to be" in err
    assert (copy / "checkpoints" / str(STEPS)).is_dir()
    blind = HALF_BLIND.format(step=STEPS, error="ValueError('DATA_LOSS: a bit')")
    out, _ = finish(start_two(copy, **resume, second=("-c", blind)))
    assert f"Continued after step {STEPS - 10}." in out
    assert (copy / "damaged-checkpoints" / str(STEPS)).is_dir()
    assert_same_numbers(copy, one_process)


@pytest.mark.parametrize(
    ("files", "directory", "message"),
    [
        (["text.txt"], "/run", "no file matches --data-glob 'text.txt'"),
        (["text.txt", "text.txt"], "run", "--output-dir run of process 1 (host "),
    ],
)
def test_what_one_process_lacks_ends_both(tmp_path, files, directory, message):
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    for folder, file in zip(folders, files, strict=False):
        shutil.copy(ROOT / "README.md", folder / file)
    directory = directory.replace("/", f"{tmp_path}/")
    argv = [*FLAGS, "--data-glob", "text.txt"]
    before = time.monotonic()
    for process in start_two(directory, argv=argv, folders=folders):
        _, err = process.communicate(timeout=100)
        assert process.returncode == 2
        assert err.startswith("error: ") and err.count("\n") == 1
        assert message in err
    assert time.monotonic() - before < 90


@pytest.mark.parametrize(
    ("count", "mesh"), [(4, "fsdp=4"), (1, "fsdp=1"), (8, "data=2,fsdp=2,tensor=2")]
)
def test_a_checkpoint_resumes_on_another_mesh(one_process, tmp_path, count, mesh):
    copy = shutil.copytree(one_process, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    done = run("--resume", "--output-dir", copy, "--mesh", mesh, devices=count)
    assert done.returncode == 0, done.stderr
    assert f"Continued after step {STEPS - 10}." in done.stdout
    assert_same_numbers(copy, one_process)
