"""Remarks about the files of a text, for the user."""

import dataclasses


@dataclasses.dataclass
class Notes:
    """Remarks on the files: count and first example of each kind."""

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, what: str, example: object) -> None:
        """Counts a case; keeps the first as the example."""
        self.counts[what] = self.counts.get(what, 0) + 1
        self.examples.setdefault(what, str(example))

    def lines(self) -> list[str]:
        """One line for each kind of remark."""
        return [
            f"{what} ({count:,}): {self.examples[what]}" + ", ..." * (count > 1)
            for what, count in self.counts.items()
        ]
