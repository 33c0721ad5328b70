"""A tokenizer of a few words, and files of rows, for tests of fine-tuning."""

import dataclasses
import functools
import json

import jax
import tokenizers
from safetensors import numpy
from tokenizers import models, normalizers, pre_tokenizers, processors

from models import encoder_weights, parameters
from models.encoder import Encoder
from models.encoder_config import EncoderConfig

WORDS = [
    *("the", "a", "film", "is", "was", "good", "bad", "great", "poor", "very", "not"),
    *("cat", "dog", "sat", "ran", "what", "cause", "happened", "as", "result", "?"),
    *(":", ".", '"', "happy", "sad", "plot", "story", "of", "and"),
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def write_tokenizer(directory):
    """BERT's arrangement: [CLS] text [SEP] pair [SEP], with types."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    directory.mkdir(parents=True, exist_ok=True)
    # As saved for a sentence encoder.
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding(length=6)
    tokenizer.save(str(directory / "tokenizer.json"))
    return vocabulary


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentiment_rows(count):
    """Sentences that one word decides, sorted by label as real files are."""
    good = [
        {"sentence": f"the film is very {w}", "label": 1} for w in ("good", "great")
    ]
    bad = [
        {"sentence": f"the plot was {w} and sad", "label": 0} for w in ("bad", "poor")
    ]
    return [good[i % 2] for i in range(count // 2)] + [
        bad[i % 2] for i in range(count - count // 2)
    ]


MODEL = EncoderConfig(
    "bert",
    40,
    16,
    32,
    num_layers=2,
    num_heads=2,
    num_positions=64,
    num_types=2,
    padding_id=0,
    dropout=0.1,
    init_std=0.1,
)


def write_encoder(directory, config=MODEL):
    """Random weights in Hugging Face's layout, with a tokenizer."""
    write_tokenizer(directory)
    classes = ("no", "yes")
    made = config if config.labels else dataclasses.replace(config, labels=classes)
    params = parameters.initial(functools.partial(Encoder, made), jax.random.key(1))
    files = [directory / "tokenizer.json"]
    encoder_weights.save(directory / "model", made, params, tokenizer_files=files)
    if not config.labels:
        path = directory / "model" / "config.json"
        entries = json.loads(path.read_text())
        entries["architectures"] = ["BertModel"]
        path.write_text(json.dumps(entries))
        path = directory / "model" / "model.safetensors"
        tensors = numpy.load_file(path)
        kept = {n: x for n, x in tensors.items() if not n.startswith("classifier")}
        numpy.save_file(kept, path, {"format": "pt"})
    return directory / "model"
