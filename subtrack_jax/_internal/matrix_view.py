"""Matrix view: a leaf of any shape as a stack of matrices with a basis."""

import dataclasses
import math
from typing import Self

import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier as barrier


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """View of a leaf as (batch..., rows, columns), with a basis on one side.

    In the mathematics every matrix is G of shape (m, n) with its basis on the
    left; `m` and `n` below are those. When the basis belongs to the columns of
    the stored matrix, products contract over the other axis instead of moving
    data: a transposed operand of a product costs nothing, a transposed result
    would.

    Attributes:
      shape: shape of the leaf.
      batch_axes: axes over which matrices are independent.
      row_axes: axes merged into the rows (the reduction, or input, axes).
      column_axes: axes merged into the columns (the output axes).
      basis_on_rows: whether the basis spans the rows or the columns.
      rank: columns of the basis, r < min(m, n).
    """

    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]
    row_axes: tuple[int, ...]
    column_axes: tuple[int, ...]
    basis_on_rows: bool
    rank: int

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.shape[axis] for axis in self.batch_axes)

    @property
    def rows(self) -> int:
        """Rows of the stored matrix."""
        return math.prod(self.shape[axis] for axis in self.row_axes)

    @property
    def columns(self) -> int:
        """Columns of the stored matrix."""
        return math.prod(self.shape[axis] for axis in self.column_axes)

    @property
    def basis_shape(self) -> tuple[int, ...]:
        """(batch..., m, r)."""
        m = self.rows if self.basis_on_rows else self.columns
        return (*self.batch_shape, m, self.rank)

    @property
    def coordinates_shape(self) -> tuple[int, ...]:
        """(batch..., r, n)."""
        n = self.columns if self.basis_on_rows else self.rows
        return (*self.batch_shape, self.rank, n)

    @property
    def coordinates_size(self) -> int:
        """Number of coordinates of all matrices."""
        return math.prod(self.coordinates_shape)

    @property
    def _order(self) -> tuple[int, ...]:
        return self.batch_axes + self.row_axes + self.column_axes

    def matrix(self, leaf: jax.Array) -> jax.Array:
        """The leaf as (batch..., rows, columns)."""
        return leaf.transpose(self._order).reshape(
            *self.batch_shape, self.rows, self.columns
        )

    def leaf(self, matrix: jax.Array) -> jax.Array:
        """The inverse of `matrix`."""
        axes_shape = tuple(self.shape[axis] for axis in self._order)
        inverse = sorted(range(len(self.shape)), key=self._order.__getitem__)
        return matrix.reshape(axes_shape).transpose(inverse)

    def wide(self, leaf: jax.Array) -> jax.Array:
        """The leaf as (batch..., m, n), for use as an operand of products."""
        matrix = self.matrix(leaf)
        return matrix if self.basis_on_rows else matrix.mT

    def project(self, basis: jax.Array, leaf: jax.Array) -> jax.Array:
        """Coordinates S^T G, of shape (batch..., r, n), in the basis' dtype."""
        # The barriers after this product and before that of `lift` keep the inner
        # rule out of them: TPUs would redo it for every tile.
        matrix = self.matrix(leaf).astype(basis.dtype)
        if self.basis_on_rows:
            return barrier(basis.mT @ matrix)
        if jax.typeof(leaf).sharding.mesh.size > 1:
            return barrier(basis.mT @ matrix.mT)
        # One CPU takes twice as long over that form.
        return jax.lax.platform_dependent(
            basis,
            matrix,
            cpu=lambda s, g: barrier(g @ s).mT,
            default=lambda s, g: barrier(s.mT @ g.mT),
        )

    def lift(self, basis: jax.Array, coordinates: jax.Array) -> jax.Array:
        """The matrix whose wide form is S A."""
        coordinates = barrier(coordinates)
        if self.basis_on_rows:
            return basis @ coordinates
        return coordinates.mT @ basis.mT

    def scale_columns(self, leaf: jax.Array, factors: jax.Array) -> jax.Array:
        """The matrix whose wide form is G diag(factors); factors (batch..., n)."""
        along_rows = self.basis_on_rows
        factors = factors[..., None, :] if along_rows else factors[..., :, None]
        return self.matrix(leaf) * factors

    def column_energy(self, leaf: jax.Array) -> jax.Array:
        """Squared norms of the n columns of the wide form, (batch..., n)."""
        matrix = self.matrix(leaf)
        return jnp.sum(matrix * matrix, axis=-2 if self.basis_on_rows else -1)

    def wide_at(self, leaf: jax.Array, index: jax.Array) -> jax.Array:
        """The wide form of one matrix of a stack, (m, n), by its flat index."""
        view = self
        indices = jnp.unravel_index(index, self.batch_shape)
        for axis, k in list(zip(self.batch_axes, indices, strict=True))[::-1]:
            leaf = jax.lax.dynamic_index_in_dim(leaf, k, axis, keepdims=False)
            view = view.without(axis)
        return view.wide(leaf)

    def without(self, axis: int) -> Self:
        """The view of a slice along a batch axis."""

        def moved(axes):
            return tuple(other - (other > axis) for other in axes if other != axis)

        return dataclasses.replace(
            self,
            shape=(*self.shape[:axis], *self.shape[axis + 1 :]),
            batch_axes=moved(self.batch_axes),
            row_axes=moved(self.row_axes),
            column_axes=moved(self.column_axes),
        )
