"""Text of local files, tokenized once and cached: to train on, and to evaluate on."""

import functools
import pathlib

from train.config.data_config import DataConfig
from train.data import packing, sources
from train.data.encoding import Documents
from train.data.local_text import Corpus
from train.data.notes import Notes
from train.data.sources import LocalText
from train.data.text import OpenTokenizer, Report, Text, describe_held_out
from train.data.token_cache import TokenCache
from train.data.token_files import Tokens
from train.tokenization.tokenizer import Tokenizer


class Files:
    """Finds and tokenizes local files, through the token cache.

    Args:
      config: which files, and how to read them.
      report: called with what a user should know.
      is_first: False for other processes than the first, which report nothing.
    """

    def __init__(self, config: DataConfig, report: Report, *, is_first: bool):
        self.report = report if is_first else _discard
        self._config, self._is_first = config, is_first
        self._cache = TokenCache(config.token_cache_dir, self.report)

    def find(self, pattern: str | None, name: str) -> list[pathlib.Path]:
        """Paths that match a pattern; reports files that are left out."""
        notes = Notes()
        paths = sources.find_files(pattern, name, notes)
        for line in notes.lines():
            self.report(f"{name} {pattern!r}: {line}")
        return paths

    def corpus(self, paths: list[pathlib.Path], held_out_fraction: float = 0) -> Corpus:
        """The text of files, of which the last part is held out."""
        config = self._config
        text = LocalText(paths, config.text_field, config.skip_bad_documents)
        return Corpus(text, held_out_fraction)

    def train_tokenizer(self, corpus: Corpus, vocabulary_size: int) -> Tokenizer:
        """A new tokenizer of the corpus, or the one in the cache."""
        return corpus.train_tokenizer(vocabulary_size, self._cache)

    def tokens(self, corpus: Corpus, tokenizer: Tokenizer) -> Tokens:
        """The corpus as tokens, from the cache if they are there."""
        found = corpus.tokens(tokenizer, self._cache, progress=self._is_first)
        for note in found.notes:
            self.report(note)
        return found

    def evaluation(self, tokenizer: Tokenizer) -> Documents | None:
        """The documents of --eval-glob; None if it is not given."""
        if self._config.eval_glob is None:
            return None
        paths = self.find(self._config.eval_glob, "--eval-glob")
        return self.tokens(self.corpus(paths), tokenizer).train


def _discard(message: str) -> None:
    pass


def open_file_text(
    config: DataConfig,
    open_tokenizer: OpenTokenizer,
    seed: int,
    part: slice,
    files: Files,
) -> Text:
    """Opens the text of `--data-glob`; see `dataset.open_text`.

    Args:
      config: which text, and how to cut it.
      open_tokenizer: opens the tokenizer, or trains one.
      seed: decides the order of the rows.
      part: rows of each batch for this process.
      files: finds and tokenizes the files.
    """
    paths = files.find(config.data_glob, "--data-glob")
    if config.eval_glob is None:
        corpus = files.corpus(paths, config.held_out_fraction)
    else:
        corpus = files.corpus(_without_evaluation(paths, config, files.report))
    tokenizer = open_tokenizer(functools.partial(files.train_tokenizer, corpus))
    tokens = files.tokens(corpus, tokenizer)
    evaluation = files.evaluation(tokenizer)
    train = packing.all_rows(tokens.train, config)
    held_out = packing.first_rows(
        tokens.held_out if evaluation is None else evaluation, config
    )
    all_tokens = len(tokens.train.tokens)
    if config.packing == "padded" and train.token_count < all_tokens:
        files.report(
            f"--packing padded leaves out {all_tokens - train.token_count:,} of "
            f"{all_tokens:,} tokens to train on: what documents have beyond "
            f"{config.sequence_length_tokens + 1}"
        )
    if len(train) < config.batch_size_sequences or not len(held_out):
        raise ValueError(
            f"the text is too short: with --packing {config.packing} it has "
            f"{len(train)} sequences to train on and {len(held_out)} held out, where a "
            f"batch needs {config.batch_size_sequences} and an evaluation 1; give more "
            "text, a smaller --batch-size-sequences, or another --held-out-fraction"
        )
    return Text(
        tokenizer,
        f"{train.token_count:,} tokens to train on, "
        + describe_held_out(held_out, tokenizer),
        seed,
        lambda seed: packing.shuffled_batches(train, config, seed, part),
        packing.ordered_batches(held_out, config, part),
        lambda state: state["next_index"] * config.batch_size_sequences / len(train),
    )


def _without_evaluation(
    paths: list[pathlib.Path], config: DataConfig, report: Report
) -> list[pathlib.Path]:
    """The files that are not evaluated on."""
    evaluated = sources.find_files(config.eval_glob, "--eval-glob")
    same = _contents(evaluated)
    contents = zip(paths, _contents(paths), strict=True)
    kept = [path for path, content in contents if content not in same]
    named = f"--data-glob {config.data_glob!r} and --eval-glob {config.eval_glob!r}"
    if not kept:
        raise ValueError(f"{named} match the same files: there are none to train on")
    if left_out := len(paths) - len(kept):
        files = "a file" if left_out == 1 else f"{left_out:,} files"
        report(f"{named} both match {files}, or copies, which are not trained on")
    return kept


def _contents(paths: list[pathlib.Path]) -> list[tuple[int, int]]:
    """Size and checksum of each file, which copies and links share."""
    return [(each["bytes"], each["crc32"]) for each in sources.fingerprint(paths)]
