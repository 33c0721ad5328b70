"""Training programs, run from a checkout: `python -m train.pretrain`."""

import sys

# sys.argv[0] is "-m" while Python looks for the module: handle signals before imports.
if sys.argv[0] == "-m":
    from train.system.interruption import Interruption

    Interruption().__enter__()
