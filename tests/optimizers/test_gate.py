"""The gate that every optimizer passes, on matrices and in other people's hands."""

import functools
import inspect
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import subtrack_jax as stj
from subtrack_jax.optimizers import method
from tests import common, oracle

RANK = 2
INTERVAL = 3
STEPS = 2 * INTERVAL + 1
LEAVES = {name: common.LEAVES[name] for name in ("wide", "vector")}
WITH_ANOTHER = LEAVES | {"another": common.LEAVES["tall"]}
MATRIX = MuonDimensionNumbers(-2, -1)
BY_NAME = pytest.mark.parametrize("name", common.OPTIMIZERS)


def _optimizer(name, learning_rate=1e-2, **arguments):
    defaults = {"rank": RANK, "update_interval": INTERVAL}
    return common.OPTIMIZERS[name](learning_rate, **defaults | arguments)


@functools.cache
def _plain_run(name):
    """Reference run for the wrapped runs below."""
    return common.run(_optimizer(name), common.zeros(LEAVES), _gradients())


def _gradients(leaves=LEAVES):
    return common.drifting_tree(leaves, STEPS)


def _assert_close(got, want, rtol=1e-5):
    """Compares each leaf within a fraction of its largest entry."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(
            a,
            b,
            rtol=0,
            atol=rtol * np.max(np.abs(b)),
            err_msg=jax.tree_util.keystr(path),
        )


# --- What the optimizer does --------------------------------------------------


@pytest.mark.parametrize(
    "name, side",
    [
        *(
            pytest.param(*each.values, "short", marks=each.marks)
            for each in common.others_slow(common.DISTINCT)
        ),
        ("subtrack", "long"),
    ],
)
def test_transposing_the_gradient_transposes_the_update(name, side):
    """f(G^T) = f(G)^T; for a square matrix the tie is broken by its axes' names."""
    swapped = MuonDimensionNumbers(1, 0)
    wide = jnp.asarray(common.drifting_gradients(common.Leaf((6, 10)), STEPS))
    square = jnp.asarray(common.drifting_gradients(common.Leaf((8, 8)), STEPS))
    gradients = {
        "wide": wide,
        "wide_transposed": wide.mT,
        "square": square,
        "square_transposed": square.mT,
    }
    numbers = {
        "wide": MATRIX,
        "wide_transposed": MATRIX,
        "square": MATRIX,
        "square_transposed": swapped,
    }
    leaves = ("wide", "square") if name in common.REPRESENTATIVES else ("wide",)
    gradients = {leaf: g for leaf, g in gradients.items() if leaf.startswith(leaves)}
    numbers = {leaf: numbers[leaf] for leaf in gradients}
    optimizer = _optimizer(name, side=side, dimension_numbers=numbers)
    params = jax.tree.map(lambda g: jnp.zeros_like(g[0]), gradients)
    updates = common.run(optimizer, params, gradients).updates
    for leaf in leaves:
        _assert_close(updates[leaf + "_transposed"].mT, updates[leaf])


@pytest.mark.parametrize("name", common.others_slow(common.DISTINCT))
def test_a_stacked_leaf_is_its_slices(name):
    """Scanned layers train as the same layers would one by one.

    Beside each other in one tree, and in a tree and an optimizer of their own.
    """
    leaf = common.Leaf((2, 6, 10), (1,), (2,))
    stacked = jnp.asarray(common.drifting_gradients(leaf, STEPS))
    slices = {f"layer_{k}": stacked[:, k] for k in range(stacked.shape[1])}

    def updates_of(gradients):
        params = jax.tree.map(lambda g: jnp.zeros_like(g[0]), gradients)
        optimizer = _optimizer(name, dimension_numbers=MATRIX)
        return common.run(optimizer, params, gradients).updates

    together = updates_of({"stacked": stacked, **slices})
    for k in range(stacked.shape[1]):
        _assert_close(together["stacked"][:, k], together[f"layer_{k}"])
    if name in common.REPRESENTATIVES:
        _assert_close(together["stacked"][:, 1], updates_of(slices["layer_1"]))


@pytest.mark.parametrize("name", ["subtrack", "subtrack_grad"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_tracking_lowers_the_projection_error(name, shape):
    """Captures more of a drifting signal than the initial basis does."""
    leaf = common.Leaf(shape)
    gradients = common.drifting_gradients(leaf, 60)
    optimizer = _optimizer(name, rank=4, dimension_numbers=MATRIX)
    run = common.run(optimizer, jnp.zeros(shape), jnp.asarray(gradients, jnp.float32))
    seen = [leaf.view().to_matrices(g)[0] for g in gradients]
    bases = np.asarray(run.bases, np.float64)

    def missed(basis):
        return 1.0 - np.mean([oracle.captured_energy(basis, g) for g in seen[-10:]])

    assert missed(bases[-1]) < 0.6 * missed(bases[0])


@pytest.mark.parametrize(
    "name", [*common.REPRESENTATIVES, "grass_walk", "galore", "online_subspace_descent"]
)
def test_learns_a_low_rank_matrix(name):
    """The loss falls by orders of magnitude, on a target that has the rank."""
    rng = np.random.default_rng(0)
    target = rng.normal(size=(8, RANK)) @ rng.normal(size=(RANK, 12))
    loss = lambda params: jnp.sum((params - jnp.asarray(target, jnp.float32)) ** 2)
    schedule = optax.linear_schedule(0.1, 0.0, 600)
    optimizer = _optimizer(name, schedule, update_interval=20, scale=1.0)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            gradient = jax.grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=600)[0][0]

    params = jnp.zeros(target.shape)
    assert loss(train(params)) < 1e-3 * loss(params)


@pytest.mark.parametrize("name", ["grass_walk", "grass_jump"])
def test_the_seed_decides_the_walk(name):
    """Only the seed decides: a run can be repeated."""
    optimizers = {seed: _optimizer(name, seed=seed) for seed in (0, 1)}

    def basis(seed):
        run = common.run(optimizers[seed], common.zeros(LEAVES), _gradients())
        return np.asarray(run.bases["wide"])

    assert np.max(np.abs(basis(0)[INTERVAL] - basis(1)[INTERVAL])) > 1e-2
    np.testing.assert_array_equal(basis(1), basis(1))


def test_weight_decay_and_its_mask():
    """Decoupled, on the leaves that the mask names, low-rank or not."""
    params = jax.tree.map(lambda p: p + 2.0, common.zeros(LEAVES))
    gradients = _gradients()
    want = common.run(_optimizer("subtrack"), params, gradients).updates
    mask = {"wide": True, "vector": False}
    for given in (mask, lambda _: mask):
        optimizer = _optimizer("subtrack", weight_decay=0.1, mask=given)
        got = common.run(optimizer, params, gradients).updates
        for leaf, decays in mask.items():
            extra = -1e-2 * 0.1 * 2.0 if decays else 0.0
            np.testing.assert_allclose(got[leaf], want[leaf] + extra, atol=1e-6)


# --- How it is called ---------------------------------------------------------


@BY_NAME
def test_signature(name):
    """All but the first by name, with types; values are pinned in test_public_api."""
    optimizer = common.OPTIMIZERS[name]
    first, *rest = inspect.signature(optimizer).parameters.values()
    assert first.name == "learning_rate"
    assert first.annotation == optax.ScalarOrSchedule
    assert {p.kind for p in rest} == {inspect.Parameter.KEYWORD_ONLY}
    documented = optimizer.__doc__.partition("Args:\n")[2]
    for parameter in (first, *rest):
        assert parameter.annotation is not parameter.empty
        assert documented.count(f"  {parameter.name}: ") == 1, parameter.name


@BY_NAME
def test_an_unknown_argument_is_refused_by_the_function_s_name(name):
    with pytest.raises(TypeError, match=rf"^{name}\(\) .* 'rnk'$"):
        common.OPTIMIZERS[name](1e-3, rnk=4)


def test_shared_arguments_are_typed_as_in_adam_in_subspace():
    """A `TypedDict` shows them to type checkers, the signature to all else."""
    parameters = inspect.signature(stj.adam_in_subspace).parameters
    for name, annotation in typing.get_type_hints(method.SharedRecovering).items():
        assert parameters[name].annotation == annotation, name


BAD_VALUES = [
    ("learning_rate", -1e-3),
    ("rank", 0),
    ("rank", 1.5),
    ("update_interval", 0),
    ("update_interval", 2.5),
    ("b1", 1.0),
    ("b1", -0.1),
    ("b2", 1.0),
    ("eps", -1e-8),
    ("scale", -1.0),
    ("scale", float("nan")),
    ("recovery_scale", -1.0),
    ("growth_limit", 0.5),
    ("weight_decay", -0.1),
    ("side", "left"),
    ("seed", 0.5),
    ("init", "qr"),
    ("step_size", 0.0),
    ("damping", 0.0),
    ("damping", 1.1),
    ("angle", 0.0),
]


@pytest.mark.parametrize(
    "name, argument, value",
    [
        (name, argument, value)
        for name, make in common.OPTIMIZERS.items()
        for argument, value in BAD_VALUES
        if argument in inspect.signature(make).parameters
    ],
)
def test_a_bad_argument_is_quoted_at_once(name, argument, value):
    """Raised when the optimizer is built, not at the first batch."""
    with pytest.raises(ValueError, match=re.escape(repr(value))) as error:
        common.OPTIMIZERS[name](**{"learning_rate": 1e-3, argument: value})
    assert argument in str(error.value)


@BY_NAME
def test_compiles_once(name):
    """No type changes at the start, at a refresh, or between."""
    traces = []
    target = jax.tree.map(lambda p: p + 1.0, common.zeros(LEAVES))

    optimizer = _optimizer(name, optax.cosine_decay_schedule(1e-2, 10))

    @jax.jit
    def step(params, state):
        traces.append(1)
        gradient = optax.tree.sub(params, target)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = common.zeros(LEAVES)
    state = optimizer.init(params)
    for _ in range(INTERVAL + 2):
        params, state = step(params, state)
    assert len(traces) == 1


@BY_NAME
def test_inject_hyperparams(name):
    """Every number except the rank can be a traced value or a schedule."""
    factory = optax.inject_hyperparams(common.OPTIMIZERS[name], static_args=("rank",))
    injected = factory(
        optax.linear_schedule(1e-2, 0.0, 10),
        rank=RANK,
        update_interval=INTERVAL,
        scale=0.5,
    )
    if name in common.REPRESENTATIVES:
        schedule = optax.linear_schedule(1e-2, 0.0, 10)
        plain = _optimizer(name, schedule, scale=0.5)
        got, want = (
            common.run(each, common.zeros(LEAVES), _gradients()).updates
            for each in (injected, plain)
        )
        _assert_close(got, want)
    hyperparams = injected.init(common.zeros(LEAVES)).hyperparams
    numbers = {"learning_rate", "update_interval", "b1", "b2", "eps", "scale", "seed"}
    assert numbers <= set(hyperparams) and "rank" not in hyperparams


@pytest.mark.parametrize(
    "name, dtype, jit",
    [
        *((name, "bfloat16", jax.jit) for name in common.OPTIMIZERS),
        *((name, "float16", lambda init: init) for name in common.REPRESENTATIVES),
    ],
)
def test_injected_decays_are_not_rounded_to_sixteen_bits(name, dtype, jit):
    """bfloat16 rounds b2 to 1, which makes every update NaN."""
    factory = common.OPTIMIZERS[name]
    params = common.zeros(LEAVES, dtype)
    rounded = optax.inject_hyperparams(factory, static_args=("rank",))(1e-2, rank=RANK)
    words = f"is {dtype}, which rounds .* hyperparam_dtype=jnp.float32"
    with pytest.raises(ValueError, match=words):
        jit(rounded.init)(params)
    exact = optax.inject_hyperparams(factory, ("rank",), jnp.float32)(1e-2, rank=RANK)
    assert jax.eval_shape(exact.init, params).hyperparams["b2"].dtype == jnp.float32


@pytest.mark.parametrize("argument", ["b1", "b2", "eps", "growth_limit"])
def test_each_number_that_sixteen_bits_spoil_is_named(argument):
    value = jnp.bfloat16(1.5 if argument == "growth_limit" else 0.5)
    with pytest.raises(ValueError, match=f"^{argument} is bfloat16, which rounds"):
        stj.subtrack(1e-3, **{argument: value})


@pytest.mark.parametrize("name", ["ldadam", "golore", "apollo_mini"])
def test_a_parameter_of_any_name(name):
    """Parameters may have the names of fields that are looked up in the state."""
    params = {"mu": jnp.ones((6, 10)), "basis": {"count": jnp.ones(4)}}
    optimizer = _optimizer(name)
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_injected_values_are_used():
    """Hyper-parameters are set in the state, as by a training loop."""
    factory = optax.inject_hyperparams(stj.subtrack, static_args=("rank",))
    injected = factory(1e-2, rank=RANK, update_interval=INTERVAL)
    params, gradients = common.zeros(LEAVES), _gradients()
    state = injected.init(params)
    state.hyperparams["scale"] = jnp.asarray(1.25)
    state.hyperparams["recovery_scale"] = jnp.asarray(0.5)
    got, _ = injected.update(common.at(gradients, 0), state, params)
    want = common.run(
        _optimizer("subtrack", scale=1.25, recovery_scale=0.5), params, gradients
    ).updates
    _assert_close(got, common.at(want, 0))


# Values of the others: optax's conformance tests.
@pytest.mark.parametrize("name", common.REPRESENTATIVES)
def test_multi_steps(name):
    """Accumulated micro-batches are one step on their mean."""
    doubled = jax.tree.map(
        lambda g: (
            jnp.repeat(g, 2, axis=0)
            * jnp.resize(jnp.asarray([0.5, 1.5]), (2 * STEPS, *(1,) * (g.ndim - 1)))
        ),
        _gradients(),
    )
    accumulated = optax.MultiSteps(_optimizer(name), every_k_schedule=2)
    got = common.run(accumulated, common.zeros(LEAVES), doubled).updates
    for leaf, want in _plain_run(name).updates.items():
        np.testing.assert_array_equal(got[leaf][::2], 0.0)
        _assert_close(got[leaf][1::2], want)


@pytest.mark.parametrize("name", common.REPRESENTATIVES)
def test_masked(name):
    """Leaves outside the mask are unchanged; those inside train as if alone."""
    mask = {"wide": True, "vector": True, "another": False}
    masked = optax.masked(_optimizer(name), mask)
    gradients = _gradients(WITH_ANOTHER)
    got = common.run(masked, common.zeros(WITH_ANOTHER), gradients).updates
    np.testing.assert_array_equal(got.pop("another"), gradients["another"])
    _assert_close(got, _plain_run(name).updates)


@pytest.mark.parametrize(
    "numbers",
    [None, stj.by_path("wide"), {"wide": MATRIX, "vector": None, "another": None}],
    ids=["none", "by_path", "tree"],
)
def test_partition(numbers):
    """Partition with another optimizer, for all forms of dimension numbers."""
    labels = {"wide": "low_rank", "vector": "low_rank", "another": "sgd"}
    optimizer = optax.partition(
        {
            "low_rank": _optimizer("subtrack", dimension_numbers=numbers),
            "sgd": optax.sgd(0.5),
        },
        labels,
    )
    gradients = _gradients(WITH_ANOTHER)
    got = common.run(optimizer, common.zeros(WITH_ANOTHER), gradients).updates
    _assert_close(got.pop("another"), -0.5 * gradients["another"])
    _assert_close(got, _plain_run("subtrack").updates)


@BY_NAME
def test_unknown_extra_arguments(name):
    """Extra arguments for another transformation, also through a chain and a mask."""
    params = common.zeros(LEAVES)
    gradients = common.at(_gradients(), 0)
    for optimizer in (
        _optimizer(name),
        optax.chain(optax.clip(10.0), _optimizer(name)),
        optax.masked(_optimizer(name), True),
    ):
        assert isinstance(optimizer, optax.GradientTransformationExtraArgs)
        jax.eval_shape(
            lambda g, s, p, opt=optimizer: opt.update(g, s, p, unknown=1),
            gradients,
            optimizer.init(params),
            params,
        )


@BY_NAME
def test_map_params(name):
    """`optax.tree.map_params` finds what belongs to parameters, and keeps the rest."""
    optimizer = _optimizer(name)
    state = optimizer.init(common.zeros(LEAVES))
    same = optax.tree.map_params(optimizer, lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    marked = optax.tree.map_params(
        optimizer,
        lambda x: "parameter",
        state,
        transform_non_params=lambda x: "other",
    )
    for field in ("basis", "mu", "nu") if name in common.TRACKING else ("mu", "nu"):
        found = jax.tree.leaves(optax.tree.get(marked, field))
        assert set(found) == {"parameter"}
    counts = [v for _, v in optax.tree.get_all_with_path(marked, "count")]
    assert set(counts) == {"other"}


@BY_NAME
def test_a_tree_of_any_kind(name):
    """A bare array, lists, tuples, `None`s and empty branches."""
    matrix, vector = jnp.ones((6, 10)), jnp.ones(4)
    optimizer = _optimizer(name)
    for tree in (
        matrix,
        [matrix, (vector, {}), None],
        {"a": {"b": matrix}, "nothing": None, "empty": ()},
    ):
        state = jax.eval_shape(optimizer.init, tree)
        updates, after = jax.eval_shape(optimizer.update, tree, state, tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        assert jax.tree.structure(after) == jax.tree.structure(state)
