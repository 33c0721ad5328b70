"""Optimizers of the family: one file per paper, its tracker beside it.

Every file here is imported, so that `FAMILY` has each of its methods under
`low_rank_method`; programs and tests read the family from there.
"""

import importlib
import pkgutil

from subtrack_jax.optimizers.method import FAMILY, Method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def _outline(method: Method) -> str:
    moments = {True: "transported", False: "kept", "momentum": "first transported"}
    outside = {"columns": "recovered", "none": "dropped", None: "gradient is scaled"}
    kept = moments[method.transport], outside[method.recovery]
    return f"- `{method.optimizer.__name__}`: {method.summary} ({', '.join(kept)})"


_OUTLINES = "\n".join(map(_outline, FAMILY.values()))
__doc__ = f"""{__doc__}
Methods, what happens to moments when a basis moves, and to what the basis misses:

{_OUTLINES}
"""

__all__ = ["FAMILY", "Method"]
