"""Variants and sweeps on the command line, and their trials."""

import pytest

from train.comparison.variants import parse_sweep, parse_variant
from train.config.methods import matrix_scale_field, resolved
from train.config.optimizer_config import OptimizerConfig

BASE = OptimizerConfig(rank=8, update_interval=5)


def parse(text, rates=(1e-3,), scales=(1.0,)):
    return parse_variant(text, BASE, rates, scales)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("galore", {"name": "galore"}),
        ("adamw:b2=0.95", {"name": "adamw", "b2": 0.95}),
        (
            "subtrack:update_interval=50, scale=0.5",
            {"name": "subtrack", "update_interval": 50, "scale": 0.5},
        ),
        (
            "subtrack:transport=off,recovery=true",
            {"name": "subtrack", "transport": False, "recovery": True},
        ),
        ("subtrack-grad:step-size=2", {"name": "subtrack-grad", "step_size": 2.0}),
        ("subtrack:step_size=none", {"name": "subtrack"}),
        ("subtrack:rank=none", {"name": "subtrack", "rank": None}),
        ("ldadam:rho=0.5,b1=none", {"name": "ldadam", "rho": 0.5}),
        ("galore:align=none", {"name": "galore"}),
        (
            "adamw:schedule=wsd,decay_fraction=0.3,warmup_steps=7",
            {
                "name": "adamw",
                "schedule": "wsd",
                "decay_fraction": 0.3,
                "warmup_steps": 7,
            },
        ),
        ("subtrack:growth_limit=inf", {"name": "subtrack", "growth_limit": 1e999}),
    ],
)
def test_a_variant_is_a_method_and_settings_of_its_own(text, settings):
    variant = parse(text)
    scale = matrix_scale_field(settings["name"])
    wanted = {"rank": 8, "update_interval": 5, scale: 1.0} | settings
    assert variant.grid == (OptimizerConfig(**wanted),)
    assert variant.label == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sgd", "unknown 'sgd': choose from adamw, apollo,"),
        ("", "unknown '': choose from adamw"),
        ("subtrack:rank", "'rank' is not a setting; write rank=32"),
        ("subtrack:rank=", "'rank=' is not a setting"),
        (
            "subtrack:rnk=3",
            "unknown 'rnk' (did you mean rank?): choose from learning",
        ),
        ("subtrack:name=adamw", "unknown 'name'"),
        ("subtrack:rank=3.5", "rank=3.5: Input should be a valid integer"),
        ("subtrack:learning_rate=none", "learning_rate=none: Input should be"),
        ("subtrack:transport=maybe", "transport=maybe: Input should be"),
        ("subtrack:rank=0", "--rank must be at least 1, got 0"),
        ("subtrack:rank=3,rank=4", "a setting is given twice"),
        ("adamw:rank=3", "adamw does not use rank; it uses b1, b2,"),
        ("ldadam:update_interval=3", "ldadam does not use update_interval"),
        ("apollo-mini:rank=3", "apollo-mini does not use rank"),
        ("adamw:warmup_steps=3,warmup_fraction=0.1", "exclude each other"),
        ("galore:mu_dtype=bfloat16,moments_dtype=int8", "exclude each other"),
        ("static:update_interval=3", "static does not use update_interval"),
        ("galore:growth_limit=2", "galore does not use growth_limit"),
    ],
)
def test_what_is_no_variant_is_told(text, message):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert message in str(error.value)
    assert f"--optimizers {text!r}" in str(error.value)


def test_every_method_is_tried_as_often():
    rates, scales = (1e-3, 1e-2, 1e-1), (0.25, 1.0)
    searches = [parse(text, rates, scales).searched for text in ("adamw", "subtrack")]
    assert [len(search) for search in searches] == [6, 6]
    adamw, subtrack = searches
    assert {each.matrix_learning_rate_scale for each in adamw} == set(scales)
    assert {resolved(each).scale for each in subtrack} == set(scales)
    assert {each.matrix_learning_rate_scale for each in subtrack} == {1.0}
    assert {each.learning_rate for each in adamw} == set(rates)


def test_what_a_variant_names_is_not_searched():
    tried = parse("subtrack:scale=0.5", (1e-3, 1e-2), (0.25, 1.0)).searched
    assert [(each.learning_rate, each.scale) for each in tried] == [
        (1e-3, 0.5),
        (1e-2, 0.5),
    ]
    tried = parse("adamw:learning_rate=0.1", (1e-3, 1e-2), (1.0,)).searched
    assert [each.learning_rate for each in tried] == [0.1]


def test_a_sweep_changes_one_setting_of_those_that_have_it():
    variants = [parse("adamw"), parse("subtrack"), parse("galore:rank=4")]
    sweep = parse_sweep("rank=4,8", variants)
    swept = [form for _, *row in sweep.rows for form in row]
    ranks = [(each.label, each.grid[0].rank) for each in swept]
    assert ranks == [
        ("adamw", 8),
        ("adamw", 8),
        ("subtrack rank=4", 4),
        ("subtrack rank=8", 8),
        ("galore:rank=4 rank=4", 4),
        ("galore:rank=4 rank=8", 8),
    ]
    # The trials of rank 8 are those of the unchanged variant.
    assert swept[3].searched == variants[1].searched


@pytest.mark.parametrize("text", ["align=none,sign", "moments_dtype=none,int8"])
def test_words_are_swept_like_numbers(text):
    galore = parse("galore")
    name, _, values = text.partition("=")
    ((_, *row),) = parse_sweep(text, [galore]).rows
    labels = [each.label for each in row]
    assert labels == [f"galore {name}={value}" for value in values.split(",")]


def test_an_ablation_shares_the_trials_of_what_the_method_does_anyway():
    variants = [parse("subtrack"), parse("galore")]
    (_, on, off), _ = parse_sweep("transport=on,off", variants).rows
    assert on.label == "subtrack transport=on"
    assert on.searched == variants[0].searched
    assert off.searched != variants[0].searched


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank", "'rank' is not a setting"),
        ("rnk=1,2", "unknown 'rnk'"),
        ("rank=4,many", "rank=many: Input should be a valid integer"),
        ("rank=4,4", "has a value twice"),
        ("rank=4,", "rank=: Input should be"),
        ("rank=0,4", "--rank must be at least 1, got 0"),
        ("angle=0.1,0.2", "none of --optimizers uses angle"),
    ],
)
def test_what_is_no_sweep_is_told(text, message):
    with pytest.raises(ValueError) as error:
        parse_sweep(text, [parse("adamw"), parse("subtrack")])
    assert message in str(error.value)
    assert f"--sweep {text!r}" in str(error.value)
