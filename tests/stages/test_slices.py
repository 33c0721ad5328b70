"""Slices of large leaves: equal results, memory that does not grow with depth."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subtrack_jax as stj
from subtrack_jax._internal import matrix_loops
from tests import common, compilation

AXES = optax.contrib.MuonDimensionNumbers(-2, -1)
LEAVES = {name: common.LEAVES[name] for name in ("batch_axis_last", "wide", "vector")}
LEAVES |= {
    "deep": common.Leaf((3, 2, 6, 10), (2,), (3,)),
    # Moments of these are coded, if they are asked to be.
    "coded": common.Leaf((4, 64, 40), (1,), (2,)),
    "embedding": common.Leaf((96, 48), None),
}


def _slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("subtrack", {"moments_dtype": "int8", "monitor": True}),
        _slow("grass_walk", {"mu_dtype": "bfloat16"}),
        _slow("ldadam", {}),
        ("apollo", {}),
    ],
)
def test_equal_to_the_chain(name, settings, monkeypatch):
    """Updates and state, across a refresh, with leaves of every kind."""
    gradients = common.drifting_tree(LEAVES, 4)
    params = common.at(gradients, 0)

    def run(large):
        monkeypatch.setattr(matrix_loops, "LARGE", large)
        optimizer = common.OPTIMIZERS[name](
            1e-3,
            rank=32 if "moments_dtype" in settings else 2,
            update_interval=2,
            weight_decay=0.1,
            dimension_numbers=common.dimension_numbers(LEAVES),
            **settings,
        )
        return common.run(optimizer, params, gradients)

    want, got = map(run, (2**20, 1))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert a.dtype == b.dtype
        limit = 2e-2 if a.dtype == jnp.bfloat16 else 1e-5
        is_code = a.dtype in (jnp.int8, jnp.uint8)
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        limit = 1 if is_code else limit * np.max(np.abs(b))
        name = jax.tree_util.keystr(path)
        # Neighbouring codes only where rounding decides; another dither shifts most.
        assert not is_code or np.mean(a != b) < 0.02, name
        np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=name)


def test_boxes_stay(monkeypatch):
    monkeypatch.setattr(matrix_loops, "LARGE", 1)
    optimizer = stj.subtrack(
        1e-3, rank=2, moments_dtype="int8", dimension_numbers=stj.by_path("kernel")
    )
    bare = {"kernel": jnp.ones((3, 6, 10)), "embedding": jnp.ones((128, 40))}
    boxed = {
        name: nn.Partitioned(x, (None,) * (x.ndim - 1) + ("out",))
        for name, x in bare.items()
    }
    state = optimizer.init(boxed)
    updates, new_state = jax.jit(optimizer.update)(boxed, state, boxed)
    assert jax.tree.structure(updates) == jax.tree.structure(boxed)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    want, _ = optimizer.update(bare, optimizer.init(bare), bare)
    for name, update in want.items():
        np.testing.assert_allclose(updates[name].value, update, atol=1e-6)


@pytest.mark.parametrize("moments_dtype", [_slow(None), "int8"])
def test_temporaries_do_not_grow_with_the_depth(moments_dtype, monkeypatch):
    """Eight more layers take no more than one more copy of their bases, of a refresh.

    Their coordinates are twice that, and a step has several of their size.
    """
    monkeypatch.setattr(matrix_loops, "LARGE", 2**13)
    rank, m, n = 32, 128, 256
    optimizer = stj.subtrack(
        1e-3, rank=rank, moments_dtype=moments_dtype, dimension_numbers=AXES
    )

    def temporaries(depth):
        params = jax.ShapeDtypeStruct((depth, m, n), jnp.float32)
        state = jax.eval_shape(optimizer.init, params)
        step = jax.jit(optimizer.update, donate_argnums=(0, 1))
        memory = step.lower(params, state).compile().memory_analysis()
        return memory.temp_size_in_bytes

    with compilation.optimized():
        growth = temporaries(12) - temporaries(4)
    assert growth < 1.1 * 8 * m * rank * 4


def test_temporaries_of_an_embedding_in_eight_bits(monkeypatch):
    """Decoded moments of some rows at a time."""
    monkeypatch.setattr(matrix_loops, "LARGE", 2**13)
    optimizer = stj.subtrack(
        1e-3,
        rank=2,
        moments_dtype="int8",
        dimension_numbers=stj.by_path("kernel"),
    )
    params = {
        "embedding": jax.ShapeDtypeStruct((2048, 256), jnp.float32),
        "kernel": jax.ShapeDtypeStruct((3, 4, 8), jnp.float32),
    }
    state = jax.eval_shape(optimizer.init, params)
    step = jax.jit(optimizer.update, donate_argnums=(0, 1))
    with compilation.optimized():
        memory = step.lower(params, state).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.2 * 2048 * 256 * 4
