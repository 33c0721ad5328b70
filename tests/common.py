"""Shared methods and leaves, synthetic gradients, runners of optimizers."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import subtrack_jax as stj
from subtrack_jax.optimizers import FAMILY
from tests import oracle

DATA = pathlib.Path(__file__).parent / "data"
OPTIMIZERS = {name: method.optimizer for name, method in FAMILY.items()}
# Methods with a basis in their state; the others draw a projection each time.
TRACKING = [name for name, method in FAMILY.items() if method.recovery is not None]
# Between them every kind of stage: tracked, fed back, drawn; recovered and scaled.
REPRESENTATIVES = ["subtrack", "ldadam", "apollo_mini"]
# All but those whose stages are those of two others: for tests that compile each.
DISTINCT = [
    name
    for name in OPTIMIZERS
    if name not in ("subtrack_grad", "fira", "grass_jump", "apollo_mini")
]
# One method per kind of tracker state: a basis, a basis and an error, no basis.
KINDS = ["subtrack", "ldadam", "apollo"]
# Online Subspace Descent learns a projection that is only nearly orthonormal.
ORTHONORMAL = [name for name in TRACKING if name != "online_subspace_descent"]
TRACKERS = {
    "geodesic": stj.geodesic(),
    "geodesic_fixed_step": stj.geodesic(step_size=1e-3),
    "svd": stj.svd(),
    "random_walk": stj.random_walk(),
    "random_jump": stj.random_jump(),
}


def others_slow(names, quick=KINDS):
    """Parameters of a test: all names, of which the default run takes the quick."""
    return [
        pytest.param(name, marks=[] if name in quick else pytest.mark.slow)
        for name in names
    ]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Leaf of a test tree: its shape and its matrix axes (None: not a matrix)."""

    shape: tuple[int, ...]
    reduction: tuple[int, ...] | None = (0,)
    output: tuple[int, ...] = (1,)

    def dimension_numbers(self) -> optax.contrib.MuonDimensionNumbers | None:
        if self.reduction is None:
            return None
        return optax.contrib.MuonDimensionNumbers(self.reduction, self.output)

    def view(self, side: str = "short") -> oracle.MatrixView:
        return oracle.MatrixView(self.reduction or (0,), self.output, side)

    def rank(self, rank: int | float) -> int | None:
        """Rank of the leaf's subspace; None for plain Adam."""
        if self.reduction is None:
            return None
        short = min(self.view().to_matrices(np.empty(self.shape)).shape[1:])
        own = rank if isinstance(rank, int) else int(rank * short)
        return own if own < short else None


# Short sides are even, so that half of them is an integer rank.
LEAVES = {
    "wide": Leaf((6, 10)),
    "tall": Leaf((10, 6)),
    "square": Leaf((8, 8)),
    "stacked": Leaf((3, 6, 10), (1,), (2,)),
    "batch_axis_last": Leaf((10, 6, 2)),
    "attention": Leaf((8, 2, 6), (0,), (1, 2)),
    "attention_output": Leaf((2, 6, 8), (0, 1), (-1,)),
    "short_side_4": Leaf((4, 9)),
    "vector": Leaf((5,), None),
}


def dimension_numbers(leaves: Mapping[str, Leaf]) -> dict[str, Any]:
    return {name: leaf.dimension_numbers() for name, leaf in leaves.items()}


def zeros(leaves: Mapping[str, Leaf], dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    return {name: jnp.zeros(leaf.shape, dtype) for name, leaf in leaves.items()}


def drifting_gradients(leaf: Leaf, steps: int, seed: int = 0) -> np.ndarray:
    """Synthetic gradients: few drifting directions and noise."""
    rng = np.random.default_rng(seed)
    if leaf.reduction is None:
        return rng.normal(size=(steps, *leaf.shape))
    view = leaf.view()
    slices, m, n = view.to_matrices(np.empty(leaf.shape)).shape
    left, drift = rng.normal(size=(2, slices, m, 5))
    out = []
    for step in range(steps):
        right = np.array([3.0, 2.5, 1.5, 1.0, 0.7])[:, None] * rng.normal(
            size=(slices, 5, n)
        )
        noise = 0.1 * rng.normal(size=(slices, m, n))
        matrices = (left + 0.05 * step * drift) @ right / n**0.5 + noise
        out.append(view.from_matrices(matrices, leaf.shape))
    return np.stack(out)


def drifting_tree(
    leaves: Mapping[str, Leaf], steps: int, dtype: Any = jnp.float32
) -> dict[str, jax.Array]:
    """Synthetic gradients of every leaf, `(steps, *shape)`, each with its own seed."""
    return {
        name: jnp.asarray(drifting_gradients(leaf, steps, seed), dtype)
        for seed, (name, leaf) in enumerate(leaves.items())
    }


def at(tree: Any, step: int) -> Any:
    """Selects one step from a tree of recorded values."""
    return jax.tree.map(lambda values: values[step], tree)


class Run(NamedTuple):
    """Results of a run, stacked over its steps."""

    updates: Any
    bases: Any
    state: Any


@functools.partial(jax.jit, static_argnums=0)
def _scan(update, state, params, gradients):
    def step(state, gradient):
        updates, state = update(gradient, state, params)
        return state, (updates, optax.tree.get(state, "basis"))

    state, (updates, bases) = jax.lax.scan(step, state, gradients)
    return Run(updates, bases, state)


def run(optimizer: optax.GradientTransformation, params: Any, gradients: Any) -> Run:
    """Runs an optimizer on recorded gradients, `(steps, ...)`; params stay constant."""
    return _scan(optimizer.update, optimizer.init(params), params, gradients)


def is_same_program(
    one: optax.GradientTransformation, other: optax.GradientTransformation, params: Any
) -> bool:
    """Whether JAX traces `init` and `update` of both to the same operations.

    Then all their results are bit-equal, and nothing has to be compiled to see it.
    """

    def traced(optimizer):
        def both(gradients, state, params):
            first = jax.tree.leaves(optimizer.init(params))
            return first, jax.tree.leaves(optimizer.update(gradients, state, params))

        state = jax.eval_shape(optimizer.init, params)
        jaxpr = jax.make_jaxpr(both)(params, state, params)
        # Addresses of functions are printed, constants are not.
        text = re.sub(r" at 0x[0-9a-f]+", "", str(jaxpr))
        return text, [np.asarray(constant) for constant in jaxpr.consts]

    (text, constants), (other_text, others) = map(traced, (one, other))
    return text == other_text and all(
        np.array_equal(a, b) for a, b in zip(constants, others, strict=True)
    )


def orthonormality_error(basis: Any) -> float:
    """Largest entry of `|S^T S - I|` over all slices, in float64."""
    basis = np.asarray(basis, np.float64)
    gram = np.swapaxes(basis, -1, -2) @ basis
    return float(np.max(np.abs(gram - np.eye(basis.shape[-1]))))


def assert_all_finite(tree: Any) -> None:
    for path, leaf in jax.tree.leaves_with_path(tree):
        assert np.all(np.isfinite(np.asarray(leaf, np.float64))), (
            f"{jax.tree_util.keystr(path)} is not finite"
        )
