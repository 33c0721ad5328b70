"""Configuration of the optimizer: method, schedule, settings."""

import ast
import dataclasses
import importlib.util
import pathlib
from typing import Any, Literal, NamedTuple

from train.config.rules import (
    above_0_to_1,
    at_least_1,
    check,
    from_0_below_1,
    from_0_to_1,
    not_negative,
    positive,
    positive_or_inf,
    quarter_turn,
    steps_of_32_bits,
)


def _library_methods() -> list[str]:
    """Names of the low-rank methods in subtrack_jax, parsed without importing JAX.

    Importing JAX would slow down `--help` by seconds.
    """
    spec = importlib.util.find_spec("subtrack_jax")
    assert spec is not None and spec.origin is not None
    files = sorted((pathlib.Path(spec.origin).parent / "optimizers").glob("*.py"))
    return [
        node.name.replace("_", "-")
        for file in files
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and any("low_rank_method" in ast.unparse(x) for x in node.decorator_list)
    ]


OptimizerName = Literal["adamw", *_library_methods(), "static", "muon", "adafactor"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]

# Defaults of a schedule's parts, as fractions of the run.
WARMUP_FRACTION = 0.1
DECAY_FRACTION = 0.2


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer: method and settings.

    A setting that is None has the method's own default, from the function of the same
    name in subtrack_jax (for adamw, muon and adafactor: from optax's Adam).

    Attributes:
      name: the method; subtrack is SubTrack++, subtrack-grad SubTrack of 2024, static
        SubTrack++ with constant subspaces. ldadam and online-subspace-descent ignore
        the update interval and change subspaces every step; apollo-mini has rank 1.
      learning_rate: peak learning rate.
      schedule: learning rate after the warm-up. cosine and linear decay until the last
        step; constant stays at the peak; wsd (warm-up, stable, decay) stays at the
        peak and decays linearly in the last part of the run.
      warmup_steps: optimizer steps over which the learning rate rises to its peak.
      warmup_fraction: the same as a fraction of all steps. None: 0.1, unless
        --warmup-steps is given.
      decay_fraction: fraction of the steps over which wsd decays. None: 0.2.
      final_learning_rate_fraction: final learning rate as a fraction of the peak (not
        for constant).
      rank: dimensions of each matrix's subspace. A matrix whose smaller side is no
        larger than this gets plain Adam. None: 128.
      update_interval: optimizer steps between two changes of the subspaces. None: 200.
      scale: factor of the update inside the subspace (alpha in the papers); apollo and
        apollo-mini multiply their full update by its square root. None: 0.25; ldadam
        and apollo: 1; apollo-mini: 128.
      matrix_learning_rate_scale: factor of the learning rate of attention and MLP
        matrices, for any method, like scale for low-rank methods.
      transport: rotate the moments to the new subspace (low-rank methods). None: the
        method's default.
      recovery: scale the part of the gradient outside the subspace and add it to the
        update (low-rank methods). None: the method's default.
      growth_limit: maximum growth of the norm of the update outside the subspace, or of
        apollo's update, per step; inf: no limit. None: 1.01.
      step_size: fixed step of the subspace along its geodesic (subtrack,
        subtrack-grad). None: exact line search.
      damping: factor of the line search's angle, up to 1 (subtrack, subtrack-grad).
        None: 1.
      angle: largest angle between successive subspaces, in radians (grass-walk). None:
        0.1.
      align: alignment of new singular vectors with the old ones, for moments that are
        kept (galore, fira): none; sign: flip signs; procrustes: rotate to the closest
        basis.
      random_after_fraction: fraction of the steps after which new subspaces are random
        (golore).
      rho: weight of the momentum, against the gradient, in the power iteration
        (ldadam). None: 0.908.
      error_feedback: add the part of the gradient that a step misses to the next one
        (ldadam); needs a buffer of the size of the matrices.
      projection_learning_rate: learning rate of the projection
        (online-subspace-descent). None: 0.005.
      mu_dtype: dtype of the first moment (low-rank methods). None: float32; int8 is an
        older name of --moments-dtype int8.
      moments_dtype: int8: both moments in eight bits, with a scale per block (low-rank
        methods). None: float32, or --mu-dtype.
      b1: decay of Adam's first moment. None: 0.9; ldadam: 0.908.
      b2: decay of Adam's second moment. None: 0.999; ldadam: 0.99.
      eps: added to the denominator of Adam. None: 1e-8.
      weight_decay: decoupled weight decay of all parameters except norms.
      max_gradient_norm: clips gradients to this global norm. inf: no clipping.
    """

    name: OptimizerName = "subtrack"
    learning_rate: float = 1e-3
    schedule: Schedule = "cosine"
    warmup_steps: int | None = None
    warmup_fraction: float | None = None
    decay_fraction: float | None = None
    final_learning_rate_fraction: float = 0.1
    rank: int | None = None
    update_interval: int | None = None
    scale: float | None = None
    matrix_learning_rate_scale: float = 1.0
    transport: bool | None = None
    recovery: bool | None = None
    growth_limit: float | None = None
    step_size: float | None = None
    damping: float | None = None
    angle: float | None = None
    align: Literal["none", "sign", "procrustes"] = "none"
    random_after_fraction: float = 0.5
    rho: float | None = None
    error_feedback: bool = True
    projection_learning_rate: float | None = None
    mu_dtype: Literal["bfloat16", "int8"] | None = None
    moments_dtype: Literal["int8"] | None = None
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0

    def __post_init__(self):
        check(self, positive, "learning_rate", "scale", "eps")
        check(self, positive_or_inf, "max_gradient_norm")
        check(self, positive, "matrix_learning_rate_scale", "step_size")
        check(self, above_0_to_1, "damping", "decay_fraction")
        check(self, quarter_turn, "angle")
        check(self, at_least_1, "rank", "growth_limit")
        check(self, steps_of_32_bits, "update_interval")
        check(self, from_0_below_1, "b1", "b2", "rho")
        check(self, not_negative, "projection_learning_rate", "warmup_steps")
        check(self, from_0_to_1, "warmup_fraction", "final_learning_rate_fraction")
        check(self, from_0_to_1, "random_after_fraction")
        check(self, not_negative, "weight_decay")
        if self.warmup_steps is not None and self.warmup_fraction is not None:
            raise ValueError(
                f"--warmup-steps {self.warmup_steps} and --warmup-fraction "
                f"{self.warmup_fraction} exclude each other: give one of them"
            )
        if self.mu_dtype == "bfloat16" and self.moments_dtype is not None:
            raise ValueError(
                f"--mu-dtype {self.mu_dtype} and --moments-dtype {self.moments_dtype} "
                "exclude each other: give one of them"
            )
        if self.decay_fraction is not None and self.schedule != "wsd":
            raise ValueError(
                f"--decay-fraction {self.decay_fraction} is a setting of --schedule "
                f"wsd, not of {self.schedule}"
            )


class Phases(NamedTuple):
    """Optimizer steps of a schedule's three parts."""

    warmup: int
    stable: int
    decay: int


def schedule_phases(config: OptimizerConfig, steps: int) -> Phases:
    """Computes the steps of a schedule's parts in a run.

    Raises:
      ValueError: the parts are longer than the run.
    """
    warmup = config.warmup_steps
    if warmup is None:
        fraction = config.warmup_fraction
        warmup = round((WARMUP_FRACTION if fraction is None else fraction) * steps)
    elif warmup > steps:
        raise ValueError(f"--warmup-steps {warmup} is more than --steps {steps}")
    if config.schedule == "constant":
        return Phases(warmup, steps - warmup, 0)
    if config.schedule != "wsd":
        return Phases(warmup, 0, steps - warmup)
    fraction = config.decay_fraction
    decay = round((DECAY_FRACTION if fraction is None else fraction) * steps)
    if warmup + decay > steps:
        raise ValueError(
            f"--schedule wsd: {warmup} steps of warm-up and {decay} of decay are more "
            f"than --steps {steps}: lower --warmup-steps, --warmup-fraction or "
            "--decay-fraction"
        )
    return Phases(warmup, steps - warmup - decay, decay)


# Fields added after settings were saved, with their former values.
_BEFORE_SCHEDULES = {
    "schedule": "cosine",
    "warmup_steps": None,
    "decay_fraction": None,
    "moments_dtype": None,
}


def migrated(settings: Any) -> Any:
    """Converts saved settings of earlier versions.

    Before `schedule` existed, apollo's scale was the factor of its update, for
    apollo-mini times sqrt(128); now it is alpha, and the factor is its square root.
    """
    if not isinstance(settings, dict) or "schedule" in settings:
        return settings
    settings = settings | _BEFORE_SCHEDULES
    unit = {"apollo": 1, "apollo-mini": 128}.get(str(settings.get("name")))
    scale = settings.get("scale")
    if unit is not None and isinstance(scale, int | float):
        settings["scale"] = unit * scale**2
    return settings
