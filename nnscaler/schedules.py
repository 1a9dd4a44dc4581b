"""Pipeline schedules of `torch.distributed.pipelining`, as lists of what each rank does in order.

`torch_schedule` makes torch's own object, which runs a step. `actions` reads from the same object what every rank will
do; for this, the object is made for stages that do not exist. So nothing about a schedule is stated twice. The one
exception is when torch's two run times start sends and receives and wait for them, because torch says this only in its
code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from nnscaler.errors import UserError


@dataclass(frozen=True)
class ScheduleKind:
    """A kind of schedule.

    torch_name       its class in `torch.distributed.pipelining`
    stages_per_rank  how many stages a rank may have
    v_shaped         rank r of p has stages r and 2 p - 1 - r, rather than r, p + r, 2 p + r, ...
    splits           whether it runs backward of some micro-batches in two parts
    """

    torch_name: str
    stages_per_rank: tuple[int, ...]
    v_shaped: bool = False
    splits: bool = False


KINDS = {
    "1f1b": ScheduleKind("Schedule1F1B", (1,)),
    "interleaved": ScheduleKind("ScheduleInterleaved1F1B", (2, 4)),
    "zb-v": ScheduleKind("ScheduleZBVZeroBubble", (2,), v_shaped=True, splits=True),
    "dualpipe-v": ScheduleKind("ScheduleDualPipeV", (2,), v_shaped=True, splits=True),
}


UNEVEN = ("1f1b",)  # those whose ranks may have devices in unequal numbers: what crosses goes from rank to rank in turn


@dataclass(frozen=True)
class Schedule:
    """The schedule of a step with `micro_batches`, for `stages` stages on `ranks` pipeline ranks.

    kind  a key of KINDS
    Raises UserError for a combination that torch cannot run.
    """

    kind: str
    ranks: int
    stages: int
    micro_batches: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"pipeline_schedule is '{self.kind}'; allowed are {', '.join(KINDS)}")
        allowed = KINDS[self.kind].stages_per_rank
        if self.stages % self.ranks or self.stages // self.ranks not in allowed:
            counts = ", ".join(str(count * self.ranks) for count in allowed)
            raise UserError(
                f"pipeline schedule {self.kind} on {self.ranks} ranks takes {counts} stages; there are {self.stages}"
            )
        least = self.stages if self.kind == "dualpipe-v" else self.ranks
        if self.micro_batches < least:
            raise UserError(
                f"grad_accumulation_steps is {self.micro_batches}; pipeline schedule {self.kind} with {self.stages} "
                f"stages on {self.ranks} ranks needs at least {least} micro-batches"
            )
        rounds = self.micro_batches // self.ranks
        if self.kind == "interleaved" and self.micro_batches % rounds:
            raise UserError(
                f"grad_accumulation_steps is {self.micro_batches}; pipeline schedule interleaved on {self.ranks} ranks "
                f"needs a multiple of {rounds}"
            )

    def __str__(self) -> str:
        return f"{self.kind}, {self.stages} stages on {self.ranks} ranks, {self.micro_batches} micro-batches"

    def rank_of(self, stage: int) -> int:
        """The pipeline rank that has a stage."""
        turn, place = divmod(stage, self.ranks)
        return self.ranks - 1 - place if KINDS[self.kind].v_shaped and turn else place

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a pipeline rank, rising."""
        return [stage for stage in range(self.stages) if self.rank_of(stage) == rank]


@dataclass(frozen=True)
class Compute:
    """A rank computes a micro-batch in a stage.

    kind  "F": forward; "B": backward; "I" and "W": the parts of backward for the stage's input and for its weights
    """

    kind: str
    stage: int
    micro_batch: int


@dataclass(frozen=True)
class Transfer:
    """What crosses between two stages for a micro-batch.

    kind  "F": the activations of `stage`, sent to the next stage; "B": their gradient, sent to the stage before
    """

    kind: str
    stage: int
    micro_batch: int

    @property
    def target(self) -> int:
        """The stage that receives it."""
        return self.stage + 1 if self.kind == "F" else self.stage - 1


@dataclass(frozen=True)
class Post:
    """A rank starts its side of some transfers, and goes on."""

    transfers: tuple[Transfer, ...]


@dataclass(frozen=True)
class Wait:
    """A rank waits until some transfers are done."""

    transfers: tuple[Transfer, ...]


Action = Compute | Post | Wait


def torch_schedule(schedule: Schedule, stages: Sequence[Any], loss: Callable[..., Any]) -> Any:
    """Torch's schedule over this rank's stages.

    stages  `torch.distributed.pipelining.PipelineStage`s of this rank
    loss    called as `loss(output, target)` with what the last stage gives
    Losses, and so gradients, are summed over micro-batches, not averaged.
    """
    import torch.distributed.pipelining.schedules as torch_schedules  # takes more than a second, and few need it

    make = getattr(torch_schedules, KINDS[schedule.kind].torch_name)
    given = stages[0] if schedule.kind == "1f1b" else list(stages)
    return make(given, schedule.micro_batches, loss_fn=loss, scale_grads=False)


@cache
def actions(schedule: Schedule) -> list[list[Action]]:
    """What each pipeline rank does in a step: a list for each rank, in the order in which it acts."""
    if schedule.kind == "1f1b":
        return [list(_one_forward_one_backward(schedule, rank)) for rank in range(schedule.ranks)]
    stages = [
        SimpleNamespace(
            stage_index=stage, num_stages=schedule.stages, group_rank=0, group_size=schedule.ranks, submod=None
        )
        for stage in schedule.stages_of(0)
    ]
    order = torch_schedule(schedule, stages, lambda output, target: output).pipeline_order_with_comms
    return [_as_run(schedule, rank, order[rank]) for rank in range(schedule.ranks)]


def in_flight(own: Sequence[Action], stage: int) -> int:
    """The most micro-batches of a stage for which a rank holds what it kept for backward at a time.

    That is held from the forward of a micro-batch to the end of its backward, or of the part for the stage's input.
    `own`: the actions of the stage's rank
    """
    return max((held for held, _ in _holding(own, stage)), default=0)


def waiting(own: Sequence[Action], stage: int) -> list[tuple[int, int]]:
    """(for how many micro-batches of a stage a rank holds what it kept for backward; and for how many, what the second
    part of backward needs), at moments when it holds most: at no other one it holds more of both.

    The latter is held from the begin of a backward's first part to the end of its second. Empty where no backward of
    the stage has two parts. `own`: the actions of the stage's rank
    """
    moments = set(_holding(own, stage))
    if not any(later for _, later in moments):
        return []
    return sorted(a for a in moments if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in moments))


def _holding(own: Sequence[Action], stage: int) -> Iterator[tuple[int, int]]:
    """The two numbers of `waiting`, while each action of a stage runs."""
    kept = later = 0
    for action in own:
        if isinstance(action, Compute) and action.stage == stage:
            kept += action.kind == "F"
            later += action.kind == "I"
            yield kept, later
            kept -= action.kind in "BI"
            later -= action.kind == "W"


def _as_run(schedule: Schedule, rank: int, order: Sequence[Any]) -> list[Action]:
    """The actions of a rank, as torch runs its `order`: it starts transfers where they stand, and waits just before
    use."""
    found: list[Action] = []
    sent: list[Transfer] = []
    for action in (part for whole in order for part in whole.sub_actions or (whole,)):
        kind, stage, micro_batch = action.computation_type.value, action.stage_index, action.microbatch_index
        if kind in ("SEND_F", "SEND_B"):
            sent.append(Transfer(kind[-1], stage, micro_batch))
            found.append(Post((sent[-1],)))
        elif kind in ("RECV_F", "RECV_B"):
            source = stage - 1 if kind == "RECV_F" else stage + 1
            found.append(Post((Transfer(kind[-1], source, micro_batch),)))
        elif kind in ("F", "B", "I", "W"):
            source = stage - 1 if kind == "F" else stage + 1
            if kind != "W" and 0 <= source < schedule.stages and schedule.rank_of(source) != rank:
                found.append(Wait((Transfer("F" if kind == "F" else "B", source, micro_batch),)))
            found.append(Compute(kind, stage, micro_batch))
    found.append(Wait(tuple(sent)))
    return found


def _one_forward_one_backward(schedule: Schedule, rank: int) -> Iterator[Action]:
    """The actions of a rank as torch runs 1F1B.

    In the steady state torch starts a send together with the receive that follows, and waits for both.
    """
    count, last = schedule.micro_batches, schedule.stages - 1

    def transfer(kind: str, source: int, micro_batch: int) -> tuple[Transfer, ...]:
        moved = Transfer(kind, source, micro_batch)
        return (moved,) if 0 <= source <= last and 0 <= moved.target <= last else ()

    def exchange(*transfers: tuple[Transfer, ...]) -> Iterator[Post | Wait]:
        together = sum(transfers, ())
        yield Post(together)
        yield Wait(together)

    warmup = schedule.stages - rank
    sending: tuple[Transfer, ...] = ()
    for micro_batch in range(warmup):
        yield from exchange(transfer("F", rank - 1, micro_batch))
        yield Compute("F", rank, micro_batch)
        yield Wait(sending)
        sending = transfer("F", rank, micro_batch)
        if micro_batch < warmup - 1:
            yield Post(sending)
    for micro_batch in range(count):
        forward = warmup + micro_batch
        if forward <= count:
            yield from exchange(sending, transfer("B", rank + 1, micro_batch))
        else:
            yield from exchange(transfer("B", rank + 1, micro_batch))
        yield Compute("B", rank, micro_batch)
        if forward > count:
            yield Wait(sending)
        sending = transfer("B", rank, micro_batch)
        if forward < count:
            yield from exchange(sending, transfer("F", rank - 1, forward))
            yield Compute("F", rank, forward)
            sending = transfer("F", rank, forward)
        else:
            yield Post(sending)
    yield Wait(sending)
