"""The config.json of Hugging Face's LLaMA, to and from `LlamaConfig`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.config import Float, LlamaConfig

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
# What the model does whether an entry says so or not; another value is refused.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}


def import_config(
    entries: Mapping[str, Any],
    *,
    dtype: Float | None = None,
    param_dtype: Float | None = None,
) -> LlamaConfig:
    """Reads the entries of a config.json.

    Rotary positions may be described as by transformers 4 (`rope_theta` and
    `rope_scaling`) or as by transformers 5 (`rope_parameters`).

    Args:
      entries: the entries; those that do not change the logits are ignored.
      dtype: dtype of the computation; None: that of the parameters as stored.
      param_dtype: dtype of the parameters; None: as stored. float16 is read as
        float32, which holds all of its values.

    Raises:
      ValueError: an entry is missing, or describes what `Llama` does not do.

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
    if entries.get("model_type") != "llama":
        raise ValueError(
            f"model_type={entries.get('model_type')!r} in config.json is not supported:"
            " only 'llama' is"
        )
    for name, value in _FIXED.items():
        found = entries.get(name)
        if found is not None and found != value:
            raise ValueError(
                f"{name}={found!r} in config.json is not supported: convert the model "
                f"to one with {name}={value!r}"
            )
    values = {field: _required(entries, name) for field, name in _NAMES.items()}
    for name, field in _OPTIONAL_NAMES.items():
        if entries.get(name) is not None:
            values[field] = entries[name]
    stored = entries.get("dtype") or entries.get("torch_dtype")
    stored = "bfloat16" if stored == "bfloat16" else "float32"
    config = LlamaConfig(
        **values,
        **_import_rotary(entries),
        dtype=dtype or stored,
        param_dtype=param_dtype or stored,
    )
    # Written out by Hugging Face, left to their defaults here.
    if config.num_key_value_heads == config.num_heads:
        config = dataclasses.replace(config, num_key_value_heads=None)
    if config.head_dim == config.hidden_size / config.num_heads:
        config = dataclasses.replace(config, head_dim=None)
    return config


def _required(entries: Mapping[str, Any], name: str, place: str = "config.json") -> Any:
    if entries.get(name) is None:
        raise ValueError(f"{place} has no {name}: add it, a LLaMA cannot do without")
    return entries[name]


def _import_rotary(entries: Mapping[str, Any]) -> dict[str, Any]:
    # Where both are given transformers reads rope_scaling, too.
    rope = entries.get("rope_scaling") or entries.get("rope_parameters") or {}
    base = rope.get("rope_theta") or entries.get("rope_theta") or 10_000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise ValueError(
            f"rope_type={kind!r} in config.json is not supported: only 'default' and "
            "'llama3' are"
        )
    turned = rope.get("partial_rotary_factor", entries.get("partial_rotary_factor", 1))
    if turned not in (1, None):
        raise ValueError(
            f"partial_rotary_factor={turned} in config.json is not supported: "
            "heads are turned as a whole"
        )
    values = {"rotary_base": base}
    if kind == "llama3":
        length = "original_max_position_embeddings"
        rope = {length: entries.get("max_position_embeddings"), **rope}
        for name, field in _ROTARY_NAMES.items():
            values[field] = _required(rope, name, "the llama3 scaling in config.json")
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
        `max_position_embeddings` (unless given 2048, or as far as the stretched
        rotary positions reach).

    Raises:
      ValueError: an extra entry is one that the config decides.

    >>> from models import hugging_face_config, llama
    >>> config = llama.LlamaConfig(64, 16, 32, num_layers=2, num_heads=2)
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
    if config.rotary_scaling is not None:
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
