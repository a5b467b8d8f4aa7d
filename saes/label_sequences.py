"""What is asked of texts and of images alike where labels are made."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int


@runtime_checkable
class Sequences(Protocol):
    """What texts and images have in common: numbered sequences, a half of them held out."""

    numbers: Int[np.ndarray, " n"]
    """The sequences' numbers, sorted."""
    held_out: Bool[np.ndarray, " n"]
    """Which are for testing."""
    order: Int[np.ndarray, " n"]
    """Their rows, shuffled: the held-out ones first."""
    stride: int
    """Places of a sequence in the numbering of `flat`."""

    def rows(self, sequences: Int[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
        """Rows of sequences by their numbers."""
        ...

    def flat(
        self, rows: Int[np.ndarray, " k"], positions: Int[np.ndarray, " k"]
    ) -> Int[np.ndarray, " k"]:
        """A number for each position of each sequence."""
        ...
