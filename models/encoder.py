"""BERT, RoBERTa and MPNet encoders in Flax NNX, with heads for sentence tasks.

Layers are scanned, their parameters stacked on a leading axis of `num_layers`.
Parameters are named `embedding/{word,position,type}/embedding`,
`embedding_norm/{scale,bias}`, `relative_bias/embedding` (MPNet);
`layers/attention/{query,key,value,output}/{kernel,bias}`,
`layers/mlp/{up,down}/{kernel,bias}`, `layers/{attention_norm,mlp_norm}/{scale,bias}`;
`pooler/{kernel,bias}` (BERT, and for choices), `head/dense/{kernel,bias}` (without a
pooler), `head/output/{kernel,bias}`.
Kernels are (in, out). Every parameter has logical axis names (`out_sharding` metadata,
see `nnx.get_partition_spec`); this module places no array on a device.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import parameters
from models.encoder_config import EncoderConfig
from models.encoder_layers import Layer, Scope, dropout, norm, split_key
from models.matrices import matrix_axes
from models.modules import embedding, linear, scan_layers, stacked_layers
from models.relative_positions import relative_buckets

__all__ = [
    "Encoder",
    "EncoderConfig",
    "abstract_params",
    "definition",
    "matrix_axes",
]

NUM_BUCKETS = 32


class Embedding(nnx.Module):
    """Sum of the embeddings of tokens, positions and token types."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        make = functools.partial(embedding, config, rngs)
        self.word = make(("vocab", "embed"), (config.vocabulary_size, width))
        self.position = make(("positions", "embed"), (config.num_positions, width))
        if config.num_types:
            self.type = make(("types", "embed"), (config.num_types, width))
        self.first_position = config.first_position
        self.num_types = config.num_types

    def __call__(self, tokens: jax.Array, types: jax.Array | None) -> jax.Array:
        """Maps ids (batch, length) to (batch, length, hidden)."""
        positions = self.first_position + jnp.arange(tokens.shape[1])
        x = self.word(tokens) + self.position(positions)[None]
        if self.num_types == 0:
            return x
        if types is None or self.num_types == 1:
            return x + self.type.embedding[0].astype(x.dtype)[None, None]
        return x + self.type(types)


class Head(nnx.Module):
    """Head of a sentence task: dropout and a linear layer, after tanh(dense)."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        rate = config.head_dropout
        self.rate = config.dropout if rate is None else rate
        self.dense = nnx.data(None)
        if not config.has_pooler:
            sizes = (width, width)
            self.dense = linear(config, rngs, ("embed", "pooled"), sizes, use_bias=True)
        sizes = (width, config.num_labels)
        self.output = linear(config, rngs, ("embed", "labels"), sizes, use_bias=True)
        # float32 logits: bfloat16 ones would lose most digits of the loss.
        self.output.preferred_element_type = jnp.float32

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Maps (batch, hidden) to float32 logits (batch, labels)."""
        before, after = split_key(key, 2)
        if self.dense is not None:
            x = jnp.tanh(self.dense(dropout(x, self.rate, before)))
        return self.output(dropout(x, self.rate, after)).astype(jnp.float32)


class Encoder(nnx.Module):
    """Encoder with a head: from token ids to logits of a sentence or of a pair.

    Raises:
      ValueError: the config has a head for classes but no labels.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> from models import encoder
    >>> config = encoder.EncoderConfig(
    ...     "bert", 64, 16, 32, 2, 4, 24, 2, 0, labels=("no", "yes", "maybe")
    ... )
    >>> model = encoder.Encoder(config, rngs=nnx.Rngs(0))
    >>> tokens = jnp.zeros((5, 8), jnp.int32)
    >>> model.logits(tokens, lengths=jnp.array([8, 3, 5, 1, 8])).shape
    (5, 3)
    >>> model.layers.mlp.up.kernel.shape
    (2, 16, 32)
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        if config.num_labels == 0:
            raise ValueError(
                "head='classification' needs labels, the names of the classes: set "
                "them, or use head='regression'"
            )
        self.config = config
        width = config.hidden_size
        self.embedding = Embedding(config, rngs)
        self.embedding_norm = norm(config, rngs)
        self.layers = stacked_layers(
            functools.partial(Layer, config), config.num_layers, rngs
        )
        if config.family == "mpnet":
            sizes = (NUM_BUCKETS, config.num_heads)
            self.relative_bias = embedding(config, rngs, ("buckets", "heads"), sizes)
        if config.has_pooler:
            sizes = (width, width)
            axes = ("embed", "pooled")
            self.pooler = linear(config, rngs, axes, sizes, use_bias=True)
        self.head = Head(config, rngs)

    def logits(
        self,
        tokens: jax.Array,
        token_types: jax.Array | None = None,
        lengths: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the head, from the first token of each sequence.

        Args:
          tokens: (batch, length) ids, padded at the end; for a choice (batch,
            candidates, length). At most `config.max_length_tokens` long.
          token_types: the same shape, 0 for the first text of a pair and 1 for the
            second; None: all 0. Not used by models with fewer than two types.
          lengths: (batch,), or (batch, candidates): tokens before the padding; None:
            no padding. The logits of a row without tokens are finite.
          key: PRNG key for dropout; None: no dropout.

        Returns:
          float32: (batch, labels); regression (batch, 1); choice (batch, candidates).
        """
        batch = tokens.shape[:-1]
        if self.config.head == "choice":
            tokens = tokens.reshape(-1, tokens.shape[-1])
            if token_types is not None:
                token_types = token_types.reshape(tokens.shape)
            if lengths is not None:
                lengths = lengths.reshape(-1)
        below, above = split_key(key, 2)
        first = self.hidden_states(tokens, token_types, lengths, below)[:, 0]
        if self.config.has_pooler:
            first = jnp.tanh(self.pooler(first))
        logits = self.head(first, above)
        return logits.reshape(batch) if self.config.head == "choice" else logits

    def hidden_states(
        self,
        tokens: jax.Array,
        token_types: jax.Array | None = None,
        lengths: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Outputs of the last layer: (batch, length, hidden) in the compute dtype.

        Arguments are those of `logits`, without candidates. Outputs at padding mean
        nothing.

        Raises:
          ValueError: the sequences are longer than the positions.
        """
        config, length = self.config, tokens.shape[1]
        if length > config.max_length_tokens:
            raise ValueError(
                f"sequences of {length} tokens do not fit: the model reads at most "
                f"{config.max_length_tokens}"
            )
        for_embedding, for_layers = split_key(key, 2)
        keys = None
        if for_layers is not None:
            keys = jax.random.split(for_layers, config.num_layers)
        scope = self._scope(length, lengths)
        x = self.embedding_norm(self.embedding(tokens, token_types))
        x = dropout(x, config.dropout, for_embedding)

        def apply(layer, x, key):
            return layer(x, scope, key), None

        return scan_layers(self.layers, apply, x, keys, config.remat)[0]

    def _scope(self, length: int, lengths: jax.Array | None) -> Scope:
        mask = bias = None
        if lengths is not None:
            mask = (jnp.arange(length) < lengths[:, None])[:, None, None]
        if self.config.family == "mpnet":
            bias = self.relative_bias(jnp.asarray(relative_buckets(length)))
            bias = jnp.moveaxis(bias, -1, 0)[None]
        return Scope(mask, bias)


def abstract_params(config: EncoderConfig) -> Any:
    """Shapes and dtypes of an encoder's parameters, as nested dictionaries."""
    return parameters.abstract(functools.partial(Encoder, config))


@functools.cache
def definition(config: EncoderConfig) -> nnx.GraphDef[Encoder]:
    """Graph definition of an encoder: `nnx.merge` adds the parameters."""
    return parameters.definition(functools.partial(Encoder, config))
