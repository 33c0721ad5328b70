"""Formats of conversations, and rows that are none."""

import pytest

from train.conversations import rows

QUESTION, ANSWER = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "ok"}
EXPECTED = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "ok"},
]


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": EXPECTED}, "messages"),
        ({"id": 1, "conversations": [QUESTION, ANSWER]}, "sharegpt"),
        ({"prompt": "Hi", "completion": "ok"}, "prompt-completion"),
        ({"prompt": EXPECTED[:1], "completion": EXPECTED[1:]}, "prompt-completion"),
        ({"instruction": "Hi", "input": "", "output": "ok"}, "alpaca"),
    ],
)
def test_formats_are_recognised(row, form):
    assert rows.find_format([row], "the file") == form
    assert rows.conversation(row, form) == EXPECTED


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ([QUESTION], "no answer"),
        ([ANSWER, QUESTION], "begins with an answer"),
        ([QUESTION, ANSWER, ANSWER], "users and answers do not alternate"),
        ([QUESTION, {"from": "gpt", "value": " "}], "an empty message"),
        ([QUESTION, {"from": "gpt", "value": None}], "a message without text"),
        ([QUESTION, {"from": "tool", "value": "3"}], "unknown role 'tool'"),
        ([QUESTION, "ok"], "a message is not an object"),
        ("Hi", "'conversations' is not a list of messages"),
    ],
)
def test_rows_that_are_no_conversations_are_counted(messages, reason):
    given = [{"conversations": [QUESTION, ANSWER]}, {"conversations": messages}]
    found = rows.read([*given, {"text": "Hi"}], "sharegpt")
    assert found.conversations == [EXPECTED]
    assert found.bad == {reason: 1, "no field 'conversations' (sharegpt)": 1}
    assert found.first_bad == 2


def test_unknown_formats():
    with pytest.raises(ValueError, match=r"has the fields text: conversations have"):
        rows.find_format([{"text": "Hi"}], "the file")
    with pytest.raises(ValueError, match="the file has no rows"):
        rows.find_format([], "the file")
