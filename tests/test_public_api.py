"""Public names and signatures are stable.

A change on purpose is written down with
`python -m tests.test_public_api > tests/data/public_api.json`.
"""

import inspect
import json
import pathlib
import types

import subtrack_jax as stj

PINNED = pathlib.Path(__file__).parent / "data" / "public_api.json"


def arguments(function):
    """Names, kinds and defaults of the arguments: ["rank=128", "*", "seed=0"]."""
    signature = inspect.signature(function)
    plain = [
        each.replace(annotation=each.empty)
        if each.default is each.empty
        else each.replace(
            annotation=each.empty,
            # The repr of a function contains its address.
            default=getattr(each.default, "__name__", each.default),
        )
        for each in signature.parameters.values()
    ]
    text = str(signature.replace(parameters=plain, return_annotation=signature.empty))
    return text.removeprefix("(").removesuffix(")").split(", ")


def public_api():
    """All public names, with the arguments of callables."""
    found = {}
    for name in stj.__all__:
        value = getattr(stj, name)
        if isinstance(value, types.ModuleType):
            for key in value.__all__:
                found[f"{name}.{key}"] = arguments(getattr(value, key))
        elif callable(value) and not isinstance(value, types.UnionType):
            found[name] = arguments(value)
        else:
            found[name] = None
    return found


def test_public_names_and_signatures_are_as_pinned():
    assert public_api() == json.loads(PINNED.read_text())


if __name__ == "__main__":
    print(json.dumps(public_api(), indent=1))
