"""Encoders in the programs: meshes, weight decay."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from models import encoder
from tests.models.encoders import inputs, load
from train.step import mesh, optimizers, placement


@functools.partial(jax.jit, static_argnames="config")
@jax.value_and_grad
def loss(params, batch, config):
    model = nnx.merge(encoder.definition(config), params)
    return jnp.mean(model.logits(*batch, jax.random.key(0)) ** 2)


def test_gradients_on_eight_devices_equal_those_on_one():
    """Also with recomputed activations, dropout, and rows without tokens."""
    config, params = load("mpnet")
    tokens, types, lengths = (np.repeat(x, 2, axis=0) for x in inputs(config))
    batch = tokens, types, np.where(lengths == 1, 0, lengths)
    want, want_gradient = jax.device_get(loss(params, batch, config))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(want_gradient))
    config = dataclasses.replace(config, remat="full")
    made = mesh.make_mesh("fsdp=4,tensor=2")
    with jax.set_mesh(made), placement.rules():
        make = functools.partial(encoder.Encoder, config)
        shardings = placement.param_shardings(make, made)
        up = shardings["layers"]["mlp"]["up"]
        assert up["kernel"].spec == P(None, "fsdp", "tensor")
        assert up["bias"].spec == P(None, "tensor")
        placed = jax.device_put(params, shardings)
        got, gradient = loss(placed, placement.place_batch(batch, made), config)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    error = optax.tree.norm(optax.tree.sub(jax.device_get(gradient), want_gradient))
    assert error < 1e-5 * optax.tree.norm(want_gradient)


def test_norms_and_biases_do_not_decay():
    _, params = load("mpnet")
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, is_decayed in jax.tree.leaves_with_path(
            optimizers._is_decayed(params)
        )
        if is_decayed
    }
    assert decayed == {
        "embedding/word/embedding",
        "embedding/position/embedding",
        "head/dense/kernel",
        "head/output/kernel",
        "layers/mlp/up/kernel",
        "layers/mlp/down/kernel",
        *(f"layers/attention/{x}/kernel" for x in ("query", "key", "value", "output")),
    }
