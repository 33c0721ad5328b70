"""Programs to time: an optimizer's update, or a training step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from models import llama
from subtrack_jax.optimizers import FAMILY, Method
from train.config.methods import fixed
from train.config.pretrain_config import PretrainConfig
from train.step.language_model import abstract_batch
from train.step.setup import llama_setup
from train.timing.benchmark_config import Layout

Optimizer = optax.GradientTransformation


def _ours(method: Method) -> Callable[[int, int], Optimizer]:
    def make(rank: int, interval: int) -> Optimizer:
        settings = {"rank": rank, "update_interval": interval}
        chosen = {
            name: settings[name] for name in settings if name not in fixed(method)
        }
        return method.optimizer(1e-3, dimension_numbers=llama.matrix_axes, **chosen)

    return make


def _galore(rank: int, interval: int) -> Optimizer:
    def axes(params):
        own = optax.contrib.GaLoreDimensionNumbers
        return jax.tree.map(
            lambda spec: spec and own(spec.reduction_axis, spec.output_axis),
            llama.matrix_axes(params),
            is_leaf=lambda x: x is None or isinstance(x, tuple),
        )

    return optax.contrib.galore(1e-3, rank, interval, weight_dimension_numbers=axes)


# Optimizers from rank and update interval, without clipping and weight decay.
METHODS: dict[str, Callable[[int, int], Optimizer]] = {
    "adamw": lambda rank, interval: optax.adamw(1e-3, weight_decay=0.0),
    "adafactor": lambda rank, interval: optax.adafactor(1e-3),
    "optax-galore": _galore,
    "optax-muon": lambda rank, interval: optax.contrib.muon(
        1e-3, muon_weight_dimension_numbers=llama.matrix_axes
    ),
    **{name.replace("_", "-"): _ours(method) for name, method in FAMILY.items()},
}


class Subject(NamedTuple):
    """Program to compile and run repeatedly.

    Attributes:
      step: (carry, extra) -> carry; the carry is donated.
      make_carry: () -> carry, parameters and optimizer state.
      make_extra: () -> extra, gradients or a batch, equal for all steps.
    """

    step: Callable[[Any, Any], Any]
    make_carry: Callable[[], Any]
    make_extra: Callable[[], Any]


def update_subject(optimizer: Optimizer, shapes: Any) -> Subject:
    """Program of an optimizer's update and its application, without a model."""

    def step(carry, gradients):
        params, opt_state = carry
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def make_carry():
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return params, optimizer.init(params)

    return Subject(step, make_carry, functools.partial(gradients_of, shapes))


def training_subject(optimizer: Optimizer, run: PretrainConfig) -> Subject:
    """Program of a training step, on one batch of random tokens."""
    setup = llama_setup(run.model, optimizer, lambda count: 1e-3)

    def make_extra():
        shape = abstract_batch(run.data)["inputs"].shape
        tokens = jax.random.randint(
            jax.random.key(1), shape, 0, run.model.vocabulary_size
        )
        mask = jnp.ones(shape, bool)
        return {"inputs": tokens, "targets": jnp.roll(tokens, -1, 1), "mask": mask}

    return Subject(
        lambda state, batch: setup.train_step(state, batch)[0],
        lambda: setup.create_state(jax.random.key(0)),
        make_extra,
    )


def parameter_shapes(model: llama.LlamaConfig, layout: Layout) -> Any:
    """Shapes of a LLaMA's parameters.

    Args:
      model: the model's shape.
      layout: "stacked": kernels of all layers in one array, as in our model;
        "unstacked": one array per layer, as in models without a scan.
    """
    shapes = llama.abstract_params(model)
    if layout == "unstacked":
        one = jax.tree.map(lambda x: x.update(shape=x.shape[1:]), shapes["layers"])
        shapes["layers"] = {str(layer): one for layer in range(model.num_layers)}
    return shapes


def gradients_of(shapes: Any) -> Any:
    """Synthetic gradients: a few strong directions, and noise."""

    def gradient(k, leaf):
        keys = jax.random.split(jax.random.key(k), 3)
        noise = jax.random.normal(keys[0], leaf.shape)
        if leaf.ndim > 1:
            *batch, m, n = leaf.shape
            rows = jax.random.normal(keys[1], (*batch, m, 8)) * 0.7 ** jnp.arange(8)
            noise += rows @ jax.random.normal(keys[2], (*batch, 8, n))
        return (1e-3 * noise).astype(leaf.dtype)

    leaves, structure = jax.tree.flatten(shapes)
    return structure.unflatten([gradient(k, leaf) for k, leaf in enumerate(leaves)])
