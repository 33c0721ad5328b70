"""Names and types of the entries of a LLaMA's config.json."""

import pydantic

from models.json_entries import STRICT, Layers, Number, Size

KIND = "a LLaMA"

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


class Rope(pydantic.BaseModel):
    """Schema of the entries `rope_scaling` and `rope_parameters`."""

    model_config = STRICT | pydantic.ConfigDict(extra="allow")
    rope_type: str | None = None
    type: str | None = None
    rope_theta: Number | None = None
    partial_rotary_factor: Number | None = None
    factor: Number | None = None
    low_freq_factor: Number | None = None
    high_freq_factor: Number | None = None
    original_max_position_embeddings: Size | None = None


class Entries(pydantic.BaseModel):
    """Schema of config.json; None: the entry is missing."""

    model_config = STRICT
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    tie_word_embeddings: bool | None = None
    rms_norm_eps: Number | None = None
    initializer_range: Number | None = None
    max_position_embeddings: Size | None = None
    sliding_window: Size | None = None
    rope_theta: Number | None = None
    partial_rotary_factor: Number | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
