"""Test configuration: 8 CPU devices, no rank promotion, no implicit dtype promotion."""

import gc
import pathlib

import jax
import pytest

from tests import compilation

# Before JAX starts its backend: eight CPU devices for the sharding tests.
jax.config.update("jax_num_cpu_devices", 8)

compilation.make_quick()

MOST_MAPS = 30_000
_TESTS = pathlib.Path(__file__).parent
_PROGRAM_TESTS = (_TESTS / "models", _TESTS / "train")


def pytest_collection_finish():
    """Spares the garbage collector what stays: it took 5% of the time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def _few_memory_maps():
    """Clears compiled programs between modules: each maps memory, which is limited.

    XLA crashes at Linux' usual 65,530 maps, those of some thousand programs.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def _no_rank_promotion(request):
    """Raises where a vector would be broadcast against a matrix."""
    if any(request.path.is_relative_to(tests) for tests in _PROGRAM_TESTS):
        yield
        return
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def optimized():
    """Programs compiled as for users, for tests that read them or their memory."""
    with compilation.optimized():
        yield


@pytest.fixture
def strict_dtypes():
    """Raises on implicit dtype promotion; optax's own functions need it."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64():
    """Enables 64-bit types for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    """Runs a test in both precisions; the value is the dtype's name."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param
