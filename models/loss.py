"""Cross-entropy of a language model, with bounded memory for the logits."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

LOGITS_AT_ONCE = 2**26


class Head(Protocol):
    """Protocol of a head that can be applied to some positions at a time."""

    config: Any  # with `vocabulary_size`

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits, (..., vocabulary), float32, of hidden states."""


class LanguageModel(Head, Protocol):
    """Protocol of a language model."""

    def hidden_states(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """Inputs of the head, (batch, length, hidden)."""


class TokenLoss(NamedTuple):
    """Loss sums over the unmasked tokens of a batch, scalars.

    Sums, not means, so that a caller can add several batches before dividing.
    """

    loss: jax.Array  # float32; cross-entropy in nats
    squared_log_z: jax.Array  # float32; logsumexp(logits)^2, for PaLM's z-loss
    count: jax.Array  # int32; number of tokens


def token_loss(
    model: LanguageModel,
    inputs: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    *,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> TokenLoss:
    """Sums of cross-entropy and squared log-normaliser over the unmasked tokens.

    If the batch has more than `logits_at_once` logits, they are computed for a chunk of
    positions at a time, in the forward and again in the backward pass. Chunks split
    positions, not rows, so that a batch sharded over devices stays sharded. Under
    `jax.jit` unused sums are not computed.

    Args:
      model: the model.
      inputs: (batch, length) token ids.
      targets: (batch, length), the next token of each input.
      mask: (batch, length) bool, False for targets to ignore, whose ids are not used;
        None: all True.
      positions: (batch, length), see `Llama.hidden_states`, as are segments.
      segments: (batch, length), for several texts in a row.
      logits_at_once: maximum number of float32 logits in memory.

    Returns:
      The sums over the unmasked tokens.

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
    hidden = model.hidden_states(inputs, positions, segments)
    if mask is None:
        mask = jnp.ones(targets.shape, bool)
    return hidden_loss(model, hidden, targets, mask, logits_at_once)


def hidden_loss(
    model: Head,
    hidden: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> TokenLoss:
    """`token_loss` from the hidden states: the head and the cross-entropy.

    Args:
      model: the head.
      hidden: (batch, length, hidden), inputs of the head.
      targets: as in `token_loss`, as are the others.
      mask: (batch, length) bool.
      logits_at_once: maximum number of float32 logits in memory.

    Returns:
      The sums over the unmasked tokens.
    """
    count = jnp.sum(mask)

    def float_sums(hidden, targets, mask):
        logits = model.logits(hidden)
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        losses = log_z - target_logits[..., 0]
        return jnp.sum(losses, where=mask), jnp.sum(log_z**2, where=mask)

    batch_size, length = targets.shape
    logits_per_position = batch_size * model.config.vocabulary_size
    chunks = -(-length // max(1, logits_at_once // logits_per_position))
    if chunks == 1:
        return TokenLoss(*float_sums(hidden, targets, mask), count)

    def split(x):
        size = -(-length // chunks)
        padding = [(0, 0)] * x.ndim
        padding[1] = (0, chunks * size - length)
        x = jnp.pad(x, padding).reshape(batch_size, chunks, size, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    @jax.checkpoint
    def add_chunk(totals, chunk):
        return jax.tree.map(jnp.add, totals, float_sums(*chunk)), None

    chunked = (split(hidden), split(targets), split(mask))
    zeros = (jnp.float32(0), jnp.float32(0))
    totals, _ = jax.lax.scan(add_chunk, zeros, chunked)
    return TokenLoss(*totals, count)
