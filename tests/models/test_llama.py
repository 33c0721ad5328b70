"""LLaMA against NumPy, loops over layers and positions, and published shapes."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx

from models import llama
from tests.models.common import CONFIG, logits_of, make_model, make_tokens, parameters


class NumpyLlama:
    """The equations in float64, one sequence and one head at a time."""

    def __init__(self, model):
        self.config = model.config
        self.params = jax.tree.map(
            lambda x: np.asarray(x, np.float64), parameters(model)
        )

    def __call__(self, tokens):
        x = self.params["embedding"]["embedding"][tokens]
        for i in range(self.config.num_layers):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], self.params["layers"])
            h = self.norm(x, layer["attention_norm"])
            x = x + self.attention(h, layer["attention"])
            h = self.norm(x, layer["mlp_norm"])
            gate, up, down = (
                layer["mlp"][name]["kernel"] for name in ("gate", "up", "down")
            )
            silu = (h @ gate) / (1 + np.exp(-(h @ gate)))
            x = x + (silu * (h @ up)) @ down
        if self.config.tie_embeddings:
            head = self.params["embedding"]["embedding"].T
        else:
            head = self.params["head"]["kernel"]
        return self.norm(x, self.params["norm"]) @ head

    def norm(self, x, params):
        mean_square = np.mean(x**2, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + self.config.norm_epsilon) * params["scale"]

    def rotate(self, x):
        length, size = x.shape
        out = np.empty_like(x)
        for position in range(length):
            for i in range(size // 2):
                frequency = self.config.rotary_base ** (-2 * i / size)
                angle = position * self.scaled(frequency)
                # A pair as a complex number: its rotation is one product.
                pair = complex(x[position, i], x[position, i + size // 2])
                pair *= complex(math.cos(angle), math.sin(angle))
                out[position, i], out[position, i + size // 2] = pair.real, pair.imag
        return out

    def scaled(self, frequency):
        """LLaMA 3's scaling, from the definition by wavelengths."""
        factor = self.config.rotary_scaling_factor
        if factor is None:
            return frequency
        original = self.config.rotary_original_length_tokens
        low = self.config.rotary_low_frequency_factor
        high = self.config.rotary_high_frequency_factor
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            return frequency
        if wavelength > original / low:
            return frequency / factor
        smooth = (original / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / factor + smooth * frequency

    def attention(self, h, params):
        size = self.config.head_size
        group = self.config.num_heads // self.config.key_value_heads
        outputs = []
        for head in range(self.config.num_heads):
            own = slice(head * size, (head + 1) * size)
            shared = slice(head // group * size, (head // group + 1) * size)
            query = self.rotate(h @ params["query"]["kernel"][:, own])
            key = self.rotate(h @ params["key"]["kernel"][:, shared])
            value = h @ params["value"]["kernel"][:, shared]
            scores = query @ key.T / math.sqrt(size)
            scores[np.triu_indices(len(h), 1)] = -np.inf
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            outputs.append(weights / weights.sum(axis=-1, keepdims=True) @ value)
        return np.concatenate(outputs, axis=-1) @ params["output"]["kernel"]


# Of four pairs the first keeps its frequency, the second lies between, and the last
# two turn less than once in 24 tokens.
SCALED = {
    "rotary_scaling_factor": 8.0,
    "rotary_original_length_tokens": 24,
    "rotary_low_frequency_factor": 1.0,
    "rotary_high_frequency_factor": 3.0,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": None},
        {"head_dim": 12},
        {"tie_embeddings": True},
        SCALED,
    ],
    ids=lambda changes: next(iter(changes), "grouped"),
)
def test_logits_equal_the_equations_in_numpy(changes):
    model = make_model(**changes)
    # Longer than the original length of the scaling.
    tokens = make_tokens((2, 40 if changes == SCALED else 7))
    expected = np.stack([NumpyLlama(model)(row) for row in np.asarray(tokens)])
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(logits_of(model, tokens), expected, rtol=1e-4, atol=1e-4)


def test_shapes_dtypes_and_names_of_parameters():
    model = make_model(param_dtype="bfloat16", dtype="bfloat16")
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(parameters(model))
    }
    assert shapes == {
        "embedding/embedding": (61, 32),
        "head/kernel": (32, 61),
        "norm/scale": (32,),
        "layers/attention_norm/scale": (3, 32),
        "layers/mlp_norm/scale": (3, 32),
        "layers/attention/query/kernel": (3, 32, 32),
        "layers/attention/key/kernel": (3, 32, 16),
        "layers/attention/value/kernel": (3, 32, 16),
        "layers/attention/output/kernel": (3, 32, 32),
        "layers/mlp/gate/kernel": (3, 32, 48),
        "layers/mlp/up/kernel": (3, 32, 48),
        "layers/mlp/down/kernel": (3, 48, 32),
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters(model))} == {
        jnp.dtype("bfloat16")
    }
    logits = jax.eval_shape(model, make_tokens((2, 5)))
    chex.assert_shape(logits, (2, 5, 61))
    chex.assert_type(logits, jnp.float32)


def test_layers_and_kernels_start_differently_with_the_given_deviation():
    params = parameters(make_model(init_std=0.02))
    kernels = [
        *params["layers"]["mlp"]["up"]["kernel"],
        *params["layers"]["mlp"]["gate"]["kernel"],
    ]
    for i, kernel in enumerate(kernels):
        np.testing.assert_allclose(np.std(kernel), 0.02, rtol=0.1)
        for other in kernels[:i]:
            assert not np.array_equal(kernel, other)


def test_bfloat16_compute_stays_close_to_float32():
    tokens = make_tokens((2, 9))
    exact = logits_of(make_model(), tokens)
    rounded = logits_of(make_model(dtype="bfloat16"), tokens)
    error = float(jnp.abs(exact - rounded).max() / jnp.std(exact))
    assert 0 < error < 0.2


def test_a_future_token_does_not_change_past_logits():
    model = make_model()
    tokens = make_tokens((1, 8))
    changed = tokens.at[0, 5].set((tokens[0, 5] + 1) % CONFIG.vocabulary_size)
    before, after = logits_of(model, tokens), logits_of(model, changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.all(np.abs(before[:, 5:] - after[:, 5:]).max(axis=-1) > 1e-3)


def test_scan_equals_a_loop_over_the_layers():
    model = make_model()
    tokens = make_tokens((2, 6))
    positions = jnp.arange(6)
    rotary = llama.rotary_angles(positions, CONFIG.head_size, CONFIG.rotary_base)
    layer_def, layers = nnx.split(model.layers)
    x = model.embedding(tokens)
    for i in range(CONFIG.num_layers):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
        x, _ = nnx.merge(layer_def, own)(x, positions, rotary, None)
    np.testing.assert_allclose(
        logits_of(model, tokens), model.head(model.norm(x)), rtol=1e-5, atol=1e-5
    )


def token_loss_of(model):
    tokens = make_tokens((2, 7))
    return llama.token_loss(model, tokens[:, :-1], tokens[:, 1:]).loss


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_neither_loss_nor_gradients(remat):
    loss_and_gradients = nnx.jit(nnx.value_and_grad(token_loss_of))
    plain = loss_and_gradients(make_model())
    recomputed = loss_and_gradients(make_model(remat=remat))
    chex.assert_trees_all_close(
        jax.tree.leaves(plain), jax.tree.leaves(recomputed), rtol=1e-4, atol=1e-6
    )
    jaxpr = str(jax.make_jaxpr(lambda: token_loss_of(make_model(remat=remat)))())
    assert "prevent_cse=False" in jaxpr


def test_remat_stores_what_it_says():
    def stored(remat):
        """Shapes of the arrays saved for the backward pass."""
        model = make_model(remat=remat)
        params = parameters(model)

        def loss(params):
            return token_loss_of(nnx.merge(nnx.graphdef(model), params))

        residuals = jax.eval_shape(lambda: jax.vjp(loss, params)[1])
        shapes = [leaf.shape for leaf in jax.tree.leaves(residuals)]
        # Arrays with the axes of layers and batch: not parameters.
        return sorted(shape for shape in shapes if shape[:2] == (3, 2))

    layer_input = (3, 2, 6, 32)
    assert stored("full") == [layer_input]
    # Query, output of the attention; key, value; gate, up. The last product, down,
    # is needed by no gradient.
    products = [(3, 2, 6, 32)] * 2 + [(3, 2, 6, 16)] * 2 + [(3, 2, 6, 48)] * 2
    assert stored("dots") == sorted([layer_input, *products])
    assert len(stored("none")) > len(stored("dots"))


def test_a_tied_head_has_no_parameters_and_teaches_the_embedding():
    model = make_model(tie_embeddings=True)
    assert set(parameters(model)) == {"embedding", "layers", "norm"}
    gradient = nnx.jit(nnx.grad(token_loss_of))(model)["embedding"]["embedding"]
    # Untied: only embedding rows of tokens in the batch have a gradient.
    assert np.all(np.abs(gradient[...]).max(axis=-1) > 0)
    # Logits are float32, not rounded to bfloat16.
    logits = model.logits(jnp.full((1, 32), 1 + 2**-7, jnp.bfloat16))
    chex.assert_shape(logits, (1, 61))
    chex.assert_type(logits, jnp.float32)
    assert np.any(logits != logits.astype(jnp.bfloat16).astype(jnp.float32))


def test_rotated_products_depend_on_the_distance_only():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def product(query_position, key_position):
        turned = [
            llama.apply_rotary(
                x, llama.rotary_angles(jnp.array([position]), 16, base=100.0)
            )
            for x, position in [(query, query_position), (key, key_position)]
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(5, 2) == pytest.approx(product(15, 12), abs=1e-4)
    assert product(5, 2) == pytest.approx(product(3, 0), abs=1e-4)
    assert abs(product(5, 2) - product(2, 5)) > 1e-2
    at_zero = llama.apply_rotary(query, llama.rotary_angles(jnp.array([0]), 16))
    np.testing.assert_array_equal(at_zero, query)


def test_grouped_heads_equal_full_heads_with_repeated_kernels():
    grouped = make_model()
    full = nnx.clone(make_model(num_key_value_heads=None))
    params = parameters(grouped)
    for name in ("key", "value"):
        kernel = params["layers"]["attention"][name]["kernel"]
        heads = kernel.reshape(3, 32, 2, CONFIG.head_size)
        params["layers"]["attention"][name]["kernel"] = jnp.repeat(
            heads, 2, axis=2
        ).reshape(3, 32, 32)
    nnx.update(full, params)
    tokens = make_tokens((2, 6))
    np.testing.assert_allclose(
        logits_of(grouped, tokens), logits_of(full, tokens), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("form", ["state", "dictionaries", "shapes", "gradients"])
def test_matrix_axes_chooses_attention_and_mlp_kernels(form):
    model = make_model()
    state = nnx.state(model, nnx.Param)
    params = {
        "state": lambda: state,
        "dictionaries": lambda: nnx.to_pure_dict(state),
        "shapes": lambda: jax.eval_shape(lambda: nnx.to_pure_dict(state)),
        "gradients": lambda: nnx.eval_shape(
            nnx.grad(lambda m: jnp.sum(m(make_tokens((1, 2))))), model
        ),
    }[form]()
    axes = llama.matrix_axes(params)
    is_spec = lambda x: isinstance(x, optax.contrib.MuonDimensionNumbers)
    chosen = {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        for path, _ in jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_spec)
    }
    attention = {f"attention/{x}" for x in ("query", "key", "value", "output")}
    mlp = {f"mlp/{x}" for x in ("gate", "up", "down")}
    assert chosen == {f"layers/{name}/kernel" for name in attention | mlp}
    # One spec or None per leaf, for tree maps.
    jax.tree.map(lambda leaf, spec: None, params, axes, is_leaf=is_spec)


def test_matrix_axes_serves_optax_as_dimension_numbers():
    params = parameters(make_model())
    muon = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=llama.matrix_axes)

    @jax.jit
    def update(params):
        return muon.update(params, muon.init(params), params)[0]

    # The axis of layers is a batch axis: the first layer's update is unaffected.
    first = jax.tree.map(lambda leaf: leaf[:1], params["layers"])
    for all_layers, one in zip(
        jax.tree.leaves(update(params)["layers"]["mlp"]),
        jax.tree.leaves(update(params | {"layers": first})["layers"]["mlp"]),
        strict=True,
    ):
        np.testing.assert_allclose(all_layers[:1], one, rtol=1e-4, atol=1e-7)
    counted = optax.tree.map_params(muon, lambda leaf: 1, muon.init(params))
    assert 1 in jax.tree.leaves(counted)


def test_every_parameter_names_its_axes_with_and_without_a_mesh():
    def specs(model):
        return jax.tree.leaves(
            nnx.get_partition_spec(nnx.state(model, nnx.Param)),
            is_leaf=lambda x: isinstance(x, jax.P),
        )

    model = make_model()
    shapes = jax.tree.leaves(parameters(model))
    assert [len(spec) for spec in specs(model)] == [leaf.ndim for leaf in shapes]
    assert jax.P("layers", "mlp", "embed") in specs(model)
    rules = [("embed", None), ("vocab", None), ("heads", "x"), ("kv_heads", "x")]
    rules += [("mlp", "x"), ("layers", None)]
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        on_mesh = nnx.clone(model)
        assert jax.P(None, "x", None) in specs(on_mesh)
        shardings = nnx.get_named_sharding(nnx.state(on_mesh, nnx.Param), mesh)
        nnx.update(on_mesh, jax.device_put(nnx.state(on_mesh, nnx.Param), shardings))
        sharded = logits_of(on_mesh, make_tokens((2, 5)))
    np.testing.assert_allclose(
        sharded, logits_of(model, make_tokens((2, 5))), atol=1e-4
    )


def test_decoding_step_by_step_equals_reading_at_once():
    model = make_model()
    tokens = make_tokens((2, 9))
    logits = logits_of(model, tokens)
    decode = nnx.jit(lambda model, *inputs: model.decode(*inputs))
    cache = model.empty_cache(2, 12)
    decoded, cache = decode(model, tokens[:, :4], 0, cache)
    np.testing.assert_allclose(decoded, logits[:, 3], rtol=1e-4, atol=1e-4)
    for position in range(4, 9):
        token = tokens[:, position : position + 1]
        decoded, cache = decode(model, token, position, cache)
        np.testing.assert_allclose(decoded, logits[:, position], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "hidden", "mlp", "heads", "layers", "millions"),
    [
        ("llama-9m", 128, 352, 4, 4, 9.0),
        ("llama-20m", 256, 688, 4, 4, 19.5),
        ("llama-35m", 384, 1024, 8, 6, 35.2),
        ("llama-60m", 512, 1376, 8, 8, 58.1),
        ("llama-130m", 768, 2048, 12, 12, 134.1),
        ("llama-350m", 1024, 2736, 16, 24, 368.0),
        ("llama-1b", 2048, 5461, 32, 24, 1339.1),
        ("llama-3b", 2560, 6848, 32, 32, 2685.8),
        ("llama-7b", 4096, 11008, 32, 32, 6738.4),
    ],
)
def test_published_shapes(name, hidden, mlp, heads, layers, millions):
    config = llama.PRESETS[name]
    assert config == llama.LlamaConfig(32_000, hidden, mlp, layers, heads)
    model = nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(parameters(model))
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be positive, got 0"),
        ({"rotary_base": float("nan")}, "rotary_base must be positive, got nan"),
        ({"num_heads": 5}, "hidden_size=32 must be a multiple of twice num_heads=5"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads=3"),
        ({"head_dim": 0}, "head_dim must be positive, got 0"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"rotary_scaling_factor": -8.0}, "rotary_scaling_factor must be positive"),
        ({"rotary_original_length_tokens": 0}, "length_tokens must be positive, got 0"),
        ({"rotary_low_frequency_factor": 4.0}, "=4.0 must be below .*factor=4.0"),
        ({"remat": True}, "remat must be one of none, dots, full, got True"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, got 'float16'"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_texts_in_one_row_do_not_see_each_other():
    """Loss and gradient of packed texts are those of padded ones."""
    model, length = make_model(num_layers=2), 16
    config, params = model.config, parameters(model)
    texts = [make_tokens((size,), seed=size) for size in (4, 7, 5)]
    packed = {
        name: np.zeros((1, length), np.int32)
        for name in ("inputs", "targets", "positions", "segments")
    }
    padded = {name: np.zeros((3, length), np.int32) for name in packed}
    start = 0
    for number, text in enumerate(texts):
        size = len(text) - 1
        values = (text[:-1], text[1:], np.arange(size), number + 1)
        for name, value in zip(packed, values, strict=True):
            packed[name][0, start : start + size] = value
            padded[name][number, :size] = value
        start += size
    del padded["positions"]
    padded["mask"], packed["mask"] = padded.pop("segments") > 0, packed["segments"] > 0

    @jax.jit
    @jax.value_and_grad
    def loss(params, batch):
        model = nnx.merge(llama.definition(config), params)
        return llama.token_loss(model, **batch).loss

    expected, found = (loss(params, batch) for batch in (padded, packed))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
