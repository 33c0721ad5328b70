"""Logits of transformers, recorded and (if installed) live."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from models import llama, llama_weights
from tests.common import DATA
from tests.data.make_hugging_face import SHAPE
from tests.models.common import HUGGING_FACE_CASES as CASES
from tests.models.common import HUGGING_FACE_CONFIG as CONFIG
from tests.models.common import make_params

HUGGING_FACE = DATA / "hugging_face"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


@nnx.jit
def _apply(model, tokens):
    return model(tokens)


def logits_of(config, params, tokens):
    model = nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0)))
    return _apply(nnx.merge(nnx.graphdef(model), params), tokens)


def make_tokens(length=48):
    return np.random.default_rng(1).integers(0, 61, (1, length))


def reference_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize("name", ["scaled", "tied"])
def test_logits_equal_those_that_transformers_recorded(name):
    recorded = np.load(HUGGING_FACE / "logits.npz")
    config, params = llama_weights.load(
        HUGGING_FACE / name, dtype="float32", param_dtype="float32"
    )
    logits = logits_of(config, params, recorded["tokens"])
    assert np.std(recorded[name]) > 0.3
    np.testing.assert_allclose(logits, recorded[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_logits_of_what_transformers_writes(transformers, tmp_path, name):
    import torch

    config = dataclasses.replace(CONFIG, **CASES[name])
    scaling = None
    if name == "scaled":
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
        scaling |= {"high_freq_factor": 3.0, "original_max_position_embeddings": 24}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SHAPE,
            rope_theta=100.0,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            tie_word_embeddings=config.tie_embeddings,
            rope_scaling=scaling,
        )
    )
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in path else 0.0, 0.2)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if name == "plain" else "1GB")
    assert (tmp_path / INDEX).exists() == (name == "plain")
    loaded, params = llama_weights.load(tmp_path)
    assert loaded == config
    expected = reference_logits(model, make_tokens())
    logits = logits_of(loaded, params, make_tokens())
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_what_is_written(transformers, tmp_path, name):
    config = dataclasses.replace(CONFIG, **CASES[name])
    params = make_params(config)
    shard_bytes = 20_000 if name == "grouped" else 10**9
    llama_weights.save(
        tmp_path,
        config,
        params,
        max_shard_bytes=shard_bytes,
        extra_config={"eos_token_id": 5},
    )
    assert (tmp_path / INDEX).exists() == (name == "grouped")
    model, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    assert (model.config.bos_token_id, model.config.eos_token_id) == (None, 5)
    expected = reference_logits(model, make_tokens())
    logits = logits_of(config, params, make_tokens())
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 2048])
def test_a_mistral_is_read_and_written_as_a_llama(transformers, tmp_path, window):
    import torch

    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            **SHAPE,
            rope_theta=100.0,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            sliding_window=window,
        )
    )
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in path else 0.0, 0.2)
    model.save_pretrained(tmp_path / "mistral")
    config, params = llama_weights.load(tmp_path / "mistral")
    assert config == CONFIG
    expected = reference_logits(model, make_tokens())
    logits = logits_of(config, params, make_tokens())
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    llama_weights.save(tmp_path / "llama", config, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert isinstance(again, transformers.LlamaForCausalLM)
    found = reference_logits(again, make_tokens())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
