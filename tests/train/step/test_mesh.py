"""Mesh options, and shardings of a model's parameters and state."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from models.llama import Llama, LlamaConfig
from train.config.optimizer_config import OptimizerConfig
from train.step import mesh, optimizers, placement
from train.step.setup import llama_setup

MODEL = LlamaConfig(64, 16, 30, num_layers=2, num_heads=2)


def spec(tree, *path):
    for key in path:
        tree = tree[key]
    return tree.spec


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("fsdp=-1", (1, 8, 1)),
        ("fsdp=4,tensor=2,data=1", (1, 4, 2)),
        ("data=-1, tensor=2", (4, 1, 2)),
        ("data=2,fsdp=2,tensor=2", (2, 2, 2)),
    ],
)
def test_make_mesh(text, shape):
    made = mesh.make_mesh(text)
    assert tuple(made.shape.values()) == shape
    assert made.axis_names == ("data", "fsdp", "tensor")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsdp=3", "does not fit 8 devices"),
        ("fsdp=3,data=-1", "does not fit 8 devices"),
        ("rows=8", "'rows' is not one of data, fsdp, tensor"),
        ("fsdp=2,fsdp=4", "each once"),
        ("fsdp=0", "fsdp needs a size of at least 1"),
        ("fsdp=x", "fsdp needs a size of at least 1"),
        ("fsdp", "fsdp needs a size of at least 1"),
        ("fsdp=-1,data=-1", "only one axis can be -1"),
        ("", "'' is not one of"),
    ],
)
def test_bad_meshes(text, message):
    with pytest.raises(ValueError, match=message):
        mesh.make_mesh(text)


@pytest.mark.parametrize("inside", [False, True])
def test_param_shardings(inside):
    """Equal inside and outside the training context; 4 does not divide 30."""
    made = mesh.make_mesh("fsdp=2,tensor=4")
    make = functools.partial(Llama, MODEL)
    if inside:
        with jax.set_mesh(made), placement.rules():
            shardings = placement.param_shardings(make, made)
    else:
        shardings = placement.param_shardings(make, made)
    layers = shardings["layers"]
    assert spec(layers, "attention", "query", "kernel") == P(None, "fsdp", "tensor")
    assert spec(layers, "attention", "output", "kernel") == P(None, "tensor", "fsdp")
    both = ("fsdp", "tensor")
    assert spec(layers, "mlp", "gate", "kernel") == P(None, both, None)
    assert spec(layers, "mlp", "down", "kernel") == P(None, None, both)
    assert spec(layers, "mlp_norm", "scale") == P(None, "fsdp")
    assert spec(shardings, "embedding", "embedding") == P("tensor", "fsdp")
    assert spec(shardings, "head", "kernel") == P("fsdp", "tensor")


def test_a_batch_that_does_not_divide():
    made = mesh.make_mesh("data=2,fsdp=2,tensor=2")
    mesh.check_batch(8, 2, made)
    with pytest.raises(
        ValueError, match="--batch-size-sequences 12 must be a multiple"
    ):
        mesh.check_batch(12, 2, made)


# The library's tests compare optimizers on meshes.
@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("fsdp=4,tensor=2", "adamw"),
        pytest.param("data=2,tensor=4", "subtrack", marks=pytest.mark.slow),
    ],
)
def test_a_step_on_a_mesh_equals_one_device(text, name):
    """Loss, gradient and parameters, across a refresh, also with accumulation."""
    config = OptimizerConfig(name=name, rank=4, update_interval=2)
    optimizer = optimizers.make_optimizer(config, 1e-2, seed=0)
    model = LlamaConfig(64, 16, 32, num_layers=2, num_heads=2, init_std=0.2)
    rng = np.random.default_rng(0)
    batches = [
        {
            "inputs": rng.integers(0, 64, (16, 8), np.int32),
            "targets": rng.integers(0, 64, (16, 8), np.int32),
            "mask": rng.random((16, 8)) < 0.8,
        }
        for _ in range(4)
    ]

    def train(train_step, state, place):
        rows = []
        for batch in batches:
            state, metrics = train_step(state, place(batch))
            rows.append(jax.device_get(metrics))
        return jax.device_get(state), rows

    key = jax.random.key(0)
    alone = llama_setup(model, optimizer, lambda _: 1e-2)
    want, want_rows = train(
        alone.train_step, alone.create_state(key), lambda batch: batch
    )
    made = mesh.make_mesh(text)
    with jax.set_mesh(made), placement.rules():
        together = llama_setup(
            model,
            optimizer,
            lambda _: 1e-2,
            mesh=made,
            gradient_accumulation_steps=2,
        )
        state = together.create_state(key)
        got, rows = train(together.train_step, state, together.place)
        assert together.train_step._cache_size() == 1
    for row, want_row in zip(rows, want_rows, strict=True):
        for name, value in want_row.items():
            assert row[name] == pytest.approx(value, rel=2e-4), name
    change = optax.tree.norm(
        optax.tree.sub(want.params, jax.device_get(alone.create_state(key).params))
    )
    error = optax.tree.norm(optax.tree.sub(got.params, want.params))
    assert error < 1e-3 * change
