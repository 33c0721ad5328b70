"""LLaMA in Flax NNX: layers scanned, parameters stacked on a leading axis.

Parameters are named `embedding/embedding`, `norm/scale`, `head/kernel` (unless tied to
the embedding) and, with a leading axis of `num_layers`,
`layers/attention/{query,key,value,output}/kernel`,
`layers/mlp/{gate,up,down}/kernel`, `layers/{attention_norm,mlp_norm}/scale`.
Kernels are (in, out). Every parameter has logical axis names (`out_sharding` metadata,
see `nnx.get_partition_spec`); this module places no array on a device.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models import parameters
from models.config import PRESETS, LlamaConfig
from models.layers import Cache, KeyValueCache, Layer, norm
from models.loss import TokenLoss, hidden_loss, token_loss
from models.matrices import matrix_axes
from models.modules import (
    apply_layer,
    embedding,
    linear,
    scan_layers,
    stacked_layers,
)
from models.rotary import apply_rotary, rotary_angles

__all__ = [
    "PRESETS",
    "KeyValueCache",
    "Llama",
    "LlamaConfig",
    "LlamaParts",
    "TokenLoss",
    "abstract_params",
    "apply_rotary",
    "definition",
    "matrix_axes",
    "parts",
    "rotary_angles",
    "token_loss",
]


class Llama(nnx.Module):
    """LLaMA: a decoder-only transformer from token ids to next-token logits.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> from models import llama
    >>> config = llama.LlamaConfig(64, 16, 32, num_layers=2, num_heads=2)
    >>> model = llama.Llama(config, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((1, 8), jnp.int32)).shape
    (1, 8, 64)
    >>> model.layers.mlp.up.kernel.shape
    (2, 16, 32)
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        sizes = (config.vocabulary_size, config.hidden_size)
        self.embedding = embedding(config, rngs, ("vocab", "embed"), sizes)
        self.layers = stacked_layers(
            functools.partial(Layer, config), config.num_layers, rngs
        )
        self.norm = norm(config, rngs)
        if not config.tie_embeddings:
            self.head = linear(config, rngs, ("embed", "vocab"), sizes[::-1])
            # float32 logits: bfloat16 ones would lose most digits of the loss.
            self.head.preferred_element_type = jnp.float32

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens (batch, length) to float32 logits (batch, length, vocabulary)."""
        return self.logits(self.hidden_states(tokens))

    def hidden_states(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """Inputs of the head: (batch, length, hidden) in the compute dtype.

        Args:
          tokens: (batch, length) token ids.
          positions: (batch, length) int32, of tokens in their texts, where rows have
            several. None: 0, 1, ...
          segments: (batch, length) int32, equal for tokens of the same text, which do
            not see others. None: every row is one text.
        """
        if positions is None:
            positions = jnp.arange(tokens.shape[1])
        return self._run(tokens, positions, None, segments)[0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps `hidden_states` to float32 logits (..., vocabulary)."""
        if not self.config.tie_embeddings:
            return self.head(hidden)
        embedding = self.embedding.embedding[...].astype(hidden.dtype)
        return jnp.einsum(
            "...h,vh->...v", hidden, embedding, preferred_element_type=jnp.float32
        )

    def empty_cache(self, batch_size: int, length: int) -> KeyValueCache:
        """Creates an empty cache of `length` positions for `decode`."""
        config = self.config
        heads = (config.key_value_heads, config.head_size)
        shape = (config.num_layers, batch_size, length, *heads)
        return KeyValueCache(
            jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)
        )

    def decode(
        self,
        tokens: jax.Array,
        start: jax.Array | int,
        cache: KeyValueCache,
        last: jax.Array | int = -1,
    ) -> tuple[jax.Array, KeyValueCache]:
        """Decodes further tokens of sequences whose start is in the cache.

        Args:
          tokens: (batch, new) token ids at positions `start`, `start + 1`, ...
          start: number of cached positions; `start + new` must fit the cache.
          cache: from `empty_cache` or the previous call.
          last: index of the new token whose next-token logits are returned.

        Returns:
          Logits (batch, vocabulary), float32, after the token `last`; the cache.
        """
        positions = start + jnp.arange(tokens.shape[1])
        hidden, cache = self._run(tokens, positions, cache)
        return self.logits(hidden[:, last]), cache

    def _run(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Cache,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        apply = _layer_at(self.config, positions, segments)
        x = self.embedding(tokens)
        x, cache = scan_layers(self.layers, apply, x, cache, self.config.remat)
        return self.norm(x), cache


def _layer_at(
    config: LlamaConfig, positions: jax.Array, segments: jax.Array | None = None
) -> Callable[..., Any]:
    """Function that applies a layer to activations at some positions."""
    rotary = rotary_angles(
        positions, config.head_size, config.rotary_base, config.rotary_scaling
    )
    return lambda layer, x, cache: layer(x, positions, rotary, cache, segments)


class LlamaParts(NamedTuple):
    """A LLaMA as three functions of its parameters, for updates layer by layer.

    `outside` are the parameters without `layers`, as nested dictionaries.

    Attributes:
      before: (outside, tokens) -> activations (batch, length, hidden).
      layer: (parameters of one layer, activations, positions, segments) ->
        activations; the last two as in `Llama.hidden_states`.
      after: (outside, activations, targets, mask) -> `TokenLoss`.
    """

    before: Callable[[Any, jax.Array], jax.Array]
    layer: Callable[..., jax.Array]
    after: Callable[[Any, jax.Array, jax.Array, jax.Array], TokenLoss]


def parts(config: LlamaConfig) -> LlamaParts:
    """Splits a LLaMA and its token loss into embedding, layer and head.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from models import llama, parameters
    >>> config = llama.LlamaConfig(64, 16, 32, num_layers=2, num_heads=2)
    >>> before, layer, after = llama.parts(config)
    >>> outside = nnx.to_pure_dict(
    ...     nnx.state(llama.Llama(config, rngs=nnx.Rngs(0)), nnx.Param)
    ... )
    >>> del outside["layers"]
    >>> before(outside, jnp.zeros((1, 8), jnp.int32)).shape
    (1, 8, 16)
    """
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    layer_definition = nnx.graphdef(model.layers)
    del model.layers
    outside_definition = nnx.graphdef(model)

    def before(outside, tokens):
        return nnx.merge(outside_definition, outside).embedding(tokens)

    def layer(params, x, positions=None, segments=None):
        if positions is None:
            positions = jnp.arange(x.shape[1])
        apply = _layer_at(config, positions, segments)
        return apply_layer(layer_definition, params, apply, x, None)[0]

    def after(outside, x, targets, mask):
        model = nnx.merge(outside_definition, outside)
        return hidden_loss(model, model.norm(x), targets, mask)

    return LlamaParts(before, layer, after)


def abstract_params(config: LlamaConfig) -> Any:
    """Shapes and dtypes of a LLaMA's parameters, as nested dictionaries."""
    return parameters.abstract(functools.partial(Llama, config))


@functools.cache
def definition(config: LlamaConfig) -> nnx.GraphDef[Llama]:
    """Graph definition of a LLaMA: `nnx.merge` adds the parameters."""
    return parameters.definition(functools.partial(Llama, config))
