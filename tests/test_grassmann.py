"""Grassmann geometry against NumPy and SciPy in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats

from subtrack_jax import grassmann
from tests import common, oracle

pytestmark = pytest.mark.usefixtures("strict_dtypes")

# Allowed error for numbers of order one.
ROUNDING = {"float32": 2e-6, "float64": 1e-14}
SHAPES = [(6, 10, 3), (10, 6, 3), (8, 8, 1), (5, 9, 5), (24, 40, 4)]


def _problem(m, n, rank, dtype, seed=0):
    """Random basis and gradient as JAX arrays."""
    rng = np.random.default_rng(seed)
    basis = scipy.linalg.orth(rng.normal(size=(m, rank)))
    gradient = rng.normal(size=(m, n)) / np.sqrt(n)
    return jnp.asarray(basis, dtype), jnp.asarray(gradient, dtype)


def _f64(*arrays):
    out = [np.asarray(x, np.float64) for x in arrays]
    return out if len(out) > 1 else out[0]


def _angles(a, b):
    return scipy.linalg.subspace_angles(*_f64(a, b))


def _with_singular_values(m, r, singular_values, dtype, seed=0):
    """A basis and a tangent with given singular values."""
    rng = np.random.default_rng(seed)
    frame = scipy.linalg.orth(rng.normal(size=(m, 2 * r)))
    w = scipy.linalg.orth(rng.normal(size=(r, r)))
    tangent = frame[:, r:] @ np.diag(singular_values) @ w.T
    return jnp.asarray(frame[:, :r], dtype), jnp.asarray(tangent, dtype)


@pytest.mark.parametrize("m, n, rank", SHAPES)
def test_tangent(m, n, rank, precision):
    basis, gradient = _problem(m, n, rank, precision)
    got = grassmann.tangent(basis, gradient)
    want = oracle.tangent(*_f64(basis, gradient))
    np.testing.assert_allclose(got, want, atol=10 * ROUNDING[precision])
    assert got.dtype == precision


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**50])
def test_tangent_of_a_scaled_gradient(scale):
    """Bit-equal where fourth powers of the entries overflow or underflow."""
    basis, gradient = _problem(6, 10, 3, "float32")
    got = grassmann.tangent(basis, gradient * scale, scale)
    np.testing.assert_array_equal(got, grassmann.tangent(basis, gradient))


def test_tangent_is_half_the_descent_direction_of_the_projection_error(x64):
    """Compared with the cost's gradient by autodiff, projected on the tangent space."""
    del x64
    basis, gradient = _problem(6, 10, 3, "float64")

    def cost(s):
        coordinates = jnp.linalg.solve(s.T @ s, s.T @ gradient)
        return jnp.sum((gradient - s @ coordinates) ** 2)

    want = -0.5 * jax.grad(cost)(basis)
    np.testing.assert_allclose(grassmann.tangent(basis, gradient), want, atol=1e-13)


@pytest.mark.parametrize("second", [0.0, 0.5, 0.99, 0.9999])
def test_leading_triple(second, precision):
    """Also with a second singular value close to the first."""
    basis, tangent = _with_singular_values(12, 3, [1.7, 1.7 * second, 0.1], precision)
    sigma, u, v = grassmann.leading_triple(tangent, basis)
    want_u, want_sigma, want_vt = np.linalg.svd(_f64(tangent))
    # The gap limits the accuracy of the singular vector.
    tolerance = 4 * ROUNDING[precision] / (1 - second)
    np.testing.assert_allclose(sigma, want_sigma[0], rtol=10 * ROUNDING[precision])
    sign = np.sign(_f64(v) @ want_vt[0])
    np.testing.assert_allclose(sign * _f64(v), want_vt[0], atol=tolerance)
    np.testing.assert_allclose(sign * _f64(u), want_u[:, 0], atol=tolerance)
    assert np.max(np.abs(_f64(basis).T @ _f64(u))) < 2 * ROUNDING[precision]


def test_leading_triple_of_a_tie(precision):
    """Any direction in the plane of the tie is correct."""
    basis, tangent = _with_singular_values(12, 3, [1.0, 1.0, 0.3], precision)
    sigma, u, v = _f64(*grassmann.leading_triple(tangent, basis))
    np.testing.assert_allclose(sigma, 1.0, rtol=1e-5)
    np.testing.assert_allclose(u @ _f64(tangent) @ v, 1.0, rtol=1e-5)


def test_leading_triple_of_nothing(precision):
    """A zero tangent gives angle zero, not NaN."""
    basis, tangent = _with_singular_values(12, 3, [0.0, 0.0, 0.0], precision)
    sigma, u, v = grassmann.leading_triple(tangent, basis)
    assert sigma == 0.0
    moved = grassmann.geodesic(basis, u, v, sigma)
    np.testing.assert_array_equal(moved, basis)


@pytest.mark.parametrize("angle", [0.0, 1e-4, 0.3, np.pi / 2, 2.0])
def test_geodesic(angle, precision):
    """Rotates one direction by the angle and stays orthonormal."""
    basis, tangent = _with_singular_values(12, 3, [1.0, 0.0, 0.0], precision)
    u, _, vt = np.linalg.svd(_f64(tangent))
    u, v = jnp.asarray(u[:, 0], precision), jnp.asarray(vt[0], precision)
    got = grassmann.geodesic(basis, u, v, jnp.asarray(angle, precision))
    want = oracle.exponential_map(_f64(basis), angle * _f64(tangent))
    np.testing.assert_allclose(got, want, atol=ROUNDING[precision])
    assert common.orthonormality_error(got) < 2 * ROUNDING[precision]
    if angle == 0.0:
        np.testing.assert_array_equal(got, basis)
    if angle == np.pi / 2:  # u has replaced S v
        np.testing.assert_allclose(_f64(got) @ _f64(v), u, atol=ROUNDING[precision])


@pytest.mark.parametrize("m, n, rank", SHAPES[:3])
def test_line_search_captures_the_most(m, n, rank, precision):
    """Compared with SciPy's minimiser of the projection error along the geodesic."""
    basis, gradient = _problem(m, n, rank, precision)
    u, _, vt = np.linalg.svd(oracle.tangent(*_f64(basis, gradient)))
    u, v = u[:, 0], vt[0]

    def missed(angle):
        turned = oracle.exponential_map(_f64(basis), angle * np.outer(u, v))
        return 1.0 - oracle.captured_energy(turned, _f64(gradient))

    got = float(
        grassmann.line_search(
            basis, gradient, jnp.asarray(u, precision), jnp.asarray(v, precision)
        )
    )
    best = scipy.optimize.minimize_scalar(
        missed,
        bounds=(-np.pi / 2, np.pi / 2),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert 0.0 < got <= np.pi / 2
    assert abs(got - best.x) < 1e-4  # SciPy's accuracy at a flat minimum is 1e-8.
    assert missed(got) <= best.fun + ROUNDING[precision]


def test_line_search_never_lowers_the_captured_energy():
    """Holds for many bases and gradients, small and large."""

    def gain(basis, gradient, scale):
        before = grassmann.captured_energy(basis, gradient)
        _, u, v = grassmann.leading_triple(grassmann.tangent(basis, gradient), basis)
        angle = grassmann.line_search(basis, scale * gradient, u, v)
        turned = grassmann.geodesic(basis, u, v, angle)
        return grassmann.captured_energy(turned, gradient) - before

    problems = [_problem(6, 10, 3, "float32", seed) for seed in range(200)]
    bases, gradients = (jnp.stack(x) for x in zip(*problems, strict=True))
    scales = jnp.asarray(2.0 ** np.linspace(-12, 12, 200), jnp.float32)
    gains = jax.jit(jax.vmap(gain))(bases, gradients, scales)
    assert np.min(gains) > -1e-6 and np.median(gains) > 0.01


@pytest.mark.parametrize(
    "angles", [[0.0] * 3, [1e-5] * 3, [0.4, 0.3, 0.0], [np.pi / 2, 1.0, 0.1], [4, 3, 2]]
)
def test_exponential_map(angles, precision):
    basis, tangent = _with_singular_values(12, 3, angles, precision)
    got = grassmann.exponential_map(basis, tangent)
    want = oracle.exponential_map(*_f64(basis, tangent))
    np.testing.assert_allclose(got, want, atol=4 * ROUNDING[precision])
    assert common.orthonormality_error(got) < 8 * ROUNDING[precision]
    if max(angles) <= np.pi / 2:
        moved = grassmann.principal_angles(basis, got)
        np.testing.assert_allclose(moved, angles, atol=4 * ROUNDING[precision])


@pytest.mark.parametrize("m, n, rank", [*SHAPES, (60, 90, 12), (200, 260, 60)])
@pytest.mark.parametrize("decay", [0.0, 0.1, 1.0])
def test_range_finder_captures_what_the_svd_captures(m, n, rank, decay):
    """At least 99 % of it, with equal singular values or ones that decay as `i^-decay`.

    Both are unlike a gradient of rank `rank`, which is easier (next test).
    """
    rng = np.random.default_rng(0)
    u, v = (scipy.linalg.orth(rng.normal(size=(k, min(m, n)))) for k in (m, n))
    gradient = (u * np.arange(1.0, min(m, n) + 1) ** -decay) @ v.T
    got = grassmann.range_finder(
        jax.random.key(1), jnp.asarray(gradient, jnp.float32), rank
    )
    assert got.shape == (m, rank) and got.dtype == jnp.float32
    assert common.orthonormality_error(got) < 4 * ROUNDING["float32"]
    best = oracle.captured_energy(oracle.svd_basis(gradient, rank), gradient)
    assert oracle.captured_energy(_f64(got), gradient) >= 0.99 * best


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_range_finder_finds_a_low_rank_gradient(scale):
    """Captures all energy at any scale."""
    rng = np.random.default_rng(0)
    gradient = rng.normal(size=(12, 3)) @ rng.normal(size=(3, 20))
    got = grassmann.range_finder(
        jax.random.key(0), jnp.asarray(scale * gradient, jnp.float32), 3
    )
    assert _angles(got, oracle.svd_basis(gradient, 3)).max() < 1e-5


@pytest.mark.parametrize("true_rank", [0, 1])
def test_range_finder_of_too_little(true_rank):
    """A gradient of lower rank, even zero, still gives orthonormal columns."""
    gradient = np.outer(np.arange(1.0, 7.0), np.ones(10)) * true_rank
    got = grassmann.range_finder(
        jax.random.key(0), jnp.asarray(gradient, jnp.float32), 4
    )
    assert common.orthonormality_error(got) < 4 * ROUNDING["float32"]
    if true_rank:
        assert oracle.captured_energy(_f64(got), gradient) > 1 - 1e-6


def test_random_basis(precision):
    """Orthonormal, of the given dtype, and uniform: the mean of S S^T is r/m I."""
    draw = functools.partial(grassmann.random_basis, m=6, rank=2, dtype=precision)
    bases = jax.vmap(draw)(jax.random.split(jax.random.key(0), 4000))
    assert bases.shape == (4000, 6, 2) and bases.dtype == precision
    assert common.orthonormality_error(bases) < 2 * ROUNDING[precision]
    mean = np.einsum("kir,kjr->ij", *_f64(bases, bases)) / len(bases)
    np.testing.assert_allclose(mean, np.eye(6) / 3, atol=0.025)  # 5 sigma


def test_orthonormalize(precision):
    """Newton-Schulz step: squares the error and keeps the span."""
    basis, _ = _problem(12, 9, 4, "float64" if precision == "float64" else "float32")
    rng = np.random.default_rng(1)
    mixing = jnp.asarray(np.eye(4) + 1e-3 * rng.normal(size=(4, 4)), precision)
    drifted = basis @ mixing
    before = common.orthonormality_error(drifted)
    got = grassmann.orthonormalize(drifted)
    assert before > 1e-3
    assert common.orthonormality_error(got) < 4 * before**2
    assert _angles(got, drifted).max() < 4 * ROUNDING[precision]


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
def test_align_is_the_procrustes_rotation(spread, precision):
    rng = np.random.default_rng(0)
    basis = scipy.linalg.orth(rng.normal(size=(9, 4)))
    noise = spread * rng.normal(size=(9, 4))
    turned = basis @ scipy.stats.ortho_group.rvs(4, random_state=1)
    other = scipy.linalg.orth(turned + noise)
    got = grassmann.align(*(jnp.asarray(x, precision) for x in (basis, other)))
    want = basis @ scipy.linalg.orthogonal_procrustes(basis, other)[0]
    np.testing.assert_allclose(got, want, atol=20 * ROUNDING[precision])
    assert got.dtype == precision


def test_align_with_an_orthogonal_span_stays_orthonormal(precision):
    frame = jnp.eye(8, dtype=precision)
    got = grassmann.align(frame[:, :3], frame[:, 2:5])
    assert common.orthonormality_error(got) < 4 * ROUNDING[precision]
    np.testing.assert_allclose(np.abs(got[2]), [1, 0, 0], atol=4 * ROUNDING[precision])


@pytest.mark.parametrize("angle", [0.0, 1e-4, 0.7, np.pi / 2 - 1e-4, np.pi / 2])
def test_principal_angles(angle, precision):
    """Small and nearly right angles are equally accurate; the largest is first."""
    basis, tangent = _with_singular_values(12, 3, [angle, angle / 2, 0.0], precision)
    other = jnp.asarray(oracle.exponential_map(*_f64(basis, tangent)), precision)
    got = grassmann.principal_angles(basis, other)
    np.testing.assert_allclose(got, [angle, angle / 2, 0], atol=ROUNDING[precision])


@pytest.mark.parametrize("m, n, rank", SHAPES)
def test_captured_energy(m, n, rank, precision):
    basis, gradient = _problem(m, n, rank, precision)
    got = grassmann.captured_energy(basis, gradient)
    want = oracle.captured_energy(*_f64(basis, gradient))
    np.testing.assert_allclose(got, want, rtol=4 * ROUNDING[precision])
    zero = grassmann.captured_energy(basis, jnp.zeros_like(gradient))
    assert 0.0 <= zero <= 1.0  # not 0 / 0


def test_stacked_matrices_are_decomposed_one_by_one():
    """Batched QRs of several leaves deadlock on CPUs with few threads."""
    finder = jax.vmap(lambda g: grassmann.range_finder(jax.random.key(0), g, 2))
    jaxpr = str(jax.make_jaxpr(finder)(jnp.zeros((3, 6, 10))))
    decompositions = [line for line in jaxpr.splitlines() if "= qr[" in line]
    assert decompositions
    for line in decompositions:
        shapes = re.findall(r"f32\[([\d,]+)\]", line)
        assert [shape.count(",") for shape in shapes] == [1, 1]
