"""8-bit moments on meshes: placement of codes and scales, communication."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import subtrack_jax as stj
from tests import common, sharded
from tests.sharding.test_communication import collectives

SPLITS = {
    "wide": sharded.Split(common.Leaf((64, 512)), P("fsdp", "tensor")),
    "layers": sharded.Split(
        common.Leaf((2, 1024, 64), (1,), (2,)), P(None, "fsdp", "tensor")
    ),
    "odd": sharded.Split(common.Leaf((64, 511)), P(("fsdp", "tensor"), None)),
    "embedding": sharded.Split(common.Leaf((128, 512), None), P("tensor", "fsdp")),
}


@pytest.mark.parametrize(
    "axis_type, name",
    [
        (AxisType.Explicit, "subtrack"),
        pytest.param(AxisType.Auto, "ldadam", marks=pytest.mark.slow),
    ],
    ids=["explicit-subtrack", "auto-ldadam"],
)
def test_on_a_mesh(axis_type, name):
    """State is split as its parameters' sharding requires, and updates are equal."""
    mesh = sharded.mesh(axis_type)
    # 192 columns are two blocks: codes in eight shards, scales in two.
    few_blocks = sharded.Split(common.Leaf((64, 192)), P("fsdp", "tensor"))
    kinds = ("layers", "embedding") + (() if name == "subtrack" else ("odd",))
    splits = {kind: SPLITS[kind] for kind in kinds} | {"few_blocks": few_blocks}
    optimizer = sharded.optimizer(name, splits, rank=24, mu_dtype="int8")
    recorded = common.drifting_tree(sharded.leaves(splits), 4)
    zeros = common.at(recorded, 0)
    want = common.run(optimizer, zeros, recorded).updates
    with jax.set_mesh(mesh):
        gradients = [
            jax.device_put(common.at(recorded, step), sharded.shardings(splits, mesh))
            for step in range(4)
        ]
        params = gradients[0]
        placed = stj.state_sharding(optimizer, params)
        state = jax.jit(optimizer.init, out_shardings=placed)(params)
        before = sharded.types(state)
        for field in ("mu", "nu", "mu_scale", "nu_scale"):
            for name, leaf in optax.tree.get(state, field).items():
                whole = 2 if (name, field[2:]) == ("few_blocks", "_scale") else 8
                assert sharded.pieces(leaf.shape, leaf.sharding) == whole, (field, name)
        out = None
        if axis_type == AxisType.Explicit:
            assert sharded.types(optimizer.init(params)) == before
        else:
            out = (sharded.shardings(splits, mesh), placed)
        update = jax.jit(optimizer.update, out_shardings=out)
        for gradient in gradients:
            updates, state = update(gradient, state, params)
            assert sharded.types(state) == before
        assert update._cache_size() == 1
    for name in splits:
        # Not bit-equal: occasionally a sum is rounded to the next code.
        error = np.linalg.norm(np.ravel(updates[name] - want[name][-1]))
        assert error < 0.005 * np.linalg.norm(np.ravel(want[name][-1])), name


def test_codes_stay_on_their_devices():
    """Devices exchange the same bytes as with float32 moments."""
    mesh = sharded.mesh(AxisType.Auto)
    params = sharded.shapes(SPLITS, mesh)
    sent = {}
    for mu_dtype in ("int8", None):
        optimizer = sharded.optimizer("subtrack", SPLITS, rank=16, mu_dtype=mu_dtype)
        placed = stj.state_sharding(optimizer, params)
        state = jax.tree.map(
            lambda leaf, sharding: leaf.update(sharding=sharding),
            jax.eval_shape(optimizer.init, params),
            placed,
        )
        update = jax.jit(
            optimizer.update, out_shardings=(sharded.shardings(SPLITS, mesh), placed)
        )
        compiled = update.lower(params, state, params).compile()
        sent[mu_dtype] = sorted(
            (c.kind, c.elements, c.in_loop) for c in collectives(compiled)
        )
    assert sent[None]
    assert sent["int8"] == sent[None]
