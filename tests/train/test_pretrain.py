"""The program as a user runs it: in a process of its own, from the checkout."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from train import cli, data, optimizers, pretrain, step
from train.config import PRESETS

ROOT = pathlib.Path(__file__).parents[2]
# As `quick_compilation` does for the tests within this process.
ENVIRONMENT = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
SMALL = [
    *["--hidden-size", "32", "--mlp-size", "64", "--num-layers", "2"],
    *["--num-heads", "2", "--vocabulary-size", "300", "--held-out-fraction", "0.01"],
    *["--sequence-length-tokens", "32", "--batch-size-sequences", "4"],
    *["--rank", "8", "--update-interval", "5", "--learning-rate", "1e-2"],
    *["--sample-length-tokens", "20"],
]


def command(*argv):
    return [sys.executable, "-m", "train.pretrain", *argv]


def run(*argv):
    return subprocess.run(
        command(*argv),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def read_metrics(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("optimizer", ["subtrack", "adamw"])
def test_a_short_run_learns_and_leaves_its_files(tmp_path, optimizer):
    directory = tmp_path / "run"
    flags = ["--steps", "42", "--eval-every-steps", "20", "--output-dir", directory]
    done = run(*SMALL, *map(str, flags), "--optimizer", optimizer)
    assert done.returncode == 0, done.stderr

    rows = read_metrics(directory)
    assert [row["step"] for row in rows] == list(range(1, 43))
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert row["learning_rate"] > 0
        assert row["gradient_norm"] > 0
        assert 0 < row["loss"] < 7
    evaluations = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert list(evaluations) == [20, 40, 42]
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert evaluations[42] < evaluations[20] < rows[0]["loss"] - 0.5

    assert (directory / "curve.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((directory / "config.json").read_text())
    assert saved["optimizer"]["name"] == optimizer
    assert saved["steps"] == 42
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    assert len(tokenizer["model"]["vocab"]) == 300
    # A sample before and one after, and a progress bar.
    assert done.stdout.count("The whale") == 2
    assert f"held-out loss {evaluations[42]:.3f}" in done.stdout
    assert "42/42" in done.stderr


def test_the_seed_decides_all_that_is_random(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("many a whale, many a ship and no land. " * 200)
    flags = [*SMALL, "--steps", "3", "--optimizer", "adamw"]
    flags += ["--data-glob", str(tmp_path / "text.txt")]
    config = cli.parse(PRESETS, "tiny", pretrain.PROGRAM, flags)
    corpus = data.load_corpus(config.data, config.model.vocabulary_size)

    config = dataclasses.replace(config, seed=7)
    seeds = []

    def spy(module, name, seed_of):
        function = getattr(module, name)

        def call(*arguments):
            seeds.append(seed_of(*arguments))
            return function(*arguments)

        monkeypatch.setattr(module, name, call)

    def losses(name):
        (tmp_path / name).mkdir()
        pretrain.pretrain(config, corpus, tmp_path / name)
        return [row["loss"] for row in read_metrics(tmp_path / name)]

    spy(data, "train_batches", lambda corpus, config, seed: seed)
    spy(optimizers, "make_optimizer", lambda config, schedule, seed: seed)
    spy(step, "create_state", lambda model, optimizer, key: key)
    one = losses("one")
    assert sorted(map(str, seeds)) == sorted(map(str, [7, 7, jax.random.key(7)]))
    assert losses("two") == one


def test_interrupting_keeps_what_was_measured(tmp_path):
    flags = ["--steps", "1000000", "--output-dir", str(tmp_path)]
    process = subprocess.Popen(
        command(*SMALL, *flags, "--optimizer", "adamw"),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background inherit an ignored Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and len(read_metrics(tmp_path)) >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert str(tmp_path) in err.splitlines()[-1]
    assert len(read_metrics(tmp_path)) >= 3
    assert (tmp_path / "curve.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "0"], "--rank must be at least 1, got 0"),
        (["--data-glob", "nothing/*.txt"], "no file matches --data-glob"),
        (["--output-dir", "/dev/null/run"], "cannot write to --output-dir"),
    ],
)
def test_bad_values_end_in_one_line_and_code_2(flags, message):
    done = run(*flags)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
