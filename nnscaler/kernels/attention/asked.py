"""What a call of attention asks for, besides query, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Asked:
    """The options of one call. Row i of the query has place `first + i` in the sequence of keys.

    scale      factor for the products of query and key, the scores
    first      the place of the query's first row
    left       how many keys before its place a row sees; None: all
    right      how many keys after its place it sees; None: all; 0: a causal mask
    softcap    scores s become softcap * tanh(s / softcap), before bias and mask; None: they stay
    sinks      [h]: for each head, a score that takes part in the softmax but has no value
    slopes     [h]: for each head, by how much a score falls with each place between a row and the key (ALiBi)
    documents  [b, s] integers: a row sees only keys with the same number as at its place; equal numbers are neighbours
    """

    scale: float
    first: int = 0
    left: int | None = None
    right: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    documents: Tensor | None = None

    def options(self, rows: int, keys: int) -> frozenset[str]:
        """The options that this call uses and not every kernel has, by their names in `kernels.attention.choice`."""
        given = {
            "windows": self.left is not None or (self.right or 0) > 0,
            "soft caps": self.softcap is not None,
            "sinks": self.sinks is not None,
            "ALiBi": self.slopes is not None,
            "documents": self.documents is not None,
            # Kernels count each document's places from its end, which must be that of its rows and of its keys.
            "documents with later keys": self.documents is not None and self.right != 0 and self.first + rows != keys,
        }
        return frozenset(name for name, asked in given.items() if asked)
