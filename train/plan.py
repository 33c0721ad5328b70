"""Plans memory and communication of a run: `python -m train.plan --help`."""

import sys
from collections.abc import Sequence

from train.cli import command_line
from train.cli.command_line import Example
from train.config.presets import PRESETS
from train.config.pretrain_config import PretrainConfig
from train.planning.plan_config import PlanConfig

PROGRAM = "python -m train.plan"
COMMON = (
    *("--preset", "--target", "--mesh", "--optimizer", "--compare", "--rank"),
    *("--sequence-length-tokens", "--batch-size-sequences"),
    *("--device-memory-gib", "--json"),
)
EXAMPLES = (
    Example("the default run, on eight virtual devices", ""),
    Example(
        "7 billion parameters on 64 chips, compared with two other optimizers",
        "--preset llama-7b --target tpu-v5p:4x4x4 --mesh fsdp=64 "
        "--compare adamw,galore",
    ),
)


def read(argv: Sequence[str]) -> PlanConfig:
    """Parses the command line, with defaults from a preset of train.pretrain."""
    run = command_line.run_of_preset(argv, PRESETS)
    return command_line.read(PlanConfig, PROGRAM, argv, _of_run(run), COMMON, EXAMPLES)


def _of_run(run: PretrainConfig) -> PlanConfig:
    return PlanConfig(
        model=run.model,
        preset=run.preset,
        sequence_length_tokens=run.data.sequence_length_tokens,
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        z_loss_weight=run.z_loss_weight,
        optimizer=run.optimizer,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program with the arguments of the command line."""
    config = read(sys.argv[1:] if argv is None else argv)
    from train.planning import plan_report as planning

    planning.run(config)


if __name__ == "__main__":
    main()
