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
    """Also where the momentum would be looked for: a parameter is no field."""
    state = rule.init({"mu": jnp.zeros((RANK, COLUMNS))})
    with pytest.raises(
        TypeError, match=r"no mu and no trace in a .*State: .* transport=None"
    ):
        stj.transport_momentum(state, {"mu": _rotations("dense")[0]["matrix"]})


# --- Adam, with its momentum alone turned -------------------------------------


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
    update = common.quick_jit(optimizer.update)
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
