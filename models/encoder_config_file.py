"""Import and export of an encoder's config.json as an `EncoderConfig`."""

import os
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import pydantic

from models.config import Float
from models.encoder_config import EncoderConfig, Head
from models.json_entries import (
    STRICT,
    Layers,
    Number,
    Size,
    check_extra,
    check_fixed,
    check_types,
    shorten,
    stored_dtype,
)
from models.safetensors_files import CONFIG_FILE, read_json

_Rate = Annotated[float, pydantic.Field(ge=0, lt=1)]

_NAMES = {
    "vocabulary_size": "vocab_size",
    "hidden_size": "hidden_size",
    "mlp_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_positions": "max_position_embeddings",
    "padding_id": "pad_token_id",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "head_dropout": "classifier_dropout",
    "norm_epsilon": "layer_norm_eps",
    "init_std": "initializer_range",
}
# Entries with one supported value each.
_FIXED = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}
# transformers' constants, whatever config.json has.
_MPNET = {"relative_attention_num_buckets": 32, "pad_token_id": 1}
# transformers' defaults for missing entries.
_DEFAULTS = {
    "bert": {"type_vocab_size": 2, "pad_token_id": 0, "max_position_embeddings": 512},
    "roberta": {"type_vocab_size": 2, "pad_token_id": 1},
    "mpnet": {"pad_token_id": 1},
}
CLASS_NAMES = {"bert": "Bert", "roberta": "Roberta", "mpnet": "MPNet"}
_TASKS = {
    "classification": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "choice": "ForMultipleChoice",
}


class _Entries(pydantic.BaseModel):
    """Schema of config.json; None: the entry is missing."""

    model_config = STRICT
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    max_position_embeddings: Size
    type_vocab_size: Annotated[int, pydantic.Field(ge=0, lt=2**31)] = 0
    pad_token_id: Annotated[int, pydantic.Field(ge=0, lt=2**31)]
    hidden_dropout_prob: _Rate | None = None
    attention_probs_dropout_prob: _Rate | None = None
    classifier_dropout: _Rate | None = None
    layer_norm_eps: Number | None = None
    initializer_range: Number | None = None
    architectures: list[str] | None = None
    problem_type: str | None = None
    num_labels: Size | None = None
    id2label: dict[str, str] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None


class StoredHead(NamedTuple):
    """Head that a config.json describes; `head` is None for unsupported heads."""

    head: Head | None
    labels: tuple[str, ...]


def load_config(
    directory: str | os.PathLike[str],
    *,
    dtype: Float | None = None,
    param_dtype: Float | None = None,
) -> EncoderConfig:
    """Loads the config.json of a directory; arguments and errors: `import_config`."""
    path = pathlib.Path(directory) / CONFIG_FILE
    return import_config(
        read_json(path), dtype=dtype, param_dtype=param_dtype, place=str(path)
    )


def import_config(
    entries: Mapping[str, Any],
    *,
    dtype: Float | None = None,
    param_dtype: Float | None = None,
    place: str = CONFIG_FILE,
) -> EncoderConfig:
    """Converts the entries of a config.json to an `EncoderConfig`.

    Head and labels are those of the file if it describes a model for classes, numbers
    or choices; otherwise the head is for classification and has no labels yet.

    Args:
      entries: the entries; those that do not change the logits are ignored.
      dtype: dtype of the computation; None: the stored dtype of the parameters.
      param_dtype: dtype of the parameters; None: the stored one, float32 for float16.
      place: name of the file in error messages.

    Raises:
      ValueError: an entry is missing, has a wrong type, or describes a model that
        `Encoder` does not support.

    >>> from models import encoder_config_file
    >>> entries = {
    ...     "model_type": "roberta",
    ...     "architectures": ["RobertaForSequenceClassification"],
    ...     "vocab_size": 64,
    ...     "hidden_size": 16,
    ...     "intermediate_size": 32,
    ...     "num_hidden_layers": 2,
    ...     "num_attention_heads": 4,
    ...     "max_position_embeddings": 24,
    ...     "type_vocab_size": 1,
    ...     "id2label": {"0": "no", "1": "yes"},
    ... }
    >>> config = encoder_config_file.import_config(entries)
    >>> config.head, config.labels, config.max_length_tokens
    ('classification', ('no', 'yes'), 22)
    """
    family = entries.get("model_type")
    if family not in CLASS_NAMES:
        raise ValueError(
            f"{place}: model_type={shorten(family)} is not supported: use an encoder "
            "of the type 'bert', 'roberta' or 'mpnet'"
        )
    check_fixed(_FIXED, entries, place)
    if family == "mpnet":
        check_fixed(_MPNET, entries, place)
    typed = _typed(entries, place)
    values = {field: getattr(typed, name) for field, name in _NAMES.items()}
    stored = stored_dtype(typed.dtype, typed.torch_dtype)
    head = _stored_head(typed, place)
    try:
        return EncoderConfig(
            family=family,
            num_types=0 if family == "mpnet" else typed.type_vocab_size,
            head=head.head or "classification",
            labels=head.labels,
            dtype=dtype or stored,
            param_dtype=param_dtype or stored,
            **{field: value for field, value in values.items() if value is not None},
        )
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def stored_head(directory: pathlib.Path) -> StoredHead:
    """Head that the config.json of a directory describes, after `load_config`."""
    path = directory / CONFIG_FILE
    return _stored_head(_typed(read_json(path), str(path)), str(path))


def _typed(entries: Mapping[str, Any], place: str) -> _Entries:
    family = entries["model_type"]
    given = {name: value for name, value in entries.items() if value is not None}
    kind = f"an encoder of the type {family!r}"
    return check_types(_Entries, _DEFAULTS[family] | given, place, kind)


def _stored_head(typed: _Entries, place: str) -> StoredHead:
    name = (typed.architectures or [""])[0]
    if name.endswith(_TASKS["choice"]):
        return StoredHead("choice", ())
    if not name.endswith(_TASKS["classification"]):
        return StoredHead(None, ())
    names = typed.id2label
    if names is None:
        names = {str(index): f"LABEL_{index}" for index in range(typed.num_labels or 2)}
    problem = typed.problem_type or (
        "regression" if len(names) == 1 else "single_label_classification"
    )
    if problem == "regression" and len(names) == 1:
        return StoredHead("regression", ())
    if problem != "single_label_classification":
        return StoredHead(None, ())
    try:
        return StoredHead(
            "classification", tuple(names[str(index)] for index in range(len(names)))
        )
    except KeyError as error:
        raise ValueError(
            f"{place}: id2label={shorten(names)} must have the ids 0 to "
            f"{len(names) - 1}"
        ) from error


def export_config(
    config: EncoderConfig, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Converts an `EncoderConfig` to the entries of a config.json.

    `torch_dtype` is the parameters' dtype; `remat` and the compute dtype are dropped.

    Args:
      config: the config.
      extra: entries that the config does not determine, such as `bos_token_id`.

    Raises:
      ValueError: `extra` has an entry that the config determines.

    >>> from models import encoder, encoder_config_file
    >>> config = encoder.EncoderConfig(
    ...     "bert", 64, 16, 32, 2, 4, 24, 2, 0, labels=("no", "yes")
    ... )
    >>> entries = encoder_config_file.export_config(config)
    >>> entries["architectures"], entries["label2id"]
    (['BertForSequenceClassification'], {'no': 0, 'yes': 1})
    >>> encoder_config_file.import_config(entries) == config
    True
    """
    labels = config.labels or ("LABEL_0",)
    problem = None
    if config.head == "classification":
        problem = "single_label_classification"
    elif config.head == "regression":
        problem = "regression"
    own = _MPNET if config.family == "mpnet" else {"type_vocab_size": config.num_types}
    fixed = {name: _FIXED[name] for name in ("hidden_act", "position_embedding_type")}
    decided = {
        "architectures": [CLASS_NAMES[config.family] + _TASKS[config.head]],
        "model_type": config.family,
        **fixed,
        **own,
        **{name: getattr(config, field) for field, name in _NAMES.items()},
        "num_labels": len(labels),
        "id2label": {str(index): name for index, name in enumerate(labels)},
        "label2id": {name: index for index, name in enumerate(labels)},
        "problem_type": problem,
        "torch_dtype": config.param_dtype,
    }
    check_extra(decided, extra)
    return decided | dict(extra or {})
