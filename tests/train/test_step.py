"""The compiled step and evaluation against the same thing written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models.llama import LlamaConfig
from train import step

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
    """Over the tokens of all batches together."""
    model = nnx.merge(step.model_definition(MODEL), params)
    total, count = 0.0, 0
    for batch in batches:
        log_probabilities = jax.nn.log_softmax(model(batch["inputs"]))
        picked = jnp.take_along_axis(
            log_probabilities, batch["targets"][..., None], axis=-1
        )[..., 0]
        total -= jnp.sum(picked * batch["mask"])
        count += jnp.sum(batch["mask"])
    return total / count


@pytest.fixture
def state():
    return step.create_state(MODEL, OPTIMIZER, jax.random.key(0))


def test_a_step_descends_the_mean_loss_of_its_batch(state):
    batch = make_batch(0)
    loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(state.params, [batch])
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradients)
    definition = step.model_definition(MODEL)
    new_state, metrics = step.train_step(definition, OPTIMIZER, schedule, state, batch)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    norm = float(optax.tree.norm(gradients))
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["learning_rate"] == pytest.approx(0.1)
    assert new_state.step == 1
    for leaf, other in zip(
        jax.tree.leaves(new_state.params), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-6)


def test_a_step_reuses_the_buffers_of_its_state_and_its_program(state):
    definition = step.model_definition(MODEL)
    before = step.train_step._cache_size()
    kernel = state.params["head"]["kernel"]
    for seed in range(3):
        state, metrics = step.train_step(
            definition, OPTIMIZER, schedule, state, make_batch(seed)
        )
    assert kernel.is_deleted()
    assert metrics["learning_rate"] == pytest.approx(2.1)
    # A definition made anew is the same program: nothing compiles again.
    step.train_step(
        step.model_definition(MODEL), OPTIMIZER, schedule, state, make_batch(3)
    )
    assert step.train_step._cache_size() - before <= 1


def test_evaluation_weighs_tokens_not_batches(state):
    batches = [make_batch(0), make_batch(1)]
    batches[1]["mask"] = batches[1]["mask"].at[1:].set(False)
    loss = step.evaluate(step.model_definition(MODEL), state.params, batches)
    expected = float(mean_loss(state.params, batches))
    assert loss == pytest.approx(expected, rel=1e-5)
    means = [float(mean_loss(state.params, [batch])) for batch in batches]
    assert abs(np.mean(means) - expected) > 1e-3


def test_seeds_decide_the_parameters():
    def kernel(seed):
        key = jax.random.key(seed)
        return step.create_state(MODEL, OPTIMIZER, key).params["head"]["kernel"]

    np.testing.assert_array_equal(kernel(1), kernel(1))
    assert not np.array_equal(kernel(1), kernel(2))
