"""Equinox models: modules with `None`s, static fields, functions and `__call__`."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

import subtrack_jax as stj
from tests import common

RANK = 2
# Equinox's linear layers are (out, in).
MATRIX = MuonDimensionNumbers(-1, -2)


class Model(eqx.Module):
    """A model with every kind of parameter, and leaves that are not parameters."""

    mlp: eqx.nn.MLP  # without biases; its activation is a leaf
    stacked: eqx.nn.Linear
    head: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    gate: eqx.nn.Linear | None
    name: str = eqx.field(static=True)

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.mlp = eqx.nn.MLP(6, 6, 8, 2, use_bias=False, key=keys[0])
        linear = lambda key: eqx.nn.Linear(6, 6, use_bias=False, key=key)
        self.stacked = eqx.filter_vmap(linear)(keys[1:3])
        self.head = eqx.nn.Linear(6, 4, key=keys[3])
        self.norm = eqx.nn.LayerNorm(6, use_bias=False)
        self.gate = None
        self.name = "model"

    def __call__(self, x):
        x = self.norm(self.mlp(x))
        for layer in range(2):
            x = x + jnp.tanh(self.stacked.weight[layer] @ x)
        return self.head(x)


MODEL = Model(jax.random.key(0))
PARAMS, STATIC = eqx.partition(MODEL, eqx.is_array)
X = jax.random.normal(jax.random.key(1), (8, 6))


@eqx.filter_grad
def gradient_of(model):
    return jnp.mean((jax.vmap(model)(X) - jnp.arange(4.0)[None]) ** 2)


def is_chosen(leaf):
    return eqx.is_array(leaf) and leaf.ndim >= 2


def specs(tree):
    return jax.tree.map(lambda leaf: MATRIX if is_chosen(leaf) else None, tree)


# All but the default select the same leaves.
FORMS = {
    "default": None,
    "one_spec": MATRIX,
    "by_path": stj.by_path("mlp|stacked|head", -1, -2),
    "function": specs,
    # Modules with __call__ must not be taken for functions of the parameters.
    "tree": specs(PARAMS),
    "tree_like_the_model": specs(MODEL),
    "prefix": eqx.tree_at(lambda tree: tree.norm, specs(PARAMS), None),
}
BY_FORM = pytest.mark.parametrize("form", FORMS)


def optimizer_of(name, form, **arguments):
    if name != "apollo_mini":
        arguments["rank"] = RANK
    return common.OPTIMIZERS[name](
        1e-2, update_interval=2, dimension_numbers=FORMS[form], **arguments
    )


def by_name(tree):
    """The same leaves as a dictionary."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


@BY_FORM
def test_the_leaves_that_are_low_rank(form):
    low_rank = stj.LowRank(RANK, FORMS[form])
    layers = {f"mlp/layers/{k}/weight" for k in range(3)} | {"head/weight"}
    want = layers if form == "default" else layers | {"stacked/weight"}
    assert set(by_name(low_rank.views(PARAMS))) == want
    table = low_rank.describe(PARAMS).splitlines()
    assert len(table) == len(jax.tree.leaves(PARAMS)) + 2
    assert {line.split()[0] for line in table if " 2  " in line} == want


@pytest.mark.filterwarnings("ignore:dimension_numbers=None")
@pytest.mark.parametrize(
    "name, form",
    [
        *(("subtrack", form) for form in FORMS),
        *((name, "tree") for name in common.OPTIMIZERS if name != "subtrack"),
    ],
)
def test_updates_are_models(name, form):
    optimizer = optimizer_of(name, form, mu_dtype="int8")
    state = jax.eval_shape(optimizer.init, PARAMS)
    updates, after = jax.eval_shape(optimizer.update, PARAMS, state, PARAMS)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)
    types = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert types(after) == types(state)


@pytest.mark.parametrize("name", common.others_slow(common.KINDS, ["subtrack"]))
def test_trains_like_a_dictionary_of_the_same_arrays(name):
    optimizer = optimizer_of(name, "tree")
    in_dict = common.OPTIMIZERS[name](
        1e-2, rank=RANK, update_interval=2, dimension_numbers=specs(by_name(PARAMS))
    )

    @jax.jit
    def step(params, state, named, named_state):
        gradients = gradient_of(eqx.combine(params, STATIC))
        updates, state = optimizer.update(gradients, state, params)
        named_updates, named_state = in_dict.update(
            by_name(gradients), named_state, named
        )
        return (
            eqx.apply_updates(params, updates),
            state,
            optax.apply_updates(named, named_updates),
            named_state,
        )

    named = by_name(PARAMS)
    carry = PARAMS, optimizer.init(PARAMS), named, in_dict.init(named)
    for _ in range(5):
        carry = step(*carry)
    params, _, named, _ = carry
    trained = by_name(params)
    assert trained.keys() == named.keys()
    for leaf, want in named.items():
        np.testing.assert_allclose(trained[leaf], want, rtol=1e-5, atol=1e-6)
        assert not np.allclose(want, by_name(PARAMS)[leaf], atol=1e-3)


def test_bytes_shardings_and_diagnostics():
    optimizer = optimizer_of("subtrack", "tree")
    state = optimizer.init(PARAMS)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert stj.state_bytes(optimizer, PARAMS) == nbytes

    mesh = jax.make_mesh((2,), ("fsdp",))
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    shardings = jax.tree.map(lambda _: split, PARAMS)
    placed = optax.tree.get(stj.state_sharding(optimizer, PARAMS, shardings), "basis")
    assert placed.stacked.weight.spec[0] == "fsdp"
    assert placed.gate is None

    low_rank = stj.LowRank(RANK, FORMS["tree"])
    for name, shape in {
        "captured_energy": (2,),
        "recovery_ratio": (2,),
        "error_slopes": (2, RANK),
    }.items():
        function = functools.partial(getattr(stj.diagnostics, name), low_rank)
        found = jax.eval_shape(function, PARAMS, state)
        assert found.gate is None and found.stacked.weight.shape == shape
    angles = jax.eval_shape(stj.diagnostics.principal_angles, state, state)
    assert angles.gate is None and angles.stacked.weight.shape == (2, RANK)


@pytest.mark.parametrize("form", ["tree", "by_path", "function"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda optimizer: optax.MultiSteps(optimizer, 2),
        lambda optimizer: optax.apply_if_finite(optimizer, 2),
        lambda optimizer: optax.chain(optax.clip_by_global_norm(1.0), optimizer),
        lambda optimizer: optax.masked(
            optimizer, lambda tree: jax.tree.map(is_chosen, tree)
        ),
        lambda optimizer: optax.partition(
            {True: optimizer, False: optax.sgd(0.1)},
            lambda tree: eqx.tree_at(
                lambda tree: tree.norm.weight,
                jax.tree.map(lambda _: True, tree),
                False,
            ),
        ),
        optax.contrib.split_real_and_imaginary,
    ],
    ids=["multi_steps", "if_finite", "chain", "masked", "partition", "split"],
)
def test_wrapped(wrap, form):
    optimizer = wrap(optimizer_of("subtrack", form))
    state = jax.eval_shape(optimizer.init, PARAMS)
    bases = optax.tree.get_all_with_path(state, "basis")
    (basis,) = [found for _, found in bases if isinstance(found, Model)]
    assert len(jax.tree.leaves(basis)) == 5
    updates, _ = jax.eval_shape(optimizer.update, PARAMS, state, PARAMS)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


def test_a_model_that_is_not_filtered_is_refused():
    with pytest.raises(TypeError, match=r"mlp/activation is .* eqx\.filter\(model"):
        optimizer_of("subtrack", "by_path").init(MODEL)


@pytest.mark.parametrize("name", ["subtrack", "ldadam", "apollo"])
def test_an_array_without_a_gradient_is_refused(name):
    """Integers have no gradient in Equinox, but `eqx.is_array` keeps them."""
    params = {"kernel": jnp.ones((6, 8)), "positions": jnp.arange(4)}
    optimizer = optimizer_of(name, "default")
    gradients = {"kernel": jnp.ones((6, 8)), "positions": None}
    with pytest.raises(ValueError, match="positions"):
        optimizer.update(gradients, optimizer.init(params), params)
