"""What follows from the documents in the rows of a micro-batch: worked out once, for all layers and for backward.

Each call of attention gets the numbers of documents as a tensor on the device. Its kernel needs their borders, and on
the host the length of the longest. To ask the device for them in every call would make the host wait for all that has
been launched before. So what is worked out is kept beside the tensor's memory, for as long as that lives: another layer
finds it there, and so do those that get a part of the tensor, and backward, which computes a layer again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Result = TypeVar("Result")
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class _Memory:
    """What is known of a tensor's memory, and of its views.

    version  of what is written there
    on_host  all of it; None: the device has not been asked yet
    results  (which view, what) -> the result. None of them may hold the memory itself, which then would never be freed
    """

    version: int
    on_host: Tensor | None = None
    results: dict[Hashable, Any] = field(default_factory=dict)


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # storage of a tensor -> _Memory


class Documents:
    """The documents in some rows.

    numbers  [b, s] integers: the document of each token; equal numbers are neighbours
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self._view = (numbers.storage_offset(), tuple(numbers.shape), numbers.stride())
        storage, version = numbers.untyped_storage(), 0 if numbers.is_inference() else numbers._version
        if storage not in _known or _known[storage].version != version:
            _known[storage] = _Memory(version)
        self._memory: _Memory = _known[storage]

    @staticmethod
    def of(numbers: Tensor | None) -> Documents | None:
        return None if numbers is None else Documents(numbers)

    def note(self, on_host: Tensor) -> None:
        """Tells what the numbers are, so that the device is never asked. `on_host`: what was copied to the device."""
        if not self.numbers.is_cpu:
            self._memory.on_host = _whole(on_host)

    def part(self, sequences: slice, places: slice) -> Documents:
        """Those of some sequences, at some places."""
        return Documents(self.numbers[sequences, places])

    @property
    def on_host(self) -> Ints:
        """The numbers, on the host. The first call waits for the device, unless they have been noted."""
        if self.numbers.is_cpu:
            return self.numbers.numpy()
        if self._memory.on_host is None:
            self._memory.on_host = _whole(self.numbers).cpu()
        offset, shape, stride = self._view
        return self._memory.on_host.as_strided(shape, stride, offset).numpy()

    @property
    def are_rows(self) -> bool:
        """Whether each row is known to be one document: while a model is traced, there are no numbers."""
        if self.numbers.untyped_storage().device.type == "meta":
            return False
        return self.once("are rows", lambda: bool((self.on_host == self.on_host[:, :1]).all()))

    def once(self, what: Hashable, make: Callable[[], Result]) -> Result:
        """`make()`, or what it gave when it was called for the same documents and the same `what`."""
        key = (self._view, what)
        if key not in self._memory.results:
            self._memory.results[key] = make()
        return cast(Result, self._memory.results[key])

    def borders(self, first: int, rows: int) -> tuple[Tensor, Tensor, int]:
        """The borders of documents, when all rows of a batch lie one after the other.

        first, rows  the query's rows: from this place among the keys, so many

        Returns (borders among the query's rows, borders among the keys, tokens of the longest document). Borders are
        int32 on the device, and include the end. A document that has none of the query's rows has an empty range among
        them.
        """
        return self.once(("borders", first, rows), lambda: self._borders(first, rows))

    def _borders(self, first: int, rows: int) -> tuple[Tensor, Tensor, int]:
        batch, keys = self.numbers.shape
        begins = np.diff(self.on_host, prepend=self.on_host[:, :1] - 1) != 0
        on_host = np.append(begins.ravel().nonzero(), batch * keys)
        # Worked out on the device again: a copy to it would wait for all that an update brings from the host.
        starts = torch.ones_like(self.numbers, dtype=torch.bool)
        torch.ne(self.numbers[:, 1:], self.numbers[:, :-1], out=starts[:, 1:])
        counted = torch.arange(1, len(on_host) + 1, device=starts.device)
        of_keys = torch.searchsorted(starts.flatten().cumsum(0), counted)  # one more than there are: the end
        of_rows = of_keys // keys * rows + (of_keys % keys - first).clamp(0, rows)
        return of_rows.int(), of_keys.int(), int(np.diff(on_host).max())


def note_copy(copy: Tensor, *sources: Tensor) -> Tensor:
    """`copy`, after it is noted what the host knows of it: what it knows of its sources, which the copy has one after
    the other in its memory. Where it does not know all of them, nothing is."""
    found = [_noted(source) for source in sources]
    known = [one for one in found if one is not None]
    if len(known) == len(found):
        Documents(copy).note(torch.cat([one.flatten() for one in known]).view(copy.shape))
    return copy


def _noted(numbers: Tensor) -> Tensor | None:
    """What has been noted of a tensor."""
    if numbers.untyped_storage() not in _known:
        return None
    documents = Documents(numbers)
    return None if documents._memory.on_host is None else torch.from_numpy(documents.on_host)


def _whole(tensor: Tensor) -> Tensor:
    """All memory that a tensor is a view of."""
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
