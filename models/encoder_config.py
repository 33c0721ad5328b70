"""Encoder configuration: sizes, labels, dropout; of BERT, RoBERTa and MPNet."""

import dataclasses
from typing import Literal

from models.config import CHOICES, Float, Remat, check_fields

Family = Literal["bert", "roberta", "mpnet"]
Head = Literal["classification", "regression", "choice"]

# Zero is a sensible value of these; the check of signs leaves them out.
_MAY_BE_ZERO = (
    "num_types",
    "padding_id",
    "dropout",
    "attention_dropout",
    "head_dropout",
)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Configuration of an encoder with a head: family, sizes, labels, dropout.

    Attributes:
      family: bert, roberta or mpnet. They differ in the positions' first index, in
        token types, in MPNet's relative attention bias and in the head.
      vocabulary_size: rows of the token embedding.
      hidden_size: width of the residual stream.
      mlp_size: width inside the MLP.
      num_layers: transformer blocks.
      num_heads: attention heads.
      num_positions: rows of the position embedding; see `max_length_tokens`.
      num_types: number of token types; 0: the model has no token type embedding.
      padding_id: id of the padding token; RoBERTa and MPNet count positions from
        padding_id + 1.
      head: classification: one logit per label; regression: one number; choice: one
        logit per candidate text.
      labels: names of the classes by id, for classification; empty: not chosen yet,
        as in a pretrained model without a head.
      dropout: rate at the embedding and at the outputs of attention and MLP.
      attention_dropout: rate at the attention weights.
      head_dropout: rate in the head; None: as `dropout`.
      norm_epsilon: added to the variance in LayerNorm.
      init_std: standard deviation of every initial kernel and embedding.
      dtype: dtype of the computation; norms, softmax and logits stay in float32.
      param_dtype: dtype of the parameters.
      remat: rematerialisation, the activations that the backward pass recomputes.
        none: none; dots: all but the matrix products with weights; full: all, so
        that only each layer's input is stored.

    Raises:
      ValueError: a size is not positive, a choice is unknown, a rate is not in
        [0, 1), the heads do not divide the width, no position is left for a token,
        or a label's name occurs twice or where the head has none.

    >>> from models.encoder_config import EncoderConfig
    >>> config = EncoderConfig(
    ...     "roberta", 50265, 768, 3072, 12, 12, 514, 1, 1, labels=("no", "yes")
    ... )
    >>> config.max_length_tokens, config.num_labels, config.label2id["yes"]
    (512, 2, 1)
    """

    family: Family
    vocabulary_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_positions: int
    num_types: int
    padding_id: int
    head: Head = "classification"
    labels: tuple[str, ...] = ()
    dropout: float = 0.1
    attention_dropout: float = 0.1
    head_dropout: float | None = None
    norm_epsilon: float = 1e-12
    init_std: float = 0.02
    dtype: Float = "float32"
    param_dtype: Float = "float32"
    remat: Remat = "none"

    def __post_init__(self):
        choices = {**CHOICES, "family": Family, "head": Head}
        check_fields(self, choices, _MAY_BE_ZERO)
        for name in ("dropout", "attention_dropout", "head_dropout"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {rate}")
        for name in ("num_types", "padding_id"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")
        if self.padding_id >= self.vocabulary_size:
            raise ValueError(
                f"padding_id={self.padding_id} must be below "
                f"vocabulary_size={self.vocabulary_size}"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of "
                f"num_heads={self.num_heads}"
            )
        if self.max_length_tokens < 1:
            raise ValueError(
                f"num_positions={self.num_positions} leaves no position for a token: "
                f"{self.family} counts from padding_id + 1 = {self.padding_id + 1}"
            )
        self._check_labels()

    def _check_labels(self) -> None:
        if self.labels and self.head != "classification":
            raise ValueError(f"labels={self.labels} need head='classification'")
        if len(self.labels) == 1:
            raise ValueError(f"labels={self.labels} must be at least two classes")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels={self.labels} must differ from each other")

    @property
    def head_size(self) -> int:
        """Dimensions of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def first_position(self) -> int:
        """Row of the position embedding that the first token reads."""
        return 0 if self.family == "bert" else self.padding_id + 1

    @property
    def max_length_tokens(self) -> int:
        """Longest sequence: 512 for a RoBERTa with 514 positions."""
        return self.num_positions - self.first_position

    @property
    def has_pooler(self) -> bool:
        """Whether the head reads a pooler: in BERT, and for choices."""
        return self.family == "bert" or self.head == "choice"

    @property
    def num_labels(self) -> int:
        """Outputs of the head; for a choice one per candidate."""
        return len(self.labels) if self.head == "classification" else 1

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes by id."""
        return dict(enumerate(self.labels))

    @property
    def label2id(self) -> dict[str, int]:
        """Ids of the classes by name."""
        return {name: index for index, name in enumerate(self.labels)}
