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

# A flag without a --no- form, off by default.
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints in the run's directory: interval and retention.

    Attributes:
      checkpoint_every_steps: optimizer steps between two checkpoints; the last step,
        and the one at which a signal stops the run, also have one.
      keep_last_checkpoints: number of newest checkpoints to keep.
      keep_checkpoint_every_steps: checkpoints at multiples of this number of steps are
        kept permanently. None: none are.
      keep_best: also keep the checkpoint with the lowest held-out loss, saved at each
        evaluation that is the best so far.
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
    """Checkpoint of a run to read.

    Attributes:
      which: best (lowest held-out loss) or newest. None: the best if one was
        evaluated, else the newest.
      step: the checkpoint of this step instead.
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
    """Reports of a run in addition to metrics.jsonl.

    Attributes:
      tensorboard: write TensorBoard events into the run's directory.
      wandb: report to Weights & Biases (pip install -e '.[wandb]').
      wandb_project: project of Weights & Biases.
      peak_teraflops: peak performance of a device in 10^12 floating-point operations
        per second, for the model FLOP utilisation. None: from a table of GPUs and
        TPUs; unknown for CPUs.
      diagnostics: write captured energy and movement of each matrix's subspace to
        diagnostics.jsonl, and plot them in subspace.png. Needs memory for a second
        copy of the bases.
      diagnostics_every_steps: optimizer steps between two diagnostics; only multiples
        of the update interval contain a refresh. None: the update interval, so that
        every refresh is measured.
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
    """Settings of a process: compilation cache.

    Attributes:
      compilation_cache_dir: directory for compiled programs, which makes the next start
        fast; may be deleted at any time. auto: JAX_COMPILATION_CACHE_DIR of the
        environment, else subtrack_jax/compilation in the user's cache directory. none:
        no cache, as always with several processes on CPUs.
    """

    compilation_cache_dir: str = "auto"


@dataclasses.dataclass(frozen=True)
class StartConfig(CompilationConfig):
    """Settings of a process that are not saved with the run.

    Attributes:
      config: config.json of another run, whose values replace the preset's. With only
        --output-dir in addition, the run is repeated exactly.
      resume: resume the run in --output-dir with its saved values. Given flags override
        them: --steps may grow, and settings that do not change the results may change.
        Without --resume, a run found there is resumed if all other values agree.
      allow_changes: further settings that may change at a resume, by their names in
        config.json or their flags, separated by commas: learning_rate,seed. Changes
        are recorded in config-history.jsonl.
      coordinator_address: host:port of the first of several processes; not needed for
        Slurm, Open MPI and TPU slices, nor are the next two.
      num_processes: number of processes, usually one per host.
      process_id: index of this process, from 0.
      distributed: find the other processes from the environment. Automatic under
        Slurm's srun, mpirun and on GKE's TPU slices; required on TPU VMs of several
        hosts.
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
    """Length of a run, and interval of its evaluations.

    Attributes:
      steps: optimizer steps.
      gradient_accumulation_steps: parts of a batch that are computed sequentially:
        less memory, the same result.
      eval_every_steps: steps between two evaluations on the held-out text; the last
        step is also evaluated.
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
    """Common configuration of training programs, which add their own fields.

    Attributes:
      max_skipped_steps_in_a_row: a step with an infinite or NaN loss or gradient
        changes nothing; this number of them in a row ends the run.
      seed: seed of initial parameters, order of data, random subspaces and samples.
      mesh: devices along data (copies of the model), fsdp (parameters and state
        sharded) and tensor (matrices sharded), e.g. fsdp=4,tensor=2; -1: all remaining
        devices. It does not change the results, and may differ when a run is resumed.
      output_dir: directory of the run: config.json, tokenizer, metrics.jsonl,
        curve.png and checkpoints.
      optimizer: the method and its settings. Low-rank methods, muon and adafactor
        update attention and MLP matrices only; the other parameters, and all of them
        with adamw, get plain Adam.
      checkpoint: interval and retention of checkpoints.
      report: reports of the run.
      start: settings of the process.
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
        if self.steps is not None:  # known once the data has been read
            schedule_phases(self.optimizer, self.steps)  # raises if it does not fit

    @property
    def title(self) -> str:
        """Heading of the run's plots."""
        return self.optimizer.name
