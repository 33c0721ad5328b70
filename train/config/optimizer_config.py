"""The optimizer of a run: the method and its settings."""

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
    quarter_turn,
    steps_of_32_bits,
)


def _library_methods() -> list[str]:
    """Methods under `low_rank_method` in subtrack_jax, found without importing JAX.

    An import of JAX would take the seconds of a `--help`.
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

# Parts of a run that a schedule takes unless the config says otherwise.
WARMUP_FRACTION = 0.1
DECAY_FRACTION = 0.2


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer's method and settings.

    A setting that is None has the method's own default, which is that of the function
    of the same name in subtrack_jax (for adamw, muon and adafactor: of optax' Adam).

    Attributes:
      name: the method; subtrack is SubTrack++, subtrack-grad its form of 2024, static
        SubTrack++ with subspaces that stay where they start. ldadam and
        online-subspace-descent move theirs on every step, whatever the update
        interval; apollo-mini has rank 1, whatever the rank.
      learning_rate: peak learning rate.
      schedule: how the learning rate goes on after the warm-up. cosine and linear
        fall until the last step; constant stays at the peak; wsd (warm-up, stable,
        decay) stays at it and falls linearly in the last part of the run.
      warmup_steps: optimizer steps over which the learning rate rises to its peak.
      warmup_fraction: the same as a part of all steps. None: 0.1, unless
        --warmup-steps is given.
      decay_fraction: part of the steps over which wsd falls. None: 0.2.
      final_learning_rate_fraction: where the learning rate ends, as a fraction of the
        peak (not of constant).
      rank: dimensions of each matrix's subspace. A matrix whose smaller side is no
        larger than this gets plain Adam. None: 128.
      update_interval: optimizer steps between two changes of the subspaces. None: 200.
      scale: factor on the update inside of the subspace (the papers' alpha); apollo and
        apollo-mini multiply their whole update by its root. None: 0.25, of ldadam and
        apollo 1, of apollo-mini 128.
      matrix_learning_rate_scale: factor on the learning rate of attention and MLP
        matrices, for any method: the freedom that scale gives the low-rank ones.
      transport: whether the moments turn with the subspace (low-rank methods). None:
        as the method has it.
      recovery: whether what the subspace misses is scaled and added back (low-rank
        methods). None: as the method has it.
      growth_limit: most by which the norm of the update outside the subspace, or of
        apollo's update, may grow from one step to the next; inf: no limit. None: 1.01.
      step_size: fixed step of the subspace along its geodesic (subtrack,
        subtrack-grad). None: exact line search.
      damping: factor on the angle of that line search, up to 1 (subtrack,
        subtrack-grad). None: 1.
      angle: largest angle between two subspaces, in radians (grass-walk). None: 0.1.
      align: what is done for moments that are kept while new singular vectors have
        other signs (galore, fira): none; sign flips the vectors; procrustes turns
        them as near the old ones as they can be.
      random_after_fraction: part of the steps after which new subspaces are random
        (golore).
      rho: weight of the momentum, against the gradient, in what moves the subspace
        (ldadam). None: 0.908.
      error_feedback: whether what a step misses is added to the next gradient
        (ldadam), for a buffer of the size of the matrices.
      projection_learning_rate: of Adam, which learns the projection
        (online-subspace-descent). None: 0.005.
      mu_dtype: how the first moment is stored (low-rank methods). None: float32; int8
        is an older name of --moments-dtype int8.
      moments_dtype: int8 stores both moments in eight bits, block by block (low-rank
        methods). None: as --mu-dtype says.
      b1: decay of Adam's first moment. None: 0.9, of ldadam 0.908.
      b2: decay of Adam's second moment. None: 0.999, of ldadam 0.99.
      eps: added to the denominator of Adam. None: 1e-8.
      weight_decay: decoupled weight decay, of all parameters but the norms.
      max_gradient_norm: gradients are scaled down to this global norm.
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
        check(self, positive, "learning_rate", "scale", "eps", "max_gradient_norm")
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
    """Optimizer steps of the three parts of a schedule, which make up the run."""

    warmup: int
    stable: int
    decay: int


def schedule_phases(config: OptimizerConfig, steps: int) -> Phases:
    """Steps of warm-up, constant and falling learning rate in a run.

    Raises:
      ValueError: warm-up, or warm-up and decay, take more steps than there are.
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


# Fields that are newer than some saved settings, and what went for them before.
_BEFORE_SCHEDULES = {
    "schedule": "cosine",
    "warmup_steps": None,
    "decay_fraction": None,
    "moments_dtype": None,
}


def migrated(settings: Any) -> Any:
    """Saved settings in today's terms.

    Before there was a schedule, apollo's scale was the factor on its update, and that
    of apollo-mini counted times the root of 128: now both are alpha, under a root.
    """
    if not isinstance(settings, dict) or "schedule" in settings:
        return settings
    settings = settings | _BEFORE_SCHEDULES
    unit = {"apollo": 1, "apollo-mini": 128}.get(str(settings.get("name")))
    scale = settings.get("scale")
    if unit is not None and isinstance(scale, int | float):
        settings["scale"] = unit * scale**2
    return settings
