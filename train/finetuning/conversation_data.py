"""Conversations of a run: rows of files or a dataset, split, encoded, counted."""

import itertools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from train.config.sft_config import ConversationConfig
from train.conversations import encoded, rows
from train.conversations.chat_template import ChatTemplate
from train.conversations.encoded import Conversations
from train.conversations.rows import Message
from train.data import sources
from train.data.row_files import Row, read_rows
from train.finetuning.tables import load_dataset

_NO_DATA = (
    "there is nothing to train on: give conversations (--data-glob 'chats/*.jsonl'), "
    "or a dataset (--dataset tatsu-lab/alpaca)"
)


class ConversationData(NamedTuple):
    """Encoded conversations for training and evaluation.

    Attributes:
      train: those to train on.
      held_out: those to evaluate on.
      description: rows used, cut, dropped and bad, in one line.
    """

    train: Conversations
    held_out: Conversations
    description: str


class _Read(NamedTuple):
    """Conversations, and why others of their rows are none."""

    conversations: list[list[Message]]
    bad: dict[str, int]


def open_data(
    data: ConversationConfig,
    template: ChatTemplate,
    seed: int,
    report: Callable[[str], None],
) -> ConversationData:
    """Reads, splits and encodes the conversations of a run.

    Raises:
      ValueError: there are none, or a row is bad and bad rows are not skipped.
      OSError: a file or the dataset cannot be read.
    """
    splits = {"train": _read(data, *_training_rows(data))}
    if data.eval_glob is None:
        splits["train"], splits["held out"] = _hold_out(
            splits["train"], data.held_out_fraction, seed
        )
    else:
        where = f"--eval-glob {data.eval_glob}"
        rows_of_eval = _rows_of_files(data.eval_glob, "--eval-glob")
        splits["held out"] = _read(data, rows_of_eval, where)
    found = {}
    for name, read in splits.items():
        found[name] = encoded.encode(
            name,
            read.conversations,
            template,
            data.loss_on,
            data.sequence_length_tokens,
        )
        _check(data, found[name], len(read.conversations))
    bad = _counts(
        *(each.bad for each in splits.values()),
        *(each.refused for each in found.values()),
    )
    _report_cut(data, list(found.values()), report)
    return ConversationData(
        found["train"], found["held out"], _describe(list(found.values()), bad)
    )


def _training_rows(data: ConversationConfig) -> tuple[list[Row], str]:
    """Rows to train on, and where they are from."""
    if data.data_glob is not None:
        found = _rows_of_files(data.data_glob, "--data-glob")
        return found, f"--data-glob {data.data_glob}"
    if data.dataset is None:
        raise ValueError(_NO_DATA)
    flags = f"--dataset {data.dataset}"
    if data.dataset_config:
        flags += f" --dataset-config {data.dataset_config}"
    place = pathlib.Path(data.dataset).expanduser()
    name = str(place) if place.is_dir() else data.dataset
    splits = load_dataset(name, data.dataset_config, data.dataset_revision, flags)
    if data.dataset_split not in splits:
        raise ValueError(
            f"{flags} has no split {data.dataset_split!r}: it has "
            f"{', '.join(splits)}; choose one with --dataset-split"
        )
    return splits[data.dataset_split].rows, flags


def _rows_of_files(pattern: str, flag: str) -> list[Row]:
    tables = [
        read_rows(path, f"{flag} {path}") for path in sources.find_files(pattern, flag)
    ]
    return list(itertools.chain.from_iterable(each.rows for each in tables))


def _read(data: ConversationConfig, given: list[Row], where: str) -> _Read:
    form = data.format
    if form == "auto":
        form = rows.find_format(given, where)
    found = rows.read(given, form)
    if found.bad and not data.skip_bad_rows:
        reason = next(iter(found.bad))
        count = sum(found.bad.values())
        raise ValueError(
            f"row {found.first_bad:,} of {where}: {reason}; {count:,} of {len(given):,}"
            f" rows are no conversations ({_listed(found.bad)}): correct them, or leave"
            " them out with --skip-bad-rows"
        )
    return _Read(found.conversations, found.bad)


def _hold_out(read: _Read, fraction: float, seed: int) -> tuple[_Read, _Read]:
    """Splits conversations at random, at least one to each side."""
    count = len(read.conversations)
    if count < 2:
        raise ValueError(
            f"there are {count} conversations ({_listed(read.bad) or 'no bad rows'}): "
            "at least two are needed, one of them to evaluate on"
        )
    held_out = min(max(1, round(fraction * count)), count - 1)
    order = np.random.default_rng(seed).permutation(count)
    parts = np.sort(order[held_out:]), np.sort(order[:held_out])
    training, evaluation = ([read.conversations[i] for i in part] for part in parts)
    return _Read(training, read.bad), _Read(evaluation, {})


def _check(data: ConversationConfig, found: Conversations, given: int) -> None:
    if found.refused and not data.skip_bad_rows:
        raise ValueError(
            f"{sum(found.refused.values()):,} of {given:,} conversations do not fit "
            f"--template {data.template} ({_listed(found.refused)}): give another one, "
            "or leave them out with --skip-bad-rows"
        )
    if not len(found):
        bad = f", {_listed(found.refused)}" if found.refused else ""
        raise ValueError(
            f"none of the {given:,} conversations ({found.name}) can be used: "
            f"{found.dropped:,} have no token that the loss counts within "
            f"--sequence-length-tokens {data.sequence_length_tokens}{bad}; raise it"
        )


def _report_cut(
    data: ConversationConfig, found: list[Conversations], report: Callable[[str], None]
) -> None:
    dropped = sum(each.dropped for each in found)
    total = dropped + sum(map(len, found))
    if dropped > total / 10:
        report(
            f"{dropped:,} of {total:,} conversations were dropped, as no answer begins "
            f"within --sequence-length-tokens {data.sequence_length_tokens}"
        )


def _describe(found: list[Conversations], bad: dict[str, int]) -> str:
    used = ", ".join(f"{len(each):,} {each.name}" for each in found)
    cut, dropped = (
        sum(getattr(each, name) for each in found) for name in ("cut", "dropped")
    )
    text = f"{used}; {cut:,} cut, {dropped:,} dropped"
    if bad:
        text += f", {sum(bad.values()):,} bad ({_listed(bad)})"
    return text


def _counts(*each: dict[str, int]) -> dict[str, int]:
    total: dict[str, int] = {}
    for counts in each:
        for reason, count in counts.items():
            total[reason] = total.get(reason, 0) + count
    return total


def _listed(counts: dict[str, int]) -> str:
    by_count = sorted(counts.items(), key=lambda item: -item[1])
    shown = [f"{reason}: {count:,}" for reason, count in by_count[:6]]
    rest = [f"{len(by_count) - 6} more reasons"] if len(by_count) > 6 else []
    return ", ".join(shown + rest)
