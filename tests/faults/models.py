"""Faults of the models."""

from tests.faults.fault import fault

LLAMA = "tests/models/test_llama.py"
ENCODER = "tests/models/test_encoder.py"
ENCODER_WEIGHTS = "tests/models/test_encoder_weights.py"

MODELS = [
    fault(
        "rotary pairs turn the other way",
        "(first * cos - second * sin, second * cos + first * sin)",
        "(first * cos + second * sin, second * cos - first * sin)",
        f"{LLAMA}::test_logits_equal_the_equations_in_numpy",
        "tests/models/test_llama_parity.py",
    ),
    fault(
        "a cache reads one position too many",
        "seen = jnp.arange(cache.keys.shape[1]) <= positions[:, None]",
        "seen = jnp.arange(cache.keys.shape[1]) <= positions[:, None] + 1",
        f"{LLAMA}::test_decoding_step_by_step_equals_reading_at_once",
    ),
    fault(
        "padding counts in the loss",
        "return jnp.sum(losses, where=mask), jnp.sum(log_z**2, where=mask)",
        "return jnp.sum(losses), jnp.sum(log_z**2, where=mask)",
        "tests/models/test_loss.py",
    ),
    fault(
        "the nucleus leaves out its last token",
        "above = jnp.cumsum(probabilities, axis=-1) - probabilities",
        "above = jnp.cumsum(probabilities, axis=-1)",
        "tests/models/test_generation.py::"
        "test_probabilities_are_those_of_the_definition",
    ),
]

ENCODERS = [
    fault(
        "encoder: a choice of GELU that is not exact",
        "jax.nn.gelu(self.up(x), approximate=False)",
        "jax.nn.gelu(self.up(x), approximate=True)",
        f"{ENCODER}::test_logits_equal_those_that_transformers_recorded",
    ),
    fault(
        "encoder: RoBERTa counts positions from 0",
        'return 0 if self.family == "bert" else self.padding_id + 1',
        "return 0",
        f"{ENCODER}::test_logits_equal_those_that_transformers_recorded",
    ),
    fault(
        "encoder: a relative bias by query minus key",
        "offsets = positions[None, :] - positions[:, None]",
        "offsets = positions[:, None] - positions[None, :]",
        f"{ENCODER}::test_logits_equal_those_that_transformers_recorded",
    ),
    fault(
        "encoder: padding is read",
        "mask = (jnp.arange(length) < lengths[:, None])[:, None, None]",
        "mask = (jnp.arange(length) <= lengths[:, None])[:, None, None]",
        f"{ENCODER}::test_padding_changes_nothing",
    ),
    fault(
        "encoder: dropout in training reads padding",
        "logits = jnp.where(scope.mask, logits, jnp.finfo(jnp.float32).min)",
        "pass",
        "tests/train/step/test_encoder_step.py",
        f"{ENCODER}::test_attention_with_and_without_dropout_is_the_same_where_nothing"
        "_drops",
    ),
    fault(
        "encoder: dropout forgets the attention weights",
        "dropout(jax.nn.softmax(logits), self.dropout, key)",
        "jax.nn.softmax(logits)",
        f"{ENCODER}::test_each_rate_drops_out_by_the_key",
    ),
    fault(
        "encoder: labels in the order of their text",
        "tuple(names[str(index)] for index in range(len(names)))",
        "tuple(sorted(names[str(index)] for index in range(len(names))))",
        f"{ENCODER_WEIGHTS}::test_labels_keep_their_order",
    ),
    fault(
        "encoder: a head for other labels is taken",
        "if stored == (config.head, config.labels):",
        "if stored.head == config.head:",
        f"{ENCODER_WEIGHTS}::test_a_stored_head_for_something_else_is_refused_unless_"
        "replaced",
    ),
    fault(
        "encoder: missing layers may be new",
        "(name.startswith(POOLER) and not has_pooler)",
        "name not in names",
        f"{ENCODER_WEIGHTS}::test_tensors_that_do_not_fit_are_refused",
    ),
    fault(
        "encoder: biases decay",
        'return "norm" not in name and "bias" not in name',
        'return "norm" not in name',
        "tests/train/step/test_encoder_step.py::test_norms_and_biases_do_not_decay",
    ),
]
FAULTS = MODELS + ENCODERS
