"""One step of per-layer updates in the backward pass, for known shapes."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.lax import optimization_barrier

from subtrack_jax._internal.dependence import used_keys
from subtrack_jax._internal.layered_model import LayeredModel
from subtrack_jax._internal.loops import apply_if
from subtrack_jax._internal.stacked_state import StackedState


class BackwardUpdate(NamedTuple):
    """Results of a step of `update_in_backward`.

    Attributes:
      value: what was minimised, before the step; scalar.
      aux: further results of `after`, summed over the parts of the batch; None
        without `has_aux`.
      params: the new parameters.
      opt_state: the new state.
      gradient_norm: global norm of the gradient before clipping; scalar float32.
      applied: scalar bool, False if the value or a gradient was not finite.
    """

    value: jax.Array
    aux: Any
    params: Any
    opt_state: optax.OptState
    gradient_norm: jax.Array
    applied: jax.Array


class BackwardStep(NamedTuple):
    """One step for parameters of known shapes."""

    model: LayeredModel
    state: StackedState
    stack: str
    max_gradient_norm: float

    def __call__(self, params, opt_state, batch, weight) -> BackwardUpdate:
        model, state = self.model, self.state
        layers = params[self.stack]
        rest = {key: tree for key, tree in params.items() if key != self.stack}
        if not rest:
            raise ValueError(f"params has nothing beside {self.stack!r}")
        batch = model.split(batch)
        x, saved = model.forward(rest, layers, batch)

        part = jax.tree.map(lambda x: x[0], (x, batch))
        early = used_keys(lambda rest: model.before(rest, part[1]), rest)
        late = used_keys(lambda rest: model.after(rest, *part)[0], rest)
        gradients, dx, value, aux = model.gradient_after(late, rest, x, batch, weight)

        def gradient_early(dx):
            """Gradient of the parameters of `before`, with what `after` adds."""
            own = model.gradient_before(early, rest, batch, dx)
            return {
                key: jax.tree.map(jnp.add, gradients[key], tree)
                if key in gradients
                else tree
                for key, tree in own.items()
            }

        outside = {
            key: gradients[key] if key in late else _zeros(tree)
            for key, tree in rest.items()
            if key not in early
        }
        norm, factor = None, jnp.float32(1)
        if self.max_gradient_norm < math.inf:
            dx_first, squares = self._measure(layers, saved, dx)
            squares += _squares(outside) + _squares(gradient_early(dx_first))
            norm = jnp.sqrt(squares)
            factor = jnp.minimum(self.max_gradient_norm / norm, 1)

        def updated(ok, keys, gradient, params, opt_state):
            """Parameters and state after an update, squares of the gradient, ok."""
            squares = _squares(gradient)
            ok &= jnp.isfinite(squares)
            if norm is not None:
                gradient = _scaled(factor, gradient)

            def update(carry):
                params, opt_state = carry
                updates, opt_state = state.update(keys, gradient, opt_state, params)
                return optax.apply_updates(params, updates), opt_state

            new = apply_if(ok, update, (params, opt_state), "update")
            return *new, squares, ok

        def update_outside(ok, gradient):
            keys = gradient.keys()
            own = {key: rest[key] for key in keys}
            return updated(ok, keys, gradient, own, state.part(opt_state, keys))

        def backward(carry, at):
            dx, layers, stacks, squares, ok = carry
            k, x = at
            # Slices of the stacks are read once and written once: the guard's loop and
            # the barriers materialise them. A fusion that reads a stack which another
            # one writes would have the compiler copy the stack for every layer.
            own, slices = optimization_barrier(_slice((layers, stacks), k))
            gradient, dx = model.gradient_layer(_first(own), x, dx)
            gradient = {self.stack: jax.tree.map(lambda g: g[None], gradient)}
            mine = state.part(state.with_stacks(opt_state, slices), {self.stack})
            new, mine, found, ok = updated(
                ok, {self.stack}, gradient, {self.stack: own}, mine
            )
            mine = state.join(opt_state, mine, {self.stack})
            pieces = optimization_barrier((new[self.stack], state.stacks(mine)))
            layers, stacks = _put((layers, stacks), pieces, k)
            return (dx, layers, stacks, squares + found, ok), None

        ok = jnp.isfinite(value) & jnp.isfinite(factor)
        last = outside if not early else {}
        first = {} if not early else outside
        total = jnp.float32(0)
        done, done_state = {}, opt_state
        if first:
            # Before the loop, so that these gradients do not live through it.
            new, new_state, total, ok = update_outside(ok, first)
            (done, part_state), dx = optimization_barrier(((new, new_state), dx))
            done_state = state.join(opt_state, part_state, first.keys())
        carry = dx, layers, state.stacks(opt_state), total, ok
        (dx, layers, stacks, total, ok), _ = jax.lax.scan(
            backward, carry, (jnp.arange(state.depth), saved), reverse=True
        )
        last = gradient_early(dx) if early else outside
        new, part_state, found, ok = update_outside(ok, last)
        # Shared state is written once, by the last update.
        new_state = state.join(
            state.with_stacks(done_state, stacks), part_state, last.keys(), shared=True
        )
        new_params = {**done, **new, self.stack: layers}
        return BackwardUpdate(
            value,
            aux,
            {key: new_params[key] for key in params},
            new_state,
            jnp.sqrt(total + found) if norm is None else norm,
            ok,
        )

    def _measure(self, layers, saved, dx):
        """Backward pass that keeps the square norm of the layers' gradients only."""

        def backward(carry, at):
            dx, squares = carry
            k, x = at
            own = optimization_barrier(_first(_slice(layers, k)))
            gradient, dx = self.model.gradient_layer(own, x, dx)
            return (dx, squares + _squares(gradient)), None

        at = jnp.arange(self.state.depth), saved
        carry, _ = jax.lax.scan(backward, (dx, jnp.float32(0)), at, reverse=True)
        return carry


def _slice(stack: Any, k: jax.Array) -> Any:
    """A stack of one layer."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, k, 1), stack)


def _put(stack: Any, piece: Any, k: jax.Array) -> Any:
    """The stack with one layer replaced."""
    return jax.tree.map(
        lambda x, one: jax.lax.dynamic_update_slice_in_dim(x, one, k, 0), stack, piece
    )


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def _squares(tree: Any) -> jax.Array:
    """Sum of squares in float32."""
    total = jnp.float32(0)
    for leaf in jax.tree.leaves(tree):
        total += jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return total


def _scaled(factor: jax.Array, tree: Any) -> Any:
    return jax.tree.map(
        lambda g: (factor * g.astype(jnp.float32)).astype(g.dtype), tree
    )
