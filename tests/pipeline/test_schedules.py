"""Programs do what torch's schedules do, and simulated they take as long as is known of the schedules."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from torch.distributed.pipelining import schedules

from nnscaler import UserError
from nnscaler.pipeline.simulate import StageSeconds, simulate
from nnscaler.schedules import (
    KINDS,
    Compute,
    Post,
    Schedule,
    Transfer,
    Wait,
    actions,
    in_flight,
    torch_schedule,
    waiting,
)

ALL = [
    Schedule(kind, ranks, ranks * per_rank, micro_batches)
    for kind, ranks, micro_batches in product(KINDS, (2, 3, 4), (8, 12, 16))
    for per_rank in KINDS[kind].stages_per_rank
    if not (kind == "interleaved" and micro_batches % (micro_batches // ranks))
]


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_every_micro_batch_goes_forward_and_backward_once_in_every_stage(schedule):
    found = actions(schedule)
    for rank, program in enumerate(found):
        work = [step for step in program if isinstance(step, Compute)]
        assert len(set(work)) == len(work)
        for stage, micro_batch in product(schedule.stages_of(rank), range(schedule.micro_batches)):
            kinds = [step.kind for step in work if (step.stage, step.micro_batch) == (stage, micro_batch)]
            assert kinds in (["F", "B"], ["F", "I", "W"])
        posted = [transfer for step in program if isinstance(step, Post) for transfer in step.transfers]
        waited = {transfer for step in program if isinstance(step, Wait) for transfer in step.transfers}
        assert len(set(posted)) == len(posted)
        assert waited == set(posted), "what is posted is waited for"
        for step, after in pairwise(program if schedule.kind != "1f1b" else ()):
            if isinstance(step, Wait):
                (moved,) = step.transfers
                assert (after.stage, after.micro_batch) == (moved.target, moved.micro_batch), "just before use"
                assert after.kind in ("F" if moved.kind == "F" else "BI")
    ends = {transfer for program in found for step in program if isinstance(step, Post) for transfer in step.transfers}
    crossing = sum(schedule.rank_of(s) != schedule.rank_of(s + 1) for s in range(schedule.stages - 1))
    assert len(ends) == 2 * crossing * schedule.micro_batches


def test_1f1b_starts_a_send_with_the_receive_that_follows_and_waits_for_both():
    """The second of three ranks in torch's Schedule1F1B, by hand. `+` begins and `-` waits for transfers: F0.1 are the
    activations of stage 0 for micro-batch 1, and B2.1 their gradient of stage 2."""

    def told(step) -> str:
        if isinstance(step, Compute):
            return f"{step.kind}{step.micro_batch}"
        moved = ",".join(f"{one.kind}{one.stage}.{one.micro_batch}" for one in step.transfers)
        return moved and f"{'+' if isinstance(step, Post) else '-'}{moved}"

    program = """
        +F0.0 -F0.0 F0  +F1.0  +F0.1 -F0.1 F1  -F1.0
        +F1.1,B2.0 -F1.1,B2.0 B0  +B1.0,F0.2 -B1.0,F0.2 F2
        +F1.2,B2.1 -F1.2,B2.1 B1  +B1.1,F0.3 -B1.1,F0.3 F3
        +F1.3,B2.2 -F1.3,B2.2 B2  +B1.2
        +B2.3 -B2.3 B3  -B1.2 +B1.3 -B1.3
    """
    assert " ".join(filter(None, map(told, actions(Schedule("1f1b", 3, 3, 4))[1]))).split() == program.split()


def seconds(schedule: Schedule, transfer: float = 0.0) -> float:
    """Of a step in which a rank's forward takes 1 s, and backward 2 s, half of it for the weights."""
    part = schedule.ranks / schedule.stages
    stages = [StageSeconds(part, 2 * part, part, part)] * schedule.stages
    return simulate(schedule, actions(schedule), stages, [transfer] * (schedule.stages - 1)).seconds


@pytest.mark.parametrize(("ranks", "micro_batches"), product((2, 4, 8), (8, 16, 32)))
def test_bubbles_are_those_of_the_papers(ranks, micro_batches):
    """Narayanan et al. 2021: (p - 1) (F + B) for 1F1B, that by the stages of a rank where they are interleaved; and
    Qi et al. 2023: zero-bubble V hides all but the first stages' way down and up."""
    work = 3.0 * micro_batches
    assert seconds(Schedule("1f1b", ranks, ranks, micro_batches)) == pytest.approx(work + 3 * (ranks - 1))
    for count in (2, 4):
        interleaved = Schedule("interleaved", ranks, count * ranks, micro_batches)
        assert seconds(interleaved) == pytest.approx(work + 3 * (ranks - 1) / count)
    if micro_batches >= 2 * ranks:
        zero_bubble = Schedule("zb-v", ranks, 2 * ranks, micro_batches)
        assert seconds(zero_bubble) == pytest.approx(work + (ranks - 1) / 2)


def test_one_slow_transfer_is_waited_for():
    schedule = Schedule("1f1b", 2, 2, 2)
    # F0 ends at 1 s, is there at 11 s, and its backward ends there at 14 s. Only then does stage 1 take F1, ready since
    # 2 s: it arrives at 24 s, as the gradient of 0 does, and that of 1 after another 3 s and 10 s.
    stages = [StageSeconds(1, 2, 1, 1)] * 2
    spans = simulate(schedule, actions(schedule), stages, [10.0]).spans
    begin = {(span.rank, span.work.kind, span.work.micro_batch): span.start for span in spans}
    assert begin[0, "F", 1] == 1
    assert begin[1, "F", 0] == 11
    assert begin[1, "B", 0] == 12
    assert begin[0, "B", 0] == 24
    assert begin[1, "F", 1] == 24
    assert begin[0, "B", 1] == 37


def test_two_transfers_of_one_direction_go_one_after_the_other():
    """Stage 0 computes both micro-batches at once; stage 1 has posted what it receives from the beginning."""
    schedule = Schedule("1f1b", 2, 2, 2)
    there, back = [Transfer("F", 0, 0), Transfer("F", 0, 1)], Transfer("B", 1, 0)
    sends = [step for i, one in enumerate(there) for step in (Compute("F", 0, i), Post((one,)))]
    receives = [Post((*there, back)), Wait((there[0],)), Compute("F", 1, 0), Wait((there[1],)), Compute("F", 1, 1)]
    found = simulate(schedule, [[Post((back,)), *sends], receives], [StageSeconds(1, 2, 1, 1)] * 2, [10.0])
    # The first is on its way from 1 s to 11 s. The second, ready at 2 s, arrives at 21 s.
    assert [span.start for span in found.spans if span.rank == 1] == [11, 21]
    assert found.seconds == 22


def test_the_slowest_stage_sets_the_pace():
    schedule = Schedule("1f1b", 2, 2, 10)
    fast, slow = StageSeconds(1, 2, 1, 1), StageSeconds(2, 4, 2, 2)
    assert simulate(schedule, actions(schedule), [fast, slow], [0.0]).seconds == pytest.approx(10 * 6 + 1 + 2)


def test_activations_in_flight():
    first, *_, last = actions(Schedule("1f1b", 4, 4, 8))
    assert (in_flight(first, 0), in_flight(last, 3)) == (4, 1)
    zero_bubble = actions(Schedule("zb-v", 4, 8, 8))
    assert [in_flight(zero_bubble[0], stage) for stage in (0, 7)] == [8, 1]
    split = [
        Compute(kind, 1, int(micro_batch)) for kind, micro_batch in ("F0", "I0", "F1", "I1", "W0", "F2", "I2", "W1")
    ]
    assert in_flight(split, 1) == 1, "the gradients of weights, which come last, do not read them"
    assert in_flight(split, 0) == 0
    for program in ("F0 F1 B0 F2 F3", "F0 F1 I0 W0 F2 F3", "F0 F1 I0 F2 F3 W0"):
        own = [Compute(kind, 1, int(micro_batch)) for kind, micro_batch in program.split()]
        assert in_flight(own, 1) == 3, "with each backward one is let go of"


@pytest.mark.parametrize(
    ("program", "moments"),
    [
        ("F0 F1 B0 F2 B1 B2", []),
        ("F0 I0 W0", [(1, 1)]),
        ("F0 F1 F2 I0 W0 I1 I2 W1 W2", [(1, 2), (3, 1)]),  # three wait for I0, which runs; then I2 runs beside W1
        ("F0 F1 I0 I1 F2 F3 F4 W0 W1 B2 I3 W3 I4 W4", [(3, 2)]),
        ("F0 F1 I0 F2 F3 I1 W0 W1 I2 I3 W2 W3", [(3, 2)]),
    ],
)
def test_what_waits_for_the_second_part_of_backward(program, moments):
    own = [Compute(kind, 1, int(micro_batch)) for kind, micro_batch in program.split()]
    assert waiting(own, 1) == moments
    assert waiting(own, 0) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpipe", 2, 2, 4), "pipeline_schedule is 'gpipe'; allowed are 1f1b, interleaved, zb-v, dualpipe-v"),
        (("1f1b", 2, 3, 4), "schedule 1f1b on 2 ranks takes 2 stages; there are 3"),
        (("zb-v", 2, 8, 8), "schedule zb-v on 2 ranks takes 4 stages; there are 8"),
        (("interleaved", 2, 6, 8), "schedule interleaved on 2 ranks takes 4, 8 stages; there are 6"),
        (("1f1b", 4, 4, 3), "grad_accumulation_steps is 3; .* needs at least 4 micro-batches"),
        (
            ("dualpipe-v", 2, 4, 3),
            "grad_accumulation_steps is 3; .* with 4 stages on 2 ranks needs at least 4 micro-batch",
        ),
        (("zb-v", 2, 4, 1), "grad_accumulation_steps is 1; .* with 4 stages on 2 ranks needs at least 2 micro-batch"),
        (("interleaved", 2, 4, 1), "grad_accumulation_steps is 1; .* needs at least 2 micro-batches"),
        (("interleaved", 2, 4, 7), "grad_accumulation_steps is 7; .* needs a multiple of 3"),
    ],
)
def test_what_torch_cannot_run_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        Schedule(*arguments)


@pytest.mark.parametrize(
    ("kind", "stages", "of_ranks"),
    [("1f1b", 3, [[0], [1], [2]]), ("interleaved", 12, [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]),
     ("zb-v", 6, [[0, 5], [1, 4], [2, 3]]), ("dualpipe-v", 6, [[0, 5], [1, 4], [2, 3]])],
)  # fmt: skip
def test_which_stages_a_rank_has(kind, stages, of_ranks):
    schedule = Schedule(kind, 3, stages, 6)
    assert [schedule.stages_of(rank) for rank in range(3)] == of_ranks
    assert all(schedule.rank_of(stage) == rank for rank, own in enumerate(of_ranks) for stage in own)
    assert str(schedule) == f"{kind}, {stages} stages on 3 ranks, 6 micro-batches"


@pytest.mark.parametrize("kind", KINDS)
def test_torch_adds_gradients_up_and_does_not_average_them(kind, monkeypatch):
    """Of one stage it takes the stage, of several a list."""
    given = []
    monkeypatch.setattr(schedules, KINDS[kind].torch_name, lambda *args, **named: given.append((*args, named)))
    loss = sum
    torch_schedule(Schedule(kind, 2, 2 * KINDS[kind].stages_per_rank[0], 8), ("first", "second"), loss)
    stages = "first" if kind == "1f1b" else ["first", "second"]
    assert given == [(stages, 8, {"loss_fn": loss, "scale_grads": False})]


def test_what_crosses_goes_to_the_next_stage_and_its_gradient_back():
    assert (Transfer("F", 3, 0).target, Transfer("B", 3, 0).target) == (4, 2)
