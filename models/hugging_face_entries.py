"""Names and types of the entries of a LLaMA's config.json."""

from collections.abc import Mapping
from typing import Annotated, Any

import pydantic

NAMES = {
    "vocabulary_size": "vocab_size",
    "hidden_size": "hidden_size",
    "mlp_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
# Optional entries of config.json and their fields.
OPTIONAL_NAMES = {
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "tie_word_embeddings": "tie_embeddings",
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "init_std",
}
ROTARY_NAMES = {
    "factor": "rotary_scaling_factor",
    "low_freq_factor": "rotary_low_frequency_factor",
    "high_freq_factor": "rotary_high_frequency_factor",
    "original_max_position_embeddings": "rotary_original_length_tokens",
}
# Entries with one supported value each.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}

# transformers' defaults for entries missing from a Mistral's config.json.
MISTRAL_DEFAULTS = {
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "max_position_embeddings": 131_072,
}

_Size = Annotated[int, pydantic.Field(gt=0, lt=2**31)]
_Number = Annotated[float, pydantic.Field(gt=0)]
_STRICT = pydantic.ConfigDict(strict=True, allow_inf_nan=False)


class Rope(pydantic.BaseModel):
    """Schema of the entries `rope_scaling` and `rope_parameters`."""

    model_config = _STRICT | pydantic.ConfigDict(extra="allow")
    rope_type: str | None = None
    type: str | None = None
    rope_theta: _Number | None = None
    partial_rotary_factor: _Number | None = None
    factor: _Number | None = None
    low_freq_factor: _Number | None = None
    high_freq_factor: _Number | None = None
    original_max_position_embeddings: _Size | None = None


class Entries(pydantic.BaseModel):
    """Schema of config.json; None: the entry is missing."""

    model_config = _STRICT
    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size
    # Bounded, because the tensors of every layer are listed by name.
    num_hidden_layers: Annotated[int, pydantic.Field(gt=0, le=10_000)]
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    tie_word_embeddings: bool | None = None
    rms_norm_eps: _Number | None = None
    initializer_range: _Number | None = None
    max_position_embeddings: _Size | None = None
    sliding_window: _Size | None = None
    rope_theta: _Number | None = None
    partial_rotary_factor: _Number | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    dtype: str | None = None
    torch_dtype: str | None = None


def check_types(entries: Mapping[str, Any], place: str) -> Entries:
    """Validates the entries of a config.json; a ValueError names the bad one."""
    given = {name: value for name, value in entries.items() if value not in (None, {})}
    try:
        return Entries.model_validate(given)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        raise ValueError(missing_message(name, place))
    if first["type"] == "model_type":
        first["msg"] = "input should be a dictionary"
    raise ValueError(
        f"{place}: {name}={shorten(first['input'])} cannot be read: "
        f"{first['msg'][0].lower()}{first['msg'][1:]}"
    )


def missing_message(name: str, place: str) -> str:
    """Error message for a required entry that is missing."""
    return f"{place} has no {name}: add it, a LLaMA requires it"


def shorten(value: Any) -> str:
    """Representation of a value for an error message, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
