"""Runs that are killed, stopped or damaged, for real, and then continued."""

import json
import re
import resource
import shutil
import signal
import time

import pytest

from tests.train.program import (
    SMALL,
    assert_one_line_error,
    assert_pretrain_refuses,
    read_metrics,
    read_values,
    run,
    start,
    stop_after,
)
from tests.train.rundir.test_directory import contents

STEPS = 200
FLAGS = [*SMALL, "--steps", STEPS, "--eval-every-steps", 70]
FLAGS += ["--checkpoint-every-steps", 20, "--eval-tokens", 500]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "uninterrupted"
    done = run(*FLAGS, "--output-dir", directory)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(directory)) == STEPS + 1
    return directory


@pytest.fixture
def copy(uninterrupted, tmp_path):
    """The finished run, to be broken."""
    return shutil.copytree(uninterrupted, tmp_path / "copy")


def test_killed_at_any_moment_it_continues_to_the_last_bit(uninterrupted, tmp_path):
    flags = [*FLAGS, "--output-dir", tmp_path]
    resumed = ["--resume", "--output-dir", tmp_path]  # the values are in the directory
    # Before the first checkpoint, within and after the writing of another.
    for rows, argv in [(3, flags), (20, flags), (61, resumed)]:
        code, _, _ = stop_after(rows, signal.SIGKILL, start(*argv), tmp_path)
        assert code == -signal.SIGKILL
    done = run(*resumed)
    assert done.returncode == 0, done.stderr
    step = int(re.search(r"Continued after step (\d+)", done.stdout)[1])
    assert step >= 20 and step % 20 == 0  # the last ones may have been under way
    assert read_values(tmp_path) == read_values(uninterrupted)


@pytest.mark.slow
def test_a_resumed_run_may_update_in_the_backward_pass(uninterrupted, tmp_path):
    losses = {}
    for flags in ([], ["--update-in-backward"]):
        directory = shutil.copytree(uninterrupted, tmp_path / str(len(flags)))
        argv = ["--resume", "--output-dir", directory, "--steps", STEPS + 6]
        done = run(*argv, "--remat", "full", *flags)
        assert done.returncode == 0, done.stderr
        rows = read_metrics(directory)[-6:]
        losses[len(flags)] = [row["loss"] for row in rows]
        assert rows[-1]["skipped_steps"] == 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_sigterm_saves_and_exits_with_0(uninterrupted, tmp_path):
    flags = [*FLAGS, "--output-dir", tmp_path]
    code, out, err = stop_after(31, signal.SIGTERM, start(*flags), tmp_path)
    assert code == 0, err
    rows = read_metrics(tmp_path)[-1]["step"]
    assert 31 <= rows < STEPS
    assert f"Stopped by SIGTERM after step {rows}" in out
    assert "SIGTERM: saving after this step; again to stop now" in err
    assert (tmp_path / "checkpoints" / str(rows)).is_dir()
    assert (tmp_path / "curve.png").exists()
    resume = out.rpartition("To continue: python -m train.pretrain ")[2].split()
    done = run(*resume)
    assert done.returncode == 0, done.stderr
    assert f"Continued after step {rows}." in done.stdout
    assert read_values(tmp_path) == read_values(uninterrupted)


def test_interrupting_saves_too(uninterrupted, tmp_path):
    flags = [*FLAGS, "--output-dir", tmp_path, "--seed", 7]
    code, out, err = stop_after(3, signal.SIGINT, start(*flags), tmp_path)
    assert code == 130
    assert "Traceback" not in err
    assert "SIGINT: saving after this step; again to stop now" in err
    rows = read_metrics(tmp_path)[-1]["step"]
    assert f"Stopped by SIGINT after step {rows}" in out
    assert (tmp_path / "checkpoints" / str(rows)).is_dir()
    # The same command with another seed: other weights, on other batches.
    one, other = read_metrics(uninterrupted)[:2], read_metrics(tmp_path)[:2]
    assert one[0]["eval_loss"] != other[0]["eval_loss"]
    assert one[1]["loss"] != other[1]["loss"]


def test_a_finished_run_is_left_as_it_is(copy):
    before = read_metrics(copy)
    done = run(*FLAGS, "--output-dir", copy)
    assert done.returncode == 0, done.stderr
    assert read_metrics(copy) == before


def test_two_damaged_checkpoints_leave_no_way_on(copy):
    for path in (copy / "checkpoints").glob("*/params/manifest.ocdbt"):
        path.write_bytes(b"")
    done = run("--resume", "--output-dir", copy)
    assert done.returncode == 2
    assert f"no checkpoint in {copy / 'checkpoints'} can be read" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list((copy / "checkpoints").iterdir())) == 2


def test_a_truncated_newest_checkpoint_is_reported_and_the_one_before_used(
    uninterrupted, copy
):
    newest = copy / "checkpoints" / str(STEPS)
    for path in newest.glob("*/ocdbt.process_0/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = run("--resume", "--output-dir", copy)
    assert done.returncode == 0, done.stderr
    assert f"the checkpoint of step {STEPS} is damaged" in done.stderr
    assert "Traceback" not in done.stderr
    assert f"Continued after step {STEPS - 20}." in done.stdout
    assert (copy / "damaged-checkpoints" / str(STEPS)).is_dir()
    assert (copy / "checkpoints" / str(STEPS)).is_dir()
    assert read_values(copy) == read_values(uninterrupted)


def test_a_full_disk_is_a_clear_error_and_costs_no_checkpoint(uninterrupted, copy):
    """Files cannot grow beyond a size that metrics fit into, and checkpoints do not."""
    flags = [*FLAGS, "--output-dir", copy]
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    limit = (copy / "metrics.jsonl").stat().st_size + 10_000

    def fill_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    rows = STEPS - 20
    done = run(*flags, preexec_fn=fill_disk)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert "The last good checkpoint: step" in done.stderr
    assert (copy / "checkpoints" / str(rows)).is_dir()
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    assert f"Continued after step {rows}." in done.stdout
    assert read_values(copy) == read_values(uninterrupted)


def test_another_config_is_an_error_that_shows_the_difference(copy, capsys):
    flags = ["--output-dir", copy, "--rank", 4, "--optimizer", "galore"]
    told = "--rank 4 here, 8 there", "--optimizer galore here, subtrack there"
    for argv in ([*FLAGS, *flags], ["--resume", *flags]):
        err = assert_pretrain_refuses(capsys, argv, *told)
        assert "--steps" not in err


def test_a_run_is_extended_and_changed_from_a_step_on(copy, capsys):
    before = (copy / "metrics.jsonl").read_bytes()
    flags = ["--steps", STEPS + 9, "--gradient-accumulation-steps", 2]
    flags += ["--eval-every-steps", 4, "--learning-rate", 1e-3]
    argv = ["--resume", "--output-dir", copy, *flags]
    told = "--learning-rate 0.001 here, 0.01 there"
    allow = "--allow-changes optimizer.learning_rate to continue"
    assert "--steps" not in assert_pretrain_refuses(capsys, argv, told, allow)
    done = run(
        *["--resume", "--output-dir", copy, *flags, "--allow-changes", "learning_rate"]
    )
    assert done.returncode == 0, done.stderr
    assert f"Changed    --steps from {STEPS} to {STEPS + 9}" in done.stdout
    assert (copy / "metrics.jsonl").read_bytes().startswith(before)
    last, first_new = read_metrics(copy)[-10:-8]
    assert (last["step"], first_new["step"]) == (STEPS, STEPS + 1)
    assert first_new["tokens"] == last["tokens"] + 4 * 32
    assert first_new["elapsed_seconds"] > last["elapsed_seconds"]
    evaluated = [row["step"] for row in read_metrics(copy)[-9:] if "eval_loss" in row]
    assert evaluated == [STEPS + 4, STEPS + 8, STEPS + 9]
    (row,) = map(json.loads, (copy / "config-history.jsonl").read_text().splitlines())
    assert row["step"] == STEPS
    assert row["changes"]["optimizer.learning_rate"] == {"from": 0.01, "to": 0.001}
    assert json.loads((copy / "config.json").read_text())["steps"] == STEPS + 9


def test_a_run_without_its_checkpoints_is_left_as_it_is(copy, capsys):
    (copy / "checkpoints").rename(copy / "elsewhere")
    before = contents(copy)
    for argv in ([], ["--resume"]):
        told = f"put {copy / 'checkpoints'} back to continue it"
        argv = [*(argv or FLAGS), "--output-dir", copy]
        assert_pretrain_refuses(capsys, argv, told)
        assert contents(copy) == before
        (copy / "checkpoints").mkdir(exist_ok=True)
        before = contents(copy)


def test_a_run_that_goes_on_is_not_joined(tmp_path):
    flags = [*FLAGS, "--output-dir", tmp_path]
    process = start(*flags)
    try:
        code = None
        while code is None and not (tmp_path / "metrics.jsonl").exists():
            code = process.poll()
            time.sleep(0.02)
        assert_one_line_error(run(*flags), "is going on")
    finally:
        process.kill()
        process.communicate()


def test_nothing_to_resume(tmp_path, capsys):
    argv = ["--resume", "--output-dir", tmp_path / "typo"]
    assert_pretrain_refuses(capsys, argv, "there is no run in --output-dir")
    assert not (tmp_path / "typo").exists()


def test_a_saved_config_repeats_a_run(uninterrupted, tmp_path):
    config = uninterrupted / "config.json"
    done = run("--config", config, "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_values(tmp_path) == read_values(uninterrupted)
