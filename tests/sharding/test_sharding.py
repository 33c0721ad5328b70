"""Results on explicit and automatic meshes of eight devices equal those on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import subtrack_jax as stj
from subtrack_jax._internal import matrix_loops
from tests import common, sharded

STEPS = 5  # the start and two refreshes
# Compiling for eight devices is slow: one small leaf of each orientation.
SPLITS = {
    "stacked": sharded.Split(
        common.Leaf((2, 8, 16), (1,), (2,)), P(None, "fsdp", "tensor")
    ),
    "layers last": sharded.Split(
        common.Leaf((16, 8, 3), (0,), (1,)), P("fsdp", "tensor", None)
    ),
    "experts": sharded.Split(
        common.Leaf((4, 16, 8), (1,), (2,)), P("fsdp", "tensor", None)
    ),
    "attention": sharded.Split(
        common.Leaf((8, 2, 8), (0,), (1, 2)), P("fsdp", "tensor")
    ),
    "odd": sharded.Split(common.Leaf((8, 13)), P("fsdp", None)),
    "vector": sharded.Split(common.Leaf((8,), None), P("tensor")),
}
# Between them both orientations, split stacks, and a side that is not divided.
FEW_SPLITS = ("layers last", "experts", "odd")


def _gradients(splits, mesh=None):
    """Recorded gradients with an axis of steps, on the mesh if there is one."""
    tree = common.drifting_tree(sharded.leaves(splits), STEPS)
    if mesh is None:
        return tree
    return {
        name: jax.device_put(x, NamedSharding(mesh, P(None, *splits[name].spec)))
        for name, x in tree.items()
    }


def _trained(optimizer, params, gradients, state_shardings=None):
    """Parameters and state after each step."""

    @functools.partial(
        jax.jit,
        out_shardings=(
            jax.tree.map(lambda leaf: leaf.sharding, params),
            state_shardings,
        ),
    )
    def train(params, state, gradients):
        def step(carry, gradient):
            params, state = carry
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), gradients)[0]

    init = jax.jit(optimizer.init, out_shardings=state_shardings)
    return train(params, init(params), gradients)


# Methods take turns with the kinds of meshes; the other kind of each is that of
# `test_state_stays_where_it_is_placed`.
@pytest.mark.parametrize("name", common.others_slow(common.DISTINCT))
def test_equals_one_device(name):
    """Parameters within 1e-5 of their change, refreshes included, and the state.

    The scan also refuses a state whose types change.
    """
    place = common.DISTINCT.index(name)
    both = name in ("subtrack", "ldadam")
    kinds = sharded.AXIS_TYPES if both else [sharded.AXIS_TYPES[place % 2]]
    names = SPLITS if both else [FEW_SPLITS[place % 3], "vector"]
    _check_against_one_device(name, kinds, {name: SPLITS[name] for name in names})


@pytest.mark.parametrize(
    "name", ["subtrack", pytest.param("ldadam", marks=pytest.mark.slow), "apollo"]
)
def test_one_large_matrix_after_another_equals_one_device(name, monkeypatch):
    monkeypatch.setattr(matrix_loops, "LARGE", 1)
    splits = SPLITS if name == "subtrack" else {"experts": SPLITS["experts"]}
    kinds = sharded.AXIS_TYPES[name == "subtrack" :][:1]
    _check_against_one_device(name, kinds, splits)


def _check_against_one_device(name, axis_types, splits):
    optimizer = sharded.optimizer(name, splits, rank=4, weight_decay=0.1)
    params = common.zeros(sharded.leaves(splits))
    want, want_state = _trained(optimizer, params, _gradients(splits))
    for axis_type in axis_types:
        mesh = sharded.mesh(axis_type)
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, sharded.shardings(splits, mesh))
            got, got_state = _trained(
                optimizer,
                placed,
                _gradients(splits, mesh),
                stj.state_sharding(optimizer, placed),
            )
        assert jax.tree.structure(got_state) == jax.tree.structure(want_state)
        for leaf in splits:
            change = np.max(np.abs(want[leaf]))
            np.testing.assert_allclose(
                got[leaf], want[leaf], rtol=0, atol=1e-5 * change, err_msg=leaf
            )
        for (path, a), (_, b) in zip(
            sharded.named(got_state), sharded.named(want_state), strict=True
        ):
            np.testing.assert_allclose(
                a, b, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path)
            )


def test_large_matrices_take_the_room_of_one(monkeypatch):
    """Temporary memory of replicated coordinates; here of 21 layers."""
    splits = {
        "layers": sharded.Split(
            common.Leaf((21, 64, 128), (1,), (2,)), P(None, ("fsdp", "tensor"), None)
        )
    }
    temporaries = []
    for largest in (1, matrix_loops.LARGE):
        monkeypatch.setattr(matrix_loops, "LARGE", largest)
        optimizer = sharded.optimizer("grass_jump", splits, rank=32)
        mesh = sharded.mesh(jax.sharding.AxisType.Explicit)
        with jax.set_mesh(mesh):
            params = sharded.shapes(splits, mesh)
            state = jax.eval_shape(optimizer.init, params)
            step = jax.jit(optimizer.update)
            memory = step.lower(params, state).compile().memory_analysis()
        temporaries.append(memory.temp_size_in_bytes)
    assert temporaries[0] < 0.6 * temporaries[1]


def test_a_mesh_that_does_not_divide():
    """State is replicated where the mesh does not divide it; that is not an error."""
    leaf = common.Leaf((12, 9))
    gradients = jnp.asarray(common.drifting_gradients(leaf, STEPS), jnp.float32)
    optimizer = stj.subtrack(1e-2, rank=3, update_interval=2)
    want = common.run(optimizer, jnp.zeros(leaf.shape), gradients).updates
    mesh = sharded.mesh(jax.sharding.AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = jax.device_put(
            jnp.zeros(leaf.shape), NamedSharding(mesh, P("fsdp", None))
        )
        placed = jax.device_put(gradients, NamedSharding(mesh, P(None, "fsdp", None)))
        state = optimizer.init(params)
        assert jax.typeof(optax.tree.get(state, "basis")).sharding.spec == P(None, None)
        got = common.run(optimizer, params, placed).updates
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("name", common.OPTIMIZERS)
def test_hyperparameters_are_injected_on_explicit_axes(name):
    """Hyper-parameters are traced outside the stages, where axes have types."""
    splits = sharded.chosen("wide", "embedding")
    mesh = sharded.mesh(jax.sharding.AxisType.Explicit)
    factory = optax.inject_hyperparams(
        common.OPTIMIZERS[name], static_args=("rank", "dimension_numbers")
    )
    optimizer = factory(
        optax.linear_schedule(1e-2, 0.0, 9),
        rank=4,
        dimension_numbers=common.dimension_numbers(sharded.leaves(splits)),
    )
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding),
            sharded.shapes(splits, mesh),
        )
        state = optimizer.init(params)  # abstract values would not be on the mesh
        updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert sharded.types(updates) == sharded.types(params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
