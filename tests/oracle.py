"""The methods in float64 NumPy, written from the equations alone.

The tests compare the library with this module, so the two share no code. It is
slow and plain on purpose: it forms residuals, m x m spaces and full SVDs, and
loops over batch slices. Symbols: `G` (m x n) is the gradient of one matrix seen
so that the basis `S` (m x r) is on its left, `A = S^T G` its coordinates, `M` and
`V` (r x n) Adam's moments in coordinates, `C = S_new^T S_old` a change of basis.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

Move = Callable[[np.ndarray, np.ndarray], np.ndarray]


# --- Grassmann geometry -----------------------------------------------------


def svd_basis(gradient: np.ndarray, rank: int) -> np.ndarray:
    """The leading left singular vectors: the best basis of this rank."""
    return np.linalg.svd(gradient, full_matrices=False)[0][:, :rank]


def captured_energy(basis: np.ndarray, gradient: np.ndarray) -> float:
    """The fraction of |G|^2 that lies in the span of the basis."""
    return float(np.sum((basis.T @ gradient) ** 2) / np.sum(gradient**2))


def tangent(basis: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """`R A^T`: minus half the Grassmann gradient of `min_A |S A - G|^2`."""
    coordinates = basis.T @ gradient
    return (gradient - basis @ coordinates) @ coordinates.T


def exponential_map(basis: np.ndarray, tangent: np.ndarray) -> np.ndarray:
    """Edelman, Arias & Smith (1998), equation 2.65, for a tangent of any rank."""
    u, angles, wt = np.linalg.svd(tangent, full_matrices=False)
    turned = basis @ wt.T @ np.diag(np.cos(angles)) + u @ np.diag(np.sin(angles))
    return turned @ wt + basis @ (np.eye(wt.shape[1]) - wt.T @ wt)


def _turn_leading_direction(
    basis: np.ndarray, gradient: np.ndarray, angle_of: Callable[..., float]
) -> np.ndarray:
    """Follows the geodesic of the tangent's leading singular triple."""
    u, sigmas, vt = np.linalg.svd(tangent(basis, gradient), full_matrices=False)
    if sigmas[0] == 0.0:
        return basis
    angle = angle_of(sigmas[0], gradient.T @ basis @ vt[0], gradient.T @ u[:, 0])
    return exponential_map(basis, angle * np.outer(u[:, 0], vt[0]))


def fixed_step(step_size: float) -> Move:
    """Tracks by the angle `2 sigma eta`."""
    return lambda basis, gradient: _turn_leading_direction(
        basis, gradient, lambda sigma, a, b: 2.0 * sigma * step_size
    )


def line_search(damping: float = 1.0) -> Move:
    """Tracks by `damping` times the angle that captures the most energy."""

    def best_angle(sigma, a, b):
        del sigma  # equals a @ b; recomputed here
        return 0.5 * damping * math.atan2(2.0 * (a @ b), a @ a - b @ b)

    return lambda basis, gradient: _turn_leading_direction(basis, gradient, best_angle)


# --- Leaves as matrices -----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """View of a leaf as `(slices, m, n)` with the basis on the left."""

    reduction: tuple[int, ...] = (0,)
    output: tuple[int, ...] = (1,)
    side: str = "short"

    def _axes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        rows = tuple(axis % len(shape) for axis in self.reduction)
        columns = tuple(axis % len(shape) for axis in self.output)
        batch = tuple(i for i in range(len(shape)) if i not in rows + columns)
        m = math.prod(shape[i] for i in rows)
        n = math.prod(shape[i] for i in columns)
        if (n < m) if self.side == "short" else (n > m):
            rows, columns = columns, rows  # a square matrix keeps the rows
        return batch, rows, columns

    def batch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shape[i] for i in self._axes(shape)[0])

    def to_matrices(self, leaf: np.ndarray) -> np.ndarray:
        batch, rows, columns = self._axes(leaf.shape)
        size = [math.prod(leaf.shape[i] for i in axes) for axes in (rows, columns)]
        return leaf.transpose(batch + rows + columns).reshape(-1, *size)

    def from_matrices(self, matrices: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        order = sum(self._axes(shape), ())
        moved = matrices.reshape([shape[i] for i in order])
        return moved.transpose(np.argsort(order))


# --- One matrix, one step ---------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Method:
    """Settings in which the methods differ, and their common hyper-parameters.

    `move` is the tracked refresh, or None where the bases are given from outside
    (random ones, or an SVD's with its arbitrary signs). `rho` makes it LDAdam's power
    iteration, `projection_rate` Online Subspace Descent's learned projection. `per`
    has the gradient itself scaled, by "columns" or as a "matrix" (APOLLO).
    """

    move: Move | None = None
    rho: float | None = None
    projection_rate: float | None = None
    error_feedback: bool = False
    per: str | None = None
    orthogonalize: bool = False
    transport: bool | str = True
    recovery: bool = True
    update_interval: int = 200
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    scale: float = 0.25
    recovery_scale: float = 1.0
    growth_limit: float | None = 1.01
    removed: float = 1.0  # factor of the part inside the subspace, before the recovery


class Adam:
    """Adam's direction with optax's conventions, on an array of any shape."""

    def __init__(self, method: Method):
        self.method, self.steps, self.mu, self.nu = method, 0, 0.0, 0.0

    def corrected_moments(self) -> tuple[np.ndarray, np.ndarray]:
        b1, b2 = self.method.b1, self.method.b2
        return self.mu / (1 - b1**self.steps), self.nu / (1 - b2**self.steps)

    def change_basis(self, rotation: np.ndarray) -> None:
        """Rotates the moments: LDAdam's estimate of both, GoLore's of the first."""
        if self.method.transport == "momentum":
            self.mu = rotation @ self.mu
            return
        m, v = self.corrected_moments()
        variance = rotation**2 @ (v - m**2) + (rotation @ m) ** 2
        self.mu = rotation @ self.mu
        self.nu = (1 - self.method.b2**self.steps) * np.abs(variance)

    def direction(self, gradient: np.ndarray) -> np.ndarray:
        b1, b2 = self.method.b1, self.method.b2
        self.mu = b1 * self.mu + (1 - b1) * gradient
        self.nu = b2 * self.nu + (1 - b2) * gradient**2
        self.steps += 1
        m, v = self.corrected_moments()
        return m / (np.sqrt(v) + self.method.eps)


def _newton_schulz(direction: np.ndarray) -> np.ndarray:
    """Muon's five steps as a polynomial of the singular values, on Adam's scale."""
    u, sigma, vt = np.linalg.svd(direction, full_matrices=False)
    sigma = sigma / (np.linalg.norm(sigma) or 1)
    for _ in range(5):
        sigma = 3.4445 * sigma - 4.775 * sigma**3 + 2.0315 * sigma**5
    return direction.shape[1] ** 0.5 * (u * sigma) @ vt


class LowRankMatrix:
    """One matrix under one method; call `direction` once per step."""

    def __init__(self, method: Method):
        self.method, self.adam = method, Adam(method)
        self.basis, self.limited_norm, self.error = None, None, 0.0
        rate = dict(b1=0.9, b2=0.999, eps=1e-8)
        self.projection_adam = Adam(dataclasses.replace(method, **rate))

    def direction(self, gradient: np.ndarray, given_basis: np.ndarray) -> np.ndarray:
        gradient = gradient + self.error
        before, mean = self.basis, self.adam.mu
        self._refresh(gradient, given_basis)
        coordinates = self.basis.T @ gradient
        if self.method.error_feedback:
            self.error = gradient - self.basis @ coordinates
            if before is not None:
                lost = before @ mean - self.basis @ self.basis.T @ before @ mean
                self.error += self.method.b1 / (1 - self.method.b1) * lost
        inner = self.adam.direction(coordinates)
        if self.method.orthogonalize:
            inner = _newton_schulz(inner)
        if self.method.per is not None:
            axis = 0 if self.method.per == "columns" else None
            scaled = gradient * _ratio(inner, coordinates, axis)
            return math.sqrt(self.method.scale) * self._limited(scaled)
        direction = self.method.scale * self.basis @ inner
        if self.method.recovery:
            residual = gradient - self.method.removed * self.basis @ coordinates
            direction = direction + self.method.recovery_scale * self._limited(
                residual * _ratio(inner, coordinates, axis=0)
            )
        return direction

    def _refresh(self, gradient: np.ndarray, given_basis: np.ndarray) -> None:
        """Sets this step's basis: first the given one, later that of `move` if any."""
        step, before = self.adam.steps, self.basis
        if step == 0:
            self.basis = given_basis
        elif step % self.method.update_interval == 0:
            move = self.method.move
            if self.method.rho is not None:
                move = self._power_iteration
            elif self.method.projection_rate is not None:
                move = self._descend
            self.basis = given_basis if move is None else move(before, gradient)
            if self.method.transport:
                self.adam.change_basis(self.basis.T @ before)

    def _power_iteration(self, basis: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """LDAdam's B B^T S with B = rho S m^ + (1 - rho) G, orthonormalised."""
        rho, (mean, _) = self.method.rho, self.adam.corrected_moments()
        mixed = rho * basis @ mean + (1 - rho) * gradient
        return np.linalg.qr(mixed @ mixed.T @ basis)[0]

    def _descend(self, basis: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """Online Subspace Descent: an Adam step on |P P^T g - g|^2 with g = G / |G|."""
        outer = gradient @ gradient.T / np.sum(gradient**2)
        missed = basis @ basis.T - np.eye(len(basis))
        slope = 2 * (outer @ missed + missed @ outer) @ basis
        step = self.projection_adam.direction(slope)
        return basis - self.method.projection_rate * step

    def _limited(self, recovered: np.ndarray) -> np.ndarray:
        """Limits |L| to `growth_limit` times the limited |L| of the last step."""
        norm, limit = np.linalg.norm(recovered), self.method.growth_limit
        if limit is not None and self.limited_norm and norm > 0.0:
            recovered = recovered * min(1.0, limit * self.limited_norm / norm)
        self.limited_norm = np.linalg.norm(recovered)
        return recovered


def _ratio(
    numerator: np.ndarray, denominator: np.ndarray, axis: int | None
) -> np.ndarray:
    """Fira's phi, `|N_:j| / |A_:j|` or 0 for a zero divisor; or one for the matrix."""
    top, bottom = (np.linalg.norm(x, axis=axis) for x in (numerator, denominator))
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0.0)


# --- A leaf over a whole run ------------------------------------------------


def adam_directions(gradients: np.ndarray, method: Method) -> np.ndarray:
    """Plain Adam's directions of a leaf that is not low-rank."""
    adam = Adam(method)
    return np.stack([adam.direction(g) for g in gradients.astype(np.float64)])


def low_rank_directions(
    gradients: np.ndarray, bases: np.ndarray, method: Method, view: MatrixView
) -> tuple[np.ndarray, np.ndarray]:
    """Runs every slice of a leaf separately.

    Args:
      gradients: The leaf's gradients, `(steps, *shape)`.
      bases: `(steps, ..., m, r)`, only the first of which is read if the method
        tracks its basis by itself.
      method: The method and its hyper-parameters.
      view: How the leaf is a stack of matrices.

    Returns:
      The directions `(steps, *shape)`, before weight decay and learning rate, and
      the bases used, `(steps, slices, m, r)`.
    """
    gradients, bases = gradients.astype(np.float64), bases.astype(np.float64)
    bases = bases.reshape(len(bases), -1, *bases.shape[-2:])
    slices = [LowRankMatrix(method) for _ in range(bases.shape[1])]
    directions, used = [], []
    for gradient, given in zip(gradients, bases, strict=True):
        matrices = zip(slices, view.to_matrices(gradient), given, strict=True)
        stack = np.stack([one.direction(g, s) for one, g, s in matrices])
        directions.append(view.from_matrices(stack, gradient.shape))
        used.append(np.stack([one.basis for one in slices]))
    return np.stack(directions), np.stack(used)
