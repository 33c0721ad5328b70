"""Stricter rules than users have: 8 devices, no rank promotion, dtypes kept."""

import gc
import pathlib

import jax
import pytest

# Before JAX starts its backend: eight devices on one CPU, for the sharding tests.
jax.config.update("jax_num_cpu_devices", 8)

MOST_MAPS = 30_000
_LIBRARY_TESTS = pathlib.Path(__file__).parent


@pytest.fixture(autouse=True, scope="module")
def _few_memory_maps():
    """Every compiled program maps memory, of which a process has only so much.

    XLA crashes at Linux' usual 65,530 maps, those of some thousand programs.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def _no_rank_promotion(request):
    """The library never broadcasts a vector against a matrix by accident."""
    if request.path.parent != _LIBRARY_TESTS:
        yield
        return
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def strict_dtypes():
    """No implicit dtype promotion; optax's own functions do not pass under it."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64():
    """64-bit types for the length of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    """Runs a test in both precisions; the value is the dtype's name."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param
