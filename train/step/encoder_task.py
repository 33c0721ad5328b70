"""Loss of an encoder on classes, numbers or choices; parameters that stay frozen."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from models import encoder
from models.encoder_config import EncoderConfig
from models.matrices import matrix_axes
from train.step.train_step import Batch, LossSums


@dataclasses.dataclass(frozen=True)
class TaskLoss:
    """Cross-entropy, or squared error of numbers, summed over the rows of a batch.

    Attributes:
      model: the model's config.
      freeze: parameters without a gradient, see `is_frozen`.
    """

    model: EncoderConfig
    freeze: str = "none"

    def __call__(self, params: Any, batch: Batch, key: jax.Array) -> LossSums:
        """Loss with dropout from the key; `mask` tells which rows count."""
        if self.freeze != "none":
            params = jax.tree.map(
                lambda leaf, stays: jax.lax.stop_gradient(leaf) if stays else leaf,
                params,
                is_frozen(params, self.freeze),
            )
        logits = outputs(self.model, params, batch, key)
        if self.model.head == "regression":
            losses = jnp.square(logits[:, 0] - batch["labels"])
        else:
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(
                logits, jnp.maximum(batch["labels"], 0)
            )
        total = jnp.sum(jnp.where(batch["mask"], losses, 0))
        return LossSums(total, jnp.sum(batch["mask"]), {})


def outputs(
    model: EncoderConfig, params: Any, batch: Batch, key: jax.Array | None = None
) -> jax.Array:
    """Logits of a batch, float32: (rows, classes); dropout only with a key."""
    module = nnx.merge(encoder.definition(model), params)
    return module.logits(batch["tokens"], batch["token_types"], batch["lengths"], key)


def is_frozen(params: Any, freeze: str) -> Any:
    """Tree of bools: the parameters that `--freeze` keeps as they are.

    Args:
      params: the parameters, or anything of their structure.
      freeze: none; embeddings: of words, positions and types; matrices: those of
        attention and MLP.
    """
    if freeze == "matrices":
        axes = matrix_axes(params)
        return jax.tree.map(lambda _, spec: spec is not None, params, axes)

    def is_embedding(path: Any, leaf: Any) -> bool:
        del leaf
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return freeze == "embeddings" and re.match("embedding/", name) is not None

    return jax.tree_util.tree_map_with_path(is_embedding, params)


def without_frozen(
    optimizer: optax.GradientTransformation, freeze: str
) -> optax.GradientTransformation:
    """Optimizer without updates and state for the parameters that stay frozen."""
    if freeze == "none":
        return optimizer
    kinds = {False: optimizer, True: optax.set_to_zero()}
    return optax.partition(kinds, lambda params: is_frozen(params, freeze))
