"""Orbax checkpoints of the optimizer state restore it bit for bit."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import common

STEPS = 8
LEAVES = {name: common.LEAVES[name] for name in ("wide", "stacked", "vector")}


# Between them every field that a state may have.
@pytest.mark.parametrize("name", [*common.REPRESENTATIVES, "online_subspace_descent"])
def test_round_trip(name, tmp_path):
    """A run saved between two refreshes continues as if uninterrupted."""
    optimizer = common.OPTIMIZERS[name](
        1e-2,
        rank=2,
        update_interval=3,
        dimension_numbers=common.dimension_numbers(LEAVES),
    )
    gradients = common.drifting_tree(LEAVES, STEPS)
    params = common.zeros(LEAVES, "bfloat16")
    update = jax.jit(optimizer.update)

    def train(state, steps):
        updates = None
        for step in steps:
            gradient = common.at(gradients, step)
            updates, state = update(gradient, state, params)
        return updates, state

    _, state = train(optimizer.init(params), range(STEPS // 2))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(optimizer.init, params)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    rest = range(STEPS // 2, STEPS)
    for got, want in zip(
        jax.tree.leaves(train(restored, rest)),
        jax.tree.leaves(train(state, rest)),
        strict=True,
    ):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
