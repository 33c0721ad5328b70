"""Rows as conversations: alpaca, messages, sharegpt, prompt and completion."""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from train.data.row_files import Row

RowFormat = Literal["alpaca", "messages", "sharegpt", "prompt-completion"]
# role and content; of alpaca's rows also instruction and input.
Message = dict[str, str]

_ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "model", "chatgpt", "bing", "bard"), "assistant"
    ),
}
_FIELDS: dict[RowFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}


class BadRowError(ValueError):
    """Row that is not a conversation; its text is the reason, alike for all such."""


class Found(NamedTuple):
    """Conversations of rows.

    Attributes:
      conversations: messages of each.
      bad: why rows are not conversations, and how many.
      first_bad: number of the first such row, from 1; None if there is none.
    """

    conversations: list[list[Message]]
    bad: dict[str, int]
    first_bad: int | None


def read(rows: Iterable[Row], form: RowFormat) -> Found:
    """Reads rows as conversations, and counts those that are none."""
    conversations, bad, first_bad = [], {}, None
    for number, row in enumerate(rows, 1):
        try:
            conversations.append(conversation(row, form))
        except BadRowError as error:
            bad[str(error)] = bad.get(str(error), 0) + 1
            first_bad = first_bad or number
    return Found(conversations, bad, first_bad)


def find_format(rows: list[Row], where: str) -> RowFormat:
    """Format of rows, from the fields of the first one.

    Raises:
      ValueError: there is no row, or it has no known fields.

    >>> find_format([{"prompt": "1 + 1 =", "completion": " 2"}], "the file")
    'prompt-completion'
    """
    if not rows:
        raise ValueError(f"{where} has no rows")
    for form, fields in _FIELDS.items():
        if rows[0].keys() >= {*fields}:
            return form
    known = "; ".join(f"{' and '.join(names)} ({f})" for f, names in _FIELDS.items())
    raise ValueError(
        f"the first row of {where} has the fields {', '.join(rows[0]) or 'none'}: "
        f"conversations have {known}"
    )


def conversation(row: Row, form: RowFormat) -> list[Message]:
    r"""Messages of a row: of an optional system, then users and answers in turn.

    Raises:
      BadRowError: it is not a conversation, or it has no answer.

    >>> conversation({"instruction": "Add.", "input": "1, 2", "output": "3"}, "alpaca")
    ... # doctest: +NORMALIZE_WHITESPACE
    [{'role': 'user', 'content': 'Add.\n\n1, 2', 'instruction': 'Add.',
      'input': '1, 2'}, {'role': 'assistant', 'content': '3'}]
    """
    for field in _FIELDS[form]:
        if row.get(field) is None:
            raise BadRowError(f"no field {field!r} ({form})")
    if form == "alpaca":
        messages = _of_alpaca(row)
    elif form == "prompt-completion" and isinstance(row["prompt"], str):
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    else:
        messages = [
            _message(each) for name in _FIELDS[form] for each in _list(row, name)
        ]
    _check(messages)
    return messages


def _of_alpaca(row: Row) -> list[Message]:
    instruction, extra = row["instruction"], row.get("input") or ""
    user = {"role": "user", "content": instruction}
    if isinstance(instruction, str) and isinstance(extra, str) and extra.strip():
        user |= {"instruction": instruction, "input": extra}
        user["content"] = f"{instruction}\n\n{extra}"
    return [user, {"role": "assistant", "content": row["output"]}]


def _list(row: Row, field: str) -> list[Any]:
    if not isinstance(row[field], list):
        raise BadRowError(f"{field!r} is not a list of messages")
    return row[field]


def _message(each: Any) -> Message:
    if not isinstance(each, dict):
        raise BadRowError("a message is not an object")
    role = each.get("role", each.get("from"))
    if role not in _ROLES:
        raise BadRowError(f"unknown role {str(role)[:40]!r}")
    return {"role": _ROLES[role], "content": each.get("content", each.get("value"))}


def _check(messages: list[Message]) -> None:
    if not messages:
        raise BadRowError("no messages")
    if any(not isinstance(message["content"], str) for message in messages):
        raise BadRowError("a message without text")
    if any(not message["content"].strip() for message in messages):
        raise BadRowError("an empty message")
    turns = [message["role"] for message in messages]
    turns = turns[1:] if turns[0] == "system" else turns
    if turns[:1] == ["assistant"]:
        raise BadRowError("begins with an answer")
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        raise BadRowError("users and answers do not alternate")
    if "assistant" not in turns:
        raise BadRowError("no answer")
