"""Jinja templates in a sandbox, with the functions that transformers gives them."""

import datetime
import json
import re
from typing import Any

import jinja2
from jinja2 import sandbox

# Marks of transformers for its own masks.
_GENERATION = re.compile(r"(\{%-?\s*)(end)?generation(\s*-?%\})")


def compile_template(source: str) -> jinja2.Template:
    """Compiles a template that cannot change its arguments or reach the program.

    Raises:
      ValueError: it is not a Jinja template.
    """
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    environment.filters["tojson"] = _json
    plain = _GENERATION.sub(
        lambda found: f"{found[1]}{'endif' if found[2] else 'if true'}{found[3]}",
        source,
    )
    try:
        return environment.from_string(plain)
    except jinja2.TemplateError as error:
        raise ValueError(str(error)) from error


def _refuse(message: str) -> None:
    raise ValueError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _json(value: Any, indent: int | None = None, **options: Any) -> str:
    del options
    return json.dumps(value, ensure_ascii=False, indent=indent)
