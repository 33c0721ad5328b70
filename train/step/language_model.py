"""Next-token loss of a LLaMA, and the shapes of its batches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import llama
from models.llama import LlamaConfig
from train.config.data_config import DataConfig
from train.step.backward_step import LayeredLoss
from train.step.train_step import Batch, LossSums


@dataclasses.dataclass(frozen=True)
class NextTokenLoss:
    """Cross-entropy in nats, summed over the unmasked tokens of a batch.

    Attributes:
      model: the model's config.
      z_loss_weight: weight of the squared log-partition in the minimised total; the
        reported loss does not include it.
    """

    model: LlamaConfig
    z_loss_weight: float = 0.0

    def __call__(self, params: Any, batch: Batch, key: jax.Array) -> LossSums:
        """Loss without dropout: the key is not used."""
        del key
        model = nnx.merge(llama.definition(self.model), params)
        return self._sums(llama.token_loss(model, **batch))

    def layered(self) -> LayeredLoss:
        """The same loss in parts, for updates in the backward pass."""
        before, layer, after = llama.parts(self.model)
        return LayeredLoss(
            lambda outside, batch: before(outside, batch["inputs"]),
            lambda params, x, batch: layer(
                params, x, batch.get("positions"), batch.get("segments")
            ),
            lambda outside, x, batch: self._sums(
                after(outside, x, batch["targets"], batch["mask"])
            ),
            lambda batch: jnp.sum(batch["mask"]),
        )

    def _sums(self, losses: llama.TokenLoss) -> LossSums:
        total = losses.loss + self.z_loss_weight * losses.squared_log_z
        return LossSums(total, losses.count, {"loss": losses.loss})


@dataclasses.dataclass(frozen=True)
class AnswerLoss:
    """`NextTokenLoss` of conversations, whose mask leaves out all but answers.

    Reports `tokens`, the number of all tokens, per counted one.

    Attributes:
      model: the model's config.
    """

    model: LlamaConfig

    def __call__(self, params: Any, batch: Batch, key: jax.Array) -> LossSums:
        """Loss of a batch whose `tokens` (rows,) are the numbers of each row's."""
        inputs = {name: each for name, each in batch.items() if name != "tokens"}
        sums = NextTokenLoss(self.model)(params, inputs, key)
        tokens = jnp.sum(batch["tokens"]).astype(jnp.float32)
        return LossSums(sums.total, sums.count, {"tokens": tokens})


def abstract_batch(data: DataConfig, sharding: Any = None) -> dict[str, Any]:
    """Shapes and dtypes of a batch.

    Shapes: (batch_size_sequences, sequence_length_tokens) of `inputs` and `targets`
    (int32) and of `mask` (bool).
    """
    shape = (data.batch_size_sequences, data.sequence_length_tokens)
    dtypes = {"inputs": jnp.int32, "targets": jnp.int32, "mask": jnp.bool_}
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, dtype in dtypes.items()
    }
