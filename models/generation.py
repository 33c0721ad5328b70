"""Token sampling from a language model, with a key-value cache."""

import functools
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import llama
from models.modules import constrain

ENDED = -1  # stands for the tokens of a row that has ended
# Lengths are rounded up to a multiple of this, so that few programs are compiled.
_STRIDE = 64


class Sampling(NamedTuple):
    """Sampling settings: temperature, top-k and top-p.

    Attributes:
      temperature: divides the logits; 0: greedy, the likeliest token is taken.
      top_k: number of likeliest tokens to draw from; None: all.
      top_p: after top_k and the temperature, tokens are drawn from the smallest set
        of likeliest tokens whose total probability reaches this; None: all.
    """

    temperature: jax.Array | float = 1.0
    top_k: jax.Array | int | None = None
    top_p: jax.Array | float | None = None


PLAIN = Sampling()


def log_probabilities(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Log-probabilities of the next token under temperature, top-k and top-p.

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
    # Subtracting the maximum first: at low temperatures logits would overflow.
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
        # Rounded sums may reach 1 before the last token, so top_p=1 keeps all.
        is_kept = (above < sampling.top_p) | (sampling.top_p >= 1)
        ranked = jnp.where(is_kept, ranked, -jnp.inf)
    ranked = jax.nn.log_softmax(ranked)
    return jnp.put_along_axis(scaled, order, ranked, axis=-1, inplace=False)


def draw(keys: jax.Array, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token per row, or the likeliest one at temperature 0.

    Args:
      keys: (batch,) PRNG keys.
      logits: (batch, vocabulary).
      sampling: temperature, top-k and top-p.

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
    """Generates text from prompts, one token of each row at a time.

    A row depends only on its own prompt and key. When the cache is full, generation
    continues from the second half of its tokens.

    Args:
      model: the model.
      prompt: (batch, prompt length) token ids, at least one per row.
      keys: (batch,) PRNG keys.
      length: maximum number of tokens to add to each row.
      sampling: temperature, top-k and top-p.
      stops: tokens that end a row.
      positions: maximum number of tokens that the model can read; None: no limit.

    Yields:
      (batch,) int32, the next token of each row, `ENDED` from its stop token on. Ends
      when all rows have ended.

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
    """Converts settings to fixed dtypes, so that new values do not recompile."""
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
    """Fills a new cache from `count` tokens of context and draws the next token."""
    model = nnx.merge(definition, params)
    cache = model.empty_cache(context.shape[0], capacity)
    # Cache entries of the padding behind `count` are overwritten before being read.
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
    """Decodes one token per row into the cache and draws the next token."""
    model = nnx.merge(definition, params)
    logits, cache = model.decode(tokens[:, None], position, cache)
    return _draw_next(logits, keys, index, sampling), cache


def _draw_next(
    logits: jax.Array, keys: jax.Array, index: jax.Array, sampling: Sampling
) -> jax.Array:
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
    # Replicated, because every process reads the tokens.
    return constrain(draw(keys, logits, sampling), None)
