"""Disk space check for the checkpoints of a run."""

import math
import pathlib
import shutil
from collections.abc import Callable

from train.config.run_config import RunConfig
from train.rundir.directory import CHECKPOINTS

# Checkpoints compress to at least three quarters of the arrays' bytes.
_LEAST_COMPRESSED = 0.7


def check(
    config: RunConfig, first: int, state_bytes: int, warn: Callable[[str], None]
) -> None:
    """Compares the size of future checkpoints with the free disk space.

    Args:
      config: the run.
      first: the step after which it starts.
      state_bytes: uncompressed bytes of a checkpoint.
      warn: called if there may not be space for all checkpoints to keep.

    Raises:
      OSError: there is no space for one checkpoint.
    """
    directory = config.output_dir / CHECKPOINTS
    sizes = [_bytes_in(path) for path in directory.glob("*") if path.is_dir()]
    # Existing checkpoints show how well the arrays compress.
    one = max(sizes, default=state_bytes) or state_bytes
    needed = _most_at_once(config, first, len(sizes)) * one - sum(sizes)
    free = shutil.disk_usage(config.output_dir).free
    if first == config.steps or needed <= free:
        return
    least = one if sizes else one * _LEAST_COMPRESSED
    if least > free:
        raise OSError(
            f"a checkpoint takes {_told(one)} in {directory}, where {_told(free)} are "
            "free: free some space, or give another --output-dir"
        )
    warn(
        f"the checkpoints of this run will take up to {_told(needed)} more in "
        f"{directory}, where {_told(free)} are free: free some space, or keep fewer "
        f"than --keep-last-checkpoints {config.checkpoint.keep_last_checkpoints}"
    )


def _most_at_once(config: RunConfig, first: int, present: int) -> int:
    """Maximum number of checkpoints at a time; the oldest is deleted after a write."""
    keep = config.checkpoint
    written = math.ceil((config.steps - first) / keep.checkpoint_every_steps)
    kept = keep.keep_last_checkpoints
    if keep.keep_best:
        written += (config.steps - first) // config.eval_every_steps
        kept += 1
    if keep.keep_checkpoint_every_steps is not None:
        kept += config.steps // keep.keep_checkpoint_every_steps
    return min(present + written, kept + 1)


def _bytes_in(directory: pathlib.Path) -> int:
    paths = directory.rglob("*")
    return sum(path.stat().st_size for path in paths if path.is_file())


def _told(count: float) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.1f} MB"
