"""`LowRank`: selection of leaves and axes, `describe`, errors."""

import dataclasses
import re
import warnings
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import GaLoreDimensionNumbers, MuonDimensionNumbers

import subtrack_jax as stj
from tests import common

KERNEL = MuonDimensionNumbers(-2, -1)


def _basis_shapes(params, **low_rank):
    """Shapes of the bases, as a dictionary; leaves without one are absent."""
    optimizer = stj.track_subspace(stj.LowRank(**low_rank), stj.geodesic())
    bases = jax.eval_shape(optimizer.init, params).basis
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(bases)
    }


def _params():
    return {
        "embed": jnp.zeros((12, 6)),
        "layers": {
            "query": jnp.zeros((2, 6, 2, 4)),
            "mlp": jnp.zeros((2, 6, 10)),
            "scale": jnp.zeros((2, 6)),
        },
        "bias": jnp.zeros(6),
    }


def test_every_matrix_by_default():
    assert _basis_shapes(_params(), rank=2) == {"embed": (6, 2)}
    # Stacked vectors are matrices of rank 2 at most: low rank saves nothing.
    assert "layers/scale" in _basis_shapes(_params(), rank=1)


@pytest.mark.parametrize("spec", [MuonDimensionNumbers, GaLoreDimensionNumbers])
def test_tree_of_specs(spec):
    numbers = {
        "embed": None,
        "layers": {"query": spec(1, (2, 3)), "mlp": spec((-2,), -1), "scale": None},
        "bias": None,
    }
    assert _basis_shapes(_params(), rank=3, dimension_numbers=numbers) == {
        "layers/query": (2, 6, 3),
        "layers/mlp": (2, 6, 3),
    }


def test_prefix_tree_of_specs():
    """One spec, or None, for a branch of the tree."""
    params = {
        "mlp": {"up": jnp.zeros((6, 10)), "down": jnp.zeros((10, 6))},
        "head": {"kernel": jnp.zeros((6, 12)), "bias": jnp.zeros(12)},
    }
    numbers = {"mlp": KERNEL, "head": None}
    assert _basis_shapes(params, rank=2, dimension_numbers=numbers) == {
        "mlp/up": (6, 2),
        "mlp/down": (6, 2),
    }


@pytest.mark.parametrize(
    "spec, want",
    [
        (KERNEL, {"stack": (4, 6, 3), "matrix": (8, 3)}),
        (MuonDimensionNumbers(1, 2), {"stack": (4, 6, 3)}),
        (MuonDimensionNumbers(-3, -1), {"stack": (6, 4, 3)}),
        (GaLoreDimensionNumbers(0, 1), {"stack": (10, 4, 3), "matrix": (8, 3)}),
    ],
)
def test_one_spec_for_every_leaf_that_it_fits(spec, want):
    """Leaves without the named axes get plain Adam."""
    params = {
        "stack": jnp.zeros((4, 6, 10)),
        "matrix": jnp.zeros((8, 12)),
        "vector": jnp.zeros(6),
    }
    assert _basis_shapes(params, rank=3, dimension_numbers=spec) == want


def test_specs_of_leaves_that_a_wrapper_hides():
    params = {"mlp": jnp.zeros((6, 10)), "head": {"kernel": jnp.zeros((6, 12))}}
    numbers = {"mlp": KERNEL, "head": {"kernel": KERNEL}}
    low_rank = stj.LowRank(2, dimension_numbers=numbers)
    optimizer = stj.track_subspace(low_rank, stj.geodesic())
    masked = optax.masked(optimizer, {"mlp": True, "head": False})
    basis = jax.eval_shape(masked.init, params).inner_state.basis
    assert [leaf.shape for leaf in jax.tree.leaves(basis)] == [(6, 2)]


def test_a_function_that_leaves_everything_alone():
    """None from a function is a tree without specs, not the default."""
    assert stj.by_path("kernel")(jnp.zeros((6, 10))) is None
    with pytest.raises(ValueError, match=r"by_path\('kernel'\).* \(root\) \(6, 10\)"):
        _basis_shapes(
            jnp.zeros((6, 10)), rank=2, dimension_numbers=stj.by_path("kernel")
        )


def test_callable_and_by_path():
    by_function = lambda params: jax.tree.map(
        lambda leaf: KERNEL if leaf.ndim == 3 else None, params
    )
    want = {"layers/mlp": (2, 6, 3)}
    assert _basis_shapes(_params(), rank=3, dimension_numbers=by_function) == want
    by_path = stj.by_path("^layers/mlp$")
    assert _basis_shapes(_params(), rank=3, dimension_numbers=by_path) == want
    attention = stj.by_path("query", reduction_axis=-3, output_axis=(-2, -1))
    assert _basis_shapes(_params(), rank=3, dimension_numbers=attention) == {
        "layers/query": (2, 6, 3)
    }


@pytest.mark.parametrize(
    "rank, want",
    [
        (1, (6, 1)),
        (5, (6, 5)),
        (0.5, (6, 3)),
        (0.01, (6, 1)),
        (np.int64(2), (6, 2)),
        (np.float32(0.5), (6, 3)),
    ],
)
def test_rank(rank, want):
    """An int, or a fraction of the short side (never 0)."""
    for shape in [(6, 10), (10, 6)]:
        got = _basis_shapes({"kernel": jnp.zeros(shape)}, rank=rank)
        assert got == {"kernel": want}


def test_a_rank_too_large_for_one_leaf_is_plain_adam():
    params = {"kernel": jnp.zeros((6, 10)), "small": jnp.zeros((5, 10))}
    assert _basis_shapes(params, rank=5) == {"kernel": (6, 5)}


@pytest.mark.parametrize("rank", [6, 10_000, 1.0, 0.95])
@pytest.mark.parametrize(
    "shape, numbers",
    [((6, 10), None), ((2, 10, 6), KERNEL), ((2, 10, 6), stj.by_path("kernel"))],
    ids=["default", "spec", "by_path"],
)
@pytest.mark.parametrize("name", ["subtrack", "ldadam", "apollo"])
def test_a_rank_too_large_for_all_leaves_is_refused(name, shape, numbers, rank):
    """No low-rank leaf is an error: plain Adam must not run under another name."""
    params = {"kernel": jnp.zeros(shape), "bias": jnp.zeros(10)}
    optimizer = common.OPTIMIZERS[name](1e-3, rank=rank, dimension_numbers=numbers)
    with pytest.raises(ValueError, match="No leaf to treat as low-rank") as error:
        jax.eval_shape(optimizer.init, params)
    for words in (f"rank={rank}", f"kernel {shape}", "below 6"):
        assert words in str(error.value)


def test_no_rank_is_below_one():
    with pytest.raises(ValueError, match=r"any of kernel \(1, 5\)\. Use plain Adam"):
        _basis_shapes({"kernel": jnp.zeros((1, 5))}, rank=1)


class TestStackedLeavesByDefault:
    PARAMS: ClassVar = {
        "layers": {
            "up.kernel": jnp.ones((3, 6, 10)),
            "down": jnp.ones((3, 10, 6)),
            "scale": jnp.ones((3, 6)),
        },
        "embed": jnp.ones((12, 6)),
        "steps": jnp.ones((2, 2, 2), int),
    }

    @pytest.mark.parametrize("name", common.OPTIMIZERS)
    def test_one_warning_with_what_to_write(self, name):
        rank = {} if name == "apollo_mini" else {"rank": 2}
        optimizer = common.OPTIMIZERS[name](1e-3, **rank)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = jax.eval_shape(optimizer.init, self.PARAMS)
        (warning,) = caught
        message = str(warning.message)
        assert "layers/down (3, 10, 6), layers/up.kernel (3, 6, 10)." in message
        assert "scale" not in message and "steps" not in message
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            jax.eval_shape(optimizer.update, self.PARAMS, state, self.PARAMS)
            # The replacement that the warning suggests works.
            written = re.search(r"dimension_numbers=(\S+\('.*'\));", message)[1]
            numbers = eval(written, {"subtrack_jax": stj})
            shapes = _basis_shapes(self.PARAMS, rank=2, dimension_numbers=numbers)
        assert shapes == {"layers/up.kernel": (3, 6, 2), "layers/down": (3, 6, 2)}

    def test_errors_name_them_too(self):
        with pytest.raises(ValueError, match="rank=6 ") as error:
            _basis_shapes(self.PARAMS, rank=6)
        assert "by_path('^(layers/down|" in str(error.value)


def test_updates_of_a_part_need_no_matrix():
    """Layer-wise training updates some of the parameters; only `init` needs a match."""
    optimizer = stj.subtrack(1e-3, rank=2, dimension_numbers=stj.by_path("kernel"))
    state = optimizer.init({"kernel": jnp.ones((6, 10)), "bias": jnp.ones(10)})
    is_tree = lambda node: isinstance(node, dict)
    part = jax.tree.map(
        lambda tree: {"bias": tree["bias"]} if is_tree(tree) else tree,
        state,
        is_leaf=is_tree,
    )
    updates, _ = optimizer.update({"bias": jnp.ones(10)}, part)
    np.testing.assert_allclose(updates["bias"], -1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "side, shape, want",
    [
        ("short", (6, 10), (6, 2)),
        ("short", (10, 6), (6, 2)),
        ("long", (6, 10), (10, 2)),
        ("long", (10, 6), (10, 2)),
    ],
)
def test_side(side, shape, want):
    got = _basis_shapes({"kernel": jnp.zeros(shape)}, rank=2, side=side)
    assert got == {"kernel": want}


@pytest.mark.parametrize(
    "arguments",
    [
        dict(rank=0),
        dict(rank=-3),
        dict(rank=0.0),
        dict(rank=1.5),
        dict(rank=True),
        dict(rank="8"),
        dict(side="left"),
    ],
)
def test_bad_arguments_are_quoted(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=re.escape(repr(value))) as error:
        stj.LowRank(**arguments)
    assert name in str(error.value)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        stj.LowRank().rank = 3


@pytest.mark.parametrize(
    "params, numbers",
    [
        ({"kernel": jnp.zeros((2, 6, 10)), "bias": jnp.zeros(10)}, None),
        ({"kernel": jnp.zeros((6, 10)), "bias": jnp.zeros(10)}, stj.by_path("query")),
        (
            {"kernel": jnp.zeros((6, 10)), "bias": jnp.zeros(10)},
            MuonDimensionNumbers(1, 2),
        ),
        (
            {"kernel": jnp.zeros((6, 10)), "bias": jnp.zeros(10)},
            {"kernel": None, "bias": None},
        ),
        ({"kernel": jnp.zeros(6), "bias": jnp.zeros(10)}, stj.by_path("kernel")),
    ],
    ids=["stack_only", "by_path", "spec", "tree_of_none", "vectors_by_path"],
)
def test_nothing_matched_names_the_leaves(params, numbers):
    """A typing error must not silently train with plain Adam."""
    optimizer = stj.subtrack(1e-3, rank=2, dimension_numbers=numbers)
    with pytest.raises(ValueError) as error:
        optimizer.init(params)
    message = str(error.value)
    assert "kernel" in message and "bias" in message
    if numbers is not None and "by_path" in repr(numbers):
        assert numbers.pattern in message


def test_only_vectors_is_not_a_mistake():
    """Without any matrix plain Adam is correct."""
    params = {"scale": jnp.ones(3), "bias": jnp.ones(())}
    optimizer = stj.subtrack(1e-3, rank=2)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    adam = optax.adam(1e-3)
    want, _ = adam.update(params, adam.init(params), params)
    for name in params:
        np.testing.assert_allclose(updates[name], want[name], rtol=1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        MuonDimensionNumbers(0, 0),
        MuonDimensionNumbers(0, -2),
        MuonDimensionNumbers(0, 5),
    ],
)
def test_a_spec_that_cannot_be_is_refused_by_name(spec):
    params = {"kernel": jnp.zeros((6, 10)), "other": jnp.zeros((6, 10))}
    optimizer = stj.subtrack(
        1e-3, rank=2, dimension_numbers={"kernel": spec, "other": KERNEL}
    )
    with pytest.raises(ValueError, match="kernel"):
        optimizer.init(params)


def test_a_tree_of_another_structure_is_refused():
    optimizer = stj.subtrack(1e-3, rank=2, dimension_numbers={"kernal": KERNEL})
    with pytest.raises(ValueError, match="dimension_numbers"):
        optimizer.init({"kernel": jnp.zeros((6, 10))})


@pytest.mark.parametrize("side", ["short", "long"])
def test_describe(side, capsys):
    """Bytes of state in the table equal those of the optimizer, leaf by leaf."""
    params = _params() | {"half": jnp.zeros((6, 9), jnp.bfloat16)}
    low_rank = stj.LowRank(
        rank=4, dimension_numbers=stj.by_path("embed|mlp|scale|half"), side=side
    )
    table = low_rank.describe(params)
    assert capsys.readouterr().out == ""
    rows = {line.split()[0]: line for line in table.splitlines()}
    optimizer = optax.chain(
        stj.track_subspace(low_rank, stj.geodesic()),
        stj.project(low_rank),
        stj.scale_by_projection_aware_adam(low_rank),
    )
    state = jax.eval_shape(optimizer.init, params)
    names = ("embed", "layers/query", "layers/mlp", "layers/scale", "bias", "half")
    assert set(names) < set(rows)
    total = 0
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        size = sum(
            entry.size * entry.dtype.itemsize
            for field in ("basis", "mu", "nu")
            for at, entry in jax.tree.leaves_with_path(optax.tree.get(state, field))
            if at == path
        )
        adam = 2 * leaf.size * 4
        total += size
        assert [f"{size:,}", f"{adam:,}"] == rows[name].split()[-2:]
    assert f"{total:,}" in rows["total"]
    assert "plain" in rows["bias"] and "plain" in rows["layers/query"]
    assert "rank" in rows["layers/scale"]  # matched, but 4 does not exceed the rank
    assert "plain" not in rows["half"] and " 4 " in rows["half"]


def test_describe_from_shapes():
    low_rank = stj.LowRank(rank=2, dimension_numbers=stj.by_path("embed"))
    shapes = jax.eval_shape(_params)
    assert low_rank.describe(shapes) == low_rank.describe(_params())


@pytest.mark.parametrize(
    "name", [n for n, leaf in common.LEAVES.items() if leaf.rank(1)]
)
def test_state_shapes(name):
    """Batch axes first; then rows of the basis and columns of the coordinates."""
    leaf = common.LEAVES[name]
    _, m, n = leaf.view().to_matrices(np.empty(leaf.shape)).shape
    optimizer = stj.subtrack(1e-3, rank=1, dimension_numbers=leaf.dimension_numbers())
    state = optimizer.init(jnp.zeros(leaf.shape))
    batch = leaf.view().batch_shape(leaf.shape)
    assert optax.tree.get(state, "basis").shape == (*batch, m, 1)
    for moment in ("mu", "nu"):
        assert optax.tree.get(state, moment).shape == (*batch, 1, n)
