"""Record that replaces a low-rank gradient between stages."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self, TypeGuard

import jax
import jax.numpy as jnp
import optax

from subtrack_jax._internal.boxes import unboxed
from subtrack_jax._internal.matrix_loops import map_large
from subtrack_jax._internal.matrix_view import MatrixView
from subtrack_jax.stages.transport import DenseRotation, RankOneRotation, Rotation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankLeaf:
    """Low-rank leaf of the updates, between `track_subspace` and recovery.

    Stages fill it from left to right; a field that is None has not been reached.
    Batch axes come first in every array.

    Attributes:
      gradient: G as it arrived, in the shape and dtype of the leaf.
      basis: S_t, of shape (..., m, r).
      previous_basis: S_{t-1}, of the same shape.
      rank_one: the change of basis as a rank-one rotation, if the tracker knows
        one, else None.
      moved: scalar bool, the same for all leaves of a tree: whether this step
        moved the basis, so that moments have to follow.
      coordinates: A = S_t^T G, of shape (..., r, n); set by `project`.
      direction: N, the inner rule's answer to A, of the same shape; set by
        `on_coordinates` and `scale_by_projection_aware_adam`.
      view: how the leaf is seen as a matrix; static.
      box: structure of the metadata that the gradient came in, if any; static, set
        and used by the wrapper of stages.
    """

    gradient: jax.Array
    basis: jax.Array
    previous_basis: jax.Array
    rank_one: RankOneRotation | None
    moved: jax.Array
    coordinates: Any
    direction: Any
    view: MatrixView = dataclasses.field(metadata={"static": True})
    box: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def start(
        cls,
        gradient: jax.Array,
        view: MatrixView,
        basis: jax.Array,
        previous_basis: jax.Array,
        moved: jax.Array,
        rank_one: RankOneRotation | None = None,
    ) -> Self:
        """Creates the record of a gradient with its basis."""
        return cls(
            gradient=gradient,
            basis=basis,
            previous_basis=previous_basis,
            rank_one=rank_one,
            moved=moved,
            coordinates=None,
            direction=None,
            view=view,
            box=jax.tree.structure(gradient),
        )

    @property
    def rotation(self) -> Rotation:
        """Change of basis from the previous coordinates to the current ones."""
        if self.rank_one is None:
            return DenseRotation(self.basis, self.previous_basis)
        return self.rank_one

    @property
    def fields(self) -> dict[str, Any]:
        """Fields with batch axes in front, by name."""
        shared = "gradient", "moved", "view", "box"
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in shared
        }

    def map(self, function: Callable[..., Any], *stacks: Any) -> Any:
        """Calls a function of records, matrix by matrix where `map_large` does.

        Args:
          function: from a record and one entry of each of `stacks` to results that have
            the batch axes of the record in front.
          *stacks: trees of arrays whose leading axes are the batch axes.

        Returns:
          What the function returns.
        """

        def of_one(view, gradient, fields, *stacks):
            record = self.replace(view=view, gradient=gradient, **fields)
            return function(record, *stacks)

        return map_large(of_one, self.view, self.gradient, self.fields, *stacks)

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields replaced."""
        return dataclasses.replace(self, **changes)


def is_record(leaf: Any) -> TypeGuard[LowRankLeaf]:
    """Whether a leaf of the updates is a record, for `is_leaf` too."""
    return isinstance(leaf, LowRankLeaf)


def map_records(
    low_rank: Callable[..., Any],
    plain: Callable[..., Any],
    updates: optax.Updates,
    *rest: Any,
) -> Any:
    """Maps one function over the records of a tree and another over its arrays."""
    return jax.tree.map(
        lambda leaf, *others: (low_rank if is_record(leaf) else plain)(leaf, *others),
        updates,
        *rest,
        is_leaf=is_record,
    )


def widened(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
    """Casts gradients to the wider of their own dtype and their parameter's.

    A learning rate times an update in bfloat16 has 8 bits, too few for a float32
    parameter.

    Args:
      updates: arrays, boxes around them, or records.
      params: the parameters, which are found by path; None leaves the updates alone.

    Returns:
      The updates; those that are wide enough as they are, integers too.
    """
    if params is None:
        return updates
    dtypes = {
        path: getattr(leaf, "dtype", None)
        for tree in (params, unboxed(params))  # records are not boxed
        for path, leaf in jax.tree.leaves_with_path(tree)
    }

    def in_wider(path, node):
        widen = lambda g: g.astype(_wider(g.dtype, dtypes.get(path)))
        if is_record(node):
            return node.replace(gradient=widen(node.gradient))
        return widen(node)

    return jax.tree.map_with_path(in_wider, updates, is_leaf=is_record)


def _wider(dtype: Any, other: Any) -> Any:
    if other is None or dtype == other:
        return dtype
    if not all(jnp.issubdtype(kind, jnp.inexact) for kind in (dtype, other)):
        return dtype
    # float8 dtypes have no implicit promotions.
    if dtype.itemsize != other.itemsize:
        return max(dtype, other, key=lambda x: x.itemsize)
    return jnp.promote_types(dtype, other)
