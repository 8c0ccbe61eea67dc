"""Which tokens belong together: S sequences lie end to end in one array of N tokens."""

from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Array = TypeVar("Array", NDArray[np.float32], torch.Tensor)


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Lengths of S sequences, and what follows from them. All of it works on numpy arrays and torch tensors.

    Args:
        lengths_S: tokens of each sequence; 0 for one that has none in the loss.

    >>> sequences = Sequences([2, 0, 1])
    >>> sequences.total, len(sequences)
    (3, 3)
    >>> sequences.mean(torch.tensor([1.0, 3.0, 5.0]))
    tensor([2., 0., 5.])
    >>> sequences.spread(np.array([7, 8, 9]))
    array([7, 7, 9])
    """

    lengths_S: NDArray[np.int64]
    _index_N: NDArray[np.int64] = field(init=False, repr=False)
    _on_device: dict[torch.device, torch.Tensor] = field(init=False, repr=False)

    def __init__(self, lengths_S: ArrayLike | torch.Tensor) -> None:
        if isinstance(lengths_S, torch.Tensor):
            lengths_S = lengths_S.cpu().numpy()
        lengths = np.asarray(lengths_S, np.int64)
        if lengths.ndim != 1 or (lengths < 0).any():
            raise ValueError(f"lengths_S is one count of tokens per sequence, got {lengths!r}")
        object.__setattr__(self, "lengths_S", lengths)
        object.__setattr__(self, "_index_N", np.repeat(np.arange(len(lengths)), lengths))
        object.__setattr__(self, "_on_device", {})

    def __len__(self) -> int:
        return len(self.lengths_S)

    def __getitem__(self, part: slice) -> "Sequences":
        """Some of the sequences, as `sequences[2:5]`; their tokens are those of `sequences.tokens(slice(2, 5))`."""
        self._contiguous(part)
        return Sequences(self.lengths_S[part])

    def tokens(self, part: slice) -> slice:
        """Where the tokens of some sequences lie among the N.

        >>> Sequences([2, 0, 1, 4]).tokens(slice(1, 3))
        slice(2, 3, None)
        """
        start, stop = self._contiguous(part)
        ends = np.concatenate([[0], np.cumsum(self.lengths_S)])
        return slice(int(ends[start]), int(ends[stop]))

    @property
    def total(self) -> int:
        """N."""
        return len(self._index_N)

    def sum(self, x_N: Array) -> Array:
        """The sum of each sequence's tokens, [S]; 0 for one without tokens."""
        self._check(x_N, self.total, "N")
        if isinstance(x_N, torch.Tensor):
            return x_N.new_zeros(len(self)).index_add(0, self._index(x_N.device), x_N)
        return np.bincount(self._index_N, weights=x_N, minlength=len(self)).astype(x_N.dtype)

    def mean(self, x_N: Array) -> Array:
        """The mean over each sequence's tokens, [S]; 0 for one without tokens."""
        total_S = self.sum(x_N)
        lengths_S = np.maximum(self.lengths_S, 1)
        if isinstance(total_S, torch.Tensor):
            return total_S / torch.as_tensor(lengths_S, device=total_S.device).to(total_S.dtype)
        return np.asarray(total_S / lengths_S, total_S.dtype)

    def spread(self, x_S: Array) -> Array:
        """Each sequence's value on each of its tokens, [N]."""
        self._check(x_S, len(self), "S")
        if isinstance(x_S, torch.Tensor):
            return x_S[self._index(x_S.device)]
        return x_S[self._index_N]

    def _index(self, device: torch.device) -> torch.Tensor:
        if device not in self._on_device:
            self._on_device[device] = torch.as_tensor(self._index_N, device=device)
        return self._on_device[device]

    def _contiguous(self, part: slice) -> tuple[int, int]:
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"sequences are cut in runs, got step {step}")
        return start, max(start, stop)

    @staticmethod
    def _check(x: NDArray[np.float32] | torch.Tensor, size: int, letter: str) -> None:
        if tuple(x.shape) != (size,):
            raise ValueError(f"expected shape [{letter}] = [{size}], got {list(x.shape)}")
