"""The loss of a language model, without the logits of the whole batch at once."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp


class LanguageModel(Protocol):
    """A model with a head that can be applied to a part of the positions."""

    config: Any  # with `vocabulary_size`

    def hidden_states(self, tokens: jax.Array) -> jax.Array:
        """Inputs of the head, (batch, length, hidden)."""

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits, (..., vocabulary), float32, of hidden states."""


class TokenLoss(NamedTuple):
    """Sums over the tokens of a batch that count; all are ().

    Means are left to the caller, who may add up several batches first.
    """

    loss: jax.Array  # float32; cross-entropy in nats
    squared_log_z: jax.Array  # float32; logsumexp(logits)^2, for PaLM's z-loss
    count: jax.Array  # int32; the tokens


def token_loss(
    model: LanguageModel,
    inputs: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    *,
    logits_at_once: int = 2**26,
) -> TokenLoss:
    """Cross-entropy of the targets and what else a loss is made of.

    When the logits of the batch are more than `logits_at_once`, they are made and
    consumed a stretch of positions at a time, forward and again backward;
    stretches, not rows, so that a batch split over devices stays split. Sums that
    the caller does not use are not computed under `jax.jit`.

    Args:
      model: the model.
      inputs: (batch, length) token ids.
      targets: (batch, length), the id that should follow each input.
      mask: (batch, length) bool, False where the target does not count (its id
        may then be anything); None counts all.
      logits_at_once: bound on the float32 logits held at a time.

    Returns:
      The sums over the counted tokens.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from models import llama
    >>> config = llama.LlamaConfig(64, 16, 32, num_layers=2, num_heads=2)
    >>> model = llama.Llama(config, rngs=nnx.Rngs(0))
    >>> tokens = jnp.array([[1, 2, 3, 4]])
    >>> sums = llama.token_loss(model, tokens[:, :-1], tokens[:, 1:])
    >>> f"{sums.loss / sums.count:.1f} nats"
    '4.2 nats'
    """
    hidden = model.hidden_states(inputs)
    if mask is None:
        mask = jnp.ones(targets.shape, bool)

    count = jnp.sum(mask)

    def float_sums(hidden, targets, mask):
        logits = model.logits(hidden)
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        losses = log_z - target_logits[..., 0]
        return jnp.sum(losses, where=mask), jnp.sum(log_z**2, where=mask)

    batch_size, length = inputs.shape
    logits_per_position = batch_size * model.config.vocabulary_size
    stretches = -(-length // max(1, logits_at_once // logits_per_position))
    if stretches == 1:
        return TokenLoss(*float_sums(hidden, targets, mask), count)

    def split(x):
        stretch = -(-length // stretches)
        padding = [(0, 0)] * x.ndim
        padding[1] = (0, stretches * stretch - length)
        x = jnp.pad(x, padding).reshape(batch_size, stretches, stretch, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    @jax.checkpoint
    def add_stretch(totals, stretch):
        return jax.tree.map(jnp.add, totals, float_sums(*stretch)), None

    stretched = (split(hidden), split(targets), split(mask))
    zeros = (jnp.float32(0), jnp.float32(0))
    totals, _ = jax.lax.scan(add_stretch, zeros, stretched)
    return TokenLoss(*totals, count)
