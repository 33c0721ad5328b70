"""train.sft from end to end, and its last words when something is wrong."""

import dataclasses
import functools
import io
import json
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import llama_weights, parameters
from models.llama import Llama, LlamaConfig
from tests.train.conversations.common import CHAT_END, CHATML, write_tokenizer
from tests.train.program import TIMINGS, assert_refuses, read_metrics, run
from train import export, finetune, generate, sft
from train.config.optimizer_config import OptimizerConfig
from train.conversations.chat_template import ChatTemplate
from train.loop import messages
from train.step.train_state import TrainState
from train.system import out_of_memory
from train.tokenization.tokenizer import Tokenizer

MODEL = LlamaConfig(264, 16, 32, num_layers=2, num_heads=2, max_length_tokens=128)
FLAGS = [
    *["--sequence-length-tokens", 96, "--length-buckets", 2, "--epochs", 10],
    *["--batch-size-sequences", 8, "--held-out-fraction", 0.2, "--rank", 4],
    *["--update-interval", 5, "--learning-rate", 3e-2, "--scale", 1],
    *["--checkpoint-every-steps", 12, "--gradient-accumulation-steps", 2],
]


def write_model(directory, **settings):
    params = parameters.initial(functools.partial(Llama, MODEL), jax.random.key(1))
    llama_weights.save(directory / "model", MODEL, params)
    return write_tokenizer(directory / "model", **settings)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def talks(count):
    """Short answers, some after long questions."""
    return [
        {
            "messages": [
                {"role": "user", "content": "Hi" * (1 + i % 3 * 12)},
                {"role": "assistant", "content": "ok" * (1 + i % 2)},
            ]
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sft")
    end = "<|im_end|>"
    write_model(directory, chat_template=CHATML, eos_token=end, pad_token=end)
    bad = {"messages": [{"role": "user", "content": "Hi"}]}
    write_rows(directory / "rows.jsonl", [*talks(36), bad])
    return directory


def flags(place, output_dir, *more):
    return [
        *FLAGS,
        *["--init-from", place / "model", "--data-glob", place / "rows.jsonl"],
        *["--output-dir", output_dir, *more],
    ]


def values(directory):
    return [
        {name: value for name, value in row.items() if name not in TIMINGS}
        for row in read_metrics(directory)
    ]


@pytest.fixture(scope="module")
def finished(place):
    directory = place / "finished"
    arguments = flags(place, directory, "--skip-bad-rows")
    done = run(*arguments, program="train.sft")
    assert done.returncode == 0, done.stderr
    return directory, done


@pytest.mark.parametrize("program", [finetune, sft], ids=["finetune", "sft"])
def test_a_warm_up_in_steps_replaces_the_preset_s_fraction(program):
    optimizer = program.read(["--warmup-steps", "5"]).optimizer
    assert (optimizer.warmup_steps, optimizer.warmup_fraction) == (5, None)


def test_settings_that_the_optimizer_ignores_are_listed():
    state = TrainState(jnp.int32(0), jnp.int32(0), {"w": jnp.zeros(1000)}, ())
    preset = OptimizerConfig()
    given = dataclasses.replace(preset, name="adamw", rank=7)
    told = messages.model_and_optimizer("a model", given, preset, state, "a note")
    assert "a model: 0.0 M parameters, 0.0 MB" in told
    assert "adamw: state of 0.0 MB; it does not use --rank 7; a note\n" in told


def test_a_run_learns_and_says_what_it_reads(finished):
    directory, done = finished
    assert "29 train, 7 held out; 0 cut, 0 dropped, 1 bad (no answer: 1)" in done.stdout
    assert "assistant\n[[ok" in done.stdout
    assert "<|im_end|>]]" in done.stdout
    rows = read_metrics(directory)
    assert len(rows) == 1 + 10 * 4
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 1
    assert rows[-1]["epoch"] == 10.0
    assert 0 < rows[1]["answer_tokens"] < rows[1]["tokens"]
    assert rows[-1]["tokens"] == sum(np.diff([row["tokens"] for row in rows]))
    answers = sum(row["answer_tokens"] for row in rows[1:5])
    assert answers == sum(row["answer_tokens"] for row in rows[5:9])


@pytest.mark.slow
def test_resumed_it_goes_on_as_if_uninterrupted(finished, tmp_path):
    """As after a kill: only the checkpoint of step 36, an epoch's last, is left."""
    directory, _ = finished
    copy = shutil.copytree(directory, tmp_path / "copy")
    for path in (copy / "checkpoints").iterdir():
        if path.name != "36":
            shutil.rmtree(path)
    done = run("--resume", "--output-dir", copy, program="train.sft")
    assert done.returncode == 0, done.stderr
    assert "Continued after step 36." in done.stdout
    assert values(copy) == values(directory)


@pytest.fixture(scope="module")
def exported(finished):
    directory, _ = finished
    export.main(["--checkpoint", str(directory)])
    return directory / "hf"


def test_the_model_answers_and_stops(finished, exported, capsys, monkeypatch):
    """Padding and end are the same token: the mask is by position."""
    for place in (finished[0], exported):
        argv = ["--chat", "--checkpoint", str(place), "--temperature", "0"]
        generate.main([*argv, "--prompt", "Hi"])
        out, _ = capsys.readouterr()
        assert out in ("ok\n", "okok\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\nHi\n"))
    generate.main(argv)
    first, second = capsys.readouterr().out.splitlines()
    assert first == out.strip()
    assert set(second) <= {"o", "k"}


def test_an_export_has_template_and_end(finished, exported):
    tokenizer = Tokenizer.load(exported)
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ bos_token }}" + CHATML
    assert settings["eos_token"] == settings["pad_token"] == "<|im_end|>"
    for name in ("generation_config.json", "config.json"):
        assert json.loads((exported / name).read_text())["eos_token_id"] == CHAT_END
    template = ChatTemplate.open("auto", tokenizer)
    own = ChatTemplate.open("auto", Tokenizer.load(finished[0]))
    messages = talks(3)[2]["messages"]
    assert template.encode(messages) == own.encode(messages)


def test_chat_needs_a_template(tmp_path, capsys):
    write_model(tmp_path)
    argv = ["--chat", "--checkpoint", tmp_path / "model", "--prompt", "Hi"]
    assert_refuses(generate.main, capsys, argv, "--chat needs a chat template")


def refuses(capsys, argv, *messages):
    with mock.patch.object(out_of_memory, "trim_after_compilations"):
        return assert_refuses(sft.main, capsys, argv, *messages)


def bad_rows(place, content):
    path = place / "bad.jsonl"
    path.write_text(content)
    return ["--data-glob", path]


GOOD = json.dumps(talks(1)[0]) + "\n"
UNKNOWN = json.dumps({"messages": [{"role": "tool", "content": "3"}]}) + "\n"


@pytest.mark.parametrize(
    ("content", "more", "messages"),
    [
        (GOOD + UNKNOWN, [], ["row 2 of", "unknown role 'tool'", "--skip-bad-rows"]),
        (GOOD * 2 + '{"mess', [], ["bad.jsonl", "the 2 rows before it can be read"]),
        ('{"text": "Hi"}', [], ["has the fields text: conversations have"]),
        (UNKNOWN * 2, ["--skip-bad-rows"], ["there are 0", "unknown role 'tool': 2"]),
        (GOOD * 4, ["--sequence-length-tokens", 5], ["none of the 3", "raise it"]),
        (GOOD * 4, ["--format", "alpaca"], ["no field 'instruction' (alpaca)"]),
        (GOOD * 4, ["--epochs", 0], ["there is nothing to train"]),
        ("", [], ["bad.jsonl"]),
    ],
)
def test_rows_that_cannot_be_used(place, capsys, tmp_path, content, more, messages):
    argv = [*flags(place, tmp_path / "run"), *bad_rows(tmp_path, content), *more]
    refuses(capsys, [*argv, "--mesh", "fsdp=4,tensor=2"], *messages)


def test_flags_without_data_or_weights(place, capsys, tmp_path):
    argv = ["--output-dir", tmp_path / "run", "--mesh", "tensor=8"]
    refuses(capsys, argv, "--init-from is needed", "config.json")
    argv += ["--init-from", place / "model"]
    refuses(capsys, argv, "there is nothing to train on", "--data-glob")
    argv += ["--data-glob", place / "rows.jsonl"]
    refuses(capsys, [*argv, "--dataset", "alpaca"], "exclude each other")
    refuses(capsys, [*argv, "--batch-size-sequences", 6, "--mesh", "fsdp=8"], "6 must")


def test_templates_that_do_not_fit(capsys, place, tmp_path):
    template = "{{ raise_exception('only a user may speak') }}"
    write_model(tmp_path, chat_template=template)
    argv = flags(place, tmp_path / "run", "--mesh", "fsdp=4,tensor=2")
    argv += ["--init-from", tmp_path / "model"]
    refuses(capsys, argv, "only a user may speak", "give another --template")
    write_tokenizer(tmp_path / "model")
    refuses(capsys, [*argv, "--template", "tokenizer"], "has no chat_template")


def test_another_template_needs_another_directory(finished, place, capsys):
    directory, _ = finished
    argv = flags(place, directory, "--template", "plain", "--skip-bad-rows")
    argv += ["--mesh", "fsdp=4,tensor=2", "--allow-changes", "template"]
    refuses(capsys, argv, "--template plain here, auto there, which cannot change")


@pytest.mark.slow
def test_packed_conversations_are_learned_in_fewer_steps(finished, place):
    directory = place / "packed"
    argv = flags(place, directory, "--skip-bad-rows", "--packing", "packed")
    done = run(*argv, "--gradient-accumulation-steps", 1, program="train.sft")
    assert done.returncode == 0, done.stderr
    rows, padded = read_metrics(directory), read_metrics(finished[0])
    assert rows[0]["eval_loss"] == padded[0]["eval_loss"]
    assert rows[-1]["tokens"] == padded[-1]["tokens"]
    assert len(rows) < len(padded)
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 1
