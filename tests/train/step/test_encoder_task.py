"""Loss of an encoder's task, frozen parameters, steps of several lengths."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import encoder, parameters
from tests.train.finetuning.common import MODEL
from train.config.epochs_config import OPTIMIZER
from train.config.finetune_config import FinetuneConfig
from train.step import encoder_task
from train.step.setup import finetuning
from train.step.train_step import make_train_step

CLASSES = dataclasses.replace(
    MODEL, labels=("a", "b", "c"), dropout=0.0, attention_dropout=0.0
)
KEY = jax.random.key(0)


@functools.cache
def params_of(model):
    return parameters.initial(functools.partial(encoder.Encoder, model), KEY)


def make_batch(rows, length, dtype=np.int32):
    rng = np.random.default_rng(length)
    lengths = rng.integers(1, length + 1, rows).astype(np.int32)
    return {
        "tokens": rng.integers(1, 40, (rows, length), dtype=np.int32),
        "token_types": np.zeros((rows, length), np.int32),
        "lengths": lengths,
        "labels": rng.integers(0, 3, rows).astype(dtype),
        "mask": np.arange(rows) < rows - 1,
    }


BATCH = make_batch(4, 8)


def test_rows_that_do_not_count_change_nothing():
    batch = make_batch(4, 8)
    loss = encoder_task.TaskLoss(CLASSES)
    sums = loss(params_of(CLASSES), batch, KEY)
    logits = encoder_task.outputs(CLASSES, params_of(CLASSES), batch)
    expected = -jax.nn.log_softmax(logits)[jnp.arange(3), batch["labels"][:3]].sum()
    assert sums.count == 3
    np.testing.assert_allclose(sums.total, expected, rtol=1e-6)
    batch["labels"][3] = -1
    batch["lengths"][3] = 0
    np.testing.assert_allclose(
        loss(params_of(CLASSES), batch, KEY).total, expected, rtol=1e-6
    )


def test_numbers_have_a_squared_error():
    model = dataclasses.replace(CLASSES, head="regression", labels=())
    batch = make_batch(4, 8, np.float32)
    sums = encoder_task.TaskLoss(model)(params_of(model), batch, KEY)
    found = encoder_task.outputs(model, params_of(model), batch)[:3, 0]
    expected = np.square(found - batch["labels"][:3]).sum()
    np.testing.assert_allclose(sums.total, expected, rtol=1e-5)


def test_dropout_follows_the_key():
    model = dataclasses.replace(CLASSES, dropout=0.5)
    losses = [
        float(
            encoder_task.TaskLoss(model)(params_of(CLASSES), make_batch(4, 8), key)[0]
        )
        for key in (KEY, KEY, jax.random.key(1))
    ]
    assert losses[0] == losses[1] != losses[2]


def make_setup(freeze="none", **settings):
    optimizer = dataclasses.replace(OPTIMIZER, name="adamw", **settings)
    config = FinetuneConfig(model=CLASSES, steps=9, freeze=freeze, optimizer=optimizer)
    return finetuning(config)


@pytest.mark.parametrize("freeze", ["embeddings", "matrices"])
def test_frozen_parameters_stay_and_have_no_state(freeze):
    setup = make_setup(freeze)
    state = setup.create_state_of(params_of(CLASSES))
    new, metrics = setup.train_step(state, make_batch(4, 8))
    is_frozen = encoder_task.is_frozen(new.params, freeze)
    same = jax.tree.map(
        lambda a, b: bool((a == b).all()), new.params, params_of(CLASSES)
    )
    stays = dict(jax.tree_util.tree_leaves_with_path(is_frozen))
    for path, is_same in jax.tree_util.tree_leaves_with_path(same):
        name = jax.tree_util.keystr(path)
        if stays[path]:
            assert is_same, name
        elif "key" not in name or "bias" not in name:  # softmax ignores keys' bias
            assert not is_same or "pooler" in name, name
    assert any(stays.values())
    assert not all(stays.values())
    shapes = {leaf.shape for leaf in jax.tree.leaves(new.opt_state)}
    assert ((40, 16) in shapes) == (freeze != "embeddings")
    assert ((2, 16, 32) in shapes) == (freeze != "matrices")
    assert metrics["gradient_norm"] > 0


def test_a_step_in_two_parts_is_the_same_step_and_compiles_the_update_once():
    setup = make_setup(eps=1e-3, max_gradient_norm=0.5)
    whole = make_train_step(
        setup.loss_sums, setup.optimizer, setup.schedule, max_gradient_norm=0.5
    )
    batches = [make_batch(4, 8), make_batch(4, 16), make_batch(4, 8)]
    one, two = (setup.create_state_of(params_of(CLASSES)) for _ in range(2))
    for batch in batches:
        one, expected = whole(one, batch)
        two, found = setup.train_step(two, batch)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    difference = optax.tree.norm(optax.tree.sub(one.params, two.params))
    assert difference < 1e-5 * optax.tree.norm(one.params)
    assert setup.train_step.compute._cache_size() == 2
    assert setup.train_step.apply._cache_size() == 1
