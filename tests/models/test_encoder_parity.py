"""Encoders that transformers reads and writes, where it is installed."""

import dataclasses

import jax
import numpy as np
import pytest

from models import encoder, encoder_weights
from tests.data.make_encoders import LABELS, make, pairs, reference
from tests.models.encoders import inputs, load, logits_of

HEADS = ["classification", "regression", "choice"]
FAMILIES = ["bert", "roberta", "mpnet"]


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def kind(transformers, family, head):
    name = {"bert": "Bert", "roberta": "Roberta", "mpnet": "MPNet"}[family]
    task = "MultipleChoice" if head == "choice" else "SequenceClassification"
    return getattr(transformers, f"{name}For{task}")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_is_written(transformers, tmp_path, family, head):
    config, _ = load(family)
    labels = config.labels if head == "classification" else ()
    config = dataclasses.replace(config, head=head, labels=labels)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype),
        encoder.abstract_params(config),
    )
    encoder_weights.save(tmp_path, config, params)
    model, report = kind(transformers, family, head).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    assert (
        model.config.problem_type
        == {
            "classification": "single_label_classification",
            "regression": "regression",
            "choice": None,
        }[head]
    )
    if head == "classification":
        assert model.config.id2label == LABELS
        assert model.config.label2id == {name: i for i, name in LABELS.items()}
    auto = getattr(
        transformers,
        "AutoModelForMultipleChoice"
        if head == "choice"
        else "AutoModelForSequenceClassification",
    ).from_pretrained(tmp_path)
    assert type(auto) is type(model)
    expected = reference(model.eval(), *inputs(config))
    logits = logits_of(config, params, *inputs(config))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_of_transformers_compute_the_same(
    transformers, tmp_path, family, seed
):
    model = make(transformers, family, seed)
    model.save_pretrained(tmp_path)
    config = encoder_weights.load_config(tmp_path)
    loaded = encoder_weights.load(tmp_path, config, jax.random.key(0))
    assert (loaded.unused, loaded.new) == ((), ())
    batch = pairs(config.padding_id, seed=seed)
    np.testing.assert_allclose(
        logits_of(config, loaded.params, *batch),
        reference(model, *batch),
        rtol=0,
        atol=1e-5,
    )
