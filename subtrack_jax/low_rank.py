"""`LowRank`: selection of low-rank leaves, their matrix axes, side and rank.

`LowRank` is the one place that decides orientation, rank and batch axes. It
turns every chosen leaf into a `MatrixView`: a static description through which
the stages project, lift and scale without caring how the leaf is stored.
"""

import dataclasses
import math
import numbers
import warnings
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from subtrack_jax._internal.boxes import is_box
from subtrack_jax._internal.description import Choice, table
from subtrack_jax._internal.dimension_numbers import SPECS, axes_of, resolve, suggestion
from subtrack_jax._internal.matrix_view import MatrixView
from subtrack_jax._internal.named_leaves import NamedLeaf, named_leaves

_MOST_NAMES = 20


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Selects the leaves with a low-rank state, their axes, side and rank.

    Attributes:
      rank: columns of each basis: an int, or a float in (0, 1] as a fraction of
        the smaller side. A leaf whose smaller side is not larger than the rank
        has nothing to save and gets the plain rule; `init` raises if none is left.
      dimension_numbers: which axes form the matrix, in optax's own form. None
        takes every leaf of two axes as (reduction, output), (in, out) in a Flax
        kernel. Otherwise one `optax.contrib.MuonDimensionNumbers` (or
        `GaLoreDimensionNumbers`) for every leaf it fits, a tree of them with
        None for "leave alone" (prefixes of the parameters' tree are enough), or
        a function from parameters to such a tree (see `by_path`). It is called
        on gradients too, so it should look at paths and shapes only. Axes named
        by neither list are batch axes: scanned layers, experts. Integers,
        booleans and leaves without any numbers get the plain rule.
      side: "short" puts the basis on the smaller dimension (the papers' choice,
        ties take the rows), "long" on the larger one, which stores less when
        the rank is small: long * r + 2 * short * r numbers instead of
        short * r + 2 * long * r.

    Raises:
      ValueError: if the rank or the side is not one of the above.

    Example:
      >>> import jax.numpy as jnp
      >>> import subtrack_jax as stj
      >>> params = {"kernel": jnp.zeros((3, 64, 256)), "bias": jnp.zeros(256)}
      >>> low_rank = stj.LowRank(rank=16, dimension_numbers=stj.by_path("kernel"))
      >>> print(low_rank.describe(params))
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
        is_int = isinstance(rank, numbers.Integral) and not isinstance(rank, bool)
        if not ((is_int and rank >= 1) or (_is_fraction(rank) and 0 < rank <= 1)):
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
          ValueError: if dimension numbers do not fit a leaf, or a matrix is complex.
          TypeError: if a leaf is not an array of numbers.
        """
        structure: Any = jax.tree.structure(tree, is_leaf=is_box)
        return structure.unflatten([choice.view for choice in self.choices(tree)])

    def check(self, params: optax.Params) -> None:
        """Raises unless there is a leaf to treat as low-rank.

        The first stage of a chain calls it once, in `init`. A tree without matrices
        needs no match when `dimension_numbers` is None.

        Args:
          params: arrays or `jax.ShapeDtypeStruct`s.

        Raises:
          ValueError: if nothing matches, or the rank is too large for all that does;
            also as `views`.

        Warns:
          UserWarning: if `dimension_numbers` is None and leaves of three or more axes
            get the plain rule.
        """
        choices = self.choices(params)
        chosen = [choice for choice in choices if choice.spec is not None]
        is_default = self.dimension_numbers is None
        stacked = [each.leaf for each in choices if is_default and each.is_left_out]
        if any(choice.view is not None or choice.is_empty for choice in chosen):
            if stacked:
                warnings.warn(_advice(stacked), stacklevel=2)
        elif chosen or stacked or (choices and not is_default):
            reason = self._why_nothing(choices)
            if stacked:
                reason += f" {_advice(stacked)}"
            raise ValueError(f"No leaf to treat as low-rank: {reason}")

    def describe(self, params: optax.Params) -> str:
        """Formats a table of each leaf's state.

        One row per leaf: shape, shape of its matrix, side of the basis, rank, and
        the bytes of basis and moments beside those of Adam's moments, both in the
        default dtype (the parameter's, float32 at least). The rank is "plain" for
        leaves that were not chosen or whose smaller side is not above the rank.

        Args:
          params: arrays or `jax.ShapeDtypeStruct`s.

        Returns:
          The table, to be printed.

        Raises:
          ValueError, TypeError: as `views`.
        """
        return table(self.choices(params))

    def choices(self, tree: optax.Params) -> list[Choice]:
        """Decides on each leaf, in order; raises as `views`."""
        leaves = named_leaves(tree)
        if not leaves:  # optax.tree.map_params calls it with such trees
            return []
        specs = resolve(self.dimension_numbers, tree, leaves)
        return [
            Choice(leaf) if spec is None else self._choice(leaf, spec)
            for leaf, spec in zip(leaves, specs, strict=True)
        ]

    def _why_nothing(self, choices: list[Choice]) -> str:
        if chosen := [choice for choice in choices if choice.spec is not None]:
            too_large = "not below the smaller side of any of"
            if _is_fraction(self.rank):
                too_large = "the full rank of all of"
            largest = max(choice.short_side or 0 for choice in chosen)
            use = f"a rank below {largest}, or " if largest > 1 else ""
            return (
                f"rank={self.rank!r} is {too_large}"
                f" {_names(choice.leaf for choice in chosen)}. Use {use}plain Adam."
            )
        asked = self.dimension_numbers
        how = "leaves of two axes" if asked is None else f"dimension_numbers={asked}"
        return (
            f"{how} match none of {_names(choice.leaf for choice in choices)}. Name the"
            " axes of stacked kernels with dimension_numbers, for example"
            " subtrack_jax.by_path('kernel')."
        )

    def _choice(self, leaf: NamedLeaf, spec: Any) -> Choice:
        """Creates the matrix view of a leaf by a spec; raises if it does not fit."""
        if not isinstance(spec, SPECS):
            raise ValueError(
                f"dimension_numbers for {leaf.name} is {spec!r}: use None or"
                " optax.contrib.MuonDimensionNumbers."
            )
        row_axes = axes_of(spec.reduction_axis)
        column_axes = axes_of(spec.output_axis)
        chosen = row_axes + column_axes
        shape, ndim = leaf.shape, len(leaf.shape)
        if not all(-ndim <= axis < ndim for axis in chosen):
            raise ValueError(f"{spec} names an axis that {leaf} does not have.")
        row_axes = tuple(axis % ndim for axis in row_axes)
        column_axes = tuple(axis % ndim for axis in column_axes)
        chosen = row_axes + column_axes
        if len(set(chosen)) < len(chosen) or not row_axes or not column_axes:
            raise ValueError(
                f"{spec} for {leaf}: reduction and output axes must be disjoint and not"
                " empty."
            )
        rows = math.prod(shape[axis] for axis in row_axes)
        columns = math.prod(shape[axis] for axis in column_axes)
        short_side = min(rows, columns)
        rank = self.rank
        if _is_fraction(rank):
            rank = max(1, round(rank * short_side))
        if rank >= short_side or 0 in shape:
            return Choice(leaf, spec, short_side)
        _check_real(leaf)
        view = MatrixView(
            shape=shape,
            batch_axes=tuple(axis for axis in range(ndim) if axis not in chosen),
            row_axes=row_axes,
            column_axes=column_axes,
            basis_on_rows=rows == columns or (rows < columns) == (self.side == "short"),
            rank=int(rank),
        )
        return Choice(leaf, spec, short_side, view)


def _is_fraction(rank: Any) -> bool:
    return isinstance(rank, numbers.Real) and not isinstance(rank, numbers.Integral)


def _check_real(leaf: NamedLeaf) -> None:
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise ValueError(
            f"{leaf.name} is a matrix of {leaf.dtype}, whose subspaces are not"
            " implemented: wrap the optimizer in"
            " optax.contrib.split_real_and_imaginary, or leave this leaf alone with"
            " dimension_numbers."
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"{leaf.name} is a matrix of {leaf.dtype}, which has no gradient to"
            " project: leave this leaf alone with dimension_numbers."
        )


def _names(leaves: Iterable[NamedLeaf]) -> str:
    names = list(map(str, leaves))
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _advice(stacked: list[NamedLeaf]) -> str:
    """Suggests dimension numbers for leaves of three or more axes."""
    return (
        "dimension_numbers=None gives plain Adam to leaves of three or more axes:"
        f" {_names(stacked)}. If they are stacks of matrices over their last two axes,"
        f" write {suggestion(stacked)}; for other axes see its"
        " reduction_axis and output_axis."
    )
