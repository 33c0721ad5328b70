"""One step of per-layer updates in the backward pass, for known shapes."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.lax import optimization_barrier

from subtrack_jax._internal.dependence import used_keys
from subtrack_jax._internal.layered_model import LayeredModel, Params
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
    """One step for parameters of known shapes.

    Attributes:
      model: the model.
      state: parts of the optimizer's state.
      stack: key of the layers' parameters.
      max_gradient_norm: for clipping; infinite for none.
    """

    model: LayeredModel
    state: StackedState
    stack: str
    max_gradient_norm: float

    def __call__(
        self, params: Params, opt_state: optax.OptState, batch: Any, weight: Any
    ) -> BackwardUpdate:
        """Takes the step; arguments are those of the step of `update_in_backward`."""
        model, layers = self.model, params[self.stack]
        rest = {key: tree for key, tree in params.items() if key != self.stack}
        if not rest:
            raise ValueError(f"params has nothing beside {self.stack!r}")
        batch = model.split(batch)
        x, saved = model.forward(rest, layers, batch)
        part = jax.tree.map(lambda x: x[0], (x, batch))
        early = used_keys(lambda rest: model.before(rest, part[1]), rest)
        late = used_keys(lambda rest: model.after(rest, *part)[0], rest)
        gradients, dx, value, aux = model.gradient_after(late, rest, x, batch, weight)
        # Complete before the layers' gradients; those of `before` are not.
        complete = {
            key: gradients[key] if key in late else _zeros(tree)
            for key, tree in rest.items()
            if key not in early
        }

        def gradient_early(dx):
            """Gradient of the parameters of `before`, with what `after` adds."""
            own = model.gradient_before(early, rest, batch, dx)
            shared = early & late  # tied embeddings
            return own | {key: _sum(own[key], gradients[key]) for key in shared}

        norm, factor = None, None
        if self.max_gradient_norm < math.inf:
            first_dx, squares = self._measure(layers, saved, batch, dx)
            squares += _squares(complete) + _squares(gradient_early(first_dx))
            norm = jnp.sqrt(squares)
            factor = jnp.minimum(self.max_gradient_norm / norm, 1)
        ok = jnp.isfinite(value) & (norm is None or jnp.isfinite(norm))
        new_params, new_state, found = dict(params), opt_state, jnp.float32(0)

        def update_outside(ok, gradient):
            own = {key: rest[key] for key in gradient}
            part = self.state.part(opt_state, gradient.keys())
            return self._update(ok, factor, gradient, own, part)

        if early and complete:
            own, part, squares, ok = update_outside(ok, complete)
            # Before the layers, through which these gradients would live.
            own, part, dx = optimization_barrier((own, part, dx))
            new_params |= own
            new_state = self.state.join(new_state, part, complete.keys())
            found += squares
        dx, layers, stacks, squares, ok = self._update_layers(
            ok, factor, layers, opt_state, saved, batch, dx
        )
        new_params |= {self.stack: layers}
        new_state = self.state.with_stacks(new_state, stacks)
        found += squares
        last = gradient_early(dx) if early else complete
        own, part, squares, ok = update_outside(ok, last)
        new_params |= own
        # Shared state is written once, by the last update.
        new_state = self.state.join(new_state, part, last.keys(), shared=True)
        found += squares
        return BackwardUpdate(
            value,
            aux,
            new_params,
            new_state,
            jnp.sqrt(found) if norm is None else norm,
            ok,
        )

    def _update(
        self,
        ok: jax.Array,
        factor: jax.Array | None,
        gradient: Params,
        params: Params,
        state: optax.OptState,
    ) -> tuple[Params, optax.OptState, jax.Array, jax.Array]:
        """Updates some parameters if all gradients so far are finite.

        Args:
          ok: whether they are.
          factor: factor of the gradient; None: 1.
          gradient: by key of the parameters.
          params: the same parameters.
          state: the part of the state for these.

        Returns:
          The parameters and the state, the sum of squares of the gradient, and whether
          it is finite, too.
        """
        squares = _squares(gradient)
        ok &= jnp.isfinite(squares)

        def update(carry):
            params, state = carry
            scaled = gradient if factor is None else _scaled(factor, gradient)
            updates, state = self.state.update(gradient.keys(), scaled, state, params)
            return optax.apply_updates(params, updates), state

        return *apply_if(ok, update, (params, state), "update"), squares, ok

    def _update_layers(
        self,
        ok: jax.Array,
        factor: jax.Array | None,
        layers: Any,
        opt_state: optax.OptState,
        saved: Any,
        batch: Any,
        dx: Any,
    ) -> Any:
        """Backward pass through the layers, with an update of each.

        Args:
          ok: as in `_update`.
          factor: as in `_update`.
          layers: parameters of all layers.
          opt_state: the state of all parameters.
          saved: activations before each layer.
          batch: in parts.
          dx: gradient by the last activations.

        Returns:
          The gradient by the first activations, parameters and stacked state of the
          layers, the sum of squares of their gradients, and whether all are finite.
        """
        state, keys = self.state, {self.stack}

        def backward(carry, at):
            dx, layers, stacks, found, ok = carry
            k, x = at
            # Slices of the stacks are read once and written once: the guard's loop and
            # the barriers materialise them. A fusion that reads a stack which another
            # one writes would have the compiler copy the stack for every layer.
            own, slices = optimization_barrier(_slice((layers, stacks), k))
            gradient, dx = self.model.gradient_layer(_first(own), x, batch, dx)
            part = state.part(state.with_stacks(opt_state, slices), keys)
            new, part, squares, ok = self._update(
                ok,
                factor,
                {self.stack: jax.tree.map(lambda g: g[None], gradient)},
                {self.stack: own},
                part,
            )
            slices = state.stacks(state.join(opt_state, part, keys))
            new, slices = optimization_barrier((new[self.stack], slices))
            layers, stacks = _put((layers, stacks), (new, slices), k)
            return (dx, layers, stacks, found + squares, ok), None

        carry = dx, layers, state.stacks(opt_state), jnp.float32(0), ok
        at = jnp.arange(state.depth), saved
        return jax.lax.scan(backward, carry, at, reverse=True)[0]

    def _measure(
        self, layers: Any, saved: Any, batch: Any, dx: Any
    ) -> tuple[Any, jax.Array]:
        """Backward pass that keeps the sum of squares of the layers' gradients only."""

        def backward(carry, at):
            dx, found = carry
            k, x = at
            own = optimization_barrier(_first(_slice(layers, k)))
            gradient, dx = self.model.gradient_layer(own, x, batch, dx)
            return (dx, found + _squares(gradient)), None

        at = jnp.arange(self.state.depth), saved
        return jax.lax.scan(backward, (dx, jnp.float32(0)), at, reverse=True)[0]


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


def _sum(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


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
