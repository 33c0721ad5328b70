"""Program `train.plan`: table of memory and communication per device."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from train.config.presets import PRESETS
from train.config.pretrain_config import PretrainConfig
from train.planning.collectives import KINDS, PHASES, Traffic
from train.planning.footprint import Footprint, measure
from train.planning.plan_config import PlanConfig
from train.planning.targets import open_target
from train.reports import tables
from train.step import optimizers
from train.step.mesh import BATCH_AXES, batch_pieces, make_mesh
from train.system import console
from train.system.files import write_whole

_TITLES = dict(
    zip(
        PHASES,
        ("sent in a step", "sent in a step with refresh", "sent in the first step"),
        strict=True,
    )
)


def make_run(config: PlanConfig, mesh: Mesh) -> PretrainConfig:
    """Builds the run to plan, with a batch size that the mesh divides.

    Raises:
      ValueError: the mesh does not divide the given batch size.
    """
    preset = PRESETS[config.preset]
    pieces, parts = batch_pieces(mesh), config.gradient_accumulation_steps
    size = config.batch_size_sequences
    if size is None:
        sequences = preset.data.batch_size_sequences
        size = math.ceil(sequences / (pieces * parts)) * pieces * parts
    if size % (pieces * parts):
        raise ValueError(
            f"--batch-size-sequences {size} must be a multiple of {pieces * parts}: "
            f"the {pieces} pieces that {' and '.join(BATCH_AXES)} of --mesh "
            f"{config.mesh} make of each of --gradient-accumulation-steps {parts}"
        )
    data = dataclasses.replace(
        preset.data,
        sequence_length_tokens=config.sequence_length_tokens,
        batch_size_sequences=size,
    )
    return dataclasses.replace(
        preset,
        model=config.model,
        gradient_accumulation_steps=parts,
        z_loss_weight=config.z_loss_weight,
        mesh=config.mesh,
        optimizer=config.optimizer,
        data=data,
    )


def table(footprints: Sequence[Footprint], memory_bytes: int | None) -> str:
    """Formats a table with one column per footprint."""
    rows = [("memory per device", *(each.title for each in footprints))]
    for name in ("total", "parameters", "optimizer_state", "gradients", "temporaries"):
        sizes = (_size(getattr(each, name)) for each in footprints)
        rows.append((f"  {name.replace('_', ' ')}", *sizes))
    if memory_bytes is not None:
        verdicts = (
            "fits" if each.fits(memory_bytes) else "does not fit" for each in footprints
        )
        rows.append((f"  of {_size(memory_bytes)}", *verdicts))
    for phase, title in _TITLES.items():
        found = [each.traffic.get(phase, {}) for each in footprints]
        kinds = [kind for kind in KINDS if any(kind in each for each in found)]
        if kinds:
            sums = (sum(t.sent_bytes for t in each.values()) for each in found)
            rows.append((title, *(_size(total) if total else "" for total in sums)))
        for kind in kinds:
            cells = (_traffic(each.get(kind)) for each in found)
            rows.append((f"  {kind}", *cells))
    seconds = (f"{each.compile_seconds:.0f} s" for each in footprints)
    rows.append(("compile time", *seconds))
    return tables.columns(rows)


def _traffic(traffic: Traffic | None) -> str:
    return (
        "" if traffic is None else f"{traffic.count:,} x, {_size(traffic.sent_bytes)}"
    )


def _size(size: int) -> str:
    for unit, bytes_of_one in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= bytes_of_one:
            return f"{size / bytes_of_one:,.2f} {unit}"
    return f"{size / 2**10:.2f} KiB"


def _heading(target: str, mesh: Mesh, run: PretrainConfig) -> str:
    split = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    devices = "one device" if mesh.size == 1 else f"{mesh.size} devices"
    return (
        f"{run.preset} on {target}: {devices}, {split}\n"
        f"A step: {run.data.batch_size_sequences:,} sequences of "
        f"{run.data.sequence_length_tokens:,} tokens, gradient accumulation "
        f"{run.gradient_accumulation_steps}\n"
        f"Model: {run.model.param_dtype} parameters, {run.model.dtype} computation, "
        f"remat {run.model.remat}\n"
    )


def run(config: PlanConfig) -> None:
    """Prints the plan and, with --json, writes its numbers to a file."""
    with console.user_errors(ValueError):
        target = open_target(config.target)
        mesh = make_mesh(config.mesh, target.devices)
        run = make_run(config, mesh)
        runs = [
            dataclasses.replace(
                run,
                optimizer=dataclasses.replace(run.optimizer, name=name),
                update_in_backward=in_backward,
            )
            for name in config.optimizer_names
            for in_backward in ([False, True] if config.update_in_backward else [False])
        ]
        for each in runs:
            optimizers.check_rank(each.optimizer, each.model)
    memory = target.memory_bytes
    if config.device_memory_gib is not None:
        memory = int(config.device_memory_gib * 2**30)
    # Compile times must not come from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    print(_heading(config.target, mesh, run), flush=True)
    found = [measure(each, mesh) for each in runs]
    print(table(found, memory))
    if config.json is not None:
        with console.user_errors(OSError):
            _write(config.json, config.target, mesh, run, memory, found)


def _write(
    path: pathlib.Path,
    target: str,
    mesh: Mesh,
    run: PretrainConfig,
    memory_bytes: int | None,
    found: Sequence[Footprint],
) -> None:
    def values(footprint: Footprint) -> dict[str, Any]:
        traffic = {
            phase: {kind: each._asdict() for kind, each in kinds.items()}
            for phase, kinds in footprint.traffic.items()
        }
        return dataclasses.asdict(footprint) | {
            "fits": memory_bytes and footprint.fits(memory_bytes),
            "traffic": traffic,
        }

    everything = {
        "target": target,
        "mesh": dict(mesh.shape),
        "device_memory_bytes": memory_bytes,
        "run": dataclasses.asdict(run),
        "optimizers": [values(footprint) for footprint in found],
    }
    write_whole(path, json.dumps(everything, indent=2, default=str) + "\n")
