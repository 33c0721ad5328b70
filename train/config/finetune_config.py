"""Configuration of a fine-tuning run."""

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro

from models.encoder_config import EncoderConfig
from train.config.epochs_config import EpochsConfig
from train.config.rules import at_least_1, check, from_0_below_1
from train.config.run_config import Switch
from train.config.task_data_config import TaskDataConfig, check_examples

# The program's command, for messages.
FINETUNE = "python -m train.finetune"

PresetName = Literal["default", "small", "glue-base", "superglue-large"]
Freeze = Literal["none", "embeddings", "matrices"]


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(EpochsConfig):
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
    patience_evals: int | None = None
    dropout: float | None = None
    freeze: Freeze = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    output_dir: pathlib.Path = pathlib.Path("runs/finetune")

    def __post_init__(self):
        super().__post_init__()
        check(self, at_least_1, "patience_evals")
        check(self, from_0_below_1, "dropout")
        check_examples(self.data, self.gradient_accumulation_steps)

    @property
    def title(self) -> str:
        """Heading of the run's plots."""
        return f"{self.data.chosen_task.name}, {self.optimizer.name}"
