"""Configuration of supervised fine-tuning on conversations."""

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro

from models.config import LlamaConfig, Remat
from train.config.data_config import Source
from train.config.epochs_config import OPTIMIZER as _ENCODERS
from train.config.epochs_config import EpochsConfig
from train.config.optimizer_config import OptimizerConfig
from train.config.rules import (
    at_least_1,
    between_0_and_1,
    check,
    steps_of_32_bits,
)
from train.config.run_config import Switch

# The program's command, for messages.
SFT = "python -m train.sft"

LossOn = Literal["answers", "last-answer", "all"]
_Dtype = Literal["float32", "bfloat16"]
OPTIMIZER = dataclasses.replace(_ENCODERS, learning_rate=2e-5, rank=64, scale=0.25)


@dataclasses.dataclass(frozen=True)
class ConversationConfig:
    """Conversations and batches.

    Attributes:
      data_glob: files of conversations, one per row, as a pattern in quotes, e.g.
        'chats/*.jsonl': JSON lines, JSON arrays, .csv or .parquet.
      eval_glob: files to evaluate on, instead of held_out_fraction.
      dataset: Hugging Face dataset to read instead, by its name on the hub
        (tatsu-lab/alpaca) or the path of a local directory.
      dataset_config: configuration of the dataset.
      dataset_revision: branch, tag or commit of the dataset on the hub.
      dataset_split: split of the dataset to train on.
      format: fields of the rows. alpaca: instruction, input, output; messages: a list
        messages of role and content; sharegpt: a list conversations of from and value;
        prompt-completion: prompt, completion; auto: recognised by the first row.
      template: text around messages. tokenizer: the chat template of the weights; auto:
        that if there is one, else alpaca; alpaca, chatml, llama2; plain: none. Exports
        and train.generate --chat use the same.
      loss_on: tokens that the loss counts: those of all answers with their end tokens,
        of the last answer of each conversation, or all tokens.
      packing: padded: every conversation is a row, padded to one of length_buckets;
        packed: rows hold as many whole conversations as fit, which do not see each
        other.
      skip_bad_rows: leave out and count rows that are no conversations (no answer,
        unknown or not alternating roles, empty messages). Without it they end the
        program.
      held_out_fraction: fraction of the conversations to evaluate on, drawn by the
        seed.
      sequence_length_tokens: longer conversations are cut on the right, or dropped if
        that leaves nothing that the loss counts.
      length_buckets: number of lengths to which rows are padded: the maximum, its
        half, and so on. Each one is compiled.
      batch_size_sequences: rows per optimizer step on all devices together.
    """

    data_glob: str | None = None
    eval_glob: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    dataset_split: str = "train"
    format: Literal["auto", "alpaca", "messages", "sharegpt", "prompt-completion"] = (
        "auto"
    )
    template: Literal["auto", "alpaca", "chatml", "llama2", "plain", "tokenizer"] = (
        "auto"
    )
    loss_on: LossOn = "answers"
    packing: Literal["padded", "packed"] = "padded"
    skip_bad_rows: Switch = False
    held_out_fraction: float = 0.02
    sequence_length_tokens: int = 512
    length_buckets: int = 5
    batch_size_sequences: int = 8

    def __post_init__(self):
        check(self, between_0_and_1, "held_out_fraction")
        check(self, at_least_1, "length_buckets")
        check(self, steps_of_32_bits, "sequence_length_tokens", "batch_size_sequences")
        if self.data_glob is not None and self.dataset is not None:
            raise ValueError(
                f"--data-glob {self.data_glob!r} and --dataset {self.dataset!r} "
                "exclude each other: give one of them"
            )

    @property
    def sources(self) -> dict[str, Source]:
        """Files that a run reads, by the setting that names them."""
        found = {}
        if self.data_glob is not None:
            found["data.data_glob"] = Source("pattern", self.data_glob)
        if self.dataset is not None:
            found["data.dataset"] = Source("directory", self.dataset)
        if self.eval_glob is not None:
            found["data.eval_glob"] = Source("pattern", self.eval_glob)
        return found

    @property
    def has_own_evaluation(self) -> bool:
        """Whether the conversations of evaluations are apart from those of training."""
        return self.eval_glob is not None


@dataclasses.dataclass(frozen=True)
class SftConfig(EpochsConfig):
    """Fine-tunes a LLaMA on conversations (supervised fine-tuning).

    The program needs pretrained weights (--init-from: LLaMA 2 or 3, SmolLM2, or others
    of their form) and conversations (--data-glob, or --dataset). The loss counts the
    tokens of answers. The values below are those of the chosen preset.

    Attributes:
      preset: defaults of all other values. llama2-7b-alpaca: the published run of
        LLaMA 2 7B on Alpaca.
      init_from: directory of a LLaMA in Hugging Face's layout (config.json,
        safetensors, tokenizer), or its name on the hub.
      model: shape of the model, read from the weights.
      data: the conversations.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
      remat: rematerialisation, the activations that the backward pass recomputes.
        none: none; dots: all but the matrix products with weights; full: all.
    """

    preset: Literal["default", "llama2-7b-alpaca"] = "default"
    init_from: str | None = None
    model: Annotated[LlamaConfig | None, tyro.conf.Suppress] = None
    data: ConversationConfig = dataclasses.field(default_factory=ConversationConfig)
    dtype: _Dtype = "float32"
    param_dtype: _Dtype = "float32"
    remat: Remat = "none"
    output_dir: pathlib.Path = pathlib.Path("runs/sft")
    optimizer: OptimizerConfig = OPTIMIZER

    def __post_init__(self):
        super().__post_init__()
        size, parts = self.data.batch_size_sequences, self.gradient_accumulation_steps
        if size % parts:
            raise ValueError(
                f"--batch-size-sequences {size} must be a multiple of "
                f"--gradient-accumulation-steps {parts}"
            )

    @property
    def title(self) -> str:
        """Heading of the run's plots."""
        return f"{self.init_from}, {self.optimizer.name}"

    @property
    def positions(self) -> int:
        """Maximum sequence length of the model, from training or imported weights."""
        given = self.model.max_length_tokens or 0
        return max(self.data.sequence_length_tokens, given)


PRESETS: dict[str, SftConfig] = {
    config.preset: config
    for config in [
        SftConfig(),
        SftConfig(
            preset="llama2-7b-alpaca",
            init_from="meta-llama/Llama-2-7b-hf",
            data=ConversationConfig(dataset="tatsu-lab/alpaca", template="alpaca"),
            optimizer=dataclasses.replace(OPTIMIZER, rank=1024),
            dtype="bfloat16",
            param_dtype="bfloat16",
            remat="full",
        ),
    ]
}
