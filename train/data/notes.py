"""Remarks about the files of a text, for the user."""

import dataclasses


@dataclasses.dataclass
class Notes:
    """Remarks on the files: count and first example of each kind."""

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, what: str, example: object) -> None:
        """Counts one more case."""
        self.counts[what] = self.counts.get(what, 0) + 1
        self.examples.setdefault(what, str(example))

    def lines(self) -> list[str]:
        """A line for each kind of case."""
        return [
            f"{what} ({count:,}): {self.examples[what]}" + ", ..." * (count > 1)
            for what, count in self.counts.items()
        ]
