"""Batches of conversations: padded or packed, the same loss and gradient."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest

from models import parameters
from models.llama import Llama, LlamaConfig
from train.config.optimizer_config import OptimizerConfig
from train.config.sft_config import ConversationConfig, SftConfig
from train.conversations.encoded import Conversations
from train.finetuning import conversation_batches as batches
from train.step import placement
from train.step.mesh import make_mesh
from train.step.setup import supervised

MODEL = LlamaConfig(40, 16, 32, num_layers=2, num_heads=2)
DATA = ConversationConfig(
    sequence_length_tokens=16, length_buckets=2, batch_size_sequences=8
)
CONFIG = SftConfig(
    model=MODEL,
    data=DATA,
    steps=1,
    optimizer=OptimizerConfig(name="adamw", warmup_fraction=0.0),
)


def conversations(sizes, counted):
    """Random tokens, of which the last few count."""
    random = np.random.default_rng(0)
    masks = [
        np.arange(size) >= size - count
        for size, count in zip(sizes, counted, strict=True)
    ]
    tokens = random.integers(0, 40, sum(sizes)).astype(np.int32)
    return Conversations("train", tokens, np.concatenate(masks), np.cumsum(sizes))


SPLIT = conversations([5, 17, 4, 8, 6, 3, 12, 5], [1, 9, 2, 5, 1, 2, 3, 4])


def test_conversations_are_padded_to_buckets():
    padded = batches.padded_batches(DATA, SPLIT, slice(None))
    batch = padded(np.array([0, 2]))
    assert batch["inputs"].shape == (8, 8)
    assert batch["tokens"].tolist() == [4, 3, *[0] * 6]
    assert batch["inputs"][0, :4].tolist() == SPLIT.tokens[:4].tolist()
    assert batch["targets"][0, :4].tolist() == SPLIT.tokens[1:5].tolist()
    assert batch["mask"].sum(axis=1).tolist() == [1, 2, *[0] * 6]
    assert padded(np.array([1]))["inputs"].shape == (8, 16)


def packed():
    config = dataclasses.replace(DATA, packing="packed")
    return batches.training_batches(config, SPLIT, 0, slice(None))


def test_whole_conversations_share_rows():
    rows = packed()
    batch = rows(np.arange(len(rows)))
    assert len(rows) < len(SPLIT)
    assert batch["inputs"].shape == (8, 16)
    assert batch["tokens"].sum() == SPLIT.lengths.sum()
    assert batch["mask"].sum() == SPLIT.counted.sum()
    for segments, positions in zip(batch["segments"], batch["positions"], strict=True):
        for segment in set(segments) - {0}:
            own = positions[segments == segment]
            assert own.tolist() == list(range(len(own)))
            assert len(own) in SPLIT.lengths


@pytest.fixture(scope="module")
def params():
    return parameters.initial(functools.partial(Llama, MODEL), jax.random.key(0))


def gradient(params, batch, parts=1, mesh=None):
    config = dataclasses.replace(CONFIG, gradient_accumulation_steps=parts)
    setup = supervised(config, mesh)
    found = setup.train_step.compute(params, 0, setup.place(batch))
    return jax.device_get(found)


@pytest.fixture(scope="module")
def expected(params):
    everything = batches.padded_batches(DATA, SPLIT, slice(None))(np.arange(8))
    return everything, gradient(params, everything)


def assert_same(found, expected):
    chex.assert_trees_all_close(found[0], expected[0], rtol=1e-4, atol=1e-7)
    chex.assert_trees_all_close(found[1:], expected[1:], rtol=1e-5)


def test_packed_rows_have_the_loss_and_gradient_of_padded_ones(params, expected):
    rows = packed()
    assert_same(gradient(params, rows(np.arange(len(rows)))), expected[1])


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_with_unequal_numbers_of_answer_tokens(params, expected, parts):
    assert_same(gradient(params, expected[0], parts), expected[1])


def test_eight_devices_equal_one(params, expected):
    mesh = make_mesh("fsdp=8")
    with jax.set_mesh(mesh), placement.rules():
        assert_same(gradient(params, expected[0], mesh=mesh), expected[1])
