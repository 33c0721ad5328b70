"""Encoded conversations: tokens, those that the loss counts, cut and dropped ones."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from train.config.sft_config import LossOn
from train.conversations.chat_template import ChatTemplate, Encoded
from train.conversations.rows import BadRowError, Message
from train.tokenization.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Conversations:
    """Conversations of a split, ready to be put into batches.

    Attributes:
      name: train, or held out.
      tokens: (tokens,), int32; those of all conversations, one after the other.
      counted: (tokens,), bool; whether the loss counts the prediction of each.
      ends: (conversations,), int64; where each ends.
      cut: number of conversations without their last tokens.
      dropped: number of conversations too long to hold a counted token.
      refused: why the template refused conversations, and how many.
    """

    name: str
    tokens: np.ndarray
    counted: np.ndarray
    ends: np.ndarray
    cut: int = 0
    dropped: int = 0
    refused: dict[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> np.ndarray:
        """Number of inputs of each: its tokens without the last."""
        return np.diff(self.ends, prepend=0) - 1

    def place(self, index: int) -> slice:
        """Place of a conversation's tokens."""
        return slice(self.ends[index - 1] if index else 0, self.ends[index])


def counted_tokens(encoded: Encoded, loss_on: LossOn) -> np.ndarray:
    """Whether the loss counts the prediction of each token, by position.

    The first token is never counted: nothing predicts it.
    """
    counted = np.full(len(encoded.ids), loss_on == "all")
    answers = encoded.answers[-1:] if loss_on == "last-answer" else encoded.answers
    for start, end in answers:
        counted[start:end] = True
    counted[:1] = False
    return counted


def encode(
    name: str,
    conversations: Sequence[Sequence[Message]],
    template: ChatTemplate,
    loss_on: LossOn,
    most_inputs: int,
) -> Conversations:
    """Encodes conversations, and cuts or drops those that are too long.

    A conversation is cut on its right if a counted token is left; its end token is
    then missing, too. Otherwise it is dropped.

    Args:
      name: of the split.
      conversations: their messages.
      template: renders them.
      loss_on: which tokens count.
      most_inputs: maximum number of inputs of the model.
    """
    ids, masks, sizes = [np.empty(0, np.int32)], [np.empty(0, bool)], []
    cut, dropped = 0, 0
    refused: dict[str, int] = {}
    for messages in conversations:
        try:
            encoded = template.encode(messages, most_inputs + 1)
        except BadRowError as error:
            refused[str(error)] = refused.get(str(error), 0) + 1
            continue
        counted = counted_tokens(encoded, loss_on)[: most_inputs + 1]
        if not counted.any():
            dropped += 1
            continue
        cut += len(encoded.ids) > len(counted)
        ids.append(np.array(encoded.ids[: len(counted)], np.int32))
        masks.append(counted)
        sizes.append(len(counted))
    return Conversations(
        name,
        np.concatenate(ids),
        np.concatenate(masks),
        np.cumsum(np.array(sizes, np.int64)),
        cut,
        dropped,
        refused,
    )


def show(tokenizer: Tokenizer, ids: Sequence[int], counted: Sequence[bool]) -> str:
    """Text of tokens, with the counted ones in double brackets.

    Special tokens are shown by their names, as is text that spells them.
    """
    special = {index: name for name, index in tokenizer.special_names.items()}
    shown, run, inside = [], [], False

    def flush() -> None:
        shown.append(tokenizer.decode(run))
        run.clear()

    for index, is_counted in zip(map(int, ids), counted, strict=True):
        if is_counted != inside:
            flush()
            shown.append("[[" if is_counted else "]]")
            inside = bool(is_counted)
        if index in special:
            flush()
            shown.append(special[index])
        else:
            run.append(index)
    flush()
    return "".join(shown) + ("]]" if inside else "")
