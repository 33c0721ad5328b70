"""The table of optimizers, and the learning rate they follow."""

import dataclasses
import inspect
import json
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import llama
from subtrack_jax.optimizers import FAMILY
from tests.common import DATA, is_same_program
from train.config import methods
from train.config.optimizer_config import (
    OptimizerConfig,
    OptimizerName,
    schedule_phases,
)
from train.config.presets import PRESETS
from train.step import optimizers

NAMES = typing.get_args(OptimizerName)
FULL_RANK = ("adamw", "muon", "adafactor")
LIBRARY = {name.replace("_", "-"): method.optimizer for name, method in FAMILY.items()}
GOLDEN = DATA / "optimizer_settings.json"


@pytest.fixture
def params():
    """A LLaMA's with all but one of its matrices left out, quick to compile."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "head": {"kernel": normal(16, 64)},
        "layers": {
            "mlp": {"up": {"kernel": normal(2, 16, 32)}},
            "mlp_norm": {"scale": normal(2, 16)},
        },
        "norm": {"scale": normal(16)},
    }


def make(name="subtrack", learning_rate=1e-2, seed=0, **settings):
    config = OptimizerConfig(name=name, rank=4, update_interval=2, **settings)
    return optimizers.make_optimizer(config, learning_rate, seed, steps=6)


def one_update(optimizer, params, gradients):
    return jax.jit(optimizer.update)(gradients, optimizer.init(params), params)[0]


@pytest.mark.parametrize("name", NAMES)
def test_low_rank_state_is_that_of_attention_and_mlp(params, name):
    state = make(name).init(params)
    basis = jax.tree.leaves(optax.tree.get(state, "basis", default=()))
    is_tracked = name not in FULL_RANK and not name.startswith("apollo")
    assert len(basis) == is_tracked
    if name in ("muon", "adafactor"):
        return
    moments = optax.tree.get(state, "mu")
    assert moments["head"]["kernel"].shape == (16, 64)
    rank = 1 if name == "apollo-mini" else 4
    expected = (2, 16, 32) if name == "adamw" else (2, rank, 32)
    assert moments["layers"]["mlp"]["up"]["kernel"].shape == expected


@pytest.fixture
def up(params):
    """One matrix, for tests that compile many optimizers."""
    return {"layers": {"mlp": params["layers"]["mlp"]}}


@pytest.mark.slow
def test_each_name_is_a_method_of_its_own(up):
    gradients = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(1), x.shape), up
    )
    kernels = []
    for name in NAMES:
        optimizer = make(name, learning_rate=1.0)
        update = jax.jit(optimizer.update)
        state, total = optimizer.init(up), 0.0
        # Two refreshes: galore and subtrack-grad are equal until the first.
        for scale in (1.0, -0.5, 2.0):
            scaled = jax.tree.map(lambda x, s=scale: s * jnp.sin(s * x), gradients)
            updates, state = update(scaled, state, up)
            total += updates["layers"]["mlp"]["up"]["kernel"]
        assert np.all(np.isfinite(total))
        for other in kernels:
            assert np.abs(total - other).max() > 1e-3
        kernels.append(total)


@pytest.mark.parametrize("name", ["adamw", "subtrack"])
def test_settings_reach_the_optimizer(params, name):
    settings = {"b1": 0.5, "b2": 0.7, "eps": 0.1, "weight_decay": 0.3}
    gradients = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), params)
    updates = one_update(make(name, **settings), params, gradients)
    # First step of Adam; the norms are spared the decay.
    adam = 1e-3 / (1e-3 + 0.1)
    head = params["head"]["kernel"]
    np.testing.assert_allclose(
        updates["head"]["kernel"], -1e-2 * (adam + 0.3 * head), rtol=1e-4, atol=1e-8
    )
    np.testing.assert_allclose(updates["norm"]["scale"], -1e-2 * adam, rtol=1e-4)
    layer_norm = updates["layers"]["mlp_norm"]["scale"]
    np.testing.assert_allclose(layer_norm, -1e-2 * adam, rtol=1e-4)


def run(optimizer, params, turns=4):
    """Updates and states of a few steps with different gradients."""
    gradients = jax.tree.map(
        lambda x: 1e-3 * jax.random.normal(jax.random.key(1), x.shape), params
    )
    state, update, history = optimizer.init(params), jax.jit(optimizer.update), []
    for turn in range(turns):
        scaled = jax.tree.map(lambda x, s=turn: x * jnp.cos(s * x * 1e3), gradients)
        updates, state = update(scaled, state, params)
        history.append((updates, state))
    return history


def assert_same_updates(history, other):
    for (updates, _), (updates_, _) in zip(history, other, strict=True):
        for leaf, leaf_ in zip(*map(jax.tree.leaves, (updates, updates_)), strict=True):
            np.testing.assert_allclose(leaf, leaf_, rtol=1e-5, atol=1e-9)


def monitored(name):
    """`monitor=True` as in the programs, where the method takes it."""
    takes = "monitor" in inspect.signature(LIBRARY[name]).parameters
    return {"monitor": True} if takes else {}


@pytest.mark.parametrize("name", LIBRARY)
def test_methods_without_settings_are_the_library_s(params, name):
    config = OptimizerConfig(name=name, rank=4)
    if name == "apollo-mini":
        config = OptimizerConfig(name=name)
    own = {} if name == "apollo-mini" else {"rank": 4}
    own |= monitored(name)
    library = LIBRARY[name](1e-2, dimension_numbers=llama.matrix_axes, **own)
    ours = optimizers.make_optimizer(config, 1e-2, seed=0)
    assert is_same_program(ours, library, params)


@pytest.mark.parametrize("name", LIBRARY)
def test_methods_are_the_library_s_with_the_same_settings(params, name):
    common = {"b1": 0.8, "b2": 0.95, "eps": 1e-6, "weight_decay": 0.1, "scale": 0.7}
    common["mu_dtype"] = "bfloat16"
    settings, own = {}, {}
    if name in ("subtrack", "grass-walk", "grass-jump", "fira") or "apollo" in name:
        common["growth_limit"] = 1.5
    if name in ("subtrack", "subtrack-grad"):
        common["damping"] = 0.5
    if name == "grass-walk":
        common["angle"] = 0.3
    if name in ("galore", "fira"):
        common["align"] = "sign"
    if name not in ("ldadam", "online-subspace-descent"):
        own["update_interval"] = 2
    if name != "apollo-mini":
        own["rank"] = 4
    if name == "ldadam":
        common |= {"rho": 0.8, "error_feedback": False}
    if name == "golore":
        settings["random_after_fraction"] = 0.5  # of 6
        own["random_after_steps"] = 3
    if name == "online-subspace-descent":
        settings["projection_learning_rate"] = 0.1
        own["projection_optimizer"] = optax.adam(0.1)
    own |= monitored(name)
    library = LIBRARY[name](
        1e-2,
        dimension_numbers=llama.matrix_axes,
        mask=optimizers._is_decayed,
        **common,
        **own,
    )
    ours = make(name, **common, **settings)
    assert is_same_program(ours, library, params)


def test_resolved_settings_of_every_optimizer_are_those_recorded():
    """New defaults change what runs do: record them only if that is wanted.

    python -m tests.train.step.test_optimizers writes the file anew.
    """
    assert json.loads(GOLDEN.read_text()) == recorded_settings()


def recorded_settings():
    """Settings of each optimizer alone, and in the default run."""
    tiny = PRESETS["tiny"].optimizer
    found = {"alone": {}, "default run": {}}
    for name in NAMES:
        for key, config in [
            ("alone", OptimizerConfig(name=name)),
            ("default run", dataclasses.replace(tiny, name=name)),
        ]:
            values = dataclasses.asdict(methods.resolved(config))
            read = sorted(methods.settings_of(config))
            found[key][name] = {setting: values[setting] for setting in read}
    return found


def test_concrete_defaults_are_the_library_s():
    for name, alias in LIBRARY.items():
        config = OptimizerConfig(name=name)
        parameters = inspect.signature(alias).parameters
        shared = methods.settings_of(config) & set(parameters) - {"learning_rate"}
        for setting in shared:
            value = getattr(methods.resolved(config), setting)
            assert value == parameters[setting].default, (name, setting)


def test_adamw_is_optax_s(params):
    library = optax.adamw(1e-2, weight_decay=0.0)
    assert_same_updates(run(make("adamw"), params), run(library, params))


def test_without_transport_and_recovery_subtrack_is_its_form_of_2024(up):
    history = run(make("subtrack", transport=False, recovery=False), up)
    assert_same_updates(history, run(make("subtrack-grad"), up))


def test_the_ablations_are_four_methods(up):
    kernels = [
        run(make("subtrack", transport=transport, recovery=recovery), up)[-1][0][
            "layers"
        ]["mlp"]["up"]["kernel"]
        for transport in (True, False)
        for recovery in (True, False)
    ]
    for i, kernel in enumerate(kernels):
        assert all(np.abs(kernel - other).max() > 1e-5 for other in kernels[:i])


@pytest.mark.parametrize(("name", "moves"), [("static", False), ("subtrack", True)])
def test_static_never_moves_its_basis(params, name, moves):
    bases = [
        optax.tree.get(state, "basis")["layers"]["mlp"]["up"]["kernel"]
        for _, state in run(make(name), params, turns=5)
    ]
    assert all(np.any(basis != 0) for basis in bases)
    # Two refreshes, which may not cancel either.
    assert any(np.any(basis != bases[0]) for basis in bases) == moves


@pytest.mark.parametrize("name", FULL_RANK)
def test_the_rate_of_matrices_is_that_of_matrices_alone(params, name):
    settings = {"weight_decay": 0.1, "learning_rate": 1.0}
    plain = run(make(name, **settings), params, 1)[0][0]
    scaled = run(make(name, matrix_learning_rate_scale=0.25, **settings), params, 1)
    scaled = scaled[0][0]
    up = scaled["layers"]["mlp"]["up"], plain["layers"]["mlp"]["up"]
    np.testing.assert_allclose(up[0]["kernel"], 0.25 * up[1]["kernel"], rtol=1e-6)
    for tree in (scaled, plain):
        del tree["layers"]["mlp"]
    jax.tree.map(np.testing.assert_array_equal, scaled, plain)


@pytest.mark.parametrize("name", ["adamw", "muon", "subtrack", "galore"])
def test_a_factor_on_matrices_may_be_traced(params, name):
    config = OptimizerConfig(name=name, rank=4, update_interval=2)
    field = methods.matrix_scale_field(name)
    written = dataclasses.replace(config, **{field: 0.5})

    def updates(params, scale, seed):
        optimizer = optimizers.make_optimizer(config, 1e-2, seed, scale)
        return optimizer.update(params, optimizer.init(params), params)[0]

    traced = jax.jit(updates)(params, 0.5, jnp.uint32(3))
    wanted = one_update(optimizers.make_optimizer(written, 1e-2, 3), params, params)
    for leaf, other in zip(*map(jax.tree.leaves, (traced, wanted)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_other_rules_descend_in_steps_of_adam_s_size(params, name):
    gradients = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(1), x.shape), params
    )
    updates = one_update(make(name, learning_rate=1.0), params, gradients)
    kernel = updates["layers"]["mlp"]["up"]["kernel"]
    assert jnp.vdot(kernel, gradients["layers"]["mlp"]["up"]["kernel"]) < 0
    assert 0.1 < jnp.sqrt(jnp.mean(kernel**2)) < 1.1
    # Other parameters get Adam.
    adam = one_update(make("adamw", learning_rate=1.0), params, gradients)
    for name in ("head", "norm"):
        jax.tree.map(np.testing.assert_array_equal, updates[name], adam[name])


def test_settings_that_are_not_read_make_no_difference():
    canonical = methods.canonical
    adamw = OptimizerConfig(name="adamw", rank=7, damping=0.5, b2=0.9)
    assert canonical(adamw) == OptimizerConfig(name="adamw", b2=0.9)
    static = OptimizerConfig(name="static", update_interval=3, growth_limit=2.0)
    assert canonical(static) == OptimizerConfig(name="static", growth_limit=2.0)
    galore = OptimizerConfig(name="galore", growth_limit=2.0, recovery=False)
    assert canonical(galore) == OptimizerConfig(name="galore")
    subtrack = OptimizerConfig(transport=True, recovery=False, growth_limit=2.0)
    assert canonical(subtrack) == OptimizerConfig(recovery=False)
    fixed = OptimizerConfig(step_size=0.1, damping=0.5)
    assert canonical(fixed) == OptimizerConfig(step_size=0.1)
    ldadam = OptimizerConfig(name="ldadam", b1=0.908, b2=0.999, update_interval=50)
    assert canonical(ldadam) == OptimizerConfig(name="ldadam", b2=0.999)
    mini = OptimizerConfig(name="apollo-mini", scale=128.0, rank=64)
    assert canonical(mini) == OptimizerConfig(name="apollo-mini")
    constant = OptimizerConfig(
        name="adamw", schedule="constant", final_learning_rate_fraction=0.5
    )
    assert canonical(constant) == OptimizerConfig(name="adamw", schedule="constant")
    old_name = OptimizerConfig(mu_dtype="int8")
    assert canonical(old_name) == OptimizerConfig(moments_dtype="int8")
    warm = OptimizerConfig(name="adamw", warmup_fraction=0.1)
    assert canonical(warm) == OptimizerConfig(name="adamw")


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        ({"name": "adamw", "rank": 8, "b2": 0.9}, ["--rank 8"]),
        ({"name": "ldadam", "rank": 8, "update_interval": 5}, ["--update-interval 5"]),
        ({"name": "apollo-mini", "rank": 8, "angle": 0.2}, ["--rank 8", "--angle 0.2"]),
        ({"name": "galore", "growth_limit": 2.0}, ["--growth-limit 2.0"]),
        ({"name": "galore", "growth_limit": 2.0, "recovery": True}, []),
        (
            {"schedule": "constant", "final_learning_rate_fraction": 0.5},
            ["--final-learning-rate-fraction 0.5"],
        ),
        ({"name": "muon"}, []),
    ],
)
def test_settings_that_are_given_and_not_read_are_told(given, unused):
    base = PRESETS["tiny"].optimizer
    config = dataclasses.replace(base, **given)
    assert methods.unused(config, base) == unused


def test_the_seed_decides_random_subspaces(params):
    kernels = [
        one_update(make("grass-jump", seed=seed), params, params)["layers"]["mlp"]["up"]
        for seed in (1, 1, 2)
    ]
    kernels = [update["kernel"] for update in kernels]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.allclose(kernels[0], kernels[2])


def test_learning_rate_warms_up_and_falls_to_a_fraction():
    config = OptimizerConfig(
        learning_rate=2.0, warmup_fraction=0.1, final_learning_rate_fraction=0.25
    )
    schedule = optimizers.learning_rate_schedule(config, 1000)
    rates = np.array([schedule(step) for step in range(1000)])
    assert np.all(rates > 0)
    assert np.argmax(rates) == 100
    assert rates[100] == 2.0
    np.testing.assert_allclose(np.diff(rates[:101], 2), 0, atol=1e-6)
    assert rates[550] == pytest.approx((2.0 + 0.5) / 2, rel=1e-3)
    assert rates[-1] == pytest.approx(0.5, rel=1e-3)


def rates_of(steps=1000, **settings):
    config = OptimizerConfig(learning_rate=2.0, **settings)
    schedule = optimizers.learning_rate_schedule(config, steps)
    return np.array(jax.vmap(schedule)(jnp.arange(steps)))


def test_cosine_is_optax_s():
    cosine = optax.warmup_cosine_decay_schedule(2.0 / 101, 2.0, 100, 1000, 0.2)
    wanted = jax.vmap(cosine)(jnp.arange(1000))
    np.testing.assert_array_equal(rates_of(), wanted)
    np.testing.assert_array_equal(rates_of(warmup_steps=100), wanted)


@pytest.mark.parametrize(
    ("settings", "knots"),
    [
        # step: rate, linear in between; the last step is number steps - 1.
        ({"schedule": "linear"}, {100: 2.0, 1000: 0.2}),
        ({"schedule": "constant"}, {100: 2.0, 1000: 2.0}),
        ({"schedule": "wsd"}, {100: 2.0, 800: 2.0, 1000: 0.2}),
        ({"schedule": "wsd", "decay_fraction": 0.5}, {100: 2.0, 500: 2.0, 1000: 0.2}),
        ({"schedule": "wsd", "warmup_steps": 800}, {800: 2.0, 1000: 0.2}),
        ({"schedule": "constant", "warmup_steps": 7}, {7: 2.0, 1000: 2.0}),
        ({"schedule": "linear", "warmup_fraction": 0.0}, {0: 2.0, 1000: 0.2}),
        (
            {"schedule": "wsd", "final_learning_rate_fraction": 0.0},
            {100: 2.0, 800: 2.0, 1000: 0.0},
        ),
    ],
)
def test_schedules_are_linear_between_their_knots(settings, knots):
    warmup = min(knots)
    if warmup:
        knots = {0: 2.0 / (warmup + 1)} | knots
    wanted = np.interp(np.arange(1000), list(knots), list(knots.values()))
    np.testing.assert_allclose(rates_of(**settings), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 11}, "--warmup-steps 11 is more than --steps 10"),
        (
            {"schedule": "wsd", "warmup_fraction": 0.9},
            "9 steps of warm-up and 2 of decay are more than --steps 10",
        ),
    ],
)
def test_phases_have_to_fit_the_run(settings, message):
    with pytest.raises(ValueError, match=message):
        schedule_phases(OptimizerConfig(**settings), 10)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.1, 1.0])
def test_shortest_runs_have_a_learning_rate(steps, warmup_fraction):
    config = dataclasses.replace(OptimizerConfig(), warmup_fraction=warmup_fraction)
    schedule = optimizers.learning_rate_schedule(config, steps)
    rates = [float(schedule(step)) for step in range(steps)]
    assert min(rates) > 0
    assert max(rates) <= config.learning_rate * (1 + 1e-6)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(recorded_settings(), indent=1) + "\n")


MODEL = llama.LlamaConfig(64, 16, 48, num_layers=2, num_heads=2)


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_too_large_for_every_matrix_is_refused(name):
    """Some matrices may be too small for the rank, but not all."""
    has_rank = name not in (*FULL_RANK, "apollo-mini")
    optimizers.check_rank(OptimizerConfig(name=name, rank=15), MODEL)
    config = OptimizerConfig(name=name, rank=16)
    if not has_rank:
        optimizers.check_rank(config, MODEL)
        return
    with pytest.raises(ValueError, match=r"--rank 16 .* smaller side of 16") as error:
        optimizers.check_rank(config, MODEL)
    assert f"--optimizer {name}" in str(error.value)
    optimizer = optimizers.make_optimizer(config, 1e-3, 0)
    shapes = {"layers": {"mlp": {"up": {"kernel": jnp.zeros((2, 16, 48))}}}}
    with pytest.raises(ValueError, match="No leaf to treat as low-rank"):
        jax.eval_shape(optimizer.init, shapes)


def test_a_rank_that_only_attention_takes():
    """Wider heads than the MLP: the rank is compared with all matrices."""
    model = dataclasses.replace(MODEL, hidden_size=48, mlp_size=8)
    optimizers.check_rank(OptimizerConfig(rank=40), model)
