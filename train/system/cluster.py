"""Whether a program is one of several processes: known before JAX is imported."""

import argparse
import os
from collections.abc import Mapping, Sequence

from train.config.run_config import StartConfig


def asked_for(
    argv: Sequence[str], environment: Mapping[str, str] = os.environ
) -> StartConfig | None:
    """How to find the other processes; None: there are none.

    They are told by flags, or found in the environment of Slurm (`srun`), Open MPI, or
    a TPU slice of several hosts. Flags that cannot be read are left to who reads all
    of them.

    >>> asked_for(["--steps", "10"], {}) is None
    True
    >>> flags = ["--coordinator-address", "a:1", "--num-processes=2", "--process-id=1"]
    >>> asked_for(flags, {}).process_id
    1
    >>> asked_for([], {"SLURM_STEP_NUM_TASKS": "2"}).process_id is None
    True
    """
    if "--help" in argv or "-h" in argv:
        return None
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False
    )
    # tyro takes underscores, too.
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
