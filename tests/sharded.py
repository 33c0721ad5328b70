"""Leaves and parameters on a mesh of eight virtual devices, split in every way."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests import common

AXIS_TYPES = (AxisType.Auto, AxisType.Explicit)


class Split(NamedTuple):
    """A leaf with its partition spec."""

    leaf: common.Leaf
    spec: P


# 171 like LLaMA-1B's 5461: no mesh axis divides it, so the rank is split.
LEAVES = {
    "wide": Split(common.Leaf((64, 128)), P("fsdp", "tensor")),
    "tall": Split(common.Leaf((128, 64)), P("tensor", "fsdp")),
    "rows_only": Split(common.Leaf((64, 128)), P(("fsdp", "tensor"), None)),
    "columns_only": Split(common.Leaf((64, 128)), P(None, ("tensor", "fsdp"))),
    "stacked": Split(common.Leaf((3, 64, 128), (1,), (2,)), P(None, "fsdp", "tensor")),
    "down": Split(common.Leaf((3, 128, 64), (1,), (2,)), P(None, "tensor", "fsdp")),
    "experts": Split(common.Leaf((4, 64, 32), (1,), (2,)), P("fsdp", None, "tensor")),
    "attention": Split(common.Leaf((64, 8, 16), (0,), (1, 2)), P("fsdp", "tensor")),
    "attention_output": Split(
        common.Leaf((8, 8, 64), (0, 1), (2,)), P("tensor", None, "fsdp")
    ),
    "odd_columns": Split(common.Leaf((64, 171)), P(("fsdp", "tensor"), None)),
    "odd_rows": Split(common.Leaf((171, 64)), P(None, ("fsdp", "tensor"))),
    "embedding": Split(common.Leaf((256, 64), None), P("tensor", "fsdp")),
}


def chosen(*names: str) -> dict[str, Split]:
    """A selection of leaves by name."""
    return {name: LEAVES[name] for name in names}


def mesh(axis_type: AxisType) -> Mesh:
    """Mesh of four by two devices."""
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(axis_type,) * 2)


def leaves(splits: dict[str, Split]) -> dict[str, common.Leaf]:
    """The leaves without their specs, as `common` takes them."""
    return {name: split.leaf for name, split in splits.items()}


def shardings(splits: dict[str, Split], mesh: Mesh) -> dict[str, NamedSharding]:
    """Shardings of the parameters."""
    return {name: NamedSharding(mesh, split.spec) for name, split in splits.items()}


def shapes(splits: dict[str, Split], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract parameters with shardings."""
    return {
        name: jax.ShapeDtypeStruct(split.leaf.shape, jnp.float32, sharding=sharding)
        for (name, split), sharding in zip(
            splits.items(), shardings(splits, mesh).values(), strict=True
        )
    }


def optimizer(name: str, splits: dict[str, Split], **arguments: Any) -> Any:
    """One of the five optimizers, for these leaves."""
    defaults = {
        "learning_rate": 1e-2,
        "rank": 8,
        "update_interval": 2,
        "dimension_numbers": common.dimension_numbers(leaves(splits)),
    }
    return common.OPTIMIZERS[name](**defaults | arguments)


def pieces(shape: tuple[int, ...], sharding: NamedSharding) -> int:
    """Number of different shards of an array."""
    return int(np.prod(shape) // np.prod(sharding.shard_shape(shape)))


def types(tree: Any) -> list[tuple[str, Any]]:
    """Names and types of all arrays; on explicit meshes types contain shardings."""
    return [(jax.tree_util.keystr(k), jax.typeof(x)) for k, x in named(tree)]


def named(tree: Any) -> Iterable[tuple[Any, Any]]:
    """Paths and leaves of a tree."""
    return jax.tree.leaves_with_path(tree)
