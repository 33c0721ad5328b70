"""Import and export of Hugging Face's config.json as a `LlamaConfig`."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from models.config import Float, LlamaConfig
from models.json_entries import (
    check_extra,
    check_fixed,
    check_types,
    missing_message,
    stored_dtype,
)
from models.llama_entries import (
    FIXED,
    KIND,
    MISTRAL_DEFAULTS,
    NAMES,
    OPTIONAL_NAMES,
    ROTARY_NAMES,
    Entries,
    Rope,
)
from models.safetensors_files import CONFIG_FILE, read_json


def load_config(
    directory: str | os.PathLike[str],
    *,
    dtype: Float | None = None,
    param_dtype: Float | None = None,
) -> LlamaConfig:
    """Loads the config.json of a directory; arguments and errors: `import_config`."""
    path = pathlib.Path(directory) / CONFIG_FILE
    entries = read_json(path)
    return import_config(entries, dtype=dtype, param_dtype=param_dtype, place=str(path))


def import_config(
    entries: Mapping[str, Any],
    *,
    dtype: Float | None = None,
    param_dtype: Float | None = None,
    place: str = CONFIG_FILE,
) -> LlamaConfig:
    """Converts the entries of a config.json to a `LlamaConfig`.

    Accepts LLaMA, and Mistral without a sliding window, with the rotary entries of
    transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    Args:
      entries: the entries; those that do not change the logits are ignored.
      dtype: dtype of the computation; None: the stored dtype of the parameters.
      param_dtype: dtype of the parameters; None: the stored one, float32 for float16.
      place: name of the file in error messages.

    Raises:
      ValueError: an entry is missing, has a wrong type, or describes a model that
        `Llama` does not support.

    >>> from models import llama_config_file
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
    >>> config = llama_config_file.import_config(entries)
    >>> config.mlp_size, config.rotary_base, config.rotary_scaling
    (32, 500000.0, None)
    """
    kind = entries.get("model_type")
    if kind not in ("llama", "mistral"):
        raise ValueError(
            f"{place}: model_type={kind!r} is not supported: use 'llama', or 'mistral' "
            "without a sliding window"
        )
    if kind == "mistral":
        entries = MISTRAL_DEFAULTS | dict(entries)
    check_fixed(FIXED, entries, place)
    typed = check_types(Entries, entries, place, KIND)
    if kind == "mistral":
        _check_window(typed, place)
    values = {field: getattr(typed, name) for field, name in NAMES.items()}
    for name, field in OPTIONAL_NAMES.items():
        if (value := getattr(typed, name)) is not None:
            values[field] = value
    stored = stored_dtype(typed.dtype, typed.torch_dtype)
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
    # Hugging Face writes defaults out; here None stands for the default.
    if config.num_key_value_heads == config.num_heads:
        config = dataclasses.replace(config, num_key_value_heads=None)
    if config.head_dim == config.hidden_size / config.num_heads:
        config = dataclasses.replace(config, head_dim=None)
    return config


def _check_window(typed: Entries, place: str) -> None:
    window, length = typed.sliding_window, typed.max_position_embeddings
    if window is not None and length is not None and window < length:
        raise ValueError(
            f"{place}: sliding_window={window} is not supported: attention is not "
            f"windowed here. Up to {window} tokens the result is the same: to use the "
            "model so, set sliding_window to null and max_position_embeddings to "
            f"{window}"
        )


def _import_rotary(typed: Entries) -> dict[str, Any]:
    # If both are given, rope_scaling takes precedence, as in transformers.
    rope = typed.rope_scaling or typed.rope_parameters or Rope()
    for name, value in (rope.model_extra or {}).items():
        if isinstance(value, Mapping):
            raise ValueError(
                f"separate rotary positions for {name} are not supported: all layers "
                "of a LLaMA share one set"
            )
    parts = (rope.partial_rotary_factor, typed.partial_rotary_factor)
    part = next((part for part in parts if part is not None), 1)
    if part != 1:
        raise ValueError(
            f"partial_rotary_factor={part} is not supported: all dimensions of a head "
            "are rotated"
        )
    kind = rope.rope_type or rope.type
    if kind is None and rope.factor not in (None, 1):
        raise ValueError(
            f"the rotary scaling by factor={rope.factor:g} has no rope_type: add it"
        )
    kind = kind or "default"
    if kind not in ("default", "llama3"):
        raise ValueError(
            f"rope_type={kind!r} is not supported: use 'default' or 'llama3'"
        )
    values = {"rotary_base": rope.rope_theta or typed.rope_theta or 10_000.0}
    if kind == "llama3":
        for name, field in ROTARY_NAMES.items():
            values[field] = getattr(rope, name)
        length = "rotary_original_length_tokens"
        # The fallback of transformers.
        values[length] = values[length] or typed.max_position_embeddings
        for name, field in ROTARY_NAMES.items():
            if values[field] is None:
                raise ValueError(missing_message(name, "the llama3 scaling", KIND))
    return values


def export_config(
    config: LlamaConfig, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Converts a `LlamaConfig` to the entries of a config.json.

    Rotary entries are those of transformers 4, which transformers 5 also reads.
    `torch_dtype` is the parameters' dtype; `remat` and the compute dtype are dropped.

    Args:
      config: the config.
      extra: entries that the config does not determine, such as `bos_token_id`,
        `eos_token_id` (default None) and `max_position_embeddings` (default: the
        config's `max_length_tokens`, else the length that the scaled rotary positions
        cover, else 2048).

    Raises:
      ValueError: `extra` has an entry that the config determines.

    >>> from models import llama_config_file, llama
    >>> config = llama.LlamaConfig(
    ...     64, 16, 32, num_layers=2, num_heads=2, max_length_tokens=256
    ... )
    >>> entries = llama_config_file.export_config(config, {"eos_token_id": 3})
    >>> entries["num_key_value_heads"], entries["eos_token_id"]
    (2, 3)
    >>> llama_config_file.import_config(entries) == config
    True
    """
    filled = dataclasses.replace(
        config, num_key_value_heads=config.key_value_heads, head_dim=config.head_size
    )
    names = {**NAMES, **{field: name for name, field in OPTIONAL_NAMES.items()}}
    scaling = None
    if config.rotary_scaling_factor is not None:
        scaling = {name: getattr(config, f) for name, f in ROTARY_NAMES.items()}
        scaling["rope_type"] = "llama3"
    decided = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: value for name, value in FIXED.items() if value is not None},
        **{name: getattr(filled, field) for field, name in names.items()},
        "rope_theta": config.rotary_base,
        "rope_scaling": scaling,
        "torch_dtype": config.param_dtype,
    }
    check_extra(decided, extra)
    length = 2048
    if config.max_length_tokens is not None:
        length = config.max_length_tokens
    elif config.rotary_scaling is not None:
        scaling = config.rotary_scaling
        length = int(scaling.factor * scaling.original_length_tokens)
    # If these are missing, transformers assumes the ids of LLaMA's tokenizer.
    open_entries = {
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "max_position_embeddings": length,
    }
    return {**decided, **open_entries, **(extra or {})}
