"""Pre-trains a LLaMA on text: `python -m train.pretrain --help`."""

import io
import sys
from collections.abc import Sequence

from train import cli
from train.presets import PRESETS


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program with the arguments of the command line."""
    # A sample may hold any character, also where the terminal knows only some.
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Lines leave at once, also where a second Ctrl-C ends the program.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    argv = sys.argv[1:] if argv is None else argv
    config = cli.parse(PRESETS, "tiny", cli.PRETRAIN, argv)
    from train import loop  # slow to import: JAX, which help does without

    sys.exit(loop.run(config))


if __name__ == "__main__":
    main()
