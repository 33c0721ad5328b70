"""Unusual leaves (dtypes, empty, complex): plain Adam, or an error with the name."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import subtrack_jax as stj
from tests import common

BY_NAME = pytest.mark.parametrize("name", common.OPTIMIZERS)
KERNEL = MuonDimensionNumbers(-2, -1)
MATRIX = jnp.asarray(np.random.default_rng(0).normal(size=(6, 10)), jnp.float32)
COMPLEX = (1 + 1j) * MATRIX

# Parameters that also serve as gradients.
ODD = {
    "float8": MATRIX.astype(jnp.float8_e4m3fn),
    "float8_vector": MATRIX[0].astype(jnp.float8_e5m2),
    "float16": MATRIX.astype(jnp.float16),
    "float4": MATRIX.astype(jnp.float4_e2m1fn),
    "numpy": np.asarray(MATRIX, np.float64),
    "python_float": 2.0,
    "python_int": 2,
    "numpy_float": np.float64(0.5),
    "integers": jnp.arange(10),
    "integer_matrix": jnp.ones((6, 10), jnp.int8),
    "booleans": jnp.ones((6, 10), bool),
    "empty": jnp.zeros((0, 10)),
    "empty_stack": jnp.zeros((0, 6, 10)),
    "stack_of_empty": jnp.zeros((3, 0, 10)),
}
PLAIN = ("integer_matrix", "booleans", "empty", "empty_stack", "stack_of_empty")


def optimizer_of(name, **arguments):
    arguments = {"dimension_numbers": KERNEL, "update_interval": 2} | arguments
    if name != "apollo_mini":
        arguments["rank"] = 2
    return common.OPTIMIZERS[name](0.1, **arguments)


def types(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


@BY_NAME
@pytest.mark.parametrize("mu_dtype", [None, "int8"])
def test_every_method_takes_them(name, mu_dtype):
    optimizer = optimizer_of(name, mu_dtype=mu_dtype)
    state = jax.eval_shape(optimizer.init, ODD)
    assert types(state) == types(optimizer.init(ODD))
    updates, after = jax.eval_shape(optimizer.update, ODD, state, ODD)
    assert types(after) == types(state)
    assert jax.tree.structure(updates) == jax.tree.structure(ODD)
    moments = optax.tree.get(state, "mu")
    for leaf, value in ODD.items():
        is_low_rank = moments[leaf].shape != np.shape(value)
        assert is_low_rank == (np.ndim(value) == 2 and leaf not in PLAIN)
        assert moments[leaf].dtype == jnp.float32


@pytest.mark.parametrize("name", ["subtrack", "ldadam", "apollo"])
def test_they_train_as_float32_does(name):
    """Everything is computed in float32; only the update is rounded."""
    optimizer = optimizer_of(name)
    step = jax.jit(optimizer.update)
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), ODD)
    found = []
    for tree in (ODD, wide):
        state = optimizer.init(tree)
        for _ in range(3):
            updates, state = step(tree, state, tree)
        found.append(updates)
        optax.apply_updates(tree, updates)
    got, want = found
    for leaf, value in ODD.items():
        dtype = got[leaf].dtype
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            continue  # integer gradients have no direction
        assert dtype == jnp.result_type(value)
        rounded = want[leaf].astype(dtype).astype(jnp.float32)
        tolerance = 4 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(
            got[leaf].astype(jnp.float32), rounded, rtol=tolerance, atol=1e-6
        )


def test_eagerly_and_on_an_explicit_mesh():
    mesh = jax.make_mesh((2,), ("fsdp",), (jax.sharding.AxisType.Explicit,))
    split = jax.NamedSharding(mesh, jax.P("fsdp", None))
    optimizer = optimizer_of("subtrack")
    with jax.set_mesh(mesh):
        params = {"kernel": jax.device_put(MATRIX, split), "temperature": 1.0}
        state = optimizer.init(params)
        updates, _ = optimizer.update(params, state, params)
    np.testing.assert_allclose(updates["temperature"], -0.1, rtol=1e-5)


def test_describe_says_why_they_are_plain():
    low_rank = stj.LowRank(2, KERNEL)
    table = {line.split()[0]: line for line in low_rank.describe(ODD).splitlines()}
    for leaf, reason in {
        "integer_matrix": "plain (int8)",
        "booleans": "plain (bool)",
        "empty_stack": "plain (empty)",
        "python_float": " ()  ",
    }.items():
        assert reason in table[leaf]
    assert " 2  " in table["float8"]
    counts = 2 * 4
    total = stj.state_bytes(optimizer_of("galore"), ODD) - counts
    assert table["total"].split()[1] == f"{total:,}"


@BY_NAME
def test_a_batch_axis_of_size_zero_alone(name):
    """Nothing to train is not an error."""
    optimizer = optimizer_of(name)
    params = {"kernel": jnp.zeros((0, 6, 10))}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert updates["kernel"].shape == (0, 6, 10)


@BY_NAME
def test_complex_matrices_are_refused_at_init(name):
    params = {"layer": {"real": MATRIX, "kernel": COMPLEX}}
    for arguments in ({}, {"dimension_numbers": None}):
        with pytest.raises(ValueError, match=r"layer/kernel .*complex64") as error:
            jax.eval_shape(optimizer_of(name, **arguments).init, params)
        assert "optax.contrib.split_real_and_imaginary" in str(error.value)


@pytest.mark.parametrize("stage", ["track", "draw", "adam", "recover", "monitor"])
def test_every_stage_refuses_complex_matrices(stage):
    low_rank = stj.LowRank(2)
    stage = {
        "track": stj.track_subspace(low_rank, stj.svd()),
        "draw": stj.draw_projection(low_rank),
        "adam": stj.scale_by_projection_aware_adam(low_rank),
        "recover": stj.recover_and_scale(low_rank),
        "monitor": stj.monitor_energy(low_rank),
    }[stage]
    with pytest.raises(ValueError, match="complex64"):
        stage.init({"kernel": COMPLEX})


@pytest.mark.parametrize("mu_dtype", [None, "int8"])
def test_complex_leaves_without_a_subspace_are_adams(mu_dtype):
    params = {
        "kernel": MATRIX,
        "vector": COMPLEX[0],
        "stack": jnp.ones((2, 64, 64), jnp.complex64) * (1 + 2j),
    }
    numbers = {"kernel": KERNEL, "vector": None, "stack": None}
    optimizer = optimizer_of("subtrack", dimension_numbers=numbers, mu_dtype=mu_dtype)
    state, adam = optimizer.init(params), optax.adam(0.1)
    adam_state = adam.init(params)
    for scale in (1.0, -0.5, 2.0):
        gradients = jax.tree.map(lambda leaf: scale * leaf, params)  # noqa: B023
        got, state = optimizer.update(gradients, state, params)
        want, adam_state = adam.update(gradients, adam_state, params)
    for leaf in ("vector", "stack"):
        np.testing.assert_allclose(got[leaf], want[leaf], rtol=1e-5)


@pytest.mark.parametrize("name", ["subtrack", "apollo"])
def test_complex_matrices_in_two_parts(name):
    """The replacement that the error message gives trains, beside real leaves."""
    numbers = stj.by_path("kernel")
    optimizer = optax.contrib.split_real_and_imaginary(
        optimizer_of(name, dimension_numbers=numbers, growth_limit=None, scale=1.0)
    )
    params = {"kernel": jnp.zeros_like(COMPLEX), "bias": jnp.zeros(10)}

    def loss(params):
        error = params["kernel"] - COMPLEX
        return jnp.sum(jnp.abs(error) ** 2) + jnp.sum((params["bias"] - 1) ** 2)

    @jax.jit
    def train(params, state):
        def step(carry, _):
            params, state = carry
            gradients = jax.tree.map(jnp.conj, jax.grad(loss)(params))
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=150)[0][0]

    trained = train(params, optimizer.init(params))
    assert loss(trained) < 0.02 * loss(params)


@pytest.mark.parametrize(
    "leaf, kind",
    [
        (jax.random.key(0), "key<fry>"),
        (np.zeros((6, 10), jax.dtypes.float0), "float0"),
        ("text", "a str"),
        (jax.nn.relu, "a custom_jvp"),
        (np.array(["text"]), "<U4"),
    ],
    ids=["key", "float0", "text", "function", "texts"],
)
@pytest.mark.parametrize("name", ["subtrack", "apollo"])
def test_what_is_no_number_is_refused_by_name(name, leaf, kind):
    params = {"kernel": MATRIX, "layer": {"other": leaf}}
    optimizer = optimizer_of(name, dimension_numbers=stj.by_path("kernel"))
    with pytest.raises(TypeError, match="layer/other is") as error:
        optimizer.init(params)
    assert kind in str(error.value)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.complex64])
def test_a_spec_for_a_leaf_that_cannot_have_a_subspace(dtype):
    low_rank = stj.LowRank(2, {"kernel": KERNEL, "other": KERNEL})
    with pytest.raises(ValueError, match=f"other is a matrix of {dtype.__name__}"):
        low_rank.views({"kernel": MATRIX, "other": jnp.ones((6, 10), dtype)})


def test_the_geometry_refuses_complex_matrices():
    """Complex transposes would have to be conjugated."""
    key, seen = jax.random.key(0), set()
    arguments = {"key": key, "rank": 2, "angle": 0.1, "scale": 1.0}
    for name in set(stj.grassmann.__all__) - {"random_basis"}:
        function = getattr(stj.grassmann, name)
        names = inspect.signature(function).parameters
        given = [arguments.get(argument, COMPLEX) for argument in names]
        with pytest.raises(ValueError, match=f"{name} was given complex64"):
            function(*given)
        seen.add(name)
    assert len(seen) == 12
