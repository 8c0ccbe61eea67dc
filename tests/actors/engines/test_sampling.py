"""Noise by (seed, position): reproducible, and as random as it must be."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from millrace.actors.engines.sampling import log_softmax, noise, sample, streams, uniform


@given(st.integers(0, 2**31 - 1), st.integers(0, 2**20), st.integers(0, 5))
def test_a_row_does_not_depend_on_its_neighbours(seed: int, position: int, others: int) -> None:
    alone = uniform(streams([seed]), np.array([position]))
    crowd = uniform(streams([*range(others), seed]), np.array([*range(others), position]))
    assert alone[0] == crowd[-1]


def test_neighbouring_seeds_and_positions_are_unrelated() -> None:
    u = np.stack([uniform(streams(np.full(512, seed)), np.arange(512)) for seed in range(512)])
    assert abs(u.mean() - 0.5) < 0.002
    assert abs(u.var() - 1 / 12) < 0.001
    for shifted in (u[1:] * u[:-1], u[:, 1:] * u[:, :-1], u[1:, :-1] * u[:-1, 1:]):
        assert abs(shifted.mean() - 0.25) < 0.002  # uncorrelated along seeds, positions and the diagonal


def test_seed_plus_one_is_not_position_plus_one() -> None:
    bits = {(s, p): int(noise(streams([s]), np.array([p]))[0]) for s in range(40) for p in range(40)}
    assert len(set(bits.values())) == len(bits)


def test_inversion_hits_every_token_in_proportion() -> None:
    probability = np.array([0.0, 0.1, 0.2, 0.0, 0.7, 0.0])
    with np.errstate(divide="ignore"):
        logits = np.log(probability)
    u = (np.arange(1000) + 0.5) / 1000
    tokens, logprobs = sample(np.tile(logits, (1000, 1)), u, 1.0)
    np.testing.assert_array_equal(np.bincount(tokens, minlength=6), 1000 * probability)
    np.testing.assert_allclose(logprobs, np.log(probability[tokens]))


def test_the_ends_of_the_unit_interval_give_possible_tokens() -> None:
    logits = np.tile(np.array([-np.inf, 0.3, -2.0, -np.inf]), (2, 1))
    tokens, _ = sample(logits, np.array([0.0, 1 - 2.0**-52]), 1.0)
    assert tokens.tolist() == [1, 2]


def test_temperature_divides_the_logits() -> None:
    logits = np.array([[1.0, 2.0, -1.0]])
    _, logprob = sample(logits, np.array([0.0]), 0.5)
    np.testing.assert_allclose(logprob, log_softmax(logits / 0.5)[:, 0])


def test_greedy_reports_the_distribution_at_temperature_one() -> None:
    logits = np.array([[1.0, 2.0, -1.0]])
    tokens, logprob = sample(logits, np.array([0.0]), 0.0)
    assert tokens.tolist() == [1]
    np.testing.assert_allclose(logprob, log_softmax(logits)[:, 1])
