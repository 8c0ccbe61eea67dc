"""Whether a run trains long answers as often as it generates them: a rule that prefers short ones is biased."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

DECILES = 10


def trained_by_length(lengths: Mapping[int, Sequence[int]]) -> list[dict[str, float]]:
    """Share of the generated rollouts that were trained, by decile of their length.

    Args:
        lengths: tokens of a rollout -> (how many that long were generated, how many of these trained), as
            `Queue.lengths` counts them.
    Returns:
        A row per decile with `longest` (tokens), `generated` (rollouts) and `trained` (share of them); deciles that
        hold no rollout, because many are equally long, are left out.

    >>> trained_by_length({3: (1, 1), 8: (1, 0)})
    [{'longest': 3, 'generated': 1, 'trained': 1.0}, {'longest': 8, 'generated': 1, 'trained': 0.0}]
    """
    if not lengths:
        return []
    tokens = np.array(sorted(lengths))
    generated, trained = np.array([lengths[each] for each in tokens.tolist()]).T
    up_to = np.cumsum(generated)
    # The length of the rollout that stands at each tenth of the way, as quantile(method="inverted_cdf") gives it.
    places = np.maximum(1, np.ceil(np.linspace(0, 1, DECILES + 1) * up_to[-1]))
    edges = np.unique(tokens[np.searchsorted(up_to, places)]).tolist()
    bounds = [(-1, edges[0]), *pairwise(edges)]
    rows: list[dict[str, float]] = []
    for low, high in bounds:
        here = (tokens > low) & (tokens <= high)
        many = int(generated[here].sum())
        if many:
            rows.append({"longest": int(high), "generated": many, "trained": int(trained[here].sum()) / many})
    return rows
