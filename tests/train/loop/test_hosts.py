"""Checks across processes: an error in one is reported by all."""

import dataclasses
import json

import pytest

from train.config.data_config import DataConfig
from train.config.presets import PRESETS
from train.loop import hosts
from train.system import cluster, console, processes

TINY = PRESETS["tiny"]


@pytest.fixture
def other(monkeypatch):
    """A second process: maps this process's gathered value to its own."""
    functions = []

    def gather(value):
        value = json.loads(json.dumps(value))
        change = functions.pop(0) if functions else lambda value: value
        return [value, change(value)]

    monkeypatch.setattr(processes, "gather", gather)
    monkeypatch.setattr(processes, "is_alone", lambda: False)
    return functions


def same(value):
    return value


def test_an_error_of_one_ends_all(other):
    other.append(lambda message: "the disk is gone")
    with (
        pytest.raises(ValueError, match=r"^process 1: the disk is gone$"),
        processes.together(ValueError),
    ):
        pass


@pytest.mark.parametrize("error", [OSError("mine"), KeyError("mine"), SystemExit(2)])
def test_an_own_error_stays_what_it_is(other, error):
    told = []
    other.append(told.append)
    with pytest.raises(type(error)) as raised, processes.together(ValueError):
        raise error
    assert raised.value is error
    assert told == [str(error)]


def test_what_ends_a_program_is_told_to_the_others(monkeypatch, capsys):
    told = []
    monkeypatch.setattr(
        processes, "gather", lambda value: told.append(value) or [value]
    )
    with pytest.raises(SystemExit), processes.together(ValueError):
        console.fail("no such file")
    assert told == ["no such file"]
    assert capsys.readouterr().err == "error: no such file\n"


def test_without_an_error_all_go_on(other):
    with processes.together(ValueError):
        done = True
    assert done


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        (
            [lambda flags: flags | {"--steps": "7"}],
            "process 1 has --steps 7, process 0 has 300: start all of them with the",
        ),
        (
            [same, lambda versions: versions | {"jax": "0.1"}],
            "process 1 has jax 0.1, process 0 has .*: install the same packages",
        ),
        (
            [
                same,
                lambda versions: {k: v for k, v in versions.items() if k != "optax"},
            ],
            "process 1 has optax not, process 0 has",
        ),
        (
            [same, same, lambda code: {name: "abc" for name in code}],
            "process 1 has the program's code abc, process 0 has .*: copy the same",
        ),
    ],
)
def test_other_programs_are_refused(other, functions, message):
    other += functions
    with pytest.raises(ValueError, match=message):
        hosts.check_same_program(TINY)


def test_the_name_of_the_directory_may_differ(other):
    flags = []
    other.append(lambda value: flags.append(value) or value)
    hosts.check_same_program(TINY)
    assert "--steps" in flags[0]
    assert "--output-dir" not in flags[0] and "--process-id" not in flags[0]


def test_other_text_is_refused(other, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("text")
    config = dataclasses.replace(TINY, data=DataConfig(data_glob=str(file)))
    hosts.check_same_text(config)
    other += [same, lambda found: {name: "5 bytes, crc32 1" for name in found}]
    with pytest.raises(ValueError, match=r"process 1 has --data-glob: a.txt 5 bytes"):
        hosts.check_same_text(config)


def test_a_directory_of_its_own_is_refused(other, tmp_path):
    other += [same, lambda name: ".process-1-of-beta"]
    with pytest.raises(ValueError, match=r"of process 1 \(host beta\) is another"):
        hosts.check_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []
    hosts.check_shared(tmp_path)  # now both see the same file
    assert list(tmp_path.iterdir()) == []


def test_one_process_checks_nothing(tmp_path):
    hosts.check_shared(tmp_path / "nowhere")
    hosts.check_same_program(TINY)
    hosts.check_same_text(TINY)


@pytest.mark.parametrize(
    ("argv", "environment", "expected"),
    [
        ([], {}, None),
        (["--distributed"], {}, (None, None, None)),
        (["--num_processes=3"], {}, (None, 3, None)),
        (["--num-processes", "x"], {}, None),
        (["--process-id", "-1"], {}, None),
        (["--distributed", "--help"], {}, None),
        ([], {"OMPI_COMM_WORLD_SIZE": "2"}, (None, None, None)),
        ([], {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ([], {"TPU_WORKER_HOSTNAMES": "a,b"}, (None, None, None)),
        ([], {"TPU_WORKER_HOSTNAMES": "a"}, None),
    ],
)
def test_other_processes_are_known_before_all_else(argv, environment, expected):
    start = cluster.find_processes(argv, environment)
    found = start and (start.coordinator_address, start.num_processes, start.process_id)
    assert found == expected
