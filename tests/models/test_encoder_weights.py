"""Encoders in Hugging Face's layout: round trips, new and unused weights, errors."""

import dataclasses
import json
import shutil

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

from models import encoder_config_file, encoder_weights
from tests.models.encoders import ENCODERS, RECORDED, load

KEY = jax.random.key(0)
BASES = ["bert", "roberta", "mpnet"]


@pytest.fixture
def copy(tmp_path):
    """Copies a recorded encoder; its tensors and entries may be changed."""

    def make(name, edit=lambda tensors: tensors, **entries):
        directory = tmp_path / name
        shutil.copytree(ENCODERS / name, directory)
        path = directory / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        safetensors.numpy.save_file(edit(tensors) or tensors, path)
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))
        return directory

    return make


def read(directory, **changes):
    config = encoder_weights.load_config(directory)
    new_head = changes.pop("new_head", False)
    config = dataclasses.replace(config, **changes)
    return encoder_weights.load(directory, config, KEY, new_head=new_head)


@pytest.mark.parametrize("name", RECORDED.files)
def test_what_is_written_reads_the_same(tmp_path, name):
    config, params = load(name)
    (tmp_path / "tokenizer.json").write_text("{}")
    encoder_weights.save(
        tmp_path / "out",
        config,
        params,
        extra_config={"bos_token_id": 3},
        tokenizer_files=[tmp_path / "tokenizer.json"],
    )
    assert encoder_weights.load_config(tmp_path / "out") == config
    loaded = read(tmp_path / "out")
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded.params, params)
    chex.assert_trees_all_equal(loaded.params, params)
    assert (loaded.unused, loaded.new) == ((), ())
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    # The names of transformers' own file.
    theirs = safetensors.numpy.load_file(ENCODERS / name / "model.safetensors")
    ours = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    chex.assert_trees_all_equal(ours, theirs)
    entries = json.loads((tmp_path / "out/config.json").read_text())
    written = json.loads((ENCODERS / name / "config.json").read_text())
    shared = entries.keys() & written.keys() - {"id2label", "label2id", "problem_type"}
    assert entries["bos_token_id"] == 3
    assert {x: entries[x] for x in shared - {"bos_token_id"}} == {
        x: written[x] for x in shared - {"bos_token_id"}
    }
    assert len(shared) > 14


def test_labels_keep_their_order(copy):
    labels = {"2": "a", "0": "c", "1": "b"}
    directory = copy("mpnet", id2label=labels)
    config = encoder_weights.load_config(directory)
    assert config.labels == ("c", "b", "a")
    entries = encoder_config_file.export_config(config)
    assert entries["id2label"] == {"0": "c", "1": "b", "2": "a"}
    assert entries["label2id"] == {"c": 0, "b": 1, "a": 2}
    directory = copy("bert", id2label=None, num_labels=4)
    assert encoder_weights.load_config(directory).labels[3] == "LABEL_3"
    directory = copy("roberta", architectures=["RobertaModel"])
    assert encoder_weights.load_config(directory).labels == ()


def old_names(tensors):
    """Names of 2018, without the model's prefix, with buffers of integers."""
    names = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("bert.")
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        names[name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    names["embeddings.position_ids"] = np.arange(91)[None]
    names["cls.predictions.bias"] = np.zeros(61, np.float32)
    names["cls.seq_relationship.weight"] = np.zeros((2, 24), np.float32)
    return names


def test_old_names_are_read_and_unused_tensors_are_named(copy):
    loaded = read(copy("bert", old_names))
    chex.assert_trees_all_equal(loaded.params, load("bert")[1])
    assert sorted(loaded.unused) == [
        "cls.predictions.bias",
        "cls.seq_relationship.weight",
    ]

    def with_pooler(tensors):
        for part, shape in (("weight", (24, 24)), ("bias", (24,))):
            tensors[f"roberta.pooler.dense.{part}"] = np.ones(shape, np.float32)
        tensors["lm_head.bias"] = np.zeros(61, np.float32)

    loaded = read(copy("roberta", with_pooler))
    assert len(loaded.unused) == 3
    chex.assert_trees_all_equal(loaded.params, load("roberta")[1])


def without_head(tensors):
    return {
        name: tensor
        for name, tensor in tensors.items()
        if "classifier" not in name and "pooler" not in name
    }


@pytest.mark.parametrize("name", BASES)
def test_only_a_head_may_be_new_and_is_drawn_from_the_key(copy, name):
    directory = copy(name, without_head, architectures=["Anything"])
    loaded = read(directory, labels=("no", "yes"))
    dense = "pooler" if name == "bert" else "head/dense"
    expected = {f"{dense}/kernel", f"{dense}/bias"}
    expected |= {"head/output/kernel", "head/output/bias"}
    assert set(loaded.new) == expected
    assert loaded.unused == ()
    output = loaded.params["head"]["output"]
    assert output["kernel"].shape == (24, 2)
    assert 0.01 < np.std(output["kernel"]) < 0.03
    assert not np.any(output["bias"])
    stored = load(name)[1]
    chex.assert_trees_all_equal(loaded.params["layers"], stored["layers"])
    if name == "mpnet":  # the rest of the test is the same for all
        again = read(directory, labels=("no", "yes"))
        chex.assert_trees_all_equal(again.params, loaded.params)
        config = dataclasses.replace(load(name)[0], labels=("no", "yes"))
        other = encoder_weights.load(directory, config, jax.random.key(1))
        assert np.any(other.params["head"]["output"]["kernel"] != output["kernel"])
        choice = read(directory, labels=(), head="choice")
        assert "pooler/kernel" in choice.new
        assert choice.params["head"]["output"]["kernel"].shape == (24, 1)


def test_a_stored_head_for_something_else_is_refused_unless_replaced():
    directory = ENCODERS / "roberta"
    labels = ("entailment", "neutral", "contradiction")
    with pytest.raises(
        ValueError,
        match="for the labels neutral, entailment, contradiction, but classification "
        "with the labels entailment, neutral, contradiction is wanted",
    ):
        read(directory, labels=labels)
    with pytest.raises(ValueError, match=r"but regression is wanted: .*new_head=True"):
        read(directory, labels=(), head="regression")
    loaded = read(directory, labels=("no", "yes"), new_head=True)
    assert loaded.params["head"]["output"]["bias"].shape == (2,)
    assert len(loaded.new) == len(loaded.unused) == 4
    with pytest.raises(ValueError, match="is for choice, but classification with"):
        read(ENCODERS / "roberta_choice", head="classification", labels=("a", "b"))


def remove_layer(tensors):
    return {n: t for n, t in tensors.items() if "layer.1.output" not in n}


def remove_half_a_head(tensors):
    del tensors["classifier.bias"]


def add(tensors):
    tensors["bert.encoder.layer.2.output.dense.bias"] = np.zeros(24, np.float32)


def transpose(tensors):
    name = "bert.encoder.layer.1.output.dense.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def spoil(tensors):
    tensors["bert.pooler.dense.bias"][3] = np.nan


def quantize(tensors):
    name = "bert.encoder.layer.1.output.dense.weight"
    tensors[name] = tensors[name].astype(np.int8)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove_layer, r"lacks 4 tensors \(encoder.layer.1.output.LayerNorm.bias, "),
        (remove_half_a_head, r"lacks 1 tensors \(classifier.bias\)"),
        (add, r"holds bert.encoder.layer.2.output.dense.bias which config.json does"),
        (transpose, r"output.dense.weight in .* \(40, 24\), but .* \(24, 40\)"),
        (spoil, "bert.pooler.dense.bias in .* holds 1 numbers that are NaN"),
        (quantize, "has the dtype I8: convert"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(copy, edit, message):
    with pytest.raises(ValueError, match=message):
        read(copy("bert", edit))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "t5"}, "model_type='t5' is not supported: use an encoder"),
        ({"model_type": "deberta-v2"}, "model_type='deberta-v2' is not supported"),
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new' is not supported"),
        ({"position_embedding_type": "relative_key"}, "relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder=True is not supported"),
        ({"hidden_size": "24"}, "config.json: hidden_size='24' cannot be read"),
        ({"vocab_size": None}, "has no vocab_size: add it, an encoder of the type"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob=1.5 cannot be read"),
        ({"id2label": {"0": "a", "2": "b"}}, "must have the ids 0 to 1"),
        ({"id2label": {"0": "a", "1": "a"}}, "must differ from each other"),
        ({"max_position_embeddings": 1}, r"num_positions=1 leaves no position"),
    ],
)
def test_entries_that_do_not_fit_are_refused(copy, entries, message):
    with pytest.raises(ValueError, match=message):
        encoder_weights.load_config(copy("roberta", **entries))


def test_constants_of_mpnet_are_checked(copy):
    directory = copy("mpnet", relative_attention_num_buckets=16)
    with pytest.raises(ValueError, match="relative_attention_num_buckets=16 is not"):
        encoder_weights.load_config(directory)


def test_a_config_of_other_sizes_is_refused():
    with pytest.raises(ValueError, match=r"num_layers=3, but config.json in .* 2: cha"):
        read(ENCODERS / "bert", num_layers=3)


def test_files_of_another_format_are_refused(copy):
    directory = copy("bert")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"neither model.safetensors nor"):
        read(directory)
