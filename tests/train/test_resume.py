"""Runs that are killed, stopped or damaged, for real, and then continued."""

import json
import re
import resource
import shutil
import signal

import pytest

from tests.train.program import (
    FLAGS,
    STEPS,
    assert_pretrain_refuses,
    keeps_memory,
    read_metrics,
    read_rows,
    read_values,
    run,
    start,
    stop_after,
    wait_for_rows,
)
from tests.train.rundir.test_directory import contents
from train import pretrain
from train.loop.subspace_report import DIAGNOSTICS_FILE, PLOT_FILE


@pytest.fixture
def copy(uninterrupted, tmp_path):
    """The finished run, to be broken."""
    return shutil.copytree(uninterrupted.directory, tmp_path / "copy")


def test_killed_at_any_moment_it_continues_to_the_last_bit(
    uninterrupted, tmp_path, capsys
):
    """Begun from the other run's saved config, it repeats that run."""
    begin = ["--config", uninterrupted.directory / "config.json"]
    process = start(*begin, "--output-dir", tmp_path)
    # Before the first checkpoint.
    wait_for_rows(3, process, tmp_path)
    process.send_signal(signal.SIGSTOP)  # it must not end before the next line
    argv = [*FLAGS, "--output-dir", tmp_path]
    assert_pretrain_refuses(capsys, argv, "is going on")
    process.kill()
    process.communicate()
    # While another is written; the values are in the directory.
    resumed = ["--resume", "--output-dir", tmp_path]
    code, _, _ = stop_after(41, signal.SIGKILL, start(*resumed), tmp_path)
    assert code == -signal.SIGKILL
    done = run(*resumed)
    assert done.returncode == 0, done.stderr
    step = int(re.search(r"Continued after step (\d+)", done.stdout)[1])
    assert step >= 20 and step % 20 == 0  # the last one may have been under way
    assert read_values(tmp_path) == read_values(uninterrupted.directory)
    for name in (DIAGNOSTICS_FILE, PLOT_FILE):
        want = (uninterrupted.directory / name).read_bytes()
        assert (tmp_path / name).read_bytes() == want


@pytest.mark.slow
def test_a_resumed_run_may_update_in_the_backward_pass(uninterrupted, tmp_path):
    losses = {}
    for flags in ([], ["--update-in-backward"]):
        directory = shutil.copytree(uninterrupted.directory, tmp_path / str(len(flags)))
        argv = ["--resume", "--output-dir", directory, "--steps", STEPS + 6]
        done = run(*argv, "--remat", "full", *flags)
        assert done.returncode == 0, done.stderr
        rows = read_metrics(directory)[-6:]
        losses[len(flags)] = [row["loss"] for row in rows]
        assert rows[-1]["skipped_steps"] == 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_sigterm_saves_and_exits_with_0(uninterrupted, tmp_path):
    """And diagnostics change nothing else: here they begin with the second process."""
    flags = [flag for flag in FLAGS if flag != "--diagnostics"]
    process = start(*flags, "--output-dir", tmp_path)
    code, out, err = stop_after(31, signal.SIGTERM, process, tmp_path)
    assert code == 0, err
    rows = read_metrics(tmp_path)[-1]["step"]
    assert 31 <= rows < STEPS
    assert f"Stopped by SIGTERM after step {rows}" in out
    assert "SIGTERM: saving after this step; again to stop now" in err
    assert (tmp_path / "checkpoints" / str(rows)).is_dir()
    assert (tmp_path / "curve.png").exists()
    for name in (DIAGNOSTICS_FILE, PLOT_FILE):
        assert not (tmp_path / name).exists()
    resume = out.rpartition("To continue: python -m train.pretrain ")[2].split()
    done = run(*resume, "--diagnostics")
    assert done.returncode == 0, done.stderr
    assert f"Continued after step {rows}." in done.stdout
    assert read_values(tmp_path) == read_values(uninterrupted.directory)
    looks = read_rows(uninterrupted.directory / DIAGNOSTICS_FILE)
    late = [row for row in looks if row["step"] > rows]
    assert read_rows(tmp_path / DIAGNOSTICS_FILE) == late


@pytest.mark.slow
def test_interrupting_saves_too(tmp_path):
    flags = [*FLAGS, "--output-dir", tmp_path]
    code, out, err = stop_after(3, signal.SIGINT, start(*flags), tmp_path)
    assert code == 130
    assert "Traceback" not in err
    assert "SIGINT: saving after this step; again to stop now" in err
    rows = read_metrics(tmp_path)[-1]["step"]
    assert f"Stopped by SIGINT after step {rows}" in out
    assert (tmp_path / "checkpoints" / str(rows)).is_dir()


def test_a_finished_run_is_left_as_it_is(copy):
    before = read_metrics(copy)
    done = run(*FLAGS, "--output-dir", copy)
    assert done.returncode == 0, done.stderr
    assert read_metrics(copy) == before


def test_two_damaged_checkpoints_leave_no_way_on(copy, capsys):
    for path in (copy / "checkpoints").glob("*/params/manifest.ocdbt"):
        path.write_bytes(b"")
    with pytest.raises(SystemExit) as stop, keeps_memory():
        pretrain.main(["--resume", "--output-dir", str(copy), "--mesh", "tensor=8"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert f"no checkpoint in {copy / 'checkpoints'} can be read" in err
    assert "Traceback" not in err
    assert len(list((copy / "checkpoints").iterdir())) == 2


@pytest.mark.slow
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
    assert read_values(copy) == read_values(uninterrupted.directory)


def test_a_full_disk_is_a_clear_error_and_costs_no_checkpoint(uninterrupted, copy):
    """Files cannot grow beyond a size that metrics fit into, and checkpoints do not."""
    flags = [*FLAGS, "--output-dir", copy]
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    limit = max(path.stat().st_size for path in copy.glob("*.jsonl")) + 10_000

    def fill_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    rows = STEPS - 20
    # It writes nothing to the compilation cache: others would read truncated entries.
    environment = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}
    done = run(*flags, environment=environment, preexec_fn=fill_disk)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert "The last good checkpoint: step" in done.stderr
    assert (copy / "checkpoints" / str(rows)).is_dir()
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    assert f"Continued after step {rows}." in done.stdout
    assert read_values(copy) == read_values(uninterrupted.directory)


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


def test_nothing_to_resume(tmp_path, capsys):
    argv = ["--resume", "--output-dir", tmp_path / "typo"]
    assert_pretrain_refuses(capsys, argv, "there is no run in --output-dir")
    assert not (tmp_path / "typo").exists()
