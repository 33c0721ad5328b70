"""The four stages: records between them, order, state."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subtrack_jax as stj
from tests import common

RANK = 2
INTERVAL = 3
LEAVES = {name: common.LEAVES[name] for name in ("wide", "stacked", "vector")}
LOW_RANK = stj.LowRank(rank=RANK, dimension_numbers=common.dimension_numbers(LEAVES))

MIXED = "float32", "bfloat16"  # dtypes of parameters and gradients

# The chains of the aliases, written out as a user would.
CHAINS = {
    "subtrack": (stj.geodesic(), True, "columns"),
    "subtrack_grad": (stj.geodesic(), False, "none"),
    "grass_walk": (stj.random_walk(), True, "columns"),
    "grass_jump": (stj.random_jump(), True, "columns"),
    "galore": (stj.svd(init="randomized"), False, "none"),
    "fira": (stj.svd(init="randomized"), False, "columns"),
    "golore": (
        stj.switch(stj.svd(init="randomized"), stj.random_jump(), after_steps=5_000),
        "momentum",
        "none",
    ),
    "online_subspace_descent": (stj.online_pca(init="randomized"), False, "none"),
}


def _chain(
    name: str, *after: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    tracker, transport, recovery = CHAINS[name]
    return optax.chain(
        stj.track_subspace(LOW_RANK, tracker, update_interval=INTERVAL),
        stj.project(LOW_RANK),
        stj.scale_by_projection_aware_adam(LOW_RANK, transport=transport),
        stj.recover_and_scale(LOW_RANK, recovery=recovery),
        *after,
    )


def _ldadam(*after):
    stages = optax.chain(
        stj.track_subspace(LOW_RANK, stj.power_iteration(0.908, "randomized"), 3),
        stj.project(LOW_RANK),
        stj.scale_by_projection_aware_adam(LOW_RANK, 0.908, 0.99),
    )
    return optax.chain(
        stj.feed_back(LOW_RANK, stages, 0.908, error_feedback=True),
        stj.recover_and_scale(LOW_RANK, 1.0, "none"),
        *after,
    )


def _apollo(*after, low_rank=LOW_RANK, **scaling):
    return optax.chain(
        stj.draw_projection(low_rank, update_interval=INTERVAL),
        stj.project(low_rank),
        stj.scale_by_projection_aware_adam(low_rank, transport=False),
        stj.scale_gradient(low_rank, **scaling),
        *after,
    )


OTHER_CHAINS = {
    "ldadam": _ldadam,
    "apollo": _apollo,
    "apollo_mini": functools.partial(_apollo, scale=128.0**0.5, per="matrix"),
}


def _assert_same_bits(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", [*CHAINS, *OTHER_CHAINS])
def test_alias_is_the_chain_to_the_last_bit(name):
    """With weight decay: the same operations, from parameters to state."""
    alias = common.OPTIMIZERS[name](
        1e-3,
        rank=RANK,
        update_interval=INTERVAL,
        weight_decay=0.1,
        dimension_numbers=LOW_RANK.dimension_numbers,
    )
    written_out = OTHER_CHAINS.get(name) or functools.partial(_chain, name)
    chain = written_out(
        optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-3)
    )
    assert common.is_same_program(alias, chain, common.zeros(LEAVES))


STAGES = {
    "track_subspace": stj.track_subspace(LOW_RANK, stj.geodesic()),
    "project": stj.project(LOW_RANK),
    "scale_by_projection_aware_adam": stj.scale_by_projection_aware_adam(LOW_RANK),
    "recover_and_scale": stj.recover_and_scale(LOW_RANK),
}


@pytest.mark.parametrize("missing", list(STAGES)[:-1])
def test_a_missing_stage_is_named(missing):
    """The first stage that cannot read records raises the error."""
    chain = optax.chain(*(s for name, s in STAGES.items() if name != missing))
    params = common.zeros(LEAVES)
    with pytest.raises(TypeError, match=missing):
        jax.eval_shape(chain.update, params, chain.init(params), params)


def test_on_coordinates_names_project():
    params = common.zeros(LEAVES)
    stage = stj.on_coordinates(LOW_RANK, optax.scale_by_lion())
    with pytest.raises(TypeError, match="project"):
        jax.eval_shape(stage.update, params, stage.init(params), params)


def test_tracking_twice_is_refused():
    params = common.zeros(LEAVES)
    chain = optax.chain(STAGES["track_subspace"], STAGES["track_subspace"])
    with pytest.raises(TypeError, match="track_subspace"):
        jax.eval_shape(chain.update, params, chain.init(params), params)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (
            lambda: stj.feed_back(
                LOW_RANK, optax.chain(*list(STAGES.values())[:2])
            ).init(common.zeros(LEAVES)),
            TypeError,
            "0 first moments mu with a count",
        ),
        (
            lambda: jax.eval_shape(
                (stage := stj.track_subspace(LOW_RANK, stj.power_iteration())).update,
                common.zeros(LEAVES),
                stage.init(common.zeros(LEAVES)),
            ),
            TypeError,
            "inside of feed_back",
        ),
        (
            lambda: stj.switch(stj.svd(), stj.svd(), after_steps=-1),
            ValueError,
            "after_steps=-1: must be an int >= 0",
        ),
        *(
            (functools.partial(build, value), ValueError, f"{value!s}.*{words}")
            for build, value, words in [
                (lambda n: stj.subtrack(1.0, update_interval=n), 10**10, "2147483647"),
                (lambda n: stj.apollo(1.0, update_interval=n), 2**31, "2147483647"),
                (lambda n: stj.golore(1.0, random_after_steps=n), 10**10, "2147483647"),
                (
                    lambda n: stj.switch(stj.svd(), stj.random_jump(), n),
                    np.int64(2**40),
                    "<= 2147483647",
                ),
                (lambda n: stj.subtrack(1.0, seed=n), 2**32, "an int of 32 bits"),
                (lambda n: stj.apollo(1.0, seed=n), -(2**31) - 1, "an int of 32 bits"),
                (lambda n: stj.subtrack(1.0, seed=n), 0.5, "an int of 32 bits"),
            ]
        ),
        (
            lambda: stj.golore(1e-3, random_after_steps=-1),
            ValueError,
            "random_after_steps=-1: must be",
        ),
        (lambda: stj.power_iteration(rho=1.0), ValueError, "rho=1.0: must be"),
        (
            lambda: stj.scale_gradient(LOW_RANK, per="rows"),
            ValueError,
            "per='rows': use 'columns' or 'matrix'",
        ),
    ],
)
def test_what_cannot_work_is_told(build, error, words):
    with pytest.raises(error, match=words):
        build()


class TestState:
    def test_fields(self):
        """Names of fields that users look up; plain leaves have no entries."""
        params = common.zeros(LEAVES)
        state = _chain("subtrack").init(params)
        assert isinstance(state[0], stj.TrackSubspaceState)
        assert state[1] == optax.EmptyState()
        assert isinstance(state[2], optax.ScaleByAdamState)
        assert isinstance(state[3], stj.RecoverAndScaleState)
        basis, mu, nu, norm = (
            optax.tree.get(state, name)
            for name in ("basis", "mu", "nu", "recovery_norm")
        )
        assert isinstance(basis["vector"], optax.MaskedNode)
        assert isinstance(norm["vector"], optax.MaskedNode)
        assert mu["vector"].shape == nu["vector"].shape == (5,)
        assert basis["stacked"].shape == (3, 6, RANK)
        assert mu["stacked"].shape == nu["stacked"].shape == (3, RANK, 10)
        assert norm["stacked"].shape == (3,)
        assert basis["wide"].shape == (6, RANK)
        assert norm["wide"].shape == ()

    def test_only_arrays_and_no_key(self):
        """Any checkpoint format can store arrays."""
        for leaf in jax.tree.leaves(_chain("grass_jump").init(common.zeros(LEAVES))):
            assert isinstance(leaf, jax.Array)
            assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)

    @pytest.mark.parametrize(
        "arguments", [dict(recovery="none"), dict(growth_limit=None)]
    )
    def test_no_norm_where_nothing_is_limited(self, arguments):
        state = stj.recover_and_scale(LOW_RANK, **arguments).init(common.zeros(LEAVES))
        assert not jax.tree.leaves(state)

    @pytest.mark.parametrize("name", common.OPTIMIZERS)
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
    def test_types_are_stable(self, name, dtype):
        """Structure, shapes, dtypes and weak types, for parameters of every dtype."""
        with jax.enable_x64(dtype == "float64"):
            optimizer = common.OPTIMIZERS[name](
                1e-3,
                rank=RANK,
                weight_decay=0.1,
                dimension_numbers=LOW_RANK.dimension_numbers,
            )
            params = common.zeros(LEAVES, dtype)
            init = jax.eval_shape(optimizer.init, params)
            updates, state = jax.eval_shape(optimizer.update, params, init, params)
        types = lambda tree: jax.tree.map(
            lambda x: (x.shape, x.dtype, x.weak_type), tree
        )
        assert types(state) == types(init)
        assert types(updates) == types(jax.eval_shape(lambda: params))
        for field in ("basis", "mu", "nu", "error", "memory"):
            for leaf in jax.tree.leaves(optax.tree.get(init, field)):
                if field == "memory" and leaf.dtype == jnp.int32:
                    continue  # a count
                assert leaf.dtype == jnp.promote_types(dtype, "float32")

    @pytest.mark.parametrize(
        ("name", "of_params", "of_gradients", "wider"),
        [
            *((name, *MIXED, "float32") for name in common.OPTIMIZERS),
            ("subtrack", "bfloat16", "float32", "float32"),
            ("subtrack", "bfloat16", "bfloat16", "bfloat16"),
            ("ldadam", "bfloat16", "bfloat16", "bfloat16"),
            ("apollo", "bfloat16", "bfloat16", "bfloat16"),
            ("subtrack", "float16", "bfloat16", "float32"),
            ("apollo", "float64", "float32", "float64"),
            ("ldadam", "float64", "bfloat16", "float64"),
        ],
    )
    def test_mixed_dtypes(self, name, of_params, of_gradients, wider):
        """Updates have the wider dtype of gradient and parameter, if both are given."""
        with jax.enable_x64("float64" in (of_params, of_gradients)):
            optimizer = common.OPTIMIZERS[name](
                1e-3, rank=RANK, dimension_numbers=LOW_RANK.dimension_numbers
            )
            params = common.zeros(LEAVES, of_params)
            gradients = common.zeros(LEAVES, of_gradients)
            init = jax.eval_shape(optimizer.init, params)
            types = lambda state: jax.tree.map(lambda x: x.dtype, state)
            for given, dtype in [(params, wider), (None, of_gradients)]:
                updates, state = jax.eval_shape(
                    optimizer.update, gradients, init, given
                )
                assert {str(x.dtype) for x in jax.tree.leaves(updates)} == {dtype}
                assert types(state) == types(init)
            for leaf in jax.tree.leaves(optax.tree.get(state, "basis")):
                assert leaf.dtype == jnp.promote_types(of_params, "float32")

    def test_parameters_in_boxes_and_of_another_structure(self):
        """Parameters in boxes, or with leaves that have no gradient."""
        optimizer = stj.subtrack(1e-3, rank=RANK)
        params = {"wide": jnp.zeros((6, 10)), "rule": None}
        gradients = jax.tree.map(lambda x: x.astype("bfloat16"), params)
        boxed = nn.Partitioned(gradients["wide"], (None, None))
        for gradient, param in [
            (gradients, params | {"rule": jnp.tanh}),
            ({"wide": boxed}, {"wide": boxed.replace_boxed(params["wide"])}),
        ]:
            state = optimizer.init(param if "rule" not in param else params)
            update = lambda g, s, param=param: optimizer.update(g, s, param)
            updates, _ = jax.eval_shape(update, gradient, state)
            assert jax.tree.leaves(updates)[0].dtype == jnp.float32

    def test_small_steps_of_float32_parameters_keep_their_digits(self):
        optimizer = stj.subtrack(1e-3 / 3, rank=RANK)
        gradient = common.at(common.drifting_tree(LEAVES, 1), 0)["wide"]
        params = jnp.zeros((6, 10))
        state = optimizer.init(params)
        rounded = gradient.astype("bfloat16")
        got, _ = optimizer.update(rounded, state, params)
        want, _ = optimizer.update(rounded.astype("float32"), state, params)
        np.testing.assert_array_equal(got, want)

    def test_mu_dtype(self):
        """Only the first moment has the dtype; the optimizer still trains."""
        gradients = common.drifting_tree(LEAVES, INTERVAL + 2)
        params = common.at(gradients, 0)
        optimizer = stj.subtrack(
            1e-3,
            rank=RANK,
            update_interval=INTERVAL,
            mu_dtype=jnp.bfloat16,
            dimension_numbers=LOW_RANK.dimension_numbers,
        )
        run = common.run(optimizer, params, gradients)
        for field, dtype in [
            ("mu", "bfloat16"),
            ("nu", "float32"),
            ("basis", "float32"),
        ]:
            for leaf in jax.tree.leaves(optax.tree.get(run.state, field)):
                assert leaf.dtype == dtype
        full = stj.subtrack(
            1e-3,
            rank=RANK,
            update_interval=INTERVAL,
            dimension_numbers=LOW_RANK.dimension_numbers,
        )
        want = common.run(full, params, gradients).updates
        for name in LEAVES:
            error = jnp.linalg.norm((run.updates[name] - want[name]).ravel())
            assert error < 2.0**-6 * jnp.linalg.norm(want[name].ravel())

    def test_basis_dtype(self):
        """Stored in bfloat16, computed in float32: orthonormal within rounding."""
        optimizer = optax.chain(
            stj.track_subspace(
                LOW_RANK,
                stj.geodesic(),
                update_interval=INTERVAL,
                basis_dtype=jnp.bfloat16,
            ),
            stj.project(LOW_RANK),
            stj.scale_by_projection_aware_adam(LOW_RANK),
            stj.recover_and_scale(LOW_RANK),
        )
        gradients = common.drifting_tree(LEAVES, 4 * INTERVAL)
        got = common.run(optimizer, common.zeros(LEAVES), gradients)
        want = common.run(_chain("subtrack"), common.zeros(LEAVES), gradients)
        for name in ("wide", "stacked"):
            assert got.bases[name].dtype == jnp.bfloat16
            assert common.orthonormality_error(got.bases[name]) < 2.0**-7
            error = jnp.linalg.norm((got.updates[name] - want.updates[name]).ravel())
            assert error < 0.05 * jnp.linalg.norm(want.updates[name].ravel())
        np.testing.assert_array_equal(got.updates["vector"], want.updates["vector"])

    @pytest.mark.parametrize("name", common.OPTIMIZERS)
    def test_init_from_shapes(self, name):
        """On `ShapeDtypeStruct`s, under `eval_shape` and under `jit`."""
        optimizer = common.OPTIMIZERS[name](
            1e-3, rank=RANK, dimension_numbers=LOW_RANK.dimension_numbers
        )
        params = common.zeros(LEAVES, jnp.bfloat16)
        shapes = jax.eval_shape(lambda: params)
        types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        want = types(optimizer.init(params))
        assert types(optimizer.init(shapes)) == want
        assert types(jax.eval_shape(optimizer.init, params)) == want
        assert types(jax.jit(optimizer.init)(params)) == want


class TestOnCoordinates:
    """Any optax rule in the coordinates."""

    gradients = common.drifting_tree(LEAVES, 2 * INTERVAL)

    def _updates(self, stage, **arguments):
        optimizer = optax.chain(
            stj.track_subspace(LOW_RANK, stj.geodesic(), update_interval=INTERVAL),
            stj.project(LOW_RANK),
            stage,
            stj.recover_and_scale(LOW_RANK, **arguments),
        )
        return common.run(optimizer, common.zeros(LEAVES), self.gradients)

    def test_adam(self):
        """Without transport, the projection-aware Adam is Adam on coordinates."""
        got = self._updates(stj.on_coordinates(LOW_RANK, optax.scale_by_adam()))
        want = self._updates(
            stj.scale_by_projection_aware_adam(LOW_RANK, transport=False)
        )
        _assert_same_bits(got.updates, want.updates)

    def test_identity_is_the_gradient(self):
        """phi = 1 for the identity: parts inside and outside add up to the gradient."""
        got = self._updates(
            stj.on_coordinates(LOW_RANK, optax.identity()), scale=1.0, growth_limit=None
        )
        for name, want in self.gradients.items():
            np.testing.assert_allclose(got.updates[name], want, atol=1e-5)

    def test_sign(self):
        """Lion's first direction in coordinates is the sign of the coordinates."""
        got = self._updates(
            stj.on_coordinates(LOW_RANK, optax.scale_by_lion()),
            scale=1.0,
            recovery="none",
        )
        basis = np.asarray(got.bases["wide"][0])
        want = basis @ np.sign(basis.T @ np.asarray(self.gradients["wide"][0]))
        np.testing.assert_allclose(got.updates["wide"][0], want, atol=1e-5)
        np.testing.assert_array_equal(
            got.updates["vector"][0], jnp.sign(self.gradients["vector"][0])
        )

    def test_transport_is_called_where_the_basis_moved(self):
        """The rule continues from the transport's result."""

        def forget(state, rotations):
            del rotations
            return jax.tree.map(jnp.zeros_like, state)

        stage = stj.on_coordinates(LOW_RANK, optax.trace(0.9), transport=forget)
        got = self._updates(stage, scale=1.0, recovery="none")
        basis = np.asarray(got.bases["wide"], np.float64)
        seen = np.asarray(self.gradients["wide"], np.float64)
        for step, start in [(2, 0), (3, 3), (5, 3)]:
            trace = sum(
                0.9 ** (step - k) * basis[step].T @ seen[k]
                for k in range(start, step + 1)
            )
            np.testing.assert_allclose(
                got.updates["wide"][step], basis[step] @ trace, atol=1e-5
            )
        plain = sum(0.9 ** (5 - k) * self.gradients["vector"][k] for k in range(6))
        np.testing.assert_allclose(got.updates["vector"][5], plain, rtol=1e-5)


# --- What a step costs --------------------------------------------------------
