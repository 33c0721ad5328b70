"""Memory goes back to the system after what takes much of it."""

import types

import jax
import pytest

from train import memory


@pytest.fixture
def trimmed(monkeypatch):
    calls = []
    library = types.SimpleNamespace(malloc_trim=calls.append)
    monkeypatch.setattr(memory, "_c_library", lambda: library)
    monkeypatch.setattr(memory, "SHORTEST_SECONDS", 0)
    return calls


def test_compilation_is_followed_by_it(trimmed):
    memory.return_what_compilers_free()
    jax.jit(lambda x: x * 41 - 5)(2.0).block_until_ready()
    assert trimmed and set(trimmed) == {0}
    count = len(trimmed)
    jax.monitoring.record_event_duration_secs("/jax/another", 9.0)
    assert len(trimmed) == count


def test_other_c_libraries_do_without(monkeypatch):
    registered = []
    monkeypatch.setattr(memory, "_c_library", types.SimpleNamespace)
    monkeypatch.setattr(
        jax.monitoring, "register_event_duration_secs_listener", registered.append
    )
    memory.return_what_compilers_free()
    assert not registered
