"""Memory goes back to the system after what takes much of it."""

import types

import jax
import pytest

from train.system import out_of_memory


@pytest.fixture
def trimmed(monkeypatch):
    calls = []
    library = types.SimpleNamespace(malloc_trim=calls.append)
    monkeypatch.setattr(out_of_memory, "_c_library", lambda: library)
    monkeypatch.setattr(out_of_memory, "SHORTEST_SECONDS", 0)
    return calls


def test_compilation_is_followed_by_it(trimmed):
    out_of_memory.trim_after_compilations()
    jax.jit(lambda x: x * 41 - 5)(2.0).block_until_ready()
    assert trimmed and set(trimmed) == {0}
    count = len(trimmed)
    jax.monitoring.record_event_duration_secs("/jax/another", 9.0)
    assert len(trimmed) == count


def test_other_c_libraries_do_without(monkeypatch):
    registered = []
    monkeypatch.setattr(out_of_memory, "_c_library", types.SimpleNamespace)
    monkeypatch.setattr(
        jax.monitoring, "register_event_duration_secs_listener", registered.append
    )
    out_of_memory.trim_after_compilations()
    assert not registered


def test_a_state_larger_than_the_memory_is_refused():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    small, large = (
        jax.ShapeDtypeStruct((size, 2**20), "float32", sharding=sharding)
        for size in (1, 2**30)
    )
    out_of_memory.check([small])
    with pytest.raises(MemoryError, match=r"optimizer state take [\d,.]+ GB on this"):
        out_of_memory.check([small, large])


def test_a_lack_of_memory_is_told_in_one_line():
    text = "RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nBuffer 1: ..."
    with (
        pytest.raises(
            MemoryError, match=r"Out of memory allocating 7.*--remat"
        ) as told,
        out_of_memory.one_line_errors(),
    ):
        raise jax.errors.JaxRuntimeError(text)
    assert "\n" not in str(told.value)
    with pytest.raises(jax.errors.JaxRuntimeError), out_of_memory.one_line_errors():
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault")
