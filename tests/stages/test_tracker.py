"""Trackers: first bases and refreshes of one wide matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import subtrack_jax as stj
from tests import common, oracle

pytestmark = pytest.mark.usefixtures("strict_dtypes")

RANK = 3
KEY = 7
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}
SHAPES = [(6, 10), (10, 6), (8, 8)]
STARTS = {
    "randomized": stj.geodesic(init="randomized"),
    "svd": stj.geodesic(init="svd"),
    "galore": stj.svd(),
    "galore_randomized": stj.svd(init="randomized"),
    "walk": stj.random_walk(),
    "walk_svd": stj.random_walk(init="svd"),
}


def _gradient(m, n, dtype, seed=0):
    leaf = common.Leaf((m, n))
    side = common.drifting_gradients(leaf, 2, seed)[1]
    return jnp.asarray(side, dtype)


def _start(m, dtype, seed=0):
    basis = scipy.linalg.orth(np.random.default_rng(seed).normal(size=(m, RANK)))
    return jnp.asarray(basis, dtype)


def _f64(x):
    return np.asarray(x, np.float64)


def _angles(a, b):
    return scipy.linalg.subspace_angles(_f64(a), _f64(b))


def _move(tracker, key, gradient, basis, **context):
    """The new basis and the rotation of a move of one matrix."""
    given = stj.TrackerContext(key, jnp.int32(1))._replace(**context)
    moved = tracker.move(gradient, basis, given)
    return moved.basis, moved.rotation


def _check_rotation(rotation, old, new, tolerance):
    """C = S_new^T S_old, from either form of a tracker's rotation."""
    if rotation is None:
        return
    v, cosine = _f64(rotation.direction), _f64(rotation.cosine)
    got = np.eye(RANK) + (cosine - 1.0) * np.outer(v, v)
    np.testing.assert_allclose(got, _f64(new).T @ _f64(old), atol=tolerance)


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("m, n", SHAPES)
def test_start_is_on_the_leading_directions(name, m, n, precision):
    gradient = _gradient(m, n, precision)
    got = STARTS[name].start(jax.random.key(KEY), gradient, RANK)
    assert got.shape == (m, RANK) and got.dtype == precision
    assert common.orthonormality_error(got) < TOLERANCE[precision]
    best = oracle.svd_basis(_f64(gradient), RANK)
    share = oracle.captured_energy(_f64(got), _f64(gradient))
    share /= oracle.captured_energy(best, _f64(gradient))
    assert share >= 0.99
    if "randomized" not in name and name != "walk":
        assert _angles(got, best).max() < TOLERANCE[precision]


def test_random_jump_starts_and_jumps_anywhere(precision):
    """The new basis depends on neither the gradient nor the old basis."""
    tracker = stj.random_jump()
    start = tracker.start(jax.random.key(0), _gradient(6, 10, precision), RANK)
    jump, rotation = _move(
        tracker, jax.random.key(1), _gradient(6, 10, precision), start
    )
    again, _ = _move(
        tracker,
        jax.random.key(1),
        _gradient(6, 10, precision, seed=1),
        _start(6, precision, seed=1),
    )
    assert rotation is None
    np.testing.assert_array_equal(jump, again)
    assert _angles(start, jump).max() > 0.1
    for basis in (start, jump):
        assert basis.shape == (6, RANK) and basis.dtype == precision
        assert common.orthonormality_error(basis) < TOLERANCE[precision]


@pytest.mark.parametrize(
    "tracker, move",
    [
        (stj.geodesic(), oracle.line_search()),
        (stj.geodesic(damping=0.3), oracle.line_search(0.3)),
        (stj.geodesic(step_size=2e-3), oracle.fixed_step(2e-3)),
        (stj.geodesic(step_size=1.0), oracle.fixed_step(1.0)),
    ],
    ids=["line_search", "damped", "fixed_step", "many_turns"],
)
@pytest.mark.parametrize("m, n", SHAPES)
def test_geodesic(tracker, move, m, n, precision):
    """Rotates one direction by one angle; returns the rotation of the coordinates."""
    basis, gradient = _start(m, precision), _gradient(m, n, precision)
    got, rotation = _move(tracker, jax.random.key(KEY), gradient, basis)
    want = move(_f64(basis), _f64(gradient))
    assert got.dtype == precision
    np.testing.assert_allclose(got, want, atol=TOLERANCE[precision])
    assert rotation is not None  # O(r n) transport: no dense change of basis
    _check_rotation(rotation, basis, got, TOLERANCE[precision])


@pytest.mark.parametrize("m, n", SHAPES)
def test_geodesic_lowers_the_projection_error(m, n):
    """Repeated on one gradient, until the leading directions are found."""
    tracker = stj.geodesic()
    basis, gradient = _start(m, "float32"), _gradient(m, n, "float32")
    missed = []
    for _ in range(40):
        missed.append(1 - oracle.captured_energy(_f64(basis), _f64(gradient)))
        basis, _ = _move(tracker, jax.random.key(KEY), gradient, basis)
    best = oracle.svd_basis(_f64(gradient), RANK)
    optimum = 1 - oracle.captured_energy(best, _f64(gradient))
    assert np.all(np.diff(missed) < 1e-6)
    assert missed[1] < missed[0]
    assert missed[-1] - optimum < 0.02 * (missed[0] - optimum)


def test_geodesic_stays_where_nothing_is_missed(precision):
    """sigma = 0: the gradient is in the span; rounding must not rotate the basis."""
    basis = _start(8, precision)
    inside = basis @ jnp.asarray(
        np.random.default_rng(0).normal(size=(3, 9)), precision
    )
    for gradient in (inside, jnp.zeros_like(inside), jnp.eye(8, 9, dtype=precision)):
        start = jnp.eye(8, RANK, dtype=precision) if gradient[0, 0] == 1 else basis
        for step_size in (None, 0.1):
            tracker = stj.geodesic(step_size=step_size)
            got, rotation = _move(tracker, jax.random.key(KEY), gradient, start)
            np.testing.assert_allclose(got, start, atol=TOLERANCE[precision])
            _check_rotation(rotation, start, got, TOLERANCE[precision])


def test_geodesic_turns_by_a_right_angle():
    """A gradient almost orthogonal to the span: theta near pi/2 either way."""
    basis = jnp.eye(6, 2)
    gradient = jnp.zeros((6, 4)).at[0, 0].set(1e-3).at[5, 0].set(1.0)
    got, rotation = _move(stj.geodesic(), jax.random.key(KEY), gradient, basis)
    assert 1 - oracle.captured_energy(_f64(got), _f64(gradient)) < 1e-10
    assert abs(_angles(got, basis).max() - (np.pi / 2 - 1e-3)) < 1e-6
    sigma = 1e-3
    quarter = stj.geodesic(step_size=float(np.pi / 4 / sigma))
    got, rotation = _move(quarter, jax.random.key(KEY), gradient, basis)
    np.testing.assert_allclose(np.abs(got[:, 0]), jnp.eye(6)[5], atol=1e-6)
    assert abs(rotation.cosine) < 1e-6


@pytest.mark.parametrize("exponent", [-100, -40, -10, 10, 40, 60])
def test_line_search_ignores_the_scale_of_the_gradient(exponent):
    """Bit-equal for powers of two; only the fixed step depends on the scale."""
    basis, gradient = _start(6, "float32"), _gradient(6, 10, "float32")
    scaled = gradient * jnp.float32(2.0**exponent)
    want, _ = _move(stj.geodesic(), jax.random.key(KEY), gradient, basis)
    got, _ = _move(stj.geodesic(), jax.random.key(KEY), scaled, basis)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("m, n", SHAPES)
def test_svd_moves_to_the_best_basis(m, n, precision):
    basis, gradient = _start(m, precision), _gradient(m, n, precision)
    got, _ = _move(stj.svd(), jax.random.key(KEY), gradient, basis)
    best = oracle.svd_basis(_f64(gradient), RANK)
    assert _angles(got, best).max() < TOLERANCE[precision]


@pytest.mark.parametrize("angle", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("m", [6, 40])
def test_random_walk_moves_by_its_angle(angle, m, precision):
    """The largest principal angle, for any gradient; another key, another geodesic."""
    basis = _start(m, precision)
    move = functools.partial(_move, stj.random_walk(angle=angle))
    gradient = _gradient(m, m + 2, precision)
    got, rotation = move(jax.random.key(0), gradient, basis)
    other, _ = move(jax.random.key(1), gradient, basis)
    same, _ = move(jax.random.key(0), 1e6 * gradient, basis)
    np.testing.assert_allclose(_angles(got, basis)[0], angle, rtol=1e-3)
    assert common.orthonormality_error(got) < TOLERANCE[precision]
    assert _angles(got, other).max() > 0.1 * angle
    np.testing.assert_array_equal(got, same)
    _check_rotation(rotation, basis, got, TOLERANCE[precision])


def test_random_walk_in_a_half_space_it_cannot_leave():
    """rank > m / 2: some directions cannot rotate; the others do."""
    basis = jnp.asarray(scipy.linalg.orth(np.random.default_rng(0).normal(size=(4, 3))))
    gradient = jnp.ones((4, 5))
    got, _ = _move(stj.random_walk(angle=0.5), jax.random.key(0), gradient, basis)
    assert common.orthonormality_error(got) < 1e-5
    np.testing.assert_allclose(_angles(got, basis), [0.5, 0.0, 0.0], atol=1e-3)


@pytest.mark.parametrize("name", common.TRACKERS)
def test_of_a_zero_gradient(name):
    """A zero gradient still gives an orthonormal basis."""
    tracker = common.TRACKERS[name]
    gradient = jnp.zeros((6, 10))
    basis = tracker.start(jax.random.key(0), gradient, RANK)
    assert common.orthonormality_error(basis) < 1e-5
    moved, _ = _move(tracker, jax.random.key(1), gradient, basis)
    assert common.orthonormality_error(moved) < 1e-5


@pytest.mark.parametrize(
    "make, value",
    [
        (lambda x: stj.geodesic(step_size=x), -1.0),
        (lambda x: stj.geodesic(damping=x), 0.0),
        (lambda x: stj.geodesic(damping=x), 1.5),
        (lambda x: stj.geodesic(init=x), "qr"),
        (lambda x: stj.svd(init=x), "qr"),
        (lambda x: stj.random_walk(init=x), "qr"),
        (lambda x: stj.random_walk(angle=x), -0.1),
        (lambda x: stj.random_walk(angle=x), 2.0),
    ],
)
def test_bad_arguments_are_quoted(make, value):
    with pytest.raises(ValueError, match=str(value)):
        make(value)


@pytest.mark.parametrize("init", ["svd", "randomized"])
@pytest.mark.parametrize("align", ["sign", "procrustes"])
def test_an_aligned_basis_keeps_the_signs_of_the_one_before(align, init, precision):
    """Aligned and not aligned bases have the same span."""
    gradient = _gradient(6, 10, precision)
    key = jax.random.key(0)
    plain, _ = _move(stj.svd(init), key, gradient, jnp.eye(6, RANK, dtype=precision))
    before = plain * jnp.array([[-1.0, 1.0, -1.0]], precision)
    aligned, rotation = _move(stj.svd(init, align), key, gradient, before)
    np.testing.assert_allclose(aligned, before, atol=TOLERANCE[precision])
    assert rotation is None


def test_an_unknown_alignment_is_refused():
    with pytest.raises(ValueError, match="align='flip': use 'none', 'sign' or"):
        stj.svd(align="flip")


def test_switch_goes_over_when_it_is_due():
    """The second tracker moves the basis from the given step on."""
    gradient, basis = _gradient(6, 10, "float32"), _start(6, "float32")
    first, then = stj.geodesic(), stj.random_jump()
    tracker = stj.switch(first, then, after_steps=4)
    for count, wanted in ((3, first), (4, then), (5, then)):
        key = jax.random.key(count)
        got, rotation = _move(tracker, key, gradient, basis, count=jnp.int32(count))
        np.testing.assert_allclose(
            got, _move(wanted, key, gradient, basis)[0], atol=1e-6
        )
        assert rotation is None  # one kind of rotation for both
    start, alone = (
        t.start(jax.random.key(0), gradient, RANK) for t in (tracker, first)
    )
    np.testing.assert_allclose(start, alone, atol=1e-6)


@pytest.mark.parametrize("learns_first", [True, False])
def test_switch_keeps_the_memory_of_a_tracker_that_does_not_move(learns_first):
    """Each tracker's memory is as if it had been alone, moved or not."""
    gradient, basis = _gradient(6, 10, "float32"), _start(6, "float32")
    learned, jump = stj.online_pca(), stj.random_jump()
    pair = (learned, jump) if learns_first else (jump, learned)
    tracker = stj.switch(*pair, after_steps=2)
    memory, alone = tracker.memory(basis), learned.memory(basis)
    for count in range(4):
        context = stj.TrackerContext(jax.random.key(count), jnp.int32(count))
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
            moved = tracker.move(gradient, basis, context._replace(memory=memory))
            wanted = jump.move(gradient, basis, context)
            if (count < 2) == learns_first:
                wanted = learned.move(gradient, basis, context._replace(memory=alone))
                alone = wanted.memory
        np.testing.assert_allclose(moved.basis, wanted.basis, atol=1e-6)
        for new, old in zip(moved.memory[0 if learns_first else 1], alone, strict=True):
            np.testing.assert_allclose(new, old, atol=1e-6)
        basis, memory = moved.basis, moved.memory


def test_switch_of_trackers_with_memory_and_momentum_in_a_chain():
    """LDAdam's iteration for three steps, then a projection that is learned."""
    low_rank = stj.LowRank(2)
    gradients = jnp.asarray(
        common.drifting_gradients(common.Leaf((6, 10)), 6), jnp.float32
    )

    def bases(tracker):
        stages = optax.chain(
            stj.track_subspace(low_rank, tracker, update_interval=1),
            stj.project(low_rank),
            stj.scale_by_projection_aware_adam(low_rank),
        )
        optimizer = optax.chain(
            stj.feed_back(low_rank, stages), stj.recover_and_scale(low_rank)
        )
        return common.run(optimizer, jnp.zeros((6, 10)), gradients).bases

    with jax.numpy_dtype_promotion("standard"):  # optax's own stages need it
        both = bases(stj.switch(stj.power_iteration(), stj.online_pca(), 3))
        first = bases(stj.power_iteration())
    np.testing.assert_allclose(both[:3], first[:3], atol=1e-6)
    # Adam's first step has the size of its rate in every entry.
    np.testing.assert_allclose(np.abs(both[3] - both[2]), 5e-3, rtol=1e-3)


def test_golore_jumps_where_galore_would_not():
    """Refreshes at steps 2 to 4 are equal, from step 6 on golore's are random."""
    leaf = common.Leaf((6, 10))
    gradients = jnp.asarray(common.drifting_gradients(leaf, 8), jnp.float32)
    makers = functools.partial(stj.golore, random_after_steps=5), stj.galore
    with jax.numpy_dtype_promotion("standard"):  # optax's own stages need it
        golore, galore = (
            common.run(
                make(1e-2, rank=2, update_interval=2), jnp.zeros((6, 10)), gradients
            )
            for make in makers
        )
    np.testing.assert_allclose(golore.bases[:6], galore.bases[:6], atol=1e-5)
    key = jax.random.fold_in(jax.random.key(0), 6)
    jump = stj.grassmann.random_basis(key, 6, 2)
    np.testing.assert_allclose(golore.bases[6], jump, atol=1e-6)
