"""Why no plan fits, said in one line."""

from __future__ import annotations

from collections.abc import Mapping

from nnscaler.errors import UserError
from nnscaler.plan import GIB, Key
from nnscaler.planner.costs import GRADIENTS, STATE

_WORKING = {
    "": "while {} runs",
    "backward": "one {} computed again",
    "workspaces": "workspaces of libraries",
}


WEIGHTS = ("parameter", "state", "gradients")  # categories of bytes that are as many however short sequences are


class NothingFits(UserError):  # noqa: N818
    """No plan fits into a device's memory.

    needed         bytes a device of the plan that needs least; None: not known
    at_any_length  whether it is known that weights, and what belongs to them, take more than there is
    """

    needed: float | None = None
    at_any_length = False


class NotFaster(Exception):  # noqa: N818
    """No plan is as fast as was asked for.

    bound  seconds of a step; no plan on the meshes that were tried takes less, or time was out before one was found
    """

    def __init__(self, bound: float) -> None:
        self.bound = bound


class DoesNotFit(NothingFits):
    """No plan without a pipeline fits. The message says what the memory is needed for.

    memory   of the plan that needs least: bytes a device, by what they are for
    peak     the operator that holds most while it runs
    limit    bytes a device that may be used
    weights  bytes of that memory that are for weights, and what belongs to them
    """

    def __init__(self, memory: Mapping[Key, float], peak: str, limit: float) -> None:
        self.needed = sum(memory.values())
        self.weights = sum(size for key, size in memory.items() if key.category in WEIGHTS)
        memory = on_the_device(memory)
        largest = sorted(memory.items(), key=lambda item: -item[1])[:3]
        super().__init__(
            f"no plan fits: needs {_gib(self.needed)} a device, constraint {_gib(limit)}: "
            + ", ".join(f"{what} {_gib(size)}" for what, size in by_category(memory, peak).items())
            + "; the largest items are "
            + ", ".join(f"{_describe(key, peak)} {_gib(size)}" for key, size in largest)
        )


def on_the_device(memory: Mapping[Key, float]) -> dict[Key, float]:
    """The bytes of a plan without the optimizer's state and the gradients that lie on the host, each of which the plan
    subtracts as a whole."""
    here = dict(memory)
    for category, details in (("state", STATE), (GRADIENTS, (GRADIENTS,))):
        moved = -sum(size for key, size in memory.items() if key.category == category)
        whole = sum(size for key, size in memory.items() if key.detail in details and key.category == "parameter")
        for key, size in memory.items():
            if key.category == category:
                del here[key]
            elif key.category == "parameter" and key.detail in details:
                here[key] = size * (1 - moved / whole)
    return here


def by_category(memory: Mapping[Key, float], peak: str) -> dict[str, float]:
    """What the bytes of a plan are for, in words, largest first; without what is less than a thousandth of them."""
    totals: dict[str, float] = {}
    for key, size in memory.items():
        what = {
            "parameter": "weights" if key.detail == "parameters" else key.detail,
            "saved": "kept for backward",
            "inside": "kept for backward",
            "working": _WORKING.get(key.name, "").format(key.block or peak),
            "buffers": "buffers of communication",
        }[key.category]
        totals[what] = totals.get(what, 0.0) + size
    whole = sum(totals.values())
    return {what: size for what, size in sorted(totals.items(), key=lambda item: -item[1]) if size > whole / 1000}


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size > GIB / 10 else f"{size / GIB:.2g} GiB"


def _describe(key: Key, peak: str) -> str:
    of = f"{key.block}{f'.{key.name}' if key.name else ''}"
    return {
        "parameter": f"{key.detail} of {of}",
        "saved": f"activation {of}" if of else f"activations {key.detail}",
        "inside": f"activations inside {of}",
        "working": f"working memory of {of or peak}",
        "buffers": "buffers of communication",
    }[key.category]
