"""Special tokens (end, begin, padding) from a model's own files."""

import functools
import json
import re

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from tests.train.program import assert_refuses
from tests.train.tokenization.test_tokenizer import train_sentencepiece
from train.cli import command_line
from train.config.presets import PRESETS
from train.data import dataset as data
from train.tokenization.special_tokens import SpecialTokens
from train.tokenization.tokenizer import Tokenizer

WORDS = ["<unk>", "<s>", "</s>", "<|im_end|>", "<pad>", "call", "me"]
UNK, BEGIN, END, CHAT_END, PAD, CALL, ME = range(len(WORDS))


def object_of(name):
    return {"__type": "AddedToken", "content": name, "special": True, "lstrip": False}


def write_model(directory, files, begin=None, special=WORDS[:5], words=WORDS):
    """Word-level tokenizer with the files; begin: the token put before texts."""
    raw = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(list(special))
    if begin is not None:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, raw.token_to_id(begin))]
        )
    raw.save(str(directory / "tokenizer.json"))
    for name, entries in files.items():
        content = entries if isinstance(entries, str) else json.dumps(entries)
        (directory / name).write_text(content)


GENERATION, TOKENIZER = "generation_config.json", "tokenizer_config.json"
MAP, CONFIG = "special_tokens_map.json", "config.json"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # Common names, where no file names a token.
        ({}, SpecialTokens((END,), BEGIN)),
        ({CONFIG: {"eos_token_id": CHAT_END}}, SpecialTokens((CHAT_END,))),
        (
            {CONFIG: {"eos_token_id": 3, "bos_token_id": 0, "pad_token_id": 3}},
            SpecialTokens((3,), 0, 3),
        ),
        (
            {CONFIG: {"eos_token_id": [3, 2], "bos_token_id": None}},
            SpecialTokens((3, 2)),
        ),
        ({TOKENIZER: {"eos_token": "<|im_end|>"}}, SpecialTokens((CHAT_END,))),
        (
            {TOKENIZER: {"eos_token": object_of("<|im_end|>"), "pad_token": "<pad>"}},
            SpecialTokens((CHAT_END,), None, PAD),
        ),
        ({MAP: {"eos_token": object_of("<pad>")}}, SpecialTokens((PAD,))),
        # The first file that names a token decides; others may name other tokens.
        (
            {
                CONFIG: {"eos_token_id": 4, "bos_token_id": 1, "pad_token_id": 0},
                TOKENIZER: {"eos_token": "</s>", "pad_token": None},
                GENERATION: {"eos_token_id": [3, 2, 3], "temperature": 0.5},
            },
            SpecialTokens((3, 2), 1, 0),
        ),
        # A missing token, in all forms that programs have written.
        (
            {
                GENERATION: {"eos_token_id": None},
                TOKENIZER: {"eos_token": "", "bos_token": None},
                MAP: {},
                CONFIG: {"eos_token_id": [], "pad_token_id": -1},
            },
            SpecialTokens((END,), BEGIN),
        ),
    ],
)
def test_the_files_beside_a_tokenizer_are_asked(tmp_path, files, expected):
    write_model(tmp_path, files)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = Tokenizer.open(str(path))
        assert tokenizer.special == expected
        assert tokenizer.end_of_text == expected.ends[0]
        assert not tokenizer.begins_texts


def test_files_beside_a_tokenizer_of_another_name_are_not_its_own(tmp_path):
    write_model(tmp_path, {CONFIG: {"eos_token_id": CHAT_END}})
    other = (tmp_path / "tokenizer.json").rename(tmp_path / "other.json")
    assert Tokenizer.open(str(other)).end_of_text == END


def test_weights_without_a_tokenizer_name_the_tokens_of_one_from_elsewhere(tmp_path):
    weights, other = tmp_path / "weights", tmp_path / "other"
    for directory in (weights, other):
        directory.mkdir()
    (weights / CONFIG).write_text(json.dumps({"eos_token_id": CHAT_END}))
    write_model(other, {})
    assert Tokenizer.open(str(other), weights).end_of_text == CHAT_END
    path = str(other / "tokenizer.json")
    assert Tokenizer.open(path, weights).end_of_text == CHAT_END
    # With an own tokenizer, its ids are unrelated to the other's.
    write_model(weights, {})
    assert Tokenizer.open(str(other), weights).end_of_text == END


@pytest.mark.parametrize("content", ["[1, 2]", "{", "\ufeff[]", "null", "[" * 100_000])
@pytest.mark.parametrize("name", [GENERATION, TOKENIZER, MAP, CONFIG])
def test_damaged_files_are_named(tmp_path, name, content):
    write_model(tmp_path, {name: content})
    with pytest.raises(ValueError, match=name):
        Tokenizer.open(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        (CONFIG, {"eos_token_id": 7}, "has no token 7: its ids are 0 to 6"),
        (CONFIG, {"eos_token_id": [2, 99]}, "no token 99"),
        (CONFIG, {"eos_token_id": -3}, "no token -3"),
        (CONFIG, {"eos_token_id": 2**70}, "no token 1180591620717411303424"),
        (CONFIG, {"eos_token_id": "2"}, "eos_token_id='2' must be the id"),
        (CONFIG, {"eos_token_id": 2.0}, "eos_token_id=2.0 must be the id"),
        (CONFIG, {"eos_token_id": True}, "eos_token_id=True must be the id"),
        (CONFIG, {"eos_token_id": [[2]]}, r"eos_token_id=\[\[2\]\] must be"),
        (CONFIG, {"eos_token_id": {"a": 1}}, "eos_token_id={'a': 1} must be"),
        (GENERATION, {"bos_token_id": 31}, "bos_token_id=31, but .* no token 31"),
        (GENERATION, {"pad_token_id": 31}, "pad_token_id=31, but .* no token 31"),
        (TOKENIZER, {"eos_token": "<eot>"}, "eos_token='<eot>' is not in"),
        (TOKENIZER, {"eos_token": 2}, "eos_token=2 must be a token"),
        (TOKENIZER, {"eos_token": {"text": "</s>"}}, "must be a token"),
        (TOKENIZER, {"eos_token": ["</s>"]}, "must be a token"),
        (TOKENIZER, {"bos_token": "<eot>"}, "bos_token='<eot>' is not in"),
        (MAP, {"pad_token": "<eot>"}, "pad_token='<eot>' is not in"),
    ],
)
def test_tokens_that_the_vocabulary_does_not_have_are_refused(
    tmp_path, name, entries, message
):
    write_model(tmp_path, {name: entries})
    with pytest.raises(ValueError, match=message) as raised:
        Tokenizer.open(str(tmp_path))
    assert str(tmp_path / name) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "begin", "expected"),
    [
        ({}, None, False),
        ({}, "<s>", True),
        ({"add_bos_token": False}, "<s>", False),
        ({"bos_token": "<s>", "add_bos_token": True}, None, True),
        ({"bos_token": "<s>", "tokenizer_class": "LlamaTokenizerFast"}, None, False),
    ],
)
def test_whether_texts_begin_with_a_token_is_read(tmp_path, settings, begin, expected):
    write_model(tmp_path, {TOKENIZER: {"eos_token": "</s>", **settings}}, begin)
    tokenizer = Tokenizer.open(str(tmp_path))
    assert tokenizer.begins_texts == expected
    assert tokenizer.encode("call me") == [CALL, ME]
    assert tokenizer.prompt("call me") == [*[BEGIN] * expected, CALL, ME]


def test_files_of_another_tokenizer_are_refused_behind_one_that_fits(tmp_path):
    files = {GENERATION: {"eos_token_id": 0}, TOKENIZER: {"eos_token": "<eot>"}}
    write_model(tmp_path, files)
    with pytest.raises(ValueError, match="eos_token='<eot>' is not in"):
        Tokenizer.open(str(tmp_path))


def test_whether_texts_begin_with_a_token_is_yes_or_no(tmp_path):
    write_model(tmp_path, {TOKENIZER: {"add_bos_token": "yes"}})
    with pytest.raises(ValueError, match=f"{tmp_path}: add_bos_token='yes' must be"):
        Tokenizer.open(str(tmp_path))


def test_a_chat_models_end_is_never_spelled_by_text(tmp_path):
    """Even if its tokenizer.json does not mark the token as special."""
    write_model(tmp_path, {TOKENIZER: {"eos_token": "<|im_end|>"}}, special=["<unk>"])
    words = [*WORDS[:3], *WORDS[4:]]  # an added token outside the vocabulary
    raw = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_tokens(["<|im_end|>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.open(str(tmp_path))
    end = tokenizer.end_of_text
    assert tokenizer.name(end) == "<|im_end|>"
    assert end not in tokenizer.encode("call <|im_end|> me")
    assert tokenizer.decode([*tokenizer.encode("me"), end]) == "me"


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("was", [None, "<s>"])
def test_a_saved_tokenizer_marks_texts_as_training_did(tmp_path, begin, end, was):
    write_model(
        tmp_path,
        {
            TOKENIZER: {"chat_template": "{{ it }}", "auto_map": {"x": "y"}},
            GENERATION: {"eos_token_id": [3, 2], "bos_token_id": 1, "top_p": 0.9},
        },
        was,
    )
    tokenizer = Tokenizer.open(str(tmp_path))
    tokenizer.mark_documents(begin=begin, end=end)
    assert tokenizer.document_start == [BEGIN] * begin
    assert tokenizer.document_end == [CHAT_END] * end
    assert tokenizer.stops == (3, 2, *[BEGIN] * begin)
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)

    raw = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    assert raw.encode("call me").ids == tokenizer.prompt("call me")
    assert raw.encode("call", "me").ids == [
        *[BEGIN] * begin,
        CALL,
        *[BEGIN] * begin,
        ME,
    ]
    settings = json.loads((saved / TOKENIZER).read_text())
    assert settings == {
        "chat_template": "{{ it }}",
        "add_bos_token": begin,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "bos_token": "<s>",
    }
    generation = json.loads((saved / GENERATION).read_text())
    # Without an end token, the begin token of the next document stops generation.
    ends = [3, 2] if end or not begin else [3, 2, 1]
    assert generation == {"eos_token_id": ends, "bos_token_id": 1, "top_p": 0.9}
    again = Tokenizer.load(saved)
    assert (again.stops, again.prompt("me")) == (
        tokenizer.stops,
        tokenizer.prompt("me"),
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], [5, 2, 6, 6, 2]),
        (["--bos"], [1, 5, 1, 6, 6]),
        (["--bos-and-eos"], [1, 5, 2, 1, 6, 6, 2]),
    ],
)
def test_documents_are_marked_as_the_weights_know_them(tmp_path, flags, expected):
    write_model(tmp_path, {CONFIG: {"eos_token_id": END, "bos_token_id": BEGIN}}, "<s>")
    text = tmp_path / "text.jsonl"
    # The last document is held out.
    documents = ["call", "me me", "call"]
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    flags = [*flags, "--data-glob", str(text), "--tokenizer", str(tmp_path)]
    flags += ["--held-out-fraction", "0.3", "--sequence-length-tokens", "4"]
    flags += ["--batch-size-sequences", "1"]
    config = command_line.parse(PRESETS, "tiny", "", flags)
    opened = data.open_text(config.data, 10, seed=0)
    batches = opened.train_batches()
    batch = next(batches)
    batches.close()
    assert batch["inputs"].tolist() == [expected[:4]]
    assert batch["targets"].tolist() == [expected[1:5]]


def test_documents_cannot_be_marked_in_two_ways(tmp_path, capsys):
    main = functools.partial(command_line.parse, PRESETS, "tiny", "")
    assert_refuses(main, capsys, ["--bos", "--bos-and-eos"], "--bos and --bos-and-eos")


def test_offsets_are_kept_where_the_beginning_is_not(tmp_path):
    tokenizer = Tokenizer.train(["call me"], 300)
    raw = tokenizer._backend._tokenizer
    raw.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
            ),
        ]
    )
    for begin, kinds in [(False, ["ByteLevel"]), (True, ["TemplateProcessing"])]:
        tokenizer.special = SpecialTokens((0,), 0)
        tokenizer.mark_documents(begin=begin, end=True)
        tokenizer.save(tmp_path)
        entry = json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"]
        assert entry.get("processors", [entry])[-1]["type"] == kinds[0]
        assert entry.get("processors", [entry])[0] == {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": False,
            "use_regex": True,
        }


def test_a_chat_template_in_a_file_of_its_own_is_kept(tmp_path):
    write_model(tmp_path, {"chat_template.jinja": "{{ of the file }}"})
    tokenizer = Tokenizer.open(str(tmp_path))
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / TOKENIZER).read_text())
    assert settings["chat_template"] == "{{ of the file }}"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8 text"):
        Tokenizer.open(str(tmp_path))


def test_no_beginning_is_invented(tmp_path):
    write_model(tmp_path, {TOKENIZER: {"eos_token": "</s>"}})
    tokenizer = Tokenizer.open(str(tmp_path))
    with pytest.raises(ValueError, match=r"begins a text \(BOS\): leave out --bos"):
        tokenizer.mark_documents(begin=True, end=True)


def test_sentencepiece_with_tokens_added_to_it(tmp_path):
    train_sentencepiece(tmp_path).rename(tmp_path / "tokenizer.model")
    settings = {
        "eos_token": "<|im_end|>",
        "bos_token": "<s>",
        "add_bos_token": True,
        "added_tokens_decoder": {
            "1": object_of("<s>"),
            "200": object_of("<|im_start|>"),
            "201": object_of("<|im_end|>"),
        },
    }
    (tmp_path / TOKENIZER).write_text(json.dumps(settings))
    tokenizer = Tokenizer.open(str(tmp_path))
    assert tokenizer.vocabulary_size == 202
    assert tokenizer.special == SpecialTokens((201,), 1)
    assert tokenizer.prompt("me") == [1, *tokenizer.encode("me")]
    assert tokenizer.decode([*tokenizer.encode("me"), 201]) == "me"
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.special == tokenizer.special
    assert (again.vocabulary_size, again.begins_texts) == (202, True)


@pytest.mark.parametrize(
    "added", [[1], {"a": "<x>"}, {"200": 3}, {"200": {"text": "<x>"}}, "x"]
)
def test_added_tokens_of_another_form_are_refused(tmp_path, added):
    train_sentencepiece(tmp_path).rename(tmp_path / "tokenizer.model")
    (tmp_path / TOKENIZER).write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: added_tokens_deco"):
        Tokenizer.open(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        (TOKENIZER, {"added_tokens_decoder": {"2": object_of("<s>")}}, "it at 1"),
        (
            TOKENIZER,
            {"added_tokens_decoder": {"2": object_of("<|eot|>")}},
            "'<|eot|>' the id 2, but the tokenizer has '</s>' there",
        ),
        ("added_tokens.json", {"<s>": 2}, "gives '<s>' the id 2"),
        ("added_tokens.json", {"[PAD]": "7"}, "'[PAD]' must have an id, got '7'"),
        ("added_tokens.json", {"[PAD]": -1}, "must have an id, got -1"),
        ("added_tokens.json", {"[PAD]": True}, "must have an id, got True"),
    ],
)
@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_added_tokens_of_another_model_are_refused(
    tmp_path, kind, file, entries, message
):
    if kind == "json":
        write_model(tmp_path, {})
    else:
        train_sentencepiece(tmp_path).rename(tmp_path / "tokenizer.model")
    (tmp_path / file).write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        Tokenizer.open(str(tmp_path))
    assert str(tmp_path / file) in str(raised.value)


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_added_tokens_follow_on_the_vocabulary(tmp_path, kind):
    if kind == "json":
        write_model(tmp_path, {})
        size = len(WORDS)
    else:
        train_sentencepiece(tmp_path).rename(tmp_path / "tokenizer.model")
        size = 200
    added = {"<|im_end|>": size, "[PAD]": size + 1, "<s>": 1}
    if kind == "json":
        added["<|im_end|>"] = CHAT_END
        added["[PAD]"] = size
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    names = {"eos_token": "<|im_end|>", "pad_token": "[PAD]"}
    (tmp_path / MAP).write_text(json.dumps(names))
    tokenizer = Tokenizer.open(str(tmp_path))
    assert tokenizer.special.ends == (added["<|im_end|>"],)
    assert tokenizer.special.padding == added["[PAD]"] == tokenizer.vocabulary_size - 1
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.special == tokenizer.special
    assert again.vocabulary_size == tokenizer.vocabulary_size


def test_without_a_word_a_llama_class_begins_its_texts(tmp_path):
    train_sentencepiece(tmp_path).rename(tmp_path / "tokenizer.model")
    for name, expected in [("LlamaTokenizer", True), ("T5Tokenizer", False)]:
        (tmp_path / TOKENIZER).write_text(json.dumps({"tokenizer_class": name}))
        assert Tokenizer.open(str(tmp_path)).begins_texts == expected
