"""Loops: values, derivatives, and size of the compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subtrack_jax as stj
from subtrack_jax._internal import loops


def _power(x, count):
    """x to the power 2^count, in a loop with a traced number of iterations."""
    _, result = loops.while_loop(
        lambda carry: carry[0] < count,
        lambda carry: (carry[0] + 1, carry[1] * carry[1]),
        (jnp.int32(0), x),
        most_trips=5,
    )
    return result


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("derivative", [jax.grad, jax.jacfwd])
def test_derivative_of_a_loop(derivative, count):
    slope = jax.jit(derivative(_power))(jnp.float32(1.1), count)
    power = 2**count
    np.testing.assert_allclose(slope, power * 1.1 ** (power - 1), rtol=1e-5)


def test_second_derivative_of_a_loop():
    curvature = jax.grad(jax.grad(_power))(jnp.float32(1.1), 2)
    np.testing.assert_allclose(curvature, 4 * 3 * 1.1**2, rtol=1e-5)


@pytest.mark.parametrize("is_applied", [False, True])
def test_derivative_by_what_a_conditional_update_closes_over(is_applied):
    def loss(x):
        add = lambda pair: (pair[0] + x * x, pair[1])
        return loops.apply_if(is_applied, add, (3 * x, jnp.int32(0)), "add")[0]

    assert jax.grad(loss)(2.0) == (7 if is_applied else 3)


def test_what_has_no_tangent_keeps_none():
    """Otherwise zero times the infinite slope of a root at 0 gives NaN."""

    def loss(x):
        step = lambda pair: (pair[0] * x, jnp.sqrt(pair[1]))
        return loops.apply_if(True, step, (1.0, jnp.float32(0)), "step")[0]

    assert jax.grad(loss)(2.0) == 1


@pytest.mark.parametrize("count", [1, 2, 8, 9, 64, 65, 130])
def test_switch_takes_the_branch_of_the_index(count):
    branches = [lambda k=k: jnp.int32(k) for k in range(count)]
    found = jax.jit(jax.vmap(lambda k: loops.switch(k, branches)))(jnp.arange(count))
    np.testing.assert_array_equal(found, np.arange(count))


def test_unstack():
    stack = {"a": jnp.arange(12).reshape(6, 2), "b": jnp.arange(6)}
    parts = loops.unstack(stack, [1, 3, 2])
    np.testing.assert_array_equal(parts[1]["a"], stack["a"][1:4])
    np.testing.assert_array_equal(parts[2]["b"], stack["b"][4:])
    assert [len(part["b"]) for part in parts] == [1, 3, 2]


@pytest.mark.parametrize("name", ["subtrack", "galore", "ldadam"])
def test_programs_grow_with_leaves_and_not_with_their_square(name):
    """With one conditional over all leaves every branch would take all of them."""

    def size(leaves):
        shape = jax.ShapeDtypeStruct((16, 40), jnp.float32)
        params = {str(k): shape for k in range(leaves)}
        optimizer = getattr(stj, name)(1e-3, rank=4)
        state = jax.eval_shape(optimizer.init, params)
        lowered = jax.jit(optimizer.update).lower(params, state, params)
        return len(lowered.as_text())

    few, many, more = map(size, (10, 30, 50))
    assert more - many < 1.25 * (many - few)


def test_parts_of_a_stack_share_a_kernel():
    """CPUs compile slices at different constants separately: 15 ms each."""
    parts = 12
    program = jax.jit(lambda stack: loops.unstack(stack, [1] * parts))
    text = program.lower(jnp.zeros((parts, 16, 40))).compile().as_text()
    assert text.count(" dynamic-slice(") == parts
    assert " slice(" not in text.split("dynamic-slice")[1]
