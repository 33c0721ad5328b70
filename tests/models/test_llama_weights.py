"""Hugging Face's layout: bit-equal round trips, and errors."""

import dataclasses
import json
import pathlib
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from models import llama, llama_weights, weights
from tests.models.common import HUGGING_FACE_CASES as CASES
from tests.models.common import HUGGING_FACE_CONFIG as CONFIG
from tests.models.common import make_params

INDEX = "model.safetensors.index.json"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, edit):
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    safetensors.numpy.save_file(tensors, path)


@pytest.fixture
def saved(tmp_path):
    llama_weights.save(tmp_path, CONFIG, make_params(CONFIG))
    return tmp_path


@pytest.mark.parametrize("max_shard_bytes", [10**9, 10_000])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_and_read_again_every_bit_is_the_same(
    tmp_path, name, dtype, max_shard_bytes
):
    config = dataclasses.replace(
        CONFIG, **CASES[name], dtype=dtype, param_dtype=dtype, init_std=0.3
    )
    params = make_params(config)
    directory = tmp_path / "new" / "model"
    # Arrays on a device are written like NumPy arrays.
    on_device = jax.tree.map(jnp.asarray, params)
    llama_weights.save(directory, config, on_device, max_shard_bytes=max_shard_bytes)
    loaded_config, loaded = llama_weights.load(directory)
    assert loaded_config == config
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, params)
    chex.assert_trees_all_equal(loaded, params)

    files = {path.name for path in directory.iterdir()}
    if max_shard_bytes == 10**9:
        assert files == {"config.json", "model.safetensors"}
    else:
        index = json.loads((directory / INDEX).read_text())
        shards = set(index["weight_map"].values())
        assert files == {"config.json", INDEX, *shards}
        assert len(shards) > 3
        total = 0
        for shard in shards:
            tensors = safetensors.numpy.load_file(directory / shard)
            assert {index["weight_map"][key] for key in tensors} == {shard}
            sizes = [tensor.nbytes for tensor in tensors.values()]
            assert sum(sizes) <= 10_000
            total += sum(sizes)
        assert index["metadata"]["total_size"] == total


def test_dtypes_are_those_of_the_file_unless_given(tmp_path):
    llama_weights.save(tmp_path, CONFIG, make_params(CONFIG))
    halves = {}

    def halve(tensors):
        for name, tensor in tensors.items():
            tensors[name] = halves[name] = tensor.astype(np.float16)

    edit_tensors(tmp_path, halve)
    edit_json(tmp_path / "config.json", torch_dtype="float16")
    config, params = llama_weights.load(tmp_path)
    assert config.dtype == config.param_dtype == "float32"
    up = halves["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(params["layers"]["mlp"]["up"]["kernel"][1], up.T)
    config, params = llama_weights.load(
        tmp_path, dtype="float32", param_dtype="bfloat16"
    )
    assert (config.dtype, config.param_dtype) == ("float32", "bfloat16")
    kernel = params["layers"]["mlp"]["up"]["kernel"][1]
    np.testing.assert_array_equal(kernel, up.T.astype(jnp.bfloat16))


def test_tensors_are_written_in_the_dtype_of_the_config(tmp_path):
    rounded = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    params = make_params(CONFIG)
    llama_weights.save(tmp_path, rounded, params)
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as tensors:
        # transformers 4 refuses files without this entry.
        assert tensors.metadata() == {"format": "pt"}
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {  # noqa: SIM118
            jnp.dtype("bfloat16")
        }
    config, loaded = llama_weights.load(tmp_path)
    assert config.param_dtype == "bfloat16"
    chex.assert_trees_all_equal(
        loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    )


def test_old_rotary_buffers_and_the_head_of_a_tied_model_are_left_out(tmp_path):
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    params = make_params(config)
    llama_weights.save(tmp_path, config, params)

    def add(tensors):
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        tensors[name] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    edit_tensors(tmp_path, add)
    _, loaded = llama_weights.load(tmp_path)
    chex.assert_trees_all_equal(loaded, params)

    def change_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    edit_tensors(tmp_path, change_head)
    with pytest.raises(ValueError, match=r"not the embedding, .*set it to false"):
        llama_weights.load(tmp_path)


def test_a_model_is_read_tensor_by_tensor(tmp_path):
    config = llama.LlamaConfig(64, 256, 512, num_layers=12, num_heads=4)
    params = make_params(config)
    llama_weights.save(tmp_path, config, params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    tracemalloc.start()
    try:
        llama_weights.load(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size < peak < 1.2 * size


def remove_head(tensors):
    del tensors["lm_head.weight"]


def remove_norms(tensors):
    for layer in range(2):
        del tensors[f"model.layers.{layer}.input_layernorm.weight"]


def add_bias(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)


def transpose(tensors):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def quantize(tensors):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.int8)


def spoil(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5:7] = np.nan, -np.inf


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (spoil, r"layers.1.mlp.up_proj.weight .* holds 2 numbers that are NaN or inf"),
        (remove_head, r"lacks 1 tensors \(lm_head.weight\): .*set tie_word_embeddings"),
        (remove_norms, r"lacks 2 tensors \(model.layers.0.input_.*fetch the files"),
        (add_bias, r"holds model.layers.0.self_attn.q_proj.bias which .*not describe"),
        (transpose, r"mlp.up_proj.weight .*\(32, 48\), but .*\(48, 32\)"),
        (quantize, r"mlp.up_proj.weight .*dtype I8: .*one of F32, F16, BF16"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(saved, edit, message):
    edit_tensors(saved, edit)
    with pytest.raises(ValueError, match=message):
        llama_weights.load(saved)


def test_damaged_files_are_refused(tmp_path):
    llama_weights.save(tmp_path, CONFIG, make_params(CONFIG), max_shard_bytes=20_000)
    index = json.loads((tmp_path / INDEX).read_text())
    shard, other = sorted(set(index["weight_map"].values()))[:2]
    whole = (tmp_path / shard).read_bytes()
    (tmp_path / shard).write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=f"{shard} is damaged or incomplete"):
        llama_weights.load(tmp_path)
    (tmp_path / shard).write_bytes((tmp_path / other).read_bytes())
    with pytest.raises(ValueError, match=r"holds model\.layers\.\S+ twice"):
        llama_weights.load(tmp_path)
    (tmp_path / shard).unlink()
    with pytest.raises(OSError, match=shard):
        llama_weights.load(tmp_path)
    for content in ("{}", '{"weight_map": []}', '{"weight_map": {}}'):
        (tmp_path / INDEX).write_text(content)
        with pytest.raises(ValueError, match=f"{INDEX} has no weight_map"):
            llama_weights.load(tmp_path)
    for content in ('{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        (tmp_path / INDEX).write_text(content)
        with pytest.raises(ValueError, match=f"{INDEX}: weight_map must map"):
            llama_weights.load(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor .*with safet"):
        llama_weights.load(tmp_path)
    for content, message in [
        ('{"model_type":', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1, 2]", "must contain a JSON object, got '\\[1, 2\\]'"),
        ("NaN", "must contain a JSON object, got 'nan'"),
        ('{"model_type": "llama", "vocab_size": NaN}', ": vocab_size=nan cannot"),
    ]:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=f"{tmp_path}/config.json ?{message}"):
            llama_weights.load(tmp_path)


def test_a_config_of_another_size_is_told_before_memory_is_taken(saved):
    edit_json(saved / "config.json", vocab_size=2**30, hidden_size=2**20)
    with pytest.raises(
        ValueError, match=r"weight in .* \(61, 32\), but config.json .*1048576"
    ):
        llama_weights.load(saved)


def test_an_interrupted_export_is_no_model_and_the_next_one_succeeds(
    tmp_path, monkeypatch
):
    params = make_params(CONFIG)
    (tmp_path / "tokenizer.json").write_text("{}")
    save_file, calls = safetensors.numpy.save_file, []

    def fail(tensors, path, **options):
        calls.append(path)
        if len(calls) == 2:
            raise safetensors.SafetensorError("no space left")
        save_file(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", fail)
        with pytest.raises(OSError, match=r"cannot write .*00002.*no space left"):
            llama_weights.save(tmp_path, CONFIG, params, max_shard_bytes=20_000)
    assert len(calls) == 2
    assert not list(tmp_path.glob("*.safetensors*"))
    assert not (tmp_path / "config.json").exists()
    llama_weights.save(tmp_path, CONFIG, params)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json"}
    chex.assert_trees_all_equal(llama_weights.load(tmp_path)[1], params)


def test_config_json_appears_last(tmp_path, monkeypatch):
    moved = []
    replace = weights.os.replace

    def record(source, target):
        moved.append(pathlib.Path(target).name)
        replace(source, target)

    monkeypatch.setattr(weights.os, "replace", record)
    llama_weights.save(tmp_path, CONFIG, make_params(CONFIG), max_shard_bytes=20_000)
    assert len(moved) > 4
    assert moved[-2:] == [INDEX, "config.json"]


def test_exports_that_make_no_sense_are_refused(tmp_path):
    params = make_params(CONFIG)
    other = dataclasses.replace(CONFIG, mlp_size=50)
    with pytest.raises(ValueError, match=r"mlp/down/kernel .*\(2, 48, 32\), but .*50"):
        llama_weights.save(tmp_path, other, params)
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    with pytest.raises(ValueError, match=r"head/kernel .*\(32, 61\), but .* None"):
        llama_weights.save(tmp_path, tied, params)
    with pytest.raises(ValueError, match="max_shard_bytes must be positive, got 0"):
        llama_weights.save(tmp_path, CONFIG, params, max_shard_bytes=0)
    assert not list(tmp_path.iterdir())
    for name in ("config.json", "model-00001-of-00002.safetensors", INDEX):
        (tmp_path / name).touch()
        with pytest.raises(OSError, match=f"{name} exists: export to"):
            llama_weights.save(tmp_path, CONFIG, params)
        (tmp_path / name).unlink()
