"""The optimizers by the names that `--optimizer` takes."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import subtrack_jax as stj
from models import llama
from train.optimizer_config import OptimizerConfig

# Muon's updates get the size of Adam's (arXiv 2502.16982), so that the same learning
# rates suit both.
MUON_RMS = 0.2


class _LowRank(NamedTuple):
    """What a low-rank method is made of, besides Adam."""

    tracker: Callable[[OptimizerConfig, int], stj.Tracker]  # given the steps of a run
    transport: bool | Literal["momentum"]  # which moments turn with the basis
    recovery: bool  # whether what the subspace misses is added back
    settings: tuple[str, ...]  # those of the tracker
    feeds_back: bool = False  # whether the tracker looks at the momentum
    moves_always: bool = False  # on every step, whatever the update interval


def _geodesic(config: OptimizerConfig, _: int) -> stj.Tracker:
    return stj.geodesic(config.step_size, config.damping)


def _static(config: OptimizerConfig, steps: int) -> stj.Tracker:
    return _geodesic(config, steps)._replace(
        move=lambda key, gradient, basis: (basis, None)
    )


def _svd(config: OptimizerConfig, _: int) -> stj.Tracker:
    return stj.svd("randomized", config.align)


def _svd_then_random(config: OptimizerConfig, steps: int) -> stj.Tracker:
    after_steps = round(config.random_after_fraction * steps)
    return stj.switch(stj.svd("randomized"), stj.random_jump(), after_steps)


def _power_iteration(config: OptimizerConfig, _: int) -> stj.Tracker:
    return stj.power_iteration(config.rho, "randomized")


def _online_pca(config: OptimizerConfig, _: int) -> stj.Tracker:
    return stj.online_pca(optax.adam(config.projection_learning_rate), "randomized")


_MOVES = ("update_interval", "transport")
_GEODESIC = (*_MOVES, "step_size", "damping")
_LOW_RANK = {
    "subtrack": _LowRank(_geodesic, True, True, _GEODESIC),
    "subtrack-grad": _LowRank(_geodesic, False, False, _GEODESIC),
    "grass-walk": _LowRank(
        lambda config, _: stj.random_walk(config.angle), True, True, (*_MOVES, "angle")
    ),
    "grass-jump": _LowRank(lambda *_: stj.random_jump(), True, True, _MOVES),
    "galore": _LowRank(_svd, False, False, (*_MOVES, "align")),
    "fira": _LowRank(_svd, False, True, (*_MOVES, "align")),
    "golore": _LowRank(
        _svd_then_random, "momentum", False, (*_MOVES, "random_after_fraction")
    ),
    "static": _LowRank(_static, True, True, ()),
    "ldadam": _LowRank(
        _power_iteration,
        True,
        False,
        ("transport", "rho", "error_feedback"),
        feeds_back=True,
        moves_always=True,
    ),
    "online-subspace-descent": _LowRank(
        _online_pca,
        False,
        False,
        ("transport", "projection_learning_rate"),
        moves_always=True,
    ),
}
_SCALED_GRADIENT: dict[str, Literal["columns", "matrix"]] = {
    "apollo": "columns",
    "apollo-mini": "matrix",
}
# The root of APOLLO-Mini's published alpha, which its update is multiplied by.
APOLLO_MINI_SCALE = 128.0**0.5


def matrix_scale_field(name: str) -> str:
    """The setting that scales a method's updates of matrices against all others."""
    is_low_rank = name in _LOW_RANK or name in _SCALED_GRADIENT
    return "scale" if is_low_rank else "matrix_learning_rate_scale"


def has_subspaces(name: str) -> bool:
    """Whether a method keeps a basis for each matrix."""
    return name in _LOW_RANK


def settings_of(config: OptimizerConfig) -> frozenset[str]:
    """The fields of a config that its method reads, but for its name."""
    settings = {
        *("learning_rate", "warmup_fraction", "final_learning_rate_fraction"),
        *("b1", "b2", "eps", "weight_decay", "max_gradient_norm"),
        "matrix_learning_rate_scale",
    }
    if method := _LOW_RANK.get(config.name):
        settings |= {"rank", "scale", "recovery", "mu_dtype", *method.settings}
        if _given(config.recovery, method.recovery):
            settings.add("growth_limit")
        if config.step_size is not None:
            settings.discard("damping")
    if config.name in _SCALED_GRADIENT:
        settings |= {"scale", "update_interval", "growth_limit", "mu_dtype"}
        if config.name == "apollo":
            settings.add("rank")
    return frozenset(settings)


def canonical(config: OptimizerConfig) -> OptimizerConfig:
    """The config of the same optimizer that all who mean it agree on.

    Settings that its method does not read have their defaults, and those that are as
    the method has them anyway are None.
    """
    read = settings_of(config) | {"name"}
    changed = {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.name not in read
    }
    if method := _LOW_RANK.get(config.name):
        for name in ("transport", "recovery"):
            if getattr(config, name) == getattr(method, name):
                changed[name] = None
    return dataclasses.replace(config, **changed)


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine down to a fraction of it."""
    warmup_steps = round(config.warmup_fraction * steps)
    return optax.warmup_cosine_decay_schedule(
        # The first of the warm-up's steps already moves.
        init_value=config.learning_rate / (warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(steps, warmup_steps + 1),
        end_value=config.learning_rate * config.final_learning_rate_fraction,
    )


def make_optimizer(
    config: OptimizerConfig,
    learning_rate: optax.ScalarOrSchedule,
    seed: jax.typing.ArrayLike,
    matrix_scale: jax.typing.ArrayLike | None = None,
    steps: int = 10_000,
) -> optax.GradientTransformation:
    """The optimizer of a LLaMA, for gradients that are clipped already.

    Args:
      config: the method and its settings.
      learning_rate: replaces the config's peak; a number or a schedule of it.
      seed: for methods that draw random subspaces.
      matrix_scale: replaces the config's `matrix_scale_field`, e.g. by an array that
        is being traced.
      steps: of the whole run, for methods that change on the way.
    """
    rate_scale = config.matrix_learning_rate_scale
    alpha = config.scale if matrix_scale is None else matrix_scale
    if config.name in _LOW_RANK:
        rule = _low_rank(config, seed, alpha, steps)
    elif config.name in _SCALED_GRADIENT:
        rule = _scaled_gradient(config, seed, alpha)
    else:
        rate_scale = rate_scale if matrix_scale is None else matrix_scale
        rule = (_full_rank(config),)
    is_one = isinstance(rate_scale, int | float) and rate_scale == 1
    return optax.chain(
        *rule,
        optax.add_decayed_weights(config.weight_decay, _not_a_norm),
        *(() if is_one else (_scale_matrices(rate_scale),)),
        optax.scale_by_learning_rate(learning_rate),
    )


def _low_rank(
    config: OptimizerConfig,
    seed: jax.typing.ArrayLike,
    scale: jax.typing.ArrayLike,
    steps: int,
) -> tuple[optax.GradientTransformation, ...]:
    method = _LOW_RANK[config.name]
    low_rank = stj.LowRank(config.rank, llama.matrix_axes)
    recovers = _given(config.recovery, method.recovery)
    interval = 1 if method.moves_always else config.update_interval
    stages: tuple[optax.GradientTransformation, ...] = (
        stj.track_subspace(low_rank, method.tracker(config, steps), interval, seed),
        stj.project(low_rank),
        stj.monitor_energy(low_rank),
        stj.scale_by_projection_aware_adam(
            low_rank,
            config.b1,
            config.b2,
            config.eps,
            config.mu_dtype,
            transport=_given(config.transport, method.transport),
        ),
    )
    if method.feeds_back:
        chained = optax.chain(*stages)
        stages = (stj.feed_back(low_rank, chained, config.b1, config.error_feedback),)
    return (
        *stages,
        stj.recover_and_scale(
            low_rank,
            scale,
            "columns" if recovers else "none",
            growth_limit=config.growth_limit,
        ),
    )


def _scaled_gradient(
    config: OptimizerConfig, seed: jax.typing.ArrayLike, scale: jax.typing.ArrayLike
) -> tuple[optax.GradientTransformation, ...]:
    """APOLLO; the scale is the root of the paper's alpha."""
    is_mini = config.name == "apollo-mini"
    low_rank = stj.LowRank(1 if is_mini else config.rank, llama.matrix_axes)
    return (
        stj.draw_projection(low_rank, config.update_interval, seed),
        stj.project(low_rank),
        stj.scale_by_projection_aware_adam(
            low_rank,
            config.b1,
            config.b2,
            config.eps,
            config.mu_dtype,
            transport=False,
        ),
        stj.scale_gradient(
            low_rank,
            jnp.multiply(APOLLO_MINI_SCALE if is_mini else 1.0, scale),
            _SCALED_GRADIENT[config.name],
            config.growth_limit,
        ),
    )


def _full_rank(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam, or another rule for the matrices and Adam for all else."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.name == "adamw":
        return adam
    if config.name == "muon":
        # A rate of -1 leaves the sign, which the end of the chain turns.
        matrices = optax.contrib.muon(
            -1.0,
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=llama.matrix_axes,
        )
    else:
        matrices = optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=2),
            optax.clip_by_block_rms(1.0),
        )
    return optax.partition(
        {True: matrices, False: adam}, lambda params: _is_matrix(params)
    )


def _scale_matrices(
    factor: jax.typing.ArrayLike,
) -> optax.GradientTransformation:
    scale = optax.stateless_with_tree_map(lambda g, _: jnp.asarray(factor, g.dtype) * g)
    return optax.masked(scale, _is_matrix)


def _given(choice: bool | None, otherwise: Any) -> Any:
    return otherwise if choice is None else choice


def _is_matrix(params: Any) -> Any:
    """True for the parameters that low-rank methods and Muon act on."""
    axes = llama.matrix_axes(params)
    return jax.tree.map(lambda _, spec: spec is not None, params, axes)


def _not_a_norm(params: Any) -> Any:
    """True for the parameters that weight decay acts on."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "norm" not in jax.tree_util.keystr(path), params
    )
