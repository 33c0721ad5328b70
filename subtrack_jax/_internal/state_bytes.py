"""Size of an optimizer's state, without creating it."""

import math

import jax
import optax


def state_bytes(optimizer: optax.GradientTransformation, params: optax.Params) -> int:
    """Bytes of an optimizer's state, from shapes alone.

    A training step holds more: the parameters, their gradients, what the model keeps
    for its backward pass, and, of the optimizer's own, coordinates, moments in float32
    and the update of one slice of a stack of kernels (of every kernel at once, if each
    is a leaf). `jax.jit(step).lower(...).compile().memory_analysis()` has the sum.

    Args:
      optimizer: any optax transformation.
      params: arrays or `jax.ShapeDtypeStruct`s; nothing is allocated.

    Returns:
      The bytes of all arrays of the state, over all devices.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import subtrack_jax as stj
      >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 11008), jnp.bfloat16)}
      >>> stj.state_bytes(stj.subtrack(1e-4, rank=1024), params)
      106954764
      >>> stj.state_bytes(optax.adam(1e-4), params)
      180355076
    """
    leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, params))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
