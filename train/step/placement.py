"""Shardings of parameters, optimizer state and batches on a device mesh."""

import functools
import math
from typing import Any

import jax
import optax
from flax.core.spmd import logical_axis_rules
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import subtrack_jax as stj
from models import parameters
from models.parameters import MakeModule
from train.step.mesh import BATCH_AXES
from train.step.train_state import TrainState

# Mesh axes by a model's logical axis names.
RULES = {
    "batch": BATCH_AXES,
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    # Few rows each, or read by every device.
    "positions": None,
    "types": None,
    "buckets": None,
    "pooled": None,
    "labels": None,
}


def rules() -> Any:
    """Context manager that maps a model's axis names to mesh axes."""
    return logical_axis_rules(tuple(RULES.items()))


def param_shardings(make: MakeModule, mesh: Mesh) -> Any:
    """Sharding of each parameter of a module, as nested dictionaries.

    A mesh axis that does not divide its side of a matrix (5461 in the MLP of llama-1b)
    splits the other side in addition, if it divides that.
    """
    with rules():
        specs = parameters.partition_specs(make)

    def place(leaf: Any, axes: PartitionSpec) -> NamedSharding:
        spec: list[tuple[str, ...]] = [() for _ in axes]
        sides = [side for side, axis in enumerate(axes) if axis]
        own = [(axes[side], side) for side in sides]
        other = [(axes[side], to) for side in sides for to in sides if to != side]
        for axis, side in own + other:
            names = (*spec[side], axis)
            pieces = math.prod(mesh.shape[name] for name in names)
            if all(axis not in used for used in spec) and not leaf.shape[side] % pieces:
                spec[side] = names
        return NamedSharding(mesh, PartitionSpec(*(names or None for names in spec)))

    return jax.tree.map(place, parameters.abstract(make), specs)


def placed_state(
    abstract: TrainState,
    optimizer: optax.GradientTransformation,
    params: Any,
    mesh: Mesh,
) -> TrainState:
    """Shapes and dtypes of a state, with its shardings.

    Args:
      abstract: shapes and dtypes.
      optimizer: the optimizer.
      params: shardings of the parameters.
      mesh: the devices.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = TrainState(
        step=replicated,
        skipped_steps=replicated,
        params=params,
        opt_state=stj.state_sharding(optimizer, abstract.params, params),
    )
    return jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding), abstract, shardings
    )


def shardings_of(tree: Any) -> Any:
    """Shardings of arrays or of their shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: rows over the axes data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Builds a global batch from each process's own rows."""
    place = functools.partial(
        jax.make_array_from_process_local_data, batch_sharding(mesh)
    )
    return jax.tree.map(place, batch)
