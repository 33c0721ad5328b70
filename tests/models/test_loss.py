"""Token loss and its parts against NumPy, at once and in chunks."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import llama
from tests.models.common import CONFIG, logits_of, make_model, make_tokens, parameters


def test_masked_loss_equals_numpy():
    model = make_model()
    tokens = make_tokens((3, 8))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    mask = jax.random.bernoulli(jax.random.key(1), 0.6, targets.shape)
    logits = np.asarray(logits_of(model, inputs), np.float64)
    log_sums = np.log(np.exp(logits).sum(axis=-1))
    picked = np.take_along_axis(logits, np.asarray(targets)[..., None], axis=-1)
    expected = (log_sums - picked[..., 0])[np.asarray(mask)].sum()
    expected_square = (log_sums**2)[np.asarray(mask)].sum()

    # Masked targets must not matter, not even invalid ids.
    targets = jnp.where(mask, targets, -100)
    sums = nnx.jit(llama.token_loss)(model, inputs, targets, mask)
    assert sums.loss == pytest.approx(expected, rel=1e-5)
    assert sums.squared_log_z == pytest.approx(expected_square, rel=1e-5)
    assert sums.count == np.asarray(mask).sum()
    assert sums.loss.dtype == sums.squared_log_z.dtype == jnp.float32
    assert sums.count.dtype == jnp.int32


@pytest.mark.parametrize("positions_at_once", [2, 7])
def test_gradient_of_the_squared_log_z_equals_the_formula(positions_at_once):
    model = make_model()
    tokens = make_tokens((2, 8))
    mask = jnp.arange(7) < jnp.array([[7], [4]])

    def squared_log_z(model):
        limit = positions_at_once * 2 * CONFIG.vocabulary_size
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        return llama.token_loss(
            model, inputs, targets, mask, logits_at_once=limit
        ).squared_log_z

    gradient = nnx.jit(nnx.grad(squared_log_z))(model)["head"]["kernel"][...]
    hidden = np.asarray(model.hidden_states(tokens[:, :-1]), np.float64)
    powers = np.exp(hidden @ np.asarray(model.head.kernel, np.float64))
    z = powers.sum(axis=-1, keepdims=True)
    # d log(z)^2 / d logits = 2 log(z) softmax(logits)
    slope = 2 * np.log(z) * powers / z * np.asarray(mask)[..., None]
    expected = np.einsum("blh,blv->hv", hidden, slope)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions_at_once", [0, 3, 7])
def test_loss_in_stretches_equals_the_plain_one(positions_at_once):
    model = make_model()
    tokens = make_tokens((2, 8))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    mask = jnp.arange(7) < jnp.array([[7], [5]])

    def loss(model, logits_at_once):
        sums = llama.token_loss(
            model, inputs, targets, mask, logits_at_once=logits_at_once
        )
        return sums.loss, sums

    grad = nnx.jit(nnx.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, plain), plain_gradients = grad(model, 2**26)
    limit = positions_at_once * 2 * CONFIG.vocabulary_size
    (_, stretched), gradients = grad(model, limit)
    assert plain.count == stretched.count == 12
    np.testing.assert_allclose(stretched, plain, rtol=1e-6)
    chex.assert_trees_all_close(
        jax.tree.leaves(gradients),
        jax.tree.leaves(plain_gradients),
        rtol=1e-4,
        atol=1e-5,
    )


def test_loss_in_stretches_never_holds_the_logits_of_the_batch():
    tokens = make_tokens((2, 9))

    def loss(params, logits_at_once):
        definition = nnx.graphdef(make_model())
        model = nnx.merge(definition, params)
        return llama.token_loss(
            model, tokens[:, :-1], tokens[:, 1:], logits_at_once=logits_at_once
        )[0]

    params = parameters(make_model())

    def most_logits(limit):
        jaxpr = str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(params, limit))
        # Logits have three or more axes; the head's gradient has two.
        found = re.findall(r"f32\[((?:\d+,){2,})61\]", jaxpr)
        return max(math.prod(map(int, shape[:-1].split(","))) for shape in found)

    assert most_logits(2**26) == 2 * 8
    # Nor do all chunks together, as residuals of the scan would.
    assert most_logits(2 * 2 * CONFIG.vocabulary_size) == 2 * 2
