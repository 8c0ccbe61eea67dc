"""The share of trained rollouts by length, by hand."""

import numpy as np

from millrace.cluster.lengths import DECILES, trained_by_length


def test_long_rollouts_that_were_never_trained_show_in_the_last_decile():
    rows = trained_by_length({tokens: (1, int(tokens <= 18)) for tokens in range(1, 21)})
    assert sum(row["generated"] for row in rows) == 20
    assert [row["trained"] for row in rows[:-1]] == [1.0] * (len(rows) - 1)
    assert rows[-1] == {"longest": 20, "generated": 2, "trained": 0.0}


def test_equal_lengths_are_one_row():
    assert trained_by_length({5: (8, 2)}) == [{"longest": 5, "generated": 8, "trained": 0.25}]


def test_the_deciles_are_those_of_the_rollouts_one_by_one():
    random = np.random.default_rng(0)
    for _ in range(200):
        lengths = random.integers(0, random.integers(1, 60), size=random.integers(1, 80))
        edges = np.unique(np.quantile(lengths, np.linspace(0, 1, DECILES + 1), method="inverted_cdf"))
        counts = {int(tokens): (int((lengths == tokens).sum()), 0) for tokens in set(lengths)}
        rows = trained_by_length(counts)
        assert [row["longest"] for row in rows] == [int(edge) for edge in edges]
        assert sum(row["generated"] for row in rows) == len(lengths)


def test_nothing_generated_is_no_row():
    assert trained_by_length({}) == []
