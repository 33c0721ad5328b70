"""Small models and tokens for several test modules."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from models import llama

CONFIG = llama.LlamaConfig(
    vocabulary_size=61,
    hidden_size=32,
    mlp_size=48,
    num_layers=3,
    num_heads=4,
    num_key_value_heads=2,
    rotary_base=100.0,
    norm_epsilon=1e-2,
    # Large enough for every part of the model to affect the logits.
    init_std=0.2,
)


@functools.cache
def make_model(**changes):
    """Shared model: do not change it."""
    config = dataclasses.replace(CONFIG, **changes)
    return nnx.jit(lambda: llama.Llama(config, rngs=nnx.Rngs(0)))()


@nnx.jit
def logits_of(model, tokens):
    return model(tokens)


def make_tokens(shape, seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 0, CONFIG.vocabulary_size)


def parameters(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


# Models that transformers supports, too.
HUGGING_FACE_CONFIG = llama.LlamaConfig(
    vocabulary_size=61,
    hidden_size=32,
    mlp_size=48,
    num_layers=2,
    num_heads=4,
    num_key_value_heads=2,
    rotary_base=100.0,
    max_length_tokens=2048,
    norm_epsilon=1e-2,
)
_SCALED = {
    "rotary_scaling_factor": 8.0,
    "rotary_original_length_tokens": 24,
    "rotary_high_frequency_factor": 3.0,
}
HUGGING_FACE_CASES = {
    "plain": {"num_key_value_heads": None},
    "grouped": {},
    "scaled": _SCALED,
    "tied": {"tie_embeddings": True},
    "wide heads": {"head_dim": 12},
}


def make_params(config, seed=0):
    """Random parameters like a trained model's: no norm scale is one."""
    model = nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0)))
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return generator.normal(mean, 0.2, leaf.shape).astype(leaf.dtype)

    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return jax.tree_util.tree_map_with_path(draw, shapes)
