"""The optimizer of a run: the method and its settings."""

import dataclasses
from typing import Annotated, Literal

import tyro

from train.rules import (
    above_0_to_1,
    at_least_1,
    check,
    from_0_below_1,
    from_0_to_1,
    not_negative,
    positive,
    quarter_turn,
)

OptimizerName = Literal[
    "adamw",
    "subtrack",
    "grass-walk",
    "grass-jump",
    "galore",
    "subtrack-grad",
    "fira",
    "golore",
    "ldadam",
    "online-subspace-descent",
    "apollo",
    "apollo-mini",
    "static",
    "muon",
    "adafactor",
]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer's method and settings.

    Attributes:
      name: the method; subtrack is SubTrack++, subtrack-grad its form of 2024, static
        SubTrack++ with subspaces that stay where they start. ldadam and
        online-subspace-descent move theirs on every step; apollo-mini has rank 1, and
        its scale counts as many times as the paper's, the root of 128.
      learning_rate: peak learning rate.
      warmup_fraction: part of the steps over which the learning rate rises to its
        peak.
      final_learning_rate_fraction: where the cosine decay ends, as a fraction of the
        peak.
      rank: dimensions of each matrix's subspace. A matrix whose smaller side is no
        larger than this gets plain Adam.
      update_interval: optimizer steps between two changes of the subspaces.
      scale: factor on the update inside the subspace (the papers' alpha; ldadam's is
        1). apollo has no inside: of its whole update.
      matrix_learning_rate_scale: factor on the learning rate of attention and MLP
        matrices, for any method: the freedom that scale gives the low-rank ones.
      transport: whether the moments turn with the subspace (low-rank methods). None:
        as the method has it.
      recovery: whether what the subspace misses is scaled and added back (low-rank
        methods). None: as the method has it.
      growth_limit: most by which the norm of the update outside the subspace, or of
        apollo's update, may grow from one step to the next; inf: no limit.
      step_size: fixed step of the subspace along its geodesic (subtrack,
        subtrack-grad). None: exact line search.
      damping: factor on the angle of that line search, up to 1.
      angle: largest angle between two subspaces, in radians (grass-walk).
      align: what is done for moments that are kept while new singular vectors have
        other signs (galore, fira): none; sign flips the vectors; procrustes turns
        them as near the old ones as they can be.
      random_after_fraction: part of the steps after which new subspaces are random
        (golore).
      rho: weight of the momentum, against the gradient, in what moves the subspace
        (ldadam).
      error_feedback: whether what a step misses is added to the next gradient
        (ldadam), for a buffer of the size of the matrices.
      projection_learning_rate: of Adam, which learns the projection
        (online-subspace-descent).
      mu_dtype: how moments are stored (low-rank methods): bfloat16 for the first,
        int8 for both in eight bits, block by block. None: float32.
      b1: decay of Adam's first moment (ldadam's paper: 0.908).
      b2: decay of Adam's second moment (ldadam's paper: 0.99).
      eps: added to the denominator of Adam.
      weight_decay: decoupled weight decay, of all parameters but the norms.
      max_gradient_norm: gradients are scaled down to this global norm.
    """

    name: Annotated[OptimizerName, tyro.conf.arg(name="optimizer")] = "subtrack"
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.1
    final_learning_rate_fraction: float = 0.1
    rank: int = 128
    update_interval: int = 200
    scale: float = 0.25
    matrix_learning_rate_scale: float = 1.0
    transport: bool | None = None
    recovery: bool | None = None
    growth_limit: float = 1.01
    step_size: float | None = None
    damping: float = 1.0
    angle: float = 0.1
    align: Literal["none", "sign", "procrustes"] = "none"
    random_after_fraction: float = 0.5
    rho: float = 0.908
    error_feedback: bool = True
    projection_learning_rate: float = 5e-3
    mu_dtype: Literal["bfloat16", "int8"] | None = None
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0

    def __post_init__(self):
        check(self, positive, "learning_rate", "scale", "eps", "max_gradient_norm")
        check(self, positive, "matrix_learning_rate_scale")
        check(self, above_0_to_1, "damping")
        check(self, quarter_turn, "angle")
        check(self, at_least_1, "rank", "update_interval", "growth_limit")
        check(self, from_0_below_1, "b1", "b2", "rho")
        check(self, not_negative, "projection_learning_rate")
        check(self, from_0_to_1, "warmup_fraction", "final_learning_rate_fraction")
        check(self, from_0_to_1, "random_after_fraction")
        check(self, not_negative, "weight_decay")
        if self.step_size is not None:
            check(self, positive, "step_size")
