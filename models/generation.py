"""Sampling text from a model, one token at a time, with a key-value cache."""

import jax
import jax.numpy as jnp
from flax import nnx

from models import llama


@nnx.jit(static_argnames="length")
def generate(
    model: llama.Llama,
    prompt: jax.Array,
    key: jax.Array,
    *,
    length: int,
    temperature: jax.Array | float = 1.0,
) -> jax.Array:
    """Continues prompts by sampling.

    Compiled once per shape of the prompt and `length`.

    Args:
      model: the model.
      prompt: (batch, prompt length) token ids, at least one per row.
      key: PRNG key.
      length: tokens to add to each row.
      temperature: divides the logits; small values approach greedy choice.

    Returns:
      (batch, length) int32, the sampled tokens.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from models import generation, llama
    >>> config = llama.LlamaConfig(64, 16, 32, num_layers=2, num_heads=2)
    >>> model = llama.Llama(config, rngs=nnx.Rngs(0))
    >>> prompt = jnp.array([[1, 2, 3]])
    >>> generation.generate(model, prompt, jax.random.key(0), length=5).shape
    (1, 5)
    """
    batch_size, prompt_length = prompt.shape
    cache = model.empty_cache(batch_size, prompt_length + length)
    logits, cache = model.decode(prompt, 0, cache)

    def step(carry, position):
        logits, cache = carry
        key_now = jax.random.fold_in(key, position)
        tokens = jax.random.categorical(key_now, logits / temperature)
        return model.decode(tokens[:, None], position, cache), tokens

    positions = prompt_length + jnp.arange(length)
    _, tokens = jax.lax.scan(step, (logits, cache), positions)
    return tokens.T
