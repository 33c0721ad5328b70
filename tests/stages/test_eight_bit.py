"""8-bit moments: accuracy, size, and behaviour in wrappers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import subtrack_jax as stj
from subtrack_jax._internal import eight_bit
from tests import common

LEAVES = {
    "kernel": common.Leaf((64, 160)),
    "layers": common.Leaf((3, 160, 64), (1,), (2,)),
    "embedding": common.Leaf((100, 64), None),
    "bias": common.Leaf((160,), None),
}
NUMBERS = common.dimension_numbers(LEAVES)
RANK, INTERVAL = 32, 4
CODED = ("kernel", "layers", "embedding")


def _subtrack(mu_dtype="int8", **arguments):
    defaults = {"rank": RANK, "update_interval": INTERVAL, "dimension_numbers": NUMBERS}
    return stj.subtrack(1e-2, mu_dtype=mu_dtype, **defaults | arguments)


# --- The state ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes(dtype):
    """Moments take 27 % of float32's bytes; the basis is not counted."""
    params = {"kernel": jax.ShapeDtypeStruct((512, 1376), dtype)}
    eight, full = (
        stj.state_bytes(
            stj.scale_by_projection_aware_adam(stj.LowRank(128), mu_dtype=mu_dtype),
            params,
        )
        for mu_dtype in ("int8", None)
    )
    assert eight < 0.27 * full
    embedding = {"embedding": jax.ShapeDtypeStruct((32000, 512), dtype), **params}
    eight, full = (
        stj.state_bytes(_subtrack(m, rank=128, dimension_numbers=None), embedding)
        for m in ("int8", None)
    )
    assert eight < 0.40 * full  # the bases are float32


def test_fields():
    """Codes are in the moments' fields; small arrays are not coded."""
    params = common.zeros(LEAVES, jnp.bfloat16)
    state = optax.tree.get(_subtrack().init(params), "EightBitAdamState")
    assert isinstance(state, stj.EightBitAdamState)
    for moment, scale, dtype in [
        (state.mu, state.mu_scale, "int8"),
        (state.nu, state.nu_scale, "uint8"),
    ]:
        assert {moment[name].dtype for name in CODED} == {jnp.dtype(dtype)}
        assert moment["layers"].shape == (3, RANK, 160)
        assert moment["embedding"].shape == (100, 64)
        assert scale["layers"].shape == (3, RANK, 2)
        assert scale["layers"].dtype == jnp.float32
        assert moment["bias"].dtype == jnp.float32
        assert isinstance(scale["bias"], optax.MaskedNode)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_types_are_stable(dtype):
    with jax.enable_x64(dtype == "float64"):
        params = common.zeros(LEAVES, dtype)
        optimizer = _subtrack(weight_decay=0.1)
        types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        init = jax.eval_shape(optimizer.init, params)
        updates, state = jax.eval_shape(optimizer.update, params, init, params)
        assert types(state) == types(init)
        assert types(updates) == types(params)
        assert types(optimizer.init(jax.eval_shape(lambda: params))) == types(init)
        scale = jax.tree.leaves(optax.tree.get(init, "mu_scale"))[0]
        assert scale.dtype == jnp.promote_types(dtype, "float32")


@pytest.mark.parametrize("mu_dtype", ["int16", "uint8", "int4"])
def test_other_integers_are_refused(mu_dtype):
    with pytest.raises(ValueError, match=f"mu_dtype='{mu_dtype}': .* or int8"):
        _subtrack(mu_dtype)


def test_the_older_name_is_the_same():
    params = common.zeros(LEAVES)
    states = [
        stj.subtrack(1e-2, rank=16, **{name: "int8"}).init(params)
        for name in ("mu_dtype", "moments_dtype")
    ]
    types = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in states]
    assert types[0] == types[1]
    assert "uint8" in {str(x.dtype) for x in jax.tree.leaves(states[0])}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"moments_dtype": "bfloat16"}, "moments_dtype='bfloat16': must be 'int8'"),
        ({"moments_dtype": "int8", "mu_dtype": "bfloat16"}, "exclude each other"),
    ],
)
def test_moments_that_cannot_be_stored_so_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        stj.ldadam(1e-2, **arguments)


# --- Steps --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_direction(dtype):
    """Updates are close to those of float32 moments, across refreshes."""
    gradients = common.drifting_tree(LEAVES, 5 * INTERVAL, dtype)
    params = common.zeros(LEAVES, dtype)
    got, want = (
        common.run(_subtrack(mu_dtype), params, gradients).updates
        for mu_dtype in ("int8", None)
    )
    for name in CODED:
        difference = np.asarray(got[name] - want[name], np.float64)
        error = np.linalg.norm(difference) / np.linalg.norm(
            np.asarray(want[name], np.float64)
        )
        assert 0 < error < 0.03, name
    np.testing.assert_array_equal(got["bias"], want["bias"])


def test_an_average_follows_a_slow_change():
    """With b2 = 0.999 the average changes by less than the distance of codes."""
    rng = np.random.default_rng(0)
    size = 10 ** rng.uniform(-2, 0, size=(32, 128))
    drift = 10 ** np.linspace(0, rng.uniform(-1, 1, size=size.shape), 1500)
    gradients = jnp.array(drift * size * rng.normal(size=drift.shape), jnp.float32)
    adam = optax.scale_by_adam(eps=0.0)
    states = {}
    for name, rule in {"full": adam, "coded": eight_bit.in_eight_bits(adam)}.items():
        update = jax.jit(
            lambda state, gradients, rule=rule: jax.lax.scan(
                lambda state, g: (rule.update(g, state)[1], None), state, gradients
            )[0]
        )
        states[name] = update(rule.init(gradients[0]), gradients)
    got = np.sqrt(eight_bit.decode_moments(states["coded"]).nu)
    ratio = got / np.sqrt(states["full"].nu)
    assert abs(ratio.mean() - 1) < 0.05
    assert ratio.std() < 0.2  # 2 with rounding to nearest, around 3


def test_small_beside_large():
    """A block of gradients over fourteen decades: no update is far too large."""
    rng = np.random.default_rng(0)
    size = 10 ** rng.uniform(-14, 0, size=(64, 128))
    gradients = size * rng.normal(size=(200, 64, 128))
    low_rank = stj.LowRank(
        8, {"plain": None, "matrix": optax.contrib.MuonDimensionNumbers(0, 1)}
    )
    optimizer = optax.chain(
        stj.track_subspace(low_rank, stj.geodesic()),
        stj.project(low_rank),
        stj.scale_by_projection_aware_adam(low_rank, mu_dtype="int8", eps=0.0),
        stj.recover_and_scale(low_rank),
    )
    tree = {"plain": jnp.array(gradients, jnp.float32)}
    tree["matrix"] = tree["plain"]
    run = common.run(optimizer, common.at(tree, 0), tree)
    common.assert_all_finite(run.updates)
    assert np.abs(run.updates["plain"]).max() < 3


def test_stacked_equals_unstacked():
    """Equal up to rounding, which may choose the neighbouring code."""
    gradients = common.drifting_tree(LEAVES, 2 * INTERVAL)
    run = common.run(_subtrack(init="svd"), common.zeros(LEAVES), gradients)
    alone = _subtrack(init="svd", dimension_numbers=None)
    for layer in range(3):
        one = {"kernel": gradients["layers"][:, layer]}
        got = common.run(alone, common.at(one, 0), one).updates["kernel"]
        want = run.updates["layers"][:, layer]
        assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)


def test_one_layer_of_a_coded_stack_stays_coded():
    """Also where a layer's own array would be too small, as those of norms are."""
    leaves = {"norms": common.Leaf((8, 512), None), "layers": LEAVES["layers"]}
    optimizer = _subtrack(dimension_numbers=common.dimension_numbers(leaves))
    gradients = common.at(common.drifting_tree(leaves, 1), 0)
    before = optimizer.init(common.zeros(leaves))
    _, want = optimizer.update(gradients, before)

    def first_layer(tree):
        return jax.tree.map(lambda x: x[:1] if x.ndim else x, tree)

    _, got = optimizer.update(first_layer(gradients), first_layer(before))
    for (path, a), b in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(first_layer(want)), strict=True
    ):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        # The dither of norms is that of a matrix with the layers as its rows.
        atol = 1 if jnp.issubdtype(a.dtype, jnp.integer) else 1e-5
        a, b = (np.asarray(x, "float32") for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)
    assert optax.tree.get(got, "mu")["norms"].dtype == jnp.int8


@pytest.mark.parametrize("transport", [True, "momentum"])
def test_moments_follow_the_basis(transport):
    """As float32 moments do, within precision; unchanged roots keep their codes."""
    rng = np.random.default_rng(0)
    basis, before = jnp.array(np.linalg.qr(rng.normal(size=(2, 64, 40)))[0], "float32")
    rotations = {"kernel": stj.DenseRotation(basis, before)}
    moments = optax.ScaleByAdamState(
        jnp.int32(5),
        {"kernel": jnp.array(rng.normal(size=(40, 128)), "float32")},
        {"kernel": jnp.array(1 + rng.uniform(size=(40, 128)), "float32")},
    )
    function = {
        True: lambda *arguments: stj.transport_adam(*arguments, b1=0.9, b2=0.999),
        "momentum": stj.transport_momentum,
    }[transport]
    empty = eight_bit.in_eight_bits(optax.scale_by_adam()).init(moments.mu)
    codes = eight_bit.encode_moments(moments, empty)
    after = eight_bit.transported(function)(codes, rotations)
    got = eight_bit.decode_moments(after)
    want = function(eight_bit.decode_moments(codes), rotations)
    for field in ("mu", "nu"):
        a, b = (np.asarray(getattr(x, field)["kernel"]) for x in (got, want))
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)
    assert np.any(after.mu["kernel"] != codes.mu["kernel"])
    if transport == "momentum":
        np.testing.assert_array_equal(after.nu["kernel"], codes.nu["kernel"])


def test_trains_as_float32_does():
    """Cross entropy of a classifier with a hidden layer, after 200 steps."""
    rng = np.random.default_rng(0)
    inputs = jnp.array(rng.normal(size=(512, 64)), jnp.float32)
    labels = jnp.argmax(jnp.tanh(inputs @ rng.normal(size=(64, 32))), axis=1)
    params = {
        "up": jnp.array(rng.normal(size=(64, 160)) / 8, jnp.float32),
        "down": jnp.array(rng.normal(size=(160, 32)) / 12, jnp.float32),
        "bias": jnp.zeros(32),
    }
    numbers = {name: optax.contrib.MuonDimensionNumbers(0, 1) for name in params}
    numbers["bias"] = None

    def loss(params):
        hidden = jnp.tanh(inputs @ params["up"])
        logits = hidden @ params["down"] + params["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    losses = {}
    for mu_dtype in ("int8", None):
        optimizer = _subtrack(mu_dtype, rank=30, dimension_numbers=numbers)

        def step(carry, _, optimizer=optimizer):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        train = jax.jit(
            lambda carry, step=step: jax.lax.scan(step, carry, length=200)[1]
        )
        losses[mu_dtype] = train((params, optimizer.init(params)))
    assert losses[None][-1] < 0.5 * losses[None][0]
    assert abs(losses["int8"][-1] - losses[None][-1]) < 0.02


# --- In wrappers, checkpoints and metadata --------------------------------------


def test_one_compilation_and_donated_buffers():
    """`inject_hyperparams` with changing learning rates."""
    optimizer = optax.inject_hyperparams(
        stj.subtrack, static_args=("rank", "dimension_numbers", "mu_dtype")
    )(
        optax.linear_schedule(1e-2, 0.0, 10),
        rank=RANK,
        dimension_numbers=NUMBERS,
        mu_dtype=jnp.int8,
    )
    gradients = common.at(common.drifting_tree(LEAVES, 1), 0)
    state = optimizer.init(gradients)
    update = jax.jit(optimizer.update, donate_argnums=1)
    for _ in range(3):
        updates, state = update(gradients, state, gradients)
    assert update._cache_size() == 1
    common.assert_all_finite(updates)


def test_checkpoint(tmp_path):
    gradients = common.drifting_tree(LEAVES, 2)
    optimizer = _subtrack()
    params = common.zeros(LEAVES, "bfloat16")
    update = jax.jit(optimizer.update)
    _, state = update(common.at(gradients, 0), optimizer.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(optimizer.init, params)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    jax.tree.map(
        np.testing.assert_array_equal,
        update(common.at(gradients, 1), restored, params),
        update(common.at(gradients, 1), state, params),
    )


def test_parameters_with_metadata():
    """Flax metadata: codes of plain leaves are boxed, scales and the rest are not."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(128, 64, rngs=rngs)
            self.up = nnx.Linear(64, 160, use_bias=False, rngs=rngs)

    boxed = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    runs = []
    for params in (boxed, nnx.to_pure_dict(boxed)):
        optimizer = _subtrack(dimension_numbers=stj.by_path("kernel$"))
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        for _ in range(2):
            updates, state = update(params, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        runs.append(jax.tree.leaves((updates, state)))
    jax.tree.map(np.testing.assert_array_equal, *runs)
    state = optimizer.init(boxed)
    mu, scale = (
        optax.tree.get(state, name)["embed"]["embedding"] for name in ("mu", "mu_scale")
    )
    assert isinstance(mu, nnx.Param) and isinstance(scale, jax.Array)


def test_moments_that_turn_a_little_on_every_step_do_not_stand_still():
    """Rotations by 0.01 radians per step, less than the distance of codes."""
    steps, angle = 400, 0.01
    turn = np.kron(
        np.eye(16), [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    )
    start = np.random.default_rng(0).normal(size=(32, 128))
    gradients = jnp.array(
        [np.linalg.matrix_power(turn, k) @ start for k in range(steps)], jnp.float32
    )
    rotation = stj.DenseRotation(jnp.eye(32), jnp.array(turn.T, jnp.float32))
    adam = optax.scale_by_adam(eps=0.0)
    turned = functools.partial(stj.transport_adam, b1=0.9, b2=0.999)

    def run(rule, turned):
        def step(state, gradient):
            return rule.update(gradient, turned(state, rotation))[1], None

        scan = jax.jit(functools.partial(jax.lax.scan, step))
        return scan(rule.init(gradients[0]), gradients)[0]

    want = run(adam, turned)
    coded = run(eight_bit.in_eight_bits(adam), eight_bit.transported(turned))
    got = eight_bit.decode_moments(coded)
    ratio = np.sqrt(got.nu) / np.sqrt(want.nu)
    assert abs(np.median(ratio) - 1) < 0.02
    assert ratio.std() < 0.2  # with rounding to nearest or a constant dither: above 0.7
    assert np.linalg.norm(got.mu - want.mu) < 0.04 * np.linalg.norm(want.mu)


def test_what_is_fed_back_is_decoded():
    """LDAdam's tracker and error feedback read the first moment."""
    leaf = common.Leaf((96, 128))
    gradients = jnp.asarray(common.drifting_gradients(leaf, 12), jnp.float32)
    runs = {
        mu_dtype: common.run(
            stj.ldadam(1e-2, rank=64, mu_dtype=mu_dtype),
            jnp.zeros(leaf.shape),
            gradients,
        )
        for mu_dtype in ("int8", None)
    }
    state = runs["int8"].state
    assert optax.tree.get(state, "mu").dtype == jnp.int8
    end, want = (jnp.sum(run.updates, axis=0) for run in (runs["int8"], runs[None]))
    assert jnp.linalg.norm(end - want) < 0.1 * jnp.linalg.norm(want)
