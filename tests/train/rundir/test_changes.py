"""Changed settings of a resumed run: free, allowed on request, or refused."""

import dataclasses
import re

import pytest

from models.encoder_config import EncoderConfig
from tests.train.rundir.test_directory import TINY, changed
from train.config.finetune_config import FinetuneConfig
from train.config.presets import PRESETS
from train.config.pretrain_config import TextTask
from train.config.sft_config import SftConfig
from train.rundir import changes

ENCODER = EncoderConfig("bert", 30, 8, 16, 1, 1, 16, 2, 0)
TUNING = FinetuneConfig(model=ENCODER)
NAMES = list(
    changes.flat_values(dataclasses.asdict(TINY))
    | changes.flat_values(dataclasses.asdict(TUNING))
    | changes.flat_values(dataclasses.asdict(SftConfig(model=TINY.model)))
)


def differences(*configs):
    """A value as messages show it."""
    found = changes.find(*configs)
    return [changes.told(name, found[name]) for name in found]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 3}, "--seed 3 here, 0 there"),
        ({"data": {"packing": "padded"}}, "--packing padded here, packed there"),
        ({"model": {"num_layers": 5}}, "--num-layers 5 here, 4 there"),
        ({"optimizer": {"b2": 0.5}}, "--b2 0.5 here, 0.999 there"),
        ({"data": {"tokenizer": "t.json"}}, "--tokenizer t.json here, None there"),
    ],
)
def test_a_difference_is_told(change, told):
    assert differences(changed(**change), TINY) == [told]


def test_what_means_the_same_is_no_difference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = changed(init_from=tmp_path / "weights", optimizer={"b2": 0.999})
    here = changed(init_from=type(tmp_path)("weights"), optimizer={"angle": 0.2})
    assert changes.find(here, there) == {}
    assert changes.find(changed(start={"resume": True}), TINY) == {}


def test_another_method_is_one_difference():
    other = changed(optimizer={"name": "adamw"})
    assert differences(other, TINY) == ["--optimizer adamw here, subtrack there"]


def test_a_task_of_a_comparison_has_differences_too():
    task = TextTask(model=TINY.model)
    other = dataclasses.replace(task, steps=7)
    assert differences(other, task) == ["--steps 7 here, 300 there"]


FREE = {
    *("output_dir", "mesh", "gradient_accumulation_steps", "model.remat"),
    *("update_in_backward", "remat"),
    *("eval_every_steps", "max_skipped_steps_in_a_row"),
    *("data.token_cache_dir", "data.skip_bad_documents", "model.max_length_tokens"),
    *("epochs", "eval_every_epochs", "patience_evals", "data.eval_batch_size_examples"),
    *("model.dropout", "model.attention_dropout", "model.head_dropout"),
    *(name for name in NAMES if re.match(r"(checkpoint|report|sample)\.", name)),
}
NEVER = {
    *(
        "preset",
        "init_from",
        "resize_embedding",
        "new_head",
        "freeze",
        "data.task",
        "data.template",
        "data.tokenizer",
        "data.bos",
        "data.bos_and_eos",
    ),
    # Settings of the model change its shape unless listed otherwise.
    *(name for name in NAMES if name.startswith("model.") and name not in FREE),
} - {
    *("model.dtype", "model.norm_epsilon"),
    *(name for name in NAMES if name.startswith("model.rotary_")),
}


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("start.")])
def test_each_setting_is_free_allowed_or_refused(name):
    """A new setting is refused until it is listed as free or allowed."""
    found = {name: (1, 2)}
    if name in FREE or name == "steps":
        changes.check(found, [])
        return
    with pytest.raises(ValueError, match=re.escape(changes.told(name, (1, 2)))) as told:
        changes.check(found, [name] if name in NEVER else [])
    assert ("which cannot change: " in str(told.value)) == (name in NEVER)
    allow = f"--allow-changes {name} to continue it with these"
    assert (allow in str(told.value)) == (name not in NEVER)
    if name not in NEVER:
        changes.check(found, [name])


def test_each_rule_is_of_some_setting():
    for pattern, _, reason in changes.RULES:
        assert any(re.fullmatch(pattern, name) for name in NAMES), pattern
        assert not reason.endswith(".")
    assert changes.reads_other_rows({"data.eval_glob": (None, "b")})
    assert not changes.reads_other_rows({"data.eval_glob": ("a", "b")})
    assert {n for n in NAMES if changes.reads_other_rows({n: (1, 2)})} == {
        "seed",
        *(f"data.{name}" for name in ("data_glob", "dataset", "dataset_config")),
        *(f"data.{name}" for name in ("dataset_split", "text_field", "packing")),
        *(f"data.{name}" for name in ("shuffle_buffer_documents", "held_out_fraction")),
        "data.sequence_length_tokens",
        *(f"data.{name}" for name in ("train_file", "dataset_revision", "pair_field")),
        *(f"data.{name}" for name in ("label_field", "max_length_tokens")),
        *(f"data.{name}" for name in ("length_buckets", "batch_size_examples")),
        *(f"data.{name}" for name in ("format", "skip_bad_rows", "loss_on")),
    }


def test_steps_may_grow_and_shrink_if_allowed():
    changes.check({"steps": (10, 20)}, [])
    with pytest.raises(ValueError, match="--steps 10 here, 20 there"):
        changes.check({"steps": (20, 10)}, [])
    changes.check({"steps": (20, 10)}, ["steps"])


def test_what_is_left_to_allow_is_told_with_what_is_allowed():
    found = {"seed": (0, 1), "z_loss_weight": (0, 1), "mesh": ("a", "b")}
    with pytest.raises(
        ValueError, match="--allow-changes seed,z_loss_weight to"
    ) as told:
        changes.check(found, ["seed"])
    assert "--seed" not in str(told.value)
    changes.check(found, ["seed", "z_loss_weight"])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (None, []),
        ("optimizer.learning_rate", ["optimizer.learning_rate"]),
        ("learning_rate, --b2", ["optimizer.learning_rate", "optimizer.b2"]),
        ("optimizer,packing", ["optimizer.name", "data.packing"]),
    ],
)
def test_settings_are_named_as_in_the_file_or_as_flags(text, names):
    assert changes.allowed_names(text, PRESETS["tiny"]) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learningrate", "no setting 'learningrate'; did you mean"),
        ("seed,", "no setting ''"),
        ("colour", "no setting 'colour'"),
        ("optimizer.*", r"no setting 'optimizer.\*'"),
    ],
)
def test_other_names_are_refused(text, message):
    with pytest.raises(ValueError, match=f"--allow-changes .*{message}"):
        changes.allowed_names(text, PRESETS["tiny"])


@pytest.mark.parametrize(
    ("name", "without", "with_files"),
    [
        ("data.data_glob", True, False),
        ("data.held_out_fraction", True, False),
        ("data.dataset_eval_split", True, False),
        ("data.eval_glob", True, True),
        ("data.eval_tokens", True, True),
        ("data.sequence_length_tokens", True, True),
        ("data.batch_size_sequences", False, False),
        ("data.dataset_split", False, False),
        ("optimizer.learning_rate", False, False),
        ("seed", False, False),
    ],
)
def test_held_out_losses_are_comparable_where_their_text_is(name, without, with_files):
    for has_own_files, expected in ((False, without), (True, with_files)):
        is_other = changes.evaluates_other_text(
            {name: (1, 2)}, has_own_files=has_own_files
        )
        assert is_other == expected
