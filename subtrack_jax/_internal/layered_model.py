"""Forward and backward passes of before / stack of layers / after, layer by layer."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LayeredModel:
    """A model whose layers are called one after another, on a batch in parts.

    The outer loop is over layers, the inner one over parts of the batch, so that the
    gradient of one layer is complete before that of the next begins. Batches and
    activations have a leading axis of parts.

    Attributes:
      before: (parameters outside of the stack, part) -> activations.
      layer: (parameters of one layer, activations, part) -> activations.
      after: (parameters outside of the stack, activations, part) -> (value to
        minimise, further results).
      parts: number of parts of a batch, computed sequentially.
    """

    before: Callable[..., Any]
    layer: Callable[..., Any]
    after: Callable[..., Any]
    parts: int

    def split(self, batch: Any) -> Any:
        """Splits a batch into parts, strided: each stays sharded over all devices.

        Raises:
          ValueError: the size of the batch is not a multiple of their number.
        """

        def split(x):
            if x.ndim == 0 or x.shape[0] % self.parts:
                raise ValueError(
                    f"parts={self.parts} do not divide the batch, which has an array"
                    f" of shape {x.shape}: all need a leading axis of a multiple."
                )
            return x.reshape(-1, self.parts, *x.shape[1:]).swapaxes(0, 1)

        return jax.tree.map(split, batch)

    def forward(self, rest: Params, layers: Any, batch: Any) -> tuple[Any, Any]:
        """Activations after the last layer, and those before each layer, stacked."""

        def of_layer(x, parameters):
            call = lambda x, part: self.layer(parameters, x, part)
            return self._map(call, x, batch), x

        x = self._map(lambda part: self.before(rest, part), batch)
        return jax.lax.scan(of_layer, x, layers)

    def gradient_after(
        self, keys: Collection[str], rest: Params, x: Any, batch: Any, weight: Any
    ) -> tuple[Params, Any, Any, Any]:
        """Gradient of `after`.

        Args:
          keys: keys of the parameters to differentiate.
          rest: parameters outside of the stack.
          x: activations after the last layer.
          batch: from `split`.
          weight: factor of the value.

        Returns:
          The gradient by parameters, and by activations; the value and the further
          results, summed over the parts.
        """
        own = {key: rest[key] for key in keys}

        def value(own, x, part):
            value, aux = self.after({**rest, **own}, x, part)
            return weight * value, aux

        def of_part(x, part):
            (total, aux), (gradient, dx) = jax.value_and_grad(
                value, (0, 1), has_aux=True
            )(own, x, part)
            return gradient, (dx, total, aux)

        gradient, (dx, total, aux) = self._sum(of_part, own, x, batch)
        add = lambda x: jnp.sum(x, axis=0)
        return gradient, dx, add(total), jax.tree.map(add, aux)

    def gradient_layer(
        self, parameters: Any, x: Any, batch: Any, dx: Any
    ) -> tuple[Any, Any]:
        """Gradient of one layer by its parameters, and by its activations."""

        def of_part(x, part, dx):
            call = lambda parameters, x: self.layer(parameters, x, part)
            return jax.vjp(call, parameters, x)[1](dx)

        return self._sum(of_part, parameters, x, batch, dx)

    def gradient_before(
        self, keys: Collection[str], rest: Params, batch: Any, dx: Any
    ) -> Params:
        """Gradient of `before` by the parameters of some keys."""
        own = {key: rest[key] for key in keys}

        def of_part(part, dx):
            call = lambda own: self.before({**rest, **own}, part)
            return jax.vjp(call, own)[1](dx)[0], ()

        return self._sum(of_part, own, batch, dx)[0]

    def _map(self, function: Callable[..., Any], *xs: Any) -> Any:
        """Maps over the parts, sequentially."""
        if self.parts > 1:
            return jax.lax.map(lambda xs: function(*xs), xs)
        return _stacked(function(*map(_only, xs)))

    def _sum(self, function: Callable[..., Any], like: Any, *xs: Any) -> Any:
        """Sums gradients over the parts in float32; stacks other results.

        Args:
          function: from a part to its gradient and other results.
          like: tree of the parameters.
          *xs: its arguments, for all parts.

        Returns:
          The sum, in the dtypes of the parameters, and the stacked results.
        """
        if self.parts == 1:
            gradient, others = function(*map(_only, xs))
            return gradient, _stacked(others)

        def add(total, xs):
            gradient, others = function(*xs)
            return jax.tree.map(jnp.add, total, gradient), others

        # Sums of many parts need more digits than bfloat16 has.
        zeros = jax.tree.map(
            lambda p: jnp.zeros_like(p, jnp.promote_types(p.dtype, jnp.float32)), like
        )
        total, others = jax.lax.scan(add, zeros, xs)
        return jax.tree.map(lambda g, p: g.astype(p.dtype), total, like), others


def _only(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.squeeze(x, 0), tree)


def _stacked(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.expand_dims(x, 0), tree)
