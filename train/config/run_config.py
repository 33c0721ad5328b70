"""Settings shared by training programs: length, checkpoints, reports, start."""

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro

from train.config.optimizer_config import OptimizerConfig, schedule_phases
from train.config.rules import (
    at_least_1,
    check,
    fits_32_bits,
    not_negative,
    positive,
    steps_of_32_bits,
)

# A switch with no opposite: off unless it is given.
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints in the run's directory, to continue from.

    Attributes:
      checkpoint_every_steps: optimizer steps between two checkpoints; the last step,
        and one at which the run is told to stop, have one too.
      keep_last_checkpoints: how many of the newest checkpoints are kept.
      keep_checkpoint_every_steps: checkpoints at multiples of this many steps are kept
        for good. None: none are.
      keep_best: keep the checkpoint of the lowest held-out loss, too; an evaluation
        that is the best so far saves one.
    """

    checkpoint_every_steps: int = 100
    keep_last_checkpoints: int = 2
    keep_checkpoint_every_steps: int | None = None
    keep_best: bool = True

    def __post_init__(self):
        check(self, at_least_1, "checkpoint_every_steps", "keep_last_checkpoints")
        if self.keep_checkpoint_every_steps is not None:
            check(self, at_least_1, "keep_checkpoint_every_steps")


@dataclasses.dataclass(frozen=True)
class CheckpointChoice:
    """Which checkpoint of a run a program reads.

    Attributes:
      which: best, the one of the lowest held-out loss, or newest. None: the best if
        one was evaluated, else the newest.
      step: the one of this step instead.
    """

    which: Literal["best", "newest"] | None = None
    step: int | None = None

    def __post_init__(self):
        if self.step is None:
            return
        check(self, not_negative, "step")
        if self.which is not None:
            raise ValueError(
                f"--which {self.which} and --step {self.step} exclude each other: "
                "give one of them"
            )


BEST_OR_NEWEST = CheckpointChoice()


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Where to watch a run, besides metrics.jsonl.

    Attributes:
      tensorboard: write TensorBoard events into the run's directory.
      wandb: report to Weights & Biases (an extra of its own: pip install -e
        '.[wandb]').
      wandb_project: project of Weights & Biases.
      peak_teraflops: most floating-point operations a device can do, in 10^12 per
        second, for the model FLOP utilisation. None: taken from a table of GPUs and
        TPUs; unknown on a CPU.
      diagnostics: write into diagnostics.jsonl how the subspace of each matrix fits
        its gradient and how far it moves, and draw subspace.png of it. While it looks
        it holds a second copy of the bases.
      diagnostics_every_steps: optimizer steps between two such looks; those at
        multiples of the update interval see a move. None: the update interval, so
        that every move is seen.
    """

    tensorboard: Switch = False
    wandb: Switch = False
    wandb_project: str = "subtrack_jax"
    peak_teraflops: float | None = None
    diagnostics: Switch = False
    diagnostics_every_steps: int | None = None

    def __post_init__(self):
        if self.peak_teraflops is not None:
            check(self, positive, "peak_teraflops")
        if self.diagnostics_every_steps is not None:
            check(self, at_least_1, "diagnostics_every_steps")
            if not self.diagnostics:
                raise ValueError(
                    f"--diagnostics-every-steps {self.diagnostics_every_steps} needs "
                    "--diagnostics, which is off"
                )


@dataclasses.dataclass(frozen=True)
class CompilationConfig:
    """How a program begins.

    Attributes:
      compilation_cache_dir: directory that keeps compiled programs, so that the next
        start is quick; it may be deleted at any time. auto: JAX_COMPILATION_CACHE_DIR
        of the environment, or else subtrack_jax/compilation in the user's cache
        directory. none: programs are not kept.
    """

    compilation_cache_dir: str = "auto"


@dataclasses.dataclass(frozen=True)
class StartConfig(CompilationConfig):
    """How a run begins; not part of what a run is.

    Attributes:
      config: config.json of another run, whose values replace the preset's. With
        nothing else but --output-dir the run is repeated exactly.
      resume: continue the run in --output-dir, with its own values and, on top, those
        that are given: --steps may grow, and what leaves the numbers as they are may
        change. Without it, a run found there is continued as well if all other values
        agree.
      allow_changes: further settings that may change when a run is continued, as
        config.json or flags name them, separated by commas: learning_rate,seed. The
        change is written to config-history.jsonl.
      coordinator_address: host:port of the first of several processes; Slurm, Open MPI
        and TPU slices need neither this nor the next two.
      num_processes: number of processes, usually one for each host.
      process_id: which of them this is, from 0.
      distributed: find the other processes in the environment. Under Slurm's srun,
        mpirun and on GKE's TPU slices it is done without being told; on TPU VMs of
        several hosts it has to be.
    """

    config: pathlib.Path | None = None
    resume: Switch = False
    allow_changes: str | None = None
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    distributed: Switch = False

    def __post_init__(self):
        if self.num_processes is not None:
            check(self, at_least_1, "num_processes")
        if self.process_id is not None:
            check(self, not_negative, "process_id")


@dataclasses.dataclass(frozen=True)
class LengthConfig:
    """Steps of a run, and when it is evaluated.

    Attributes:
      steps: optimizer steps.
      gradient_accumulation_steps: parts into which each step's batch is cut, to be
        computed one after another: less memory, the same result.
      eval_every_steps: steps between two evaluations on the held-out text; the last
        step has one too.
    """

    steps: int = 300
    gradient_accumulation_steps: int = 1
    eval_every_steps: int = 50

    def __post_init__(self):
        check(self, at_least_1, "steps", "eval_every_steps")
        check(self, steps_of_32_bits, "steps")
        check(self, at_least_1, "gradient_accumulation_steps")


@dataclasses.dataclass(frozen=True)
class RunConfig(LengthConfig):
    """Run of a training program, whatever it trains; each program adds its own fields.

    Attributes:
      max_skipped_steps_in_a_row: a step whose loss or gradient is not finite changes
        nothing; so many of them one after another end the run.
      seed: decides initial parameters, order of the data, random subspaces, samples.
      mesh: how devices share the work, as sizes of data (copies of the model), fsdp
        (parameters and state in pieces) and tensor (matrices in pieces), e.g.
        fsdp=4,tensor=2; -1 takes all devices that are left. It does not change what is
        computed, and may differ when a run is resumed.
      output_dir: directory of the run: config.json, tokenizer, metrics.jsonl,
        curve.png and checkpoints.
      optimizer: the method and its settings. Those of low-rank methods act on
        attention and MLP matrices only, as do muon and adafactor; the other parameters,
        and all of them under adamw, get plain Adam.
      checkpoint: which checkpoints are kept, to continue from.
      report: where to watch the run.
      start: how to begin.
    """

    max_skipped_steps_in_a_row: int = 10
    seed: int = 0
    mesh: str = "fsdp=-1"
    output_dir: pathlib.Path = pathlib.Path("runs/train")
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = CheckpointConfig()
    report: ReportConfig = ReportConfig()
    start: StartConfig = StartConfig()

    def __post_init__(self):
        super().__post_init__()
        check(self, at_least_1, "max_skipped_steps_in_a_row")
        check(self, fits_32_bits, "seed")
        schedule_phases(self.optimizer, self.steps)  # raises if it does not fit
