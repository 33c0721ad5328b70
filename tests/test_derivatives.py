"""Derivatives through updates: meta-gradients by hyper-parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import common

STEPS = 4  # with a refresh on each but the first
# A move in closed form and one by a QR factorisation; the others are marked slow.
QUICK = {"subtrack", "ldadam"}


def _target(shape):
    return np.random.default_rng(0).normal(size=shape)


def _loss_after_training(learning_rate, b1, name):
    make = common.OPTIMIZERS[name]
    settings = {"random_after_steps": 2} if name == "golore" else {}
    optimizer = make(learning_rate, b1=b1, rank=2, update_interval=1, **settings)

    def loss(params):
        output = jnp.tanh(params["kernel"]) + params["bias"][None]
        return jnp.mean((output - _target(output.shape)) ** 2)

    params = {"kernel": jnp.zeros((6, 9)), "bias": jnp.zeros(9)}

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS)
    return loss(params)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in common.OPTIMIZERS
    ],
)
def test_meta_gradients_equal_differences(name, x64):
    """By learning rate and b1, through moves of the bases."""
    loss = lambda rates: _loss_after_training(*rates, name)
    rates, step = jnp.array([0.3, 0.8]), 1e-6
    value = jax.jit(loss)
    differences = [
        (value(rates + step * axis) - value(rates - step * axis)) / (2 * step)
        for axis in np.eye(2)
    ]
    for derivative in (jax.grad, jax.jacfwd) if name == "subtrack" else (jax.grad,):
        slopes = jax.jit(derivative(loss))(rates)
        np.testing.assert_allclose(slopes, differences, rtol=1e-4)


def test_a_gradient_of_low_rank_has_finite_meta_gradients(x64):
    """A gradient inside the subspace: its residual is zero and the basis stays.

    No entry is exactly zero: there the root in optax' Adam has no derivative either.
    """

    def loss_after_training(learning_rate):
        optimizer = common.OPTIMIZERS["subtrack"](
            learning_rate, rank=4, update_interval=1
        )
        loss = lambda w: jnp.mean((jnp.ones((3, 16)) @ w - 1) ** 2)
        params = 0.1 * jnp.ones((16, 24))
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
        return loss(params)

    value, slope = jax.jit(jax.value_and_grad(loss_after_training))(1e-2)
    assert np.isfinite(value)
    assert slope < 0
