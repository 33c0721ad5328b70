"""Parameters of a Flax module as nested dictionaries: shapes, initial values, axes."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

# Builds a module from `rngs`, e.g. `functools.partial(Llama, config)`.
MakeModule = Callable[..., nnx.Module]


def definition(make: MakeModule) -> nnx.GraphDef:
    """Graph definition of the module: `nnx.merge` adds the parameters."""
    return nnx.graphdef(_abstract_module(make))


def abstract(make: MakeModule) -> Any:
    """Shapes and dtypes of the parameters, without allocating them."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        nnx.to_pure_dict(nnx.state(_abstract_module(make), nnx.Param)),
    )


def initial(make: MakeModule, key: jax.Array) -> Any:
    """Initial parameters."""
    return nnx.to_pure_dict(nnx.state(make(rngs=nnx.Rngs(key)), nnx.Param))


def partition_specs(make: MakeModule) -> Any:
    """Partition specs of the parameters by the current logical axis rules."""
    params = nnx.state(_abstract_module(make), nnx.Param)
    return nnx.to_pure_dict(nnx.get_partition_spec(params))


def _abstract_module(make: MakeModule) -> nnx.Module:
    return nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
