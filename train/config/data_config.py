"""Configuration of the text of a run: its source, tokenizer and batches."""

import dataclasses
from typing import Literal, NamedTuple

from train.config.rules import at_least_1, between_0_and_1, check, steps_of_32_bits
from train.config.run_config import Switch


class Source(NamedTuple):
    """Files that a setting names.

    Attributes:
      kind: pattern: files that match it; directory: all files in it; file: itself.
      value: the setting's value. None: the project's own text.
    """

    kind: Literal["pattern", "directory", "file"]
    value: str | None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text and batches.

    Attributes:
      data_glob: files to train on, as a pattern in quotes, e.g. 'texts/**/*.txt'. A
        text file (UTF-8) is one document; JSON lines (.jsonl, .ndjson, .json), JSON
        arrays and .parquet have one per row. All but Parquet may be compressed (.gz,
        .zst, .bz2, .xz). None: Moby Dick, which is included, unless a dataset is given.
      eval_glob: files to evaluate on, of the same formats; replaces held_out_fraction
        and dataset_eval_split. Files that also match data_glob are not trained on.
        None: the end of the training text, or a split.
      skip_bad_documents: skip and count documents that cannot be read (invalid JSON,
        rows without text, files that are damaged or not text). Without it the first
        one ends the program.
      dataset: Hugging Face dataset to stream instead, by its name on the hub
        (allenai/c4) or the path of a local directory.
      dataset_config: configuration of the dataset, e.g. en.
      dataset_split: split of the dataset to train on.
      dataset_eval_split: split of the dataset to evaluate on.
      text_field: field with the text, in rows of a dataset or of files.
      shuffle_buffer_documents: documents in a window within which a streamed dataset
        is shuffled.
      tokenizer: path of a tokenizer.json or of a SentencePiece .model, or the name of
        a repository on the hub. None: a byte-level BPE is trained on the text.
      bos: start each document with the tokenizer's BOS token and add no EOS token: for
        weights that were trained so (llama2.c).
      bos_and_eos: start each document with BOS and end it with EOS: for weights that
        were trained so (LLaMA, Mistral).
      token_cache_dir: directory for tokens of files, which makes the next start fast;
        may be deleted at any time; entries unused for 60 days are deleted. auto:
        subtrack_jax/tokens in the user's cache directory; none: tokens in memory.
      held_out_fraction: fraction of the files' characters, at the end, used for
        evaluation.
      eval_tokens: maximum number of tokens in an evaluation.
      packing: packed: documents are joined and split into sequences without padding;
        padded: every document is one sequence, truncated or padded, as in the
        published runs.
      sequence_length_tokens: tokens per sequence.
      batch_size_sequences: sequences per optimizer step on all devices together.
    """

    data_glob: str | None = None
    eval_glob: str | None = None
    skip_bad_documents: Switch = False
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    dataset_eval_split: str = "validation"
    text_field: str = "text"
    shuffle_buffer_documents: int = 10_000
    tokenizer: str | None = None
    bos: Switch = False
    bos_and_eos: Switch = False
    token_cache_dir: str = "auto"
    held_out_fraction: float = 0.05
    eval_tokens: int = 10_000_000
    packing: Literal["packed", "padded"] = "packed"
    sequence_length_tokens: int = 128
    batch_size_sequences: int = 8

    def __post_init__(self):
        check(self, between_0_and_1, "held_out_fraction")
        check(self, steps_of_32_bits, "sequence_length_tokens", "batch_size_sequences")
        check(self, at_least_1, "shuffle_buffer_documents", "eval_tokens")
        if self.bos and self.bos_and_eos:
            raise ValueError(
                "--bos and --bos-and-eos exclude each other: the first has no EOS "
                "after documents"
            )
        if self.data_glob is not None and self.dataset is not None:
            raise ValueError(
                f"--data-glob {self.data_glob!r} and --dataset {self.dataset!r} "
                "exclude each other: give one of them"
            )

    @property
    def begins_documents(self) -> bool:
        """Whether documents begin with the tokenizer's BOS token."""
        return self.bos or self.bos_and_eos

    @property
    def ends_documents(self) -> bool:
        """Whether documents end with the tokenizer's EOS token."""
        return not self.bos

    @property
    def sources(self) -> dict[str, Source]:
        """Files that a run reads, by the setting that names them."""
        found = {}
        if self.dataset is None:
            found["data.data_glob"] = Source("pattern", self.data_glob)
        else:
            found["data.dataset"] = Source("directory", self.dataset)
        if self.eval_glob is not None:
            found["data.eval_glob"] = Source("pattern", self.eval_glob)
        return found

    @property
    def has_own_evaluation(self) -> bool:
        """Whether the text of evaluations is apart from that of training."""
        return self.eval_glob is not None

    @property
    def batch_size_tokens(self) -> int:
        """Tokens predicted in each optimizer step."""
        return self.batch_size_sequences * self.sequence_length_tokens


def check_parts(data: DataConfig, parts: int) -> None:
    """Raises a ValueError if batches cannot be split into equal parts."""
    if data.batch_size_sequences % parts:
        raise ValueError(
            f"--batch-size-sequences {data.batch_size_sequences} must be a multiple "
            f"of --gradient-accumulation-steps {parts}"
        )
