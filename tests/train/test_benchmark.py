"""Benchmark: timed programs equal those of a user; table and files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.llama import LlamaConfig
from tests.train.program import assert_refuses, run
from train import benchmark
from train.timing import benchmarking, timed_programs
from train.timing import interleaved as timing
from train.timing.benchmark_report import Cost, table

MODEL = LlamaConfig(64, 16, 24, num_layers=3, num_heads=2)


def test_programs_are_interleaved():
    calls = []

    def program(name):
        return lambda: lambda: calls.append(name)

    seconds = timing.interleaved({name: program(name) for name in "abc"}, rounds=3)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert [len(each) for each in seconds.values()] == [3, 3, 3]


def test_a_ratio_is_one_of_rounds():
    """A round in which the machine was busy with something else does not count."""
    assert timing.ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0]) == (2.0, 2.0, 2.0)


def test_layouts_hold_the_same_numbers():
    stacked, unstacked = (
        jax.tree.leaves(timed_programs.parameter_shapes(MODEL, layout))
        for layout in ("stacked", "unstacked")
    )
    assert sum(leaf.size for leaf in stacked) == sum(leaf.size for leaf in unstacked)
    assert len(unstacked) > len(stacked)
    assert max(leaf.ndim for leaf in unstacked) == 2


@pytest.mark.parametrize("name", timed_programs.METHODS)
def test_every_method_takes_matrices_and_leaves_the_rest(name):
    """Low-rank state for kernels alone, in the benchmark as in training."""
    shapes = timed_programs.parameter_shapes(MODEL, "unstacked")
    state = jax.eval_shape(timed_programs.METHODS[name](4, 10).init, shapes)
    found = {leaf.shape for leaf in jax.tree.leaves(state)}
    low_rank = {(16, 4), (24, 4), (4, 16), (4, 24)}
    if "muon" in name or name in ("adamw", "adafactor"):
        assert not low_rank & found
    else:
        assert ({(1, 16), (1, 24)} if name == "apollo-mini" else low_rank) & found
        # Only an error of its own, of what is fed back, is as large as a kernel.
        assert ((16, 24) in found) == (name == "ldadam")
    if name != "adafactor":
        assert (64, 16) in found  # the embedding's moments


def test_the_step_that_is_timed_is_the_one_of_its_name():
    """A state taken to another count starts, moves or leaves its subspaces."""
    optimizer = timed_programs.METHODS["subtrack"](4, 10)
    shapes = timed_programs.parameter_shapes(MODEL, "unstacked")
    subject = timed_programs.update_subject(optimizer, shapes)
    gradients = subject.make_extra()
    step = jax.jit(subject.step)
    noise = jax.tree.map(
        lambda g: g + jnp.sin(jnp.arange(g.size)).reshape(g.shape), gradients
    )
    carry = step(subject.make_carry(), gradients)

    def moved(count):
        before = benchmarking.with_count(carry, count)
        after = step(before, noise)
        bases = (optax.tree.get(each[1], "basis") for each in (before, after))
        pairs = zip(*map(jax.tree.leaves, bases), strict=True)
        return [not np.array_equal(old, new) for old, new in pairs]

    assert all(moved(0)) and all(moved(10)) and not any(moved(1))


@pytest.mark.parametrize(
    "measure", ["update", pytest.param("step", marks=pytest.mark.slow)]
)
def test_a_table_and_its_numbers(tmp_path, measure, capsys):
    """The program as a user runs it, small, and once in a process of its own."""
    flags = [
        *["--preset", "tiny", "--num-layers", "1", "--measure", measure],
        *["--rounds", "2", "--refresh-rounds", "1", "--rank", "4"],
        *["--optimizers", "adamw,subtrack", "--output", str(tmp_path / "new/small")],
        *["--sequence-length-tokens", "8", "--batch-size-sequences", "2"],
    ]
    if measure == "step":
        done = run(*flags, program="train.benchmark")
        assert done.returncode == 0, done.stderr
        out = done.stdout
    else:
        benchmark.main(flags)
        out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) == 4
    assert "steady step" in lines[0]
    assert lines[3].split("|")[1].strip() == "subtrack"
    record = json.loads((tmp_path / "new" / "small.json").read_text())
    assert (tmp_path / "new" / "small.png").stat().st_size > 1000
    assert "--num-layers 1" in record["command"]
    assert record["versions"]["jax"] == jax.__version__
    cost = record["costs"]["subtrack"]
    assert len(cost["steady_seconds"]) == 2
    assert cost["state_bytes"] < record["costs"]["adamw"]["state_bytes"]
    assert cost["peak_bytes"] > cost["state_bytes"]


def test_shapes_alone_take_no_memory(capsys):
    """A 1B model is compiled and counted on a machine that could not hold it."""
    flags = ["--num-layers", "1", "--layout", "stacked", "--shapes-only"]
    names = ["--optimizers", "adamw,galore"]
    benchmark.main(["--preset", "llama-1b", *flags, *names])
    out = capsys.readouterr().out
    assert "steady" not in out
    assert "MiB" in out


def test_a_compiler_that_estimates_cycles_has_a_column():
    costs = {
        name: Cost([1.0], 2**20, 2**20, 2**20, steady_cycles=cycles)
        for name, cycles in (("adamw", 20e6), ("subtrack", 30e6), ("ldadam", None))
    }
    lines = table(costs, interval=200).splitlines()
    title, _, _, middle, last = (" ".join(line.split()) for line in lines)
    assert "| estimated steady step | / first |" in title
    assert middle.startswith("| subtrack |") and last.startswith("| ldadam |")
    assert "| 30.0 M cycles | 1.50 |" in middle
    assert "| - | - |" in last  # its loops run in every step


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizers", "adamw,sgd"], "unknown 'sgd': choose from adamw, adafactor"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--rank", "0"], "--rank must be at least 1"),
        (["--rank", "10000"], "rank=10000 is not below the smaller side of any of"),
        (["--layout", "stacked", "--optimizers", "optax-galore"], "does not take"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_measured_is_one_line(capsys, flags, message):
    assert_refuses(benchmark.main, capsys, flags, message)
