"""Low-rank methods: shared arguments, and the decorator that registers a method."""

import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar

import jax
import optax

from subtrack_jax._internal.injection import with_values_as_operands
from subtrack_jax.optimizers.adam_in_subspace import Recovery, adam_in_subspace

Optimizer = Callable[..., optax.GradientTransformationExtraArgs]
Function = TypeVar("Function", bound=Optimizer)


class Shared(TypedDict, total=False):
    """Arguments of all methods; their defaults are those of `adam_in_subspace`."""

    rank: int | float
    update_interval: jax.typing.ArrayLike
    b1: jax.typing.ArrayLike
    b2: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike
    scale: jax.typing.ArrayLike
    weight_decay: jax.typing.ArrayLike
    mask: Any
    side: Literal["short", "long"]
    dimension_numbers: Any
    seed: jax.typing.ArrayLike
    mu_dtype: jax.typing.DTypeLike | None
    moments_dtype: Literal["int8"] | None


class SharedTracking(Shared, total=False):
    """Arguments of methods that keep a basis for each matrix."""

    monitor: bool


class SharedRecovering(SharedTracking, total=False):
    """Arguments of methods that recover what the subspace misses."""

    recovery_scale: jax.typing.ArrayLike
    growth_limit: jax.typing.ArrayLike | None


class Method(NamedTuple):
    """A method of the family.

    Attributes:
      optimizer: the public function.
      build: the same with all of its arguments given, and `transport` and `recovery`
        among them in place of the method's own.
      transport: what happens to Adam's moments when a basis moves; see
        `scale_by_projection_aware_adam`.
      recovery: what happens to the part of the gradient outside of the subspace; see
        `recover_and_scale`. None for methods that lift nothing back.
    """

    optimizer: Optimizer
    build: Optimizer
    transport: bool | Literal["momentum"]
    recovery: Recovery | None

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Arguments with their defaults, without the learning rate."""
        return _defaults(self.optimizer)

    @property
    def summary(self) -> str:
        """The first line of the documentation."""
        return (inspect.getdoc(self.optimizer) or "").partition("\n")[0]


# All methods by name, in the order of their files.
FAMILY: dict[str, Method] = {}


def low_rank_method(
    *,
    transport: bool | Literal["momentum"] = False,
    recovery: Recovery | None = None,
    family: dict[str, Method] = FAMILY,
    **defaults: Any,
) -> Callable[[Function], Function]:
    """Makes a method of the family out of a function that builds its optimizer.

    The function names its own arguments and takes the shared ones as
    `**shared: Unpack[SharedTracking]`. It is called with all of them, `transport` and
    `recovery` among the shared ones if there is a recovery. Its signature and its
    documentation then show each argument, with the method's own defaults.

    Args:
      transport: see `Method`.
      recovery: see `Method`.
      family: where to register it; another dictionary for one's own methods.
      **defaults: the method's own defaults of shared arguments.

    Returns:
      The decorator.
    """

    def decorate(function: Function) -> Function:
        signature = _whole_signature(function, defaults)
        choices = {"transport": transport, "recovery": recovery}
        choices = {} if recovery is None else choices
        name = function.__name__

        @functools.wraps(function)
        def optimizer(*args: Any, **kwargs: Any) -> Any:
            try:
                given = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{name}() {error}") from None
            given.apply_defaults()
            return function(*given.args, **given.kwargs, **choices)

        def build(learning_rate: Any, **kwargs: Any) -> Any:
            return function(
                learning_rate, **{**_defaults(optimizer), **choices, **kwargs}
            )

        optimizer.__signature__ = signature  # type: ignore[attr-defined]
        optimizer.__doc__ = _whole_documentation(function, signature)
        optimizer = with_values_as_operands(optimizer)
        family[name] = Method(optimizer, build, transport, recovery)
        return optimizer  # type: ignore[return-value]

    return decorate


@functools.cache
def _defaults(function: Optimizer) -> Mapping[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {x.name: x.default for x in parameters if x.default is not x.empty}


def _whole_signature(
    function: Optimizer, defaults: Mapping[str, Any]
) -> inspect.Signature:
    """Shared arguments in the order of `adam_in_subspace`, then the method's own."""
    own = dict(inspect.signature(function).parameters)
    shared = own.pop("shared").annotation
    types = typing.get_type_hints(typing.get_args(shared)[0])
    if unknown := defaults.keys() - types:
        raise TypeError(f"{function.__name__} shares no {', '.join(sorted(unknown))}.")
    parameters = [own.pop("learning_rate")]
    for each in inspect.signature(adam_in_subspace).parameters.values():
        if each.name in types:
            default = defaults.get(each.name, each.default)
            parameters.append(
                each.replace(annotation=types[each.name], default=default)
            )
        elif each.name in own and each.name in SharedRecovering.__annotations__:
            parameters.append(own.pop(each.name))
    answer = inspect.signature(function).return_annotation
    return inspect.Signature([*parameters, *own.values()], return_annotation=answer)


def _whole_documentation(function: Optimizer, signature: inspect.Signature) -> str:
    """Documentation of a method, completed by that of `adam_in_subspace`."""
    entry = re.compile(r"^  (\w+): .*(?:\n    .*)*", re.MULTILINE)
    shared = {
        match[1]: match[0]
        for match in entry.finditer(inspect.getdoc(adam_in_subspace) or "")
    }
    text, returns, rest = (inspect.getdoc(function) or "").partition("\n\nReturns:\n")
    own = {match[1] for match in entry.finditer(text)}
    missing = [x for x in signature.parameters if x in shared and x not in own]
    return "\n".join([text, *(shared[name] for name in missing)]) + returns + rest
