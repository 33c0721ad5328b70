"""`state_sharding`: no device keeps state that its parameters' sharding would split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import subtrack_jax as stj
from models import llama
from tests import common, sharded

BY_AXIS_TYPE = pytest.mark.parametrize(
    "axis_type", sharded.AXIS_TYPES, ids=lambda kind: kind.name
)


def _abstract_state(optimizer, splits, mesh, **arguments):
    """Abstract state with the shardings of the function under test."""
    params = sharded.shapes(splits, mesh)
    placed = stj.state_sharding(optimizer, params, **arguments)
    return jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding),
        jax.eval_shape(optimizer.init, params),
        placed,
    )


def _bytes_of_arrays(tree, on_device=False):
    """Bytes of arrays with at least two axes: no counts or norms."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim >= 2]
    return sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape) if on_device else leaf.shape)
        * leaf.dtype.itemsize
        for leaf in arrays
    )


# --- Placement ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, side, rank",
    [
        *((name, "short", 8) for name in common.OPTIMIZERS),
        *((name, "long", 0.25) for name in common.OPTIMIZERS),
        *(("subtrack", side, rank) for side, rank in [("short", 0.25), ("long", 8)]),
    ],
)
def test_each_of_eight_devices_holds_an_eighth(name, side, rank):
    mesh = sharded.mesh(AxisType.Auto)
    optimizer = sharded.optimizer(name, sharded.LEAVES, side=side, rank=rank)
    state = _abstract_state(optimizer, sharded.LEAVES, mesh)
    share = _bytes_of_arrays(state, on_device=True) / _bytes_of_arrays(state)
    assert share <= 1.05 / 8
    for path, leaf in sharded.named(state):
        if leaf.ndim >= 2:
            assert sharded.pieces(leaf.shape, leaf.sharding) == 8, (path, leaf)


def test_specs():
    """Order of precedence: the long side's own mesh axes first.

    What does not divide it goes to the rank, batch axes stay, plain leaves and
    their moments are alike.
    """
    mesh = sharded.mesh(AxisType.Auto)
    optimizer = sharded.optimizer("subtrack", sharded.LEAVES)
    state = stj.state_sharding(optimizer, sharded.shapes(sharded.LEAVES, mesh))
    basis, mu, nu, norm = (
        jax.tree.map(lambda sharding: sharding.spec, optax.tree.get(state, field))
        for field in ("basis", "mu", "nu", "recovery_norm")
    )
    both, swapped = ("fsdp", "tensor"), ("tensor", "fsdp")
    assert mu == nu
    assert (basis["wide"], mu["wide"]) == (P(both, None), P(None, swapped))
    assert (basis["tall"], mu["tall"]) == (P(both, None), P(None, swapped))
    assert mu["stacked"] == P(None, None, swapped)
    assert (basis["experts"], mu["experts"]) == (
        P("fsdp", "tensor", None),
        P("fsdp", None, "tensor"),
    )
    assert mu["attention"] == P(None, swapped)
    assert mu["odd_columns"] == mu["odd_rows"] == P(both, None)
    assert basis["odd_columns"] == basis["odd_rows"] == P(both, None)
    assert mu["embedding"] == P("tensor", "fsdp")
    assert (norm["wide"], norm["stacked"], norm["experts"]) == (P(), P(None), P("fsdp"))


def test_a_parameter_split_over_one_axis_keeps_state_split_over_it():
    """A replicated parameter has replicated state."""
    mesh = sharded.mesh(AxisType.Auto)
    splits = {
        "fsdp": sharded.LEAVES["wide"]._replace(spec=P("fsdp")),
        "whole": sharded.LEAVES["wide"]._replace(spec=P()),
    }
    optimizer = sharded.optimizer("subtrack", splits)
    state = _abstract_state(optimizer, splits, mesh)
    for field in ("basis", "mu", "nu"):
        leaves = optax.tree.get(state, field)
        assert sharded.pieces(leaves["fsdp"].shape, leaves["fsdp"].sharding) == 4
        assert sharded.pieces(leaves["whole"].shape, leaves["whole"].sharding) == 1


def test_memory_of_devices():
    """Bytes of real arrays, also after a step."""
    mesh = sharded.mesh(AxisType.Auto)
    splits = sharded.chosen("stacked", "attention", "odd_columns", "embedding")
    optimizer = sharded.optimizer("grass_jump", splits)
    params = _params(splits, mesh)
    placed = stj.state_sharding(optimizer, params)
    state = jax.jit(optimizer.init, out_shardings=placed)(params)
    update = jax.jit(optimizer.update, out_shardings=(None, placed))
    _, state = update(params, state, params)
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes * (leaf.ndim >= 2)
    assert max(held.values()) <= 1.05 * _bytes_of_arrays(state) / 8


# --- Arguments ------------------------------------------------------------------


@BY_AXIS_TYPE
def test_arrays_shapes_and_shardings_tell_the_same(axis_type):
    """With abstract parameters, and inside or outside of a mesh context."""
    mesh = sharded.mesh(axis_type)
    splits = sharded.chosen("wide", "stacked", "embedding")
    optimizer = sharded.optimizer("subtrack", splits)
    want = stj.state_sharding(optimizer, sharded.shapes(splits, mesh))
    bare = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        sharded.shapes(splits, mesh),
    )
    shardings = sharded.shardings(splits, mesh)
    assert stj.state_sharding(optimizer, bare, shardings) == want
    assert stj.state_sharding(optimizer, _params(splits, mesh)) == want
    with jax.set_mesh(mesh):
        assert stj.state_sharding(optimizer, bare, shardings) == want
        assert stj.state_sharding(optimizer, _params(splits, mesh)) == want


@BY_AXIS_TYPE
def test_init_needs_no_telling(axis_type):
    """`init` places state like the params; under `jit` this needs explicit axes."""
    mesh = sharded.mesh(axis_type)
    optimizer = sharded.optimizer("subtrack", sharded.LEAVES, monitor=True)
    with jax.set_mesh(mesh):
        params = _params(sharded.LEAVES, mesh)
        placed = stj.state_sharding(optimizer, params)
        state = optimizer.init(params)
        _assert_placed(state, placed)
        if axis_type == AxisType.Explicit:
            assert sharded.types(jax.jit(optimizer.init)(params)) == sharded.types(
                state
            )


@pytest.mark.parametrize("bad", ["spec", "single_device", "none"])
def test_a_parameter_without_a_named_sharding_is_named(bad):
    mesh = sharded.mesh(AxisType.Auto)
    splits = sharded.chosen("wide", "stacked")
    shardings = {"layer": sharded.shardings(splits, mesh)}
    shardings["layer"]["stacked"] = {
        "spec": P(None, "fsdp"),
        "single_device": SingleDeviceSharding(jax.devices()[0]),
        "none": None,
    }[bad]
    params = {"layer": common.zeros(sharded.leaves(splits))}
    with pytest.raises(ValueError, match=r"layer/stacked has .* a NamedSharding"):
        stj.state_sharding(stj.subtrack(1e-3, rank=8), params, shardings)
    if bad != "spec":  # the same if the parameters' types have the shardings
        params = {"layer": sharded.shapes(splits, mesh)}
        params["layer"]["stacked"] = {
            "single_device": jnp.zeros((3, 64, 128)),
            "none": jax.ShapeDtypeStruct((3, 64, 128), jnp.float32),
        }[bad]
        with pytest.raises(ValueError, match=r"layer/stacked has .* a NamedSharding"):
            stj.state_sharding(stj.subtrack(1e-3, rank=8), params)


# --- In wrappers ----------------------------------------------------------------

SPLITS = sharded.chosen("wide", "embedding")
LOW_RANK = functools.partial(sharded.optimizer, "grass_jump", SPLITS)
WRAPPED = {
    **{
        name: lambda name=name: sharded.optimizer(name, SPLITS)
        for name in common.DISTINCT
    },
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), LOW_RANK()),
    "MultiSteps": lambda: optax.MultiSteps(LOW_RANK(), 2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        stj.grass_jump, static_args=("rank", "dimension_numbers")
    )(
        1e-2,
        rank=8,
        dimension_numbers=common.dimension_numbers(sharded.leaves(SPLITS)),
    ),
    "masked": lambda: optax.masked(
        stj.grass_jump(1e-2, rank=8), {"wide": True, "embedding": False}
    ),
    "partition": lambda: optax.partition(
        {"matrix": stj.grass_jump(1e-2, rank=8), "other": optax.adam(1e-2)},
        {"wide": "matrix", "embedding": "other"},
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(LOW_RANK(), 3),
    "mu_dtype": lambda: LOW_RANK(mu_dtype=jnp.bfloat16),
    "monitor": lambda: LOW_RANK(monitor=True),
    "adamw": lambda: optax.adamw(1e-2),
}


def _params(splits, mesh):
    """Matrices and vectors of small numbers, on the mesh."""
    return {
        name: jax.device_put(
            1e-2 * np.random.default_rng(0).normal(size=split.leaf.shape),
            NamedSharding(mesh, split.spec),
        ).astype(jnp.float32)
        for name, split in splits.items()
    }


def _assert_placed(state, placed):
    for (path, leaf), sharding in zip(
        sharded.named(state), jax.tree.leaves(placed), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (
            f"{jax.tree_util.keystr(path)}: {leaf.sharding.spec} is not {sharding.spec}"
        )


# Each kind of mesh for every other one.
@pytest.mark.parametrize(
    "name, axis_type",
    [(name, sharded.AXIS_TYPES[1 - k % 2]) for k, name in enumerate(WRAPPED)],
)
def test_state_stays_where_it_is_placed(name, axis_type):
    """Placement is stable from a compiled `init` on; the next step does not recompile.

    On explicit axes without being told: placement is part of the types.
    """
    mesh, optimizer = sharded.mesh(axis_type), WRAPPED[name]()
    is_explicit = axis_type == AxisType.Explicit
    with jax.set_mesh(mesh):
        params = _params(SPLITS, mesh)
        placed = stj.state_sharding(optimizer, params)
        state = jax.jit(optimizer.init, out_shardings=placed)(params)
        _assert_placed(state, placed)
        before = sharded.types(state)
        if is_explicit:
            assert sharded.types(jax.jit(optimizer.init)(params)) == before
            assert sharded.types(optimizer.init(params)) == before
        out = None if is_explicit else (sharded.shardings(SPLITS, mesh), placed)
        update = jax.jit(optimizer.update, out_shardings=out)
        for _ in range(3):
            updates, state = update(params, state, params)
            _assert_placed(state, placed)
            assert sharded.types(state) == before
            assert sharded.types(updates) == sharded.types(params)
    assert update._cache_size() == 1


# --- Parameters with logical axis names ------------------------------------------


class _Model(nnx.Module):
    """Kernels and an embedding with mesh axes in their metadata."""

    def __init__(self, rngs):
        def axes(*names):
            return {"out_sharding": names}

        self.embed = nnx.Embed(
            64, 32, embedding_metadata=axes("tensor", "fsdp"), rngs=rngs
        )
        self.up = nnx.Linear(
            32, 64, kernel_metadata=axes("fsdp", "tensor"), use_bias=False, rngs=rngs
        )
        self.down = nnx.Linear(
            64, 32, kernel_metadata=axes("tensor", "fsdp"), rngs=rngs
        )

    def __call__(self, tokens):
        return self.down(jax.nn.silu(self.up(self.embed(tokens))))


def _low_rank():
    # Gradients without metadata have the same paths, so the pattern matches both.
    return stj.subtrack(
        1e-2,
        rank=4,
        update_interval=2,
        monitor=True,
        dimension_numbers=stj.by_path("kernel$"),
    )


def _nnx_params():
    return nnx.state(_Model(nnx.Rngs(0)), nnx.Param)


def _linen_params():
    params = nnx.to_pure_dict(_nnx_params())
    names = nnx.to_pure_dict(nnx.get_partition_spec(_nnx_params()))
    return jax.tree.map(
        lambda x, spec: linen.Partitioned(x, (*spec, *(None,) * (x.ndim - len(spec)))),
        params,
        names,
    )


BOXED = {
    "nnx": (_nnx_params, nnx.as_pure, nnx.get_named_sharding),
    "linen": (_linen_params, linen.unbox, linen.get_sharding),
}


@pytest.mark.parametrize(
    "kind, axis_type", list(zip(BOXED, sharded.AXIS_TYPES, strict=True))
)
def test_metadata_does_not_reach_low_rank_state(kind, axis_type):
    """Low-rank state has its own sharding; values are equal; updates keep the boxes."""
    make, unbox, get_shardings = BOXED[kind]
    mesh, optimizer = sharded.mesh(axis_type), _low_rank()
    with jax.set_mesh(mesh):
        shardings = get_shardings(jax.eval_shape(make), mesh)
        params = jax.device_put(unbox(make()), unbox(shardings))
        boxed = jax.tree.unflatten(jax.tree.structure(make()), jax.tree.leaves(params))
        want = stj.state_sharding(optimizer, params)
        for given in (None, shardings, unbox(shardings)):
            placed = stj.state_sharding(optimizer, boxed, given)
            assert jax.tree.leaves(placed) == jax.tree.leaves(want)
        for field in ("basis", "recovery_norm", "captured_energy"):
            # Equal to the specs without boxes, except for moments of plain leaves.
            assert jax.tree.structure(optax.tree.get(placed, field)) == (
                jax.tree.structure(optax.tree.get(want, field))
            )
        kernel = optax.tree.get(placed, "mu")["up"]["kernel"]
        assert kernel.spec == P(None, ("tensor", "fsdp"))

        def train(params):
            placed = stj.state_sharding(optimizer, params)
            state = jax.jit(optimizer.init, out_shardings=placed)(params)
            own = jax.tree.map(lambda leaf: leaf.sharding, params)
            update = jax.jit(optimizer.update, out_shardings=(own, placed))
            for _ in range(3):
                updates, state = update(params, state, params)
                _assert_placed(state, placed)
            assert update._cache_size() == 1
            return optax.apply_updates(params, updates), state

        got, got_state = train(boxed)
        expected, expected_state = train(params)
    assert jax.tree.structure(got) == jax.tree.structure(boxed)
    for a, b in zip(
        jax.tree.leaves((got, got_state)),
        jax.tree.leaves((expected, expected_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@BY_AXIS_TYPE
def test_nnx_optimizer(axis_type):
    """Flax copies the metadata in the state to the state's arrays."""
    mesh = sharded.mesh(axis_type)
    with jax.set_mesh(mesh):
        model = _Model(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, _low_rank(), wrt=nnx.Param)
        params = nnx.state(model, nnx.Param)
        placed = stj.state_sharding(optimizer.tx, params)
        _assert_placed(nnx.as_pure(optimizer.opt_state), placed)
        # Flax's own function is right for plain leaves.
        claimed = nnx.get_named_sharding(nnx.state(optimizer).opt_state, mesh)
        state = jax.tree.leaves(nnx.as_pure(optimizer.opt_state))
        for leaf, claim in zip(state, jax.tree.leaves(claimed), strict=True):
            claim.shard_shape(leaf.shape)
        mu = optax.tree.get(nnx.as_pure(claimed), "mu")
        assert mu["embed"]["embedding"].spec == P("tensor", "fsdp")
        before = nnx.as_pure(params)
        optimizer.update(model, jax.tree.map(jnp.ones_like, params))
        _assert_placed(nnx.as_pure(optimizer.opt_state), placed)
    after = nnx.as_pure(nnx.state(model, nnx.Param))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.all(np.asarray(a) != np.asarray(b))


def test_the_llama_of_this_project():
    """Its axis names are logical, to be resolved by a trainer."""
    mesh = sharded.mesh(AxisType.Auto)
    config = llama.LlamaConfig(64, 32, 64, num_layers=2, num_heads=2)
    model = nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    rules = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "kv_heads": "tensor"}
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, P(*map(rules.get, spec))),
        nnx.get_partition_spec(params),
    )
    optimizer = stj.subtrack(1e-3, rank=4, dimension_numbers=llama.matrix_axes)
    boxed = stj.state_sharding(optimizer, params, shardings)
    pure = stj.state_sharding(
        optimizer, nnx.to_pure_dict(params), nnx.to_pure_dict(shardings)
    )
    assert jax.tree.leaves(boxed) == jax.tree.leaves(pure)
    table = stj.LowRank(4, llama.matrix_axes).describe(params)
    assert "layers/mlp/up/kernel" in [line.split()[0] for line in table.splitlines()]
