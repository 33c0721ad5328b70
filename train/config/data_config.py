"""Configuration of the text of a run: its source, tokenizer and batches."""

import dataclasses
from typing import Literal

from train.config.rules import at_least_1, between_0_and_1, check, steps_of_32_bits
from train.config.run_config import Switch


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text and batches.

    Attributes:
      data_glob: files to train on, as a pattern in quotes, e.g. 'texts/**/*.txt'. Text
        (UTF-8) is one document; JSON lines (.jsonl, .ndjson, .json), JSON arrays and
        .parquet have one in each row. All but Parquet may be compressed (.gz, .zst,
        .bz2, .xz). None: Moby Dick, which comes with the project, unless a dataset
        is named.
      eval_glob: files to evaluate on, of the same kinds; held_out_fraction and
        dataset_eval_split are then not used. Files that match data_glob, too, are
        not trained on. None: the end of the text to train on, or a split.
      skip_bad_documents: leave out documents that cannot be read (lines that are no
        JSON, rows without the text, files that are no text or damaged), and tell how
        many. Without it the first one ends the program.
      dataset: Hugging Face dataset to stream instead, by its name on the hub
        (allenai/c4) or the path of a local directory.
      dataset_config: configuration of the dataset, e.g. en.
      dataset_split: split of the dataset to train on.
      dataset_eval_split: split of the dataset to evaluate on.
      text_field: field of rows, of a dataset or of files, that holds the text.
      shuffle_buffer_documents: a streamed dataset is shuffled within stretches of
        this many documents.
      tokenizer: path of a tokenizer.json or of a SentencePiece .model, or the name of
        a repository on the hub. None: a byte-level BPE is trained on the text.
      bos: begin each document with the tokenizer's BOS token, in place of the EOS token
        after it: for weights that were trained so (llama2.c).
      bos_and_eos: begin each document with BOS and end it with EOS: for weights that
        were trained so (LLaMA, Mistral).
      token_cache_dir: directory that keeps the tokens of files, so that the next start
        is quick; it may be deleted at any time, and what was not used for 60 days is.
        With auto it is subtrack_jax/tokens in the user's cache directory, with none
        tokens are held in memory.
      held_out_fraction: end of the files' text, as a fraction of its characters, kept
        for evaluation.
      eval_tokens: most tokens of an evaluation.
      packing: packed joins documents and cuts them into sequences without padding;
        padded makes of every document one sequence, cut or padded to length, as in
        the published runs.
      sequence_length_tokens: tokens of a sequence.
      batch_size_sequences: sequences in each optimizer step, of all devices together.
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
    def batch_size_tokens(self) -> int:
        """Tokens predicted in each optimizer step."""
        return self.batch_size_sequences * self.sequence_length_tokens


def check_parts(data: DataConfig, parts: int) -> None:
    """Raises a ValueError if batches cannot be cut into so many equal parts."""
    if data.batch_size_sequences % parts:
        raise ValueError(
            f"--batch-size-sequences {data.batch_size_sequences} must be a multiple "
            f"of --gradient-accumulation-steps {parts}"
        )
