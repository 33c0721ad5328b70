"""Matrices of a stack: sequential, or batched where a mesh splits the stack."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import subtrack_jax as stj
from subtrack_jax._internal import matrix_loops
from subtrack_jax._internal.matrix_loops import map_stack
from tests import sharded

# Shape, reduction, output and batch axes, and the split over a mesh of (4, 2).
STACKS = {
    "one": ((6, 10), 0, 1, (), P("tensor", None)),
    "no axis divides": ((3, 6, 10), 1, 2, (0,), P(None, "tensor", None)),
    "an axis may split": ((6, 4, 10), 1, 2, (0,), P("tensor", "fsdp", None)),
    "an axis splits": ((16, 4, 10), 1, 2, (0,), P("fsdp", "tensor", None)),
    "all axes split": ((16, 4, 10), 1, 2, (0,), P(("fsdp", "tensor"), None, None)),
    "in the middle": ((4, 16, 10), 0, 2, (1,), P("fsdp", "tensor", None)),
    "tall, two": ((10, 3, 4, 2), 0, 2, (1, 3), P(None, None, "fsdp", "tensor")),
}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("on_mesh", [False, True])
def test_map_is_a_loop_over_the_matrices(stack, on_mesh):
    shape, reduction, output, batch, spec = STACKS[stack]
    numbers = optax.contrib.MuonDimensionNumbers(reduction, output)
    leaf = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    view = stj.LowRank(2, numbers).views(leaf)
    bases = np.random.default_rng(1).normal(size=view.basis_shape).astype(np.float32)

    want_product, want_sum = np.zeros(view.coordinates_shape), {}
    for index in np.ndindex(view.batch_shape):
        where = dict(zip(batch, index, strict=True))
        matrix = leaf[tuple(where.get(axis, slice(None)) for axis in range(leaf.ndim))]
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        want_product[index] = bases[index].T @ wide
        want_sum[index] = wide[0].sum()

    if on_mesh:
        mesh = sharded.mesh(AxisType.Auto)
        leaf = jax.device_put(leaf, NamedSharding(mesh, spec))

    @jax.jit
    def run(leaf, bases):
        def of_one(view, leaf, basis):
            wide = view.wide(leaf)
            return basis.T @ wide, wide[0].sum()

        return map_stack(of_one, view, leaf, bases)

    product, sums = run(leaf, bases)
    np.testing.assert_allclose(product, want_product, atol=1e-5)
    for index, value in want_sum.items():
        np.testing.assert_allclose(sums[index], value, atol=1e-5)


@pytest.mark.parametrize("stack", STACKS)
def test_a_leaf_comes_back_from_its_matrices(stack):
    shape, reduction, output, _, _ = STACKS[stack]
    numbers = optax.contrib.MuonDimensionNumbers(reduction, output)
    leaf = jnp.arange(np.prod(shape), dtype=float).reshape(shape)
    view = stj.LowRank(2, numbers).views(leaf)
    np.testing.assert_array_equal(view.leaf(view.matrix(leaf)), leaf)


def test_one_matrix_at_a_time_takes_the_room_of_one():
    """Ten times the matrices need the same temporaries."""

    def temporaries(layers):
        numbers = optax.contrib.MuonDimensionNumbers(1, 2)
        leaf = jax.ShapeDtypeStruct((layers, 64, 128), jnp.float32)
        view = stj.LowRank(2, numbers).views(leaf)
        run = jax.jit(lambda leaf: map_stack(lambda _, g: (g @ g.T).sum(), view, leaf))
        return run.lower(leaf).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(30) < 1.1 * temporaries(3)


@pytest.mark.parametrize(
    "largest, on_mesh, is_loop",
    [(1, True, True), (1, False, False), (961, True, False)],
)
def test_large_matrices_on_a_mesh_are_mapped_in_a_loop(
    monkeypatch, largest, on_mesh, is_loop
):
    """Coordinates of 4 x 240 numbers: those of one matrix at a time are replicated."""
    monkeypatch.setattr(matrix_loops, "LARGE", largest)
    numbers = optax.contrib.MuonDimensionNumbers(1, 2)
    view = stj.LowRank(4, numbers).views(jnp.zeros((3, 8, 240)))
    mesh = sharded.mesh(AxisType.Explicit)
    sharding = NamedSharding(mesh, P(None, "tensor", None)) if on_mesh else None
    leaf = jax.ShapeDtypeStruct((3, 8, 240), jnp.float32, sharding=sharding)
    with jax.set_mesh(mesh) if on_mesh else contextlib.nullcontext():
        traced = jax.make_jaxpr(
            lambda leaf: matrix_loops.map_large(lambda _, x: jnp.sin(x), view, leaf)
        )(leaf)
    assert ("scan[" in str(traced)) == is_loop
