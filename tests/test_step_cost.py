"""Operations and copies of a step, counted in its program."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

import subtrack_jax as stj
from tests import common

RANK = 2
INTERVAL = 3


def _equations(jaxpr, nesting=()):
    """Yields every equation with the primitives around it.

    A `cond` that only chooses the code of a platform is not one when it runs; its
    last branch, for platforms without code of their own, stands for it.
    """
    for equation in jaxpr.eqns:
        yield equation, nesting
        of_platform = equation.params.get("branches_platforms") is not None
        name = "platform" if of_platform else equation.primitive.name
        inners = list(jaxprs_in_params(equation.params))
        for inner in inners[-1:] if of_platform else inners:
            yield from _equations(inner, (*nesting, name))


def _update_jaxpr(name: str, shape: tuple[int, ...], dtype: str = "float32"):
    optimizer = common.OPTIMIZERS[name](
        1e-3,
        rank=RANK,
        dimension_numbers=optax.contrib.MuonDimensionNumbers(-2, -1),
    )
    params = jax.ShapeDtypeStruct(shape, dtype)
    state = jax.eval_shape(optimizer.init, params)
    return jax.make_jaxpr(optimizer.update)(params, state, params).jaxpr


@pytest.mark.parametrize("name", common.TRACKING)
def test_a_refresh_is_a_loop_of_at_most_one_turn(name):
    """One scalar predicate outside `vmap`, which would turn `cond` into `select`.

    What only a refresh computes, decompositions and random numbers, must be inside
    for a stacked leaf as for a matrix, with nothing of it outside.
    """
    expensive = {"svd", "qr", "geqrf", "householder_product", "random_bits"}
    counts = []
    for shape in [(6, 10), (3, 6, 10)]:
        inside, outside = collections.Counter(), collections.Counter()
        for equation, nesting in _equations(_update_jaxpr(name, shape)):
            where = inside if "while" in nesting else outside
            where[equation.primitive.name] += 1
            if equation.primitive.name == "while" and "while" not in nesting:
                assert equation.params["cond_jaxpr"].out_avals[0].shape == ()
        assert expensive & set(inside), f"no refresh found: {inside}"
        assert not expensive & set(outside), f"outside of any loop: {outside}"
        assert "cond" not in outside
        counts.append((outside["while"], outside["dot_general"]))
    assert counts[0] == counts[1]
    kept = ("subtrack_grad", "galore", "fira", "online_subspace_descent")
    is_transported = name not in kept
    assert counts[0][0] == 2 + is_transported  # the start and the refreshes


@pytest.mark.parametrize("transport", [True, False])
def test_refresh_runs_only_when_due(transport):
    """Counts executions, for each slice of a stacked leaf."""
    calls = []

    def move(gradient, basis, context):
        jax.debug.callback(lambda _: calls.append(1), gradient[0, 0])
        return stj.geodesic().move(gradient, basis, context)

    low_rank = stj.LowRank(RANK, optax.contrib.MuonDimensionNumbers(-2, -1))
    optimizer = optax.chain(
        stj.track_subspace(
            low_rank, stj.geodesic()._replace(move=move), update_interval=INTERVAL
        ),
        stj.project(low_rank),
        stj.scale_by_projection_aware_adam(low_rank, transport=transport),
        stj.recover_and_scale(low_rank),
    )
    gradients = {
        "stacked": jnp.asarray(common.drifting_gradients(common.LEAVES["stacked"], 8))
    }
    params = {"stacked": jnp.zeros((3, 6, 10))}
    run = common.run(optimizer, params, gradients)
    jax.block_until_ready(run)
    jax.effects_barrier()
    assert len(calls) == 2 * 3  # steps 3 and 6, three slices each
    moved = np.any(np.diff(run.bases["stacked"], axis=0) != 0, axis=(1, 2, 3))
    np.testing.assert_array_equal(np.flatnonzero(moved) + 1, [3, 6])


@pytest.mark.parametrize("name", common.OPTIMIZERS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 24, 40)])
def test_a_steady_step_is_two_products(name, shape):
    """m n r each: one into the subspace, one back. No m x m and no n x n.

    APOLLO never goes back; error feedback takes back what is in the subspaces.
    """
    product = int(np.prod(shape)) * RANK
    products = 0
    for equation, nesting in _equations(_update_jaxpr(name, shape)):
        if equation.primitive.name != "dot_general" or "while" in nesting:
            continue
        left, right = (x.aval for x in equation.invars)
        (contract, _), (batch, _) = equation.params["dimension_numbers"]
        shared = [left.shape[axis] for axis in (*contract, *batch)]
        flops = left.size * right.size // int(np.prod(shared))
        products += flops == product
        assert flops <= product
    others = {"apollo": 1, "apollo_mini": 1, "ldadam": 4}
    assert products == others.get(name, 2)


# LDAdam changes everything on every step.
@pytest.mark.parametrize("name", [n for n in common.OPTIMIZERS if n != "ldadam"])
def test_what_a_step_does_not_change_is_not_copied(name):
    """Moments and gradients are never copied, bases only if needed."""
    shapes = {"gradient": (3, 24, 40), "moment": (3, RANK, 40), "basis": (3, 24, RANK)}
    optimizer = common.OPTIMIZERS[name](
        1e-3,
        rank=RANK,
        dimension_numbers=optax.contrib.MuonDimensionNumbers(-2, -1),
    )
    params = jax.ShapeDtypeStruct(shapes["gradient"], jnp.float32)
    state = jax.eval_shape(optimizer.init, params)
    step = jax.jit(optimizer.update, donate_argnums=1)
    text = step.lower(params, state, params).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    copied = re.findall(r"= f32\[([0-9,]+)\]\S* copy\(", entry)
    if name in ("grass_walk", "grass_jump", "golore"):
        shapes.pop("basis")  # transport reads both bases
    for what, shape in shapes.items():
        assert ",".join(map(str, shape)) not in copied, what
