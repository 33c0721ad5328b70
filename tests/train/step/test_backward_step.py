"""Training step that updates in the backward pass against the ordinary one."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.program import assert_pretrain_refuses
from tests.train.step.test_train_step import MODEL, make_batch, schedule
from train.config.optimizer_config import OptimizerConfig, OptimizerName
from train.step import optimizers, placement
from train.step.mesh import make_mesh
from train.step.setup import llama_setup

# Rows of two texts each.
TWO_TEXTS = {
    "positions": jnp.tile(jnp.arange(8) % 4, (8, 1)),
    "segments": jnp.tile(jnp.arange(8) // 4, (8, 1)),
}
FULL = dataclasses.replace(MODEL, remat="full")
NAMES = set(typing.get_args(OptimizerName)) - {"adafactor"}


def make_setup(name="subtrack", model=FULL, **settings):
    config = OptimizerConfig(name=name, rank=4, update_interval=2)
    optimizer = optimizers.make_optimizer(config, 1e-2, seed=0)
    return llama_setup(
        model,
        optimizer,
        schedule,
        z_loss_weight=1e-3,
        max_gradient_norm=0.5,
        **settings,
    )


def run(setups, steps, mesh=None):
    """State and metrics after some steps with each of the set-ups in turn."""
    state, seed = setups[0].create_state(jax.random.key(0)), 0
    for setup in setups:
        for _ in range(steps):
            batch = make_batch(seed, (8, 8)) | TWO_TEXTS
            if mesh is not None:
                batch = jax.device_put(batch, placement.batch_sharding(mesh))
            state, metrics = setup.train_step(state, batch)
            seed += 1
    return state, metrics


def assert_equal_runs(got, want):
    for (path, a), b in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "model",
    [
        FULL,
        pytest.param(
            dataclasses.replace(FULL, tie_embeddings=True), marks=pytest.mark.slow
        ),
    ],
    ids=["head", "tied"],
)
def test_either_step_can_follow_the_other(model):
    """Same state, results and metrics; with a refresh in both."""
    ordinary = make_setup(model=model)
    layered = make_setup(
        model=model, update_in_backward=True, gradient_accumulation_steps=2
    )
    want = run([ordinary, ordinary], 3)
    assert_equal_runs(run([ordinary, layered], 3), want)
    if model.tie_embeddings:
        assert_equal_runs(run([layered, ordinary], 3), want)
    # A step donates its state and is compiled once.
    assert layered.train_step._cache_size() == 1


@pytest.mark.slow
def test_a_mesh_changes_nothing():
    mesh = make_mesh("fsdp=4,tensor=2")
    want = run([make_setup()], 3)
    with jax.set_mesh(mesh), placement.rules():
        got = run([make_setup(update_in_backward=True, mesh=mesh)], 3, mesh)
    assert_equal_runs(jax.device_get(got), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_optimizer_of_the_programs_fits(name):
    setup = make_setup(name, update_in_backward=True)
    state = jax.eval_shape(setup.create_state, jax.random.key(0))
    new_state, _ = jax.eval_shape(setup.train_step, state, make_batch(0))
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--remat", "dots"], "it needs --remat full, got dots"),
        ([], "it needs --remat full, got none"),
        (["--remat", "full", "--optimizer", "adafactor"], "--optimizer adafactor"),
    ],
    ids=" ".join,
)
def test_what_does_not_fit_is_refused(capsys, tmp_path, flags, message):
    argv = ["--update-in-backward", *flags, "--output-dir", tmp_path / "run"]
    assert_pretrain_refuses(capsys, argv, "--update-in-backward", message)
    assert not (tmp_path / "run").exists()
