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
import optax

from subtrack_jax.leaves import content, is_box, named_leaves, path_name, state_dtype
from subtrack_jax.matrix_view import MatrixView

_SPECS = (optax.contrib.MuonDimensionNumbers, optax.contrib.GaLoreDimensionNumbers)


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
            named_leaves(params), self._specs(params), views, strict=True
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
        leaves = named_leaves(tree)
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


def _axes(axes: Any) -> tuple[int, ...]:
    return (int(axes),) if isinstance(axes, numbers.Integral) else tuple(axes)
