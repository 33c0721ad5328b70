"""Updates in the backward pass on meshes of automatic and explicit axes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import subtrack_jax as stj
from tests import sharded
from tests import test_update_in_backward as single

SPECS = {
    "embedding": {"kernel": P("tensor", "fsdp")},
    "layers": {
        "norm": P(None, "fsdp"),
        "up": {"kernel": P(None, "fsdp", "tensor")},
        "down": {"kernel": P(None, "tensor", "fsdp")},
    },
    "norm": P("fsdp"),
    "head": {"kernel": P("fsdp", "tensor")},
}


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", sharded.AXIS_TYPES)
def test_a_mesh_changes_nothing(axis_type):
    mesh = sharded.mesh(axis_type)
    optimizer, params = single.OPTIMIZERS["subtrack"], single.make_params()
    arguments = {"parts": 3, "max_gradient_norm": 0.5}
    step = single.make_step(optimizer, **arguments)
    want, _ = single.run(step, optimizer, params, steps=3)

    def placed(function, spec):
        """A model's function whose products have no types on explicit axes."""
        if axis_type == AxisType.Auto:
            return function
        return jax.sharding.auto_axes(function, out_sharding=spec)

    activations = P("fsdp", None, None)
    step = stj.update_in_backward(
        optimizer,
        placed(single.before, activations),
        placed(single.layer, activations),
        placed(single.after, P()),
        has_aux=True,
        **arguments,
    )
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        SPECS,
        is_leaf=lambda x: isinstance(x, P),
    )
    split_params = jax.device_put(params, shardings)
    state_shardings = stj.state_sharding(optimizer, split_params)
    state = jax.jit(optimizer.init, out_shardings=state_shardings)(split_params)

    @jax.jit
    def of_mean(params, state, batch):
        return step(params, state, batch, 1 / jnp.sum(batch["mask"]))

    with jax.set_mesh(mesh):
        for seed in range(3):
            rows = NamedSharding(mesh, P("fsdp"))
            batch = jax.device_put(single.make_batch(seed), rows)
            done = of_mean(split_params, state, batch)
            split_params, state = done.params, done.opt_state
    assert single.relative_difference(split_params, want.params, params) < 1e-5
    assert done.gradient_norm == pytest.approx(float(want.gradient_norm), rel=1e-5)
    for tree, expected in ((split_params, shardings), (state, state_shardings)):
        same = jax.tree.map(
            lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), tree, expected
        )
        assert all(jax.tree.leaves(same))
