"""LLaMA layers: causal attention, SwiGLU MLP, RMSNorm."""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import LlamaConfig
from models.modules import linear, named_axes
from models.rotary import Rotary, apply_rotary


class KeyValueCache(NamedTuple):
    """Key-value cache for incremental decoding.

    Shapes: keys and values (layers, batch, length, key_value_heads, head_size) in the
    compute dtype; inside a layer without the first axis.
    """

    keys: jax.Array
    values: jax.Array


# A function given a cache returns a cache; given None it returns None.
Cache = TypeVar("Cache", KeyValueCache, None)


def norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm over the residual stream."""
    return nnx.RMSNorm(
        config.hidden_size,
        epsilon=config.norm_epsilon,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        scale_metadata=named_axes("embed"),
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Causal grouped-query self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        hidden = config.hidden_size
        own = config.num_heads * config.head_size
        shared = config.key_value_heads * config.head_size
        self.query = linear(config, rngs, ("embed", "heads"), (hidden, own))
        self.key = linear(config, rngs, ("embed", "kv_heads"), (hidden, shared))
        self.value = linear(config, rngs, ("embed", "kv_heads"), (hidden, shared))
        self.output = linear(config, rngs, ("heads", "embed"), (own, hidden))
        self.head_size = config.head_size

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        rotary: Rotary,
        cache: Cache,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Applies causal attention, to `x` alone or to a cache and `x`.

        Args:
          x: (batch, length, hidden).
          positions: (length,) int32, consecutive, with a cache; else not used.
          rotary: the angles of these positions.
          cache: this layer's keys and values before `positions`; None: `x` starts
            the sequence.
          segments: (batch, length), without a cache; attention stays within equal
            ones. None: within rows.

        Returns:
          (batch, length, hidden), and the cache with these positions added.
        """

        def heads(linear: nnx.Linear) -> jax.Array:
            return linear(x).reshape(*x.shape[:2], -1, self.head_size)

        query = apply_rotary(heads(self.query), rotary)
        key = apply_rotary(heads(self.key), rotary)
        value = heads(self.value)
        if cache is None:
            y = jax.nn.dot_product_attention(
                query, key, value, mask=_within(segments), is_causal=True
            )
        else:
            cache = KeyValueCache(
                _write(cache.keys, key, positions[0]),
                _write(cache.values, value, positions[0]),
            )
            seen = jnp.arange(cache.keys.shape[1]) <= positions[:, None]
            y = jax.nn.dot_product_attention(
                query, cache.keys, cache.values, mask=seen[None, None]
            )
        return self.output(y.reshape(*x.shape[:2], -1)), cache


def _within(segments: jax.Array | None) -> jax.Array | None:
    """Mask of queries and keys of equal segments: (batch, 1, length, length)."""
    if segments is None:
        return None
    return (segments[:, :, None] == segments[:, None, :])[:, None]


def _write(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(cache, new, start, axis=1)


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        widen = (config.hidden_size, config.mlp_size)
        self.gate = linear(config, rngs, ("embed", "mlp"), widen)
        self.up = linear(config, rngs, ("embed", "mlp"), widen)
        self.down = linear(config, rngs, ("mlp", "embed"), widen[::-1])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., hidden) to the same shape."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """Transformer block: pre-norm attention and MLP with residual connections."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.attention_norm = norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm(config, rngs)
        self.mlp = Mlp(config, rngs)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        rotary: Rotary,
        cache: Cache,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Applies the block; arguments and results are those of `Attention`."""
        normed = self.attention_norm(x)
        y, cache = self.attention(normed, positions, rotary, cache, segments)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache
