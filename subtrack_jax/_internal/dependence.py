"""Which inputs an output of a function is computed from, by tracing it.

Not `jax.interpreters.partial_eval.dce_jaxpr`: it takes all results of a function with
a custom derivative to depend on all of its arguments.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

# Inputs as the bits of an integer.
Bits = int


class Dependence:
    """Dependence of a traced function's outputs on its inputs, leaf by leaf.

    Attributes:
      results: shapes and dtypes of the function's results.

    Example:
      >>> dependence = Dependence(lambda x, y: (2 * x, x + y), 1.0, 2.0)
      >>> dependence.inputs_of(0), dependence.inputs_of(1)
      ([True, False], [True, True])
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        program, self.results = jax.make_jaxpr(function, return_shape=True)(*arguments)
        self._inputs = len(program.jaxpr.invars)
        self._outputs = _of_results(
            program.jaxpr, [1 << k for k in range(self._inputs)]
        )

    def inputs_of(self, *outputs: int) -> list[bool]:
        """Whether each input, in the order of leaves, is read for these outputs."""
        bits = _union(self._outputs[k] for k in outputs)
        return [bool(bits >> k & 1) for k in range(self._inputs)]


def used_keys(
    function: Callable[..., Any], first: dict[str, Any], *others: Any
) -> frozenset[str]:
    """Keys of a function's first argument whose leaves it reads.

    Args:
      function: a function of a dictionary of trees, and of others.
      first: the dictionary; arrays or shapes.
      *others: the other arguments.

    Returns:
      The keys of which any leaf is read for any result.
    """
    dependence = Dependence(function, first, *others)
    outputs = range(len(jax.tree.leaves(dependence.results)))
    used = iter(dependence.inputs_of(*outputs))
    structure: Any = jax.tree.structure(first)
    flags = structure.unflatten([next(used) for _ in range(structure.num_leaves)])
    return frozenset(k for k, flag in flags.items() if any(jax.tree.leaves(flag)))


def _union(bits: Iterable[Bits]) -> Bits:
    return functools.reduce(operator.or_, bits, 0)


def _of_results(jaxpr: Jaxpr, inputs: Sequence[Bits]) -> list[Bits]:
    """Dependence of each result of a program, from the dependence of its inputs."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    of = lambda x: 0 if isinstance(x, Literal) else known.get(x, 0)  # 0: a constant
    for equation in jaxpr.eqns:
        results = _of_equation(equation, [of(x) for x in equation.invars])
        known.update(zip(equation.outvars, results, strict=True))
    return [of(x) for x in jaxpr.outvars]


def _of_equation(equation: JaxprEqn, inputs: list[Bits]) -> list[Bits]:
    params, name = equation.params, equation.primitive.name
    if name == "while":
        conditions, bodies = params["cond_nconsts"], params["body_nconsts"]
        of_condition, inputs = inputs[:conditions], inputs[conditions:]
        constants, carry = inputs[:bodies], inputs[bodies:]

        def trip(carry):
            (going,) = _of_results(params["cond_jaxpr"].jaxpr, [*of_condition, *carry])
            results = _of_results(params["body_jaxpr"].jaxpr, [*constants, *carry])
            return [going | each for each in results]

        return _settled(trip, carry)
    if name == "scan":
        first, size = params["num_consts"], params["num_carry"]
        body, others = params["jaxpr"].jaxpr, inputs[first + size :]

        def results(carry):
            return _of_results(body, [*inputs[:first], *carry, *others])

        carry = _settled(lambda c: results(c)[:size], inputs[first : first + size])
        return carry + results(carry)[size:]
    if name == "cond":
        index, operands = inputs[0], inputs[1:]
        branches = [_of_results(each.jaxpr, operands) for each in params["branches"]]
        return [index | _union(each) for each in zip(*branches, strict=True)]
    inner = [x for x in params.values() if isinstance(x, (Jaxpr, ClosedJaxpr))]
    if len(inner) == 1:  # a jitted function, or one with a custom derivative
        called = inner[0].jaxpr if isinstance(inner[0], ClosedJaxpr) else inner[0]
        if len(called.invars) == len(inputs):
            return _of_results(called, inputs)
    return [_union(inputs)] * len(equation.outvars)


def _settled(trip: Callable[[list[Bits]], list[Bits]], carry: list[Bits]) -> list[Bits]:
    """The carry of a loop after any number of trips."""
    while True:
        new = [a | b for a, b in zip(carry, trip(carry), strict=True)]
        if new == carry:
            return carry
        carry = new
