"""Encoders in the programs: meshes, weight decay."""

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


def test_gradients_on_eight_devices_equal_those_on_one():
    """Also with dropout, whose masks do not depend on the mesh."""
    config, params = load("mpnet")
    batch = [np.repeat(x, 2, axis=0) for x in inputs(config)]

    @jax.jit
    @jax.value_and_grad
    def loss(params, tokens, types, lengths):
        model = nnx.merge(encoder.definition(config), params)
        logits = model.logits(tokens, types, lengths, jax.random.key(0))
        return jnp.mean(logits**2)

    want, want_gradient = loss(params, *batch)
    made = mesh.make_mesh("fsdp=4,tensor=2")
    with jax.set_mesh(made), placement.rules():
        make = functools.partial(encoder.Encoder, config)
        shardings = placement.param_shardings(make, made)
        up = shardings["layers"]["mlp"]["up"]
        assert up["kernel"].spec == P(None, "fsdp", "tensor")
        assert up["bias"].spec == P(None, "tensor")
        placed = jax.device_put(params, shardings)
        got, gradient = loss(placed, *placement.place_batch(batch, made))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    error = optax.tree.norm(optax.tree.sub(gradient, jax.device_get(want_gradient)))
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
