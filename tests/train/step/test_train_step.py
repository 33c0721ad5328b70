"""Training step and evaluation against the same computation written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models import llama
from models.llama import LlamaConfig
from train.config.optimizer_config import OptimizerConfig
from train.step import optimizers
from train.step import train_step as step
from train.step.language_model import NextTokenLoss
from train.step.setup import llama_setup
from train.step.train_state import initial_state

MODEL = LlamaConfig(64, 16, 32, num_layers=2, num_heads=2, init_std=0.2)
OPTIMIZER = optax.sgd(0.1)


def schedule(count):
    return 0.1 + count


def make_batch(seed, shape=(4, 8)):
    keys = jax.random.split(jax.random.key(seed), 3)
    inputs, targets = (jax.random.randint(key, shape, 0, 64) for key in keys[:2])
    mask = jax.random.bernoulli(keys[2], 0.7, shape)
    return {"inputs": inputs, "targets": targets, "mask": mask}


@jax.jit
def mean_loss(params, batches):
    """Mean over the tokens of all batches."""
    model = nnx.merge(llama.definition(MODEL), params)
    total, count = 0.0, 0
    for batch in batches:
        log_probabilities = jax.nn.log_softmax(model(batch["inputs"]))
        picked = jnp.take_along_axis(
            log_probabilities, batch["targets"][..., None], axis=-1
        )[..., 0]
        total -= jnp.sum(picked * batch["mask"])
        count += jnp.sum(batch["mask"])
    return total / count


def fresh_state(optimizer=OPTIMIZER, model=MODEL, seed=0):
    setup = llama_setup(model, optimizer, schedule)
    return setup.create_state(jax.random.key(seed))


@pytest.fixture
def state():
    return fresh_state()


def make(optimizer=OPTIMIZER, **settings):
    return llama_setup(MODEL, optimizer, schedule, **settings).train_step


def assert_close(tree, other, **tolerance):
    for leaf, leaf_ in zip(*map(jax.tree.leaves, (tree, other)), strict=True):
        np.testing.assert_allclose(leaf, leaf_, **tolerance)


def test_a_step_descends_the_mean_loss_of_its_batch(state):
    batch = make_batch(0)
    loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(state.params, [batch])
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradients)
    new_state, metrics = make()(state, batch)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    norm = float(optax.tree.norm(gradients))
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["learning_rate"] == pytest.approx(0.1)
    assert new_state.step == 1
    assert_close(new_state.params, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("allowed", [0.5, 2.0])
def test_gradients_are_clipped_to_a_fraction_of_their_norm(state, allowed):
    """The norm is `allowed` times its value; above 1 nothing changes."""
    batch = make_batch(0)
    gradients = jax.jit(jax.grad(mean_loss))(state.params, [batch])
    norm = float(optax.tree.norm(gradients))
    factor = min(allowed, 1)
    expected = jax.tree.map(lambda p, g: p - 0.1 * factor * g, state.params, gradients)
    new_state, metrics = make(max_gradient_norm=allowed * norm)(state, batch)
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert_close(new_state.params, expected, rtol=1e-4, atol=1e-6)


def test_a_step_reuses_the_buffers_of_its_state_and_its_program(state):
    train_step = make()
    kernel = state.params["head"]["kernel"]
    for seed in range(3):
        state, metrics = train_step(state, make_batch(seed))
    assert kernel.is_deleted()
    assert metrics["learning_rate"] == pytest.approx(2.1)
    assert train_step._cache_size() == 1


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_equal_the_whole_batch(state, parts):
    """Also if one part has many more unmasked tokens than another."""
    batch = make_batch(0)
    batch["mask"] = batch["mask"].at[1].set(False).at[2, 1:].set(False)
    whole, metrics = make()(jax.tree.map(jnp.copy, state), batch)
    split, split_metrics = make(gradient_accumulation_steps=parts)(state, batch)
    assert_close(split.params, whole.params, rtol=1e-5, atol=1e-7)
    assert_close(split_metrics, metrics, rtol=1e-5)
    assert metrics["count"] == jnp.sum(batch["mask"]) < batch["mask"].size


def test_sums_of_bfloat16_parts_keep_their_digits():
    """256 equal parts: a bfloat16 sum would stop growing before the end."""
    model = dataclasses.replace(MODEL, param_dtype="bfloat16")
    state = fresh_state(model=model)
    one = make_batch(0, (1, 8)) | {"mask": jnp.ones((1, 8), bool)}
    many = jax.tree.map(lambda x: jnp.repeat(x, 256, axis=0), one)
    want = make()(jax.tree.map(jnp.copy, state), one)[1]
    got = make(gradient_accumulation_steps=256)(state, many)[1]
    assert got["gradient_norm"] == pytest.approx(float(want["gradient_norm"]), rel=1e-2)


def test_the_z_loss_shrinks_the_partition_and_is_not_reported(state):
    def log_partition(params):
        model = nnx.merge(llama.definition(MODEL), params)
        return float(
            jnp.mean(jax.nn.logsumexp(model(make_batch(0)["inputs"]), -1) ** 2)
        )

    plain, metrics = make()(jax.tree.map(jnp.copy, state), make_batch(0))
    weighed, z_metrics = make(z_loss_weight=0.5)(state, make_batch(0))
    assert log_partition(weighed.params) < 0.9 * log_partition(plain.params)
    assert z_metrics["loss"] == pytest.approx(float(metrics["loss"]))


@pytest.mark.parametrize("name", ["subtrack", "adamw"])
def test_a_step_that_is_not_finite_changes_nothing(name):
    config = OptimizerConfig(name=name, rank=4, update_interval=2)
    optimizer = optimizers.make_optimizer(config, 1e-2, seed=0)
    train_step = make(optimizer)
    state = fresh_state(optimizer)
    state, _ = train_step(state, make_batch(0))
    before = jax.device_get((state.params, state.opt_state))
    broken = state._replace(
        params=jax.tree.map(lambda p: p.at[(0,) * p.ndim].set(jnp.nan), state.params)
    )
    skipped, metrics = train_step(broken, make_batch(1))
    assert not np.isfinite(metrics["loss"])
    assert metrics["skipped_steps"] == 1
    assert (skipped.step, skipped.skipped_steps) == (2, 1)
    assert_close(skipped.opt_state, before[1], rtol=0)
    # Later steps, and the schedule, continue as if it had not been.
    sound = skipped._replace(params=jax.tree.map(jnp.asarray, before[0]))
    _, metrics = train_step(sound, make_batch(2))
    assert metrics["skipped_steps"] == 1
    assert metrics["learning_rate"] == pytest.approx(1.1)


def test_metrics_of_the_subspace():
    config = OptimizerConfig(name="subtrack", rank=4, update_interval=2)
    optimizer = optimizers.make_optimizer(config, 1e-2, seed=0)
    state = fresh_state(optimizer)
    state, metrics = make(optimizer)(state, make_batch(0))
    norms = jax.tree.leaves(optax.tree.get(state.opt_state, "gradient_norm"))
    captured = jax.tree.leaves(optax.tree.get(state.opt_state, "captured_energy"))
    energies = np.concatenate([np.square(norm) for norm in norms])
    share = np.sum(energies * np.concatenate(captured)) / np.sum(energies)
    assert 0.3 < share < 1
    assert metrics["captured_energy"] == pytest.approx(share, rel=1e-5)
    recovered = jax.tree.leaves(optax.tree.get(state.opt_state, "recovery_norm"))
    ratio = np.linalg.norm(np.concatenate(recovered)) / np.sqrt(np.sum(energies))
    assert metrics["recovery_ratio"] == pytest.approx(ratio, rel=1e-5)
    assert step.subspace_metrics(optax.adam(1e-3).init(state.params)) == {}


def test_evaluation_weighs_tokens_not_batches(state):
    batches = [make_batch(0), make_batch(1)]
    batches[1]["mask"] = batches[1]["mask"].at[1:].set(False)
    loss = step.evaluate(NextTokenLoss(MODEL), state.params, batches)
    expected = float(mean_loss(state.params, batches))
    assert loss == pytest.approx(expected, rel=1e-5)
    means = [float(mean_loss(state.params, [batch])) for batch in batches]
    assert abs(np.mean(means) - expected) > 1e-3


def test_seeds_decide_the_parameters():
    def kernel(seed):
        return fresh_state(seed=seed).params["head"]["kernel"]

    np.testing.assert_array_equal(kernel(1), kernel(1))
    assert not np.array_equal(kernel(1), kernel(2))


@pytest.mark.parametrize("parts", [1, 2])
def test_any_loss_trains_with_a_key_for_each_step_and_part(parts):
    """Mean of w * noise over examples: its gradient is the mean of the noise."""

    def loss_sums(params, batch, key):
        noise = jax.random.normal(key, batch["counts"].shape)
        total = jnp.sum(params["w"] * noise, where=batch["counts"])
        return step.LossSums(total, jnp.sum(batch["counts"]), {})

    batch = {"counts": jnp.array([True, True, False, True])}
    train_step = step.make_train_step(loss_sums, OPTIMIZER, schedule, parts, seed=7)
    state = initial_state({"w": 1.0}, OPTIMIZER)
    for number in range(2):
        before = float(state.params["w"])
        key = jax.random.fold_in(jax.random.key(7), number)
        if parts == 1:
            noise = jax.random.normal(key, (4,))
        else:  # strided: examples 0 and 2, then 1 and 3
            keys = [jax.random.fold_in(key, part) for part in range(2)]
            noise = jnp.stack([jax.random.normal(k, (2,)) for k in keys], 1).ravel()
        mean = float(jnp.mean(noise, where=batch["counts"]))
        state, metrics = train_step(state, batch)
        assert metrics["count"] == 3
        assert metrics["loss"] == pytest.approx(before * mean, rel=1e-5)
        assert state.params["w"] == pytest.approx(before - 0.1 * mean, rel=1e-5)
