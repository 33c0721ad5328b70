"""Trackers that take a small step at every step of the training."""

import jax
import jax.numpy as jnp
import optax

from subtrack_jax import sharding
from subtrack_jax._internal.orthonormal import orthonormal_columns
from subtrack_jax._internal.products import dot, power_of_two
from subtrack_jax._internal.validation import check_decay
from subtrack_jax.stages.tracker import Init, Moved, Tracker, leading_directions

# Learning rate of the Adam by which Online Subspace Descent learns its projection.
PROJECTION_LEARNING_RATE = 5e-3


def power_iteration(
    rho: jax.typing.ArrayLike = 0.908, init: Init = "randomized"
) -> Tracker:
    """One power iteration on momentum and gradient together (LDAdam).

    The new basis spans B B^T S for B = rho S m^ + (1 - rho) G, with the
    bias-corrected first moment m^ in the coordinates of S (Robert et al. 2024, arXiv
    2410.16103, algorithm 1). With B^T S = rho m^T + (1 - rho) G^T S that takes two
    products of the size of a projection. The chain up to the inner rule has to be
    inside of `feed_back`.

    Args:
      rho: in [0, 1), weight of the momentum.
      init: how the first basis is found, as in `geodesic`.

    Returns:
      A `Tracker`.

    Raises:
      ValueError: if an argument is out of its range.
    """
    check_decay("rho", rho, 0.908)

    def move(gradient, basis, context):
        momentum = context.momentum
        weight = jnp.asarray(sharding.local(rho), basis.dtype)
        # Ignore a momentum that is not finite.
        is_usable = jnp.all(jnp.isfinite(momentum))
        momentum = jnp.where(is_usable, momentum, 0).astype(basis.dtype)
        # Second powers of tiny numbers would leave float32's range.
        scale = jnp.maximum(power_of_two(gradient), power_of_two(momentum))
        gradient, momentum = gradient / scale, momentum / scale
        image = weight * momentum.T + (1 - weight) * (gradient.T @ basis)
        product = weight * dot(basis, momentum @ image)
        product += (1 - weight) * dot(gradient, image)
        new_basis = orthonormal_columns(product)
        # QR of zeros is arbitrary: keep the old basis.
        return Moved(jnp.where(jnp.any(product != 0), new_basis, basis))

    return Tracker(leading_directions(init), move, needs_momentum=True)


def online_pca(
    optimizer: optax.GradientTransformation | None = None, init: Init = "randomized"
) -> Tracker:
    """Learns the projection by gradient steps (Online Subspace Descent).

    The loss is |P P^T g - g|^2 of the normalised gradient g = G / |G| (Liang et al.
    2024, arXiv 2408.12857, equation 8 without its regularisation, as in the published
    code). P starts orthonormal and stays so as far as the loss, which is least for
    orthonormal columns, keeps it.

    Args:
      optimizer: takes the steps; None for `optax.adam(5e-3)`, the published rate for
        an interval of 200. Its state is kept beside each basis.
      init: how the first basis is found, as in `geodesic`.

    Returns:
      A `Tracker`.

    Raises:
      ValueError: if `init` is not one of its choices.
    """
    inner = optax.adam(PROJECTION_LEARNING_RATE) if optimizer is None else optimizer

    # Without their names: who looks for Adam's `mu` in the state shall find one.
    def memory(basis):
        return tuple(jax.tree.leaves(inner.init(basis)))

    def move(gradient, basis, context):
        structure = jax.tree.structure(jax.eval_shape(inner.init, basis))
        gradient = gradient / power_of_two(gradient)
        energy = jnp.sum(gradient * gradient)
        image = dot(gradient, gradient.T @ basis)  # g g^T P, times |G|^2
        image /= jnp.where(energy > 0, energy, 1)
        slope = dot(image, dot(basis.T, basis)) + dot(basis, dot(basis.T, image))
        state = jax.tree.unflatten(structure, context.memory)
        updates, state = inner.update(2 * slope - 4 * image, state, basis)
        new_memory = tuple(jax.tree.leaves(state))
        return Moved(optax.apply_updates(basis, updates), memory=new_memory)

    return Tracker(leading_directions(init), move, memory=memory)
