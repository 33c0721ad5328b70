"""Calls outside of jit, as in a notebook, compile once."""

import jax
import jax.numpy as jnp
import optax
import pytest

import subtrack_jax as stj
from tests import common

_COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: (
        event.endswith("backend_compile_duration") and _COMPILED.append(event)
    )
)


def _compilations(function, warm_up=2):
    """Number of programs that a second call compiles."""
    for _ in range(warm_up):
        function()
    before = len(_COMPILED)
    function()
    return len(_COMPILED) - before


def test_compilations_are_counted():
    assert _compilations(lambda: jax.jit(lambda x: x + 1)(1.0)) == 1


PARAMS = {"kernel": jnp.ones((6, 9)), "bias": jnp.ones(9)}
GRADS = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size).reshape(x.shape)), PARAMS)


def _training(optimizer, **extra_args):
    state = [optimizer.init(PARAMS)]

    def step():
        _, state[0] = optimizer.update(GRADS, state[0], PARAMS, **extra_args)

    return step


@pytest.mark.parametrize("name", common.others_slow(common.OPTIMIZERS))
def test_update(name):
    optimizer = common.OPTIMIZERS[name](1e-3, rank=2)
    assert _compilations(_training(optimizer)) == 0


def test_update_with_extra_arguments():
    optimizer = stj.subtrack(1e-3, rank=2)
    extra_args = {"value": 1.0, "value_fn": print, "names": ("x",)}
    assert _compilations(_training(optimizer, **extra_args)) == 0


@pytest.mark.parametrize("name", ["subtrack", "ldadam", "apollo_mini"])
def test_update_with_injected_hyperparameters(name):
    """The optimizer is rebuilt in every step, with arrays as hyper-parameters."""
    inject = optax.inject_hyperparams(common.OPTIMIZERS[name], static_args="rank")
    optimizer = inject(optax.linear_schedule(1e-2, 1e-3, 10), rank=2, b1=0.8)
    assert _compilations(_training(optimizer)) == 0


def test_injected_hyperparameters_are_operands():
    """A new value takes effect without a new program."""
    state = {}

    def first_update(learning_rate):
        optimizer = stj.subtrack(jnp.float32(learning_rate), rank=2)
        state.setdefault("init", optimizer.init(PARAMS))
        return optimizer.update(GRADS, state["init"], PARAMS)[0]["kernel"]

    one = first_update(1.0)
    assert _compilations(lambda: first_update(2.0), warm_up=1) == 0
    assert jnp.allclose(first_update(2.0), 2 * one)


def test_wrong_values_are_refused_in_arrays_too():
    with pytest.raises(ValueError, match=r"b1=.*1\.5"):
        stj.subtrack(1e-3, b1=jnp.float32(1.5))
    with pytest.raises(TypeError, match=r"subtrack\(\) got an unexpected .*'rnk'"):
        stj.subtrack(1e-3, rnk=2)


def test_geometry_and_diagnostics():
    geometry, key = stj.grassmann, jax.random.key(0)
    basis, gradient = jnp.eye(6, 2), GRADS["kernel"]
    tangent = geometry.tangent(basis, gradient)
    low_rank = stj.LowRank(2)
    optimizer = stj.subtrack(1e-3, rank=2)
    _, state = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    functions = {
        "range_finder": lambda: geometry.range_finder(key, gradient, 2),
        "leading_triple": lambda: geometry.leading_triple(tangent, basis),
        "exponential_map": lambda: geometry.exponential_map(basis, tangent),
        "random_basis": lambda: geometry.random_basis(key, 6, 2),
        "random_tangent": lambda: geometry.random_tangent(key, basis),
        "align": lambda: geometry.align(basis, basis[::-1]),
        "slopes": lambda: stj.diagnostics.error_slopes(low_rank, GRADS, state),
        "angles": lambda: stj.diagnostics.principal_angles(state, state),
    }
    assert {name: _compilations(f) for name, f in functions.items()} == dict.fromkeys(
        functions, 0
    )
