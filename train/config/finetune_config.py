"""Configuration of a fine-tuning run."""

import dataclasses
import pathlib
from typing import Annotated, Any, Literal

import tyro

from models.encoder_config import EncoderConfig
from train.config.optimizer_config import OptimizerConfig
from train.config.rules import at_least_1, check, from_0_below_1, not_negative, positive
from train.config.run_config import CheckpointConfig, RunConfig, Switch
from train.config.task_data_config import TaskDataConfig, check_examples

# The program's command, for messages.
FINETUNE = "python -m train.finetune"

PresetName = Literal["default", "small", "glue-base", "superglue-large"]
Freeze = Literal["none", "embeddings", "matrices"]

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
class FinetuneConfig(RunConfig):
    """Fine-tunes an encoder on a task of GLUE or SuperGLUE, or on rows of one's own.

    The encoder is a BERT, a RoBERTa or an MPNet. The program needs a pretrained one
    (--init-from) and labelled rows: those of a task on the hub (--task mrpc), of a
    dataset (--dataset), or of files (--train-file). The values below are those of the
    chosen preset.

    Attributes:
      preset: defaults of all other values. small: MiniLM on a laptop; glue-base and
        superglue-large: RoBERTa with the published settings, whose learning rates
        depend on the task.
      init_from: directory of an encoder in Hugging Face's layout (config.json,
        safetensors, tokenizer.json), or its name on the hub.
      new_head: replace a head that the weights come with by a new one, as for other
        classes.
      model: shape of the model, read from the weights.
      data: the labelled rows.
      epochs: passes over the training rows.
      steps: optimizer steps, instead of epochs.
      eval_every_epochs: passes over the training rows between two evaluations; the
        last step is also evaluated.
      eval_every_steps: the same in optimizer steps, instead of epochs.
      patience_evals: evaluations in a row without a better metric that end the run.
        None: it goes on to its last step.
      dropout: probability of dropout in the embeddings, attention and layers. None:
        the model's.
      freeze: parameters that stay as they are and need no optimizer state: embeddings
        (of words, positions and types), or the matrices of attention and MLP, as a
        baseline for low-rank methods.
      dtype: dtype of the computation; parameters are float32.
    """

    preset: PresetName = "default"
    init_from: str | None = None
    new_head: Switch = False
    model: Annotated[EncoderConfig | None, tyro.conf.Suppress] = None
    data: TaskDataConfig = dataclasses.field(default_factory=TaskDataConfig)
    epochs: float = 3.0
    steps: int | None = None
    eval_every_epochs: float = 1.0
    eval_every_steps: int | None = None
    patience_evals: int | None = None
    dropout: float | None = None
    freeze: Freeze = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    output_dir: pathlib.Path = pathlib.Path("runs/finetune")
    optimizer: OptimizerConfig = OPTIMIZER
    checkpoint: CheckpointConfig = CHECKPOINT

    def __post_init__(self):
        check_length(self)
        super().__post_init__()
        check(self, not_negative, "epochs")
        check(self, positive, "eval_every_epochs")
        check(self, at_least_1, "patience_evals")
        check(self, from_0_below_1, "dropout")
        check_examples(self.data, self.gradient_accumulation_steps)

    @property
    def title(self) -> str:
        """Heading of the run's plots."""
        return f"{self.data.chosen_task.name}, {self.optimizer.name}"


def check_length(config: Any) -> None:
    """Raises a ValueError if neither epochs nor steps give a run a length."""
    if config.steps == 0 or (config.steps is None and config.epochs == 0):
        raise ValueError(
            f"--epochs {config.epochs:g} and --steps {config.steps}: there is nothing "
            "to train; give one of them"
        )
