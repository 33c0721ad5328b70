"""Training programs, run from a checkout: `python -m train.pretrain`."""

import sys

# While Python looks for `python -m train.X`: answer signals before slow imports.
if sys.argv[0] == "-m":
    from train.system.interruption import Interruption

    Interruption().__enter__()
