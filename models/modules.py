"""Linear layers, embeddings and scanned layers with logical axis names.

Shared by the LLaMA and the encoders.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import spmd
from jax.sharding import PartitionSpec

from models.config import Float, Remat

# "dots" saves products with weights: unlike attention's, they have no batch axes.
_SAVED = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class ModuleConfig(Protocol):
    """Settings that every parameter depends on."""

    @property
    def dtype(self) -> Float:
        """Dtype of the computation."""

    @property
    def param_dtype(self) -> Float:
        """Dtype of the parameters."""

    @property
    def init_std(self) -> float:
        """Standard deviation of initial kernels and embeddings."""


def named_axes(*axes: str) -> dict[str, Any]:
    """Parameter metadata with the logical names of the axes."""
    # Not eager: logical names become mesh axes only through a trainer's rules.
    return {"out_sharding": axes, "eager_sharding": False}


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation's sharding by the logical names of its axes.

    No effect without a mesh (`jax.set_mesh`) or without rules for the names
    (`flax.core.spmd.logical_axis_rules`). An axis that the mesh axes do not divide
    stays replicated.
    """
    rules = dict(spmd.get_logical_axis_rules() or ())
    mesh = jax.sharding.get_abstract_mesh()
    if not rules or mesh.empty:
        return x

    def fitting(size, name):
        split = rules.get(name) or ()
        split = (split,) if isinstance(split, str) else split
        pieces = math.prod(mesh.shape[axis] for axis in split)
        return split if size % pieces == 0 else None

    spec = PartitionSpec(*map(fitting, x.shape, axes))
    return jax.lax.with_sharding_constraint(x, spec)


def linear(
    config: ModuleConfig,
    rngs: nnx.Rngs,
    axes: tuple[str, str],
    sizes: tuple[int, int],
    *,
    use_bias: bool = False,
) -> nnx.Linear:
    """Linear layer; its kernel is (in, out), its bias starts at zero."""
    return nnx.Linear(
        *sizes,
        use_bias=use_bias,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nnx.initializers.normal(config.init_std),
        kernel_metadata=named_axes(*axes),
        bias_metadata=named_axes(axes[1]),
        rngs=rngs,
    )


def embedding(
    config: ModuleConfig,
    rngs: nnx.Rngs,
    axes: tuple[str, str],
    sizes: tuple[int, int],
) -> nnx.Embed:
    """Embedding of (rows, width), in the compute dtype when read."""
    return nnx.Embed(
        *sizes,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        embedding_init=nnx.initializers.normal(config.init_std),
        embedding_metadata=named_axes(*axes),
        rngs=rngs,
    )


def stacked_layers(
    make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs
) -> nnx.Module:
    """Layers as one module whose parameters have a leading axis "layers"."""
    create = nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: "layers"})
    return nnx.split_rngs(splits=count)(create)(rngs)


def scan_layers(
    layers: nnx.Module,
    apply: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    inputs: Any,
    remat: Remat,
) -> tuple[jax.Array, Any]:
    """Applies stacked layers one after another, compiled once.

    Args:
      layers: from `stacked_layers`.
      apply: maps a layer, activations (batch, length, hidden) and the layer's inputs
        to new activations and the layer's outputs.
      x: the first layer's activations.
      inputs: a tree of arrays with a leading axis of layers, or None.
      remat: which activations the backward pass recomputes.

    Returns:
      The last layer's activations, and the outputs stacked on a leading axis.
    """
    definition, params = nnx.split(layers)

    def step(x, inputs):
        params, own = inputs
        return apply_layer(definition, params, apply, x, own)

    if remat != "none":
        # prevent_cse is not needed inside a scan.
        step = jax.checkpoint(step, prevent_cse=False, policy=_SAVED[remat])
    return jax.lax.scan(step, x, (params, inputs))


def apply_layer(
    definition: nnx.GraphDef[Any],
    params: Any,
    apply: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    inputs: Any,
) -> tuple[jax.Array, Any]:
    """Applies one layer to activations whose rows stay split over a mesh.

    Args:
      definition: graph definition of the stacked layers.
      params: parameters of one of them.
      apply: as in `scan_layers`.
      x: activations (batch, length, hidden).
      inputs: this layer's inputs.

    Returns:
      New activations, and the layer's outputs.
    """
    x = constrain(x, "batch", None, None)
    return apply(nnx.merge(definition, params), x, inputs)
