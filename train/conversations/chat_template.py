"""Chat template: renders conversations as tokens, with the places of answers.

Message text never becomes a special token: the name of one in a message is split by a
mark before the template is rendered, and the mark is removed before encoding.
Answers are found by rendering the conversation up to and with each of them.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from train.conversations import jinja_templates
from train.conversations.named_templates import TEMPLATES, TOKENS
from train.conversations.rows import BadRowError, Message
from train.tokenization.tokenizer import Tokenizer

# Unicode's noncharacters: no text has them.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_PROBE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
_ADVICE = "give another --template: alpaca, chatml, llama2 or plain"


class Encoded(NamedTuple):
    """Tokens of a conversation.

    Attributes:
      ids: the tokens.
      answers: first and last token, exclusive, of each answer with its end token.
    """

    ids: list[int]
    answers: list[tuple[int, int]]


class _Part(NamedTuple):
    """Special token, or text between two of them; a place in the rendered text."""

    start: int
    end: int
    token: int | None


class ChatTemplate:
    """Renders conversations with a Jinja template, in a sandbox, as transformers does.

    Args:
      source: the template.
      tokenizer: encodes the text; its special tokens are those of the template.
      name: the template, for messages.

    Attributes:
      source: the template; it begins with the tokenizer's BOS if the tokenizer begins
        texts with one.
      end: id of the token that ends answers.

    Raises:
      ValueError: the template cannot be parsed, raises an error, or does not render
        answers as a continuation of what precedes them, with a special token at their
        end.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, name: str):
        self.source, self._tokenizer, self._name = source, tokenizer, name
        self._compile()
        try:
            probe = self.encode(_PROBE)
            begin = tokenizer.document_start
            if begin and probe.ids[:1] != begin:
                self.source = "{{ bos_token }}" + source
                self._compile()
                probe = self.encode(_PROBE)
        except BadRowError as error:
            raise ValueError(f"{name}: {error}; {_ADVICE}") from error
        self.end = probe.ids[probe.answers[-1][1] - 1]

    @classmethod
    def open(cls, name: str, tokenizer: Tokenizer) -> "ChatTemplate":
        """Opens a template by its name, and marks its tokens as special.

        Args:
          name: of `named_templates`; tokenizer: its own; auto: its own if it has one,
            else alpaca.
          tokenizer: the tokenizer.

        Raises:
          ValueError: the tokenizer has no chat template, or lacks a token.
        """
        if name == "auto":
            name = "tokenizer" if tokenizer.chat_template is not None else "alpaca"
        described = f"--template {name}"
        if name == "tokenizer":
            if tokenizer.chat_template is None:
                raise ValueError(
                    f"{described}: tokenizer_config.json has no chat_template; "
                    f"{_ADVICE}"
                )
            return cls(tokenizer.chat_template, tokenizer, described)
        for token in TOKENS.get(name, ()):
            index = tokenizer.find(token)
            if index is None:
                raise ValueError(
                    f"{described} needs the token {token}, which is not in the "
                    "tokenizer's vocabulary: give another template, such as alpaca"
                )
            tokenizer.mark_special([index])
        return cls(TEMPLATES[name], tokenizer, described)

    def keep(self) -> None:
        """Makes the template, and its end token, the tokenizer's own."""
        tokenizer = self._tokenizer
        tokenizer.chat_template = self.source
        ends = tokenizer.special.ends
        if self.end not in ends:
            # A template that names eos_token would render another one.
            known = "eos_token" in self.source
            ends = (*ends, self.end) if known else (self.end, *ends)
            tokenizer.special = tokenizer.special._replace(ends=ends)

    def encode(self, messages: Sequence[Message], most: int | None = None) -> Encoded:
        """Tokens of a conversation that ends with an answer or a user's message.

        Args:
          messages: the conversation.
          most: number of tokens after which the rest may be left out. None: none is.

        Raises:
          BadRowError: the template refuses it, or cannot be split at its answers.
        """
        return self._encode(messages, most, add_generation_prompt=False)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation that the model answers.

        Raises:
          BadRowError: the template refuses it.
        """
        return self._encode(messages, None, add_generation_prompt=True).ids

    def _encode(
        self,
        messages: Sequence[Message],
        most: int | None,
        *,
        add_generation_prompt: bool,
    ) -> Encoded:
        special = self._tokenizer.special_names
        # Names of one character could not be told from text.
        names = sorted((n for n in special if len(n) > 1), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        mark, marked = _mark(messages, pattern)
        text = self._render(marked, add_generation_prompt)
        parts = _split(text, pattern, special)
        spans = [
            self._counted(text, parts, self._span(text, marked, index))
            for index, message in enumerate(marked)
            if message["role"] == "assistant"
        ]
        return self._tokens(text, mark, parts, spans, most)

    def _span(
        self, text: str, messages: Sequence[Message], index: int
    ) -> tuple[int, int]:
        """Place of an answer, from what its prompt does not render to its end."""
        before = self._render(messages[:index], add_generation_prompt=True)
        whole = self._render(messages[: index + 1], add_generation_prompt=False)
        if not (whole.startswith(before) and text.startswith(whole)):
            raise BadRowError(
                "the chat template renders earlier messages otherwise once an answer "
                "follows, so that the place of answers is not known"
            )
        return len(before), len(whole)

    def _counted(
        self, text: str, parts: list[_Part], span: tuple[int, int]
    ) -> tuple[int, int]:
        """The part of a span up to its end token."""
        start, end = span
        tokens = [p for p in parts if p.token is not None and start <= p.start < end]
        if not tokens or text[tokens[-1].end : end].strip():
            raise BadRowError(
                "the chat template ends answers without a special token, so that the "
                "model would not learn to stop"
            )
        return start, tokens[-1].end

    def _tokens(
        self,
        text: str,
        mark: str,
        parts: list[_Part],
        spans: list[tuple[int, int]],
        most: int | None,
    ) -> Encoded:
        borders = sorted({border for span in spans for border in span})
        ids: list[int] = []
        places = {0: 0}  # number of tokens before each border of the text
        for part in parts:
            if most is not None and len(ids) > most:
                break
            places[part.start] = len(ids)
            if part.token is not None:
                ids.append(part.token)
            else:
                inside = [b for b in borders if part.start < b < part.end]
                ends = [*inside, part.end]
                texts = [text[part.start : end].replace(mark, "") for end in ends]
                *prefixes, own = self._tokenizer.encode_batch(texts)
                # A token over the border of an answer belongs to what follows.
                for border, prefix in zip(inside, prefixes, strict=True):
                    places[border] = len(ids) + _common(prefix, own)
                ids += own
            places[part.end] = len(ids)
        left_out = len(ids)
        return Encoded(
            ids, [tuple(places.get(each, left_out) for each in span) for span in spans]
        )

    def _compile(self) -> None:
        try:
            self._template = jinja_templates.compile_template(self.source)
        except ValueError as error:
            raise ValueError(
                f"{self._name}: the chat template cannot be parsed: {error}; {_ADVICE}"
            ) from error

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        tokenizer = self._tokenizer
        roles = {
            "bos_token": tokenizer.special.begin,
            "eos_token": tokenizer.end_of_text,
            "pad_token": tokenizer.special.padding,
        }
        names = {r: "" if i is None else tokenizer.name(i) for r, i in roles.items()}
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **names,
            )
        except Exception as error:  # whatever the template raises
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise BadRowError(f"the chat template raises: {reason}") from error


def _mark(
    messages: Sequence[Message], pattern: re.Pattern[str]
) -> tuple[str, list[Message]]:
    """Messages in which a mark splits the names of special tokens."""
    everything = "".join(text for message in messages for text in message.values())
    mark = next(each for each in _MARKS if each not in everything)

    def split(name: re.Match[str]) -> str:
        return f"{name[0][0]}{mark}{name[0][1:]}"

    def marked(text: str) -> str:
        while pattern.search(text):  # splitting one may leave another
            text = pattern.sub(split, text)
        return text

    return mark, [
        {f: text if f == "role" else marked(text) for f, text in message.items()}
        for message in messages
    ]


def _split(text: str, pattern: re.Pattern[str], special: dict[str, int]) -> list[_Part]:
    parts, end = [], 0
    for found in pattern.finditer(text):
        if end < found.start():
            parts.append(_Part(end, found.start(), None))
        end = found.end()
        parts.append(_Part(found.start(), end, special[found[0]]))
    if end < len(text):
        parts.append(_Part(end, len(text), None))
    return parts


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    shorter = min(len(first), len(second))
    return next((index for index, (a, b) in pairs if a != b), shorter)
