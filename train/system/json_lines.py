"""JSON lines of a run: appended row by row, and cleaned without loss on resume."""

import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from train.system import console, files, processes


class JsonLines:
    """Rows in a file, one JSON object a line, readable once `append` returns.

    Rows of an earlier process are kept up to a step. The others, whose steps are taken
    again, and lines that are no rows are moved to a file beside this one, to the end
    of what it holds. Of several processes all keep the rows and the first writes them.

    Args:
      path: the file.
      last_step: the last step that keeps its rows.
      is_row: whether a JSON object with a step and numbers or texts is a row of this
        file.

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
        """Adds rows, each with its `step`."""
        if processes.is_first():
            files.append_whole(self._path, "".join(map(_line, rows)))
        self.rows += rows

    def sync(self) -> None:
        """Flushes the rows to the disk, where they outlive a loss of power."""
        if processes.is_first():
            files.sync(self._path)

    def _move(self, later: list[bytes], strange: list[bytes], last_step: int) -> None:
        """Adds lines to the file of those that were moved, and reports it."""
        if not (later or strange):
            return
        target = self._path.with_name(f"{self._path.stem}.dropped{self._path.suffix}")
        files.append_lines(target, _joined(later + strange))
        reasons = []
        if later:
            steps = f"steps after {last_step}" if last_step > 0 else "all steps"
            reasons.append(f"{_count(later, 'row')} of {steps}, which are taken again")
        if strange:
            reasons.append(f"{_count(strange, 'line')} that cannot be used")
        console.warn(f"{self._path}: moved {' and '.join(reasons)}, to {target}")


def _parsed(path: pathlib.Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line that is not blank, and the row in it, if it is one."""
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
    # Not isinstance, for which True is a number.
    if not {type(value) for value in row.values()} <= {int, float, str, type(None)}:
        return None
    step = row.get("step")
    if type(step) is not int or step < 0:
        return None
    return {k: math.nan if v is None else v for k, v in row.items()}


def _line(row: dict[str, Any]) -> str:
    def known(value):  # JSON knows no NaN
        return value if isinstance(value, str) or math.isfinite(value) else None

    return json.dumps({name: known(value) for name, value in row.items()}) + "\n"


def _joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _count(lines: list[bytes], noun: str) -> str:
    return f"{len(lines):,} {noun}{'s' if len(lines) != 1 else ''}"
