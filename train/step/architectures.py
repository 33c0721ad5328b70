"""Shapes of a model's parameters by its kind: LLaMA or encoder."""

from typing import Any

from models import encoder, llama
from models.config import LlamaConfig
from models.encoder_config import EncoderConfig

Architecture = LlamaConfig | EncoderConfig


def abstract_params(model: Architecture) -> Any:
    """Shapes and dtypes of the parameters, without allocating them."""
    module = encoder if isinstance(model, EncoderConfig) else llama
    return module.abstract_params(model)
