"""Checks that the processes of a run see the same program, config and files."""

import dataclasses
import hashlib
import os
import pathlib
import secrets
import socket

from train.config.rules import flag
from train.config.run_config import RunConfig
from train.rundir import changes, identity
from train.system import files, processes, provenance

_CHECKOUT = pathlib.Path(__file__).parents[2]
_CODE = ("train", "models", "subtrack_jax")


def check_same_program(config: RunConfig) -> None:
    """Raises a ValueError in all processes if flags, packages or code differ.

    The path of the run's directory may differ, see `check_shared`.
    """
    if processes.is_alone():
        return
    values = changes.flat_values(dataclasses.asdict(config))
    flags = {
        flag(name): str(value)
        for name, value in values.items()
        if name != "output_dir" and not name.startswith("start.")
    }
    _check_same(flags, "start all of them with the same flags")
    versions = provenance.versions()
    del versions["commit"]  # not every host has git
    _check_same(versions, "install the same packages on all hosts")
    _check_same({"the program's code": _code()}, "copy the same checkout to all hosts")


def check_same_text(config: RunConfig) -> None:
    """Raises a ValueError in all processes if files of the text differ."""
    if processes.is_alone():
        return
    with processes.together(ValueError):
        found = {
            f"{flag(setting)}: {each['name']}": f"{each['bytes']} bytes, crc32 "
            f"{each['crc32']}"
            for setting, those in identity.text_files(config.data).items()
            for each in those
        }
    _check_same(found, "copy the same files to all hosts")


def check_shared(directory: pathlib.Path) -> None:
    """Raises a ValueError in all processes if the run's directory is not shared.

    Args:
      directory: the run's directory, created by the first process.
    """
    if processes.is_alone():
        return
    own = directory / f".process-{secrets.token_hex(8)}-of-{socket.gethostname()}"
    try:
        with processes.together(ValueError):
            if directory.is_dir():
                files.write_whole(own, "")
        written = processes.gather(own.name)
        missing = processes.gather(
            [each for each in written if not (directory / each).exists()]
        )
    finally:
        own.unlink(missing_ok=True)
    for index, name in enumerate(written):
        if name in missing[0] or written[0] in missing[index]:
            host = name.partition("-of-")[2]
            raise ValueError(
                f"--output-dir {directory} of process {index} (host {host}) is another "
                "directory than that of the other processes, which must share one: "
                "give one on a file system that all hosts have"
            )


def _check_same(values: dict[str, str], advice: str) -> None:
    """Raises a ValueError if a process's values differ from the first one's."""
    first, *others = processes.gather(values)
    for index, other in enumerate(others, start=1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"process {index} has {name} {other.get(name, 'not')}, process 0 "
                    f"has {first.get(name, 'not')}: {advice}"
                )


def _code() -> str:
    """Hash of all modules imported from the checkout."""
    digest = hashlib.sha256()
    for package in _CODE:
        for path in sorted((_CHECKOUT / package).rglob("*.py")):
            digest.update(os.fsencode(path.relative_to(_CHECKOUT)) + path.read_bytes())
    return digest.hexdigest()[:12]
