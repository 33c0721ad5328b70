"""Hardware utilisation: model FLOPs, peak FLOP/s, peak memory."""

import resource
import sys
from typing import NamedTuple

import jax

from models.config import LlamaConfig
from train.config.data_config import DataConfig

# Dense bfloat16 peaks of one device, in 10^12 FLOP/s, from the makers' data sheets.
# The first name that the device kind contains is used.
_PEAK_TERAFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "V100": 125,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,
    "TPU v6": 918,
}


class Counted(NamedTuple):
    """What a step counts, for totals and rates: tokens or examples.

    Attributes:
      unit: its name in metrics, in the plural.
      in_batch: how many a full batch has.
      flops: floating-point operations of a step for one of them. None: they differ.
      of_loss: name in metrics of what the loss counts, if that is not `unit`; the loss
        then reports `unit` per each of these.
    """

    unit: str
    in_batch: int
    flops: float | None = None
    of_loss: str | None = None


def tokens(model: LlamaConfig, data: DataConfig) -> Counted:
    """Tokens of a LLaMA's batches."""
    flops = flops_per_token(model, data.sequence_length_tokens)
    return Counted("tokens", data.batch_size_tokens, flops)


def flops_per_token(config: LlamaConfig, sequence_length_tokens: int) -> float:
    """Floating-point operations of forward and backward pass for one token.

    6 per parameter of a matrix product (not the embedding), plus 12 x layers x width x
    length for attention, not halved for causality (PaLM, arXiv 2204.02311, appendix B).
    Recomputation is not counted.

    >>> from models.llama import PRESETS
    >>> round(flops_per_token(PRESETS["llama-7b"], 2048) / 1e9, 1)
    42.9
    """
    hidden, heads = config.hidden_size, config.num_heads * config.head_size
    shared = config.key_value_heads * config.head_size
    attention = 2 * hidden * (heads + shared)
    layer = attention + 3 * hidden * config.mlp_size
    weights = config.num_layers * layer + hidden * config.vocabulary_size
    scores = 12 * config.num_layers * heads * sequence_length_tokens
    return 6.0 * weights + scores


def peak_flops(peak_teraflops: float | None = None) -> float | None:
    """Peak FLOP/s of all devices together; None if unknown.

    Args:
      peak_teraflops: peak of one device; None: looked up by the device's name.
    """
    kind = jax.devices()[0].device_kind
    if peak_teraflops is None:
        known = (peak for name, peak in _PEAK_TERAFLOPS.items() if name in kind)
        peak_teraflops = next(known, None)
    return (
        None if peak_teraflops is None else peak_teraflops * 1e12 * len(jax.devices())
    )


def peak_memory_bytes() -> int:
    """Peak memory of this process's first device; on a CPU, of the process."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
