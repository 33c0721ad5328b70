"""Which leaves get a low-rank state, and how each is seen as a matrix.

`LowRank` is the one place that decides orientation, rank and batch axes. It
turns every chosen leaf into a `MatrixView`: a static description through which
the stages project, lift and scale without caring how the leaf is stored.
"""

import dataclasses
import math
import numbers
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

_SPECS = (optax.contrib.MuonDimensionNumbers, optax.contrib.GaLoreDimensionNumbers)


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """A leaf seen as (batch..., rows, columns), with a basis on one side.

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
        return basis.mT @ self.wide(leaf).astype(basis.dtype)

    def lift(self, basis: jax.Array, coordinates: jax.Array) -> jax.Array:
        """The leaf whose wide form is S A."""
        if self.basis_on_rows:
            return self.leaf(basis @ coordinates)
        return self.leaf(coordinates.mT @ basis.mT)

    def scale_columns(self, leaf: jax.Array, factors: jax.Array) -> jax.Array:
        """The leaf whose wide form is G diag(factors); factors (batch..., n)."""
        along_rows = self.basis_on_rows
        factors = factors[..., None, :] if along_rows else factors[..., :, None]
        return self.leaf(self.matrix(leaf) * factors)

    def column_energy(self, leaf: jax.Array) -> jax.Array:
        """Squared norms of the n columns of the wide form, (batch..., n)."""
        matrix = self.matrix(leaf)
        return jnp.sum(matrix * matrix, axis=-2 if self.basis_on_rows else -1)

    def vmap(self, function: Callable, in_axes: tuple[int | None, ...]) -> Callable:
        """Maps a function of one matrix over the batch axes."""
        for _ in self.batch_axes:
            function = jax.vmap(function, in_axes)
        return function


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Chooses the leaves with a low-rank state, their axes, side and rank.

    Attributes:
      rank: columns of each basis: an int, or a float in (0, 1] as a fraction of
        the smaller side. A leaf whose smaller side is not larger than the rank
        has nothing to save and gets the plain rule.
      dimension_numbers: which axes form the matrix, in optax's own form. None
        takes every leaf of two axes as (reduction, output), (in, out) in a Flax
        kernel. Otherwise one `optax.contrib.MuonDimensionNumbers` (or
        `GaLoreDimensionNumbers`) for every leaf it fits, a tree of them with
        None for "leave alone" (prefixes of the parameters' tree are enough), or
        a function from parameters to such a tree (see `by_path`). It is called
        on gradients too, so it should look at paths and shapes only. Axes named
        by neither list are batch axes: scanned layers, experts.
      side: "short" puts the basis on the smaller dimension (the papers' choice,
        ties take the rows), "long" on the larger one, which stores less when
        the rank is small: long * r + 2 * short * r numbers instead of
        short * r + 2 * long * r.

    Raises:
      ValueError: if the rank or the side is not one of the above.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.zeros((3, 64, 256)), "bias": jnp.zeros(256)}
      >>> axes = by_path("kernel")
      >>> table = LowRank(rank=16, dimension_numbers=axes).describe(params)
      leaf    shape         matrix        basis on  rank     state     Adam
      bias    (256,)        -             -         plain    2,048    2,048
      kernel  (3, 64, 256)  3 x 64 x 256  rows      16     110,592  393,216
      total                                                112,640  395,264
    """

    rank: int | float = 128
    dimension_numbers: Any = None
    side: Literal["short", "long"] = "short"

    def __post_init__(self):
        rank = self.rank
        whole = isinstance(rank, numbers.Integral) and not isinstance(rank, bool)
        fraction = isinstance(rank, float)
        if not ((whole and rank >= 1) or (fraction and 0 < rank <= 1)):
            raise ValueError(
                f"rank={rank!r}: use an int of at least 1, or a float in (0, 1]"
                " for a fraction of the smaller side. It decides shapes: under"
                " optax.inject_hyperparams name it in static_args."
            )
        if isinstance(self.dimension_numbers, (int, float, str)):
            raise ValueError(
                f"dimension_numbers={self.dimension_numbers!r}: use None, one"
                " optax.contrib.MuonDimensionNumbers, a tree of them or a function."
            )
        if self.side not in ("short", "long"):
            raise ValueError(f"side={self.side!r}: use 'short' or 'long'.")

    def views(self, tree: optax.Params) -> Any:
        """Resolves every leaf.

        Args:
          tree: parameters, gradients or `jax.ShapeDtypeStruct`s.

        Returns:
          The same tree with a `MatrixView` at every low-rank leaf and None at
          every other one, in place of the box (`is_box`) of those that have one.

        Raises:
          ValueError: if nothing matches, or dimension numbers do not fit a leaf.
            A tree of vectors and scalars alone needs no match when
            `dimension_numbers` is None.
        """
        if not jax.tree.leaves(tree):  # optax.tree.map_params asks with such trees
            return tree
        specs = self._specs(tree)
        if all(spec is None for spec in specs):
            self._check_intended(tree)
        named_leaves, structure = jax.tree.flatten_with_path(tree, is_leaf=is_box)
        views = [
            None
            if spec is None
            else self._view(path_name(path), content(leaf).shape, spec)
            for (path, leaf), spec in zip(named_leaves, specs, strict=True)
        ]
        return jax.tree.unflatten(structure, views)

    def describe(self, params: optax.Params) -> str:
        """Prints, and returns, what each leaf would store.

        One line a leaf: its shape, the matrix it is seen as, the side of the
        basis, the rank, and the bytes of basis and moments beside those of
        Adam's moments, both in the default dtype (the parameter's, float32 at
        least). Leaves that get the plain rule, because nothing chose them or
        because the rank is not below their smaller side, say so.

        Args:
          params: arrays or `jax.ShapeDtypeStruct`s.

        Returns:
          The printed table.
        """
        header = ("leaf", "shape", "matrix", "basis on", "rank", "state", "Adam")
        lines, total, total_adam = [header], 0, 0
        views = jax.tree.leaves(self.views(params), is_leaf=lambda x: x is None)
        for (path, leaf), spec, view in zip(
            _named_leaves(params), self._specs(params), views, strict=True
        ):
            itemsize = state_dtype(leaf.dtype).itemsize
            adam = state = 2 * math.prod(leaf.shape) * itemsize
            seen = ("-", "-", "plain" if spec is None else "plain (rank too large)")
            if view is not None:
                state = math.prod(view.basis_shape)
                state = (state + 2 * math.prod(view.coordinates_shape)) * itemsize
                side = "rows" if view.basis_on_rows else "columns"
                matrix = (*view.batch_shape, view.rows, view.columns)
                seen = (" x ".join(map(str, matrix)), side, str(view.rank))
            name = path_name(path)
            lines.append((name, str(leaf.shape), *seen, f"{state:,}", f"{adam:,}"))
            total, total_adam = total + state, total_adam + adam
        lines.append(("total", "", "", "", "", f"{total:,}", f"{total_adam:,}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = "\n".join(
            "  ".join(
                cell.rjust(width) if k > 4 else cell.ljust(width)
                for k, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )
        print(table)
        return table

    def _specs(self, tree: Any) -> list[Any]:
        """Dimension numbers or None, one for each leaf, in leaf order."""
        wanted = self.dimension_numbers
        if callable(wanted):
            wanted = wanted(tree)
        leaves = jax.tree.leaves(tree)
        if wanted is None:
            spec = optax.contrib.MuonDimensionNumbers()
            return [spec if leaf.ndim == 2 else None for leaf in leaves]
        if isinstance(wanted, _SPECS):
            axes = _axes(wanted.reduction_axis) + _axes(wanted.output_axis)
            reach = max((axis + 1 if axis >= 0 else -axis for axis in axes), default=0)
            return [wanted if leaf.ndim >= max(2, reach) else None for leaf in leaves]
        is_spec = lambda x: x is None or isinstance(x, _SPECS)
        try:
            return jax.tree.leaves(
                jax.tree.broadcast(wanted, tree, is_leaf=is_spec), is_leaf=is_spec
            )
        except ValueError as error:
            raise ValueError(
                "dimension_numbers do not have the structure of the parameters:"
                f" {error}"
            ) from error

    def _check_intended(self, tree: Any) -> None:
        leaves = _named_leaves(tree)
        # A tree of vectors and scalars has no matrix that could be forgotten.
        if self.dimension_numbers is None and all(leaf.ndim < 2 for _, leaf in leaves):
            return
        names = ", ".join(f"{path_name(path)} {leaf.shape}" for path, leaf in leaves)
        asked = self.dimension_numbers
        how = "leaves of two axes" if asked is None else f"dimension_numbers={asked}"
        raise ValueError(
            f"No leaf to treat as low-rank: {how} match none of {names}. Name the"
            " axes of stacked kernels with dimension_numbers, for example"
            " subtrack_jax.by_path('kernel')."
        )

    def _view(self, name: str, shape: tuple[int, ...], spec: Any) -> MatrixView | None:
        if not isinstance(spec, _SPECS):
            raise ValueError(
                f"dimension_numbers for {name} is {spec!r}: use None or"
                " optax.contrib.MuonDimensionNumbers."
            )
        row_axes, column_axes = _axes(spec.reduction_axis), _axes(spec.output_axis)
        chosen = row_axes + column_axes
        ndim = len(shape)
        if not all(-ndim <= axis < ndim for axis in chosen):
            raise ValueError(f"{spec} names an axis that {name} {shape} does not have.")
        row_axes = tuple(axis % ndim for axis in row_axes)
        column_axes = tuple(axis % ndim for axis in column_axes)
        chosen = row_axes + column_axes
        if len(set(chosen)) < len(chosen) or not row_axes or not column_axes:
            raise ValueError(
                f"{spec} for {name} {shape}: reduction and output axes must be"
                " disjoint and not empty."
            )
        rows = math.prod(shape[axis] for axis in row_axes)
        columns = math.prod(shape[axis] for axis in column_axes)
        rank = self.rank
        if isinstance(rank, float):
            rank = max(1, round(rank * min(rows, columns)))
        if rank >= min(rows, columns):
            return None
        return MatrixView(
            shape=shape,
            batch_axes=tuple(axis for axis in range(ndim) if axis not in chosen),
            row_axes=row_axes,
            column_axes=column_axes,
            basis_on_rows=rows == columns or (rows < columns) == (self.side == "short"),
            rank=int(rank),
        )


def by_path(
    pattern: str, reduction_axis: Any = -2, output_axis: Any = -1
) -> Callable[[optax.Params], Any]:
    """Dimension numbers for the leaves whose path matches a regular expression.

    Args:
      pattern: searched (`re.search`) in the leaf's path, its keys joined by "/".
      reduction_axis: axis or axes of the matrix' rows, inputs in a Flax kernel.
      output_axis: axis or axes of its columns.

    Returns:
      A function from parameters to dimension numbers, for `LowRank`. Leaves of
      fewer than two axes never match.

    Raises:
      ValueError: if the pattern is not a regular expression.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"mlp": {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)}}
      >>> by_path("mlp/")(params)["mlp"]["kernel"]
      MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} does not compile: {error}.") from error
    return _ByPath(
        pattern,
        optax.contrib.MuonDimensionNumbers(reduction_axis, output_axis),
    )


@dataclasses.dataclass(frozen=True)
class _ByPath:
    """A class and not a closure, so that error messages show the pattern."""

    pattern: str
    spec: optax.contrib.MuonDimensionNumbers

    def __call__(self, params: optax.Params) -> Any:
        return jax.tree.map_with_path(
            lambda path, leaf: (
                self.spec
                if content(leaf).ndim >= 2 and re.search(self.pattern, path_name(path))
                else None
            ),
            params,
            is_leaf=is_box,
        )

    def __repr__(self) -> str:
        return f"by_path({self.pattern!r})"


def is_box(node: Any) -> bool:
    """Whether a node of a tree is one array with metadata around it.

    As in Flax: `nnx.Variable` and `nn.Partitioned`, which name the parameter's axes.
    A basis and coordinates have axes of their own, so that their state is kept
    without the box. Told by their methods: Flax is not needed here.
    """
    kind = type(node)
    has_metadata = hasattr(kind, "get_metadata") or hasattr(kind, "replace_boxed")
    return has_metadata and len(jax.tree.leaves(node)) == 1


def content(node: Any) -> Any:
    """The leaf, without its box if it has one."""
    (leaf,) = jax.tree.leaves(node)
    return leaf


def map_leaves(
    low_rank: Callable[[Any, MatrixView], Any],
    plain: Callable[[Any], Any],
    params: optax.Params,
    views: Any,
) -> Any:
    """Maps one function over the low-rank leaves of a tree, another over the rest.

    Args:
      low_rank: from an array, without its box, and its view.
      plain: from a leaf, in its box.
      params: the tree.
      views: of `LowRank.views`.

    Returns:
      The tree of results, which take the place of boxes as well.
    """

    def function(leaf, view):
        return plain(leaf) if view is None else low_rank(content(leaf), view)

    return jax.tree.map(function, params, views, is_leaf=is_box)


def path_name(path: tuple[Any, ...]) -> str:
    """Keys of a path joined by "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def state_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Dtype of bases and moments: the parameter's, float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)


def _named_leaves(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Paths and arrays; metadata around an array does not show in its path."""
    return [
        (path, content(leaf))
        for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_box)
    ]


def _axes(axes: Any) -> tuple[int, ...]:
    return (int(axes),) if isinstance(axes, numbers.Integral) else tuple(axes)
