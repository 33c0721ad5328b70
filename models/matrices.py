"""Dimension numbers of the matrices in a model, for low-rank optimizers and Muon."""

import re
from typing import Any

import jax
from optax.contrib import MuonDimensionNumbers

_MATRIX = re.compile(r"\b(attention|mlp)/\w+/kernel\b")


def matrix_axes(params: Any) -> Any:
    """Dimension numbers of the attention and MLP kernels, for matrix optimizers.

    Pass the function itself as `dimension_numbers` to `subtrack_jax.subtrack` or
    as `muon_weight_dimension_numbers` to `optax.contrib.muon`.

    Args:
      params: a tree of a LLaMA's or an encoder's parameters, gradients or shapes: an
        `nnx.State` or the nested dictionaries of `nnx.to_pure_dict`.

    Returns:
      The same tree with `MuonDimensionNumbers` (in, out) for attention and MLP
      kernels (the leading axis of layers is a batch axis), None for embeddings,
      heads, norms and biases.

    >>> from models import llama
    >>> config = llama.LlamaConfig(64, 16, 32, num_layers=2, num_heads=2)
    >>> axes = llama.matrix_axes(llama.abstract_params(config))
    >>> axes["layers"]["mlp"]["up"]["kernel"]
    MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    >>> axes["head"]["kernel"] is None
    True
    """

    def axes(path, leaf):
        del leaf
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return MuonDimensionNumbers(-2, -1) if _MATRIX.search(name) else None

    return jax.tree_util.tree_map_with_path(axes, params)
