"""Program `train.generate`: samples text from a trained model."""

import functools
import math
import pathlib
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from models.generation import Sampling
from train.generation import chat, language_model, writing
from train.generation.generation_config import DEFAULT_PROMPT, GenerateConfig
from train.rundir.checkpoints import CheckpointError, quiet_orbax
from train.system import compilation_cache, console
from train.tokenization.tokenizer import Tokenizer

# Batch size; more samples than this are drawn in several batches.
SAMPLES_AT_ONCE = 16


def run(config: GenerateConfig) -> None:
    """Loads the model and prints its text as it is generated."""
    compilation_cache.use(config.start)
    quiet_orbax()
    with (
        console.user_errors(ValueError, OSError, CheckpointError),
        console.reader_may_leave(),
    ):
        prompt = read_prompt(config)
        model = language_model.load(config.checkpoint, config.choice)
        if config.chat:
            conversation = chat.Chat(model, config)
            print(model.description, file=sys.stderr)
            chat.hold(conversation, prompt if config.has_prompt else None)
            return
        _warn_of_special_tokens(prompt, model.tokenizer)
        last = None
        for sample, text in generate(config, model, prompt):
            if last is None:  # after the first token: errors come without it
                print(model.description, file=sys.stderr)
            if sample != last:
                print("" if last is None else "\n\n", prompt, sep="", end="")
            print(text, end="", flush=True)
            last = sample
        print()


def generate(
    config: GenerateConfig, model: language_model.LanguageModel, prompt: str
) -> Iterator[tuple[int, str]]:
    """Generates samples from a prompt; yields (sample, text), see `writing.write`.

    Raises:
      ValueError: the prompt is too long.
    """
    fold_in = functools.partial(jax.random.fold_in, jax.random.key(config.seed))
    batch_size = math.ceil(
        config.num_samples / math.ceil(config.num_samples / SAMPLES_AT_ONCE)
    )
    for first in range(0, config.num_samples, batch_size):
        texts = writing.write(
            model.model,
            model.tokenizer,
            prompt,
            jax.vmap(fold_in)(first + jnp.arange(batch_size)),
            length=config.length_tokens,
            sampling=Sampling(config.temperature, config.top_k, config.top_p),
            positions=model.positions,
        )
        for row, text in texts:
            if first + row == config.num_samples:
                return  # the rest fills the last batch
            yield first + row, text


def _warn_of_special_tokens(prompt: str, tokenizer: Tokenizer) -> None:
    names = [tokenizer.name(index) for index in tokenizer.special.all]
    if spelled := [name for name in names if name and name in prompt]:
        console.warn(
            f"{', '.join(spelled)} in the prompt is read as text, not as a special "
            "token"
        )


def read_prompt(config: GenerateConfig) -> str:
    """Reads the prompt from its flag or file; drops a file's last line break.

    Raises:
      ValueError: the file is not UTF-8.
      OSError: the file cannot be read.
    """
    if config.prompt_file is None:
        return DEFAULT_PROMPT if config.prompt is None else config.prompt
    name = config.prompt_file
    try:
        if name == pathlib.Path("-"):
            if sys.stdin is None:
                raise ValueError("--prompt-file -: the standard input is closed")
            content = sys.stdin.buffer.read()
        else:
            content = name.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise OSError(f"--prompt-file {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompt-file {name} is not UTF-8 text: {error.reason} at byte "
            f"{error.start}"
        ) from error
    return text.replace("\r\n", "\n").removesuffix("\n")
