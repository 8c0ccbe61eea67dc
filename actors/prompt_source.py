"""What is drawn next: the data in the order of its epochs. Curricula share the interface, core/protocols.py."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from millrace.core.errors import DataError
from millrace.core.types import Prompt


class DatasetOrder:
    """Epoch after epoch, each in a permutation of its own. A pure function of (seed, index): nothing to save.

    Source: sampling without replacement by random keys; the keys are the raw words of PCG64 seeded by (seed, epoch),
    a stream that numpy promises to keep.

    Args:
        prompts: the data, at least one row.
        seed: of the run, at least 0.
        shuffle: False: every epoch is in the data's own order.

    >>> from millrace.core.types import Prompt
    >>> rows = [Prompt(id=str(i), text="", tokens_P=np.array([i], np.int32)) for i in range(4)]
    >>> order = DatasetOrder(rows, seed=0)
    >>> sorted(order.draw(index).id for index in range(4, 8))
    ['0', '1', '2', '3']
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True) -> None:
        if not prompts:
            raise DataError("there is nothing to draw from: the dataset is empty")
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._orders: dict[int, NDArray[np.intp]] = {}  # of the last two epochs asked for

    def draw(self, index: int) -> Prompt:
        """The prompt of draw `index`, from 0. The same index gives the same prompt, whatever was asked before."""
        if index < 0:
            raise ValueError(f"draw {index}: draws are counted from 0")
        epoch, position = divmod(index, len(self._prompts))
        return self._prompts[self._order(epoch)[position] if self._shuffle else position]

    def _order(self, epoch: int) -> NDArray[np.intp]:
        if epoch not in self._orders:
            if len(self._orders) == 2:  # leases ahead of the learner straddle at most one boundary
                del self._orders[next(iter(self._orders))]
            keys = np.random.PCG64([self._seed, epoch]).random_raw(len(self._prompts))
            self._orders[epoch] = np.argsort(keys, kind="stable")
        return self._orders[epoch]
