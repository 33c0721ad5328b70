"""Encoder layers: bidirectional attention, GELU MLP, LayerNorm, dropout."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.encoder_config import EncoderConfig
from models.modules import linear, named_axes


class Scope(NamedTuple):
    """Positions that attention reads, and a bias on its logits.

    Shapes: mask (batch, 1, 1, length) bool or None for all; bias (1, heads, length,
    length) or None.
    """

    mask: jax.Array | None = None
    bias: jax.Array | None = None


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes numbers with probability `rate` and scales the others to keep the mean.

    Args:
      x: any shape.
      rate: at least 0, below 1.
      key: PRNG key; None: `x` itself.
    """
    if key is None or not rate:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def split_key(key: jax.Array | None, count: int) -> jax.Array | list[None]:
    """Splits a key; None gives as many None."""
    return [None] * count if key is None else jax.random.split(key, count)


def norm(config: EncoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over the residual stream, its sums in float32."""
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.norm_epsilon,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels
        scale_metadata=named_axes("embed"),
        bias_metadata=named_axes("embed"),
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Bidirectional self-attention."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        size = config.hidden_size
        make = functools.partial(
            linear, config, rngs, sizes=(size, size), use_bias=True
        )
        self.query = make(axes=("embed", "heads"))
        self.key = make(axes=("embed", "heads"))
        self.value = make(axes=("embed", "heads"))
        self.output = make(axes=("heads", "embed"))
        self.head_size = config.head_size
        self.dropout = config.attention_dropout

    def __call__(self, x: jax.Array, scope: Scope, key: jax.Array | None) -> jax.Array:
        """Maps (batch, length, hidden) to the same shape; a key drops weights out."""

        def heads(linear: nnx.Linear) -> jax.Array:
            return linear(x).reshape(*x.shape[:2], -1, self.head_size)

        query, keys, value = heads(self.query), heads(self.key), heads(self.value)
        bias = None if scope.bias is None else scope.bias.astype(query.dtype)
        if key is None or not self.dropout:
            y = jax.nn.dot_product_attention(query, keys, value, bias, scope.mask)
        else:
            y = self._dropped_out(query, keys, value, scope, key)
        return self.output(y.reshape(x.shape))

    def _dropped_out(
        self,
        query: jax.Array,
        keys: jax.Array,
        value: jax.Array,
        scope: Scope,
        key: jax.Array,
    ) -> jax.Array:
        logits = jnp.einsum(
            "bqhd,bkhd->bhqk", query, keys, preferred_element_type=jnp.float32
        ) / math.sqrt(self.head_size)
        if scope.bias is not None:
            logits += scope.bias.astype(jnp.float32)
        if scope.mask is not None:
            # Finite, so that a row without tokens has no NaN.
            logits = jnp.where(scope.mask, logits, jnp.finfo(jnp.float32).min)
        weights = dropout(jax.nn.softmax(logits), self.dropout, key)
        return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)


class Mlp(nnx.Module):
    """MLP with the exact GELU: down(gelu(up(x)))."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        widen = (config.hidden_size, config.mlp_size)
        self.up = linear(config, rngs, ("embed", "mlp"), widen, use_bias=True)
        self.down = linear(config, rngs, ("mlp", "embed"), widen[::-1], use_bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., hidden) to the same shape."""
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class Layer(nnx.Module):
    """Transformer block: attention and MLP, LayerNorm after each residual sum."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs)
        self.attention_norm = norm(config, rngs)
        self.mlp = Mlp(config, rngs)
        self.mlp_norm = norm(config, rngs)
        self.dropout = config.dropout

    def __call__(self, x: jax.Array, scope: Scope, key: jax.Array | None) -> jax.Array:
        """Maps (batch, length, hidden) to the same shape; a key turns dropout on."""
        for_weights, for_attention, for_mlp = split_key(key, 3)
        y = dropout(self.attention(x, scope, for_weights), self.dropout, for_attention)
        x = self.attention_norm(x + y)
        return self.mlp_norm(x + dropout(self.mlp(x), self.dropout, for_mlp))
