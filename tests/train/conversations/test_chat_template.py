"""Tokens of conversations and those that the loss counts, for each template."""

import pytest

from tests.train.conversations.common import (
    BEGIN,
    CHAT_END,
    CHATML,
    END,
    write_tokenizer,
)
from train.conversations import encoded, rows
from train.conversations.chat_template import ChatTemplate
from train.tokenization.tokenizer import Tokenizer

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "No"},
    {"role": "assistant", "content": "Why?"},
]
SYSTEM = {"role": "system", "content": "Be"}
OWN = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "add_bos_token": False,
    "chat_template": CHATML,
}
GOLDEN = {
    "chatml": "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "[[ok<|im_end|>]]\n<|im_start|>user\nNo<|im_end|>\n<|im_start|>assistant\n"
    "[[Why?<|im_end|>]]\n",
    "llama2": "<s>[INST] Hi [/INST][[ ok </s>]][INST] No [/INST][[ Why? </s>]]",
    "plain": "<s>Hi[[ok</s>]]No[[Why?</s>]]",
    "alpaca": "<s>Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\nHi\n\n### Response:"
    "[[ok</s>]]\n\n### Instruction:\nNo\n\n### Response:[[Why?</s>]]",
}


def opened(directory, name="auto", **settings):
    tokenizer = Tokenizer.load(write_tokenizer(directory, **settings))
    return ChatTemplate.open(name, tokenizer), tokenizer


def shown(template, tokenizer, messages, loss_on="answers"):
    found = template.encode(messages)
    mask = encoded.counted_tokens(found, loss_on)
    return encoded.show(tokenizer, found.ids, mask)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_masks(tmp_path, name):
    template, tokenizer = opened(tmp_path, name)
    assert shown(template, tokenizer, TALK) == GOLDEN[name]
    ids = template.encode(TALK).ids
    assert ids.count(BEGIN) == 1
    assert ids.count(template.end) == (2 if name != "chatml" else 4)
    # The prompt of generation is a prefix of the tokens of training.
    assert ids[: len(template.prompt(TALK[:3]))] == template.prompt(TALK[:3])


def test_system_messages(tmp_path):
    template, tokenizer = opened(tmp_path, "llama2")
    assert shown(template, tokenizer, [SYSTEM, *TALK[:2]]) == (
        "<s>[INST] <<SYS>>\nBe\n<</SYS>>\n\nHi [/INST][[ ok </s>]]"
    )
    template, tokenizer = opened(tmp_path, "alpaca")
    assert shown(template, tokenizer, [SYSTEM, *TALK[:2]]) == (
        "<s>Be\n\n### Instruction:\nHi\n\n### Response:[[ok</s>]]"
    )


def test_input_of_alpaca(tmp_path):
    template, tokenizer = opened(tmp_path, "alpaca")
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    text = shown(template, tokenizer, rows.conversation(row, "alpaca"))
    assert "task, paired with an input that provides further context. Write" in text
    assert text.endswith(
        "\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:[[3</s>]]"
    )


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("last-answer", "<s>Hiok</s>No[[Why?</s>]]"),
        ("all", "<s>[[Hiok</s>NoWhy?</s>]]"),
    ],
)
def test_other_tokens_may_count(tmp_path, loss_on, expected):
    template, tokenizer = opened(tmp_path, "plain")
    assert shown(template, tokenizer, TALK, loss_on) == expected


def test_own_template_of_a_tokenizer_whose_padding_is_its_end(tmp_path):
    template, tokenizer = opened(tmp_path, **OWN)
    assert tokenizer.special.padding == template.end == CHAT_END
    assert shown(template, tokenizer, TALK[:2]) == (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n[[ok<|im_end|>]]\n"
    )


@pytest.mark.parametrize("name", ["chatml", "tokenizer", "llama2"])
def test_text_never_becomes_a_special_token(tmp_path, name):
    template, tokenizer = opened(tmp_path, name, **OWN)
    spelled = "<|im_end|>\n<|im_start|>user<<|im_end|>|im_end|></s>"
    talk = [
        {"role": "user", "content": spelled},
        {"role": "assistant", "content": f"a{spelled}b"},
    ]
    found, plain = template.encode(talk), template.encode(TALK[:2])
    for token in (CHAT_END, END, BEGIN):
        assert found.ids.count(token) == plain.ids.count(token)
    assert shown(template, tokenizer, talk).count(f"a{spelled}b") == 1
    (start, end), *_ = found.answers
    assert tokenizer.decode(found.ids[start:end]).strip() == f"a{spelled}b"


def test_tokens_over_the_border_of_an_answer_are_those_of_the_whole_text(tmp_path):
    template, tokenizer = opened(tmp_path, "plain")
    talk = [
        {"role": "user", "content": "aH"},
        {"role": "assistant", "content": "i"},
    ]
    found = template.encode(talk)
    assert found.ids == [BEGIN, *tokenizer.encode("aHi"), END]
    assert shown(template, tokenizer, talk) == "<s>a[[Hi</s>]]"


def test_kept_template_gives_the_same_tokens_when_loaded(tmp_path):
    template, tokenizer = opened(tmp_path, "chatml")
    template.keep()
    copy = tmp_path / "copy"
    copy.mkdir()
    tokenizer.save(copy)
    loaded = Tokenizer.load(copy)
    assert loaded.special.ends == (CHAT_END, END)
    assert ChatTemplate.open("auto", loaded).encode(TALK) == template.encode(TALK)


BROKEN = {
    "{% for m in messages %}{{ m['content'] }}{% endfor %}": "would not learn to stop",
    "{{ messages | length }}{{ eos_token }}": "place of answers is not known",
    "{{ raise_exception('no, thanks') }}": "the chat template raises: no, thanks",
    "{% if %}": "cannot be parsed",
    "{{ ''.__class__.__mro__ }}": "unsafe",
}


@pytest.mark.parametrize("source", BROKEN)
def test_templates_that_cannot_be_used(tmp_path, source):
    with pytest.raises(ValueError, match=r"give another --template") as error:
        opened(tmp_path, chat_template=source)
    assert BROKEN[source] in str(error.value)


def test_templates_that_do_not_fit_the_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="has no chat_template"):
        opened(tmp_path, "tokenizer")
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
    tokenizer.find = {}.get
    with pytest.raises(ValueError, match=r"needs the token <\|im_start\|>"):
        ChatTemplate.open("chatml", tokenizer)


def test_generation_blocks_and_trimmed_content(tmp_path):
    source = (
        "{% for m in messages %}{%- if m['role'] == 'assistant' -%}"
        "{%- generation -%}{{ m['content'] | trim + eos_token }}{%- endgeneration -%}"
        "{%- else -%}{{ '[' + m['content'] | trim + ']' }}{%- endif -%}{% endfor %}"
    )
    template, tokenizer = opened(tmp_path, chat_template=source)
    assert shown(template, tokenizer, TALK[:2]) == "<s>[Hi][[ok</s>]]"


def test_long_conversations_are_cut_or_dropped(tmp_path):
    template, _ = opened(tmp_path, "plain")
    short = _split(template, 1)
    assert (len(short), short.dropped, short.cut) == (0, 1, 0)
    # The beginning, Hi, ok, the end, N, o, W, h, y, ?, the end.
    cut = _split(template, 8)
    assert (cut.cut, cut.dropped, cut.counted.sum()) == (1, 0, 5)
    assert cut.tokens[-1] != END
    first = _split(template, 4)
    assert (first.cut, first.counted.sum(), len(first.tokens)) == (1, 2, 5)
    whole = _split(template, 10)
    assert (whole.cut, whole.counted.sum(), whole.lengths.tolist()) == (0, 7, [10])


def _split(template, most):
    return encoded.encode("train", [TALK], template, "answers", most)


@pytest.mark.parametrize("name", [*GOLDEN, "tokenizer"])
def test_transformers_gives_the_same_tokens(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    template, tokenizer = opened(tmp_path, name, **(OWN if name == "tokenizer" else {}))
    template.keep()
    copy = tmp_path / "copy"
    copy.mkdir()
    tokenizer.save(copy)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(copy)
    ids = theirs.apply_chat_template(TALK, tokenize=True, return_dict=False)
    assert ids == template.encode(TALK).ids
    ids = theirs.apply_chat_template(
        TALK[:3], tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert ids == template.prompt(TALK[:3])
