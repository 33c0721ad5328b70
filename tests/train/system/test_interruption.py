"""SIGTERM and Ctrl-C: message at once, exit at the second signal."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.train.program import ROOT
from train.config.run_config import CheckpointConfig
from train.rundir import checkpoints as checkpoint
from train.system import files, interruption
from train.system.interruption import Interruption

SIGNALS = [signal.SIGTERM, signal.SIGINT]
ANSWER = "saving after this step"


@pytest.fixture(autouse=True)
def obeyed(monkeypatch):
    """Records signals that would end the program; restores pytest's handlers."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    obeyed = []
    monkeypatch.setattr(interruption, "_stop_now", obeyed.append)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    yield obeyed
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nothing_comes(obeyed):
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruption(ANSWER) as interruption:
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert interruption.received is None
    assert not interruption.reached(1)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)]
)
def test_the_first_signal_is_answered(obeyed, number, exit_code, capfd):
    with Interruption(ANSWER) as interruption:
        signal.raise_signal(number)
        assert interruption.reached(1)
        assert interruption.received is number
    assert obeyed == []
    assert interruption.exit_code == exit_code
    assert capfd.readouterr() == ("", f"\n{number.name}: {ANSWER}; again to stop now\n")


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_signal_is_obeyed(obeyed, first, second):
    with Interruption(ANSWER) as interruption:
        signal.raise_signal(first)
        signal.raise_signal(second)
        assert interruption.received is first
        assert obeyed == [second]


@pytest.mark.parametrize("number", SIGNALS)
def test_without_an_answer_the_first_is_obeyed(obeyed, number):
    with Interruption():
        signal.raise_signal(number)
        assert obeyed == [number]


def test_contexts_within_each_other(obeyed):
    """Inner contexts that delay signals within an outer one that exits at once."""
    with Interruption() as outer:
        with Interruption(ANSWER):
            signal.raise_signal(signal.SIGINT)
            assert obeyed == []
        signal.raise_signal(signal.SIGINT)
        assert outer.received is None


def test_an_error_restores_the_handlers(obeyed):
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), Interruption(ANSWER):
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_an_interruption_that_is_ignored_stays_ignored(obeyed):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruption(ANSWER) as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.received is None
        signal.raise_signal(signal.SIGTERM)
        assert interruption.received is signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert obeyed == []


# The main thread is in C code for minutes, with a temporary file half-written.
BUSY = """
import hashlib, pathlib, sys
from train.system import files, interruption
with interruption.Interruption({answer}), files.replacing(pathlib.Path("file")) as new:
    new.write_text("half")
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("answer", [None, ANSWER])
def test_a_busy_program_answers_and_stops_at_once(tmp_path, number, answer):
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY.format(answer=repr(answer))],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        if answer is not None:
            process.send_signal(number)
            assert process.stderr.readline() == b"\n"
            said = f"{number.name}: {ANSWER}; again to stop now\n"
            assert process.stderr.readline() == said.encode()
        before = time.monotonic()
        process.send_signal(number)
        _, err = process.communicate(timeout=10)
        assert time.monotonic() - before < 2
    finally:
        process.kill()
    assert err == f"\nstopped by {number.name}\n".encode()
    assert process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_a_program_answers_while_it_is_imported():
    """Imports take seconds, during which Python would print a traceback."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "train.pretrain", "--help"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        # A module has its line when it has been imported.
        while not process.stderr.readline().endswith("| train\n"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "stopped by SIGINT" in err
    assert "Traceback" not in err


def test_a_checkpoint_that_is_being_written_is_removed(tmp_path):
    """Other files stay, including those that Orbax has just renamed."""
    with checkpoint.Checkpoints(tmp_path, CheckpointConfig()):
        directory = tmp_path / checkpoint.CHECKPOINTS
        for name in ("10", "20", "30.orbax-checkpoint-tmp"):
            (directory / name / "params").mkdir(parents=True)
        files.discard_unfinished()
        assert sorted(path.name for path in directory.iterdir()) == ["10", "20"]
