"""Loops and conditionals that work under reverse mode and inside `shard_map`.

- Reverse mode cannot go back through a loop whose number of trips is unknown. Given
  a bound, these loops are differentiated as that many conditional trips.
- Inside `shard_map` values have types that say along which mesh axes they differ,
  and a loop keeps the types it begins with. These begin with those of the results.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

Tree = TypeVar("Tree")

# Branches of one conditional. Every branch takes the operands of all branches, so
# that one conditional of n branches has n^2 of them; a tree has n log n.
_MOST_BRANCHES = 8


def apply_if(
    predicate: jax.Array, function: Callable[[Tree], Tree], operand: Tree, name: str
) -> Tree:
    """Conditional update that does not copy its operand.

    A loop of at most one trip. A conditional would copy what its other branch passes
    through: bases and moments of every matrix on every step. A derivative is that of
    the conditional.

    Args:
      predicate: scalar bool.
      function: from a tree to one of the same structure, shapes and dtypes.
      operand: the tree.
      name: the loop's name in profiles and compiled programs.

    Returns:
      `function(operand)` where the predicate is true, else the operand.

    Example:
      >>> import jax.numpy as jnp
      >>> add_one = lambda x: x + 1
      >>> [int(apply_if(b, add_one, jnp.int32(5), "add")) for b in (False, True)]
      [5, 6]
    """
    with jax.named_scope(name):
        _, result = while_loop(
            lambda carry: carry[0],
            lambda carry: (jnp.zeros_like(carry[0]), function(carry[1])),
            (jnp.asarray(predicate, bool), operand),
            most_trips=1,
        )
    return result


def hold(tree: Tree, never: jax.Array) -> Tree:
    """Keeps arrays in memory of their own, not recomputed by each operation on them.

    A barrier that the CPU compiler keeps too: a loop that makes no trip.

    Args:
      tree: the arrays.
      never: scalar bool that is False, which the compiler must not find out.

    Returns:
      The same arrays.
    """
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    return apply_if(never, zeros, tree, "hold")


def while_loop(
    condition: Callable[[Tree], jax.Array],
    body: Callable[[Tree], Tree],
    init: Tree,
    most_trips: int,
) -> Tree:
    """`jax.lax.while_loop` with a derivative in forward and reverse mode.

    Args:
      condition: from the carry to a scalar bool.
      body: from the carry to the next one.
      init: the first carry.
      most_trips: the loop never takes more; a derivative takes as many, those after
        the last one doing nothing.

    Returns:
      The last carry.

    Example:
      >>> import jax
      >>> double = lambda x: while_loop(lambda x: x < 10, lambda x: 2 * x, x, 8)
      >>> [float(value) for value in jax.value_and_grad(double)(3.0)]
      [12.0, 4.0]
    """
    init = _typed_like_results(body, init)
    body, constants = _without_closure(body, init)

    @jax.custom_jvp
    def run(init, constants):
        return jax.lax.while_loop(
            condition, lambda carry: body(carry, *constants), init
        )

    def bounded(init, constants):
        def trip(carry, _):
            taken = lambda carry: body(carry, *constants)
            return jax.lax.cond(condition(carry), taken, lambda x: x, carry), None

        return jax.lax.scan(trip, init, length=most_trips)[0]

    @functools.partial(run.defjvp, symbolic_zeros=True)
    def run_jvp(primals, tangents):
        values, structure = jax.tree.flatten(primals)
        slopes = jax.tree.leaves(tangents)
        # Inputs without a tangent keep none: zero times an infinite slope is NaN.
        moving = [k for k, x in enumerate(slopes) if not isinstance(x, SymbolicZero)]

        def of_moving(*moved):
            everything = dict(enumerate(values)) | dict(zip(moving, moved, strict=True))
            return bounded(*structure.unflatten(everything.values()))

        pick = lambda entries: [entries[k] for k in moving]
        return jax.jvp(of_moving, pick(values), pick(slopes))

    return run(init, constants)


def _without_closure(
    function: Callable[[Tree], Tree], operand: Tree
) -> tuple[Callable[..., Tree], list[jax.Array]]:
    """Converts a closure to a function of its closed-over values, and returns both.

    `jax.closure_convert` leaves integers behind, which a derivative that is taken
    once the function has been traced would find dead.
    """
    program, shapes = jax.make_jaxpr(function, return_shape=True)(operand)
    structure = jax.tree.structure(shapes)

    def converted(operand, *constants):
        closed = ClosedJaxpr(program.jaxpr, constants)
        results = jaxpr_as_fun(closed)(*jax.tree.leaves(operand))
        return structure.unflatten(results)

    return converted, program.consts


def fori_loop(trips: int, body: Callable[[jax.Array, Tree], Tree], init: Tree) -> Tree:
    """`jax.lax.fori_loop` from 0, a static number of times, inside `shard_map` too.

    Args:
      trips: how often.
      body: from the trip's index and the carry to the next carry.
      init: the first carry.

    Returns:
      The last carry.
    """
    first = jnp.zeros([], jnp.int32)
    init = _typed_like_results(lambda carry: body(first, carry), init)
    return jax.lax.fori_loop(0, trips, body, init)


def cond(
    predicate: jax.Array,
    true_function: Callable[..., Tree],
    false_function: Callable[..., Tree],
    *operands: Any,
) -> Tree:
    """`jax.lax.cond` with branches whose results vary along different mesh axes.

    Args:
      predicate: scalar bool.
      true_function: from the operands to the results.
      false_function: likewise, to results of the same structure and shapes.
      *operands: trees of arrays.

    Returns:
      The result of one of them.
    """

    def typed(function, other):
        def branch(*operands):
            results = function(*operands)
            if not jax.sharding.get_abstract_mesh().manual_axes:
                return results
            likewise = jax.eval_shape(other, *operands)
            return jax.tree.map(_varying_as, results, likewise)

        return branch

    branches = (
        typed(true_function, false_function),
        typed(false_function, true_function),
    )
    return jax.lax.cond(predicate, *branches, *operands)


def switch(index: jax.Array, branches: Sequence[Callable[[], Tree]]) -> Tree:
    """`jax.lax.switch` without operands, as a tree of conditionals with few branches.

    Args:
      index: scalar int, which branch to take.
      branches: functions of nothing, with results of the same types.

    Returns:
      The branch's result.
    """
    if len(branches) == 1:
        return branches[0]()
    size = 1  # branches below each of this conditional's
    while size * _MOST_BRANCHES < len(branches):
        size *= _MOST_BRANCHES

    def part(start):
        below = branches[start : start + size]
        return lambda: switch(index - start, below)

    parts = [part(start) for start in range(0, len(branches), size)]
    return jax.lax.switch(index // size, parts)


def unstack(stack: Tree, counts: Sequence[int]) -> list[Tree]:
    """Splits the leading axis of all arrays of a tree into parts.

    Where a part begins is a value at run time: CPUs compile slices with different
    constants one by one (15 ms each), and slices that differ by an operand once.

    Args:
      stack: tree of arrays with one leading axis in common.
      counts: sizes of the parts, which add up to the axis.

    Returns:
      A tree for each part.

    Example:
      >>> [part.tolist() for part in unstack(jnp.arange(3), [1, 2])]
      [[0], [1, 2]]
    """
    if len(counts) == 1:
        return [stack]
    begin = lambda: [jnp.int32(sum(counts[:k])) for k in range(len(counts))]
    # Offsets from an undecidable conditional prevent constant folding.
    some = jax.tree.leaves(stack)[0].ravel()[0]
    starts = jax.lax.cond(some == some, begin, begin)

    def part(start, count):
        return jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, start, count), stack
        )

    return list(map(part, starts, counts))


def _typed_like_results(body: Callable[[Tree], Tree], init: Tree) -> Tree:
    """Casts values to vary along the mesh axes of a body's results."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return init
    while True:
        results = jax.eval_shape(body, init)
        typed = jax.tree.map(_varying_as, init, results)
        if all(map(_same_type, jax.tree.leaves(init), jax.tree.leaves(typed))):
            return init
        init = typed


def _varying_as(value: Any, result: Any) -> Any:
    missing = _varying_axes(result) - _varying_axes(value)
    return jax.lax.pcast(value, tuple(sorted(missing)), to="varying")


def _same_type(value: Any, other: Any) -> bool:
    return _varying_axes(value) == _varying_axes(other)


def _varying_axes(value: Any) -> frozenset[str]:
    # Abstract values have no mesh, without which `typeof` refuses manual axes.
    is_shape = isinstance(value, jax.ShapeDtypeStruct)
    kind = value if is_shape else jax.typeof(value)
    manual = getattr(kind, "manual_axis_type", None)  # named `vma` before jax 0.10.2
    if manual is None:
        return getattr(kind, "vma", None) or frozenset()
    return manual.varying
