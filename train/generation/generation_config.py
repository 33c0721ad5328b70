"""Configuration of `train.generate`."""

import dataclasses
import pathlib

from train.config.rules import (
    above_0_to_1,
    at_least_1,
    check,
    fits_32_bits,
    not_negative,
)
from train.config.run_config import (
    BEST_OR_NEWEST,
    CheckpointChoice,
    CompilationConfig,
    Switch,
)

DEFAULT_PROMPT = "The whale"


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Continues a prompt with a trained model until the model ends the text.

    Attributes:
      checkpoint: --output-dir of a run, or directory of a LLaMA in Hugging Face's
        layout.
      prompt: text to continue; '' starts a new one. None: 'The whale'.
      prompt_file: file with the prompt (UTF-8); - reads the standard input.
      chat: --prompt, or each line of the standard input without it, is a message of a
        conversation, which the model answers. It needs a chat template, such as that
        of a run of train.sft.
      length_tokens: maximum number of tokens to add to the prompt.
      temperature: divides the logits: below 1 less random, above 1 more, 0 always
        takes the likeliest token.
      top_k: draws from this number of likeliest tokens. None: from all.
      top_p: draws from the smallest set of likeliest tokens with this total
        probability. None: from all.
      num_samples: number of texts.
      seed: random seed of the texts.
      choice: which checkpoint of a run.
      start: settings of the process.
    """

    checkpoint: pathlib.Path
    prompt: str | None = None
    prompt_file: pathlib.Path | None = None
    chat: Switch = False
    length_tokens: int = 200
    temperature: float = 0.7
    top_k: int | None = None
    top_p: float | None = None
    num_samples: int = 1
    seed: int = 0
    choice: CheckpointChoice = BEST_OR_NEWEST
    start: CompilationConfig = dataclasses.field(default_factory=CompilationConfig)

    def __post_init__(self):
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("--prompt and --prompt-file exclude each other")
        if self.chat and self.num_samples > 1:
            raise ValueError(
                f"--num-samples {self.num_samples}: a conversation (--chat) has one "
                "answer to each message"
            )
        check(self, at_least_1, "length_tokens", "num_samples")
        check(self, not_negative, "temperature")
        check(self, fits_32_bits, "seed")
        if self.top_k is not None:
            check(self, at_least_1, "top_k")
        if self.top_p is not None:
            check(self, above_0_to_1, "top_p")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"--num-samples {self.num_samples} would be the same text each time, "
                "as --temperature 0 always takes the likeliest token"
            )
        try:
            (self.prompt or "").encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"--prompt must be UTF-8 text, got {self.prompt!r}"
            ) from error

    @property
    def has_prompt(self) -> bool:
        """Whether a prompt is given."""
        return self.prompt is not None or self.prompt_file is not None
