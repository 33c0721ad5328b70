"""Program `train.benchmark`: compiles and times optimizers."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import subtrack_jax as stj
from train.config.methods import moves_on_every_step
from train.config.presets import PRESETS
from train.planning.targets import open_target
from train.planning.tpu_cycles import estimated_cycles
from train.step.mesh import make_mesh
from train.system import console
from train.system.files import write_whole
from train.system.provenance import machine, versions
from train.timing import timed_programs
from train.timing.benchmark_config import BenchmarkConfig
from train.timing.benchmark_report import Cost, plot, table
from train.timing.interleaved import interleaved
from train.timing.timed_programs import METHODS, Subject


def run(config: BenchmarkConfig, command: str) -> None:
    """Prints the table and, with --output, writes numbers and a bar chart.

    Args:
      config: the benchmark.
      command: the command line, recorded with the numbers.
    """
    if config.backend is not None:
        jax.config.update("jax_platforms", config.backend)
    # Compile times must not come from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    with console.user_errors(ValueError):
        costs, interval = measure(config)
    print(table(costs, interval))
    if config.output is None:
        return
    everything = {
        "config": dataclasses.asdict(config),
        "update_interval": interval,
        "costs": {name: dataclasses.asdict(cost) for name, cost in costs.items()},
        "table": table(costs, interval),
        "command": command,
        "versions": versions(),
        "machine": machine(),
    }
    with console.user_errors(OSError):
        config.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(everything, indent=1, default=str) + "\n"
        write_whole(config.output.with_suffix(".json"), text)
        title = f"{config.preset}, {config.dtype}, {config.measure}"
        plot(costs, interval, title, config.output.with_suffix(".png"))


def measure(config: BenchmarkConfig) -> tuple[dict[str, Cost], int]:
    """Compiles the programs of all optimizers and times them interleaved.

    Returns:
      The costs by name, and the update interval.

    Raises:
      ValueError: an optimizer does not support the layout.
    """
    preset = PRESETS[config.preset]
    rank = config.rank or preset.optimizer.rank
    interval = config.update_interval or preset.optimizer.update_interval
    model = dataclasses.replace(
        preset.model,
        num_layers=config.num_layers or preset.model.num_layers,
        dtype=config.dtype,
        param_dtype=config.dtype,
    )
    data = dataclasses.replace(
        preset.data,
        sequence_length_tokens=config.sequence_length_tokens,
        batch_size_sequences=config.batch_size_sequences,
    )
    run = dataclasses.replace(preset, model=model, data=data)
    layout = "stacked" if config.measure == "step" else config.layout
    shapes = timed_programs.parameter_shapes(model, layout)
    place = _placement(config.target)

    found, state_bytes = {}, {}
    for name in config.names:
        optimizer = METHODS[name](rank, interval)
        try:
            state_bytes[name] = stj.state_bytes(optimizer, shapes)
        except ValueError as error:
            raise ValueError(
                f"{name} does not take {layout} layers: {error}"
            ) from error
        found[name] = (
            timed_programs.training_subject(optimizer, run)
            if config.measure == "step"
            else timed_programs.update_subject(optimizer, shapes)
        )
    compiled, seconds = _compile(found, config.compile_rounds, place)
    costs = {}
    for name, program in compiled.items():
        memory = program.memory_analysis()
        is_steady = config.measure == "update" and not moves_on_every_step(name)
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        costs[name] = Cost(
            seconds[name],
            state_bytes[name],
            memory.temp_size_in_bytes,
            memory.argument_size_in_bytes + results + memory.temp_size_in_bytes,
            estimated_cycles(program.as_text()) if is_steady else None,
        )
    if config.shapes_only or config.target is not None:
        return costs, interval
    return _time(found, compiled, costs, interval, config), interval


def _placement(target: str | None) -> Callable[[Any], Any]:
    """Puts shapes on the first device of a target."""
    if target is None:
        return lambda shape: shape
    mesh = make_mesh("data=1", open_target(target).devices[:1])
    whole = NamedSharding(mesh, P())
    return lambda shape: shape.update(sharding=whole)


def _compile(
    found: Mapping[str, Subject], rounds: int, place: Callable[[Any], Any]
) -> tuple[dict[str, jax.stages.Compiled], dict[str, list[float]]]:
    compiled: dict[str, jax.stages.Compiled] = {}

    def prepare(name: str, subject: Subject) -> Callable[[], None]:
        carry, extra = jax.tree.map(
            place, jax.eval_shape(lambda: (subject.make_carry(), subject.make_extra()))
        )
        # A new function each time, because JAX caches traced and compiled functions.
        step = jax.jit(
            lambda carry, extra: subject.step(carry, extra), donate_argnums=0
        )

        def run():
            compiled[name] = step.lower(carry, extra).compile()

        return run

    programs = {
        name: functools.partial(prepare, name, subject)
        for name, subject in found.items()
    }
    return compiled, interleaved(programs, rounds, warm_up_rounds=0)


def _time(
    found: Mapping[str, Subject],
    compiled: Mapping[str, jax.stages.Compiled],
    costs: Mapping[str, Cost],
    interval: int,
    config: BenchmarkConfig,
) -> dict[str, Cost]:
    carries = {name: jax.jit(each.make_carry)() for name, each in found.items()}
    extra = jax.jit(next(iter(found.values())).make_extra)()

    def programs_at(count: int) -> dict[str, Callable[[], Callable[[], Any]]]:
        def prepare(name: str) -> Callable[[], Any]:
            carries[name] = with_count(carries[name], count)

            def run():
                carries[name] = compiled[name](carries[name], extra)
                return carries[name]

            return run

        return {name: functools.partial(prepare, name) for name in found}

    first = interleaved(programs_at(0), config.refresh_rounds)
    refresh = interleaved(programs_at(interval), config.refresh_rounds)
    steady = interleaved(programs_at(1), config.rounds)
    return {
        name: dataclasses.replace(
            cost,
            first_seconds=first[name],
            refresh_seconds=refresh[name],
            steady_seconds=steady[name],
        )
        for name, cost in costs.items()
    }


def with_count(tree: Any, count: int) -> Any:
    """Replaces all `count`s of a state, to put it at another step."""

    def leaf_at(path, leaf):
        is_count = bool(path) and getattr(path[-1], "name", None) == "count"
        return jax.numpy.full_like(leaf, count) if is_count else leaf

    return jax.tree.map_with_path(leaf_at, tree)
