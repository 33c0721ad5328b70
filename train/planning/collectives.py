"""Communication of a step, parsed from a compiled program's text.

Parsed by hand: JAX has no public access to the collectives of a compiled program, and
XLA's own Python classes give their text only.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Steps without a refresh, with one, and the first step.
PHASES = ("steady", "refresh", "start")
# Loops that run in one phase only, by the library's names for them.
_PHASE_OF_LOOP = {
    "start_subspaces": "start",
    "move_subspaces": "refresh",
    "turn_moments": "refresh",
}

_OPERATION = re.compile(
    rf" ({'|'.join(KINDS)}|while|conditional|call|fusion|async)(-start)?\("
)
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_LOOP_OF_A_PHASE = re.compile(rf'op_name="[^"]*/({"|".join(_PHASE_OF_LOOP)})/while"')
_CALLED = re.compile(
    r"\b(?:body|calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)"
)


class Traffic(NamedTuple):
    """Number of collectives of one kind, and bytes each device sends over rings."""

    count: int = 0
    sent_bytes: int = 0


Kinds = Mapping[str, Traffic]


class _Instruction(NamedTuple):
    operation: str
    traffic: Traffic | None  # of a collective
    called: tuple[str, ...]
    times: int
    phase: str | None = None  # the only one in which it runs


def step_traffic(text: str, devices: int) -> dict[str, Kinds]:
    """Counts the collectives of one step, by phase and kind.

    Collectives in a loop are multiplied by its iterations (the maximum, if that
    depends on data). Of a conditional's branches the one that sends the most counts.

    Args:
      text: `as_text()` of a compiled program.
      devices: number of devices; the group of a collective that names no group.

    Returns:
      Collectives by phase: "steady", and other phases that differ from it.
    """
    program, entry = _parse(text, devices)

    def of_phase(phase: str) -> Kinds:
        @functools.cache
        def of(name: str) -> Kinds:
            return _total(
                (part, each.times)
                for each in program[name]
                if each.phase in (None, phase)
                for part in inside(each)
            )

        def inside(each: _Instruction) -> list[Kinds]:
            if each.traffic is not None:
                return [{each.operation: each.traffic}]
            parts = [of(name) for name in each.called]
            if each.operation != "conditional":
                return parts
            return [
                max(parts, key=lambda part: sum(t.sent_bytes for t in part.values()))
            ]

        return of(entry)

    phases = {phase: of_phase(phase) for phase in PHASES}
    steady = phases[PHASES[0]]
    return {
        name: kinds
        for name, kinds in phases.items()
        if name == PHASES[0] or kinds != steady
    }


def sent_bytes(kind: str, result_bytes: int, group_size: int) -> int:
    """Bytes that each device sends over a ring for a collective of a given result.

    >>> sent_bytes("all-gather", 64, 4), sent_bytes("all-reduce", 64, 4)
    (48, 96)
    """
    if kind in ("collective-permute", "collective-broadcast"):
        return result_bytes
    if kind == "reduce-scatter":  # the result is a shard
        return result_bytes * (group_size - 1)
    passes = 2 if kind == "all-reduce" else 1
    return passes * result_bytes * (group_size - 1) // group_size


def _total(parts: Iterable[tuple[Kinds, int]]) -> Kinds:
    total: dict[str, Traffic] = {}
    for kinds, times in parts:
        for kind, (count, sent) in kinds.items():
            before = total.get(kind, Traffic())
            total[kind] = Traffic(
                before.count + times * count, before.sent_bytes + times * sent
            )
    return {kind: total[kind] for kind in KINDS if kind in total}


def _parse(text: str, devices: int) -> tuple[dict[str, list[_Instruction]], str]:
    """Parses instructions that communicate or call, by computation; and the entry."""
    lines: dict[str, list[str]] = {}
    entry, current = "", []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = lines[header[2]] = []
            entry = header[2] if header[1] else entry
        else:
            current.append(line)
    program = {}
    for name, body in lines.items():
        found = ((line, _OPERATION.search(line)) for line in body)
        program[name] = [
            _instruction(line, match, lines, devices) for line, match in found if match
        ]
    return program, entry


def _instruction(
    line: str, match: re.Match, lines: Mapping[str, list[str]], devices: int
) -> _Instruction:
    operation, is_start = match[1], match[2] is not None
    if operation not in KINDS:
        names = tuple(re.findall(r"[\w.\-]+", ",".join(_CALLED.findall(line))))
        if "true_computation" in line:  # printed before the false one
            names = names[::-1]
        if operation != "while":
            return _Instruction(operation, None, names, 1)
        if loop := _LOOP_OF_A_PHASE.search(line):
            return _Instruction(operation, None, names, 1, _PHASE_OF_LOOP[loop[1]])
        return _Instruction(operation, None, names, _trips(line, lines))
    group = 2 if operation == "collective-permute" else _group_size(line, devices)
    size = _array_bytes(line[: match.start()].partition(" = ")[2])
    if is_start and operation == "collective-permute":
        size //= 2  # operands are listed, too
    elif is_start and operation == "all-gather":
        size = size * group // (group + 1)
    traffic = Traffic(1, sent_bytes(operation, size, group))
    times = int(group > 1)  # a group of one device sends nothing
    return _Instruction(operation, traffic, (), times)


def _array_bytes(types: str) -> int:
    """Bytes of all arrays in a type; scalars are ignored."""
    total = 0
    for name, bits, sizes in _ARRAY.findall(types):
        count = math.prod(map(int, sizes.split(","))) if sizes else 0
        total += count * int(8 if name == "pred" else bits)
    return total // 8


def _group_size(line: str, devices: int) -> int:
    groups = line.partition("replica_groups=")[2]
    if match := re.match(r"\{\{([\d,]+)\}", groups):
        return len(match[1].split(","))
    if match := re.match(r"\[\d+,(\d+)\]", groups):
        return int(match[1])
    if match := re.match(r"(?:@\w+|mesh)\[(.*?)\][^{]*\{(.*?)\}", groups):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        # A part of an axis is written as 'x':(before)size.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices


def _trips(line: str, lines: Mapping[str, list[str]]) -> int:
    """Iterations of a loop: XLA's known count, or the bound of its counter."""
    if known := re.search(r"known_trip_count\W+n\W+(\d+)", line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)[1]
    bounds = [
        int(bound)
        for each in lines[condition]
        for bound in re.findall(r" = [su]32\[\]\S* constant\((\d+)\)", each)
    ]
    return max(bounds, default=1)
