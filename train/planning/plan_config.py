"""Configuration of `train.plan`."""

import dataclasses
import pathlib
import typing

from models.config import LlamaConfig
from train.config.optimizer_config import OptimizerConfig, OptimizerName
from train.config.pretrain_config import PresetName
from train.config.rules import at_least_1, check, check_name, positive
from train.config.run_config import Switch


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Compiles a training step for devices that are not present.

    Prints memory per device (parameters, optimizer state, gradients, temporaries) and
    the collectives of a step. Nothing is run or allocated. The values below are those
    of the chosen preset.

    Attributes:
      model: the model's shape and arithmetic.
      preset: defaults of all other values, as for train.pretrain.
      target: devices to compile for. Chip and shape of a slice, such as tpu-v5e:4x4,
        tpu-v5p:4x4x4, tpu-v6e:8x8 or tpu-v4:2x2x2 (pip install -e '.[tpu-plan]'); one
        chip, such as tpu-v6e:1; or virtual CPU devices, such as cpu:64.
      compare: further optimizers, separated by commas: adamw,galore.
      mesh: devices along data, fsdp and tensor, e.g. fsdp=4,tensor=2; -1: all
        remaining devices.
      sequence_length_tokens: tokens per sequence.
      batch_size_sequences: sequences per optimizer step on all devices together.
        None: the preset's, rounded up to a multiple that devices can share.
      gradient_accumulation_steps: parts of a batch that are computed sequentially.
      update_in_backward: add a column for each optimizer, with updates of each layer in
        the backward pass. Needs --remat full.
      z_loss_weight: weight of the squared log-partition added to the loss.
      device_memory_gib: memory of one device. None: the chip's; unknown for cpu.
      json: file to write the numbers to.
      optimizer: the method and its settings.
    """

    model: LlamaConfig
    preset: PresetName = "tiny"
    target: str = "cpu:8"
    compare: str | None = None
    mesh: str = "fsdp=-1"
    sequence_length_tokens: int = 128
    batch_size_sequences: int | None = None
    gradient_accumulation_steps: int = 1
    update_in_backward: Switch = False
    z_loss_weight: float = 0.0
    device_memory_gib: float | None = None
    json: pathlib.Path | None = None
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def __post_init__(self):
        check(self, at_least_1, "sequence_length_tokens", "gradient_accumulation_steps")
        if self.batch_size_sequences is not None:
            check(self, at_least_1, "batch_size_sequences")
        if self.device_memory_gib is not None:
            check(self, positive, "device_memory_gib")
        known = typing.get_args(OptimizerName)
        for name in self.optimizer_names:
            check_name(f"--compare {self.compare!r}", name, known)

    @property
    def optimizer_names(self) -> list[str]:
        """Names of all optimizers: the run's own, then those of --compare."""
        others = self.compare.split(",") if self.compare else []
        return list(dict.fromkeys([self.optimizer.name, *map(str.strip, others)]))
