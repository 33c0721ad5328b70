"""FLOP counts against the compiler's; peaks and memory of devices."""

import dataclasses
import os
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import llama
from train.step import throughput

MODEL = llama.LlamaConfig(512, 128, 256, num_layers=1, num_heads=4)
LENGTH = 128


def counted_per_token(config):
    """Operations of forward and backward pass, as XLA counts them.

    It counts the body of a loop once, however many turns the loop has: one layer.
    """

    def loss(params, batch):
        model = nnx.merge(llama.definition(config), params)
        return llama.token_loss(model, **batch).loss

    tokens = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
    lowered = jax.jit(jax.grad(loss)).lower(
        llama.abstract_params(config), {"inputs": tokens, "targets": tokens}
    )
    return lowered.cost_analysis()["flops"] / (2 * LENGTH)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"num_key_value_heads": 1},
        {"head_dim": 64},
        {"num_layers": 5},
        {"vocabulary_size": 2048},
        {"mlp_size": 1024},
    ],
    ids=str,
)
def test_operations_are_those_that_the_compiler_counts(changes):
    config = dataclasses.replace(MODEL, **changes)
    one_layer = counted_per_token(config)
    head = 6 * config.hidden_size * config.vocabulary_size
    expected = head + config.num_layers * (one_layer - head)
    found = throughput.flops_per_token(config, LENGTH)
    np.testing.assert_allclose(found, expected, rtol=0.06)


def test_the_head_is_what_the_compiler_counts():
    more = dataclasses.replace(MODEL, vocabulary_size=2 * MODEL.vocabulary_size)
    head = 6 * MODEL.hidden_size * MODEL.vocabulary_size
    np.testing.assert_allclose(
        counted_per_token(more) - counted_per_token(MODEL), head, rtol=0.05
    )


def use_devices(monkeypatch, kind, count=1, statistics=None):
    device = types.SimpleNamespace(
        device_kind=kind, memory_stats=lambda: statistics, platform="fake"
    )
    monkeypatch.setattr(jax, "devices", lambda: [device] * count)
    monkeypatch.setattr(jax, "local_devices", lambda: [device] * count)


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-16GB", 125),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
    ],
)
def test_the_peak_of_known_devices(monkeypatch, kind, teraflops):
    use_devices(monkeypatch, kind, count=4)
    assert throughput.peak_flops() == 4 * teraflops * 1e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA GeForce RTX 4090", "NVIDIA A10"])
def test_a_peak_nobody_knows_can_be_given(monkeypatch, kind):
    use_devices(monkeypatch, kind, count=2)
    assert throughput.peak_flops() is None
    assert throughput.peak_flops(3.5) == 7e12


def test_a_given_peak_counts_more_than_the_table(monkeypatch):
    use_devices(monkeypatch, "NVIDIA H100 80GB HBM3")
    assert throughput.peak_flops(10.0) == 1e13


def test_memory_is_the_device_s_where_it_counts(monkeypatch):
    use_devices(monkeypatch, "a GPU", statistics={"peak_bytes_in_use": 12345})
    assert throughput.peak_memory_bytes() == 12345


@pytest.mark.parametrize("statistics", [None, {}, {"bytes_in_use": 3}])
def test_memory_is_the_process_s_elsewhere(monkeypatch, statistics):
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        pytest.skip("only Linux tells it a second way")
    use_devices(monkeypatch, "cpu", statistics=statistics)
    kibibytes = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # The system updates the two counts with different delays, hence 10 %.
    assert 0.9 * 1024 * int(kibibytes) <= throughput.peak_memory_bytes() < machine
