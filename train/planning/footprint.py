"""Memory and communication of a step per device, from its compilation."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from train.config.pretrain_config import PretrainConfig
from train.planning.collectives import Kinds, step_traffic
from train.step import placement
from train.step.language_model import abstract_batch
from train.step.setup import pretraining


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Memory and communication of one device, with one optimizer, in bytes.

    Attributes:
      optimizer: name of the optimizer.
      parameters: the device's shards of the parameters.
      optimizer_state: the device's shards of the optimizer state.
      gradients: the device's shards of the gradients that exist at a time, in the dtype
        of their sum.
      temporaries: other memory at the peak of a step: activations, the batch, the
        compiler's copies and padding, code.
      total: memory required by the compiler; the sum of the others.
      compiles: False if the compiler refused because the total is too large.
      traffic: collectives of one step, by phase and kind.
      lower_seconds: time to trace the step.
      compile_seconds: time to compile it.
      update_in_backward: whether each layer is updated in the backward pass.
    """

    optimizer: str
    parameters: int
    optimizer_state: int
    gradients: int
    temporaries: int
    total: int
    compiles: bool
    traffic: Mapping[str, Kinds]
    lower_seconds: float
    compile_seconds: float
    update_in_backward: bool = False

    @property
    def title(self) -> str:
        """Heading of its column."""
        return self.optimizer + (" in backward" if self.update_in_backward else "")

    def fits(self, memory_bytes: int) -> bool:
        """Whether the step fits a device's memory; the compiler reserves some of it."""
        return self.compiles and self.total <= memory_bytes


def measure(run: PretrainConfig, mesh: Mesh) -> Footprint:
    """Compiles the step of a run for a mesh, whose devices may be abstract."""
    setup = pretraining(run, mesh)
    state = setup.abstract_state
    batch = abstract_batch(run.data, placement.batch_sharding(mesh))
    began = time.perf_counter()
    with jax.set_mesh(mesh), placement.rules():
        lowered = setup.train_step.lower(state, batch)
    lowered_at = time.perf_counter()
    compiled, needed = compile_step(lowered)
    compiled_at = time.perf_counter()

    parameters = shard_bytes(state.params)
    optimizer_state = shard_bytes(state.opt_state)
    least_itemsize = 4 if run.gradient_accumulation_steps > 1 else 0
    gradients = shard_bytes(state.params, least_itemsize)
    if run.update_in_backward:
        layers = shard_bytes(state.params["layers"], least_itemsize)
        gradients += layers // run.model.num_layers - layers
    rest = needed - parameters - optimizer_state
    # The compiler may reuse memory, so that not all gradients exist at a time.
    gradients = min(gradients, rest)
    return Footprint(
        optimizer=run.optimizer.name,
        parameters=parameters,
        optimizer_state=optimizer_state,
        gradients=gradients,
        temporaries=rest - gradients,
        total=needed,
        compiles=compiled is not None,
        traffic=step_traffic(compiled.as_text(), mesh.size) if compiled else {},
        lower_seconds=lowered_at - began,
        compile_seconds=compiled_at - lowered_at,
        update_in_backward=run.update_in_backward,
    )


def shard_bytes(tree: Any, least_itemsize: int = 0) -> int:
    """Bytes of one device's shards of arrays or shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape))
        * max(leaf.dtype.itemsize, least_itemsize)
        for leaf in jax.tree.leaves(tree)
    )


def compile_step(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, int]:
    """Compiles a program; returns it and its memory, or None if that is too large."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT])i?B? of", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or used is None:
            raise
        return None, int(float(used[1]) * 2 ** (10 * "KMGT".index(used[2]) + 10))
    memory = compiled.memory_analysis()
    return compiled, (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes  # the new state reuses the donated one's memory
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
