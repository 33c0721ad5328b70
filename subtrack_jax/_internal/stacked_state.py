"""Optimizer state of a model with stacked layers, cut by layers and by parameters."""

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import optax

from subtrack_jax._internal.boxes import is_box
from subtrack_jax._internal.dependence import Dependence
from subtrack_jax._internal.named_leaves import path_name

Params = dict[str, Any]


class StackedState:
    """Parts of an optimizer's state, for updates of some parameters at a time.

    A node of the state with the keys of the parameters is about the parameters. What
    is elsewhere is shared: counts, hyper-parameters. Under the key of the stack, state
    whose first axis grows with the number of layers is stacked. Parameters that are
    not updated are masked leaf by leaf (`optax.MaskedNode`), so that trees of masks
    and of dimension numbers still fit.

    Attributes:
      depth: number of layers.
      masked: the parameters, all of them masked.

    Raises:
      ValueError: the parameters are not a dictionary with the stack; its leaves differ
        in their number of layers; or state depends on that number in another way.
    """

    def __init__(
        self, optimizer: optax.GradientTransformation, params: Params, stack: str
    ):
        if not isinstance(params, dict) or stack not in params:
            keys = sorted(params) if isinstance(params, dict) else type(params).__name__
            raise ValueError(
                f"stack={stack!r} is not a key of params, {keys}: give a dictionary"
                " whose entry of that name has a leading axis of layers."
            )
        self._optimizer, self._stack = optimizer, stack
        self.depth = _depth(params[stack], stack)
        self.masked = {
            key: jax.tree.map(lambda _: optax.MaskedNode(), tree, is_leaf=is_box)
            for key, tree in params.items()
        }
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params
        )
        deeper = shapes | {stack: _resized(shapes[stack], self.depth + 1)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `init` has warned already
            state, deeper_state = (
                jax.eval_shape(optimizer.init, tree) for tree in (shapes, deeper)
            )
        own = self._map(
            lambda node: {
                key: jax.tree.map(lambda _, key=key: key == stack, entry)
                for key, entry in node.items()
            },
            lambda _: False,
            state,
        )
        # A leaf may be coded in the deeper state alone: paths are those of the other.
        sizes = {
            path: leaf.shape for path, leaf in jax.tree.leaves_with_path(deeper_state)
        }
        self._is_stacked = [
            self._check_stacked(path_name(path), leaf.shape, sizes[path], is_own)
            for (path, leaf), is_own in zip(
                jax.tree.leaves_with_path(state), jax.tree.leaves(own), strict=True
            )
        ]
        self._check_update(shapes, state)

    # --- Parts of the state -------------------------------------------------------

    def stacks(self, state: Any) -> list[jax.Array]:
        """The stacked leaves of a state."""
        leaves = jax.tree.leaves(state)
        return [x for x, flag in zip(leaves, self._is_stacked, strict=True) if flag]

    def with_stacks(self, state: Any, stacks: Sequence[Any]) -> Any:
        """The state with other stacked leaves, in the order of `stacks`."""
        structure: Any
        leaves, structure = jax.tree.flatten(state)
        given = iter(stacks)
        return structure.unflatten(
            next(given) if flag else x
            for x, flag in zip(leaves, self._is_stacked, strict=True)
        )

    def part(self, state: Any, keys: Collection[str]) -> Any:
        """The state for an update of these keys of the parameters alone."""

        def masked(key, entry):
            mask = self.masked[key]
            try:
                jax.tree.structure(mask, is_leaf=_is_masked).flatten_up_to(entry)
            except ValueError:  # masked already, by a prefix of the tree
                return jax.tree.map(lambda _: optax.MaskedNode(), entry)
            return mask

        return self._map(
            lambda node: {
                key: entry if key in keys else masked(key, entry)
                for key, entry in node.items()
            },
            lambda leaf: leaf,
            state,
        )

    def join(
        self, state: Any, part: Any, keys: Collection[str], shared: bool = False
    ) -> Any:
        """Replaces the entries of these keys, and optionally the shared state.

        Args:
          state: the state of all parameters.
          part: state of `part`, of which other entries are masked.
          keys: the keys.
          shared: whether what is about no parameter is taken from the part, too.

        Returns:
          The state.
        """
        return self._map(
            lambda node, new: {
                key: new[key] if key in keys else entry for key, entry in node.items()
            },
            lambda leaf, new: new if shared else leaf,
            state,
            part,
        )

    def update(
        self, keys: Collection[str], gradients: Params, state: Any, params: Params
    ) -> tuple[Params, Any]:
        """Updates some of the parameters.

        Args:
          keys: their keys.
          gradients: gradients of these parameters.
          state: from `part`; the stack may have fewer layers, as in all arguments.
          params: these parameters.

        Returns:
          The updates, and the part's new state.
        """
        fill = lambda tree: {**self.masked, **{key: tree[key] for key in keys}}
        updates, state = self._optimizer.update(fill(gradients), state, fill(params))
        return {key: updates[key] for key in keys}, state

    def _map(self, of_node: Callable, of_shared: Callable, *states: Any) -> Any:
        """Maps nodes with the parameters' keys, and leaves outside of them."""

        def is_node(node):
            return isinstance(node, dict) and node.keys() == self.masked.keys()

        pick = lambda first, *rest: (of_node if is_node(first) else of_shared)(
            first, *rest
        )
        return jax.tree.map(pick, *states, is_leaf=is_node)

    # --- Checks -------------------------------------------------------------------

    def _check_stacked(
        self, name: str, shape: tuple[int, ...], deeper: tuple[int, ...], is_own: bool
    ) -> bool:
        """Whether a leaf of the state is stacked; raises if it depends otherwise."""
        if shape == deeper:
            return False
        if not is_own or deeper != (self.depth + 1, *shape[1:]):
            raise ValueError(
                f"{name} of the optimizer's state has the shape {shape}, and {deeper}"
                f" with one layer more: it is not stacked like the parameters of"
                f" {self._stack!r}, which then cannot be updated layer by layer."
            )
        return True

    def _check_update(self, shapes: Params, state: Any) -> None:
        """Raises unless an update of one layer needs its own gradients only."""
        stack = self._stack
        one = {stack: _resized(shapes[stack], 1)}
        structure: Any = jax.tree.structure(state)
        flags = structure.unflatten(self._is_stacked)
        slices = [_resized(leaf, 1) for leaf in self.stacks(state)]
        before = self.part(self.with_stacks(state, slices), {stack})

        def update(gradients, state, params):
            return self.update({stack}, gradients, state, params)

        try:
            traced = Dependence(update, one, before, one)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The optimizer cannot update one layer of {stack!r} by itself: {error}"
            ) from error
        updates, after = traced.results
        _check_same(before, after)
        gradients = jax.tree.leaves_with_path(one[stack])
        is_stacked = jax.tree.leaves(self.part(flags, {stack}))
        # The inputs in order: gradients, state, parameters.
        own = [True] * len(gradients)
        own += [*is_stacked, *own]
        for k, (path, _) in enumerate(jax.tree.leaves_with_path(after)):
            if is_stacked[k]:
                continue
            used = traced.inputs_of(len(jax.tree.leaves(updates)) + k)
            if any(a and b for a, b in zip(used, own, strict=True)):
                raise ValueError(
                    f"{path_name(path)} of the optimizer's state is shared by all"
                    " parameters and computed from their gradients, which never exist"
                    " together when each layer is updated in the backward pass: use"
                    " an ordinary step, or the optimizer without the wrapper that"
                    " looks at all gradients (such as optax.apply_if_finite)."
                )
        if _mixes_leaves(traced, [leaf.shape for _, leaf in gradients]):
            raise ValueError(
                "The optimizer's update of each leaf depends on the gradients of all"
                " leaves, which never exist together when each layer is updated in the"
                " backward pass: in place of optax.clip_by_global_norm give"
                " max_gradient_norm."
            )


def _mixes_leaves(traced: Dependence, shapes: list[tuple[int, ...]]) -> bool:
    """Whether every update depends on every other leaf's gradient.

    Leaves of one size prove nothing: they may share a loop.
    """
    pairs = [
        (k, other)
        for k, shape in enumerate(shapes)
        for other, its in enumerate(shapes)
        if sorted(shape) != sorted(its)
    ]
    used = [traced.inputs_of(k) for k in range(len(shapes))]
    return bool(pairs) and all(used[k][other] for k, other in pairs)


def _check_same(before: Any, after: Any) -> None:
    """Raises unless the update of one layer keeps the types of its state."""
    old, new = (
        {
            path_name(path): (leaf.shape, leaf.dtype)
            for path, leaf in jax.tree.leaves_with_path(tree)
        }
        for tree in (before, after)
    )
    for name in [*old, *new]:
        if old.get(name) != new.get(name):
            raise ValueError(
                f"{name} of the optimizer's state is {old.get(name)} for one layer and"
                f" {new.get(name)} after its update: this optimizer's state of a stack"
                " is not one state for each layer, so that they cannot be updated"
                " layer by layer."
            )


def _depth(layers: Any, stack: str) -> int:
    """Number of layers of a stack."""
    leaves = jax.tree.leaves_with_path(layers)
    sizes = {leaf.shape[:1] for _, leaf in leaves}
    if len(sizes) != 1 or () in sizes or (0,) in sizes:
        shapes = ", ".join(f"{path_name(path)} {leaf.shape}" for path, leaf in leaves)
        raise ValueError(
            f"params[{stack!r}] needs one leading axis of layers in all leaves, has"
            f" {shapes or 'no leaves'}."
        )
    return sizes.pop()[0]


def _resized(tree: Any, size: int) -> Any:
    """Shapes with another leading axis."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), tree
    )


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
