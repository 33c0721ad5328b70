"""Rooms of the project, drawn from the imports: no arrow runs up, no file is long.

A room may import rooms below it; modules of one room do not import each other in
circles. Imports inside of functions count, those for type checkers do not.
"""

import ast
import functools
import pathlib
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MOST_LINES = 300

# From the bottom up; rooms of one tuple are side by side and do not import each other.
FLOORS = {
    "subtrack_jax": [
        ("_version", "_internal"),
        ("sharding", "low_rank", "grassmann"),
        ("diagnostics", "backward"),
        ("stages",),
        ("optimizers",),
        ("__init__",),
    ],
    "models": [("*",)],
    "train": [
        ("config",),
        ("system",),
        ("tokenization",),
        ("data",),
        ("conversations",),
        ("step",),
        ("reports",),
        ("rundir",),
        ("generation",),
        ("loop",),
        ("planning", "comparison", "finetuning"),
        ("timing",),
        ("cli",),
        ("*",),  # the programs, and what Python runs before them
    ],
}
PACKAGES = {"subtrack_jax": (), "models": (), "train": ("subtrack_jax", "models")}


class Arrow(NamedTuple):
    """An import of one module of the project by another, by their dotted names."""

    importer: str
    imported: str


@functools.cache
def modules():
    """Paths of all modules of library, models and programs, by dotted name."""
    found = {}
    for package in FLOORS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path):
    """Dotted names of all imports in a file, also inside functions."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import: write the full name"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in modules() else node.module


@functools.cache
def arrows():
    """All imports between modules of the project."""
    return [
        Arrow(name, imported)
        for name, path in modules().items()
        for imported in imports(path)
        if imported in modules() and imported != name
    ]


def floor(name):
    """Number of a module's floor, and its room."""
    package, _, rest = name.partition(".")
    room = rest.partition(".")[0] or "__init__"
    rooms = FLOORS[package]
    for number, names in enumerate(rooms):
        if room in names:
            return number, room
    assert ("*",) in rooms, f"{name} is in no room: add {room} to FLOORS"
    return rooms.index(("*",)), "*"


def runs_up(arrow):
    packages = [name.partition(".")[0] for name in arrow]
    if packages[0] != packages[1]:
        return packages[1] not in PACKAGES[packages[0]]
    (here, room), (there, other) = map(floor, arrow)
    return there > here or (there == here and room != other)


def test_no_arrow_runs_up():
    up = {tuple(arrow) for arrow in arrows() if runs_up(arrow)}
    assert not up


def test_modules_do_not_import_each_other_in_circles():
    below = {name: set() for name in modules()}
    for arrow in arrows():
        below[arrow.importer].add(arrow.imported)
    while free := {name for name, names in below.items() if not names}:
        below = {name: names - free for name, names in below.items() if names}
    assert not below, "modules in a circle, and those that import them"


def test_private_modules_are_imported_by_their_own_package_alone():
    private = {
        tuple(arrow)
        for arrow in arrows()
        if arrow.imported.startswith("subtrack_jax.")
        and not arrow.importer.startswith("subtrack_jax")
        and "._" in arrow.imported
    }
    assert not private


def test_no_file_is_long():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in modules().values()
    }
    long = {name for name, n in lengths.items() if n > MOST_LINES}
    assert not long


@pytest.mark.parametrize(
    ("importer", "imported", "expected"),
    [
        ("subtrack_jax.stages.track", "subtrack_jax._internal.loops", False),
        ("subtrack_jax._internal.loops", "subtrack_jax.stages.track", True),
        ("subtrack_jax.grassmann", "subtrack_jax.low_rank", True),
        ("subtrack_jax.stages.track", "subtrack_jax.stages.tracker", False),
        ("subtrack_jax.stages.track", "subtrack_jax", True),
        ("models.llama", "subtrack_jax", True),
        ("train.pretrain", "models.llama", False),
        ("train.config.presets", "train.pretrain", True),
        ("train.planning.footprint", "train.comparison.trial", True),
    ],
)
def test_what_runs_up(importer, imported, expected):
    assert runs_up(Arrow(importer, imported)) is expected
