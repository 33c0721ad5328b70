"""Configuration of a pre-training run."""

import dataclasses
import pathlib
from typing import Literal

from models.config import LlamaConfig
from train.config.data_config import DataConfig, check_parts
from train.config.optimizer_config import OptimizerConfig
from train.config.rules import at_least_1, check, not_negative
from train.config.run_config import LengthConfig, RunConfig, Switch

# The program's command, for messages.
PRETRAIN = "python -m train.pretrain"

PresetName = Literal[
    "tiny",
    "llama-9m",
    "llama-20m",
    "llama-35m",
    "llama-60m",
    "llama-130m",
    "llama-350m",
    "llama-1b",
    "llama-3b",
    "llama-7b",
]


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Text sample generated before and after training.

    Attributes:
      sample_prompt: text to continue.
      sample_length_tokens: maximum number of tokens to add to the prompt.
      sample_temperature: divides the logits: below 1 less random, above 1 more, 0
        always takes the likeliest token.
    """

    sample_prompt: str = "The whale"
    sample_length_tokens: int = 100
    sample_temperature: float = 0.7

    def __post_init__(self):
        if not self.sample_prompt:
            raise ValueError("--sample-prompt must not be empty")
        check(self, at_least_1, "sample_length_tokens")
        check(self, not_negative, "sample_temperature")


@dataclasses.dataclass(frozen=True)
class TextTask(LengthConfig):
    """Model, text and length of a run that trains a language model.

    Attributes:
      model: the model's shape and arithmetic.
      data: the text and its batches.
      z_loss_weight: weight of the squared log-partition added to the loss (1e-4 in
        PaLM), which prevents drift of the logits.
    """

    model: LlamaConfig = dataclasses.field(kw_only=True)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    z_loss_weight: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check(self, not_negative, "z_loss_weight")
        check_parts(self.data, self.gradient_accumulation_steps)


@dataclasses.dataclass(frozen=True)
class PretrainConfig(RunConfig, TextTask):
    """Pre-trains a LLaMA on text.

    Without arguments: a model of 4 million parameters on Moby Dick with SubTrack++,
    minutes on a laptop's CPU. The values below are those of the chosen preset.

    Attributes:
      preset: defaults of all other values. tiny: the default run; llama-*: the
        published shapes, optimizer settings and batches. With --init-from the shape is
        that of the weights.
      init_from: directory of a LLaMA in Hugging Face's layout, whose weights, shape
        and tokenizer the run starts from; flags that contradict them are errors. Other
        defaults are then: a learning rate of 1e-4, sequences of 256 tokens, a rank of
        at most a quarter of the width. None: random weights.
      resize_embedding: enlarge the embedding of imported weights to the tokenizer's or
        the given vocabulary size; new rows are the mean of the old ones.
      update_in_backward: update each layer in the backward pass, with the gradient of
        one layer in memory at a time. The same results, within rounding; a resumed run
        may change it. Needs --remat full. Clipping takes a second backward pass (up to
        1.75 times the computation), which --max-gradient-norm inf avoids.
      sample: text samples before and after training.
    """

    preset: PresetName = "tiny"
    init_from: pathlib.Path | None = None
    resize_embedding: Switch = False
    update_in_backward: Switch = False
    sample: SampleConfig = SampleConfig()
    output_dir: pathlib.Path = pathlib.Path("runs/pretrain")

    def __post_init__(self):
        super().__post_init__()
        if self.update_in_backward:
            check_updates_in_backward(self.model, self.optimizer)

    @property
    def title(self) -> str:
        """Heading of the run's plots."""
        return f"{self.preset}, {self.optimizer.name}"

    @property
    def positions(self) -> int:
        """Maximum sequence length of the model, from training or imported weights."""
        given = self.model.max_length_tokens or 0
        return max(self.data.sequence_length_tokens, given)


def check_updates_in_backward(model: LlamaConfig, optimizer: OptimizerConfig) -> None:
    """Raises a ValueError unless layers can be updated in the backward pass."""
    if model.remat != "full":
        raise ValueError(
            "--update-in-backward computes the activations of each layer again: it"
            f" needs --remat full, got {model.remat}"
        )
    if optimizer.name == "adafactor":
        raise ValueError(
            "--update-in-backward does not fit --optimizer adafactor, which clips the"
            " update of all layers' matrices together: choose another optimizer"
        )
