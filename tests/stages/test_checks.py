"""States of another optimizer or other parameters are refused at trace time."""

import flax.serialization
import jax
import jax.numpy as jnp
import optax
import pytest

import subtrack_jax as stj
from tests import common

SHAPES = {"wide": (8, 16), "tall": (16, 8), "bias": (5,)}
BY_NAME = pytest.mark.parametrize("name", common.OPTIMIZERS)


def zeros(**shapes):
    return {key: jnp.zeros(shape) for key, shape in (SHAPES | shapes).items()}


def make(name, **arguments):
    return common.OPTIMIZERS[name](1e-3, **{"rank": 4} | arguments)


def refusal(optimizer, state):
    with pytest.raises((ValueError, TypeError)) as error:
        jax.eval_shape(optimizer.update, zeros(), state, zeros())
    return str(error.value)


@BY_NAME
def test_flax_restores_a_state_of_its_own(name):
    optimizer = make(name)
    state = optimizer.init(zeros())
    restored = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
    jax.eval_shape(optimizer.update, zeros(), restored, zeros())


@BY_NAME
def test_a_state_of_another_rank_is_named_with_both_shapes(name):
    """Flax restores such a state without checking shapes."""
    optimizer, other = make(name), make(name, rank=2)
    state = flax.serialization.from_bytes(
        optimizer.init(zeros()), flax.serialization.to_bytes(other.init(zeros()))
    )
    message = refusal(optimizer, state)
    assert "tall" in message and "of another optimizer, rank, side" in message
    if name.startswith("apollo"):
        assert "mu/tall has the shape (2, 16), where (4, 16)" in message
    else:
        assert "basis of tall has the shape (8, 2), where (8, 4)" in message


@BY_NAME
def test_a_state_of_the_other_side_is_refused(name):
    message = refusal(make(name), make(name, side="long").init(zeros()))
    if not name.startswith("apollo"):
        assert "basis of tall has the shape (16, 4), where (8, 4)" in message


@BY_NAME
@pytest.mark.parametrize(
    "params",
    [{"wide": jnp.zeros((8, 16))}, zeros(other=(8, 16)), zeros(bias=(6,))],
    ids=["fewer", "more", "another shape"],
)
def test_a_state_of_other_parameters_is_refused(name, params):
    message = refusal(make(name), make(name).init(params))
    assert "of another optimizer, rank, side or tree of parameters" in message


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("subtrack", {"name": "galore"}),
        ("subtrack", {"name": "apollo"}),
        ("galore", {"name": "subtrack"}),
        ("galore", {"name": "online_subspace_descent"}),
        ("apollo", {"name": "subtrack"}),
        ("online_subspace_descent", {"name": "galore"}),
        ("galore", {"moments_dtype": "int8"}),
        ("subtrack", {"growth_limit": None}),
        ("ldadam", {"error_feedback": False}),
    ],
)
def test_a_state_of_another_optimizer_is_refused(name, other):
    state = make(**{"name": name} | other).init(zeros())
    assert "the state is of another optimizer" in refusal(make(name), state)


def test_a_state_that_lost_its_types_is_refused():
    """As orbax restores it without a target: without types."""
    state = flax.serialization.to_state_dict(make("subtrack").init(zeros()))
    states = tuple(state[key] for key in sorted(state))
    message = refusal(make("subtrack"), states)
    assert "was given dict in place of TrackSubspaceState" in message


@BY_NAME
def test_a_tree_of_states_for_one_array_is_refused(name):
    array, optimizer = jnp.zeros((8, 16)), make(name)
    state = optimizer.init({"kernel": array})
    with pytest.raises(ValueError, match="of another optimizer, rank, side or tree"):
        jax.eval_shape(optimizer.update, array, state, array)


def test_the_monitored_and_the_plain_are_told_apart():
    with pytest.raises(ValueError, match=r"a chain of \d stages was given"):
        state = make("subtrack", monitor=True).init(zeros())
        jax.eval_shape(make("subtrack").update, zeros(), state, zeros())


def test_a_rule_of_one_s_own_is_checked_too():
    low_rank = stj.LowRank(rank=4)
    ours, other = (
        stj.on_coordinates(stj.LowRank(rank), optax.scale_by_lion())
        for rank in (low_rank.rank, 2)
    )
    records = jax.eval_shape(
        lambda g: stj.project(low_rank).update(
            stj.draw_projection(low_rank).update(
                g, stj.draw_projection(low_rank).init(g)
            )[0],
            (),
        )[0],
        zeros(),
    )
    with pytest.raises(ValueError, match=r"mu/tall has the shape \(2, 16\), where"):
        jax.eval_shape(ours.update, records, other.init(zeros()))
