"""Diagnostics of subspaces against NumPy and SciPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from flax import linen
from jax.sharding import AxisType

import subtrack_jax as stj
from subtrack_jax import diagnostics
from tests import common, oracle, sharded

RANK = 3
STEPS = 3
LEARNING_RATE = 1e-2
# For tests where more kinds of leaves would only cost time.
FEW = {name: common.LEAVES[name] for name in ("wide", "tall", "stacked", "vector")}
ATOL = {"float32": 2e-6, "float64": 1e-12}
MATRICES = {name for name, leaf in common.LEAVES.items() if leaf.reduction}


def low_rank(leaves, side="short"):
    return stj.LowRank(RANK, common.dimension_numbers(leaves), side)


def make(leaves, method=stj.subtrack, **changes):
    settings = {
        "rank": RANK,
        "update_interval": 2,
        "dimension_numbers": common.dimension_numbers(leaves),
    }
    return method(LEARNING_RATE, **settings | changes)


def steps(optimizer, leaves, dtype="float32"):
    """[(gradient, update, state)] of a few steps; the third is a refresh."""
    gradients = common.drifting_tree(leaves, STEPS, dtype)
    params = common.zeros(leaves, dtype)
    state, out = optimizer.init(params), []
    for step in range(STEPS):
        gradient = common.at(gradients, step)
        update, state = jax.jit(optimizer.update)(gradient, state, params)
        out.append((gradient, update, state))
    return out


def matrices(name, leaf, side="short"):
    """Wide matrices of a leaf, (slices, m, n), in float64."""
    return common.LEAVES[name].view(side).to_matrices(np.asarray(leaf, np.float64))


def stack(array, ndim):
    """A state's array with its batch axes merged, in float64."""
    array = np.asarray(array, np.float64)
    return array.reshape(-1, *array.shape[array.ndim - ndim :])


def assert_like_state(values, state):
    """Asserts one number per matrix, and None for other leaves."""
    basis = optax.tree.get(state, "basis")
    assert jax.tree.structure(values) == jax.tree.structure(basis)
    for name in MATRICES & basis.keys():
        assert values[name].shape[: basis[name].ndim - 2] == basis[name].shape[:-2]
        assert values[name].dtype == basis[name].dtype
    assert isinstance(values["vector"], optax.MaskedNode)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, value), expected in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(
            np.asarray(value), expected, rtol=1e-4, atol=2e-6, err_msg=name
        )


@pytest.mark.parametrize(
    "side, precision",
    [("short", "float64"), ("long", "float32")],
    indirect=["precision"],
)
def test_how_subspaces_fit_their_gradients(side, precision):
    leaves = common.LEAVES if side == "short" else FEW
    optimizer = make(leaves, side=side)
    gradient, update, state = steps(optimizer, leaves, precision)[-1]
    measured = {
        function: jax.jit(functools.partial(function, low_rank(leaves, side)))(
            gradient, state
        )
        for function in (
            diagnostics.captured_energy,
            diagnostics.recovery_ratio,
            diagnostics.error_slopes,
        )
    }
    for values in measured.values():
        assert_like_state(values, state)
    captured, ratio, slopes = measured.values()
    for name in MATRICES & leaves.keys():
        wide, updates = (
            matrices(name, gradient[name], side),
            matrices(name, update[name], side),
        )
        bases = stack(optax.tree.get(state, "basis")[name], 2)
        for k, (G, S, D) in enumerate(zip(wide, bases, updates, strict=True)):
            total = np.linalg.norm(G)
            tolerance = {"atol": 10 * ATOL[precision], "err_msg": name}
            np.testing.assert_allclose(
                stack(captured[name], 0)[k], oracle.captured_energy(S, G), **tolerance
            )
            # The update's part outside the subspace is the recovered one.
            recovered = np.linalg.norm(D - S @ (S.T @ D)) / LEARNING_RATE
            np.testing.assert_allclose(
                stack(ratio[name], 0)[k] / (recovered / total), 1, **tolerance
            )
            want = scipy.linalg.svdvals(2 * oracle.tangent(S, G)) / total**2
            np.testing.assert_allclose(stack(slopes[name], 1)[k], want, **tolerance)


def test_gradients_in_bfloat16():
    gradient, _, state = steps(make(FEW), FEW, "bfloat16")[-1]
    captured = diagnostics.captured_energy(low_rank(FEW), gradient, state)
    slopes = diagnostics.error_slopes(low_rank(FEW), gradient, state)
    assert_like_state(captured, state)
    for name in MATRICES & FEW.keys():
        bases = stack(optax.tree.get(state, "basis")[name], 2)
        for k, G in enumerate(matrices(name, gradient[name])):
            want = oracle.captured_energy(bases[k], G)
            assert stack(captured[name], 0)[k] == pytest.approx(want, abs=1e-5)
            want = 2 * np.linalg.norm(oracle.tangent(bases[k], G), 2) / np.sum(G**2)
            assert stack(slopes[name], 1)[k, 0] == pytest.approx(want, abs=1e-5)


def test_gradients_of_any_size():
    gradient, _, state = steps(make(FEW), FEW)[-1]

    @jax.jit
    def fit(gradient):
        return [
            function(low_rank(FEW), gradient, state)
            for function in (
                diagnostics.captured_energy,
                diagnostics.recovery_ratio,
                diagnostics.error_slopes,
            )
        ]

    captured, ratio, slopes = fit(gradient)
    for scale in (1e-30, 1e25):
        inverse = jax.tree.map(lambda x, scale=scale: x / scale, ratio)
        scaled = jax.tree.map(lambda g, scale=scale: g * scale, gradient)
        assert_same(fit(scaled), [captured, inverse, slopes])
    zero = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    ones = jax.tree.map(jnp.ones_like, captured)
    assert_same(fit(zero(gradient)), [ones, zero(ratio), zero(slopes)])


@pytest.mark.parametrize("name", common.others_slow(["subtrack", "golore", "ldadam"]))
def test_how_subspaces_move(name):
    leaves = common.LEAVES if name == "subtrack" else FEW
    optimizer = make(leaves, common.OPTIMIZERS[name])
    (_, _, first), (_, _, before), (_, _, after) = steps(optimizer, leaves)
    angles = jax.jit(diagnostics.principal_angles)(after, before)
    distance = jax.jit(diagnostics.grassmann_distance)(after, before)
    still = diagnostics.grassmann_distance(before, first)
    assert_like_state(angles, after)
    assert_like_state(distance, after)
    for leaf in MATRICES & leaves.keys():
        old, new = (
            stack(optax.tree.get(state, "basis")[leaf], 2) for state in (before, after)
        )
        for k in range(len(old)):
            want = scipy.linalg.subspace_angles(old[k], new[k])
            got = stack(angles[leaf], 1)[k]
            np.testing.assert_allclose(got, want, atol=2e-6)
            got = stack(distance[leaf], 0)[k]
            np.testing.assert_allclose(got, np.linalg.norm(want), rtol=1e-4)
            assert got > 1e-3
        np.testing.assert_allclose(still[leaf], 0, atol=1e-6)


@pytest.mark.parametrize("angle", [1e-3, np.pi / 2])
def test_a_geodesic_by_an_angle_is_as_long_as_the_angle(angle):
    _, _, state = steps(make(FEW), FEW)[0]

    def turned(basis):
        new = stack(basis, 2)
        for S in new:
            outside = scipy.linalg.null_space(S.T)[:, 0]
            S[:, 0] = np.cos(angle) * S[:, 0] + np.sin(angle) * outside
        # Another basis of the same subspace has the same distance.
        return jnp.asarray(new[..., ::-1].reshape(basis.shape), basis.dtype)

    bases = optax.tree.get(state, "basis")
    after = optax.tree.set(state, basis=jax.tree.map(turned, bases))
    angles = diagnostics.principal_angles(after, state)
    distance = diagnostics.grassmann_distance(after, state)
    for name in MATRICES & FEW.keys():
        np.testing.assert_allclose(distance[name], angle, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(angles[name][..., 0], angle, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(angles[name][..., 1:], 0, atol=1e-6)


# --- State and gradients in wrappers, with metadata, on meshes -----------------------


def everything(low_rank, gradient, before, after):
    """Results of all functions."""
    return {
        "captured_energy": diagnostics.captured_energy(low_rank, gradient, after),
        "recovery_ratio": diagnostics.recovery_ratio(low_rank, gradient, after),
        "error_slopes": diagnostics.error_slopes(low_rank, gradient, after),
        "principal_angles": diagnostics.principal_angles(after, before),
        "grassmann_distance": diagnostics.grassmann_distance(after, before),
    }


def measured(optimizer):
    (_, _, before), (gradient, _, after) = steps(optimizer, FEW)[1:]
    measure = functools.partial(everything, low_rank(FEW))
    return jax.jit(measure)(gradient, before, after)


@pytest.fixture(scope="module")
def unwrapped():
    return measured(make(FEW))


WRAPPERS = {
    "chain": lambda optimizer: optax.chain(optax.clip_by_global_norm(1e9), optimizer),
    "inject_hyperparams": lambda _: make(
        FEW, optax.inject_hyperparams(stj.subtrack, static_args=("rank",))
    ),
    "apply_if_finite": lambda optimizer: optax.apply_if_finite(optimizer, 3),
    "multi_steps": lambda optimizer: optax.MultiSteps(optimizer, 1),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_state_in_any_wrapper(name, unwrapped):
    assert_same(measured(WRAPPERS[name](make(FEW))), unwrapped)


@pytest.mark.parametrize("kind", ["masked", "partition"])
def test_leaves_that_a_wrapper_hides(kind, unwrapped):
    """Holds also if the dimension numbers do not fit the hidden leaves."""
    axes = stj.by_path("wide|stacked", 1, 2)
    optimizer = make(FEW, dimension_numbers=axes)
    mask = {name: name != "wide" for name in FEW}
    if kind == "masked":
        wrapped = optax.masked(optimizer, mask)
    else:
        labels = jax.tree.map(lambda shown: "low" if shown else "full", mask)
        wrapped = optax.partition({"low": optimizer, "full": optax.sgd(1e-3)}, labels)
    (_, _, before), (gradient, _, after) = steps(wrapped, FEW)[1:]
    got = everything(stj.LowRank(RANK, axes), gradient, before, after)
    for function, values in got.items():
        assert len(jax.tree.leaves(values)) == 1
        np.testing.assert_allclose(
            values["stacked"], unwrapped[function]["stacked"], rtol=1e-4, atol=2e-6
        )


def test_parameters_of_the_same_name():
    params = {"basis": jnp.eye(4, 6), "recovery_norm": jnp.eye(6, 4)}
    optimizer = stj.subtrack(LEARNING_RATE, rank=2)
    update = jax.jit(optimizer.update)
    _, before = update(params, optimizer.init(params), params)
    _, after = update(params, before, params)
    values = everything(stj.LowRank(2), params, before, after)
    assert all(set(value) == set(params) for value in values.values())
    assert values["captured_energy"]["basis"] == pytest.approx(0.5)


def test_gradients_with_metadata():
    optimizer = stj.subtrack(LEARNING_RATE, rank=2)
    gradient = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)))}
    boxed = {"kernel": linen.Partitioned(gradient["kernel"], ("in", "out"))}
    _, state = jax.jit(optimizer.update)(boxed, optimizer.init(boxed), boxed)
    assert_same(
        everything(stj.LowRank(2), boxed, state, state),
        everything(stj.LowRank(2), gradient, state, state),
    )


@pytest.mark.parametrize(
    "axis_type",
    [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit],
    ids=lambda kind: kind.name,
)
def test_sharded_like_on_one_device(axis_type):
    splits = sharded.chosen("tall", "experts")
    leaves = sharded.leaves(splits)
    axes = common.dimension_numbers(leaves)
    optimizer = sharded.optimizer("subtrack", splits, update_interval=1)
    gradients = common.drifting_tree(leaves, 2)

    def run(place):
        params = place(common.zeros(leaves))
        state, states = jax.jit(optimizer.init)(params), []
        for step in range(2):
            gradient = place(common.at(gradients, step))
            _, state = jax.jit(optimizer.update)(gradient, state, params)
            states.append(state)
        measure = functools.partial(everything, stj.LowRank(8, axes))
        return jax.jit(measure)(gradient, *states)

    want = run(lambda tree: tree)
    mesh = sharded.mesh(axis_type)
    with jax.set_mesh(mesh):
        got = run(lambda tree: jax.device_put(tree, sharded.shardings(splits, mesh)))
    assert_same(got, want)
    for _, leaf in sharded.named(got):
        # With explicit axes the sharding of the results is determined.
        assert axis_type == AxisType.Auto or leaf.sharding.is_fully_replicated


# --- Errors ----------------------------------------------------------------------


def test_a_state_without_what_is_asked_for():
    gradient, _, state = steps(optax.adam(1e-3), FEW)[0]
    for ask in (
        lambda: diagnostics.captured_energy(low_rank(FEW), gradient, state),
        lambda: diagnostics.principal_angles(state, state),
    ):
        with pytest.raises(ValueError, match=r"0 fields 'basis'.*one low-rank"):
            ask()
    state = make(FEW, stj.galore).init(gradient)
    with pytest.raises(ValueError, match="0 fields 'recovery_norm'"):
        diagnostics.recovery_ratio(low_rank(FEW), gradient, state)
    with pytest.raises(ValueError, match="2 fields 'basis'"):
        diagnostics.captured_energy(low_rank(FEW), gradient, (state, state))


def test_another_low_rank_than_the_optimizers():
    gradient = common.zeros(FEW)
    state = make(FEW).init(gradient)
    for other in [low_rank(FEW, "long"), stj.LowRank(2)]:
        with pytest.raises(
            ValueError, match=r"stacked has .* \(3, 6, 3\).*own LowRank"
        ):
            diagnostics.captured_energy(other, gradient, state)


def test_states_of_different_parameters():
    state, other = (make(FEW, rank=rank).init(common.zeros(FEW)) for rank in (2, 3))
    with pytest.raises(ValueError, match="of the same optimizer"):
        diagnostics.principal_angles(state, other)
