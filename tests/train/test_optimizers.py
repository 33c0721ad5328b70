"""The table of optimizers, and the learning rate they follow."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subtrack_jax as stj
from models import llama
from train import optimizers
from train.config import OptimizerConfig, OptimizerName

NAMES = typing.get_args(OptimizerName)


@pytest.fixture
def params():
    """A LLaMA's with all but one of its matrices left out, quick to compile."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "head": {"kernel": normal(16, 64)},
        "layers": {
            "mlp": {"up": {"kernel": normal(2, 16, 32)}},
            "mlp_norm": {"scale": normal(2, 16)},
        },
        "norm": {"scale": normal(16)},
    }


def make(name="subtrack", learning_rate=1e-2, seed=0, **settings):
    config = OptimizerConfig(name=name, rank=4, update_interval=2, **settings)
    return optimizers.make_optimizer(config, learning_rate, seed)


def one_update(optimizer, params, gradients):
    return jax.jit(optimizer.update)(gradients, optimizer.init(params), params)[0]


@pytest.mark.parametrize("name", NAMES)
def test_low_rank_state_is_that_of_attention_and_mlp(params, name):
    state = make(name).init(params)
    basis = jax.tree.leaves(optax.tree.get(state, "basis", default=()))
    assert len(basis) == (0 if name == "adamw" else 1)
    moments = optax.tree.get(state, "mu")
    assert moments["head"]["kernel"].shape == (16, 64)
    expected = (2, 16, 32) if name == "adamw" else (2, 4, 32)
    assert moments["layers"]["mlp"]["up"]["kernel"].shape == expected


def test_each_name_is_a_method_of_its_own(params):
    gradients = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(1), x.shape), params
    )
    kernels = []
    for name in NAMES:
        optimizer = make(name, learning_rate=1.0)
        update = jax.jit(optimizer.update)
        state, total = optimizer.init(params), 0.0
        # Over two refreshes: galore and subtrack-grad begin alike.
        for scale in (1.0, -0.5, 2.0):
            scaled = jax.tree.map(lambda x, s=scale: s * jnp.sin(s * x), gradients)
            updates, state = update(scaled, state, params)
            total += updates["layers"]["mlp"]["up"]["kernel"]
        assert np.all(np.isfinite(total))
        for other in kernels:
            assert np.abs(total - other).max() > 1e-3
        kernels.append(total)


@pytest.mark.parametrize("name", ["adamw", "subtrack"])
def test_settings_reach_the_optimizer(params, name):
    settings = {"b1": 0.5, "b2": 0.7, "eps": 0.1, "weight_decay": 0.3}
    gradients = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), params)
    updates = one_update(make(name, **settings), params, gradients)
    # First step of Adam; the norms are spared the decay.
    adam = 1e-3 / (1e-3 + 0.1)
    head = params["head"]["kernel"]
    np.testing.assert_allclose(
        updates["head"]["kernel"], -1e-2 * (adam + 0.3 * head), rtol=1e-4, atol=1e-8
    )
    np.testing.assert_allclose(updates["norm"]["scale"], -1e-2 * adam, rtol=1e-4)
    layer_norm = updates["layers"]["mlp_norm"]["scale"]
    np.testing.assert_allclose(layer_norm, -1e-2 * adam, rtol=1e-4)


def test_subtrack_is_the_library_s_with_the_same_settings(params):
    gradients = jax.tree.map(
        lambda x: 1e-3 * jax.random.normal(jax.random.key(1), x.shape), params
    )
    optimizer = make(scale=0.7, growth_limit=1.5, step_size=0.1)
    library = stj.subtrack(
        1e-2,
        rank=4,
        update_interval=2,
        eps=1e-6,
        scale=0.7,
        growth_limit=1.5,
        step_size=0.1,
        dimension_numbers=llama.matrix_axes,
    )
    states = [optimizer.init(params), library.init(params)]
    for turn in range(4):
        scaled = jax.tree.map(lambda x, s=turn: x * jnp.cos(s * x * 1e3), gradients)
        updates = []
        for i, transformation in enumerate((optimizer, library)):
            update, states[i] = jax.jit(transformation.update)(
                scaled, states[i], params
            )
            updates.append(update)
        for leaf, other in zip(*map(jax.tree.leaves, updates), strict=True):
            np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-9)


def test_the_seed_decides_random_subspaces(params):
    kernels = [
        one_update(make("grass-jump", seed=seed), params, params)["layers"]["mlp"]["up"]
        for seed in (1, 1, 2)
    ]
    kernels = [update["kernel"] for update in kernels]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.allclose(kernels[0], kernels[2])


def test_gradients_are_clipped_before_anything_else(params):
    gradients = jax.tree.map(lambda x: jnp.full_like(x, 1e3), params)
    norm = float(optax.tree.norm(gradients))
    # With eps = 1 the first step of Adam shows the size of what it was given.
    updates = one_update(make("adamw", eps=1.0), params, gradients)
    clipped = 1e3 / norm
    np.testing.assert_allclose(
        updates["head"]["kernel"], -1e-2 * clipped / (clipped + 1), rtol=1e-4
    )


def test_learning_rate_warms_up_and_falls_to_a_fraction():
    config = OptimizerConfig(
        learning_rate=2.0, warmup_fraction=0.1, final_learning_rate_fraction=0.25
    )
    schedule = optimizers.learning_rate_schedule(config, 1000)
    rates = np.array([schedule(step) for step in range(1000)])
    assert np.all(rates > 0)
    assert np.argmax(rates) == 100
    assert rates[100] == 2.0
    np.testing.assert_allclose(np.diff(rates[:101], 2), 0, atol=1e-6)
    assert rates[550] == pytest.approx((2.0 + 0.5) / 2, rel=1e-3)
    assert rates[-1] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.1, 1.0])
def test_shortest_runs_have_a_learning_rate(steps, warmup_fraction):
    config = dataclasses.replace(OptimizerConfig(), warmup_fraction=warmup_fraction)
    schedule = optimizers.learning_rate_schedule(config, steps)
    rates = [float(schedule(step)) for step in range(steps)]
    assert min(rates) > 0
    assert max(rates) <= config.learning_rate * (1 + 1e-6)
