"""Encoders: recorded logits of transformers, padding, dropout, matrices, refusals."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subtrack_jax as stj
from models import encoder
from models.encoder_layers import dropout
from models.relative_positions import relative_buckets
from tests.models.encoders import RECORDED, inputs, load, logits_of

FAMILIES = ["bert", "roberta", "mpnet"]


@pytest.mark.parametrize("name", RECORDED.files)
def test_logits_equal_those_that_transformers_recorded(name):
    config, params = load(name)
    logits = logits_of(config, params, *inputs(config))
    assert logits.dtype == np.float32
    assert np.std(RECORDED[name]) > 0.1
    np.testing.assert_allclose(logits, RECORDED[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("optimized")  # rounds as for users
def test_padding_changes_nothing(name):
    config, params = load(name)
    tokens, types, lengths = (x[1:4] for x in inputs(config))  # up to 40 tokens
    whole = logits_of(config, params, tokens, types, lengths)
    cut = logits_of(config, params, tokens[:, :40], types[:, :40], lengths)
    np.testing.assert_allclose(cut, whole, rtol=0, atol=1e-6)
    # Ids behind the length are not read.
    other = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, 17)
    np.testing.assert_array_equal(
        logits_of(config, params, other, types, lengths), whole
    )
    no_types = logits_of(config, params, tokens, None, lengths)
    assert np.allclose(no_types, whole) == (name != "bert")


def test_dropout_keeps_the_mean_and_needs_a_key():
    x = jnp.full((200, 100), 3.0)
    dropped = dropout(x, 0.25, jax.random.key(0))
    assert set(np.unique(dropped)) == {0.0, 4.0}
    assert float(jnp.mean(dropped == 0)) == pytest.approx(0.25, abs=0.01)
    assert dropout(x, 0.25, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("roberta", {"dropout": 0.5}),
        ("mpnet", {"attention_dropout": 0.5}),
        ("roberta", {"head_dropout": 0.5}),
        ("bert", {"head_dropout": 0.5}),
    ],
)
def test_each_rate_drops_out_by_the_key(name, rates):
    none = {"dropout": 0.0, "attention_dropout": 0.0, "head_dropout": 0.0}
    config, params = load(name, **(none | rates))
    batch = inputs(config)
    plain = logits_of(config, params, *batch)
    np.testing.assert_allclose(plain, RECORDED[name], rtol=0, atol=1e-5)
    one, same, other = (
        logits_of(config, params, *batch, jax.random.key(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - plain).max() > 1e-2
    assert np.abs(one - other).max() > 1e-2


def test_attention_with_and_without_dropout_is_the_same_where_nothing_drops():
    # The rate is so low that no weight is dropped; another code path computes it.
    config, params = load(
        "mpnet", dropout=0.0, head_dropout=0.0, attention_dropout=1e-9
    )
    logits = logits_of(config, params, *inputs(config), jax.random.key(0))
    np.testing.assert_allclose(logits, RECORDED["mpnet"], rtol=0, atol=1e-5)


def test_matrices_are_those_of_attention_and_mlp():
    minilm = encoder.EncoderConfig(
        "bert", 30522, 384, 1536, 6, 12, 512, 2, 0, labels=("negative", "positive")
    )
    params = encoder.abstract_params(minilm)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 22_713_216 + 2 * 385
    axes = encoder.matrix_axes(params)
    leaves = jax.tree.leaves_with_path(params)
    specs = jax.tree.leaves(axes, is_leaf=lambda x: x is None or hasattr(x, "_fields"))
    chosen = [leaf for (_, leaf), spec in zip(leaves, specs, strict=True) if spec]
    assert len(chosen) == 6
    assert sum(leaf.shape[0] for leaf in chosen) == 36
    table = stj.LowRank(8, encoder.matrix_axes).describe(params)
    assert len(re.findall(r"kernel", str(table))) >= 6


def test_buckets_of_relative_positions_by_their_definition():
    buckets = relative_buckets(300)
    for query, key in [(0, 5), (5, 0), (100, 100), (7, 15), (250, 0), (0, 299)]:
        distance, ahead = abs(key - query), 16 * (key > query)
        if distance >= 8:  # 8 exact buckets, then 8 that grow up to 128 tokens
            edges = [8 * 16 ** (step / 8) for step in range(8)]
            distance = 7 + sum(distance >= edge - 1e-9 for edge in edges)
        assert buckets[query, key] == ahead + distance


def test_bfloat16_computes_float32_logits_near_those_of_float32():
    config, params = load("roberta", dtype="bfloat16", param_dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    logits = logits_of(config, params, *inputs(config))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, RECORDED["roberta"], atol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "deberta"}, "family must be one of bert, roberta, mpnet, got"),
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"num_heads": 5}, "hidden_size=24 must be a multiple of num_heads=5"),
        ({"padding_id": 61}, "padding_id=61 must be below vocabulary_size=61"),
        ({"num_positions": 2}, "num_positions=2 leaves no position for a token"),
        ({"labels": ("a",)}, "at least two classes"),
        ({"labels": ("a", "b", "a")}, "must differ from each other"),
        ({"head": "choice"}, "need head='classification'"),
    ],
)
def test_configs_that_make_no_sense_are_refused(changes, message):
    config, _ = load("roberta")
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_too_long_sequences_and_classes_without_names_are_refused():
    config, params = load("roberta")
    tokens = np.full((1, config.max_length_tokens + 1), 5)
    with pytest.raises(ValueError, match=r"of 92 tokens do not fit: .* at most 91"):
        logits_of(config, params, tokens)
    with pytest.raises(ValueError, match="needs labels, the names of the classes"):
        encoder.abstract_params(dataclasses.replace(config, labels=()))
