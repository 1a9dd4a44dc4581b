"""The recompute levels: what each keeps of a call of a block for backward, and how the call runs so.

A level is one entry of LEVELS. The planner asks it what it keeps (see `keeping`), the code generator and the run time
by what its regions and the whole call are wrapped in (see `wrappers`), and reports by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from nnscaler.errors import UserError
from nnscaler.graph import Block
from nnscaler.recompute.keeping import Keeping, keep_all, keep_cut, keep_from, part_again
from nnscaler.recompute.wrappers import keeping_products, recompute
from nnscaler.units import Unit

Wrapper = Callable[..., Any]  # (function, *args) -> function(*args), kept and computed again in some way


@dataclass(frozen=True, eq=False)
class Level:
    """One way to divide what backward needs into what is kept and what is computed again.

    name        as plans, pages and generated code have it
    keeps       (units of a block, block, whether cheap operators are fused) -> what is kept of a call
    region      how a region of computation runs, so that it keeps that; None: as it is
    call        how the whole call runs; None: as it is
    everything  whether backward finds all that it needs, but for what a fusing compiler chooses to make again
    named       nodes that the user wants computed again: they are regions of their own, which keep their inputs alone
    on_host     whether what is kept lies in the host's memory rather than the device's
    in_pieces   whether its regions keep their inputs alone, as those do that are computed in pieces
    """

    name: str
    keeps: Callable[[list[Unit], Block, bool], Keeping]
    region: Wrapper | None = None
    call: Wrapper | None = None
    everything: bool = False
    named: frozenset[str] = frozenset()
    on_host: bool = False
    in_pieces: bool = False

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


def _on_host(level: Level) -> Level:
    return replace(level, name=f"{level.name}, on the host", on_host=True)


ON_DEVICE = (KEEPS_ALL, KEEPS_PRODUCTS, RECOMPUTES_ALL_BUT_ATTENTION, RECOMPUTES_ALL)  # from most kept to least
ON_HOST = tuple(_on_host(level) for level in ON_DEVICE)
LEVELS = (*ON_DEVICE, *ON_HOST)


def rank(level: Level) -> int:
    """A number that is higher the less a level keeps on the device; below all others where nodes are named."""
    return -1 if level.named else LEVELS.index(level)


def recomputes(nodes: Iterable[str]) -> Level:
    """The level that keeps all but what some nodes compute, by their names."""
    named = frozenset(nodes)

    def keeps(units: list[Unit], block: Block, fused: bool) -> Keeping:
        parts = [index for index, unit in enumerate(units) if any(node.name in named for node in unit.nodes)]
        return part_again(parts, units, KEEPS_ALL.keeps(units, block, fused))

    return Level("recomputes named modules", keeps, named=named)


_BY_NAME = {level.name: level for level in (*LEVELS, recomputes(()))}


def level_of(name: str) -> Level:
    """The level of a name in generated code or in a plan.json. Raises UserError where there is none."""
    if name not in _BY_NAME:
        raise UserError(f"recompute level '{name}' is not one of {', '.join(_BY_NAME)}; compile again")
    return _BY_NAME[name]
