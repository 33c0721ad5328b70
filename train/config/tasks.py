"""Tasks of GLUE and SuperGLUE as records: fields, labels, metrics, splits, files."""

import dataclasses
from typing import Literal

from train.config.rules import check_name

GLUE = "nyu-mll/glue"
SUPERGLUE = "aps/super_glue"

# How a row becomes the model's input; see `train.finetuning.examples`.
Form = Literal["texts", "choice", "answer", "word", "spans"]
Head = Literal["classification", "regression", "choice"]
Names = Literal["names", "numbers", "lowercase"]

_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_FALSE_TRUE = ("False", "True")


@dataclasses.dataclass(frozen=True)
class Task:
    """Fine-tuning task.

    Attributes:
      name: value of `--task`.
      fields: fields of a row that hold text, in the order of the input.
      metrics: metrics to report; the best checkpoint has the best of the first one.
      labels: names of the classes in the order of the dataset's numbers; (): those in
        the data, or none for regression.
      dataset: the benchmark's name on the hub; None: rows come from files or a given
        dataset.
      config: configuration of that dataset.
      form: how a row becomes the model's input.
      head: kind of the model's output.
      label_field: field with the label.
      train: name of the split to train on; None: the task only evaluates models.
      validation: names of the splits to evaluate on; the first selects the checkpoint.
      test: names of the splits with hidden labels.
      files: file of the benchmark's submission for each test split.
      answers: how a submission writes labels: their names, their numbers, or their
        names in lower case.
      model: task whose models this one evaluates; None: its own.
      group_field: field by which an exact match or a parity groups rows.
    """

    name: str
    fields: tuple[str, ...]
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    dataset: str | None = None
    config: str | None = None
    form: Form = "texts"
    head: Head = "classification"
    label_field: str = "label"
    train: str | None = "train"
    validation: tuple[str, ...] = ("validation",)
    test: tuple[str, ...] = ("test",)
    files: tuple[str, ...] = ()
    answers: Names = "names"
    model: str | None = None
    group_field: str | None = None

    def __post_init__(self):
        assert not self.files or len(self.files) == len(self.test), self.name


def _glue(
    name: str,
    fields: str,
    metrics: str,
    labels: tuple[str, ...],
    file: str,
    *,
    answers: Names = "numbers",
) -> Task:
    return Task(
        name,
        tuple(fields.split()),
        tuple(metrics.split()),
        labels,
        dataset=GLUE,
        config=name,
        head="classification" if labels else "regression",
        files=(f"{file}.tsv",),
        answers=answers,
    )


def _superglue(
    name: str, fields: str, metrics: str, labels: tuple[str, ...], file: str
) -> Task:
    return Task(
        name,
        tuple(fields.split()),
        tuple(metrics.split()),
        labels,
        dataset=SUPERGLUE,
        config=name,
        files=(f"{file}.jsonl",),
    )


_replace = dataclasses.replace
_ALL = (
    # GLUE, arXiv 1804.07461, table 1.
    _glue("cola", "sentence", "matthews", ("unacceptable", "acceptable"), "CoLA"),
    _glue("sst2", "sentence", "accuracy", ("negative", "positive"), "SST-2"),
    _glue(
        "mrpc",
        "sentence1 sentence2",
        "f1 accuracy",
        ("not_equivalent", "equivalent"),
        "MRPC",
    ),
    _glue("stsb", "sentence1 sentence2", "pearson spearman", (), "STS-B"),
    _glue(
        "qqp",
        "question1 question2",
        "f1 accuracy",
        ("not_duplicate", "duplicate"),
        "QQP",
    ),
    _replace(
        _glue("mnli", "premise hypothesis", "accuracy", _NLI, "", answers="names"),
        validation=("validation_matched", "validation_mismatched"),
        test=("test_matched", "test_mismatched"),
        files=("MNLI-m.tsv", "MNLI-mm.tsv"),
    ),
    _glue(
        *("qnli", "question sentence", "accuracy", _ENTAILMENT, "QNLI"),
        answers="names",
    ),
    _glue(
        *("rte", "sentence1 sentence2", "accuracy", _ENTAILMENT, "RTE"),
        answers="names",
    ),
    _glue(
        "wnli",
        "sentence1 sentence2",
        "accuracy",
        ("not_entailment", "entailment"),
        "WNLI",
    ),
    _replace(
        _glue("ax", "premise hypothesis", "matthews", _NLI, "AX", answers="names"),
        train=None,
        validation=(),
        model="mnli",
    ),
    # SuperGLUE, arXiv 1905.00537, table 1.
    _replace(
        _superglue("boolq", "question passage", "accuracy", _FALSE_TRUE, "BoolQ"),
        answers="lowercase",
    ),
    _superglue(
        "cb",
        "premise hypothesis",
        "accuracy macro_f1",
        ("entailment", "contradiction", "neutral"),
        "CB",
    ),
    _replace(
        _superglue(
            "copa",
            "premise question choice1 choice2",
            "accuracy",
            ("choice1", "choice2"),
            "COPA",
        ),
        form="choice",
        head="choice",
        answers="numbers",
    ),
    _replace(
        _superglue(
            "multirc",
            "paragraph question answer",
            "f1 exact_match",
            _FALSE_TRUE,
            "MultiRC",
        ),
        form="answer",
        answers="numbers",
        group_field="idx",
    ),
    _replace(
        _superglue("wic", "word sentence1 sentence2", "accuracy", _FALSE_TRUE, "WiC"),
        form="word",
        answers="lowercase",
    ),
    _replace(
        _superglue(
            "wsc",
            "text span1_text span2_text span1_index span2_index",
            "accuracy",
            _FALSE_TRUE,
            "WSC",
        ),
        form="spans",
    ),
    _replace(
        _superglue(
            "superglue-rte", "premise hypothesis", "accuracy", _ENTAILMENT, "RTE"
        ),
        config="rte",
    ),
    _replace(
        _superglue("axb", "sentence1 sentence2", "matthews", _ENTAILMENT, "AX-b"),
        train=None,
        validation=(),
        model="rte",
    ),
    _replace(
        _superglue(
            "axg", "premise hypothesis", "accuracy gender_parity", _ENTAILMENT, "AX-g"
        ),
        train=None,
        validation=(),
        model="rte",
        group_field="idx",
    ),
    # Data of one's own: the fields are given.
    Task("custom", (), ("accuracy", "macro_f1")),
    Task("custom-regression", (), ("pearson", "spearman"), head="regression"),
)
TASKS = {task.name: task for task in _ALL}


def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
      ValueError: no task has this name.

    >>> find_task("cb").labels
    ('entailment', 'contradiction', 'neutral')
    """
    check_name(f"--task {name}", name, list(TASKS))
    return TASKS[name]
