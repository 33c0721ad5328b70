"""LLaMA in Flax NNX: layers scanned, parameters stacked on a leading axis.

Parameters are named `embedding/embedding`, `norm/scale`, `head/kernel` and, with
a leading axis of `num_layers`, `layers/attention/{query,key,value,output}/kernel`,
`layers/mlp/{gate,up,down}/kernel`, `layers/{attention_norm,mlp_norm}/scale`.
Kernels are (in, out). Every parameter carries logical axis names (`out_sharding`
metadata, see `nnx.get_partition_spec`); nothing here places an array on a device.
"""

import dataclasses
import re
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from optax.contrib import MuonDimensionNumbers

Float = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape and the arithmetic of a LLaMA.

    Attributes:
      vocabulary_size: rows of the embedding, columns of the (untied) head.
      hidden_size: width of the residual stream.
      mlp_size: width inside the gated MLP.
      num_layers: transformer blocks.
      num_heads: attention heads; each has `hidden_size / num_heads` dimensions.
      num_key_value_heads: heads of keys and values, each shared by a group of
        query heads; None gives every query head its own.
      rotary_base: base of the rotary frequencies.
      norm_epsilon: added to the mean square in RMSNorm.
      init_std: standard deviation of every initial kernel and embedding.
      dtype: dtype of the computation; norms, softmax and loss stay in float32.
      param_dtype: dtype of the parameters.
      remat: recompute a layer's activations in the backward pass, so that only
        its input is stored.

    Raises:
      ValueError: a size is not positive, or heads do not divide what they share.
    """

    vocabulary_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int | None = None
    rotary_base: float = 10_000.0
    norm_epsilon: float = 1e-6
    init_std: float = 0.02
    dtype: Float = "float32"
    param_dtype: Float = "float32"
    remat: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not (value > 0 or value is False):
                raise ValueError(f"{field.name} must be positive, got {value}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of twice "
                f"num_heads={self.num_heads}: rotary positions turn pairs"
            )
        if self.num_heads % self.key_value_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )

    @property
    def head_size(self) -> int:
        """Dimensions of a head."""
        return self.hidden_size // self.num_heads

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values, whether given or not."""
        return self.num_key_value_heads or self.num_heads


def _published(hidden: int, mlp: int, heads: int, layers: int) -> LlamaConfig:
    return LlamaConfig(32_000, hidden, mlp, num_layers=layers, num_heads=heads)


# The shapes of the GaLore and SubTrack++ papers. Their names count what GaLore's
# do, not always the parameters.
PRESETS = {
    "llama-9m": _published(128, 352, heads=4, layers=4),
    "llama-20m": _published(256, 688, heads=4, layers=4),
    "llama-35m": _published(384, 1024, heads=8, layers=6),
    "llama-60m": _published(512, 1376, heads=8, layers=8),
    "llama-130m": _published(768, 2048, heads=12, layers=12),
    "llama-350m": _published(1024, 2736, heads=16, layers=24),
    "llama-1b": _published(2048, 5461, heads=32, layers=24),
    "llama-3b": _published(2560, 6848, heads=32, layers=32),
    "llama-7b": _published(4096, 11008, heads=32, layers=32),
}


class KeyValueCache(NamedTuple):
    """Keys and values of the positions read so far, for incremental decoding.

    Both are (layers, batch, length, key_value_heads, head_size) in the compute
    dtype; inside a layer the first axis is gone.
    """

    keys: jax.Array
    values: jax.Array


# Whoever passes a cache gets one back.
Cache = TypeVar("Cache", KeyValueCache, None)


class Rotary(NamedTuple):
    """Cosines and sines of the rotary angles, (length, head_size / 2), float32."""

    cos: jax.Array
    sin: jax.Array


def rotary_angles(
    positions: jax.Array, head_size: int, base: float = 10_000.0
) -> Rotary:
    """Angles by which the pairs of a head's dimensions turn at each position.

    Args:
      positions: (length,) integers.
      head_size: dimensions of a head, even.
      base: pair i turns by `position * base^(-2 i / head_size)` radians.
    """
    exponents = jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size
    angles = positions.astype(jnp.float32)[:, None] * base**-exponents
    return Rotary(jnp.cos(angles), jnp.sin(angles))


def apply_rotary(x: jax.Array, rotary: Rotary) -> jax.Array:
    """Rotates queries or keys by their positions.

    The pair of dimension i is (i, i + head_size / 2), as in Hugging Face's LLaMA.

    Args:
      x: (batch, length, heads, head_size).
      rotary: from `rotary_angles` for the same positions.

    Returns:
      The same shape and dtype; dot products of two rotated vectors depend on
      their positions only through the difference.
    """
    cos, sin = rotary.cos[:, None, :], rotary.sin[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _named(*axes: str) -> dict[str, Any]:
    # Not eager: the names are logical, only a trainer with a mesh can place them.
    return {"out_sharding": axes, "eager_sharding": False}


def _linear(
    config: LlamaConfig, rngs: nnx.Rngs, axes: tuple[str, str], sizes: tuple[int, int]
) -> nnx.Linear:
    return nnx.Linear(
        *sizes,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nnx.initializers.normal(config.init_std),
        kernel_metadata=_named(*axes),
        rngs=rngs,
    )


def _norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden_size,
        epsilon=config.norm_epsilon,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        scale_metadata=_named("embed"),
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped keys and values."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        hidden = config.hidden_size
        shared = config.key_value_heads * config.head_size
        self.query = _linear(config, rngs, ("embed", "heads"), (hidden, hidden))
        self.key = _linear(config, rngs, ("embed", "kv_heads"), (hidden, shared))
        self.value = _linear(config, rngs, ("embed", "kv_heads"), (hidden, shared))
        self.output = _linear(config, rngs, ("heads", "embed"), (hidden, hidden))
        self.head_size = config.head_size

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        rotary: Rotary,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """Attends to all positions up to each one's own.

        Args:
          x: (batch, length, hidden).
          positions: (length,) int32, consecutive.
          rotary: the angles of these positions.
          cache: this layer's past, to be continued at `positions`; None if x is all.

        Returns:
          (batch, length, hidden), and the cache with these positions written in.
        """

        def heads(linear: nnx.Linear) -> jax.Array:
            return linear(x).reshape(*x.shape[:2], -1, self.head_size)

        query = apply_rotary(heads(self.query), rotary)
        key = apply_rotary(heads(self.key), rotary)
        value = heads(self.value)
        if cache is None:
            y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        else:
            cache = KeyValueCache(
                _write(cache.keys, key, positions[0]),
                _write(cache.values, value, positions[0]),
            )
            seen = jnp.arange(cache.keys.shape[1]) <= positions[:, None]
            y = jax.nn.dot_product_attention(
                query, cache.keys, cache.values, mask=seen[None, None]
            )
        return self.output(y.reshape(x.shape)), cache


def _write(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(cache, new, start, axis=1)


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        widen = (config.hidden_size, config.mlp_size)
        self.gate = _linear(config, rngs, ("embed", "mlp"), widen)
        self.up = _linear(config, rngs, ("embed", "mlp"), widen)
        self.down = _linear(config, rngs, ("mlp", "embed"), widen[::-1])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., hidden) to the same shape."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """One block: attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = Mlp(config, rngs)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        rotary: Rotary,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """The arguments and results of `Attention`."""
        y, cache = self.attention(self.attention_norm(x), positions, rotary, cache)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class Llama(nnx.Module):
    """A decoder-only transformer from token ids to next-token logits.

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
            embedding_metadata=_named("vocab", "embed"),
            rngs=rngs,
        )
        self.layers = create_layers(rngs)
        self.norm = _norm(config, rngs)
        self.head = _linear(
            config,
            rngs,
            ("embed", "vocab"),
            (config.hidden_size, config.vocabulary_size),
        )
        # A loss of bfloat16 logits would lose most of its digits.
        self.head.preferred_element_type = jnp.float32

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (batch, length, vocabulary), float32, of tokens (batch, length)."""
        return self.head(self.hidden_states(tokens))

    def hidden_states(self, tokens: jax.Array) -> jax.Array:
        """What the head reads: (batch, length, hidden) in the compute dtype."""
        positions = jnp.arange(tokens.shape[1])
        return self._run(tokens, positions, None)[0]

    def empty_cache(self, batch_size: int, length: int) -> KeyValueCache:
        """A cache for `decode` with room for `length` positions."""
        config = self.config
        heads = (config.key_value_heads, config.head_size)
        shape = (config.num_layers, batch_size, length, *heads)
        return KeyValueCache(
            jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)
        )

    def decode(
        self, tokens: jax.Array, start: jax.Array | int, cache: KeyValueCache
    ) -> tuple[jax.Array, KeyValueCache]:
        """Reads more tokens of sequences whose beginning is in the cache.

        Args:
          tokens: (batch, new) token ids at positions `start`, `start + 1`, ...
          start: positions read before; `start + new` must fit the cache.
          cache: from `empty_cache` or the call before.

        Returns:
          Logits (batch, vocabulary), float32, after the last token; the cache.
        """
        positions = start + jnp.arange(tokens.shape[1])
        hidden, cache = self._run(tokens, positions, cache)
        return self.head(hidden[:, -1]), cache

    def _run(
        self, tokens: jax.Array, positions: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        config = self.config
        rotary = rotary_angles(positions, config.head_size, config.rotary_base)
        layer_def, layers = nnx.split(self.layers)

        def layer(x, inputs):
            parameters, cache = inputs
            return nnx.merge(layer_def, parameters)(x, positions, rotary, cache)

        if config.remat:
            # Inside a scan XLA cannot undo the recomputation, so need not be told.
            layer = jax.checkpoint(layer, prevent_cse=False)
        x, cache = jax.lax.scan(layer, self.embedding(tokens), (layers, cache))
        return self.norm(x), cache


class TokenLoss(NamedTuple):
    """Sums over the tokens of a batch that count; all are ().

    Means are left to the caller, who may add up several batches first.
    """

    loss: jax.Array  # float32; cross-entropy in nats
    squared_log_z: jax.Array  # float32; logsumexp(logits)^2, for PaLM's z-loss
    count: jax.Array  # int32; the tokens


def token_loss(
    model: Llama,
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
        logits = model.head(hidden)
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


_MATRIX = re.compile(r"\b(attention|mlp)/\w+/kernel\b")


def matrix_axes(params: Any) -> Any:
    """Which axes of which parameters form the matrices of the linear layers.

    For optimizers that treat matrices apart, such as `optax.contrib.muon` or
    `subtrack_jax.subtrack`: pass the function itself as `dimension_numbers`.

    Args:
      params: a tree of the model's parameters, gradients or shapes: an
        `nnx.State` or the nested dictionaries of `nnx.to_pure_dict`.

    Returns:
      The same tree with `MuonDimensionNumbers` (in, out) for attention and MLP
      kernels, whose leading axis of layers is a batch axis, and None for the
      embedding, the head and the norms.

    >>> import jax
    >>> from flax import nnx
    >>> from models import llama
    >>> config = llama.LlamaConfig(64, 16, 32, num_layers=2, num_heads=2)
    >>> model = nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0)))
    >>> axes = llama.matrix_axes(nnx.to_pure_dict(nnx.state(model)))
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
