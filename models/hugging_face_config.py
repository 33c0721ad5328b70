"""The config.json of Hugging Face's LLaMA, to and from `LlamaConfig`."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic

from models import safetensors_files
from models.config import Float, LlamaConfig

CONFIG_FILE = "config.json"

_NAMES = {
    "vocabulary_size": "vocab_size",
    "hidden_size": "hidden_size",
    "mlp_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
# By entry of config.json, the field that takes it where it is given.
_OPTIONAL_NAMES = {
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "tie_word_embeddings": "tie_embeddings",
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "init_std",
}
_ROTARY_NAMES = {
    "factor": "rotary_scaling_factor",
    "low_freq_factor": "rotary_low_frequency_factor",
    "high_freq_factor": "rotary_high_frequency_factor",
    "original_max_position_embeddings": "rotary_original_length_tokens",
}
# Fixed properties of the model; entries with other values are refused.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}

# Defaults of transformers for entries that a Mistral's config.json lacks.
_MISTRAL_DEFAULTS = {
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "max_position_embeddings": 131_072,
}

_Size = Annotated[int, pydantic.Field(gt=0, lt=2**31)]
_Number = Annotated[float, pydantic.Field(gt=0)]
_STRICT = pydantic.ConfigDict(strict=True, allow_inf_nan=False)


class _Rope(pydantic.BaseModel):
    """Types of the entries of `rope_scaling` and `rope_parameters`."""

    model_config = _STRICT | pydantic.ConfigDict(extra="allow")
    rope_type: str | None = None
    type: str | None = None
    rope_theta: _Number | None = None
    partial_rotary_factor: _Number | None = None
    factor: _Number | None = None
    low_freq_factor: _Number | None = None
    high_freq_factor: _Number | None = None
    original_max_position_embeddings: _Size | None = None


class _Entries(pydantic.BaseModel):
    """Types of the entries of config.json; None: not given."""

    model_config = _STRICT
    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size
    # More layers than any model has would be listed name by name.
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
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    dtype: str | None = None
    torch_dtype: str | None = None


def load_config(
    directory: str | os.PathLike[str],
    *,
    dtype: Float | None = None,
    param_dtype: Float | None = None,
) -> LlamaConfig:
    """Reads the config.json in a directory; arguments and errors: `import_config`."""
    path = pathlib.Path(directory) / CONFIG_FILE
    entries = safetensors_files.read_json(path)
    return import_config(entries, dtype=dtype, param_dtype=param_dtype, place=str(path))


def import_config(
    entries: Mapping[str, Any],
    *,
    dtype: Float | None = None,
    param_dtype: Float | None = None,
    place: str = CONFIG_FILE,
) -> LlamaConfig:
    """Reads the entries of a config.json.

    A Mistral without a sliding window is a LLaMA. Rotary positions may be described
    as by transformers 4 (`rope_theta` and `rope_scaling`) or as by transformers 5
    (`rope_parameters`).

    Args:
      entries: the entries; those that do not change the logits are ignored.
      dtype: dtype of the computation; None: that of the parameters as stored.
      param_dtype: dtype of the parameters; None: as stored. float16 is read as
        float32, which holds all of its values.
      place: the file, for errors.

    Raises:
      ValueError: an entry is missing, has another type, or describes what `Llama`
        does not do.

    >>> from models import hugging_face_config
    >>> entries = {
    ...     "model_type": "llama",
    ...     "vocab_size": 64,
    ...     "hidden_size": 16,
    ...     "intermediate_size": 32,
    ...     "num_hidden_layers": 2,
    ...     "num_attention_heads": 4,
    ...     "num_key_value_heads": 2,
    ...     "rope_theta": 500000.0,
    ... }
    >>> config = hugging_face_config.import_config(entries)
    >>> config.mlp_size, config.rotary_base, config.rotary_scaling
    (32, 500000.0, None)
    """
    kind = entries.get("model_type")
    if kind not in ("llama", "mistral"):
        raise ValueError(
            f"{place}: model_type={kind!r} is not supported: only 'llama' is, and "
            "'mistral' without a sliding window"
        )
    if kind == "mistral":
        entries = _MISTRAL_DEFAULTS | dict(entries)
    for name, value in _FIXED.items():
        found = entries.get(name)
        if found is not None and found != value:
            raise ValueError(
                f"{place}: {name}={_short(found)} is not supported: convert the model "
                f"to one with {name}={value!r}"
            )
    typed = _check_types(entries, place)
    if kind == "mistral":
        _check_window(typed, place)
    values = {field: getattr(typed, name) for field, name in _NAMES.items()}
    for name, field in _OPTIONAL_NAMES.items():
        if (value := getattr(typed, name)) is not None:
            values[field] = value
    stored = (typed.dtype or typed.torch_dtype or "").removeprefix("torch.")
    stored = "bfloat16" if stored == "bfloat16" else "float32"
    try:
        config = LlamaConfig(
            **values,
            **_import_rotary(typed),
            max_length_tokens=typed.max_position_embeddings,
            dtype=dtype or stored,
            param_dtype=param_dtype or stored,
        )
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    # Written out by Hugging Face, left to their defaults here.
    if config.num_key_value_heads == config.num_heads:
        config = dataclasses.replace(config, num_key_value_heads=None)
    if config.head_dim == config.hidden_size / config.num_heads:
        config = dataclasses.replace(config, head_dim=None)
    return config


def _check_types(entries: Mapping[str, Any], place: str) -> _Entries:
    given = {name: value for name, value in entries.items() if value not in (None, {})}
    try:
        return _Entries.model_validate(given)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        raise ValueError(_missing(name, place))
    if first["type"] == "model_type":
        first["msg"] = "input should be a dictionary"
    raise ValueError(
        f"{place}: {name}={_short(first['input'])} cannot be read: "
        f"{first['msg'][0].lower()}{first['msg'][1:]}"
    )


def _check_window(typed: _Entries, place: str) -> None:
    window, length = typed.sliding_window, typed.max_position_embeddings
    if window is not None and length is not None and window < length:
        raise ValueError(
            f"{place}: sliding_window={window} is not supported: attention sees all "
            f"positions. Up to {window} tokens that is the same: for these set "
            f"sliding_window to null and max_position_embeddings to {window}"
        )


def _missing(name: str, place: str) -> str:
    return f"{place} has no {name}: add it, a LLaMA cannot do without"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _import_rotary(typed: _Entries) -> dict[str, Any]:
    # Where both are given transformers reads rope_scaling, too.
    rope = typed.rope_scaling or typed.rope_parameters or _Rope()
    for name, value in (rope.model_extra or {}).items():
        if isinstance(value, Mapping):
            raise ValueError(
                f"rotary positions of their own for {name} are not supported: all "
                "layers of a LLaMA have the same"
            )
    parts = (rope.partial_rotary_factor, typed.partial_rotary_factor)
    part = next((part for part in parts if part is not None), 1)
    if part != 1:
        raise ValueError(
            f"partial_rotary_factor={part} is not supported: heads are turned as a "
            "whole"
        )
    kind = rope.rope_type or rope.type
    if kind is None and rope.factor not in (None, 1):
        raise ValueError(
            f"the rotary scaling by factor={rope.factor:g} has no rope_type: add it"
        )
    kind = kind or "default"
    if kind not in ("default", "llama3"):
        raise ValueError(
            f"rope_type={kind!r} is not supported: only 'default' and 'llama3' are"
        )
    values = {"rotary_base": rope.rope_theta or typed.rope_theta or 10_000.0}
    if kind == "llama3":
        for name, field in _ROTARY_NAMES.items():
            values[field] = getattr(rope, name)
        length = "rotary_original_length_tokens"
        # As transformers reads it.
        values[length] = values[length] or typed.max_position_embeddings
        for name, field in _ROTARY_NAMES.items():
            if values[field] is None:
                raise ValueError(_missing(name, "the llama3 scaling"))
    return values


def export_config(
    config: LlamaConfig, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Writes a config as the entries of a config.json.

    Rotary positions are written as by transformers 4, which transformers 5 reads,
    too. The dtype is that of the parameters; `remat` and the dtype of the
    computation have no place in it.

    Args:
      config: the config.
      extra: more entries, for what only a tokenizer and a user know, such as
        `bos_token_id`, `eos_token_id` (None unless given) and
        `max_position_embeddings` (unless given that of the config, or 2048, or as far
        as the stretched rotary positions reach).

    Raises:
      ValueError: an extra entry is one that the config decides.

    >>> from models import hugging_face_config, llama
    >>> config = llama.LlamaConfig(
    ...     64, 16, 32, num_layers=2, num_heads=2, max_length_tokens=256
    ... )
    >>> entries = hugging_face_config.export_config(config, {"eos_token_id": 3})
    >>> entries["num_key_value_heads"], entries["eos_token_id"]
    (2, 3)
    >>> hugging_face_config.import_config(entries) == config
    True
    """
    filled = dataclasses.replace(
        config, num_key_value_heads=config.key_value_heads, head_dim=config.head_size
    )
    names = {**_NAMES, **{field: name for name, field in _OPTIONAL_NAMES.items()}}
    scaling = None
    if config.rotary_scaling_factor is not None:
        scaling = {name: getattr(config, f) for name, f in _ROTARY_NAMES.items()}
        scaling["rope_type"] = "llama3"
    decided = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: value for name, value in _FIXED.items() if value is not None},
        **{name: getattr(filled, field) for field, name in names.items()},
        "rope_theta": config.rotary_base,
        "rope_scaling": scaling,
        "torch_dtype": config.param_dtype,
    }
    for name in extra or {}:
        if name in decided:
            raise ValueError(
                f"{name} in config.json comes from the config: leave it out of the "
                "extra entries"
            )
    length = 2048
    if config.max_length_tokens is not None:
        length = config.max_length_tokens
    elif config.rotary_scaling is not None:
        scaling = config.rotary_scaling
        length = int(scaling.factor * scaling.original_length_tokens)
    # Without these entries transformers would take the ids of LLaMA's tokenizer.
    open_entries = {
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "max_position_embeddings": length,
    }
    return {**decided, **open_entries, **(extra or {})}
