"""Eight devices, explicit and automatic meshes: the numbers of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests import common

STEPS = 5
LEAVES = {
    "wide": common.Leaf((8, 16)),
    "tall": common.Leaf((16, 8)),
    "stacked": common.Leaf((4, 8, 16), (1,), (2,)),
    "experts": common.Leaf((4, 16, 8), (1,), (2,)),
    "attention": common.Leaf((8, 4, 4), (0,), (1, 2)),
    "vector": common.Leaf((8,), None),
}
# Compiling for eight devices is slow: one leaf of each orientation is run.
RUN = {name: LEAVES[name] for name in ("stacked", "experts", "attention", "vector")}
SPECS = {
    "wide": P("data", "model"),
    "tall": P(None, ("data", "model")),
    "stacked": P(None, "data", "model"),
    "experts": P("model", "data", None),
    "attention": P("data", "model", None),
    "vector": P("model"),
}


def _optimizer(name, leaves=LEAVES):
    return common.OPTIMIZERS[name](
        1e-2,
        rank=2,
        update_interval=2,
        weight_decay=0.1,
        dimension_numbers=common.dimension_numbers(leaves),
    )


def _mesh(axis_types):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_types,) * 2)


def _placed(tree, mesh, stacked_over=()):
    """A tree of parameters, or of gradients with leading axes, on the mesh."""
    return {
        name: jax.device_put(x, NamedSharding(mesh, P(*stacked_over, *SPECS[name])))
        for name, x in tree.items()
    }


def _types(tree):
    return [(jax.tree_util.keystr(k), jax.typeof(x)) for k, x in _leaves(tree)]


def _leaves(tree):
    return jax.tree.leaves_with_path(tree)


@pytest.mark.parametrize("name", common.OPTIMIZERS)
def test_equals_one_device(name):
    """Over two refreshes; the scan also refuses a state whose types change."""
    optimizer = _optimizer(name, RUN)
    gradients = common.drifting_tree(RUN, STEPS)
    params = common.at(gradients, 0)
    want = common.run(optimizer, params, gradients)
    for axis_types in (AxisType.Explicit, AxisType.Auto):
        mesh = _mesh(axis_types)
        with jax.set_mesh(mesh):
            placed = _placed(params, mesh)
            got = common.run(optimizer, placed, _placed(gradients, mesh, (None,)))
            if axis_types == AxisType.Explicit:
                assert _types(common.at(got.updates, 0)) == _types(placed)
        for leaf in RUN:
            scale = np.max(np.abs(want.updates[leaf]))
            np.testing.assert_allclose(
                got.updates[leaf], want.updates[leaf], rtol=0, atol=2e-5 * scale
            )
        for (path, a), (_, b) in zip(
            _leaves(got.state), _leaves(want.state), strict=True
        ):
            np.testing.assert_allclose(
                a, b, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path)
            )


@pytest.mark.parametrize("name", common.OPTIMIZERS)
def test_init_under_jit_has_the_same_types(name):
    """Shardings included, on an explicit mesh."""
    optimizer = _optimizer(name)
    mesh = _mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = _placed(common.zeros(LEAVES), mesh)
        assert _types(jax.jit(optimizer.init)(params)) == _types(optimizer.init(params))


def test_no_device_keeps_a_copy():
    """State is split over every mesh axis that splits its parameter."""
    mesh = _mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = _placed(common.zeros(LEAVES), mesh)
        state = _optimizer("subtrack").init(params)
    for field in ("basis", "mu", "nu"):
        for path, leaf in _leaves(optax.tree.get(state, field)):
            name = path[0].key
            pieces = params[name].size // _piece(params[name])
            assert leaf.size // _piece(leaf) == pieces, (field, name, leaf.sharding)
    assert jax.typeof(optax.tree.get(state, "basis")["wide"]).sharding.spec == P(
        ("data", "model"), None
    )
    # First the axes that split the same side of the gradient.
    assert jax.typeof(optax.tree.get(state, "mu")["wide"]).sharding.spec == P(
        None, ("model", "data")
    )


def _piece(x):
    return int(np.prod(x.sharding.shard_shape(x.shape)))


def test_a_mesh_that_does_not_divide():
    """Sides that the mesh does not divide leave state whole, not in error."""
    leaf = common.Leaf((6, 9))
    gradients = jnp.asarray(common.drifting_gradients(leaf, STEPS), jnp.float32)
    optimizer = common.OPTIMIZERS["subtrack"](1e-2, rank=2, update_interval=2)
    want = common.run(optimizer, jnp.zeros(leaf.shape), gradients).updates
    mesh = _mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = jax.device_put(
            jnp.zeros(leaf.shape), NamedSharding(mesh, P("data", None))
        )
        placed = jax.device_put(gradients, NamedSharding(mesh, P(None, "data", None)))
        got = common.run(optimizer, params, placed).updates
    np.testing.assert_allclose(got, want, atol=1e-6)
