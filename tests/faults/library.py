"""Faults of the library."""

from tests.faults.fault import fault

ORACLE = "tests/optimizers/test_oracle_parity.py"
GRASSMANN = "tests/test_grassmann.py"
EDGES = "tests/test_edge_cases.py"
EIGHT_BIT = "tests/stages/test_eight_bit.py"
COMMUNICATION = "tests/sharding/test_communication.py"

GEOMETRY = [
    fault(
        "tangent keeps what lies in the basis",
        "return product - basis @ (basis.T @ product)",
        "return product",
        f"{GRASSMANN}::test_tangent",
    ),
    fault(
        "line search takes the whole angle",
        "jnp.where((sine == 0) & (cosine == 0), 1, cosine)) / 2",
        "jnp.where((sine == 0) & (cosine == 0), 1, cosine))",
        f"{GRASSMANN}::test_line_search_captures_the_most",
    ),
    fault(
        "geodesic turns away from u",
        "* (jnp.cos(angle) - 1) + u * jnp.sin(angle)",
        "* (jnp.cos(angle) - 1) - u * jnp.sin(angle)",
        f"{GRASSMANN}::test_geodesic",
    ),
    fault(
        "exponential map sums one term wrongly",
        "((2 * k) * (2 * k + 1))",
        "((2 * k) * (2 * k + 2))",
        f"{GRASSMANN}::test_exponential_map",
    ),
    fault(
        "captured energy is a root",
        "jnp.where(total > 0, captured / jnp.where(total > 0, total, 1), 1)",
        "jnp.where(total > 0, (captured / jnp.where(total > 0, total, 1)) ** 0.5, 1)",
        f"{GRASSMANN}::test_captured_energy",
    ),
    fault(
        "range finder stops after one power iteration",
        "        power_iterations + 1,\n",
        "        1,\n",
        f"{GRASSMANN}::test_range_finder_captures_what_the_svd_captures",
        ORACLE,
    ),
    fault(
        "panels of the blocked factorisation are not freed of those before",
        "panel = _unit_columns(panel - dot(before, overlap))",
        "panel = _unit_columns(panel)",
        "tests/internal/test_orthonormal.py",
    ),
    fault(
        "the basis never gets its rounding removed",
        "    return basis + basis @ error\n",
        "    return basis\n",
        f"{GRASSMANN}::test_orthonormalize",
        f"{EDGES}::test_orthonormal_after_ten_thousand_updates",
    ),
]

STAGES = [
    fault(
        "the second moment forgets the turned mean",
        "jnp.abs(variance + ratio * rotated * rotated)",
        "jnp.abs(variance)",
        ORACLE,
    ),
    fault(
        "the second moment is not made positive",
        "jnp.abs(variance + ratio * rotated * rotated)",
        "variance + ratio * rotated * rotated",
        f"{ORACLE}::test_a_variance_that_comes_out_negative",
    ),
    fault(
        "a rank-one rotation bends twice",
        "return self.cosine - 1",
        "return 2 * (self.cosine - 1)",
        ORACLE,
    ),
    fault(
        "a dense rotation is transposed",
        "return dot(self.basis.mT, self.previous_basis)",
        "return dot(self.previous_basis.mT, self.basis)",
        ORACLE,
    ),
    fault(
        "the limiter lets everything through",
        "is_limited = has_last & (norm > limit)",
        "is_limited = has_last & (norm > limit) & False",
        ORACLE,
        "tests/optimizers/test_golden.py",
    ),
    fault(
        "the limiter remembers the norm before it",
        "limited = jnp.where(is_limited, limit, norm)",
        "limited = norm",
        ORACLE,
    ),
    fault(
        "the recovered part keeps what is inside",
        "inside_energy = removed * (2 - removed) * energy",
        "inside_energy = 0 * energy",
        ORACLE,
    ),
    fault(
        "the published residual removes all",
        'removed = scale if residual == "published" else 1',
        "removed = 1",
        f"{ORACLE}::test_float64",
    ),
    fault(
        "error feedback forgets the moments' loss",
        "after = record.coordinates + record.rotation.rotate(before)",
        "after = record.coordinates + before",
        ORACLE,
    ),
    fault(
        "the momentum for trackers is not corrected",
        "return mean.astype(dtype) / jnp.where(weight > 0, weight, 1)",
        "return mean.astype(dtype)",
        ORACLE,
    ),
    fault(
        "a walk ignores its angle",
        "tangent = angle * grassmann.random_tangent(context.key, basis)",
        "tangent = 0.1 * grassmann.random_tangent(context.key, basis)",
        "tests/stages/test_tracker.py",
    ),
    fault(
        "a switch goes over one step late",
        "is_first = context.count < after_steps",
        "is_first = context.count <= after_steps",
        "tests/stages/test_tracker.py",
    ),
    fault(
        "a projection is drawn on every step",
        "drawn_at = state.count - state.count % update_interval",
        "drawn_at = state.count",
        ORACLE,
    ),
    fault(
        "a bad gradient moves the error",
        "return jnp.where(usable, new, old)",
        "return new",
        f"{EDGES}::test_a_bad_gradient_leaves_the_error_as_it_was",
    ),
    fault(
        "the monitor measures a zero gradient as lost",
        "captured = jnp.where(total > 0, inside / jnp.where(total > 0, total, 1), 1)",
        "captured = inside / jnp.where(total > 0, total, 1)",
        "tests/stages/test_monitor.py",
    ),
    fault(
        "gradients stay narrower than their parameters",
        "    if dtype.itemsize != other.itemsize:\n",
        "    if dtype.itemsize == other.itemsize:\n",
        "tests/stages/test_stages.py",
    ),
    fault(
        "rows of a slice are dithered from its start",
        "row = rows.astype(jnp.uint32)[:, None, None]",
        "row = place(blocks.ndim - 3)",
        "tests/stages/test_slices.py::test_equal_to_the_chain",
    ),
    fault(
        "slices of a stack are not held",
        "parts = hold(barrier(jax.tree.map(pick, stacks, axes)), k < 0)",
        "parts = barrier(jax.tree.map(pick, stacks, axes))",
        "tests/stages/test_slices.py::test_temporaries_of_an_embedding_in_eight_bits",
    ),
    fault(
        "dither is the same on every step",
        "dither = count.astype(jnp.uint32) * jnp.uint32(2654435769)",
        "dither = count.astype(jnp.uint32) * jnp.uint32(0)",
        f"{EIGHT_BIT}",
        "tests/internal/test_dynamic_map.py",
    ),
    fault(
        "the second moment is coded as it is",
        "nu, nu_scale = coded(jnp.sqrt, jnp.uint8, moments.nu, before.nu_scale)",
        "nu, nu_scale = coded(lambda nu: nu, jnp.uint8, moments.nu, before.nu_scale)",
        f"{EIGHT_BIT}",
    ),
    fault(
        "a conditional update runs always",
        "(jnp.asarray(predicate, bool), operand),",
        "(jnp.asarray(True), operand),",
        "tests/test_step_cost.py",
    ),
]

MESH_FAULTS = [
    fault(
        "bases are not replicated for products",
        "return replicated(basis) if is_less else basis",
        "return basis",
        COMMUNICATION,
    ),
    fault(
        "coordinates stay split along their rank",
        "return replicated(coordinates, axes=(-2,))",
        "return coordinates",
        COMMUNICATION,
    ),
    fault(
        "a basis is split as its gradient",
        "long, short = _split(view.basis_shape[-2:], spec, mesh, own + other)",
        "long, short = _split(view.basis_shape[-2:], spec, mesh, own)",
        "tests/sharding/test_state_sharding.py",
    ),
    fault(
        "one large matrix after another is never taken",
        "if on_mesh and math.prod(view.coordinates_shape[-2:]) >= LARGE:",
        "if False:",
        "tests/internal/test_matrix_view.py::"
        "test_large_matrices_on_a_mesh_are_mapped_in_a_loop",
    ),
]

BACKWARD = [
    fault(
        "no update writes the shared state",
        "join(new_state, part, last.keys(), shared=True)",
        "join(new_state, part, last.keys())",
        "tests/test_update_in_backward.py",
    ),
    fault(
        "the head adds nothing to the gradient of a tied embedding",
        "{key: _sum(own[key], gradients[key]) for key in shared}",
        "{}",
        "tests/test_update_in_backward.py",
    ),
    fault(
        "each layer is updated, finite or not, and its stacks are copied",
        'return *apply_if(ok, update, (params, state), "update"), squares, ok',
        "return *update((params, state)), squares, ok",
        "tests/test_update_in_backward.py",
    ),
    fault(
        "a gradient that all layers share is taken for one layer's",
        "if any(a and b for a, b in zip(used, own, strict=True)):",
        "if False:",
        "tests/test_update_in_backward.py",
    ),
]
FAULTS = GEOMETRY + STAGES + MESH_FAULTS + BACKWARD
