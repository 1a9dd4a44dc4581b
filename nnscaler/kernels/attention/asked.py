"""What a call of attention asks for, besides query, keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nnscaler.kernels.documents import Documents


@dataclass(frozen=True, eq=False)
class Dropped:
    """Which weights [b, h, l, s] are dropped, as `nnscaler.kernels.random` draws; the others are divided by 1 - p.

    p        the probability that a weight is dropped
    draws    of the micro-batch
    place    in the model
    batches  [b]: numbers of the whole tensor of weights along its first dimension, here
    heads    [h]: the same along its second
    row      by how much the number rises from one row to the next: how many keys there are in the whole
    start    number, in a head, of the first row's weight for the first key
    """

    p: float
    draws: Tensor
    place: Tensor
    batches: Tensor
    heads: Tensor
    row: int
    start: int = 0

    def from_key(self, key: int) -> Dropped:
        """The same, of keys that begin with this one."""
        return replace(self, start=self.start + key)


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
    documents  of the keys: a row sees only keys of the document that is at its place
    dropped    which weights, after the softmax, are dropped; None: none
    """

    scale: float
    first: int = 0
    left: int | None = None
    right: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    documents: Documents | None = None
    dropped: Dropped | None = None

    def options(self, rows: int, keys: int) -> frozenset[str]:
        """The options that this call uses and not every kernel has, by their names in `kernels.attention.choice`."""
        given = {
            "windows": self.left is not None or (self.right or 0) > 0,
            "soft caps": self.softcap is not None,
            "sinks": self.sinks is not None,
            "ALiBi": self.slopes is not None,
            "documents": self.documents is not None,
            "dropout": self.dropped is not None,
            # Kernels count each document's places from its end, which must be that of its rows and of its keys.
            "documents with later keys": self.documents is not None and self.right != 0 and self.first + rows != keys,
        }
        return frozenset(name for name, asked in given.items() if asked)

    def hidden(self, rows: slice, keys: slice, device: torch.device) -> Tensor:
        """Which of some keys some rows do not see: [rows, keys]; [b, rows, keys] with documents."""
        places = torch.arange(self.first + rows.start, self.first + rows.stop, device=device).unsqueeze(1)
        others = torch.arange(keys.start, keys.stop, device=device).unsqueeze(0)
        hidden = torch.zeros((len(places), others.shape[1]), dtype=torch.bool, device=device)
        if self.left is not None:
            hidden = hidden | (others < places - self.left)
        if self.right is not None:
            hidden = hidden | (others > places + self.right)
        if self.documents is not None:
            numbers = self.documents.numbers
            own = numbers[:, self.first :][:, rows]
            hidden = hidden | (own.unsqueeze(2) != numbers[:, keys].unsqueeze(1))
        return hidden
