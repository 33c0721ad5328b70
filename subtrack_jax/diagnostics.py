"""Diagnostics: fit of subspaces to gradients, and their movement.

Pure functions of gradients and of an optimizer's state, in whatever wrappers it
is, for a look now and then: unlike `monitor_energy`, nothing is kept or paid for
in between. Each answers with a tree like the parameters that has numbers for every
matrix of a low-rank leaf, batch axes in front, and `optax.MaskedNode` in place of
other leaves. They work under `jit`, one matrix after another, and on sharded
arrays, those of several processes under `jit` only.

`gradients` are those that the low-rank transformation was given: behind clipping,
where there is any. `low_rank` is the one that its stages have; for `subtrack` and
its siblings `LowRank(rank, dimension_numbers, side)`.

What the papers draw of it: the energy that falls as training goes on and as layers
lie deeper, and the flatness of the error (GrassWalk, arXiv 2510.01878, section 3).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from subtrack_jax import grassmann
from subtrack_jax._internal.boxes import unboxed
from subtrack_jax._internal.matrix_loops import map_stack
from subtrack_jax._internal.mesh import report
from subtrack_jax._internal.named_leaves import path_name
from subtrack_jax._internal.orthonormal import singular_values
from subtrack_jax._internal.products import power_of_two, unit_scale
from subtrack_jax._internal.trees import field_of, is_masked, state_dtype
from subtrack_jax.low_rank import LowRank

__all__ = [
    "captured_energy",
    "error_slopes",
    "grassmann_distance",
    "principal_angles",
    "recovery_ratio",
]


def captured_energy(
    low_rank: LowRank, gradients: optax.Updates, opt_state: optax.OptState
) -> Any:
    """Fraction of each gradient's squared norm that lies in its subspace.

    Args:
      low_rank: which leaves have a basis, and where.
      gradients: gradients of any dtype, not necessarily those behind the bases.
      opt_state: state of one low-rank optimizer, in any wrapper.

    Returns:
      |S^T G|_F^2 / |G|_F^2 for each matrix, of shape (...), in [0, 1] up to
      rounding; 1 for a zero gradient, of which nothing is lost.

    Raises:
      ValueError: if the state holds no bases, or those of several optimizers, or of
        another `LowRank` or other gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> import subtrack_jax as stj
      >>> optimizer = stj.subtrack(1e-3, rank=1)
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
      >>> _, state = optimizer.update(params, optimizer.init(params), params)
      >>> captured = captured_energy(stj.LowRank(rank=1), params, state)
      >>> round(float(captured["kernel"]), 4)
      0.9
    """

    def energy(gradient, basis):
        return grassmann.captured_energy(basis, gradient)

    return _map_matrices(energy, low_rank, gradients, opt_state)


def recovery_ratio(
    low_rank: LowRank, gradients: optax.Updates, opt_state: optax.OptState
) -> Any:
    """|Lambda| / |G|: relative norm of the part recovered from outside each subspace.

    Lambda is the rescaled and limited residual of SubTrack++ (arXiv 2502.01586,
    equations 10 to 12) in the last step, before `recovery_scale`: its norm is what
    the growth limiter keeps.

    Args:
      low_rank: which leaves have a basis, and where.
      gradients: gradients of the step that returned `opt_state`.
      opt_state: state of an optimizer that recovers and limits the growth.

    Returns:
      The ratio for each matrix, of shape (...), 0 or above; 0 for a zero gradient.

    Raises:
      ValueError: if the state holds no `recovery_norm`, and as `captured_energy`.

    Example:
      >>> import jax.numpy as jnp
      >>> import subtrack_jax as stj
      >>> optimizer = stj.subtrack(1e-3, rank=1)
      >>> params = {"kernel": jnp.array([[2.0, 2.0], [1.0, -1.0]])}
      >>> _, state = optimizer.update(params, optimizer.init(params), params)
      >>> ratio = recovery_ratio(stj.LowRank(rank=1), params, state)
      >>> round(float(ratio["kernel"]), 4)  # A = (2, 2), N = (1, 1), R = (1, -1)
      0.2236
    """

    def ratio(gradient, basis, recovered):
        del basis
        scale = power_of_two(gradient)
        norm = jnp.linalg.norm(gradient / scale)
        is_zero = norm == 0
        return jnp.where(is_zero, 0, recovered / scale / jnp.where(is_zero, 1, norm))

    norms = field_of(opt_state, "recovery_norm")
    return _map_matrices(ratio, low_rank, gradients, opt_state, norms)


def error_slopes(
    low_rank: LowRank, gradients: optax.Updates, opt_state: optax.OptState
) -> Any:
    """Slopes of each subspace's error along its steepest rotations.

    Singular values of the Grassmann gradient -2 R A^T of the error |G - S A|_F^2
    (SubTrack++, arXiv 2502.01586, section 3), divided by |G|_F^2: the share of the
    gradient's energy gained per radian, for one rank-one geodesic each. GrassWalk
    (arXiv 2510.01878, section 3) calls the error flat where all are near zero.

    Args:
      low_rank: which leaves have a basis, and where.
      gradients: gradients of any dtype, not necessarily those behind the bases.
      opt_state: state of one low-rank optimizer, in any wrapper.

    Returns:
      Slopes per radian for each matrix, of shape (..., r), the largest first and at
      most 1; zeros for a zero gradient.

    Raises:
      ValueError: as `captured_energy`.

    Example:
      >>> import jax.numpy as jnp
      >>> import subtrack_jax as stj
      >>> optimizer = stj.subtrack(1e-3, rank=1)
      >>> params = {"kernel": jnp.eye(2)}
      >>> state = optimizer.init(params)  # spans the first row
      >>> turned = {"kernel": jnp.array([[1.0, 0.0], [1.0, 0.0]])}
      >>> float(error_slopes(stj.LowRank(rank=1), turned, state)["kernel"][0])
      1.0
    """

    def slopes(gradient, basis):
        gradient = unit_scale(gradient)
        tangent = grassmann.tangent(basis, gradient)
        total = jnp.sum(gradient * gradient)
        return 2 * singular_values(tangent) / jnp.where(total > 0, total, 1)

    return _map_matrices(slopes, low_rank, gradients, opt_state)


def principal_angles(
    opt_state: optax.OptState, previous_opt_state: optax.OptState
) -> Any:
    """Angles between the subspaces of two states, the largest first.

    Those of Björck & Golub 1973, from sines and cosines, so that small and large
    ones are equally accurate; see `grassmann.principal_angles`.

    Args:
      opt_state: state of one low-rank optimizer, in any wrapper.
      previous_opt_state: another state of it. To keep one beside a step that donates
        its buffers, a `TrackSubspaceState` with a copy of the bases is enough.

    Returns:
      r angles in [0, pi/2], in radians, for each matrix: (..., r).

    Raises:
      ValueError: if a state holds no bases, or those of several optimizers, or the
        two are of different shapes.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import subtrack_jax as stj
      >>> optimizer = stj.subtrack(1e-3, rank=1)
      >>> before = optimizer.init({"kernel": jnp.zeros((2, 3))})
      >>> turned = {"kernel": jnp.array([[0.6], [0.8]])}
      >>> after = optax.tree.set(before, basis=turned)
      >>> round(float(principal_angles(after, before)["kernel"][0]), 4)
      0.9273
    """
    bases, previous = _bases(opt_state), _bases(previous_opt_state)
    if jax.tree.map(jnp.shape, bases) != jax.tree.map(jnp.shape, previous):
        raise ValueError(
            "The two states have bases of different trees or shapes: give two states"
            " of the same optimizer and parameters."
        )

    def angles(basis, other):
        dtype = state_dtype(basis.dtype)
        batch_axes = range(basis.ndim - 2)
        function = grassmann.principal_angles
        for _ in batch_axes:
            function = jax.vmap(function)
        return function(basis.astype(dtype), other.astype(dtype))

    return report(lambda *trees: jax.tree.map(angles, *trees), bases, previous)


def grassmann_distance(
    opt_state: optax.OptState, previous_opt_state: optax.OptState
) -> Any:
    """Length of the geodesics between the subspaces of two states.

    The root of the sum of the squared principal angles (Edelman, Arias & Smith
    1998, section 4.3): a turn by one angle is as long as the angle.

    Args:
      opt_state: state of one low-rank optimizer, in any wrapper.
      previous_opt_state: another state of it, as for `principal_angles`.

    Returns:
      The distance in radians for each matrix, of shape (...), in
      [0, sqrt(r) pi/2].

    Raises:
      ValueError: as `principal_angles`.

    Example:
      >>> import jax.numpy as jnp
      >>> import subtrack_jax as stj
      >>> optimizer = stj.grass_walk(1e-3, rank=1, update_interval=1, angle=0.3)
      >>> grads = {"kernel": jnp.eye(4, 6)}
      >>> _, before = optimizer.update(grads, optimizer.init(grads), grads)
      >>> _, after = optimizer.update(grads, before, grads)
      >>> round(float(grassmann_distance(after, before)["kernel"]), 4)
      0.3
    """
    return jax.tree.map(
        lambda angles: jnp.linalg.norm(angles, axis=-1),
        principal_angles(opt_state, previous_opt_state),
    )


def _bases(opt_state: optax.OptState) -> Any:
    return field_of(opt_state, "basis")


def _map_matrices(
    function: Callable[..., Any],
    low_rank: LowRank,
    gradients: optax.Updates,
    opt_state: optax.OptState,
    *others: Any,
) -> Any:
    """Maps a function over each matrix's (G, S, entries of others) in wide form."""

    def run(gradients, bases, *others):
        # Leaves hidden from the optimizer by a wrapper must be hidden from `LowRank`.
        chosen = jax.tree.map(
            lambda basis, leaf: basis if is_masked(basis) else leaf,
            bases,
            gradients,
            is_leaf=is_masked,
        )

        def measure(path, basis, leaf, view, *stacks):
            if is_masked(basis):
                return basis
            if view is None or view.basis_shape != basis.shape:
                expected = None if view is None else view.basis_shape
                raise ValueError(
                    f"{path_name(path)} has a basis of shape {basis.shape}, where"
                    f" low_rank expects {expected}: give the optimizer's own LowRank"
                    " and gradients."
                )
            dtype = state_dtype(basis.dtype)

            def of_one(view, leaf, basis, *entries):
                gradient = view.wide(leaf).astype(dtype)
                return function(gradient, basis.astype(dtype), *entries)

            return map_stack(of_one, view, leaf, basis, *stacks)

        return jax.tree.map_with_path(
            measure,
            bases,
            chosen,
            low_rank.views(chosen),
            *others,
            is_leaf=is_masked,
        )

    return report(run, unboxed(gradients), _bases(opt_state), *others)
