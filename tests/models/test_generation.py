"""Sampling and streaming of tokens against definitions in float64."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import generation
from models.generation import ENDED, Sampling
from tests.models.common import CONFIG, logits_of, make_model, make_tokens

GREEDY = Sampling(temperature=0.0)
LOGITS = np.random.default_rng(0).normal(0, 2, (3, 40))


def probabilities_by_hand(logits, temperature, top_k, top_p):
    """Probabilities of one row, token by token in float64."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = order[:top_k]
    weights = {i: math.exp((logits[i] - max(logits)) / temperature) for i in kept}
    total = sum(weights.values())
    nucleus, reached = [], 0.0
    for i in kept:
        if top_p is not None and reached >= top_p:
            break
        nucleus.append(i)
        reached += weights[i] / total
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


# Every pair of top_k and top_p, with one temperature after another.
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        ([0.3, 1.0, 2.5][(i + j) % 3], top_k, top_p)
        for i, top_k in enumerate([None, 1, 7, 40, 1000])
        for j, top_p in enumerate([None, 1e-6, 0.5, 0.9, 1.0])
    ],
)
def test_probabilities_are_those_of_the_definition(temperature, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p)
    got = np.exp(generation.log_probabilities(jnp.array(LOGITS), sampling))
    want = [probabilities_by_hand(row, temperature, top_k, top_p) for row in LOGITS]
    np.testing.assert_array_equal(got > 0, np.array(want) > 0)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)


def test_tokens_are_as_frequent_as_probable():
    sampling = Sampling(1.5, top_k=12, top_p=0.9)
    count = 20_000
    keys = jax.random.split(jax.random.key(1), count)
    logits = jnp.broadcast_to(jnp.array(LOGITS[0]), (count, 40))
    tokens = generation.draw(keys, logits, sampling)
    frequencies = np.bincount(tokens, minlength=40) / count
    want = np.array(probabilities_by_hand(LOGITS[0], *sampling))
    assert 3 < np.sum(want > 0) < 12
    np.testing.assert_array_equal(frequencies > 0, want > 0)
    np.testing.assert_allclose(frequencies, want, atol=4 * math.sqrt(0.25 / count))


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(0.0, top_k=5, top_p=0.5),
        Sampling(1e-46),
        Sampling(1e-40),
        Sampling(1e-6),
        Sampling(1e3, top_k=1),
        Sampling(1e3, top_p=1e-6),
    ],
)
def test_no_choice_is_the_likeliest_token(sampling):
    logits = jnp.array(LOGITS)
    logits = logits.at[1, 5:9].set(50.0)  # the first of equal ones
    if 0 < sampling.temperature < 1e-3:
        logits = logits[::2]  # equal logits stay equally probable
    keys = jax.random.split(jax.random.key(0), len(logits))
    tokens = generation.draw(keys, logits, sampling)
    np.testing.assert_array_equal(tokens, jnp.argmax(logits, axis=-1))


def test_a_high_temperature_makes_all_tokens_alike():
    got = generation.log_probabilities(jnp.array(LOGITS), Sampling(1e38))
    np.testing.assert_allclose(np.exp(got), 1 / 40, rtol=1e-5)


def stream(prompt, *, seed=0, model=None, **options):
    """All tokens, (batch, length)."""
    keys = jax.random.split(jax.random.key(seed), len(prompt))
    model = model or make_model()
    return np.array(list(generation.stream(model, prompt, keys, **options))).T


@pytest.mark.parametrize("prompt_length", [1, 64])
def test_greedy_tokens_are_the_argmax_of_the_whole_text(prompt_length):
    prompt = np.array(make_tokens((2, prompt_length)))
    tokens = stream(prompt, length=6, sampling=GREEDY)
    text = np.concatenate([prompt, tokens], axis=1)
    likeliest = jnp.argmax(logits_of(make_model(), text), axis=-1)
    np.testing.assert_array_equal(tokens, likeliest[:, prompt_length - 1 : -1])


def test_a_model_that_is_full_goes_on_from_the_last_half():
    prompt = np.array(make_tokens((2, 7)))
    tokens = stream(prompt, length=20, sampling=GREEDY, positions=10)
    text = np.concatenate([prompt, tokens], axis=1)
    start, stop = 0, 7
    for k, token in enumerate(tokens.T, 7):
        if stop - start > 10:
            start = stop - 5
        likeliest = jnp.argmax(logits_of(make_model(), text[:, start:k])[:, -1], -1)
        np.testing.assert_array_equal(token, likeliest)
        stop = k + 1


def test_the_keys_decide_the_tokens_of_their_rows():
    prompt = np.array(make_tokens((1, 3)).repeat(3, axis=0))
    one = stream(prompt, length=8)
    np.testing.assert_array_equal(one, stream(prompt, length=8))
    assert not np.array_equal(one, stream(prompt, length=8, seed=1))
    assert len(np.unique(one, axis=0)) == 3
    keys = jax.random.split(jax.random.key(0), 3)[1:2]
    alone = generation.stream(make_model(), prompt[:1], keys, length=8)
    np.testing.assert_array_equal(np.array(list(alone)).T, one[1:2])


def test_rows_end_at_a_stop_and_the_stream_with_the_last_of_them():
    prompt = np.array(make_tokens((1, 3)).repeat(3, axis=0))
    free = stream(prompt, length=40)
    stops = [int(free[0, 4]), int(free[1, 7]), int(free[2, 2])]
    tokens = stream(prompt, length=40, stops=stops)
    ends = [np.flatnonzero(np.isin(row, stops))[0] for row in free]
    assert tokens.shape == (3, max(ends) + 1)
    for row, want, end in zip(tokens, free, ends, strict=True):
        np.testing.assert_array_equal(row[:end], want[:end])
        assert np.all(row[end:] == ENDED)


def test_prompts_of_many_lengths_share_a_program():
    counts = [generation._begin._cache_size(), generation._advance._cache_size()]
    model = make_model(mlp_size=40)
    lengths = [(2, 5), (9, 3)]
    samplings = [Sampling(0.5, 3), Sampling(0, 10**12), Sampling(1e39, 1)]
    for (count, length), sampling in itertools.product(lengths, samplings):
        prompt = np.array(make_tokens((1, count)))
        stream(prompt, model=model, length=length, sampling=sampling)
    assert generation._begin._cache_size() == counts[0] + 1
    assert generation._advance._cache_size() == counts[1] + 1


@pytest.mark.parametrize(("length", "positions"), [(0, None), (0, 5), (6, 5)])
def test_a_prompt_that_cannot_be_read_is_an_error(length, positions):
    prompt = np.zeros((1, length), np.int32)
    with pytest.raises(ValueError, match=f"a prompt of {length} tokens"):
        stream(prompt, length=3, positions=positions)


def test_all_tokens_are_of_the_vocabulary():
    tokens = stream(np.array(make_tokens((2, 3))), length=30, sampling=Sampling(1e4))
    assert len(np.unique(tokens)) > 20
    assert np.all((tokens >= 0) & (tokens < CONFIG.vocabulary_size))
