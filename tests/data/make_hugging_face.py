"""Records what transformers makes of two small LLaMAs: see README.md."""

import pathlib

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-2,
}


def main():
    import numpy as np
    import torch
    import transformers

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 24,
    }
    models = {
        "scaled": {
            "num_key_value_heads": 2,
            "rope_theta": 100.0,
            "rope_scaling": scaling,
        },
        "tied": {"tie_word_embeddings": True},
    }
    directory = pathlib.Path(__file__).parent / "hugging_face"
    tokens = np.random.default_rng(0).integers(0, 61, size=(1, 48))
    recorded = {"tokens": tokens}
    for seed, (name, changes) in enumerate(models.items()):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**SHAPE, **changes)
        model = transformers.LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                # Norms vary, too, so that no two can be exchanged.
                parameter.normal_(1.0 if "norm" in path else 0.0, 0.2)
            if name == "tied":
                model.to(torch.bfloat16)
                model.save_pretrained(directory / name, max_shard_size="16KB")
            else:
                model.save_pretrained(directory / name)
            # Rounding the old model has rounded its rotary frequencies, too.
            model = transformers.LlamaForCausalLM.from_pretrained(
                directory / name, dtype=torch.float32
            )
            (directory / name / "generation_config.json").unlink()
            recorded[name] = model(torch.tensor(tokens)).logits.numpy()
    np.savez_compressed(directory / "logits.npz", **recorded)


if __name__ == "__main__":
    main()
