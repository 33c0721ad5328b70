"""The monitor reports energies and changes nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subtrack_jax as stj
from tests import common

RANK = 3
LEAVES = {name: common.LEAVES[name] for name in ("wide", "tall", "stacked", "vector")}
SETTINGS = dict(
    rank=RANK, update_interval=2, dimension_numbers=common.dimension_numbers(LEAVES)
)


@pytest.mark.parametrize("name", ["subtrack", "ldadam", "online_subspace_descent"])
def test_reports_the_energy_and_changes_no_update(name):
    gradients = common.drifting_tree(LEAVES, 4)
    params = common.at(gradients, 0)
    # Without error feedback, whose part of the gradient would be reported, too.
    more = {"error_feedback": False} if name == "ldadam" else {}
    plain = common.OPTIMIZERS[name](1e-3, **SETTINGS, **more)
    monitored = common.OPTIMIZERS[name](1e-3, monitor=True, **SETTINGS, **more)
    plain_state, state = plain.init(params), monitored.init(params)
    initial = jax.tree.structure(state)
    for step in range(4):
        gradient = common.at(gradients, step)
        # Not in one program, whose stages the compiler may fuse, and round, otherwise.
        want, plain_state = plain.update(gradient, plain_state, params)
        got, state = monitored.update(gradient, state, params)
        jax.tree.map(np.testing.assert_array_equal, got, want)
        assert jax.tree.structure(state) == initial
    basis = optax.tree.get(state, "basis")
    captured = optax.tree.get(state, "captured_energy")
    norm = optax.tree.get(state, "gradient_norm")
    assert isinstance(captured["vector"], optax.MaskedNode)
    for leaf in ("wide", "tall", "stacked"):
        wide = np.asarray(gradient[leaf], np.float64)
        wide = wide.mT if leaf == "tall" else wide
        inside = np.asarray(basis[leaf], np.float64).mT @ wide
        total = np.sum(wide**2, axis=(-2, -1))
        assert captured[leaf].shape == wide.shape[:-2]
        np.testing.assert_allclose(norm[leaf], np.sqrt(total), rtol=1e-5)
        np.testing.assert_allclose(
            captured[leaf], np.sum(inside**2, axis=(-2, -1)) / total, rtol=1e-4
        )


def test_a_zero_gradient_is_captured_whole():
    optimizer = stj.subtrack(1e-3, rank=2, monitor=True)
    zeros = jnp.zeros((4, 6))
    _, state = optimizer.update(zeros, optimizer.init(zeros), zeros)
    assert optax.tree.get(state, "captured_energy") == 1
    assert optax.tree.get(state, "gradient_norm") == 0


def test_must_follow_the_projection():
    low_rank = stj.LowRank(rank=2)
    optimizer = optax.chain(
        stj.track_subspace(low_rank, stj.geodesic()), stj.monitor_energy(low_rank)
    )
    zeros = jnp.zeros((4, 6))
    with pytest.raises(TypeError, match="chain project before it"):
        optimizer.update(zeros, optimizer.init(zeros))
