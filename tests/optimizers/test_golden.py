"""Recorded trajectories (data/README.md), within rounding."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import subtrack_jax as stj
from tests import common

SHAPES = ("wide", "tall", "square")
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
COMMON = dict(rank=4, update_interval=4, eps=1e-12)
LEARNING_RATE = 1e-2


class Recorded(NamedTuple):
    """An alias with the arguments of a recorded run, and the stages of its step."""

    optimizer: Callable[..., optax.GradientTransformation]
    arguments: dict[str, float]
    suspects: str


RECORDED = {
    "subtrack_paper": Recorded(
        stj.subtrack,
        dict(step_size=0.002, scale=1.0),
        "the geodesic with a fixed step, the moments' transport or the recovery",
    ),
    "subtrack_paper_scale025": Recorded(
        stj.subtrack,
        dict(step_size=0.002, scale=0.25),
        "what `scale` multiplies (only S N) if subtrack_paper still agrees",
    ),
    "subtrack_line_search": Recorded(
        stj.subtrack,
        dict(scale=1.0),
        "the exact line search if subtrack_paper still agrees",
    ),
    "subtrack_grad": Recorded(
        stj.subtrack_grad,
        dict(step_size=0.002, scale=1.0),
        "the geodesic, or the moments (which this method keeps as they are)",
    ),
}


# Sides chosen by the official code, for weights (out, in).
OFFICIAL_AXES = dict(
    wide=MuonDimensionNumbers(0, 1),
    tall=MuonDimensionNumbers(0, 1),
    square=MuonDimensionNumbers(1, 0),
)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(common.DATA / "golden.npz") as arrays:
        return dict(arrays)


def _run(golden, optimizer, dtype):
    gradients = {s: jnp.asarray(golden[f"{s}/gradients"], dtype) for s in SHAPES}
    params = {s: jnp.asarray(golden[f"{s}/weights0"], dtype) for s in SHAPES}
    return common.run(optimizer, params, gradients)


def _check_weights(golden, run, name, tolerance, suspects):
    for shape in run.updates:
        start = golden[f"{shape}/weights0"].astype(np.float64)
        want = golden[f"{shape}/{name}"].astype(np.float64) - start
        got = np.cumsum(np.asarray(run.updates[shape], np.float64), axis=0)
        distance = np.linalg.norm((got - want).reshape(len(want), -1), axis=1)
        error = distance / np.linalg.norm(want[-1])
        assert error.max() < tolerance, (
            f"{shape}/{name}: the weights leave the recorded run at step "
            f"{int(np.argmax(error >= tolerance))} and end {error[-1]:.1e} of the "
            f"total change away (allowed: {tolerance:.0e}). Steps 0-3 are Adam in "
            f"the first basis, 4, 8 and 12 refresh it. Suspect {suspects}. The "
            "recording is of the published method: do not record it anew, unless "
            "data/README.md describes it wrongly."
        )


LDADAM = {
    "ldadam": (dict(error_feedback=False), "the moments' transport"),
    "ldadam_ef": ({}, "the error feedback, if ldadam still agrees"),
}


@pytest.mark.parametrize("name", LDADAM)
def test_ldadam(golden, name):
    """Computes its own bases: signs of an SVD or QR do not matter to it."""
    arguments, suspects = LDADAM[name]
    optimizer = stj.ldadam(LEARNING_RATE, rank=4, eps=1e-12, init="svd", **arguments)
    run = _run(golden, optimizer, "float32")
    suspects = f"the power iteration, what it looks at, or {suspects}"
    _check_weights(golden, run, name, TOLERANCE["float32"], suspects)


@pytest.mark.parametrize(
    ("name", "rank", "scaling"),
    [
        ("apollo", 4, dict(scale=1.0, per="columns")),
        ("apollo_mini", 1, dict(scale=128.0**0.5, per="matrix")),
    ],
)
def test_apollo_on_recorded_projections(golden, name, rank, scaling):
    """Projections are PyTorch's random numbers, so the recorded ones are used."""
    for shape, axes in OFFICIAL_AXES.items():
        low_rank = stj.LowRank(rank, axes)
        drawn = golden[f"{shape}/{name}_projections"]
        drawn = jnp.asarray(drawn if shape == "wide" else drawn.mT, "float32")
        interval = COMMON["update_interval"]
        step = iter(range(len(drawn)))

        def draw(key, m, rank, dtype, drawn=drawn, step=step):
            return drawn[next(step)]

        optimizer = optax.chain(
            stj.draw_projection(low_rank, interval, draw=draw),
            stj.project(low_rank),
            stj.scale_by_projection_aware_adam(low_rank, eps=1e-12, transport=False),
            stj.scale_gradient(low_rank, growth_limit=None, **scaling),
            optax.scale_by_learning_rate(LEARNING_RATE),
        )
        gradients = jnp.asarray(golden[f"{shape}/gradients"], "float32")
        state, updates = optimizer.init(gradients[0]), []
        for gradient in gradients:  # not jitted: every step draws its own projection
            update, state = optimizer.update(gradient, state)
            updates.append(update)
        run = common.Run({shape: jnp.stack(updates)}, None, state)
        suspects = "what is scaled, per column or as a whole, and by which root"
        _check_weights(golden, run, name, TOLERANCE["float32"], suspects)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float64") for name in RECORDED), ("subtrack_line_search", "float32")],
)
def test_subtrack(golden, name, dtype):
    optimizer, arguments, suspects = RECORDED[name]
    optimizer = optimizer(LEARNING_RATE, init="svd", **COMMON, **arguments)
    with jax.enable_x64(dtype == "float64"):
        run = _run(golden, optimizer, dtype)
    _check_weights(golden, run, name, TOLERANCE[dtype], suspects)
    for shape in ("wide", "square"):
        error = np.abs(
            _projector(run.bases[shape]) - _projector(golden[f"{shape}/{name}_basis"])
        ).max()
        assert error < TOLERANCE[dtype], (
            f"{shape}/{name}: the basis is {error:.1e} away from the recorded one, "
            f"whatever the weights do. Suspect {suspects}."
        )


def _projector(basis):
    """Projector `S S^T`, which does not depend on the signs of the first SVD."""
    basis = np.asarray(basis, np.float64)
    return basis @ np.swapaxes(basis, -1, -2)


def _replay(golden) -> stj.Tracker:
    """Tracker that returns the recorded basis of each recorded gradient."""
    bases: dict[tuple[int, ...], list[np.ndarray]] = {}
    gradients: dict[tuple[int, ...], list[np.ndarray]] = {}
    for shape in SHAPES:
        on_the_left = shape == "wide"
        for g, s in zip(
            golden[f"{shape}/gradients"], golden[f"{shape}/galore_bases"], strict=True
        ):
            g, s = (g, s) if on_the_left else (g.T, s.T)
            gradients.setdefault(g.shape, []).append(g)
            bases.setdefault(g.shape, []).append(s)

    def basis_of(gradient: jax.Array) -> jax.Array:
        known = jnp.asarray(np.stack(gradients[gradient.shape]), gradient.dtype)
        answers = jnp.asarray(np.stack(bases[gradient.shape]), gradient.dtype)
        difference = known - jnp.expand_dims(gradient, 0)
        return answers[jnp.argmin(jnp.sum(difference**2, axis=(1, 2)))]

    return stj.Tracker(
        start=lambda key, gradient, rank: basis_of(gradient),
        move=lambda gradient, basis, context: stj.Moved(basis_of(gradient)),
    )


@pytest.mark.parametrize(
    ("name", "recovery", "suspects"),
    [
        ("galore", dict(scale=0.25, recovery="none"), "`scale`"),
        (
            "fira_unlimited",
            dict(scale=0.25, growth_limit=None, residual="published"),
            "the residual that the published code recovers",
        ),
        (
            "fira_unlimited_alpha1",
            dict(scale=1.0, growth_limit=None),
            "the recovery, whose residual is the exact one at this scale",
        ),
    ],
)
def test_on_recorded_bases(golden, name, recovery, suspects):
    """GaLore and Fira depend on the SVD's arbitrary signs, so bases are given."""
    low_rank = stj.LowRank(rank=4, dimension_numbers=OFFICIAL_AXES)
    optimizer = optax.chain(
        stj.track_subspace(low_rank, _replay(golden), update_interval=4),
        stj.project(low_rank),
        stj.scale_by_projection_aware_adam(low_rank, eps=1e-12, transport=False),
        stj.recover_and_scale(low_rank, **recovery),
        optax.scale_by_learning_rate(LEARNING_RATE),
    )
    run = _run(golden, optimizer, "float32")
    # Recorded in float32, so float64 is not closer.
    _check_weights(
        golden,
        run,
        name,
        TOLERANCE["float32"],
        f"Adam in the coordinates, the refresh, or {suspects}",
    )


def test_published_geodesic(golden, precision):
    """One tracked step of the published code with four step sizes."""
    start, gradient = (
        jnp.asarray(golden[f"wide/geodesic_{name}"], precision)
        for name in ("start", "gradient")
    )
    for step_size, want in zip(
        golden["wide/geodesic_eta"], golden["wide/geodesic_end"], strict=True
    ):
        tracker = stj.geodesic(step_size=float(step_size))
        context = stj.TrackerContext(jax.random.key(0), jnp.int32(1))
        got = tracker.move(gradient, start, context).basis
        moved = np.linalg.norm(want - golden["wide/geodesic_start"])
        error = np.linalg.norm(np.asarray(got, np.float64) - want) / moved
        assert error < TOLERANCE["float32"], (
            f"step size {step_size:g}: the basis is {error:.1e} of the move away from "
            "the published code's. Suspect the tangent, its leading triple or its "
            "sign, or the angle, which is 2 sigma times the step size."
        )
