"""What a call of attention asks beside its query, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Asked:
    """One call's options. Row i of the query stands at key `first + i`, which is its place.

    scale      of query and key's products: the scores
    first      the place of the query's first row
    left       how many keys before its place a row sees; None: all
    right      how many after it; None: all; 0: a causal mask
    softcap    scores s become softcap * tanh(s / softcap), before bias and mask; None: they stay
    sinks      [h]: a score of each head that takes part in the softmax and stands for no value
    slopes     [h]: by how much a score falls with each key that lies between a row's place and the key (ALiBi)
    documents  [b, s] integers: a row sees only keys whose number is that at its place; equal numbers stand together
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
        """Names of what not every kernel does, as `kernels.attention.choice.OPTIONS` has them."""
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
