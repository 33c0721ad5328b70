"""Rules in coordinates: what becomes of their momentum when the basis moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import subtrack_jax as stj
from tests import common

RANK, COLUMNS = 3, 7


# --- Momentum follows the basis -----------------------------------------------

MATRICES = {"matrix": (RANK, COLUMNS), "stack": (2, RANK, COLUMNS)}


def _coordinates(seed):
    rng = np.random.default_rng(seed)
    low_rank = {name: rng.normal(size=shape) for name, shape in MATRICES.items()}
    return {**low_rank, "bias": optax.MaskedNode()}


def _rotations(kind):
    """Changes of basis, and their matrices formed with NumPy alone."""
    rng = np.random.default_rng(1)
    rotations, matrices = {"bias": optax.MaskedNode()}, {}
    for name, (*batch, rank, _) in MATRICES.items():
        if kind == "dense":
            new, old = np.linalg.qr(rng.normal(size=(2, *batch, 5, rank)))[0]
            rotations[name] = stj.DenseRotation(jnp.array(new), jnp.array(old))
            matrices[name] = np.swapaxes(new, -1, -2) @ old
        else:
            v = rng.normal(size=(*batch, rank))
            v /= np.linalg.norm(v, axis=-1, keepdims=True)
            cosine = rng.uniform(size=batch)
            rotations[name] = stj.RankOneRotation(jnp.array(v), jnp.array(cosine))
            bend = np.asarray(cosine - 1)[..., None, None]
            matrices[name] = np.eye(rank) + bend * v[..., :, None] * v[..., None, :]
    return rotations, matrices


def _everything(params):
    return jax.tree.map(lambda _: True, params)


MOMENTUM = {
    "adam": (optax.scale_by_adam(), "mu"),
    "lion": (optax.scale_by_lion(), "mu"),
    "trace": (optax.trace(0.9), "trace"),
    "ema": (optax.ema(0.9), "ema"),
    "muon": (optax.contrib.scale_by_muon(), "mu"),
    "chain": (
        optax.chain(optax.clip(1.0), optax.masked(optax.trace(0.9), _everything)),
        "trace",
    ),
    "injected": (optax.inject_hyperparams(optax.scale_by_adam)(b1=0.8), "mu"),
}


@pytest.mark.parametrize("kind", ["dense", "rank_one"])
@pytest.mark.parametrize("rule", MOMENTUM)
def test_transport_momentum(rule, kind, x64):
    """M <- C M wherever it is nested; all else bitwise as it was."""
    inner, field = MOMENTUM[rule]
    rotations, matrices = _rotations(kind)
    momentum = _coordinates(2)
    zeros = jax.tree.map(jnp.zeros_like, momentum)
    before = jax.tree.map(lambda x: x + 1, inner.init(zeros))
    before = optax.tree.set(before, **{field: jax.tree.map(jnp.array, momentum)})
    after = stj.transport_momentum(before, rotations)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for name, matrix in matrices.items():
        np.testing.assert_allclose(
            optax.tree.get(after, field)[name], matrix @ momentum[name], atol=1e-12
        )
    rest = [optax.tree.set(state, **{field: None}) for state in (after, before)]
    jax.tree.map(np.testing.assert_array_equal, *rest)


def test_transport_momentum_keeps_its_dtype():
    """Computed in float32: what is stored in bfloat16 is rounded once."""
    rotations, matrices = _rotations("dense")
    rotations = jax.tree.map(lambda x: x.astype(jnp.float32), rotations)
    momentum = jax.tree.map(lambda x: jnp.array(x, jnp.bfloat16), _coordinates(2))
    state = optax.TraceState(trace=momentum)
    turned = stj.transport_momentum(state, rotations).trace
    for name, matrix in matrices.items():
        assert turned[name].dtype == jnp.bfloat16
        want = matrix @ np.asarray(momentum[name], np.float64)
        np.testing.assert_allclose(
            np.asarray(turned[name], np.float64), want, rtol=2.0**-8, atol=1e-6
        )


def test_a_parameter_named_like_momentum_is_none():
    """Names of parameters are the user's; those of a state's fields are not."""
    rotations, matrices = _rotations("dense")
    mu = jnp.array(_coordinates(2)["matrix"])
    state = optax.ScaleByLionState(jnp.int32(1), mu={"mu": {"trace": mu}})
    turned = stj.transport_momentum(state, {"mu": {"trace": rotations["matrix"]}})
    np.testing.assert_allclose(
        turned.mu["mu"]["trace"], matrices["matrix"] @ np.asarray(mu), atol=1e-5
    )


@pytest.mark.parametrize("rule", [optax.scale_by_rms(), optax.identity()])
def test_a_rule_without_momentum_is_refused(rule):
    """A parameter may have the name of the momentum's field."""
    state = rule.init({"mu": jnp.zeros((RANK, COLUMNS))})
    with pytest.raises(
        TypeError, match=r"no mu, trace or ema in a .*State: .* transport=None"
    ):
        stj.transport_momentum(state, {"mu": _rotations("dense")[0]["matrix"]})


# --- Adam, with a transport of its first moment alone -------------------------


def _adam_of(transport):
    low_rank = stj.LowRank(RANK)
    return optax.chain(
        stj.track_subspace(low_rank, stj.geodesic(), update_interval=1),
        stj.project(low_rank),
        stj.scale_by_projection_aware_adam(low_rank, transport=transport),
    )


def test_golore_turns_the_first_moment_and_keeps_the_second():
    """After a move: b1 C M + (1 - b1) A, and b2 V + (1 - b2) A∘A."""
    optimizer = _adam_of("momentum")
    gradients = np.random.default_rng(0).normal(size=(2, 5, COLUMNS)).astype("f4")
    params = {"kernel": jnp.zeros((5, COLUMNS)), "bias": jnp.zeros(COLUMNS)}
    update = jax.jit(optimizer.update)
    states, state = [], optimizer.init(params)
    for gradient in gradients:
        tree = {"kernel": jnp.array(gradient), "bias": jnp.array(gradient[0])}
        _, state = update(tree, state, params)
        states.append(state)
    basis, mu, nu = (
        [np.asarray(optax.tree.get(s, field)["kernel"], np.float64) for s in states]
        for field in ("basis", "mu", "nu")
    )
    change = basis[1].T @ basis[0]
    assert np.abs(change - np.eye(RANK)).max() > 1e-2
    seen = basis[1].T @ gradients[1]
    np.testing.assert_allclose(mu[1], 0.9 * change @ mu[0] + 0.1 * seen, atol=1e-6)
    np.testing.assert_allclose(nu[1], 0.999 * nu[0] + 0.001 * seen**2, atol=1e-8)


@pytest.mark.parametrize("transport", ["both", None, "mu"])
def test_an_unknown_transport_is_quoted(transport):
    with pytest.raises(ValueError, match=f"transport={transport!r}: use True"):
        _adam_of(transport)


# --- Training -----------------------------------------------------------------

STEPS, INTERVAL = 150, 5
LEAVES = {
    "kernel": common.Leaf((12, 20)),
    "layers": common.Leaf((2, 20, 12), (1,), (2,)),
    "bias": common.Leaf((20,), None),
}
LOW_RANK = stj.LowRank(6, common.dimension_numbers(LEAVES))


def _muon():
    """Orthogonal momentum for matrices, stacked ones too, and Adam for vectors."""
    dimension_numbers = lambda updates: jax.tree.map(
        lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), updates
    )
    return optax.partition(
        {
            True: optax.contrib.scale_by_muon(
                weight_dimension_numbers=dimension_numbers
            ),
            False: optax.scale_by_adam(),
        },
        lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )


# Each with its learning rate.
RULES = {
    "lion": (optax.scale_by_lion(), 0.05),
    "sgd": (optax.trace(0.9), 0.2),
    "adafactor": (optax.scale_by_factored_rms(min_dim_size_to_factor=4), 0.05),
    "muon": (_muon(), 0.15),
}
WITH_MOMENTUM = [name for name in RULES if name != "adafactor"]


def _low_rank(
    rule, transport=None, recovery="none", learning_rate=1.0, low_rank=LOW_RANK
):
    return optax.chain(
        stj.track_subspace(low_rank, stj.geodesic(init="svd"), INTERVAL),
        stj.project(low_rank),
        stj.on_coordinates(low_rank, rule, transport),
        stj.recover_and_scale(
            low_rank, scale=1.0, recovery=recovery, recovery_scale=0.25
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def _least_squares():
    """A loss of three linear maps at once, of which one is a stack."""
    rng = np.random.default_rng(0)
    target = {
        name: jnp.array(rng.normal(size=leaf.shape), jnp.float32)
        for name, leaf in LEAVES.items()
    }
    inputs = jnp.array(rng.normal(size=(64, 20)), jnp.float32)

    def loss(params):
        error = jax.tree.map(jnp.subtract, params, target)
        plain = inputs[:, :12] @ error["kernel"] + error["bias"][None]
        stacked = jnp.einsum("bi,lij->lbj", inputs, error["layers"])
        return jnp.mean(plain**2) + jnp.mean(stacked**2)

    return loss


@pytest.mark.parametrize(
    "name, transport, recovery",
    [
        *((name, None, "columns") for name in RULES),
        *((name, stj.transport_momentum, "none") for name in WITH_MOMENTUM),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *((name, None, "none") for name in RULES),
                *((name, stj.transport_momentum, "columns") for name in WITH_MOMENTUM),
            )
        ),
    ],
)
def test_trains(name, transport, recovery):
    """Trains across many refreshes, with the momentum kept or transported."""
    rule, learning_rate = RULES[name]
    schedule = optax.cosine_decay_schedule(learning_rate, STEPS)
    optimizer = _low_rank(rule, transport, recovery, schedule)
    loss = _least_squares()

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            bases = optax.tree.get(state, "basis")
            return (optax.apply_updates(params, updates), state), (value, bases)

        return jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS)[1]

    losses, bases = train(common.zeros(LEAVES))
    assert losses[-1] < losses[0] / 10
    for leaf in ("kernel", "layers"):
        moved = np.any(np.diff(bases[leaf], axis=0).reshape(STEPS - 1, -1), axis=1)
        assert np.count_nonzero(moved) == STEPS // INTERVAL - 1


def test_adafactor_does_factor():
    """Adafactor's statistics are a row and a column of each matrix of coordinates."""
    state = _low_rank(RULES["adafactor"][0]).init(common.zeros(LEAVES))
    rows, columns, rest = (
        jax.tree.map(jnp.shape, optax.tree.get(state, field))
        for field in ("v_row", "v_col", "v")
    )
    assert (rows["kernel"], columns["kernel"], rest["kernel"]) == ((6,), (20,), (1,))
    assert (rows["layers"], columns["layers"]) == ((2, 6), (2, 20))
    assert rest["bias"] == (20,)


@pytest.mark.parametrize("name", RULES)
def test_layers_of_a_stack_do_not_meet(name):
    """Updates of a stack are those of its matrices, over a move of the basis."""
    transport = stj.transport_momentum if name in WITH_MOMENTUM else None
    gradients = common.drifting_tree(LEAVES, INTERVAL + 2)
    stacked = _low_rank(RULES[name][0], transport)
    want = common.run(stacked, common.zeros(LEAVES), gradients).updates["layers"]
    for layer in range(2):
        one = {"kernel": gradients["layers"][:, layer]}
        alone = _low_rank(RULES[name][0], transport, low_rank=stj.LowRank(6))
        got = common.run(alone, common.at(one, 0), one).updates["kernel"]
        np.testing.assert_allclose(got, want[:, layer], atol=1e-4)


def test_a_rule_that_reads_parameters_is_told_where_to_go():
    params = jnp.ones((6, 10))
    low_rank = stj.LowRank(rank=2)
    rule = optax.chain(optax.scale_by_adam(), optax.scale_by_trust_ratio())
    optimizer = optax.chain(
        stj.track_subspace(low_rank, stj.geodesic()),
        stj.project(low_rank),
        stj.on_coordinates(low_rank, rule),
    )
    with pytest.raises(TypeError, match=r"reads the parameters.* after the recovery"):
        optimizer.update(params, optimizer.init(params), params)
