"""Entries of config.json, of both of transformers' forms and of other models."""

import dataclasses
import math

import jax
import pytest
from flax import nnx

from models import hugging_face_config, llama

LLAMA_3_2_1B = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def test_llama_3_2_in_both_forms():
    config = hugging_face_config.import_config(LLAMA_3_2_1B)
    assert config == llama.LlamaConfig(
        vocabulary_size=128_256,
        hidden_size=2048,
        mlp_size=8192,
        num_layers=16,
        num_heads=32,
        num_key_value_heads=8,
        tie_embeddings=True,
        rotary_base=500_000.0,
        rotary_scaling_factor=32.0,
        rotary_original_length_tokens=8192,
        rotary_low_frequency_factor=1.0,
        rotary_high_frequency_factor=4.0,
        norm_epsilon=1e-5,
        dtype="bfloat16",
        param_dtype="bfloat16",
    )
    model = nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 1_235_814_400

    entries = dict(LLAMA_3_2_1B)
    scaling = entries.pop("rope_scaling")
    entries["rope_parameters"] = scaling | {"rope_theta": entries.pop("rope_theta")}
    entries["dtype"] = entries.pop("torch_dtype")
    assert hugging_face_config.import_config(entries) == config


def test_what_is_left_out_has_the_values_of_the_first_llama():
    required = ["model_type", "vocab_size", "hidden_size", "intermediate_size"]
    required += ["num_hidden_layers", "num_attention_heads"]
    entries = {name: LLAMA_3_2_1B[name] for name in required}
    config = hugging_face_config.import_config(entries)
    assert config == llama.LlamaConfig(128_256, 2048, 8192, 16, 32)
    for name in required:
        with pytest.raises(ValueError, match=name):
            hugging_face_config.import_config(
                {key: value for key, value in entries.items() if key != name}
            )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2},
        {"head_dim": 12, "tie_embeddings": True, "init_std": 0.3},
        {"rotary_base": 7.0, "norm_epsilon": 0.25},
        {
            "rotary_scaling_factor": 3.0,
            "rotary_original_length_tokens": 100,
            "rotary_low_frequency_factor": 2.0,
            "rotary_high_frequency_factor": 6.0,
        },
        {"dtype": "bfloat16", "param_dtype": "bfloat16"},
    ],
)
def test_every_config_comes_back(changes):
    config = llama.LlamaConfig(64, 16, 32, num_layers=2, num_heads=4)
    config = dataclasses.replace(config, **changes)
    entries = hugging_face_config.export_config(config)
    assert hugging_face_config.import_config(entries) == config


def test_extra_entries_are_added_but_decide_nothing():
    config = llama.LlamaConfig(64, 16, 32, num_layers=2, num_heads=4)
    entries = hugging_face_config.export_config(config)
    assert (entries["max_position_embeddings"], entries["eos_token_id"]) == (2048, None)
    extra = {"max_position_embeddings": 7, "eos_token_id": 3, "name": "whale"}
    assert hugging_face_config.export_config(config, extra) == entries | extra
    scaled = dataclasses.replace(config, rotary_scaling_factor=2.5)
    entries = hugging_face_config.export_config(scaled)
    assert entries["max_position_embeddings"] == 20_480
    with pytest.raises(ValueError, match=r"vocab_size in config.json comes from"):
        hugging_face_config.export_config(config, {"vocab_size": 65})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2' .*only 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' .*hidden_act='silu'"),
        ({"attention_bias": True}, "attention_bias=True .*attention_bias=False"),
        ({"mlp_bias": True}, "mlp_bias=True .*mlp_bias=False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.*'bits': 4"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type='linear' .*'llama3' are"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "the llama3 scaling in config.json has no low_freq_factor",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 .*as a whole"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5"),
    ],
)
def test_other_models_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        hugging_face_config.import_config(LLAMA_3_2_1B | changes)


def test_the_length_before_scaling_may_be_that_of_the_model():
    # As transformers reads it.
    entries = dict(LLAMA_3_2_1B)
    entries["rope_scaling"] = dict(entries["rope_scaling"])
    del entries["rope_scaling"]["original_max_position_embeddings"]
    config = hugging_face_config.import_config(entries)
    assert config.rotary_original_length_tokens == 131_072
