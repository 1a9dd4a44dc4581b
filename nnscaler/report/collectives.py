"""Every collective that a plan runs: how many bytes it moves, how long it takes, and where that figure comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nnscaler.graph import TensorMeta
from nnscaler.placement import Placements, parse_placements
from nnscaler.plan import Key, Plan
from nnscaler.planner.costs import LOCAL, CostModel, narrow
from nnscaler.report.parameters import ParameterGroup
from nnscaler.reshard import reshards

_PHASES = {"reshard": "forward", "reshard backward": "backward", "reshard again": "again"}


@dataclass(frozen=True)
class CollectiveCost:
    """One collective, or a local part of resharding, with its totals of a step.

    what        the tensor; or "gradients" or "weights" of the block
    phase       "forward"; "backward"; "again": a second time in backward; "update": after backward
    move        the layouts, such as "S(1) -> R", where a tensor is resharded
    devices     how many take part
    size        bytes of the larger of a device's input and output, of one run
    calls       how often it runs in a step
    seconds     of all these runs
    hidden      those of the seconds that computation hides
    origin      "measured", "profile" or "roofline" (see `nnscaler.hardware.Timing`)
    """

    block: str
    what: str
    phase: str
    collective: str
    move: str
    devices: int
    size: float
    calls: float
    seconds: float
    hidden: float
    origin: str

    @property
    def local(self) -> bool:
        """Whether no other device takes part."""
        return self.collective in LOCAL


def collective_costs(plan: Plan, costs: CostModel, parameters: list[ParameterGroup]) -> list[CollectiveCost]:
    """Those of activations and gathered weights in the plan's order, then those of gradients and updated weights."""
    moved = [
        one
        for seconds, hidden in ((plan.seconds, _nothing), (plan.beside, lambda key: _hidden(plan, key)))
        for key, value in seconds.items()
        for one in _steps(plan, costs, key, value, hidden(key))
    ]
    return [*moved, *_gradients(plan, costs, parameters), *_weights(costs, parameters, plan)]


def _nothing(key: Key) -> float:
    return 0.0


def _hidden(plan: Plan, key: Key) -> float:
    """The fraction that computation hides of what runs beside it, on the side (forward, backward) of `key`."""
    side = "forward" if key.category == "reshard" else "backward"
    total = sum(v for other, v in plan.beside.items() if (other.category == "reshard") == (side == "forward"))
    return 1 - plan.seconds.get(Key("exchange", "", side), 0.0) / total if total else 0.0


def _steps(plan: Plan, costs: CostModel, key: Key, seconds: float, hidden: float) -> Iterator[CollectiveCost]:
    """The collectives that one entry of the plan's seconds stands for, each with its share of them."""
    phase = _PHASES.get(key.category)
    if phase is None:
        return
    source, target = (_placements(text) for text in key.detail.split(" -> "))
    meta = _meta(plan, key.block, key.name)
    needed = reshards(source, target)
    assert needed is not None, key
    is_backward = phase == "backward"
    if is_backward and key in plan.beside:
        priced = list(costs.each_gradient(meta, source, needed))
    else:
        meta = narrow(meta) if (key.block, key.name, target) in plan.gathered_in_fp8 else meta
        priced = [
            (reshard, reshard.collectives[is_backward], size, time.backward if is_backward else time.forward)
            for reshard, size, time in costs.each_reshard(meta, source, needed)
        ]
    calls = seconds / sum(time for *_, time in priced)
    for reshard, name, size, time in priced:
        if time:
            yield CollectiveCost(
                block=key.block,
                what=key.name,
                phase=phase,
                collective=name,
                move=key.detail,
                devices=plan.mesh.sizes[reshard.axis],
                size=size,
                calls=calls * plan.micro_batches,
                seconds=calls * time * plan.micro_batches,
                hidden=hidden * calls * time * plan.micro_batches,
                origin=costs.collective(name, size, reshard.axis).origin,
            )


def _gradients(plan: Plan, costs: CostModel, parameters: list[ParameterGroup]) -> Iterator[CollectiveCost]:
    """The exchange of each block's gradients among the owners of the same shards, beside backward."""
    hidden = _hidden(plan, Key("exchange"))
    for group in _exchanged(parameters):
        first = group[0]
        seconds = plan.micro_batches * sum(
            plan.beside.get(Key("exchange", one.block, one.tensor), 0.0) for one in group
        )
        yield CollectiveCost(
            block=first.block,
            what="gradients",
            phase="backward",
            collective=costs.sums.collective,
            move="",
            devices=first.owners,
            size=sum(one.count * one.elements for one in group) * costs.sums.itemsize,
            calls=1 if first.exchanged_once else plan.micro_batches,
            seconds=seconds,
            hidden=hidden * seconds,
            origin=costs.among_owners(costs.sums.collective, 1.0, first.layout).origin,
        )


def _weights(costs: CostModel, parameters: list[ParameterGroup], plan: Plan) -> Iterator[CollectiveCost]:
    """The exchange of each block's updated weights among the owners of the same shards, once a step."""
    for group in _exchanged(parameters):
        first = group[0]
        metas = [(one, _meta(plan, one.block, one.tensor)) for one in group]
        yield CollectiveCost(
            block=first.block,
            what="weights",
            phase="update",
            collective="all_gather",
            move="",
            devices=first.owners,
            size=sum(one.count * costs.local_bytes(meta, one.layout) for one, meta in metas),
            calls=1,
            seconds=sum(one.count * costs.weight_exchange(meta, one.layout) for one, meta in metas),
            hidden=0.0,
            origin=costs.among_owners("all_gather", 1.0, first.layout).origin,
        )


def _exchanged(parameters: list[ParameterGroup]) -> list[list[ParameterGroup]]:
    """The parameters whose gradients are exchanged, grouped by block, number of owners, and how often."""
    together: dict[tuple[str, int, bool], list[ParameterGroup]] = {}
    for group in parameters:
        if group.trained and group.owners > 1:
            together.setdefault((group.block, group.owners, group.exchanged_once), []).append(group)
    return list(together.values())


def _meta(plan: Plan, block: str, tensor: str) -> TensorMeta:
    return next(one for one in plan.graph.all_blocks() if one.name == block).tensors[tensor]


def _placements(text: str) -> Placements:
    return parse_placements(text)
