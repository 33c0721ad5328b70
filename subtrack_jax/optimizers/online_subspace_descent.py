"""Online Subspace Descent: the projection is learned beside the weights.

Liang et al. 2024, arXiv 2408.12857, equation 8.
"""

from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from subtrack_jax._internal.products import dot, power_of_two
from subtrack_jax.optimizers.adam_in_subspace import adam_in_subspace
from subtrack_jax.optimizers.method import SharedTracking, low_rank_method
from subtrack_jax.stages.tracker import Init, Moved, Tracker, leading_directions

# Learning rate of the Adam that learns the projection.
PROJECTION_LEARNING_RATE = 5e-3


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

    # Stored without field names, so that the state has only one `mu`.
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


@low_rank_method(transport=False, recovery="none", update_interval=1)
def online_subspace_descent(
    learning_rate: optax.ScalarOrSchedule,
    *,
    init: Init = "randomized",
    projection_optimizer: optax.GradientTransformation | None = None,
    **shared: Unpack[SharedTracking],
) -> optax.GradientTransformationExtraArgs:
    """Online Subspace Descent: the projection is learned beside the weights.

    An optimizer of its own lowers the error of the projection a little on every step;
    moments are kept and nothing is recovered.

    Args:
      learning_rate: a number or a schedule.
      update_interval: steps between two steps of the projection; 1 in the paper.
      init: how the first basis is found; see `subtrack`.
      projection_optimizer: takes them, and its state is kept beside each basis; None
        for `optax.adam(5e-3)`.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `adam_in_subspace`.
    """
    tracker = online_pca(projection_optimizer, init)
    return adam_in_subspace(learning_rate, tracker, **shared)
