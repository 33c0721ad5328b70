"""Types of the entries of a config.json: strict checks, readable errors."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import pydantic

Size = Annotated[int, pydantic.Field(gt=0, lt=2**31)]
Number = Annotated[float, pydantic.Field(gt=0)]
# Bounded, because the tensors of every layer are listed by name.
Layers = Annotated[int, pydantic.Field(gt=0, le=10_000)]
STRICT = pydantic.ConfigDict(strict=True, allow_inf_nan=False)

Schema = TypeVar("Schema", bound=pydantic.BaseModel)


def check_types(
    schema: type[Schema], entries: Mapping[str, Any], place: str, kind: str
) -> Schema:
    """Validates the entries of a config.json; a ValueError names the bad one.

    Args:
      schema: the entries' types; None means that an entry is missing.
      entries: the entries; null and {} count as missing.
      place: name of the file in error messages.
      kind: the model in error messages, with its article.
    """
    given = {name: value for name, value in entries.items() if value not in (None, {})}
    try:
        return schema.model_validate(given)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        raise ValueError(missing_message(name, place, kind))
    if first["type"] == "model_type":
        first["msg"] = "input should be a dictionary"
    raise ValueError(
        f"{place}: {name}={shorten(first['input'])} cannot be read: "
        f"{first['msg'][0].lower()}{first['msg'][1:]}"
    )


def check_fixed(
    fixed: Mapping[str, Any], entries: Mapping[str, Any], place: str
) -> None:
    """Raises a ValueError if an entry has another value than the supported one."""
    for name, value in fixed.items():
        found = entries.get(name)
        if found is not None and found != value:
            raise ValueError(
                f"{place}: {name}={shorten(found)} is not supported: convert the model "
                f"to one with {name}={value!r}"
            )


def stored_dtype(dtype: str | None, torch_dtype: str | None) -> str:
    """Dtype for the parameters of a file: bfloat16 if stored so, else float32."""
    stored = (dtype or torch_dtype or "").removeprefix("torch.")
    return "bfloat16" if stored == "bfloat16" else "float32"


def check_extra(decided: Mapping[str, Any], extra: Mapping[str, Any] | None) -> None:
    """Raises a ValueError if an extra entry is one that the config determines."""
    for name in extra or {}:
        if name in decided:
            raise ValueError(
                f"{name} in config.json is determined by the config: remove it from "
                "the extra entries"
            )


def missing_message(name: str, place: str, kind: str) -> str:
    """Error message for a required entry that is missing."""
    return f"{place} has no {name}: add it, {kind} requires it"


def shorten(value: Any) -> str:
    """Representation of a value for an error message, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
