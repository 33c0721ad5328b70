"""Updates in the backward pass are those of the ordinary step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import subtrack_jax as stj

DEPTH, WIDTH, VOCABULARY, LENGTH = 3, 16, 20, 6
BATCH = 12
LOW_RANK = {
    "rank": 4,
    "update_interval": 2,
    "dimension_numbers": stj.by_path("layers/.*kernel"),
}


def make_params(depth=DEPTH, width=WIDTH, dtype=jnp.float32, tied=False):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / shape[-2] ** 0.5, dtype)

    params = {
        "embedding": {"kernel": normal(VOCABULARY, width)},
        "layers": {
            "norm": jnp.ones((depth, width), dtype),
            "up": {"kernel": normal(depth, width, 2 * width)},
            "down": {"kernel": normal(depth, 2 * width, width)},
        },
        "norm": jnp.ones((width,), dtype),
    }
    return params if tied else params | {"head": {"kernel": normal(width, VOCABULARY)}}


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(VOCABULARY, size=(BATCH, LENGTH + 1))
    mask = rng.random((BATCH, LENGTH)) < 0.7
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}


def before(rest, batch):
    return rest["embedding"]["kernel"][batch["inputs"]]


def _normalised(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def layer(own, x, batch):
    """Block that adds less to tokens that are masked."""
    y = _normalised(x, own["norm"][None, None])
    y = jnp.tanh(y @ own["up"]["kernel"]) @ own["down"]["kernel"]
    return x + jnp.where(batch["mask"], 1, 0.5).astype(x.dtype)[..., None] * y


def after(rest, x, batch):
    """Sum of cross entropies of the tokens that are not masked, and their number."""
    head = rest["head"]["kernel"] if "head" in rest else rest["embedding"]["kernel"].T
    logits = (_normalised(x, rest["norm"][None, None]) @ head).astype(jnp.float32)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, batch["targets"]
    )
    return jnp.sum(losses, where=batch["mask"]), jnp.sum(batch["mask"])


def make_step(optimizer, layer=layer, **arguments):
    step = stj.update_in_backward(
        optimizer, before, layer, after, has_aux=True, **arguments
    )

    @jax.jit
    def of_mean(params, state, batch):
        return step(params, state, batch, 1 / jnp.sum(batch["mask"]))

    return of_mean


def make_ordinary_step(optimizer, max_gradient_norm=math.inf):
    def mean_loss(params, batch):
        x, _ = jax.lax.scan(
            lambda x, own: (layer(own, x, batch), None),
            before(params, batch),
            params["layers"],
        )
        loss, count = after(params, x, batch)
        return loss / count

    @jax.jit
    def step(params, state, batch):
        value, gradients = jax.value_and_grad(mean_loss)(params, batch)
        norm = optax.tree.norm(optax.tree.cast(gradients, jnp.float32))
        factor = jnp.minimum(max_gradient_norm / norm, 1)
        gradients = jax.tree.map(lambda g: (factor * g).astype(g.dtype), gradients)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return stj.BackwardUpdate(value, None, params, state, norm, True)

    return step


def run(step, optimizer, params, steps=5):
    """Results of a step after some steps, and the losses of all."""
    state, losses = optimizer.init(params), []
    for seed in range(steps):
        done = step(params, state, make_batch(seed))
        params, state = done.params, done.opt_state
        losses.append(float(done.value))
    return done, losses


def assert_same_types(got, want):
    types = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert types(got) == types(want)


def assert_same_state(got, want, **tolerances):
    assert_same_types(got, want)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(
            a, b, err_msg=jax.tree_util.keystr(path), **tolerances
        )


def relative_difference(got, want, start):
    """Largest difference of a parameter, relative to its own change."""

    def of_leaf(a, b, before):
        a, b, before = (np.asarray(x, np.float64) for x in (a, b, before))
        return np.linalg.norm(a - b) / np.linalg.norm(b - before)

    return max(jax.tree.leaves(jax.tree.map(of_leaf, got, want, start)))


def not_norm(params):
    return jax.tree.map_with_path(
        lambda path, _: "norm" not in jax.tree_util.keystr(path), params
    )


SCHEDULE = optax.linear_schedule(1e-2, 1e-3, 5)


def _partitioned():
    return optax.partition(
        {"layers": optax.lion(1e-3), "others": optax.adam(SCHEDULE)},
        lambda params: {
            key: "layers" if key == "layers" else "others" for key in params
        },
    )


OPTIMIZERS = {
    "adamw": optax.adamw(SCHEDULE, weight_decay=0.1, mask=not_norm),
    "subtrack": stj.subtrack(
        SCHEDULE, weight_decay=0.1, mask=not_norm, monitor=True, **LOW_RANK
    ),
    "galore": stj.galore(1e-2, **LOW_RANK),
    "ldadam": stj.ldadam(1e-2, rank=4, dimension_numbers=LOW_RANK["dimension_numbers"]),
    "apollo": stj.apollo(1e-2, **LOW_RANK),
    "online_subspace_descent": stj.online_subspace_descent(1e-2, **LOW_RANK),
    "muon": optax.contrib.muon(
        1e-2, muon_weight_dimension_numbers=LOW_RANK["dimension_numbers"]
    ),
    "injected": optax.inject_hyperparams(
        stj.subtrack, static_args=("rank", "dimension_numbers")
    )(learning_rate=SCHEDULE, **LOW_RANK),
    "partition": _partitioned(),
}


@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("adamw", {}, {}),
        ("partition", {}, {"tied": True}),
        ("muon", {}, {}),
        ("subtrack", {"parts": 3, "max_gradient_norm": 0.5}, {}),
        ("apollo", {"parts": 2}, {"depth": 1}),
        *(
            pytest.param(name, {"parts": 2}, {}, marks=pytest.mark.slow)
            for name in ("galore", "ldadam", "online_subspace_descent", "injected")
        ),
    ],
)
def test_equals_the_ordinary_step(name, arguments, shape):
    """Parameters, the whole state, losses and norms, after two refreshes."""
    optimizer, params = OPTIMIZERS[name], make_params(**shape)
    clip = arguments.get("max_gradient_norm", math.inf)
    ordinary = make_ordinary_step(optimizer, clip)
    want, want_losses = run(ordinary, optimizer, params)
    got, losses = run(make_step(optimizer, **arguments), optimizer, params)
    assert relative_difference(got.params, want.params, params) < 1e-5
    assert_same_state(got.opt_state, want.opt_state, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-6)
    np.testing.assert_allclose(got.gradient_norm, want.gradient_norm, rtol=1e-5)
    assert got.applied
    if clip < math.inf:
        assert got.gradient_norm > clip


def test_low_precision():
    """Parameters and state keep their dtypes; results differ by roundings."""
    optimizer, params = OPTIMIZERS["adamw"], make_params(dtype=jnp.bfloat16)
    want, _ = run(make_ordinary_step(optimizer), optimizer, params, steps=2)
    got, _ = run(make_step(optimizer, parts=2), optimizer, params, steps=2)
    assert_same_types((got.params, got.opt_state), (want.params, want.opt_state))
    assert relative_difference(got.params, want.params, params) < 0.1


@pytest.mark.slow
def test_eight_bits():
    """Codes differ by rounding to a neighbour, where a layer alone is not coded, too.

    After the first step, whose update is nearly the sign of the gradient, so that
    rounding changes entries near zero by as much as others.
    """
    optimizer = stj.subtrack(
        1e-2, moments_dtype="int8", **LOW_RANK | {"rank": 16, "update_interval": 5}
    )
    params, ordinary = make_params(width=64), make_ordinary_step(optimizer)
    first = ordinary(params, optimizer.init(params), make_batch(0))
    want = ordinary(first.params, first.opt_state, make_batch(1))
    got = make_step(optimizer, parts=2)(first.params, first.opt_state, make_batch(1))
    assert_same_types(got.opt_state, want.opt_state)
    for field, dtype in (("mu", jnp.int8), ("nu", jnp.uint8)):
        for key in ("up", "down"):
            codes, others = (
                optax.tree.get(each.opt_state, field)["layers"][key]["kernel"]
                for each in (got, want)
            )
            assert codes.dtype == dtype
            assert codes[0].size < 4096 < codes.size
            difference = np.abs(np.subtract(codes, others, dtype=np.int32))
            assert np.max(difference) <= 1
            assert np.mean(difference) < 1e-2
    assert relative_difference(got.params, want.params, first.params) < 1e-4


# --- Steps that are not finite --------------------------------------------------


def test_a_loss_that_is_not_finite_changes_nothing():
    optimizer, params = OPTIMIZERS["subtrack"], make_params()
    params["norm"] = params["norm"].at[0].set(jnp.nan)
    state = optimizer.init(params)
    done = make_step(optimizer)(params, state, make_batch())
    assert not done.applied
    assert not np.isfinite(done.value)
    assert_same_state((done.params, done.opt_state), (params, state))


def test_a_gradient_that_is_not_finite_stops_the_updates_below():
    def spoilt(own, x, batch):
        # The root's slope at zero is infinite.
        return layer(own, x, batch) + 0 * jnp.sqrt(own["switch"])

    optimizer, params = optax.sgd(0.1), make_params()
    params["layers"]["switch"] = jnp.array([1.0, 0.0, 1.0])
    step = make_step(optimizer, spoilt)
    done = step(params, optimizer.init(params), make_batch())
    assert np.isfinite(done.value)
    assert not done.applied
    changed = jax.tree.map(
        lambda a, b: np.any(np.asarray(a != b), axis=tuple(range(1, a.ndim))),
        done.params["layers"]["up"],
        params["layers"]["up"],
    )["kernel"]
    assert changed.tolist() == [False, False, True]
    assert_same_state(done.params["embedding"], params["embedding"])
    clipped = make_step(optimizer, spoilt, max_gradient_norm=1.0)
    done = clipped(params, optimizer.init(params), make_batch())
    assert not done.applied
    assert_same_state(done.params, params)


# --- What cannot be updated layer by layer ------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (optax.apply_if_finite(optax.adam(1e-3), 3), "notfinite_count"),
        (optax.contrib.prodigy(), "is shared by all parameters"),
        (optax.contrib.mechanize(optax.sgd(1.0)), "is shared by all parameters"),
        (
            optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
            "give max_gradient_norm",
        ),
        (optax.flatten(optax.adam(1e-3)), "with one layer more"),
        (
            stj.subtrack(1e-2, rank=2, dimension_numbers=stj.by_path("norm|kernel")),
            "cannot update one layer of 'layers' by itself: .* basis of layers/norm",
        ),
    ],
    ids=["apply_if_finite", "prodigy", "mechanic", "clipping", "flatten", "matrix"],
)
def test_optimizers_that_need_all_layers_are_refused(optimizer, message):
    params = make_params()
    step = make_step(optimizer)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step, params, optimizer.init(params), make_batch())


def test_parameters_that_are_no_stack_are_refused():
    optimizer, params = optax.sgd(1e-3), make_params()
    batch = make_batch()

    def refused(message, params, batch=batch, **arguments):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                make_step(optimizer, **arguments), params, optimizer.init(params), batch
            )

    refused("stack='blocks' is not a key of params", params, stack="blocks")
    refused("stack='layers' is not a key of params, tuple", (params,))
    uneven = params | {"layers": params["layers"] | {"norm": jnp.ones((2, WIDTH))}}
    refused(r"one leading axis of layers in all leaves, has .*norm \(2, 16\)", uneven)
    refused("nothing beside 'layers'", {"layers": params["layers"]})
    refused("parts=5 do not divide the batch", params, parts=5)
    with pytest.raises(ValueError, match="parts=0"):
        make_step(optimizer, parts=0)
    with pytest.raises(ValueError, match="max_gradient_norm=0"):
        make_step(optimizer, max_gradient_norm=0)


# --- Memory -----------------------------------------------------------------------


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("clip", [math.inf, pytest.param(1.0, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_depth(clip):
    """By less than a quarter of the gradients of the layers that are added."""
    width, optimizer = 64, optax.adam(1e-3)
    step = stj.update_in_backward(
        optimizer, before, layer, after, has_aux=True, max_gradient_norm=clip
    )

    def temporaries(depth):
        params = jax.eval_shape(lambda: make_params(depth, width))
        state = jax.eval_shape(optimizer.init, params)
        batch = jax.tree.map(lambda x: x[:1], make_batch())
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    gradient = 8 * 4 * width * 2 * width * 2
    assert temporaries(16) - temporaries(8) < gradient / 4
