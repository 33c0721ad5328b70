"""Communication of a step: devices never send a matrix of a gradient's size."""

import contextlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import subtrack_jax as stj
from tests import common, sharded

OVERSAMPLING = 32  # of grassmann.range_finder, for these ranks
KINDS = {
    "wide": sharded.Split(common.Leaf((256, 512)), P("fsdp", "tensor")),
    "tall": sharded.Split(common.Leaf((512, 256)), P("tensor", "fsdp")),
    "transposed": sharded.Split(common.Leaf((512, 256)), P("fsdp", "tensor")),
    "rows_only": sharded.Split(common.Leaf((256, 512)), P(("fsdp", "tensor"), None)),
    "columns_only": sharded.Split(common.Leaf((256, 512)), P(None, ("fsdp", "tensor"))),
    "stacked": sharded.Split(
        common.Leaf((3, 256, 512), (1,), (2,)), P(None, "fsdp", "tensor")
    ),
    "experts": sharded.Split(
        common.Leaf((16, 128, 256), (1,), (2,)), P("fsdp", "tensor", None)
    ),
    "layers_of_experts": sharded.Split(
        common.Leaf((3, 2, 256, 512), (2,), (3,)), P(None, "tensor", "fsdp", None)
    ),
    "attention": sharded.Split(
        common.Leaf((256, 8, 64), (0,), (1, 2)), P("fsdp", "tensor", None)
    ),
    "attention_output": sharded.Split(
        common.Leaf((8, 64, 256), (0, 1), (2,)), P("tensor", None, "fsdp")
    ),
    "odd": sharded.Split(common.Leaf((256, 511)), P("fsdp", None)),
}
_COLLECTIVE = re.compile(
    r"= (?P<results>\(?[a-z]+[0-9]*\[.*?) (?P<kind>all-reduce|all-gather|"
    r"reduce-scatter|all-to-all|collective-permute|ragged-all-to-all|"
    r"collective-broadcast)(?:-start)?\("
)


class Collective(NamedTuple):
    """One exchange between devices, and its largest result on each of them."""

    kind: str
    elements: int
    in_loop: bool
    line: str


def collectives(compiled: Any) -> list[Collective]:
    """All collectives of a compiled program."""
    found = []
    for line in compiled.as_text().splitlines():
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        shapes = re.findall(r"\b[a-z]+[0-9]*\[([0-9,]*)\]", match["results"])
        sizes = [int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes]
        in_loop = "_subspaces/while/" in line or "turn_moments/while/" in line
        found.append(Collective(match["kind"], max(sizes), in_loop, line.strip()))
    return found


def _compiled(optimizer, splits, axis_type):
    """A step of training but for the gradient, with parameters and state donated."""
    mesh = sharded.mesh(axis_type)
    # Automatic axes need no context.
    is_explicit = axis_type == AxisType.Explicit
    with jax.set_mesh(mesh) if is_explicit else contextlib.nullcontext():
        params = sharded.shapes(splits, mesh)
        shardings = sharded.shardings(splits, mesh)
        placed = stj.state_sharding(optimizer, params)
        state = jax.tree.map(
            lambda leaf, sharding: leaf.update(sharding=sharding),
            jax.eval_shape(optimizer.init, params),
            placed,
        )

        def step(gradients, state, params):
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        step = jax.jit(step, out_shardings=(shardings, placed), donate_argnums=(1, 2))
        return step.lower(params, state, params).compile()


def _assert_little_is_sent(name, kind, rank=8, axis_type=AxisType.Auto, **arguments):
    """No more than a sketch of the range finder, and coordinates between refreshes."""
    split = KINDS[kind]
    optimizer = sharded.optimizer(name, {kind: split}, rank=rank, **arguments)
    found = collectives(_compiled(optimizer, {kind: split}, axis_type))
    assert found  # or this would not read what the compiler writes
    batch, m, n = split.leaf.view().to_matrices(np.empty(split.leaf.shape)).shape
    n = max(m, n) + -max(m, n) % 8  # the compiler pads what 8 devices share
    limit = batch * (rank + OVERSAMPLING) * n
    assert limit <= batch * m * n / 2
    for collective in found:
        assert collective.elements <= limit, collective
        if not collective.in_loop:
            assert collective.elements <= batch * rank * n, collective


OTHERS = common.others_slow(name for name in common.DISTINCT if name != "subtrack")


# Every kind of leaf for one method, another kind for each of the others.
@pytest.mark.parametrize(
    "name, kind",
    [("subtrack", kind) for kind in KINDS]
    + [
        pytest.param(*other.values, kind, marks=other.marks)
        for other, kind in zip(OTHERS, KINDS, strict=False)
    ],
)
def test_no_gradient_is_sent(name, kind):
    _assert_little_is_sent(name, kind)


@pytest.mark.parametrize("kind", ["wide", "stacked", "attention", "odd"])
def test_no_gradient_is_sent_at_a_larger_rank(kind):
    """A basis with a quarter of the gradient's memory."""
    _assert_little_is_sent("subtrack", kind, rank=64)


@pytest.mark.parametrize(
    "name, kind",
    [("subtrack", "wide"), ("galore", "tall"), ("subtrack", "odd")],
)
def test_no_gradient_is_sent_with_bases_on_the_long_side(name, kind):
    _assert_little_is_sent(name, kind, side="long")


@pytest.mark.parametrize(
    "name, kind",
    [("galore", "wide"), ("subtrack", "stacked"), ("galore", "odd")],
)
def test_no_gradient_is_sent_on_explicit_axes(name, kind):
    _assert_little_is_sent(name, kind, axis_type=AxisType.Explicit)
