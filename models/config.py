"""LLaMA configuration: sizes, dtypes, rotary scaling; published shapes by name."""

import dataclasses
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

Float = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]

CHOICES = {"dtype": Float, "param_dtype": Float, "remat": Remat}


def check_fields(
    config: Any,
    choices: Mapping[str, Any] = CHOICES,
    may_be_zero: Collection[str] = (),
) -> None:
    """Raises a ValueError if a number is not positive or a choice is unknown.

    Args:
      config: an instance of a dataclass.
      choices: `Literal`s by the names of their fields.
      may_be_zero: names of the fields whose numbers are not checked.
    """
    for field in dataclasses.fields(config):
        if field.name in may_be_zero:
            continue
        value = getattr(config, field.name)
        if isinstance(value, int | float) and not (value > 0 or value is False):
            raise ValueError(f"{field.name} must be positive, got {value}")
    for name, choice in choices.items():
        value, known = getattr(config, name), typing.get_args(choice)
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


class RotaryScaling(NamedTuple):
    """Rotary frequency scaling of LLaMA 3, for sequences longer than in training.

    Count the rotations of a pair of dimensions over the original length. Below
    `low_frequency_factor` rotations its frequency is divided by `factor`, above
    `high_frequency_factor` it is unchanged, in between it is interpolated.
    """

    factor: float
    original_length_tokens: int
    low_frequency_factor: float
    high_frequency_factor: float


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Configuration of a LLaMA: sizes, dtypes and rematerialisation.

    Attributes:
      vocabulary_size: rows of the embedding, columns of the head.
      hidden_size: width of the residual stream.
      mlp_size: width inside the gated MLP.
      num_layers: transformer blocks.
      num_heads: attention heads.
      num_key_value_heads: heads of keys and values, each shared by a group of
        query heads; None: as many as query heads.
      head_dim: dimensions of a head, even; None: hidden_size / num_heads.
      tie_embeddings: use the embedding as the head.
      rotary_base: base of the rotary frequencies.
      rotary_scaling_factor: LLaMA 3's divisor of low rotary frequencies, see
        `RotaryScaling`; None: no scaling.
      rotary_original_length_tokens: sequence length before the scaling.
      rotary_low_frequency_factor: pairs that rotate fewer times than this over the
        original length are fully scaled.
      rotary_high_frequency_factor: pairs that rotate more often than this are not
        scaled.
      max_length_tokens: longest sequence of imported weights, which an export writes
        to config.json; None: that of training.
      norm_epsilon: added to the mean square in RMSNorm.
      init_std: standard deviation of every initial kernel and embedding.
      dtype: dtype of the computation; norms, softmax and loss stay in float32.
      param_dtype: dtype of the parameters.
      remat: rematerialisation, the activations that the backward pass recomputes.
        none: none; dots: all but the matrix products with weights; full: all, so
        that only each layer's input is stored.

    Raises:
      ValueError: a number is not positive, a choice is unknown, the number of heads
        does not divide the size or the heads that share them, or the rotary
        frequency factors are out of order.
    """

    vocabulary_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tie_embeddings: bool = False
    rotary_base: float = 10_000.0
    rotary_scaling_factor: float | None = None
    rotary_original_length_tokens: int = 8192
    rotary_low_frequency_factor: float = 1.0
    rotary_high_frequency_factor: float = 4.0
    max_length_tokens: int | None = None
    norm_epsilon: float = 1e-6
    init_std: float = 0.02
    dtype: Float = "float32"
    param_dtype: Float = "float32"
    remat: Remat = "none"

    def __post_init__(self):
        check_fields(self)
        self._check_heads()
        low, high = self.rotary_low_frequency_factor, self.rotary_high_frequency_factor
        if low >= high:
            raise ValueError(
                f"rotary_low_frequency_factor={low} must be below "
                f"rotary_high_frequency_factor={high}"
            )

    def _check_heads(self):
        if self.head_dim is None and self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of twice "
                f"num_heads={self.num_heads}: rotary positions rotate pairs"
            )
        if self.head_size % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even: rotary positions rotate pairs"
            )
        if self.num_heads % self.key_value_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )

    @property
    def head_size(self) -> int:
        """Dimensions of a head, with the default resolved."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values, with the default resolved."""
        return self.num_key_value_heads or self.num_heads

    @property
    def rotary_scaling(self) -> RotaryScaling | None:
        """Scaling of the rotary frequencies, or None."""
        if self.rotary_scaling_factor is None:
            return None
        return RotaryScaling(
            self.rotary_scaling_factor,
            self.rotary_original_length_tokens,
            self.rotary_low_frequency_factor,
            self.rotary_high_frequency_factor,
        )


def _published(hidden: int, mlp: int, heads: int, layers: int) -> LlamaConfig:
    return LlamaConfig(32_000, hidden, mlp, num_layers=layers, num_heads=heads)


# Shapes of the GaLore and SubTrack++ papers, under the papers' names: not all of them
# are the number of parameters (llama-1b has 1.34 B).
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
