"""Sharding of an optimizer's state, from that of its parameters."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from subtrack_jax._internal.boxes import content, is_box
from subtrack_jax._internal.mesh import as_explicit
from subtrack_jax._internal.named_leaves import path_name
from subtrack_jax._internal.trees import as_arrays


def state_sharding(
    optimizer: optax.GradientTransformation,
    params: optax.Params,
    param_shardings: Any = None,
) -> Any:
    """Where the state of an optimizer belongs, next to sharded parameters.

    For `jit(optimizer.init, out_shardings=...)`, for restoring checkpoints and for
    plans. A basis is split along its long side and moments in coordinates along
    their columns (or along the rank, where those do not divide), over all mesh axes
    that split the parameter: no device keeps a copy of what its parameter's sharding
    would split. State of the parameter's own shape is placed like it, scalars are on
    all devices. Names of axes that parameters carry as metadata (Flax's `Param` and
    `Partitioned`) are of no consequence, and low-rank state carries none: what Flax
    reads from metadata, `nnx.get_partition_spec`, calls it replicated. Use this
    instead.

    Args:
      optimizer: any transformation of this library or of optax, in any wrapper.
      params: arrays or `jax.ShapeDtypeStruct`s; nothing is allocated.
      param_shardings: tree of `NamedSharding`s like `params`, on one mesh, whose
        axes may be automatic or explicit; None takes those of `params`.

    Returns:
      A tree of `NamedSharding`s like the optimizer's state.

    Raises:
      ValueError: a parameter has no `NamedSharding`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> import subtrack_jax as stj
      >>> mesh = jax.make_mesh((1,), ("fsdp",))
      >>> params = {"kernel": jax.ShapeDtypeStruct((64, 128), jnp.float32)}
      >>> shardings = {"kernel": NamedSharding(mesh, PartitionSpec("fsdp", None))}
      >>> optimizer = stj.subtrack(1e-3, rank=16)
      >>> placed = stj.state_sharding(optimizer, params, shardings)
      >>> tuple(optax.tree.get(placed, "basis")["kernel"].spec)
      ('fsdp', None)
      >>> tuple(optax.tree.get(placed, "mu")["kernel"].spec)
      (None, 'fsdp')
    """
    params = as_arrays(params)
    if param_shardings is None:
        param_shardings = jax.tree.map(
            lambda leaf: getattr(content(leaf), "sharding", None),
            params,
            is_leaf=is_box,
        )

    def typed(path, leaf, sharding):
        if is_box(sharding):
            sharding = content(sharding)
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"{path_name(path)} has the sharding {sharding}: give every parameter"
                " a NamedSharding, PartitionSpec() where it is on all devices."
            )
        own_type = NamedSharding(as_explicit(sharding.mesh), sharding.spec)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=own_type
            ),
            leaf,
        )

    # On explicit axes shardings are part of types, and types can be had of shapes:
    # whatever `init` does, and whoever wrapped it, its results say where they are.
    typed_params = jax.tree.map_with_path(
        typed, params, param_shardings, is_leaf=is_box
    )
    mesh = jax.tree.leaves(param_shardings)[0].mesh
    with jax.sharding.use_abstract_mesh(as_explicit(mesh)):
        state = jax.eval_shape(optimizer.init, typed_params)
    return jax.tree.map(
        lambda leaf: NamedSharding(
            mesh, PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        ),
        state,
    )
