"""Tables of text: Markdown for files, aligned columns for a terminal.

Kept by hand: the library tabulate pads heads by two more spaces (its MIN_PADDING),
which would change every table written so far.
"""

from collections.abc import Callable, Sequence


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's Markdown whose columns also line up in a terminal.

    >>> print(markdown([("optimizer", "loss"), ("adamw", "3.1")]))
    | optimizer | loss |
    |-----------|------|
    | adamw     | 3.1  |
    """
    head, *lines = _aligned(rows, str.ljust)
    rule = "|".join("-" * (len(cell) + 2) for cell in head)
    return "\n".join(
        [
            f"| {' | '.join(head)} |",
            f"|{rule}|",
            *(f"| {' | '.join(line)} |" for line in lines),
        ]
    )


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Columns without lines, the first aligned left, the others right.

    >>> print(columns([("holds", "adamw"), ("  state", "8 MiB"), ("total", "12 MiB")]))
    holds     adamw
      state   8 MiB
    total    12 MiB
    """
    lines = ("  ".join(line).rstrip() for line in _aligned(rows, str.rjust))
    return "\n".join(lines)


def _aligned(
    rows: Sequence[Sequence[str]], justify: Callable[[str, int], str]
) -> list[list[str]]:
    """Cells padded to the width of their column; the first column aligned left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [row[0].ljust(widths[0]), *map(justify, row[1:], widths[1:])] for row in rows
    ]
