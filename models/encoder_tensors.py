"""Names of the tensors in files of BERT, RoBERTa and MPNet."""

import re

from models.encoder_config import EncoderConfig
from models.weights import Place

# Modules of a layer, in order of the computation: names in files and our paths.
_BERT_LAYER = {
    "attention.self.query": ("attention", "query"),
    "attention.self.key": ("attention", "key"),
    "attention.self.value": ("attention", "value"),
    "attention.output.dense": ("attention", "output"),
    "attention.output.LayerNorm": ("attention_norm",),
    "intermediate.dense": ("mlp", "up"),
    "output.dense": ("mlp", "down"),
    "output.LayerNorm": ("mlp_norm",),
}
_MPNET_LAYER = {
    "attention.attn.q": ("attention", "query"),
    "attention.attn.k": ("attention", "key"),
    "attention.attn.v": ("attention", "value"),
    "attention.attn.o": ("attention", "output"),
    "attention.LayerNorm": ("attention_norm",),
    "intermediate.dense": ("mlp", "up"),
    "output.dense": ("mlp", "down"),
    "output.LayerNorm": ("mlp_norm",),
}
POOLER = "pooler.dense."
HEAD = "classifier."
# Buffers that transformers computes; older files have them.
_BUFFERS = re.compile(r"\b(position_ids|token_type_ids)$")
# Heads for other tasks.
OTHER_HEADS = re.compile(r"^(cls|lm_head|qa_outputs)\.")


def is_tensor(stored: str) -> bool:
    """Whether a name is a weight's, not that of a buffer."""
    return not _BUFFERS.search(stored)


def renamed(stored: str, prefix: str) -> str:
    """Name without the model's prefix, and with today's names for norms."""
    name = stored.removeprefix(prefix)
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)


def encoder_places(config: EncoderConfig) -> dict[str, Place]:
    """Maps tensor names, without a prefix, to positions in the tree."""
    places = {}

    def add(name: str, path: tuple[str, ...], layer: int | None = None) -> None:
        weight = "scale" if path[-1].endswith("norm") else "kernel"
        places[f"{name}.weight"] = Place((*path, weight), layer)
        places[f"{name}.bias"] = Place((*path, "bias"), layer)

    def add_embedding(name: str, *path: str) -> None:
        places[f"{name}.weight"] = Place((*path, "embedding"))

    add_embedding("embeddings.word_embeddings", "embedding", "word")
    add_embedding("embeddings.position_embeddings", "embedding", "position")
    if config.num_types:
        add_embedding("embeddings.token_type_embeddings", "embedding", "type")
    add("embeddings.LayerNorm", ("embedding_norm",))
    if config.family == "mpnet":
        add_embedding("encoder.relative_attention_bias", "relative_bias")
    modules = _MPNET_LAYER if config.family == "mpnet" else _BERT_LAYER
    for layer in range(config.num_layers):
        for name, path in modules.items():
            add(f"encoder.layer.{layer}.{name}", ("layers", *path), layer)
    if config.has_pooler:
        add("pooler.dense", ("pooler",))
        add("classifier", ("head", "output"))
    else:
        add("classifier.dense", ("head", "dense"))
        add("classifier.out_proj", ("head", "output"))
    return places
