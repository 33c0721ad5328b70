"""Rare events of long runs: zeros, NaNs, right angles, full rank."""

import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import subtrack_jax as stj
from tests import common

RANK = 2
INTERVAL = 3
LEAVES = {name: common.LEAVES[name] for name in ("tall", "stacked", "vector")}
LOW_RANK = [name for name in LEAVES if name != "vector"]
TRACKING = [name for name in common.DISTINCT if name in common.TRACKING]
BY_NAME = pytest.mark.parametrize("name", common.DISTINCT)


@functools.cache  # Compiled once for all tests of an optimizer.
def _optimizer(name, **arguments):
    return common.OPTIMIZERS[name](
        1e-2,
        rank=RANK,
        update_interval=INTERVAL,
        dimension_numbers=common.dimension_numbers(LEAVES),
        **arguments,
    )


def _run(name, gradients):
    return common.run(_optimizer(name), common.zeros(LEAVES), gradients)


def _gradients(steps=2 * INTERVAL + 2):
    return common.drifting_tree(LEAVES, steps)


@BY_NAME
def test_zero_gradient_from_the_start(name):
    """A frozen matrix that is unfrozen has a basis and finite updates throughout."""
    gradients = jax.tree.map(lambda g: g.at[: INTERVAL + 2].set(0.0), _gradients())
    run = _run(name, gradients)
    common.assert_all_finite((run.updates, run.state))
    for leaf in LOW_RANK:
        _assert_orthonormal(name, run.bases, leaf)
        np.testing.assert_array_equal(run.updates[leaf][: INTERVAL + 2], 0.0)
        thawed = run.updates[leaf][INTERVAL + 2 :]
        assert np.all(np.linalg.norm(thawed.reshape(len(thawed), -1), axis=1) > 1e-4)


@pytest.mark.parametrize("name", ["subtrack", "grass_walk", "grass_jump"])
def test_recovery_after_a_zero_start(name):
    """A recovery norm of zero must not limit the recovered part to zero forever."""
    gradients = jax.tree.map(lambda g: g.at[0].set(0.0), _gradients())
    run = _run(name, gradients)
    basis, update = run.bases["stacked"][-1], run.updates["stacked"][-1]
    outside = update - basis @ (basis.mT @ update)
    assert np.linalg.norm(outside) > 0.1 * np.linalg.norm(update)


@pytest.mark.parametrize("batch", [(), (3,)], ids=["matrix", "stacked"])
@pytest.mark.parametrize("name", ["subtrack", "subtrack_grad"])
def test_tracking_finds_what_begins_after_a_zero_start(name, batch):
    """The basis after zero gradients must not be orthogonal to any axis."""
    rng = np.random.default_rng(0)
    optimizer = common.OPTIMIZERS[name](
        1e-2,
        rank=RANK,
        update_interval=1,
        dimension_numbers=MuonDimensionNumbers(-2, -1),
    )
    for rows in ([0, 1], [2, 3], [4, 5]):
        gradient = np.zeros((20, *batch, 6, 10), np.float32)
        gradient[1:, ..., rows, :] = rng.normal(size=(19, *batch, 2, 10))
        run = common.run(optimizer, jnp.zeros((*batch, 6, 10)), jnp.asarray(gradient))
        within = np.sum(np.asarray(run.bases)[-1][..., rows, :] ** 2, axis=(-2, -1))
        assert np.all(within > 0.9 * RANK)


@BY_NAME
def test_zero_gradient_on_a_refresh(name):
    """A zero gradient on a refresh and for a few steps after it."""
    gradients = jax.tree.map(
        lambda g: g.at[INTERVAL : INTERVAL + 2].set(0), _gradients()
    )
    run = _run(name, gradients)
    common.assert_all_finite((run.updates, run.state))
    for leaf in LOW_RANK:
        _assert_orthonormal(name, run.bases, leaf)


@BY_NAME
def test_zero_columns_and_rows(name):
    """Unused inputs and outputs: no division by zero, no update."""
    gradients = _gradients()
    gradients["tall"] = gradients["tall"].at[:, 2, :].set(0.0).at[:, :, 3].set(0.0)
    run = _run(name, gradients)
    common.assert_all_finite((run.updates, run.state))
    np.testing.assert_allclose(run.updates["tall"][:, 2, :], 0.0, atol=1e-7)


@pytest.mark.parametrize(
    "name, bad",
    [*((name, np.nan) for name in TRACKING), ("subtrack", np.inf)],
)
def test_a_bad_gradient_leaves_its_basis_alone(name, bad):
    """On a refresh: the matrix or slice keeps its basis, the others move."""
    gradients = _gradients()
    gradients["tall"] = gradients["tall"].at[INTERVAL, 4, 1].set(bad)
    gradients["stacked"] = gradients["stacked"].at[INTERVAL, 1, 0, 0].set(bad)
    run = _run(name, gradients)
    before, after = INTERVAL - 1, INTERVAL
    keep, move = np.testing.assert_array_equal, _assert_moved
    keep(run.bases["tall"][after], run.bases["tall"][before])
    keep(run.bases["stacked"][after, 1], run.bases["stacked"][before, 1])
    move(run.bases["stacked"][after, 0], run.bases["stacked"][before, 0])
    # Only the matrix itself is affected, and no later basis.
    common.assert_all_finite((run.updates["stacked"][:, 0], run.updates["vector"]))
    for leaf in LOW_RANK:
        _assert_orthonormal(name, run.bases, leaf)
        _assert_moved(run.bases[leaf][2 * INTERVAL], run.bases[leaf][after])


def test_a_bad_gradient_leaves_the_error_as_it_was():
    leaf = common.Leaf((6, 10))
    gradients = jnp.asarray(common.drifting_gradients(leaf, 3), jnp.float32)
    optimizer, params = stj.ldadam(1e-2, rank=2), jnp.zeros(leaf.shape)
    errors, state = [], optimizer.init(params)
    for gradient in (*gradients[:2], gradients[2].at[1, 2].set(jnp.nan)):
        _, state = optimizer.update(gradient, state, params)
        errors.append(optax.tree.get(state, "error"))
    assert np.any(errors[0] != errors[1])
    np.testing.assert_array_equal(errors[2], errors[1])


def _assert_orthonormal(name, bases, leaf):
    if name in common.ORTHONORMAL:
        assert common.orthonormality_error(bases[leaf]) < 1e-5


def _assert_moved(new, old):
    assert np.max(np.abs(np.asarray(new) - np.asarray(old))) > 1e-4


@pytest.mark.parametrize("name", [n for n in TRACKING if n in common.ORTHONORMAL])
def test_a_bad_first_gradient(name):
    """Without a previous basis any orthonormal one serves until the next refresh."""
    gradients = jax.tree.map(lambda g: g.at[0].set(jnp.nan), _gradients())
    run = _run(name, gradients)
    for leaf in LOW_RANK:
        assert common.orthonormality_error(run.bases[leaf]) < 1e-5


@pytest.mark.parametrize(
    "name, bad_step",
    [
        *((name, INTERVAL) for name in common.REPRESENTATIVES),
        *[("online_subspace_descent", INTERVAL), ("subtrack", 0), ("apollo", 0)],
    ],
)
def test_apply_if_finite_recovers(name, bad_step):
    """The bad step has no effect: the rest is the run without it."""
    gradients = _gradients()
    bad = jax.tree.map(lambda g: jnp.insert(g, bad_step, jnp.nan, axis=0), gradients)
    guarded = optax.apply_if_finite(_optimizer(name), max_consecutive_errors=3)
    got = common.run(guarded, common.zeros(LEAVES), bad)
    want = _run(name, gradients)
    for leaf in LEAVES:
        updates = np.delete(got.updates[leaf], bad_step, axis=0)
        np.testing.assert_array_equal(got.updates[leaf][bad_step], 0.0)
        np.testing.assert_allclose(updates, want.updates[leaf], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", common.REPRESENTATIVES)
def test_full_rank_is_adam(name):
    """Leaves too small for the rank equal `optax.adam`, beside low-rank leaves."""
    full = {
        "wide": common.Leaf((6, 10)),
        "square": common.Leaf((6, 6)),
        "stack_of_small": common.Leaf((3, 4, 10), (1,), (2,)),
    }
    leaves = full | {"low_rank": common.Leaf((7, 8))}
    gradients = common.drifting_tree(leaves, 2 * INTERVAL)
    params = common.zeros(leaves)
    optimizer = common.OPTIMIZERS[name](
        1e-2,
        rank=6,
        update_interval=INTERVAL,
        b1=0.9,
        b2=0.999,
        dimension_numbers=common.dimension_numbers(leaves),
    )
    state, adam = optimizer.init(params), optax.adam(1e-2)
    adam_state = adam.init(params)
    assert len(jax.tree.leaves(optax.tree.get(state, "basis"))) == (
        name in common.TRACKING
    )
    update = jax.jit(optimizer.update)
    for step in range(2 * INTERVAL):
        gradient = common.at(gradients, step)
        got, state = update(gradient, state, params)
        want, adam_state = adam.update(gradient, adam_state, params)
        for leaf in full:
            np.testing.assert_allclose(got[leaf], want[leaf], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["subtrack", "subtrack_grad"])
@pytest.mark.parametrize("batch", [(), (3,)], ids=["matrix", "stacked"])
def test_a_gradient_inside_of_the_span_keeps_the_basis(name, batch):
    """sigma = 0 on every refresh: tracking adds no rotation of its own."""
    rng = np.random.default_rng(0)
    span = rng.normal(size=(*batch, 6, RANK))
    gradients = span @ rng.normal(size=(8, *batch, RANK, 10))
    optimizer = common.OPTIMIZERS[name](
        1e-2,
        rank=RANK,
        update_interval=1,
        dimension_numbers=MuonDimensionNumbers(-2, -1),
    )
    run = common.run(
        optimizer, jnp.zeros((*batch, 6, 10)), jnp.asarray(gradients, jnp.float32)
    )
    assert np.max(np.abs(run.bases - run.bases[:1])) < 1e-4
    common.assert_all_finite((run.updates, run.state))


@pytest.mark.parametrize(
    "name",
    [*common.REPRESENTATIVES, "fira", "online_subspace_descent", "orthogonal_subtrack"],
)
def test_the_scale_of_the_gradient_does_not_matter(name):
    """Adam's scale invariance (with eps=0) holds for all stages."""
    gradients = _gradients()
    optimizer = _optimizer(name, eps=0.0)
    want = common.run(optimizer, common.zeros(LEAVES), gradients)
    for scale in (2.0**-40, 2.0**40):
        scaled = jax.tree.map(lambda g: g * scale, gradients)  # noqa: B023
        got = common.run(optimizer, common.zeros(LEAVES), scaled)
        for leaf in LOW_RANK:
            if name in common.TRACKING:
                bases = got.bases[leaf], want.bases[leaf]
                np.testing.assert_allclose(*bases, atol=1e-4)
            size = np.max(np.abs(want.updates[leaf]))
            np.testing.assert_allclose(
                got.updates[leaf], want.updates[leaf], atol=1e-4 * size
            )


@pytest.mark.parametrize("name", common.TRACKERS)
def test_orthonormal_after_ten_thousand_updates(name):
    """A refresh on every step, with float32 and bfloat16 gradients."""
    low_rank = stj.LowRank(rank=3)
    optimizer = stj.track_subspace(low_rank, common.TRACKERS[name], update_interval=1)
    params = {
        "float32": jnp.zeros((6, 9)),
        "bfloat16": jnp.zeros((9, 6), jnp.bfloat16),
    }

    def gradient(key):
        return {
            leaf: jax.random.normal(key, zero.shape, zero.dtype)
            for leaf, zero in params.items()
        }

    @jax.jit
    def train(state):
        def step(state, key):
            return optimizer.update(gradient(key), state)[1], None

        return jax.lax.scan(step, state, jax.random.split(jax.random.key(0), 10_000))[0]

    basis = train(optimizer.init(params)).basis
    for leaf in params:
        assert basis[leaf].dtype == jnp.float32
        # Without re-orthonormalisation the drift is 10 to 100 times larger.
        assert common.orthonormality_error(basis[leaf]) < 1e-6


MANY_STACKED_LEAVES = """
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax
import subtrack_jax as stj

low_rank = stj.LowRank(rank=8, dimension_numbers=stj.by_path(""))
gradients = [jax.random.normal(jax.random.key(k), (4, 64, 40 + k)) for k in range(7)]
for tracker in (stj.geodesic(), stj.random_jump(), stj.svd()):
    stage = stj.track_subspace(low_rank, tracker)
    state = stage.init(gradients)
    start = jax.jit(stage.update)
    for _ in range(10):
        jax.block_until_ready(start(gradients, state))
"""


@pytest.mark.slow
def test_many_stacked_leaves_do_not_wait_for_each_other():
    """Batched decompositions of several leaves can deadlock in a pool of two threads.

    In a process of its own: a thread that hangs cannot be stopped.
    """
    root = pathlib.Path(__file__).parent.parent
    subprocess.run(
        [sys.executable, "-c", MANY_STACKED_LEAVES], cwd=root, check=True, timeout=240
    )


@pytest.mark.parametrize(
    ("name", "growth_limit"),
    [("subtrack", 1.01), ("apollo", 1.01), ("apollo", np.inf), ("apollo_mini", 1.01)],
)
def test_nothing_divides_zero_by_zero(name, growth_limit):
    """`jax_debug_nans` checks every operation that is not compiled."""
    gradients = [np.zeros((4, 6)), np.outer(range(4), range(6)), np.zeros((4, 6))]
    gradients = [jnp.asarray(g, jnp.float32) for g in gradients]
    with jax.debug_nans(True), jax.debug_infs(True):
        optimizer = common.OPTIMIZERS[name](1e-3, rank=1, growth_limit=growth_limit)
        state = optimizer.init(gradients[0])
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state)
    assert np.all(np.isfinite(updates))
