"""JSON lines files of a run: append rows, drop rows of repeated steps on resume."""

import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from train.system import console, files, processes


class JsonLines:
    """JSON lines file: one row per line, on file when `append` returns.

    When opened, keeps rows up to `last_step`. Later rows, whose steps will be repeated,
    and invalid lines are moved to the end of `NAME.dropped.jsonl`. With several
    processes all have the rows and the first writes the file.

    Args:
      path: the file.
      last_step: the last step whose rows are kept.
      is_row: checks a JSON object with a step and numbers or strings; False: the line
        is invalid.

    Raises:
      OSError: a file cannot be read or written.
    """

    def __init__(
        self,
        path: pathlib.Path,
        last_step: int,
        is_row: Callable[[dict[str, Any]], bool] = lambda row: True,
    ):
        self._path = path
        kept, later, strange = [], [], []
        for line, row in _parsed(path):
            if row is None or not is_row(row):
                strange.append(line)
            elif row["step"] > last_step:
                later.append(line)
            else:
                kept.append((line, row))
        kept.sort(key=lambda pair: pair[1]["step"])
        self.rows = [row for _, row in kept]
        if processes.is_first():
            self._move(later, strange, last_step)
            content = _joined([line for line, _ in kept])
            if not path.exists() or path.read_bytes() != content:
                files.write_whole(path, content)

    def append(self, *rows: dict[str, Any]) -> None:
        """Appends rows; each has a `step`."""
        if processes.is_first():
            files.append_whole(self._path, "".join(map(_line, rows)))
        self.rows += rows

    def sync(self) -> None:
        """Flushes the rows to disk."""
        if processes.is_first():
            files.sync(self._path)

    def _move(self, later: list[bytes], strange: list[bytes], last_step: int) -> None:
        """Appends lines to the file of dropped lines, with a warning."""
        if not (later or strange):
            return
        target = self._path.with_name(f"{self._path.stem}.dropped{self._path.suffix}")
        files.append_lines(target, _joined(later + strange))
        reasons = []
        if later:
            steps = f"steps after {last_step}" if last_step > 0 else "all steps"
            reasons.append(f"{_count(later, 'row')} of {steps}, which are repeated")
        if strange:
            reasons.append(f"{_count(strange, 'invalid line')}")
        console.warn(f"{self._path}: moved {' and '.join(reasons)}, to {target}")


def _parsed(path: pathlib.Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yields each line that is not blank with its row, or None if it is invalid."""
    for line in path.read_bytes().splitlines() if path.exists() else []:
        if stripped := line.strip():
            yield stripped, _row(stripped)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    # type, not isinstance, which accepts True as a number.
    if not {type(value) for value in row.values()} <= {int, float, str, type(None)}:
        return None
    step = row.get("step")
    if type(step) is not int or step < 0:
        return None
    return {k: math.nan if v is None else v for k, v in row.items()}


def _line(row: dict[str, Any]) -> str:
    def known(value):  # JSON has no NaN
        return value if isinstance(value, str) or math.isfinite(value) else None

    return json.dumps({name: known(value) for name, value in row.items()}) + "\n"


def _joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _count(lines: list[bytes], noun: str) -> str:
    return f"{len(lines):,} {noun}{'s' if len(lines) != 1 else ''}"
