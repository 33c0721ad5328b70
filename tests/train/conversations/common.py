"""A byte-level tokenizer with special tokens of chats, and its weights."""

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
UNKNOWN, BEGIN, END, CHAT_START, CHAT_END = range(5)
# As SmolLM2's: begins with a system message of its own, trims nothing.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' "
    "%}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(directory, **settings):
    """Merges of a few words, so that tokens cross the borders of messages."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("H", "i"), ("Ċ", "Ċ"), ("o", "k")]
    vocabulary = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({name: i for i, name in enumerate(vocabulary)}, merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    entries = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    entries |= {"add_bos_token": True} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(entries))
    return directory
