"""Every optimizer against the float64 oracle, over three refresh periods."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subtrack_jax as stj
from tests import common, oracle

INTERVAL = 3
STEPS = 3 * INTERVAL + 2  # The start, three refreshes and a step in the last period.
LEARNING_RATE = 2.0**-6  # Exact in bfloat16: one rounding less to account for.


class Variant(NamedTuple):
    """An alias with some of its arguments, and the oracle of the same method."""

    optimizer: Any
    method: oracle.Method


LDADAM = oracle.Method(
    rho=0.908, error_feedback=True, recovery=False, b1=0.908, b2=0.99, scale=1.0
)
VARIANTS = {
    "subtrack": Variant(stj.subtrack, oracle.Method(oracle.line_search())),
    "subtrack_damped": Variant(
        functools.partial(
            stj.subtrack,
            init="svd",
            damping=0.5,
            scale=1.5,
            recovery_scale=0.6,
            growth_limit=None,
            b1=0.8,
            b2=0.95,
            eps=1e-3,
        ),
        oracle.Method(
            oracle.line_search(0.5),
            scale=1.5,
            recovery_scale=0.6,
            growth_limit=None,
            b1=0.8,
            b2=0.95,
            eps=1e-3,
        ),
    ),
    "subtrack_fixed_step": Variant(
        functools.partial(stj.subtrack, step_size=3e-3, init="svd"),
        oracle.Method(oracle.fixed_step(3e-3)),
    ),
    "subtrack_grad": Variant(
        functools.partial(stj.subtrack_grad, init="svd"),
        oracle.Method(oracle.line_search(), transport=False, recovery=False),
    ),
    "grass_walk": Variant(
        functools.partial(stj.grass_walk, angle=0.3, init="svd"), oracle.Method()
    ),
    "grass_jump": Variant(stj.grass_jump, oracle.Method()),
    "galore": Variant(stj.galore, oracle.Method(transport=False, recovery=False)),
    "fira": Variant(stj.fira, oracle.Method(transport=False)),
    "fira_published": Variant(
        functools.partial(stj.fira, residual="published"),
        oracle.Method(transport=False, removed=0.25),
    ),
    "golore": Variant(
        functools.partial(stj.golore, random_after_steps=2 * INTERVAL),
        oracle.Method(transport="momentum", recovery=False),
    ),
    "ldadam": Variant(stj.ldadam, LDADAM),
    "ldadam_without_error_feedback": Variant(
        functools.partial(stj.ldadam, error_feedback=False, init="svd"),
        dataclasses.replace(LDADAM, error_feedback=False),
    ),
    "online_subspace_descent": Variant(
        stj.online_subspace_descent,
        oracle.Method(projection_rate=5e-3, transport=False, recovery=False),
    ),
    "orthogonal_subtrack": Variant(
        stj.orthogonal_subtrack,
        oracle.Method(oracle.line_search(), recovery=False, orthogonalize=True),
    ),
    "apollo": Variant(
        stj.apollo, oracle.Method(scale=1.0, per="columns", transport=False)
    ),
    "apollo_mini": Variant(
        stj.apollo_mini, oracle.Method(scale=128.0, per="matrix", transport=False)
    ),
}
# Rank 4 is below the smaller side of most leaves and equal to that of one.
CASES = [
    *((name, 4) for name in VARIANTS),
    *((name, 1) for name in ("grass_walk", "ldadam", "apollo_mini")),
    pytest.param("subtrack", 1, marks=pytest.mark.slow),
]
# Precision is a matter of stages and trackers, not of the methods made of them.
LOW_PRECISION = [
    *((name, 4) for name in ("subtrack", "ldadam")),
    *((name, 1) for name in ("grass_walk", "apollo_mini")),
    pytest.param("online_subspace_descent", 4, marks=pytest.mark.slow),
    pytest.param("golore", 1, marks=pytest.mark.slow),
]

# Relative to the leaf's total change. A bfloat16 leaf is compared in the length of
# its path: each update is rounded twice, as it leaves the recovery and after its
# decay, by at most 2^-9 of itself each time.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 2.0**-8}


def _error(got: np.ndarray, want: np.ndarray, dtype: str) -> float:
    """The largest distance between two walks, relative to the length of `want`."""
    flat = [np.reshape(np.asarray(x, np.float64), (STEPS, -1)) for x in (got, want)]
    distance = np.linalg.norm(np.cumsum(flat[0] - flat[1], axis=0), axis=1).max()
    path = np.linalg.norm(flat[1], axis=1).sum()
    total = np.linalg.norm(flat[1].sum(axis=0))
    return float(distance / (path if dtype == "bfloat16" else total))


def _check(
    variant: Variant, rank: float, side: str, leaves: dict[str, tuple[common.Leaf, str]]
) -> None:
    """Runs all leaves, given with their dtypes, in one tree and compares each."""
    method = dataclasses.replace(variant.method, update_interval=INTERVAL)
    shapes = {name: leaf for name, (leaf, _) in leaves.items()}
    gradients = {
        name: jnp.asarray(common.drifting_gradients(leaf, STEPS, seed), dtype)
        for seed, (name, (leaf, dtype)) in enumerate(leaves.items())
    }
    optimizer = variant.optimizer(
        LEARNING_RATE,
        rank=rank,
        update_interval=INTERVAL,
        side=side,
        dimension_numbers=common.dimension_numbers(shapes),
    )
    params = {name: g[0] for name, g in gradients.items()}
    got = common.run(optimizer, params, gradients)
    too_far = {}
    for name, (leaf, dtype) in leaves.items():
        gradient = np.asarray(gradients[name], np.float64)
        if leaf.rank(rank) is None:
            want = oracle.adam_directions(gradient, method)
        else:
            bases = _projections(leaf, rank, side, gradients[name].dtype)
            if got.bases is not None:
                bases = np.asarray(got.bases[name], np.float64)
            want, used = oracle.low_rank_directions(
                gradient, bases, method, leaf.view(side)
            )
            assert bases.shape[-1] == leaf.rank(rank)
            error = np.max(np.abs(used.reshape(bases.shape) - bases))
            if not error <= TOLERANCE["float32" if dtype == "bfloat16" else dtype]:
                too_far[name, "basis"] = error
        assert got.updates[name].dtype == dtype
        error = _error(got.updates[name], -LEARNING_RATE * want, dtype)
        if not error <= TOLERANCE[dtype]:
            too_far[name, "updates"] = error
    assert not too_far, f"away from the oracle by {too_far}"


def _projections(leaf: common.Leaf, rank: float, side: str, dtype: Any) -> np.ndarray:
    """Projections of `draw_projection` for a leaf, one per step."""
    slices, m, _ = leaf.view(side).to_matrices(np.empty(leaf.shape)).shape
    own, dtype = leaf.rank(rank), jnp.promote_types(dtype, jnp.float32)
    drawn = []
    for step in range(STEPS):
        key = jax.random.fold_in(jax.random.key(0), step - step % INTERVAL)
        drawn.append(np.stack([stj.gaussian(key, m, own, dtype)] * slices))
    return np.stack(drawn).astype(np.float64)


def _low_precision() -> dict[str, tuple[common.Leaf, str]]:
    both = {n: common.LEAVES[n] for n in ("wide", "tall", "stacked")}
    leaves = {f"{name}_bfloat16": (leaf, "bfloat16") for name, leaf in both.items()}
    both |= {n: common.LEAVES[n] for n in ("short_side_4", "vector")}
    return leaves | {name: (leaf, "float32") for name, leaf in both.items()}


# Kinds of leaves are a matter of the matrix view, not of the methods: the others
# take those that differ in orientation and stacking.
FEW_KINDS = ("tall", "stacked", "short_side_4")
EVERY_KIND = (*FEW_KINDS, "wide", "square", "attention", "vector")


def _high_precision(*names: str) -> dict[str, tuple[common.Leaf, str]]:
    return {n: (common.LEAVES[n], "float64") for n in names}


@pytest.mark.parametrize("name, rank", LOW_PRECISION)
def test_low_precision(name, rank):
    """Leaves in float32 and bfloat16."""
    _check(VARIANTS[name], rank, "short", _low_precision())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name, rank", CASES)
def test_float64(name, rank):
    """To the last digits, with leaves of every kind for some methods."""
    names = EVERY_KIND if name in common.REPRESENTATIVES else FEW_KINDS
    _check(VARIANTS[name], rank, "short", _high_precision(*names))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["subtrack", "galore", "ldadam", "apollo"])
def test_basis_on_the_long_side(name):
    """The same method on the transposed views."""
    names = EVERY_KIND if name == "subtrack" else FEW_KINDS
    _check(VARIANTS[name], 4, "long", _high_precision(*names))


@pytest.mark.usefixtures("x64")
def test_a_fraction_as_rank():
    """Rank of half of each leaf's smaller side, and unusual axes."""
    leaves = _high_precision(*FEW_KINDS, "attention_output", "batch_axis_last")
    _check(VARIANTS["subtrack"], 0.5, "short", leaves)


def test_low_precision_on_the_long_side():
    _check(VARIANTS["subtrack"], 0.5, "long", _low_precision())


@pytest.mark.usefixtures("x64")
def test_a_variance_that_comes_out_negative():
    """A gradient that jumps: its first moment reacts before the second."""
    method = oracle.Method(b1=0.3, update_interval=INTERVAL)
    leaf = common.LEAVES["wide"]
    size = np.where(np.arange(STEPS) < 4, 1e-3, 1.0)[:, None, None]
    gradients = size * common.drifting_gradients(leaf, 1)
    optimizer = stj.grass_jump(LEARNING_RATE, rank=4, update_interval=INTERVAL, b1=0.3)
    got = common.run(optimizer, jnp.zeros(leaf.shape), jnp.asarray(gradients))
    want, _ = oracle.low_rank_directions(
        gradients, np.asarray(got.bases), method, leaf.view()
    )
    assert _error(got.updates, -LEARNING_RATE * want, "float64") < 1e-9
