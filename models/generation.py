"""Sampling text from a model, one token at a time, with a key-value cache."""

import functools
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import llama
from models.layers import constrain

ENDED = -1  # in place of the tokens of a row that has ended
# Lengths are rounded up to a multiple of this, so that few programs are compiled.
_STRIDE = 64


class Sampling(NamedTuple):
    """How tokens are drawn.

    Attributes:
      temperature: divides the logits; 0: the likeliest token is taken.
      top_k: only so many of the likeliest tokens are drawn; None: all.
      top_p: of these, by their probabilities at this temperature, only the fewest
        likeliest that have this probability together are drawn; None: all.
    """

    temperature: jax.Array | float = 1.0
    top_k: jax.Array | int | None = None
    top_p: jax.Array | float | None = None


PLAIN = Sampling()


def log_probabilities(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logarithms of the probabilities with which tokens are drawn.

    Args:
      logits: (..., vocabulary).
      sampling: with a temperature above 0.

    Returns:
      (..., vocabulary) float32; -inf for tokens that are never drawn.

    >>> import jax.numpy as jnp
    >>> from models.generation import Sampling, log_probabilities
    >>> logits = jnp.log(jnp.array([0.1, 0.6, 0.3]))
    >>> probabilities = jnp.exp(log_probabilities(logits, Sampling(top_k=2)))
    >>> [round(each, 2) for each in probabilities.tolist()]
    [0.0, 0.67, 0.33]
    """
    logits = logits.astype(jnp.float32)
    # At low temperatures all but the highest would overflow, or be NaN.
    temperature = jnp.maximum(sampling.temperature, jnp.finfo(jnp.float32).tiny)
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    if sampling.top_k is None and sampling.top_p is None:
        return jax.nn.log_softmax(scaled)
    order = jnp.argsort(scaled, axis=-1, descending=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    if sampling.top_k is not None:
        rank = jnp.arange(ranked.shape[-1])
        ranked = jnp.where(rank < sampling.top_k, ranked, -jnp.inf)
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(ranked)
        above = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The likeliest always stays; rounded sums reach 1 before the last token.
        is_kept = (above < sampling.top_p) | (sampling.top_p >= 1)
        ranked = jnp.where(is_kept, ranked, -jnp.inf)
    ranked = jax.nn.log_softmax(ranked)
    return jnp.put_along_axis(scaled, order, ranked, axis=-1, inplace=False)


def draw(keys: jax.Array, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws a token for each row.

    Args:
      keys: (batch,) PRNG keys.
      logits: (batch, vocabulary).
      sampling: how.

    Returns:
      (batch,) int32.
    """
    drawn = jax.vmap(jax.random.categorical)(keys, log_probabilities(logits, sampling))
    likeliest = jnp.argmax(logits, axis=-1)
    return jnp.where(sampling.temperature > 0, drawn, likeliest).astype(jnp.int32)


def stream(
    model: llama.Llama,
    prompt: np.ndarray,
    keys: jax.Array,
    *,
    length: int,
    sampling: Sampling = PLAIN,
    stops: Collection[int] = (),
    positions: int | None = None,
) -> Iterator[np.ndarray]:
    """Continues prompts token by token.

    A row depends on its own prompt and key only. Where the model has read as many
    tokens as it can, it goes on from the last half of them.

    Args:
      model: the model.
      prompt: (batch, prompt length) token ids, at least one per row.
      keys: (batch,) PRNG keys.
      length: most tokens to add to each row.
      sampling: how they are drawn.
      stops: tokens that end a row.
      positions: most tokens that the model reads; None: any number.

    Yields:
      (batch,) int32, the next token of each row; `ENDED` from a row's stop on. No more
      once all rows have ended.

    Raises:
      ValueError: the prompt has no token, or more than `positions`.

    >>> import jax
    >>> import numpy as np
    >>> from flax import nnx
    >>> from models import generation, llama
    >>> config = llama.LlamaConfig(64, 16, 32, num_layers=2, num_heads=2)
    >>> model = llama.Llama(config, rngs=nnx.Rngs(0))
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> prompt = np.array([[1, 2, 3], [1, 2, 3]])
    >>> [tokens.shape for tokens in generation.stream(model, prompt, keys, length=3)]
    [(2,), (2,), (2,)]
    """
    count = prompt.shape[1]
    if not 1 <= count <= (positions or count):
        raise ValueError(f"a prompt of {count} tokens for {positions} positions")
    definition, params = nnx.split(model)
    sampling = _as_arrays(sampling, model.config.vocabulary_size)
    capacity = _rounded(count + length, positions)
    history = [np.asarray(prompt, np.int32)]
    has_ended = np.zeros(len(prompt), bool)
    cache = None
    for index in range(length):
        if cache is None or count == capacity:
            if cache is not None:
                count = max(capacity // 2, 1)
            context = np.concatenate(history, axis=1)[:, -count:]
            padding = _rounded(count, capacity) - count
            context = np.pad(context, ((0, 0), (0, padding)))
            tokens, cache = _begin(
                definition, params, context, count, capacity, keys, index, sampling
            )
        else:
            tokens, cache = _advance(
                definition, params, cache, tokens, count, keys, index, sampling
            )
            count += 1
        known = np.asarray(tokens)
        history.append(known[:, None])
        has_ended |= np.isin(known, list(stops))
        yield np.where(has_ended, ENDED, known)
        if has_ended.all():
            return


def _as_arrays(sampling: Sampling, vocabulary_size: int) -> Sampling:
    """Sampling settings with fixed dtypes, so that other values do not recompile."""
    most = float(np.finfo(np.float32).max)
    temperature, top_k, top_p = sampling
    return Sampling(
        np.float32(min(temperature, most)),
        None if top_k is None else np.int32(min(top_k, vocabulary_size)),
        None if top_p is None else np.float32(top_p),
    )


def _rounded(length: int, most: int | None) -> int:
    rounded = -(-length // _STRIDE) * _STRIDE
    return rounded if most is None else min(rounded, most)


@functools.partial(jax.jit, static_argnames=("definition", "capacity"))
def _begin(
    definition: nnx.GraphDef[llama.Llama],
    params: Any,
    context: jax.Array,
    count: jax.Array,
    capacity: int,
    keys: jax.Array,
    index: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, llama.KeyValueCache]:
    """Reads the first `count` tokens of a context and draws the next one."""
    model = nnx.merge(definition, params)
    cache = model.empty_cache(context.shape[0], capacity)
    # What is written behind `count` is overwritten before it is read.
    logits, cache = model.decode(context, 0, cache, last=count - 1)
    return _draw_next(logits, keys, index, sampling), cache


@functools.partial(jax.jit, static_argnames="definition", donate_argnames="cache")
def _advance(
    definition: nnx.GraphDef[llama.Llama],
    params: Any,
    cache: llama.KeyValueCache,
    tokens: jax.Array,
    position: jax.Array,
    keys: jax.Array,
    index: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, llama.KeyValueCache]:
    """Reads one more token of each row and draws the next one."""
    model = nnx.merge(definition, params)
    logits, cache = model.decode(tokens[:, None], position, cache)
    return _draw_next(logits, keys, index, sampling), cache


def _draw_next(
    logits: jax.Array, keys: jax.Array, index: jax.Array, sampling: Sampling
) -> jax.Array:
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
    # Every process reads them.
    return constrain(draw(keys, logits, sampling), None)
