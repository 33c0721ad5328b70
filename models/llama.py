"""LLaMA in Flax NNX: layers scanned, parameters stacked on a leading axis.

Parameters are named `embedding/embedding`, `norm/scale`, `head/kernel` (unless tied to
the embedding) and, with a leading axis of `num_layers`,
`layers/attention/{query,key,value,output}/kernel`,
`layers/mlp/{gate,up,down}/kernel`, `layers/{attention_norm,mlp_norm}/scale`.
Kernels are (in, out). Every parameter has logical axis names (`out_sharding` metadata,
see `nnx.get_partition_spec`); this module places no array on a device.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from models import parameters
from models.config import PRESETS, LlamaConfig
from models.layers import (
    Cache,
    KeyValueCache,
    Layer,
    constrain,
    linear,
    named_axes,
    norm,
)
from models.loss import TokenLoss, token_loss
from models.rotary import apply_rotary, rotary_angles

__all__ = [
    "PRESETS",
    "KeyValueCache",
    "Llama",
    "LlamaConfig",
    "TokenLoss",
    "abstract_params",
    "apply_rotary",
    "definition",
    "matrix_axes",
    "rotary_angles",
    "token_loss",
]

# "dots" saves products with weights: unlike attention's, they have no batch axes.
_SAVED = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


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
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def create_layers(rngs: nnx.Rngs) -> Layer:
            return Layer(config, rngs)

        self.config = config
        self.embedding = nnx.Embed(
            config.vocabulary_size,
            config.hidden_size,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            embedding_init=nnx.initializers.normal(config.init_std),
            embedding_metadata=named_axes("vocab", "embed"),
            rngs=rngs,
        )
        self.layers = create_layers(rngs)
        self.norm = norm(config, rngs)
        if not config.tie_embeddings:
            sizes = (config.hidden_size, config.vocabulary_size)
            self.head = linear(config, rngs, ("embed", "vocab"), sizes)
            # float32 logits: bfloat16 ones would lose most digits of the loss.
            self.head.preferred_element_type = jnp.float32

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens (batch, length) to float32 logits (batch, length, vocabulary)."""
        return self.logits(self.hidden_states(tokens))

    def hidden_states(self, tokens: jax.Array) -> jax.Array:
        """Inputs of the head: (batch, length, hidden) in the compute dtype."""
        positions = jnp.arange(tokens.shape[1])
        return self._run(tokens, positions, None)[0]

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
        self, tokens: jax.Array, positions: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        config = self.config
        rotary = rotary_angles(
            positions, config.head_size, config.rotary_base, config.rotary_scaling
        )
        layer_def, layers = nnx.split(self.layers)

        def layer(x, inputs):
            parameters, cache = inputs
            x = constrain(x, "batch", None, None)
            return nnx.merge(layer_def, parameters)(x, positions, rotary, cache)

        if config.remat != "none":
            # prevent_cse is not needed inside a scan.
            layer = jax.checkpoint(
                layer, prevent_cse=False, policy=_SAVED[config.remat]
            )
        x, cache = jax.lax.scan(layer, self.embedding(tokens), (layers, cache))
        return self.norm(x), cache


def abstract_params(config: LlamaConfig) -> Any:
    """Shapes and dtypes of a LLaMA's parameters, as nested dictionaries."""
    return parameters.abstract(functools.partial(Llama, config))


@functools.cache
def definition(config: LlamaConfig) -> nnx.GraphDef[Llama]:
    """Graph definition of a LLaMA: `nnx.merge` adds the parameters."""
    return parameters.definition(functools.partial(Llama, config))


_MATRIX = re.compile(r"\b(attention|mlp)/\w+/kernel\b")


def matrix_axes(params: Any) -> Any:
    """Dimension numbers of the attention and MLP kernels, for matrix optimizers.

    Pass the function itself as `dimension_numbers` to `subtrack_jax.subtrack` or
    as `muon_weight_dimension_numbers` to `optax.contrib.muon`.

    Args:
      params: a tree of the model's parameters, gradients or shapes: an
        `nnx.State` or the nested dictionaries of `nnx.to_pure_dict`.

    Returns:
      The same tree with `MuonDimensionNumbers` (in, out) for attention and MLP
      kernels (the leading axis of layers is a batch axis), None for the embedding,
      the head and the norms.

    >>> from models import llama
    >>> config = llama.LlamaConfig(64, 16, 32, num_layers=2, num_heads=2)
    >>> axes = llama.matrix_axes(llama.abstract_params(config))
    >>> axes["layers"]["mlp"]["up"]["kernel"]
    MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    >>> axes["head"]["kernel"] is None
    True
    """

    def axes(path, leaf):
        del leaf
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return MuonDimensionNumbers(-2, -1) if _MATRIX.search(name) else None

    return jax.tree_util.tree_map_with_path(axes, params)
