"""Small encoders for several test modules."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from models import encoder, encoder_weights
from tests.common import DATA
from tests.data.make_encoders import pairs

ENCODERS = DATA / "encoders"
RECORDED = np.load(ENCODERS / "logits.npz")


def load(name, **changes):
    """A recorded encoder: config and parameters."""
    stored = encoder_weights.load_config(ENCODERS / name)
    # The weights as they are, in another module of the same parameters.
    params = encoder_weights.load(ENCODERS / name, stored, jax.random.key(0)).params
    return dataclasses.replace(stored, **changes), params


def inputs(config):
    """Recorded pairs: tokens, token types, lengths; two rows of two candidates."""
    tokens, types, lengths = pairs(config.padding_id)
    if config.head == "choice":
        tokens = tokens.reshape(2, 2, -1)
        types, lengths = types.reshape(tokens.shape), lengths.reshape(2, 2)
    return tokens, types, lengths


@nnx.jit
def _logits(model, tokens, types, lengths, key):
    return model.logits(tokens, types, lengths, key)


def logits_of(config, params, tokens, types=None, lengths=None, key=None):
    model = nnx.merge(encoder.definition(config), params)
    return np.asarray(_logits(model, tokens, types, lengths, key))
