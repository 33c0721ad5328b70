"""The program from end to end, and its last words when something is wrong."""

import json
import math
import re
import shutil

import pytest

from tests.train.program import (
    SMALL,
    STEPS,
    assert_pretrain_refuses,
    read_metrics,
    run,
)
from train import export
from train.generation import exporting
from train.loop import messages


def test_a_run_learns_and_leaves_its_files(uninterrupted):
    directory = uninterrupted.directory

    rows = read_metrics(directory)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    before, *rows = rows
    out = uninterrupted.out
    assert before["eval_loss"] == pytest.approx(math.log(300), abs=0.5)
    assert f"Before training, held-out loss {before['eval_loss']:.3f}" in out
    seconds = 0.0
    for step, row in enumerate(rows, 1):
        assert row["tokens_per_second"] > 0
        assert row["tokens"] == step * 4 * 32
        assert row["epoch"] == pytest.approx(step * rows[0]["epoch"])
        assert seconds < (seconds := row["elapsed_seconds"])
        assert row["learning_rate"] > 0
        assert row["gradient_norm"] > 0
        assert 0 < row["loss"] < 7
        assert row["peak_memory_bytes"] > 2**20
        assert row["skipped_steps"] == 0
        assert 0 < row["captured_energy"] < 1
    evaluations = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert list(evaluations) == [40, 80, STEPS]
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert evaluations[STEPS] < evaluations[40] < rows[0]["loss"] - 0.5

    assert all(0 < row["mfu"] < 1 for row in rows)
    assert len(list((directory / "tensorboard").iterdir())) == 1
    assert (directory / "curve.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((directory / "config.json").read_text())
    assert saved["optimizer"]["name"] == "subtrack"
    assert saved["steps"] == STEPS
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    assert len(tokenizer["model"]["vocab"]) == 300
    # A sample before and one after, and a progress bar.
    assert out.count("The whale") == 2
    assert f"held-out loss {evaluations[STEPS]:.3f}" in out
    assert "it was never lower" in out
    assert {p.name for p in (directory / "checkpoints").iterdir()} == {"80", "100"}
    assert f"{STEPS}/{STEPS}" in uninterrupted.err
    assert "MFU=" in uninterrupted.err
    assert f"perplexity {math.exp(evaluations[STEPS]):.2f}" in out
    assert f"train.pretrain --resume --output-dir {directory}\n" in out
    assert f"train.generate --checkpoint {directory}\n" in out
    assert f"train.export --checkpoint {directory} --to hf\n" in out


def test_a_loss_that_is_not_finite_is_skipped_then_the_end(uninterrupted, tmp_path):
    """A learning rate beyond all reason; what came before stays."""
    flags = [*SMALL, "--steps", 40, "--learning-rate", 1e30, "--seed", 7]
    flags += ["--max-gradient-norm", 1e30]
    flags += ["--optimizer", "adamw", "--max-skipped-steps-in-a-row", 4]
    done = run(*flags, "--eval-tokens", 500, "--output-dir", tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    rows = read_metrics(tmp_path)
    assert f"the last 4 steps, to step {rows[-1]['step']}," in last
    assert "lower --learning-rate" in last
    assert [row["skipped_steps"] for row in rows[-5:]] == [0, 1, 2, 3, 4]
    assert rows[-1]["loss"] is None
    assert all("captured_energy" not in row for row in rows)
    # Another seed: other weights.
    seed_0 = read_metrics(uninterrupted.directory)[0]["eval_loss"]
    assert abs(rows[0]["eval_loss"] - seed_0) > 1e-4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "0"], "--rank must be at least 1, got 0"),
        (["--rank", "10000"], "--rank 10000 leaves no matrix to --optimizer subtrack"),
        (["--data-glob", "nothing/*.txt"], "no file matches --data-glob"),
        (["--output-dir", "/dev/null/run"], "cannot write to --output-dir"),
        ([*SMALL, "--sample-prompt", "o " * 99], "--sample-prompt has "),
    ],
)
def test_bad_values_end_in_one_line_and_code_2(tmp_path, capsys, flags, message):
    assert_pretrain_refuses(capsys, ["--output-dir", tmp_path, *flags], message)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([], "After training:"),
        ([3, 2], "loss 2.000, perplexity 7.39; it was never lower:"),
        ([2, 3], "loss 3.000, perplexity 20.09; the best was 2.000 at step 10, which"),
        ([2, 2], "loss 2.000, perplexity 7.39; the best was 2.000 at step 10, which"),
        ([2, math.nan], "loss nan, perplexity nan; the best was 2.000 at step 10, wh"),
        ([math.nan, math.inf], "held-out loss inf; it was never finite:"),
    ],
)
def test_the_end_tells_the_last_and_the_best_held_out_loss(losses, message):
    rows = [
        {"step": step, "eval_loss": loss} for step, loss in enumerate(losses, start=10)
    ]
    assert message in messages.outcome([{"step": 1}, *rows], [10, 11])


def test_starts_from_weights_of_another_program(uninterrupted, tmp_path):
    """Their shape and tokenizer; the first loss is the one they had."""
    # The same held-out tokens.
    flags = ["--sequence-length-tokens", 32, "--batch-size-sequences", 4]
    flags += ["--held-out-fraction", 0.01]
    directory = shutil.copytree(uninterrupted.directory, tmp_path / "first")
    exported = exporting.export(export.ExportConfig(directory))
    # Too high a rate: what was given stays the best, and is kept.
    flags += ["--init-from", exported, "--rank", 8, "--steps", 1]
    flags += ["--eval-tokens", 500, "--learning-rate", 1]
    again = run(*flags, "--output-dir", tmp_path / "second")
    assert again.returncode == 0, again.stderr
    before = re.search(r"Before training, held-out loss (\S+):", again.stdout)[1]
    last = read_metrics(tmp_path / "first")[-1]["eval_loss"]
    assert float(before) == pytest.approx(last, abs=2e-3)
    first, second = read_metrics(tmp_path / "second")
    assert f"{first['eval_loss']:.3f}" == before
    assert first["eval_loss"] < second["eval_loss"] - 0.1
    assert f"the best was {before} before training, which is saved" in again.stdout
    assert f"held-out loss rose from {before} before training to" in again.stderr
    assert "try a --learning-rate below 1," in again.stderr
    assert f"Model      weights of {exported}: " in again.stdout
    assert "Documents  end with <|endoftext|>\n" in again.stdout
    kept = (tmp_path / "second" / "checkpoints").iterdir()
    assert sorted(path.name for path in kept) == ["0", "1"]
    tokenizers = [
        path.read_text() for path in tmp_path.glob("*/tokenizer.json") if path.is_file()
    ]
    assert len(tokenizers) == 2 and tokenizers[0] == tokenizers[1]
