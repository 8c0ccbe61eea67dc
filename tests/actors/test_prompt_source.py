"""The order in which data are drawn."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.actors.prompt_source import DatasetOrder
from millrace.core.errors import DataError
from millrace.core.types import Prompt

SIZES, SEEDS, EPOCHS = st.integers(1, 40), st.integers(0, 2**63), st.integers(0, 10**6)


def prompts(count: int) -> Sequence[Prompt]:
    return [Prompt(id=str(n), text="", tokens_P=np.array([n], np.int32)) for n in range(count)]


def drawn(order: DatasetOrder, indices: Sequence[int]) -> list[str]:
    return [order.draw(index).id for index in indices]


@given(size=SIZES, seed=SEEDS, epoch=EPOCHS)
def test_each_epoch_draws_every_prompt_once(size: int, seed: int, epoch: int) -> None:
    order = DatasetOrder(prompts(size), seed=seed)
    assert sorted(drawn(order, range(epoch * size, (epoch + 1) * size)), key=int) == [str(n) for n in range(size)]


@given(size=SIZES, seed=SEEDS, indices=st.lists(st.integers(0, 400), max_size=60))
def test_a_draw_depends_on_seed_and_index_alone(size: int, seed: int, indices: list[int]) -> None:
    """A queue that restarts, or that asks out of turn, gets what it would have got."""
    data = prompts(size)
    in_turn = drawn(DatasetOrder(data, seed=seed), range(401))
    assert drawn(DatasetOrder(data, seed=seed), indices) == [in_turn[index] for index in indices]


def test_epochs_and_seeds_differ_in_their_order() -> None:
    data = prompts(100)
    orders = {
        tuple(drawn(DatasetOrder(data, seed=seed), range(epoch * 100, epoch * 100 + 100)))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_every_prompt_is_as_likely_at_every_position() -> None:
    """Over 4,000 epochs of 5: mean 800 per cell, standard deviation 25; 7 of them leave no room for chance."""
    counts = np.zeros((5, 5), int)
    order = DatasetOrder(prompts(5), seed=3)
    for index in range(20_000):
        counts[index % 5, int(order.draw(index).id)] += 1
    assert np.abs(counts - 800).max() < 7 * 25


def test_the_order_is_the_same_in_every_release() -> None:
    first, second = "63402751", "13274506"
    assert drawn(DatasetOrder(prompts(8), seed=7), range(16)) == [*first, *second]


@given(size=SIZES, index=st.integers(0, 400))
def test_without_shuffling_the_data_keep_their_order(size: int, index: int) -> None:
    assert DatasetOrder(prompts(size), seed=0, shuffle=False).draw(index).id == str(index % size)


def test_nothing_to_draw_from_is_refused() -> None:
    with pytest.raises(DataError, match="there is nothing to draw from: the dataset is empty"):
        DatasetOrder([], seed=0)


def test_draws_before_the_first_are_refused() -> None:
    with pytest.raises(ValueError, match="draw -1: draws are counted from 0"):
        DatasetOrder(prompts(2), seed=0).draw(-1)
