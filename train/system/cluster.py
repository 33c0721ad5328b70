"""Detection of multi-process runs from flags or a cluster's environment.

Does not import JAX, which must not look for devices before the processes connect.
"""

import argparse
import os
from collections.abc import Mapping, Sequence

from train.config.run_config import StartConfig


def find_processes(
    argv: Sequence[str], environment: Mapping[str, str] = os.environ
) -> StartConfig | None:
    """Returns how to connect to the other processes, or None for a single process.

    Reads the flags, or the environment of Slurm (`srun`), Open MPI or a TPU slice of
    several hosts. Invalid flags give None: the full parser reports them.

    >>> find_processes(["--steps", "10"], {}) is None
    True
    >>> flags = ["--coordinator-address", "a:1", "--num-processes=2", "--process-id=1"]
    >>> find_processes(flags, {}).process_id
    1
    >>> find_processes([], {"SLURM_STEP_NUM_TASKS": "2"}).process_id is None
    True
    """
    if "--help" in argv or "-h" in argv:
        return None
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False
    )
    # tyro accepts underscores, too.
    parser.add_argument("--coordinator-address", "--coordinator_address")
    parser.add_argument("--num-processes", "--num_processes", type=int)
    parser.add_argument("--process-id", "--process_id", type=int)
    parser.add_argument("--distributed", action="store_true")
    try:
        given, _ = parser.parse_known_args(list(argv))
        start = StartConfig(**vars(given))
    except (argparse.ArgumentError, ValueError):
        return None
    if start == StartConfig() and not _in_a_cluster(environment):
        return None
    return start


def _in_a_cluster(environment: Mapping[str, str]) -> bool:
    sizes = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    several = any(int(environment.get(name) or 1) > 1 for name in sizes)
    return several or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
