"""Conversation in the terminal: `train.generate --chat`."""

import sys
from collections.abc import Iterator

import jax

from models.generation import Sampling
from train.conversations.chat_template import ChatTemplate
from train.conversations.rows import Message
from train.generation import writing
from train.generation.generation_config import GenerateConfig
from train.generation.language_model import LanguageModel


class Chat:
    """Conversation with a model, whose chat template and end token it uses.

    Args:
      model: the model.
      config: length and sampling of answers.

    Raises:
      ValueError: the model's tokenizer has no chat template, or it cannot be used.
    """

    def __init__(self, model: LanguageModel, config: GenerateConfig):
        if model.tokenizer.chat_template is None:
            raise ValueError(
                f"--chat needs a chat template, which --checkpoint {config.checkpoint} "
                "does not have: give a run of train.sft, or its export"
            )
        self._model, self._config = model, config
        self._template = ChatTemplate.open("tokenizer", model.tokenizer)
        self.messages: list[Message] = []

    def answer(self, text: str) -> Iterator[str]:
        """Answers a message; yields pieces of the answer as it is generated.

        Raises:
          ValueError: the conversation is longer than the model can read, or the
            template refuses it.
        """
        config, model = self._config, self._model
        self.messages.append({"role": "user", "content": text})
        ids = self._template.prompt(self.messages)
        writing.check_length(ids, model.positions, "the conversation")
        key = jax.random.fold_in(jax.random.key(config.seed), len(self.messages) // 2)
        pieces = []
        for _, piece in writing.continue_ids(
            model.model,
            model.tokenizer,
            ids,
            key[None],
            length=config.length_tokens,
            sampling=Sampling(config.temperature, config.top_k, config.top_p),
            positions=model.positions,
            stops=(*model.tokenizer.stops, self._template.end),
        ):
            pieces.append(piece)
            yield piece
        answer = "".join(pieces).strip()
        self.messages.append({"role": "assistant", "content": answer})


def hold(chat: Chat, first: str | None) -> None:
    """Answers one message, or each line of the standard input to its end.

    Args:
      chat: the conversation.
      first: the only message; None: messages are read.
    """
    for text in [first] if first is not None else _lines():
        for piece in chat.answer(text):
            print(piece, end="", flush=True)
        print(flush=True)


def _lines() -> Iterator[str]:
    """Lines of the standard input that are not empty."""
    if sys.stdin is None:
        raise ValueError("--chat: the standard input is closed; give --prompt")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
