"""`jax.shard_map`: values are typed by the mesh axes along which they vary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import subtrack_jax as stj
from tests import common

DEVICES, STEPS = 8, 4
# Methods with trackers of another kind, or without one.
OTHER_KINDS = ("ldadam", "online_subspace_descent", "apollo")
CASES = {
    **{
        name: (common.OPTIMIZERS[name], {"rank": 2, "update_interval": 2})
        for name in ("subtrack", "golore", *OTHER_KINDS)
    },
    "eight_bits": (stj.subtrack, {"rank": 32, "mu_dtype": "int8"}),
}
CASES["golore"][1]["random_after_steps"] = 3


def _mesh():
    return jax.make_mesh((DEVICES,), ("device",))


def _grads(shapes, seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def _shapes(name):
    size = 64 if name == "eight_bits" else 6
    return {"wide": (size, 2 * size), "stacked": (2, 10, 7), "bias": (5,)}


def _optimizer(name):
    make, settings = CASES[name]
    axes = optax.contrib.MuonDimensionNumbers(-2, -1)
    return make(1e-2, dimension_numbers=axes, **settings)


@pytest.mark.parametrize("name", common.others_slow(CASES, ["ldadam", "eight_bits"]))
def test_a_model_of_its_own_on_every_device(name):
    """Ensembles, experts, local SGD: states differ, and equal those on one device."""
    optimizer, mesh = _optimizer(name), _mesh()
    own = PartitionSpec("device")

    def update(grads, state):
        return optimizer.update(grads, state, grads)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=own, out_specs=own)
    def update_all(grads, state):
        one = jax.tree.map(lambda x: x[0], (grads, state))
        return jax.tree.map(lambda x: x[None], update(*one))

    def stacked(trees):
        tree = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        return jax.device_put(tree, NamedSharding(mesh, own))

    update_one = jax.jit(update)
    zeros = jax.tree.map(jnp.float32, _grads(_shapes(name), 0))
    states = [optimizer.init(zeros)] * DEVICES
    state = stacked(states)
    for step in range(STEPS):
        grads = [
            jax.tree.map(jnp.float32, _grads(_shapes(name), (step, device)))
            for device in range(DEVICES)
        ]
        updates, state = update_all(stacked(grads), state)
        for device in (0, DEVICES - 1):
            wanted, states[device] = update_one(grads[device], states[device])
            for leaf, update_of in wanted.items():
                np.testing.assert_allclose(
                    np.asarray(updates[leaf])[device],
                    update_of,
                    rtol=1e-3,
                    atol=1e-6,
                    err_msg=f"{leaf} in step {step} on device {device}",
                )


@pytest.mark.parametrize("name", ["subtrack", "golore", "ldadam"])
def test_one_model_on_all_devices(name):
    """With averaged gradients all devices agree, and their types are replicated."""
    optimizer, mesh = _optimizer(name), _mesh()

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec("device"), PartitionSpec()),
        out_specs=PartitionSpec(),
    )
    def update(grads, state):
        mean = jax.tree.map(lambda x: jax.lax.pmean(x[0], "device"), grads)
        return optimizer.update(mean, state, mean)

    grads = jax.tree.map(
        lambda x: jnp.float32(np.stack([x] * DEVICES)), _grads(_shapes(name), 1)
    )
    one = jax.tree.map(lambda x: x[0], grads)
    state = optimizer.init(one)
    grads = jax.device_put(grads, NamedSharding(mesh, PartitionSpec("device")))
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    updates, _ = update(grads, state)
    wanted, _ = optimizer.update(one, optimizer.init(one), one)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6),
        updates,
        wanted,
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_some_axes_of_the_mesh_are_manual(kind):
    """One model per group of devices, sharded by the compiler within the group."""
    mesh = jax.make_mesh((2, 4), ("group", "fsdp"), axis_types=(kind, kind))
    optimizer, own = (
        stj.subtrack(1e-2, rank=2, update_interval=1),
        PartitionSpec("group"),
    )

    def train(grads):
        one = jax.tree.map(lambda x: x[0], grads)
        state = optimizer.init(one)
        for _ in range(2):
            updates, state = optimizer.update(one, state, one)
        return jax.tree.map(lambda x: x[None], updates)

    grads = _grads({"wide": (2, 6, 8), "bias": (2, 3)}, 1)
    grads = jax.tree.map(jnp.float32, grads)
    in_groups = jax.shard_map(
        train, mesh=mesh, in_specs=own, out_specs=own, axis_names={"group"}
    )
    updates, alone = jax.jit(in_groups)(grads), jax.jit(train)
    for group in range(2):
        wanted = alone(jax.tree.map(lambda x: x[group : group + 1], grads))  # noqa: B023
        for leaf, update_of in wanted.items():
            np.testing.assert_allclose(
                np.asarray(updates[leaf])[group], update_of[0], rtol=1e-3, atol=1e-6
            )
