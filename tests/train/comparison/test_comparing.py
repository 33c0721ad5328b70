"""Search of a comparison: its trials and their order, with made-up losses."""

import json
import math
import signal
import types

import pytest

from tests.train.comparison.test_comparison_report import cells, record
from train import compare
from train.comparison import comparing
from train.comparison.search import Search
from train.data import dataset as data

STEPS = 10
ASKED = [
    *["--steps", str(STEPS), "--optimizers", "adamw", "subtrack"],
    *["--learning-rates", "0.1", "0.2", "0.3", "--matrix-scales", "1"],
    *["--seeds", "0", "1", "2"],
]
# The best rates of the first seed differ from those of the others.
BEST = {("adamw", 0): 0.2, ("subtrack", 0): 0.3}


def made_up_loss(trial):
    best = BEST.get((trial.optimizer.name, trial.seed), 0.1)
    distance = abs(trial.optimizer.learning_rate - best)
    worse = trial.optimizer.name == "adamw" or trial.optimizer.transport is False
    return 2 + distance + 0.01 * trial.seed + 0.5 * worse


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    """Runs the program: its code, output, errors, and (name, rate, seed) of trials."""
    tokenizer = types.SimpleNamespace(
        save=lambda directory: (directory / "tokenizer.json").touch()
    )
    text = types.SimpleNamespace(tokenizer=tokenizer, description="made up")
    monkeypatch.setattr(data, "open_text", lambda *args, **settings: text)

    def run(*more, loss=made_up_loss, stop_after=math.inf, asked=ASKED):
        ran = []

        class Runner:
            def __init__(self, *args):
                pass

            def run(self, trial, after_step):
                if len(ran) == stop_after:
                    signal.raise_signal(signal.SIGTERM)
                    assert not after_step(9.0)
                    return None
                ran.append(trial)
                return record(trial.optimizer, trial.seed, [9.0, loss(trial)])

        monkeypatch.setattr(comparing, "Runner", Runner)
        with pytest.raises(SystemExit) as stop:
            compare.main([*asked, "--output-dir", str(tmp_path), *more])
        keys = [(t.optimizer.name, t.optimizer.learning_rate, t.seed) for t in ran]
        return stop.value.code, *capsys.readouterr(), keys

    return run


SEARCH = {(n, r, 0) for n in ("adamw", "subtrack") for r in (0.1, 0.2, 0.3)}
LATER = [
    *[("adamw", 0.2, 1), ("subtrack", 0.3, 1)],
    *[("adamw", 0.2, 2), ("subtrack", 0.3, 2)],
]


def results(directory):
    """The numbers of each method by its name."""
    found = json.loads((directory / "results.json").read_text())
    return {each["optimizer"]: each for each in found["optimizers"]}


def parts(directory):
    """The first table, the notes below it and the table of all tries."""
    _, table, notes, _, grid, *_ = (directory / "table.md").read_text().split("\n\n")
    return cells(table), notes, cells(grid)


def test_the_other_seeds_are_run_at_the_best_rates_of_the_first(program, tmp_path):
    code, out, err, ran = program("--tuning-seeds", "1")
    assert code == 0
    assert (len(ran), set(ran[:6]), ran[6:]) == (10, SEARCH, LATER)
    assert (
        "6 trials to search rates, 0 of them finished before; then at most 4 at the "
        "best rates\n"
    ) in out
    assert "\n4 trials at the best rates, 0 of them finished before\n" in out
    # Each progress bar ends at its announced total.
    assert f"{6 * STEPS}/{6 * STEPS}" in err
    assert f"{4 * STEPS}/{4 * STEPS}" in err


def test_the_first_seed_chooses_and_all_count(program, tmp_path):
    program("--tuning-seeds", "1")
    found = results(tmp_path)
    # Seeds 1 and 2 have another best rate.
    assert found["adamw"]["best"]["learning_rate"] == 0.2
    assert found["adamw"]["best"]["losses"] == pytest.approx([2.5, 2.61, 2.62])
    assert found["subtrack"]["best"]["losses"] == pytest.approx([2.0, 2.21, 2.22])
    for each in found.values():
        assert [len(tried["losses"]) for tried in each["tries"]] == [1, 1, 1]
    table, notes, grid = parts(tmp_path)
    assert table[2][:6] == ["subtrack", "2.143 ± 0.124", "3", "0.3*", "1", "3"]
    assert table[3][:6] == ["adamw", "2.577 ± 0.067", "3", "0.2", "1", "3"]
    assert grid[2:] == [
        ["subtrack", "1", "2.200", "2.100", "**2.000**"],
        ["adamw", "1", "2.600", "**2.500**", "2.600"],
    ]
    assert "Rates were searched on seed 0 alone, with 3 tries for each method" in notes


@pytest.mark.parametrize("flags", [[], ["--tuning-seeds", "3"]])
def test_without_other_seeds_all_of_them_search(program, tmp_path, flags):
    _, out, _, ran = program(*flags)
    assert len(set(ran)) == len(ran) == 18
    assert "18 trials, 0 of them finished before\n" in out
    # The mean over three seeds decides, of which two have the least rate as best.
    assert results(tmp_path)["adamw"]["best"]["learning_rate"] == 0.1
    assert "searched" not in parts(tmp_path)[1]


def test_the_mean_of_several_tuning_seeds_decides(program, tmp_path):
    by_rate = {0.1: (1.0, 4.0, 1.0), 0.2: (2.0, 2.0, 9.0), 0.3: (3.0, 3.0, 1.0)}
    _, _, _, ran = program(
        *["--tuning-seeds", "2", "--optimizers", "adamw"],
        loss=lambda trial: by_rate[trial.optimizer.learning_rate][trial.seed],
    )
    assert (len(ran), ran[6:]) == (7, [("adamw", 0.2, 2)])
    assert results(tmp_path)["adamw"]["best"]["losses"] == [2.0, 2.0, 9.0]
    assert "searched on seeds 0, 1 alone" in parts(tmp_path)[1]


@pytest.mark.parametrize("stop_after", [4, 8])
def test_the_same_command_goes_on_where_it_stopped(program, tmp_path, stop_after):
    code, out, _, before = program("--tuning-seeds", "1", stop_after=stop_after)
    assert code == 0
    told = {
        4: "4 of 6 trials to search rates are finished. To go on: ",
        8: "2 of 4 trials at the best rates are finished. To go on: ",
    }
    assert "Stopped by SIGTERM: " + told[stop_after] in out
    # The second phase, for seeds that are complete.
    seeds = {len(each["best"]["losses"]) for each in results(tmp_path).values()}
    assert seeds == {1 if stop_after == 4 else 2}
    _, out, _, after = program("--tuning-seeds", "1")
    assert set(before[:6] + after) >= SEARCH
    assert (before + after)[6:] == LATER
    assert f"6 trials to search rates, {min(stop_after, 6)} of them finished" in out
    done = max(stop_after - 6, 0)
    assert f"4 trials at the best rates, {done} of them finished before" in out
    assert program("--tuning-seeds", "1")[3] == []


def test_a_signal_while_the_search_ends_is_obeyed(program):
    def loss(trial):
        if (trial.optimizer.learning_rate, trial.seed) == (0.3, 0):
            signal.raise_signal(signal.SIGTERM)
        return made_up_loss(trial)

    asked = ["--tuning-seeds", "1", "--optimizers", "subtrack"]
    _, out, _, ran = program(*asked, loss=loss)
    assert len(ran) == 3
    assert "SIGTERM: 3 of 3 trials to search rates are finished. To go on: " in out
    assert program(*asked)[3] == [("subtrack", 0.3, 1), ("subtrack", 0.3, 2)]


def test_nothing_follows_before_the_search_has_finished():
    config = compare.read([*ASKED, "--tuning-seeds", "2"])
    search = Search(config)
    finished = {
        t: record(t.optimizer, t.seed, [made_up_loss(t)]) for t in search.trials
    }
    assert [trial.seed for trial in search.later_trials(finished)] == [2, 2]
    del finished[search.trials[-1]]
    assert search.later_trials(finished) == []


def test_a_seed_that_some_methods_lack_is_left_out(program, tmp_path):
    program("--tuning-seeds", "1", stop_after=7)
    assert [row[2] for row in parts(tmp_path)[0][2:]] == ["1", "1"]


def test_finished_trials_of_a_whole_search_are_used(program, tmp_path):
    program("--seeds", "0", "1")
    _, out, _, ran = program("--tuning-seeds", "1")
    assert ran == LATER[2:]
    assert "6 trials to search rates, 6 of them finished before" in out
    assert "4 trials at the best rates, 2 of them finished before" in out
    # Other trials of seed 1 are ignored.
    found = results(tmp_path)
    assert found["adamw"]["best"]["losses"] == pytest.approx([2.5, 2.61, 2.62])
    assert [len(tried["losses"]) for tried in found["adamw"]["tries"]] == [1, 1, 1]


def test_other_best_rates_are_run_where_the_grid_is_extended(program):
    program("--tuning-seeds", "1")
    rates = ["--learning-rates", "0.1", "0.2", "0.3", "0.4"]
    lower = lambda trial: 1.0 if trial.optimizer.learning_rate == 0.4 else 9.0
    _, _, _, ran = program("--tuning-seeds", "1", *rates, loss=lower)
    names = ("adamw", "subtrack")
    assert ran == [(name, 0.4, seed) for seed in (0, 1, 2) for name in names]


def test_a_method_that_always_diverged_is_not_run_on_other_seeds(program, tmp_path):
    diverging = lambda trial: (
        None if trial.optimizer.name == "adamw" else made_up_loss(trial)
    )
    _, out, _, ran = program("--tuning-seeds", "1", loss=diverging)
    assert ran[6:] == [key for key in LATER if key[0] == "subtrack"]
    assert "2 trials at the best rates, 0 of them" in out
    rows = parts(tmp_path)[0][2:]
    assert [row[0] for row in rows] == ["subtrack", "adamw"]
    assert rows[1][1:3] == ["diverged (1 of 1)", "1"]
    _, out, _, ran = program(
        "--tuning-seeds", "1", "--optimizers", "adamw", loss=diverging
    )
    assert (ran, "at the best rates, " in out) == ([], False)


def test_each_variant_of_a_sweep_is_tuned_alone(program, tmp_path):
    def loss(trial):
        best = 0.1 if trial.optimizer.transport is False else 0.3
        return 2 + abs(trial.optimizer.learning_rate - best)

    more = ["--optimizers", "subtrack", "--sweep", "transport=on,off"]
    _, out, _, ran = program("--tuning-seeds", "1", *more, loss=loss)
    # transport=on is what the method does anyway, and is not run twice.
    assert len(ran) == 6 + 4
    assert "then at most 4 at the best rates" in out
    assert ran[6:8] == [("subtrack", 0.3, 1), ("subtrack", 0.1, 1)]
    swept = json.loads((tmp_path / "results.json").read_text())["sweeps"]["transport"]
    assert [len(each["best"]["losses"]) for each in swept] == [3, 3]
    assert [each["best"]["learning_rate"] for each in swept] == [0.3, 0.1]
