"""Optax's own tests of contributed optimizers, with ours in place of theirs.

They ship in optax's wheel, written as one parameterized test case. Its test
functions are run here as they are; only the function that resolves an optimizer's
name is replaced.
"""

import itertools

import jax.numpy as jnp
import pytest
from optax.contrib import _common_test as conformance

from tests import common

TARGETS = (
    conformance._setup_parabola,
    conformance._setup_rosenbrock,
    conformance._setup_matrix_parabola,
    conformance._setup_mixed_tensor_target,
)
LOW_PRECISION = ("bfloat16", "float32")
EVERY_FLOAT = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)

# optax's own parameters of each test.
TESTS = {
    "test_optimizers_accept_extra_args": {"wrap": (True, False)},
    "test_optimizers": {"target": TARGETS, "dtype": ("float32",)},
    "test_optimizers_can_be_wrapped_in_inject_hyperparams": {},
    "test_preserve_dtype": {"dtype": LOW_PRECISION},
    "test_gradient_accumulation": {"dtype": LOW_PRECISION},
    "test_state_shape_dtype_shard_stability": {"dtype": EVERY_FLOAT},
    "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such": {},
}
CASES = [
    (test, dict(zip(axes, values, strict=True)))
    for test, axes in TESTS.items()
    for values in itertools.product(*axes.values())
]
# All of them for one optimizer; for the others every second test in turn, with its
# last values: what differs between methods is in the gate.
LAST = list({test: (test, arguments) for test, arguments in CASES}.values())
CHOSEN = [
    (name, case)
    for place, name in enumerate(common.OPTIMIZERS)
    for case in (CASES if name == "subtrack" else LAST[place % 2 :: 2])
]


def _functions():
    """The test functions behind the methods that absl generated from each."""
    functions = {}
    for attribute in dir(conformance.ContribTest):
        generated = getattr(conformance.ContribTest, attribute)
        if attribute.startswith("test_"):
            original = generated.__wrapped__
            functions[original.__name__] = original
    return functions


FUNCTIONS = _functions()


def _case_id(case):
    test, arguments = case
    names = (getattr(v, "__name__", str(v)) for v in arguments.values())
    return "-".join((test.removeprefix("test_"), *names))


def _run(monkeypatch, name, rank, test, arguments):
    monkeypatch.setattr(
        conformance, "_get_opt_factory", lambda name: common.OPTIMIZERS[name]
    )
    case = conformance.ContribTest()
    FUNCTIONS[test](
        case,
        opt_name=name,
        opt_kwargs={"learning_rate": 1e-2, "rank": rank},
        wrapper_name=None,
        wrapper_kwargs=None,
        **arguments,
    )


def test_nothing_is_missing():
    """Fails when optax adds a test, which must then be run here, too."""
    assert set(TESTS) == set(FUNCTIONS)
    assert len(CASES) == 16


@pytest.mark.parametrize(
    "name, case", CHOSEN, ids=[f"{name}-{_case_id(case)}" for name, case in CHOSEN]
)
def test_rank_1(monkeypatch, name, case):
    """Optax's matrices are 2 x 2: this rank makes them low-rank."""
    _run(monkeypatch, name, 1, *case)
