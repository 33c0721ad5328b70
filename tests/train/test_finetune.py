"""train.finetune from end to end, and its last words when something is wrong."""

import dataclasses
import functools
import json
import shutil
from unittest import mock

import pytest

from models import encoder_weights
from tests.train.finetuning.common import (
    MODEL,
    sentiment_rows,
    write_encoder,
    write_rows,
)
from tests.train.program import TIMINGS, assert_refuses, read_metrics, run
from train import export, finetune, generate, predict, results
from train.generation import exporting
from train.system import out_of_memory

FLAGS = [
    *["--task", "sst2", "--max-length-tokens", 16, "--length-buckets", 2],
    *["--batch-size-examples", 8, "--eval-batch-size-examples", 16],
    *["--rank", 4, "--update-interval", 10, "--learning-rate", 5e-3],
]
TIMES = TIMINGS | {"examples_per_second"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Weights, and files of rows."""
    directory = tmp_path_factory.mktemp("finetune")
    write_encoder(directory)
    write_rows(directory / "train.jsonl", sentiment_rows(80))
    write_rows(directory / "test.jsonl", sentiment_rows(20))
    return directory


def flags(place, output_dir, *more):
    return [
        *FLAGS,
        *["--init-from", place / "model", "--train-file", place / "train.jsonl"],
        *["--output-dir", output_dir],
        *more,
    ]


def start(*argv, **options):
    return run(*argv, program="train.finetune", **options)


def values(directory):
    """Rows without the values that depend on how fast the machine is."""
    return [
        {name: value for name, value in row.items() if name not in TIMES}
        for row in read_metrics(directory)
    ]


@pytest.fixture(scope="module")
def finished(place):
    directory = place / "finished"
    more = ["--epochs", 4, "--test-file", place / "test.jsonl"]
    done = start(*flags(place, directory, *more, "--checkpoint-every-steps", 9))
    assert done.returncode == 0, done.stderr
    return directory, done


def test_a_run_learns_and_leaves_its_results(finished, place):
    directory, done = finished
    results = json.loads((directory / "results.json").read_text())
    assert results["task"] == "sst2"
    assert results["metric"] == "accuracy"
    assert results["best"] == 1.0
    assert results["rows"] == {"train": 72, "held out": 8, "test": 20}
    assert results["test"]["test"]["accuracy"] == 1.0
    assert results["majority"] == 0.5
    assert results["steps"] == 36
    assert results["seed"] == 0
    assert results["state_bytes"] > 1000
    assert results["seconds"] > results["training_seconds"] > 0
    assert 0 < results["update_seconds"] < results["training_seconds"]
    rows = read_metrics(directory)
    assert [row["step"] for row in rows] == list(range(37))
    evaluated = {
        row["step"]: row["eval_accuracy"] for row in rows if "eval_loss" in row
    }
    assert list(evaluated) == [0, 9, 18, 27, 36]
    best = max(list(evaluated)[1:], key=lambda step: (evaluated[step], -step))
    assert results["best_step"] == results["test_step"] == best
    assert rows[-1]["examples"] == 4 * 72
    assert rows[-1]["learning_rate"] < rows[-2]["learning_rate"]
    assert (directory / "curve.png").exists()
    assert "Best       accuracy 1.0000 on held-out rows" in done.stdout
    assert "weights not used" not in done.stderr


@pytest.mark.slow
def test_the_same_command_again_neither_trains_nor_tests(finished, place):
    directory, _ = finished
    before = (directory / "results.json").read_bytes()
    more = ["--epochs", 4, "--test-file", place / "test.jsonl"]
    done = start(*flags(place, directory, *more, "--checkpoint-every-steps", 9))
    assert done.returncode == 0, done.stderr
    assert "Best       accuracy 1.0000 on held-out rows" in done.stdout
    assert (directory / "results.json").read_bytes() == before


def test_resumed_at_the_end_of_an_epoch_it_goes_on_as_if_uninterrupted(
    finished, place, tmp_path
):
    """As after a kill: only the checkpoint of step 9, an epoch's last, is left."""
    directory, _ = finished
    copy = shutil.copytree(directory, tmp_path / "copy")
    expected = values(directory)
    for path in (copy / "checkpoints").iterdir():
        if path.name != min(
            (p.name for p in (copy / "checkpoints").iterdir()), key=int
        ):
            shutil.rmtree(path)
    (copy / "results.json").unlink()
    first = min(int(path.name) for path in (copy / "checkpoints").iterdir())
    assert first % 9 == 0
    done = start("--resume", "--output-dir", copy)
    assert done.returncode == 0, done.stderr
    assert f"Continued after step {first}" in done.stdout
    assert values(copy) == expected
    here, there = (
        json.loads((each / "results.json").read_text()) for each in (copy, directory)
    )
    timed = {"seconds", "training_seconds", "examples_per_second", "update_seconds"}
    assert {k: v for k, v in here.items() if k not in timed} == {
        k: v for k, v in there.items() if k not in timed
    }


@pytest.mark.slow
def test_parts_of_a_batch_and_eight_devices_change_nothing(place, tmp_path):
    # Adam turns rounding errors of small gradients into steps of this size.
    more = ["--steps", 10, "--dropout", 0, "--learning-rate", 1e-4]
    losses = {}
    for name, options, devices in (
        ("one", [], 1),
        ("parts", ["--gradient-accumulation-steps", 4], 1),
        ("mesh", ["--mesh", "fsdp=4,tensor=2"], 8),
    ):
        done = start(*flags(place, tmp_path / name, *more, *options), devices=devices)
        assert done.returncode == 0, done.stderr
        losses[name] = [row["loss"] for row in values(tmp_path / name)[1:]]
    assert losses["parts"] == pytest.approx(losses["one"], rel=1e-4)
    assert losses["mesh"] == pytest.approx(losses["one"], rel=1e-4)


@pytest.mark.slow
def test_it_ends_early_without_improvement_and_stays_so(place, tmp_path):
    more = ["--steps", 100, "--eval-every-steps", 3, "--patience-evals", 2]
    argv = flags(place, tmp_path / "run", *more, "--learning-rate", 1e-9)
    done = start(*argv)
    assert done.returncode == 0, done.stderr
    assert "Ended after step 9: 2 evaluations without a better accuracy" in done.stdout
    again = start(*argv)
    assert again.returncode == 0, again.stderr
    assert len(read_metrics(tmp_path / "run")) == 10


def test_a_model_predicts_rows_of_a_file_as_it_was_scored(
    finished, place, tmp_path, capsys
):
    directory, _ = finished
    argv = ["--checkpoint", directory, "--file", place / "test.jsonl"]
    argv = [str(each) for each in [*argv, "--output-dir", tmp_path / "found"]]
    predict.main(argv)
    out = capsys.readouterr().out
    assert "Scores     accuracy 1.0000 of 20 rows" in out
    assert "Classes    0 negative, 1 positive" in out
    lines = (tmp_path / "found" / "SST-2.tsv").read_text().splitlines()
    assert lines == ["index\tprediction", *(f"{i}\t{i // 10 ^ 1}" for i in range(20))]
    refuse = functools.partial(assert_refuses, predict.main, capsys)
    refuse(argv, "SST-2.tsv exists already")
    refuse([*argv[:2], "--task", "axb"], "--task axb has the classes entailment")
    refuse([*argv[:2], "--task", "stsb"], "needs a model for regression")
    refuse([*argv[:2], "--split", "validation"], "the run had no --validation-file")
    refuse(["--checkpoint", place], "is not the directory of a run")
    assert_refuses(generate.main, capsys, argv[:2], "is a run of train.finetune")


def test_an_export_has_the_names_of_the_classes(finished, tmp_path):
    directory, _ = finished
    config = export.ExportConfig(directory, output_dir=tmp_path / "exported")
    exporting.export(config)
    found = encoder_weights.load_config(tmp_path / "exported")
    assert found.labels == ("negative", "positive")
    assert (tmp_path / "exported" / "tokenizer.json").exists()


def test_the_table_shows_finished_runs(finished, capsys, tmp_path):
    directory, _ = finished
    results.main([str(directory)])
    assert "| subtrack" in capsys.readouterr().out
    assert_refuses(results.main, capsys, [tmp_path], "has no results.json")
    (tmp_path / "results.json").write_text('{"metric": "f1"}')
    assert_refuses(results.main, capsys, [tmp_path], "has no best, examples_per_second")
    (tmp_path / "results.json").write_text("{")
    assert_refuses(results.main, capsys, [tmp_path], "results.json is damaged")
    assert_refuses(results.main, capsys, [directory, directory], "is given twice")


def refuses(capsys, argv, *messages):
    with mock.patch.object(out_of_memory, "trim_after_compilations"):
        return assert_refuses(finetune.main, capsys, argv, *messages)


def test_what_is_missing_is_named(capsys, place, tmp_path):
    out = ["--output-dir", tmp_path]
    refuses(capsys, out, "--task mrpc", "--dataset", "--train-file")
    rows = ["--train-file", place / "train.jsonl"]
    refuses(capsys, [*out, *rows], "--init-from is needed")
    refuses(capsys, [*out, *rows, "--epochs", 0], "--epochs 0 and --steps None")
    refuses(capsys, [*out, "--task", "mnlii"], "unknown 'mnlii' (did you mean mnli?)")
    gone = [*out, *rows, "--init-from", place / "gone.x"]
    refuses(capsys, gone, "gone.x: no such directory")


@pytest.mark.parametrize(
    ("more", "messages"),
    [
        (["--max-length-tokens", 65], ["64 of its 64 positions"]),
        (["--text-field", "text"], ["no field 'text', only 'sentence', 'label'"]),
        (["--pair-field", "pair"], ["--task sst2 is of single texts"]),
        (["--label-field", "y"], ["has no field 'y'"]),
        (["--rank", 32], ["--rank 32 leaves no matrix"]),
        (["--freeze", "matrices"], ["leaves nothing to --optimizer subtrack"]),
        (
            ["--batch-size-examples", 9],
            ["--batch-size-examples 9 must be a multiple of 8"],
        ),
        (["--validation-file", "gone.csv"], ["gone.csv: there is no such file"]),
        (["--dataset", "x/y"], ["--dataset 'x/y' and --train-file exclude each other"]),
        (["--optimizer", "sgd"], ["--optimizer"]),
    ],
)
def test_bad_flags_end_in_one_line(capsys, place, tmp_path, more, messages):
    refuses(capsys, [*flags(place, tmp_path / "run"), *more], *messages)
    assert not (tmp_path / "run").exists()


def test_other_weights_end_in_one_line(capsys, place, tmp_path):
    model = shutil.copytree(place / "model", tmp_path / "model")
    argv = [*flags(place, tmp_path / "run"), "--init-from", model]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    refuses(capsys, argv, "'t5' is not supported")
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refuses(capsys, argv, "safetensors")
    (model / "tokenizer.json").unlink()
    refuses(capsys, argv, "holds no tokenizer.json")
    three = dataclasses.replace(MODEL, labels=("a", "b", "c"))
    headed = write_encoder(tmp_path / "three", three)
    argv = [*flags(place, tmp_path / "run"), "--init-from", headed]
    refuses(capsys, argv, "has the classes a, b, c, the rows", "--new-head")


def test_a_directory_with_another_run_is_refused(capsys, place, finished, tmp_path):
    directory, _ = finished
    copy = shutil.copytree(directory, tmp_path / "copy")
    more = ["--epochs", 4, "--test-file", place / "test.jsonl"]
    argv = flags(place, copy, *more)
    refuses(capsys, [*argv, "--learning-rate", 1], "--learning-rate 1.0 here")
    refuses(capsys, [*argv, "--freeze", "embeddings"], "another shape")
    config = json.loads((copy / "config.json").read_text())
    config["model"] = {"num_layers": 1}
    (copy / "config.json").write_text(json.dumps(config))
    refuses(capsys, argv, "has another config.json than a run writes")
