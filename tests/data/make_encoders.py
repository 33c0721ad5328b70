"""Records what transformers makes of small encoders: see README.md."""

import pathlib

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "layer_norm_eps": 1e-5,
}
# Keys up to 90 tokens away: every bucket of the relative positions but the last two.
LENGTH = 91
# Not in alphabetical order, so that no program can sort them unnoticed.
LABELS = {0: "neutral", 1: "entailment", 2: "contradiction"}


def pairs(padding_id, rows=4, seed=0):
    """Token ids, token types and lengths of pairs with padding at the end."""
    import numpy as np

    generator = np.random.default_rng(seed)
    tokens = generator.integers(5, SHAPE["vocab_size"], (rows, LENGTH))
    lengths = np.array([LENGTH, 40, 7, 1, 64, 3][:rows])
    positions = np.arange(LENGTH)
    is_token = positions < lengths[:, None]
    types = (positions >= lengths[:, None] // 2) & is_token
    return np.where(is_token, tokens, padding_id), types.astype(int), lengths


def randomize(model, seed):
    """Draws all weights; norms vary, too, so that no two can be exchanged."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            is_scale = "LayerNorm.weight" in path
            parameter.normal_(1.0 if is_scale else 0.0, 0.3)
    return model.eval()


def make(transformers, name, seed=0):
    """A random model of transformers by the name of its directory."""
    family, _, head = name.partition("_")
    kind = {"bert": "Bert", "roberta": "Roberta", "mpnet": "MPNet"}[family]
    padding_id = 0 if family == "bert" else 1
    config = getattr(transformers, f"{kind}Config")(
        **SHAPE,
        max_position_embeddings=LENGTH if family == "bert" else LENGTH + 2,
        pad_token_id=padding_id,
        id2label={0: "LABEL_0"} if head == "regression" else LABELS,
        problem_type="regression" if head == "regression" else None,
        **({} if family == "mpnet" else {"type_vocab_size": 2 - padding_id}),
    )
    task = "MultipleChoice" if head == "choice" else "SequenceClassification"
    return randomize(getattr(transformers, f"{kind}For{task}")(config), seed)


def reference(model, tokens, types, lengths):
    """Logits of transformers."""
    import numpy as np
    import torch

    mask = np.arange(tokens.shape[-1]) < lengths[..., None]
    inputs = {"input_ids": tokens, "attention_mask": mask.astype(int)}
    if model.config.model_type == "bert":
        inputs["token_type_ids"] = types
    inputs = {name: torch.tensor(value) for name, value in inputs.items()}
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def main():
    import numpy as np
    import transformers

    directory = pathlib.Path(__file__).parent / "encoders"
    recorded = {}
    for name in ("bert", "roberta", "mpnet", "bert_regression", "roberta_choice"):
        model = make(transformers, name)
        model.save_pretrained(directory / name)
        tokens, types, lengths = pairs(model.config.pad_token_id)
        if name == "roberta_choice":  # two rows of two candidates
            tokens = tokens.reshape(2, 2, -1)
            types, lengths = types.reshape(tokens.shape), lengths.reshape(2, 2)
        recorded[name] = reference(model, tokens, types, lengths)
    np.savez_compressed(directory / "logits.npz", **recorded)


if __name__ == "__main__":
    main()
