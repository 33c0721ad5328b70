"""Configuration that programs of fine-tuning share: a length in epochs."""

import dataclasses

from train.config.optimizer_config import OptimizerConfig
from train.config.rules import check, not_negative, positive
from train.config.run_config import CheckpointConfig, RunConfig

OPTIMIZER = OptimizerConfig(
    learning_rate=1e-4,
    schedule="linear",
    warmup_fraction=0.06,
    final_learning_rate_fraction=0.0,
    rank=8,
    update_interval=500,
    scale=4.0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    max_gradient_norm=float("inf"),
)
CHECKPOINT = CheckpointConfig(checkpoint_every_steps=500)


@dataclasses.dataclass(frozen=True)
class EpochsConfig(RunConfig):
    """Run whose length and evaluations are given in epochs or in steps.

    Attributes:
      epochs: passes over the training rows.
      steps: optimizer steps, instead of epochs.
      eval_every_epochs: passes over the training rows between two evaluations; the
        last step is also evaluated.
      eval_every_steps: the same in optimizer steps, instead of epochs.
    """

    epochs: float = 3.0
    steps: int | None = None
    eval_every_epochs: float = 1.0
    eval_every_steps: int | None = None
    optimizer: OptimizerConfig = OPTIMIZER
    checkpoint: CheckpointConfig = CHECKPOINT

    def __post_init__(self):
        if self.steps == 0 or (self.steps is None and self.epochs == 0):
            raise ValueError(
                f"--epochs {self.epochs:g} and --steps {self.steps}: there is nothing "
                "to train; give one of them"
            )
        super().__post_init__()
        check(self, not_negative, "epochs")
        check(self, positive, "eval_every_epochs")
