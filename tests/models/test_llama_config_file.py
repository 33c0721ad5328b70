"""config.json: both forms of transformers, Mistral, unsupported models."""

import dataclasses
import math

import jax
import pytest
from flax import nnx

from models import llama, llama_config_file

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
    config = llama_config_file.import_config(LLAMA_3_2_1B)
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
        max_length_tokens=131_072,
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
    entries["dtype"] = "torch." + entries.pop("torch_dtype")
    assert llama_config_file.import_config(entries) == config


def test_what_is_left_out_has_the_values_of_the_first_llama():
    required = ["model_type", "vocab_size", "hidden_size", "intermediate_size"]
    required += ["num_hidden_layers", "num_attention_heads"]
    entries = {name: LLAMA_3_2_1B[name] for name in required}
    config = llama_config_file.import_config(entries)
    assert config == llama.LlamaConfig(128_256, 2048, 8192, 16, 32)
    for name in required:
        with pytest.raises(ValueError, match=name):
            llama_config_file.import_config(
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
    config = llama.LlamaConfig(64, 16, 32, 2, num_heads=4, max_length_tokens=100)
    config = dataclasses.replace(config, **changes)
    entries = llama_config_file.export_config(config)
    assert llama_config_file.import_config(entries) == config


def test_extra_entries_are_added_but_decide_nothing():
    config = llama.LlamaConfig(64, 16, 32, num_layers=2, num_heads=4)
    entries = llama_config_file.export_config(config)
    assert (entries["max_position_embeddings"], entries["eos_token_id"]) == (2048, None)
    extra = {"max_position_embeddings": 7, "eos_token_id": 3, "name": "whale"}
    assert llama_config_file.export_config(config, extra) == entries | extra
    scaled = dataclasses.replace(config, rotary_scaling_factor=2.5)
    entries = llama_config_file.export_config(scaled)
    assert entries["max_position_embeddings"] == 20_480
    longer = dataclasses.replace(scaled, max_length_tokens=9000)
    entries = llama_config_file.export_config(longer)
    assert entries["max_position_embeddings"] == 9000
    with pytest.raises(ValueError, match=r"vocab_size in config.json is determined"):
        llama_config_file.export_config(config, {"vocab_size": 65})


NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2' .*use 'llama'"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\] "),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' .*hidden_act='silu'"),
        ({"hidden_act": ["silu"]}, r"hidden_act=\['silu'\] .*hidden_act='silu'"),
        ({"attention_bias": True}, "attention_bias=True .*attention_bias=False"),
        ({"attention_bias": "false"}, "attention_bias='false' .*attention_bias=F"),
        ({"mlp_bias": True}, "mlp_bias=True .*mlp_bias=False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.*'bits': 4"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type='linear' .*or 'llama3'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "the llama3 scaling has no low_freq_factor",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 .*are rotated"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5"),
        # Types that transformers does not write.
        ({"rope_scaling": "linear"}, "rope_scaling='linear' cannot .* dictionary$"),
        ({"rope_scaling": [8.0]}, r"rope_scaling=\[8.0\] cannot .* dictionary"),
        ({"rope_scaling": True}, "rope_scaling=True cannot .* dictionary"),
        ({"rope_parameters": 3, "rope_scaling": None}, "rope_parameters=3 cannot"),
        (
            {"rope_scaling": {"full_attention": {"rope_theta": 1e6}}},
            "separate rotary positions for full_attention are not supported",
        ),
        ({"rope_scaling": {"factor": 8.0}}, "by factor=8 has no rope_type: add it"),
        ({"rope_scaling": {"rope_type": 3}}, "rope_scaling.rope_type=3 cannot"),
        ({"rope_scaling": {"factor": "8"}}, "rope_scaling.factor='8' cannot"),
        (
            {"rope_scaling": {"original_max_position_embeddings": 8192.0}},
            r"original_max_position_embeddings=8192\.0 cannot .* integer",
        ),
        ({"rope_theta": "500000"}, "rope_theta='500000' cannot .* number"),
        ({"rope_theta": 0}, "rope_theta=0 cannot .* greater than 0"),
        ({"rope_theta": NAN}, "rope_theta=nan cannot .* finite"),
        ({"rope_theta": math.inf}, "rope_theta=inf cannot .* finite"),
        ({"rope_theta": {"full": 1e4}}, "rope_theta={'full': 10000.0} cannot"),
        ({"hidden_size": 2048.0}, r"hidden_size=2048\.0 cannot .* integer"),
        ({"hidden_size": "2048"}, "hidden_size='2048' cannot .* integer"),
        ({"hidden_size": [2048]}, r"hidden_size=\[2048\] cannot .* integer"),
        ({"hidden_size": {}}, "has no hidden_size"),
        ({"hidden_size": -2048}, "hidden_size=-2048 cannot .* greater than 0"),
        ({"hidden_size": NAN}, "hidden_size=nan cannot .* integer"),
        ({"hidden_size": True}, "hidden_size=True cannot .* integer"),
        ({"hidden_size": 10**30}, "hidden_size=1000.* less than"),
        ({"num_attention_heads": 31}, "num_heads=31 must be a multiple"),
        ({"head_dim": 0}, "head_dim=0 cannot .* greater than 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 cannot"),
        ({"num_hidden_layers": None}, "has no num_hidden_layers"),
        ({"num_key_value_heads": "8"}, "num_key_value_heads='8' cannot"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' cannot .* number"),
        ({"rms_norm_eps": False}, "rms_norm_eps=False cannot .* number"),
        ({"tie_word_embeddings": "true"}, "tie_word_embeddings='true' cannot"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 cannot .* boolean"),
        ({"max_position_embeddings": 1e5}, r"max_position_embeddings=100000\.0 ca"),
        ({"max_position_embeddings": -1}, "max_position_embeddings=-1 cannot"),
        ({"torch_dtype": 16}, "torch_dtype=16 cannot .* string"),
        ({"vocab_size": "x" * 200}, r"vocab_size='xxx.*\.\.\. cannot"),
    ],
)
def test_other_models_are_refused(changes, message):
    with pytest.raises(ValueError, match=rf"^config\.json.*{message}") as raised:
        llama_config_file.import_config(LLAMA_3_2_1B | changes)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


def test_whole_numbers_are_numbers_and_nothing_is_the_default():
    entries = LLAMA_3_2_1B | {"rope_theta": 500_000, "rope_scaling": {}}
    config = llama_config_file.import_config(entries)
    assert (config.rotary_base, config.rotary_scaling) == (500_000.0, None)
    entries |= {"rope_parameters": {"rope_theta": 7}, "num_key_value_heads": None}
    config = llama_config_file.import_config(entries)
    assert (config.rotary_base, config.key_value_heads) == (7.0, 32)


MISTRAL = LLAMA_3_2_1B | {
    "model_type": "mistral",
    "rope_scaling": None,
    "sliding_window": None,
    "max_position_embeddings": 32_768,
}


@pytest.mark.parametrize("window", [None, 32_768, 131_072])
def test_a_mistral_that_sees_everything_is_a_llama(window):
    entries = MISTRAL | {"sliding_window": window}
    config = llama_config_file.import_config(entries)
    expected = llama_config_file.import_config(entries | {"model_type": "llama"})
    assert config == expected
    assert config.max_length_tokens == 32_768
    exported = llama_config_file.export_config(config)
    assert exported["model_type"] == "llama"
    assert llama_config_file.import_config(exported) == config


def test_a_mistral_takes_the_defaults_of_a_mistral():
    entries = dict(MISTRAL)
    del entries["num_key_value_heads"], entries["max_position_embeddings"]
    config = llama_config_file.import_config(entries)
    assert (config.num_key_value_heads, config.max_length_tokens) == (8, 131_072)
    del entries["sliding_window"]
    with pytest.raises(ValueError, match="sliding_window=4096 is not supported"):
        llama_config_file.import_config(entries)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (4096, "sliding_window=4096 is .* null and max_position_embeddings to 4096"),
        (32_767, "sliding_window=32767 is not supported"),
        ("4096", "sliding_window='4096' cannot"),
        (0, "sliding_window=0 cannot"),
        (False, "sliding_window=False cannot"),
    ],
)
def test_a_mistral_with_a_window_is_refused(window, message):
    with pytest.raises(ValueError, match=message):
        llama_config_file.import_config(MISTRAL | {"sliding_window": window})


def test_the_length_before_scaling_may_be_that_of_the_model():
    # transformers' fallback.
    entries = dict(LLAMA_3_2_1B)
    entries["rope_scaling"] = dict(entries["rope_scaling"])
    del entries["rope_scaling"]["original_max_position_embeddings"]
    config = llama_config_file.import_config(entries)
    assert config.rotary_original_length_tokens == 131_072
