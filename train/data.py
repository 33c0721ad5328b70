"""From text files to batches of token ids.

Documents are joined by an end-of-text token, the end of the whole is held out, a
byte-level BPE is trained on the rest, and both parts are cut into windows that
overlap by one token: the target of a window's last input is the first input of the
next one, so that every token but the very first is predicted exactly once.
"""

import dataclasses
import glob
import gzip
import pathlib
from collections.abc import Iterator

import grain
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from train.config import DataConfig

EMBEDDED_TEXT = pathlib.Path(__file__).parent / "corpus" / "moby-dick.txt.gz"
END_OF_TEXT = "<|endoftext|>"
# All bytes, so that any text can be written, and END_OF_TEXT.
SMALLEST_VOCABULARY = 257

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text as tokens, split into the part to train on and the part held out."""

    tokenizer: tokenizers.Tokenizer
    train_tokens: np.ndarray  # (train tokens,), int32
    held_out_tokens: np.ndarray  # (held-out tokens,), int32


def load_corpus(config: DataConfig, vocabulary_size: int) -> Corpus:
    """Reads, splits and tokenizes the text.

    Args:
      config: which text, and how much of it to hold out.
      vocabulary_size: most tokens to learn; a small text may yield fewer.

    Raises:
      ValueError: no file matches, a file is not UTF-8, the vocabulary is too small
        for the bytes, or the text is too short to train or to evaluate on.
      OSError: a file cannot be read.
    """
    if vocabulary_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"--vocabulary-size must be at least {SMALLEST_VOCABULARY}, "
            f"got {vocabulary_size}"
        )
    text = END_OF_TEXT.join(_read_documents(config.data_glob))
    split = round(len(text) * (1 - config.held_out_fraction))
    tokenizer = _train_tokenizer(text[:split], vocabulary_size)
    train_tokens, held_out_tokens = (
        np.array(encoding.ids, np.int32)
        for encoding in tokenizer.encode_batch([text[:split], text[split:]])
    )
    batch_tokens = config.batch_size_tokens
    if len(train_tokens) <= batch_tokens or len(held_out_tokens) < 2:
        raise ValueError(
            f"the text is too short: {len(train_tokens)} tokens to train on and "
            f"{len(held_out_tokens)} held out, where a batch needs {batch_tokens + 1} "
            "and an evaluation 2; give more text or smaller batches"
        )
    return Corpus(tokenizer, train_tokens, held_out_tokens)


def train_batches(
    corpus: Corpus, config: DataConfig, seed: int
) -> grain.DatasetIterator[Batch]:
    """Batches without end: every window once per epoch, in an order of its own.

    Each batch holds `inputs` and `targets`, (batch, length) int32, and an all-true
    `mask`. The order depends on the seed only.
    """
    windows = _Windows(
        corpus.train_tokens, config.sequence_length_tokens, keep_rest=False
    )
    dataset = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    batches = dataset.batch(config.batch_size_sequences, drop_remainder=True)
    return iter(batches.to_iter_dataset())


def held_out_batches(corpus: Corpus, config: DataConfig) -> Iterator[Batch]:
    """The whole held-out text, once and in order; see `train_batches`.

    The mask is False behind the end of the text, where the last batch is padded to
    the shape of the others.
    """
    length, rows = config.sequence_length_tokens, config.batch_size_sequences
    windows = _Windows(corpus.held_out_tokens, length, keep_rest=True)

    def pad(batch: Batch) -> Batch:
        missing = rows - len(batch["inputs"])
        return {k: np.pad(v, ((0, missing), (0, 0))) for k, v in batch.items()}

    return iter(grain.MapDataset.source(windows).batch(rows).map(pad))


class _Windows:
    """A random-access source of (inputs, targets, mask) for grain."""

    def __init__(self, tokens: np.ndarray, length: int, keep_rest: bool):
        self._tokens = tokens
        self._length = length
        predicted = len(tokens) - 1
        self._count = -(-predicted // length) if keep_rest else predicted // length

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Batch:
        length = self._length
        window = self._tokens[index * length : (index + 1) * length + 1]
        missing = length + 1 - len(window)
        window = np.pad(window, (0, missing))
        mask = np.arange(length) < length - missing
        return {"inputs": window[:-1], "targets": window[1:], "mask": mask}


def _read_documents(pattern: str | None) -> list[str]:
    if pattern is None:
        paths = [EMBEDDED_TEXT]
    else:
        found = map(pathlib.Path, glob.glob(pattern, recursive=True))
        paths = sorted(path for path in found if path.is_file())
        if not paths:
            raise ValueError(f"no file matches --data-glob {pattern!r}")
    documents = []
    for path in paths:
        data = path.read_bytes()
        try:
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
        if text.strip():
            documents.append(text)
    if not documents:
        raise ValueError(f"no text in {', '.join(map(str, paths))}")
    return documents


def _train_tokenizer(text: str, vocabulary_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split(END_OF_TEXT), trainer)
    return tokenizer
