"""Decision of `LowRank` for each leaf, and the table of `LowRank.describe`."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from subtrack_jax._internal.matrix_view import MatrixView
from subtrack_jax._internal.named_leaves import NamedLeaf
from subtrack_jax._internal.trees import state_dtype


class Choice(NamedTuple):
    """Low-rank or plain treatment of one leaf.

    Attributes:
      leaf: name, shape and dtype.
      spec: its dimension numbers; None if they leave it alone.
      short_side: smaller side of its matrix; None without a spec.
      view: None if it gets the plain rule.
    """

    leaf: NamedLeaf
    spec: Any = None
    short_side: int | None = None
    view: MatrixView | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the leaf is empty."""
        return math.prod(self.leaf.shape) == 0

    @property
    def is_left_out(self) -> bool:
        """Whether a leaf without a spec could be a matrix or a stack of matrices."""
        return self.spec is None and self.leaf.may_be_matrix and not self.is_empty


def table(choices: Sequence[Choice]) -> str:
    """Formats a table of each leaf's state; see `LowRank.describe`."""
    header = ("leaf", "shape", "matrix", "basis on", "rank", "state", "Adam")
    lines, total, total_adam = [header], 0, 0
    for choice in choices:
        leaf, view = choice.leaf, choice.view
        itemsize = state_dtype(leaf.dtype).itemsize
        adam = state = 2 * math.prod(leaf.shape) * itemsize
        seen = ("-", "-", _why_plain(choice))
        if view is not None:
            state = math.prod(view.basis_shape)
            state = (state + 2 * math.prod(view.coordinates_shape)) * itemsize
            side = "rows" if view.basis_on_rows else "columns"
            matrix = (*view.batch_shape, view.rows, view.columns)
            seen = (" x ".join(map(str, matrix)), side, str(view.rank))
        shape = str(leaf.shape)
        lines.append((leaf.name, shape, *seen, f"{state:,}", f"{adam:,}"))
        total, total_adam = total + state, total_adam + adam
    lines.append(("total", "", "", "", "", f"{total:,}", f"{total_adam:,}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if k > 4 else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _why_plain(choice: Choice) -> str:
    if not jnp.issubdtype(choice.leaf.dtype, jnp.inexact):
        return f"plain ({choice.leaf.dtype})"
    if choice.is_empty:
        return "plain (empty)"
    return "plain" if choice.spec is None else "plain (rank too large)"
