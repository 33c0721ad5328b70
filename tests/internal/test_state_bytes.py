"""Bytes of an optimizer's state, computed from shapes."""

import jax
import jax.numpy as jnp
import optax
import pytest

import subtrack_jax as stj
from tests import common


def _real_bytes(optimizer, params):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(optimizer.init(params)))


@pytest.mark.parametrize(
    "name, dtype, side",
    [
        ("subtrack", "bfloat16", "long"),
        ("ldadam", "float32", "short"),
        ("apollo_mini", "bfloat16", "short"),
    ],
)
def test_equals_the_real_arrays(name, dtype, side):
    params = common.zeros(common.LEAVES, dtype)
    optimizer = common.OPTIMIZERS[name](
        1e-3,
        rank=3,
        side=side,
        mu_dtype=jnp.bfloat16,
        dimension_numbers=common.dimension_numbers(common.LEAVES),
    )
    got = stj.state_bytes(optimizer, params)
    assert isinstance(got, int)
    assert got == _real_bytes(optimizer, params)
    assert got == stj.state_bytes(optimizer, jax.eval_shape(lambda: params))


def test_wrapped_and_foreign_optimizers():
    """Any optax transformation, including schedules and accumulation."""
    params = common.zeros(common.LEAVES)
    numbers = common.dimension_numbers(common.LEAVES)
    for optimizer in [
        optax.MultiSteps(stj.subtrack(1e-3, rank=2, dimension_numbers=numbers), 4),
        optax.chain(
            optax.clip_by_global_norm(1.0),
            stj.galore(
                optax.linear_schedule(1.0, 0.0, 9), rank=2, dimension_numbers=numbers
            ),
        ),
        optax.adamw(1e-3),
    ]:
        assert stj.state_bytes(optimizer, params) == _real_bytes(optimizer, params)


@pytest.mark.parametrize(
    "side, numbers", [("short", 8 * 2 + 2 * 2 * 20), ("long", 20 * 2 + 2 * 2 * 8)]
)
@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_the_formula(shape, side, numbers):
    """A basis on one side, two moments on the other, counts and a norm."""
    optimizer = stj.subtrack(1e-3, rank=2, side=side)
    counts_and_norm = 3
    got = stj.state_bytes(optimizer, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert got == 4 * (numbers + counts_and_norm)


def test_the_published_shape():
    """2048 x 5461 at rank 512: 26 % less with the basis on the long side."""
    kernel = jax.ShapeDtypeStruct((2048, 5461), jnp.bfloat16)
    short, long = (
        stj.state_bytes(stj.subtrack(1e-3, rank=512, side=side), kernel)
        for side in ("short", "long")
    )
    assert abs(1 - long / short - 0.26) < 0.005
    assert short < 0.6 * stj.state_bytes(optax.adam(1e-3, mu_dtype=jnp.float32), kernel)
