"""Devices as a mesh, and what is split over which of its axes."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from flax.core.spmd import logical_axis_rules
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import subtrack_jax as stj
from models import llama
from train.data.dataset import Batch
from train.step.train_step import TrainState, create_state

AXES = ("data", "fsdp", "tensor")
# From the names that a model gives the axes of its arrays to those of the mesh.
RULES = {
    "batch": ("data", "fsdp"),
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


def parse_mesh(text: str) -> dict[str, int]:
    """Reads the size of each axis: "fsdp=4,tensor=2", the others being 1.

    Raises:
      ValueError: an axis is unknown, named twice, or has no size; more than one is
        to be filled (-1).
    """
    sizes = dict.fromkeys(AXES, 1)
    seen = set()
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or name in seen:
            raise ValueError(
                f"--mesh {text!r}: {name!r} is not one of {', '.join(AXES)}, each once"
            )
        try:
            sizes[name] = int(size)
        except ValueError:
            sizes[name] = 0
        if sizes[name] < 1 and sizes[name] != -1:
            raise ValueError(
                f"--mesh {text!r}: {name} needs a size of at least 1, or -1 to fill"
            )
        seen.add(name)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"--mesh {text!r}: only one axis can be -1")
    return sizes


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices, all of all processes if none are given.

    Raises:
      ValueError: the sizes do not make up the number of devices.
    """
    sizes = parse_mesh(text)
    devices = jax.devices() if devices is None else devices
    known = math.prod(size for size in sizes.values() if size != -1)
    shape = tuple(len(devices) // known if s == -1 else s for s in sizes.values())
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"--mesh {text!r} does not fit {len(devices)} devices: the product of the "
            "sizes must be their number; -1 fills one axis"
        )
    return Mesh(np.array(devices).reshape(shape), AXES)


def param_shardings(config: llama.LlamaConfig, mesh: Mesh) -> Any:
    """Where each parameter of a LLaMA belongs, as nested dictionaries.

    A mesh axis that does not divide its side of a matrix (the MLP of llama-1b has
    5461) splits the other side once more, where it divides that.
    """
    with rules():  # names are translated, in whatever context we are called
        model = nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0)))
        params = nnx.state(model, nnx.Param)
        specs = nnx.get_partition_spec(params)

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

    return jax.tree.map(
        place,
        nnx.to_pure_dict(params),
        nnx.to_pure_dict(specs),
    )


def state_shardings(
    config: llama.LlamaConfig,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    mesh: Mesh,
) -> TrainState:
    """Where all that a step changes belongs, from its shapes."""
    params = param_shardings(config, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return TrainState(
        step=everywhere,
        skipped_steps=everywhere,
        params=params,
        opt_state=stj.state_sharding(optimizer, abstract.params, params),
    )


def abstract_state(
    config: llama.LlamaConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """All that a step changes, as shapes with dtypes and shardings."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    abstract = jax.eval_shape(functools.partial(create_state, config, optimizer), key)
    return jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding),
        abstract,
        state_shardings(config, optimizer, abstract, mesh),
    )


def shardings_of(tree: Any) -> Any:
    """The shardings of arrays or of their shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def place_batch(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """One global batch, of which each process has its rows."""
    place = functools.partial(
        jax.make_array_from_process_local_data, batch_sharding(mesh)
    )
    return {name: place(rows) for name, rows in batch.items()}


def check_batch(batch_size_sequences: int, parts: int, mesh: Mesh) -> None:
    """Raises a ValueError if a part of a batch cannot be split over the mesh."""
    pieces = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    if batch_size_sequences % (parts * pieces):
        raise ValueError(
            f"--batch-size-sequences {batch_size_sequences} must be a multiple of "
            f"{parts * pieces}: --gradient-accumulation-steps {parts} times the "
            f"{pieces} devices of the mesh's axes data and fsdp"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sequences over all devices but those that share tensors."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"], None))


def rules() -> Any:
    """A context in which the model finds the mesh axes of its names."""
    return logical_axis_rules(tuple(RULES.items()))
