"""The recompute levels: how much of a call of a block is kept for backward, and how the call runs so that this happens.

Each level is one entry of LEVELS. Of a call, they keep on the device:

keeps all                      nothing is computed again
keeps products                 the results of matrix products and of registered operators such as attention
recomputes all but attention   the block's inputs, and what registered operators need
recomputes all                 the block's inputs
recomputes groups of 2, ...    of two calls, one after the other, the inputs of the first. Backward computes both again.
                               Then each keeps what the level says that is named after it.
recomputes groups of 4, ...    likewise of four

For each there is another one that keeps the same on the host.

The planner asks a level what it keeps (see `nnscaler.recompute.keeping`). Generated code and the run time ask it what
wraps a region, or the whole call (see `nnscaler.recompute.wrappers`). Reports ask its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from nnscaler.errors import UserError
from nnscaler.graph import Block
from nnscaler.recompute.keeping import Keeping, keep_all, keep_cut, keep_from, keep_group, part_again
from nnscaler.recompute.wrappers import keeping_products, recompute
from nnscaler.units import Unit

Wrapper = Callable[..., Any]  # wrapper(function, *args) gives function(*args), and decides what is kept for backward


@dataclass(frozen=True, eq=False)
class Level:
    """One way to divide what backward needs into what is kept and what is computed again.

    name        what plans, reports and generated code call it
    keeps       function of (units of a block, the block, whether cheap operators are fused): what is kept of a call
    region      what runs a region of a call so that just this is kept, called as `region(function, *args)`; None: the
                region runs as it is
    call        the same for the whole call
    everything  whether all that backward needs is kept, except what a fusing compiler chooses to make again
    named       names of the nodes that the user asked to recompute. They become regions of their own, which keep
                only their inputs.
    on_host     whether what is kept lies in the host's memory rather than in the device's
    in_pieces   whether regions keep only their inputs, as a region must that is computed in pieces
    size        how many calls, one after the other, are wrapped by `call` together
    inner       of a group of calls: the level of each of them while backward computes the group again
    """

    name: str
    keeps: Callable[[list[Unit], Block, bool], Keeping]
    region: Wrapper | None = None
    call: Wrapper | None = None
    everything: bool = False
    named: frozenset[str] = frozenset()
    on_host: bool = False
    in_pieces: bool = False
    size: int = 1
    inner: Level | None = None

    @property
    def of_each(self) -> Level:
        """The level of a call by itself: for one of a group, that which it has inside."""
        return self.inner or self

    @property
    def by_region(self) -> bool:
        """Whether backward computes each region of a call again by itself."""
        each = self.of_each
        return not (each.everything or each.call or each.named)

    @property
    def as_a_whole(self) -> bool:
        """Whether backward computes a call again as a whole, or partly as nobody here knows."""
        return not (self.everything or self.by_region)

    def __repr__(self) -> str:
        return self.name


def _everything(units: list[Unit], block: Block, fused: bool) -> Keeping:
    return keep_cut(units, block, ("registered", "product")) if fused else keep_all(units, block)


KEEPS_ALL = Level("keeps all", _everything, everything=True)
KEEPS_PRODUCTS = Level(
    "keeps products", lambda units, block, fused: keep_cut(units, block, ("registered",)), keeping_products
)
RECOMPUTES_ALL_BUT_ATTENTION = Level(
    "recomputes all but attention",
    lambda units, block, fused: keep_from(units, block, ("registered",)),
    recompute,
    in_pieces=True,
)
RECOMPUTES_ALL = Level(
    "recomputes all", lambda units, block, fused: keep_from(units, block, ()), call=recompute, in_pieces=True
)


def _groups(size: int, inner: Level) -> Level:
    return Level(
        f"recomputes groups of {size}, inside {inner}",
        lambda units, block, fused: keep_group(units, block, size, inner.keeps(units, block, fused)),
        inner.region,
        recompute,
        in_pieces=inner.in_pieces,
        size=size,
        inner=inner,
    )


def _on_host(level: Level) -> Level:
    return replace(level, name=f"{level.name}, on the host", on_host=True)


ON_DEVICE = (KEEPS_ALL, KEEPS_PRODUCTS, RECOMPUTES_ALL_BUT_ATTENTION, RECOMPUTES_ALL)  # from most kept to least
# Inside groups there is no "keeps products": where regions are not compiled, torch would keep these products even of
# calls that are to be computed again.
IN_GROUPS = tuple(
    _groups(size, inner) for size in (2, 4) for inner in (KEEPS_ALL, RECOMPUTES_ALL_BUT_ATTENTION, RECOMPUTES_ALL)
)
SAME_ON_HOST = {level: _on_host(level) for level in (*ON_DEVICE, *IN_GROUPS)}
ON_HOST = tuple(SAME_ON_HOST[level] for level in ON_DEVICE)
LEVELS = (*SAME_ON_HOST, *SAME_ON_HOST.values())


def rank(level: Level) -> int:
    """A number that is higher the less a level keeps on the device. A level with named nodes has the lowest."""
    return -1 if level.named else LEVELS.index(level)


def recomputes(nodes: Iterable[str]) -> Level:
    """The level that keeps everything except what the nodes of these names compute."""
    named = frozenset(nodes)

    def keeps(units: list[Unit], block: Block, fused: bool) -> Keeping:
        parts = [index for index, unit in enumerate(units) if any(node.name in named for node in unit.nodes)]
        return part_again(parts, units, KEEPS_ALL.keeps(units, block, fused))

    return Level("recomputes named modules", keeps, named=named)


_BY_NAME = {level.name: level for level in (*LEVELS, recomputes(()))}


def level_of(name: str) -> Level:
    """The level of this name, as generated code or a plan.json has it. Raises UserError where there is none."""
    if name not in _BY_NAME:
        raise UserError(f"recompute level '{name}' is not one of {', '.join(_BY_NAME)}; compile again")
    return _BY_NAME[name]
