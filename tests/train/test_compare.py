"""The program from end to end, on a model of two layers and six steps."""

import dataclasses
import json
import math
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from tests.train import program
from tests.train.program import assert_refuses
from train import compare
from train.comparison import comparing, comparison_report
from train.comparison import trial_records as records
from train.comparison import trial_training as trials
from train.comparison.search import Search
from train.config import methods
from train.config.optimizer_config import OptimizerConfig
from train.data import dataset as data
from train.rundir.saved_config import save_config
from train.step import optimizers
from train.step import train_step as steps
from train.step.setup import llama_setup

SMALL = [
    *["--hidden-size", "32", "--mlp-size", "64", "--num-layers", "2"],
    *["--num-heads", "2", "--vocabulary-size", "300", "--held-out-fraction", "0.01"],
    *["--sequence-length-tokens", "16", "--batch-size-sequences", "2"],
    *["--eval-tokens", "200", "--rank", "8", "--update-interval", "2"],
    *["--steps", "6", "--eval-every-steps", "2"],
]
# The last one is too large for any.
RATES = ["1e-3", "1e-2", "1e30"]
ASKED = [
    *["--optimizers", "adamw", "subtrack", "--learning-rates", *RATES],
    *["--matrix-scales", "0.5", "--seeds", "0", "1", "--sweep", "transport=on,off"],
]


def arguments(directory, *more):
    return [*SMALL, *ASKED, "--output-dir", str(directory), *more]


def run(capsys, *argv):
    """Exit code and output of the program."""
    with pytest.raises(SystemExit) as stop:
        compare.main([str(arg) for arg in argv])
    return stop.value.code, capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Directory of a comparison, its output, and the seeds of its batches."""
    directory = tmp_path_factory.mktemp("compare") / "finished"
    done = program.run(*arguments(directory), program="train.compare")
    assert done.returncode == 0, done.stderr
    return directory, done.stdout


def read_records(directory):
    paths = sorted((directory / "trials").glob("*.json"))
    return {path.name: json.loads(path.read_text()) for path in paths}


def numbers(record):
    """Parts of a record that do not depend on the machine or the command line."""
    timings = {"step_seconds", "measured_seconds", "compile_seconds", "command"}
    return {name: value for name, value in record.items() if name not in timings}


def test_every_method_has_a_trial_of_each_rate_and_seed(finished):
    found = [record["trial"] for record in read_records(finished[0]).values()]
    keys = [
        (t["optimizer"]["name"], t["optimizer"]["transport"])
        for t in found
        if (t["optimizer"]["learning_rate"], t["seed"]) == (1e-3, 1)
    ]
    assert sorted(keys, key=str) == [
        ("adamw", None),
        ("subtrack", False),
        ("subtrack", None),
    ]
    # The sweep's transport=on is subtrack as it is.
    assert len(found) == 3 * 3 * 2


def test_model_and_batches_are_those_of_the_seed_alone(finished):
    first_losses = {0: set(), 1: set()}
    for record in read_records(finished[0]).values():
        step, metrics = record["curve"][0]
        assert step == 1
        first_losses[record["trial"]["seed"]].add(round(metrics["loss"], 6))
    # Loss of the first batch, before any update.
    assert len(first_losses[0]) == len(first_losses[1]) == 1
    assert first_losses[0] != first_losses[1]


def test_a_record_says_all_there_is_to_know(finished):
    for name, record in read_records(finished[0]).items():
        optimizer = record["trial"]["optimizer"]
        assert name.startswith(f"{optimizer['name']}-")
        assert set(record["step_seconds"]) <= {"first", "moving", "steady"}
        assert ("moving" in record["step_seconds"]) <= (optimizer["name"] != "adamw")
        assert record["compile_seconds"] > 0
        assert record["machine"]["platform"] == "cpu"
        assert record["versions"]["jax"] == jax.__version__
        assert record["command"].startswith("python -m train.compare --hidden-size 32")
        if not record["diverged"]:
            assert [step for step, _ in record["evaluations"]] == [2, 4, 6]
            total = sum(s for s in record["step_seconds"].values())
            assert 0 < total <= record["measured_seconds"]


def test_divergence_is_told_and_not_chosen(finished):
    directory, out = finished
    for record in read_records(directory).values():
        assert record["diverged"] == (record["trial"]["optimizer"]["learning_rate"] > 1)
        assert all(
            (loss is None) == record["diverged"] for _, loss in record["evaluations"]
        )
    table = (directory / "table.md").read_text()
    assert table in out
    assert table.count("diverged (2 of 2)") == 2
    results = json.loads((directory / "results.json").read_text())
    for each in results["optimizers"]:
        assert each["best"]["learning_rate"] == 1e-2
        lost = [t for t in each["tries"] if t["learning_rate"] == 1e30]
        assert [t["mean"] for t in lost] == [None]


def _resolved(settings):
    return dataclasses.asdict(methods.resolved(OptimizerConfig(**settings)))


def test_the_table_has_means_and_deviations_of_the_records(finished):
    directory, _ = finished
    results = json.loads((directory / "results.json").read_text())
    table = (directory / "table.md").read_text()
    assert [each["optimizer"] for each in results["optimizers"]] == re.findall(
        r"^\| (\w+) +\| \d\.\d+ ± \d", table, re.MULTILINE
    )[:2]
    for each in results["optimizers"]:
        losses = [
            record["evaluations"][-1][1]
            for record in read_records(directory).values()
            if _resolved(record["trial"]["optimizer"]) == each["settings"]
        ]
        assert sorted(each["best"]["losses"]) == sorted(losses)
        mean, deviation = np.mean(losses), np.std(losses, ddof=1)
        assert f"{mean:.3f} ± {deviation:.3f}" in table
        assert math.isfinite(each["seconds"])
    assert "## transport" in table
    assert re.search(r"\| optimizer, by transport +\| on +\| off +\|", table)
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_run_again_to_the_same_numbers(finished, tmp_path, capsys):
    directory, _ = finished
    before = read_records(directory)
    paths = {name: directory / "trials" / name for name in before}
    times = {name: path.stat().st_mtime_ns for name, path in paths.items()}
    lost = [name for name in before if re.match(r"adamw-0\.01-seed[01]", name)]
    assert len(lost) == 2
    for name in lost:
        paths[name].unlink()
    code, out = run(capsys, *arguments(directory))
    assert code == 0
    assert "18 trials, 16 of them finished before" in out
    after = read_records(directory)
    assert after.keys() == before.keys()
    for name in before:
        if name in lost:
            wanted, got = numbers(before[name]), numbers(after[name])
            losses = [[loss for _, loss in r["evaluations"]] for r in (wanted, got)]
            np.testing.assert_allclose(*losses, rtol=1e-5)
            assert got["trial"] == wanted["trial"]
        else:
            assert paths[name].stat().st_mtime_ns == times[name]


def test_a_comparison_may_be_extended_but_not_changed(finished, capsys):
    directory, _ = finished
    # Fewer of what there is: nothing is run, and no text opened.
    code, out = run(
        capsys, *arguments(directory, "--seeds", "1", "--optimizers", "subtrack")
    )
    assert code == 0
    assert "12 trials, 12 of them finished before" not in out
    assert "6 trials, 6 of them finished before" in out
    assert "adamw" not in (directory / "table.md").read_text()
    run(capsys, *arguments(directory))
    flags = arguments(directory, "--steps", "7")
    message = "holds another comparison: --steps 7 here, 6 there"
    assert_refuses(compare.main, capsys, flags, message)


def test_a_damaged_record_is_one_line(tmp_path, capsys):
    (tmp_path / "trials").mkdir()
    config = compare.read(arguments(tmp_path))
    save_config(config.task, tmp_path / comparing.TASK_FILE)
    (tmp_path / "tokenizer.json").write_text("{}")
    path = tmp_path / "trials/adamw-0.001-seed0-0123456789ab.json"
    path.write_text('{"trial": 3}')
    message = f"{path} is not the record of a trial: trial: "
    assert_refuses(compare.main, capsys, arguments(tmp_path), message)


def test_trials_of_a_task_that_is_lost_are_not_taken(finished, tmp_path, capsys):
    directory = shutil.copytree(finished[0], tmp_path / "copy")
    argv = arguments(directory)
    for name in ("tokenizer.json", comparing.TASK_FILE):
        (directory / name).rename(tmp_path / name)
        assert_refuses(compare.main, capsys, argv, name, "back")
        (tmp_path / name).rename(directory / name)
    for path in directory.rglob("*"):
        path.is_file() and path.unlink()
    # Stopped before the text was read, it has but a directory of trials.
    assert_refuses(
        compare.main, capsys, [*argv, "--data-glob", "no"], "no file matches"
    )


def test_seeds_that_are_not_finished_are_left_out(finished, tmp_path):
    config = compare.read(arguments(tmp_path))
    search = Search(config)
    known = records.load(finished[0] / "trials")
    found = {trial: known[trial] for trial in search.trials}

    def write(count):
        some = dict(list(found.items())[:count])
        comparison_report.write(search, search.counted(some))

    write(-1)
    results = json.loads((tmp_path / "results.json").read_text())
    for each in results["optimizers"]:
        assert {len(tried["losses"]) for tried in each["tries"]} == {1}
    write(2)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [len(each["tries"]) for each in results["optimizers"]] == [1, 1]


def test_methods_take_turns_and_seeds_come_last(tmp_path):
    search = Search(compare.read(arguments(tmp_path)))
    order = [
        (t.seed, t.optimizer.learning_rate, t.optimizer.name) for t in search.trials
    ]
    assert [seed for seed, *_ in order] == [0] * 9 + [1] * 9
    names = ["adamw", "subtrack", "subtrack", "adamw"]
    assert [name for *_, name in order[:4]] == names


def test_a_trial_is_the_run_of_train_pretrain(finished):
    """Numbers in the state, or written into the program: the same training."""
    config = compare.read(arguments(finished[0]))
    task = config.task
    text = data.open_text(
        task.data,
        task.model.vocabulary_size,
        seed=1,
        tokenizer_directory=finished[0],
    )
    trial = next(
        t
        for t in Search(config).trials
        if (t.optimizer.name, t.optimizer.learning_rate, t.seed)
        == ("subtrack", 0.01, 1)
    )
    record = records.load(finished[0] / "trials")[trial]
    schedule = optimizers.learning_rate_schedule(trial.optimizer, task.steps)
    optimizer = optimizers.make_optimizer(trial.optimizer, schedule, trial.seed)
    setup = llama_setup(
        task.model,
        optimizer,
        schedule,
        max_gradient_norm=trial.optimizer.max_gradient_norm,
    )
    state = setup.create_state(jax.random.key(trial.seed))
    assert record.state_bytes == sum(
        leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)
    )
    losses, batches = [], text.train_batches()
    for _ in range(task.steps):
        state, values = setup.train_step(state, next(batches))
        losses.append(float(values["loss"]))
    batches.close()
    recorded = [metrics["loss"] for _, metrics in record.curve]
    np.testing.assert_allclose(recorded, losses, rtol=1e-4)
    loss = setup.begin_evaluation(state.params, text.held_out_batches())()
    assert record.final_loss == pytest.approx(loss, rel=1e-4)


class Batches:
    """Text whose batches are written down."""

    def __init__(self, model, rows):
        self.given = []
        self._model, self._rows = model, rows

    def train_batches(self, seed):
        for number in range(99):
            rng = np.random.default_rng([seed, number])
            batch = self._batch(rng)
            self.given.append((seed, number, batch["inputs"].sum()))
            yield batch

    def held_out_batches(self):
        return iter([self._batch(np.random.default_rng(0))])

    def _batch(self, rng):
        tokens = rng.integers(0, self._model.vocabulary_size, self._rows, np.int32)
        return {"inputs": tokens, "targets": tokens, "mask": np.ones(self._rows, bool)}


def test_a_hopeless_trial_ends_early_and_a_stopped_one_has_no_record(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(trials, "MAX_SKIPPED_STEPS_IN_A_ROW", 2)
    config = compare.read(arguments(tmp_path, "--eval-every-steps", "6"))
    text = Batches(config.task.model, (2, 16))
    runner = trials.Runner(config.task, text, "command")
    compiled = []
    monkeypatch.setattr(
        steps,
        "make_train_step",
        lambda *args, make=steps.make_train_step, **settings: (
            compiled.append(1) or make(*args, **settings)
        ),
    )
    adamw = [
        trial for trial in Search(config).trials if trial.optimizer.name == "adamw"
    ]
    lost = next(t for t in adamw if t.optimizer.learning_rate == 1e30)
    record = runner.run(lost, lambda loss: True)
    assert record.diverged
    assert record.skipped_steps == 2
    assert math.isinf(record.final_loss)
    assert record.evaluations[-1][0] < config.task.steps
    sound = next(t for t in adamw if t.optimizer.learning_rate == 1e-3)
    assert runner.run(sound, lambda loss: False) is None
    text.given.clear()
    assert not runner.run(sound, lambda loss: True).diverged
    assert [(seed, number) for seed, number, _ in text.given] == [
        (0, number) for number in range(6)
    ]
    # Rates and seeds are numbers of one program.
    runner.run(dataclasses.replace(sound, seed=7), lambda loss: True)
    assert len(compiled) == 1


def test_curves_are_thinned_by_averaging():
    rows = [{"loss": float(k), "gradient_norm": 3.0} for k in range(1000)]
    curve = trials.thinned(rows, 1000)
    assert len(curve) == 200
    assert curve[0] == (5, {"loss": 2.0, "gradient_norm": 3.0})
    assert curve[-1] == (1000, {"loss": 997.0, "gradient_norm": 3.0})
    rows[3]["loss"] = math.nan
    assert [values["loss"] for _, values in trials.thinned(rows[:7], 1000)] == [
        None,
        5.5,
    ]


def test_ctrl_c_says_how_to_go_on(tmp_path):
    directory = tmp_path / "stopped"
    argv = arguments(directory, "--steps", "100000", "--optimizers", "adamw")
    process = program.start(*argv, "--sweep", program="train.compare")
    seen = ""
    deadline = time.monotonic() + 120
    while "loss=" not in seen and time.monotonic() < deadline:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    last = out.splitlines()[-1]
    assert last.startswith("Stopped by SIGINT: 0 of 6 trials are finished. To go on: ")
    assert last.endswith(
        "--output-dir " + str(directory) + " --steps 100000 --optimizers adamw --sweep"
    )
    assert not list((directory / "trials").iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--optimizers", "sgd"],
            "'sgd': unknown 'sgd': choose from adamw",
        ),
        (["--sweep", "damping=2"], "--damping must be above 0 and at most 1, got 2"),
        (["--learning-rates"], "--learning-rates must have at least one value"),
        (["--learning-rates", "0"], "--learning-rates must be positive and finite"),
        (["--matrix-scales", "-1"], "--matrix-scales must be positive and finite"),
        (["--seeds", "1", "1"], "--seeds has a value twice: 1 1"),
        (["--seeds", "-1"], "--seeds must be at least 0 and below 2^32, got -1"),
        (["--tuning-seeds", "0"], "--tuning-seeds must be at least 1 and at most the"),
        (["--tuning-seeds", "4"], "number of --seeds, 3, got 4"),
        (["--rank", "0"], "--rank must be at least 1"),
        (["--rank", "10000"], "--rank 10000 leaves no matrix to --optimizer"),
        (["--sweep", "rank=4,10000"], "--rank 10000 leaves no matrix to --optimizer"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--learning-rate", "1e-3"], "learning-rate"),
        (["--data-glob", "no-such-file"], "no-such-file"),
        (["--gradient-accumulation-steps", "3"], "must be a multiple of"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_compared_is_one_line(capsys, tmp_path, flags, message):
    argv = ["--output-dir", str(tmp_path / "run"), *flags]
    assert_refuses(compare.main, capsys, argv, message)


def test_presets_are_those_of_train_pretrain():
    config = compare.read(["--preset", "llama-20m", "--rank", "16"])
    assert config.task.model.hidden_size == 256
    assert config.task.steps == 10_000
    assert config.settings.rank == 16
    assert config.settings.update_interval == 200
