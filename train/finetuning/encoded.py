"""Encoded rows of a split: tokens, type ids, labels, groups."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from train.tokenization.pairs import Encoded


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of a split, ready to be put into batches.

    Attributes:
      name: train, validation_matched, ...
      tokens: (tokens,), int32; those of all inputs, one after the other.
      types: (tokens,), uint8; their type ids.
      ends: (rows * candidates,), int64; where each input ends.
      candidates: inputs per row.
      labels: (rows,); int32 class ids, -1 where there is no label; or float32 numbers,
        NaN where there is none.
      indices: the rows' own numbers, for submissions.
      groups: group of each row, or None.
      truncated: (rows,), bool; whether tokens of the row were left out.
    """

    name: str
    tokens: np.ndarray
    types: np.ndarray
    ends: np.ndarray
    candidates: int
    labels: np.ndarray
    indices: list[Any]
    groups: list[Any] | None
    truncated: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row's longest input."""
        sizes = np.diff(self.ends, prepend=0).reshape(-1, self.candidates)
        return sizes.max(axis=1, initial=0)

    @property
    def is_labelled(self) -> np.ndarray:
        """Whether each row has a label."""
        if self.labels.dtype == np.float32:
            return np.isfinite(self.labels)
        return self.labels >= 0

    def part(self, rows: np.ndarray, name: str) -> "Split":
        """Some of the rows, as another split."""
        inputs = (rows[:, None] * self.candidates + np.arange(self.candidates)).ravel()
        starts, ends = self.ends - np.diff(self.ends, prepend=0), self.ends
        places = [np.arange(starts[i], ends[i]) for i in inputs]
        chosen = np.concatenate([np.empty(0, np.int64), *places])
        sizes = (ends - starts)[inputs]
        return dataclasses.replace(
            self,
            name=name,
            tokens=self.tokens[chosen],
            types=self.types[chosen],
            ends=np.cumsum(sizes),
            labels=self.labels[rows],
            truncated=self.truncated[rows],
            indices=[self.indices[i] for i in rows],
            groups=None if self.groups is None else [self.groups[i] for i in rows],
        )

    def input(self, index: int) -> slice:
        """Place of an input's tokens."""
        return slice(self.ends[index - 1] if index else 0, self.ends[index])


def gather(
    name: str,
    encoded: Iterable[Encoded],
    candidates: int,
    labels: np.ndarray,
    indices: list[Any],
    groups: list[Any] | None,
) -> Split:
    """Collects encoded inputs."""
    ids, types, sizes, truncated = [], [], [], []
    for each in encoded:
        ids.append(np.array(each.ids, np.int32))
        types.append(np.array(each.types, np.uint8))
        sizes.append(len(each.ids))
        truncated.append(each.is_truncated)
    rows = np.array(truncated, bool).reshape(-1, candidates)
    return Split(
        name,
        np.concatenate([np.empty(0, np.int32), *ids]),
        np.concatenate([np.empty(0, np.uint8), *types]),
        np.cumsum(np.array(sizes, np.int64)),
        candidates,
        labels,
        indices,
        groups,
        rows.any(axis=1),
    )
