"""What a report says of how near a plan is to the best, and of the search's limit."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from nnscaler.report.certificate import limited, proven, search_lines, search_section, sentences


def values_of(gap: float = 0.25, **others: object) -> dict:
    """A plan of 4 s."""
    return {"predicted": {"step_seconds": 4.0, "gap": gap, "bound_seconds": 4 * (1 - gap)}, **others}


def found_within(*steps: float | None) -> dict:
    """A search that ended at its limit of 40 s."""
    rows = [{"limit_seconds": limit, "step_seconds": step} for limit, step in zip((5.0, 10.0, 20.0, 40.0), steps)]
    return {"limit_seconds": 40.0, "stopped": True, "found_within": rows}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (values_of(), "no plan without a pipeline takes less than 3.00 s, which is 25.00 % less"),
        (values_of(6e-5), "no plan without a pipeline takes less than 4.00 s, which is 0.01 % less"),
        (values_of(4e-5), "no plan without a pipeline takes less"),
        (values_of(1.0), "nothing is proven: time was out"),
        (values_of(0.0, divisions=[]), "no plan without a pipeline that divides the batch like this takes less"),
        (values_of(0.0, stage={}), "no plan of this stage, in its memory, takes less"),
        (
            values_of(pipeline={}),
            "no pipeline of these stages, with this schedule, takes less than 3.00 s, which is 25.00 % less: so long "
            "its busiest rank works",
        ),
    ],
    ids=["gap", "small gap", "none", "nothing", "division", "stage", "pipeline"],
)
def test_it_is_said_how_near_to_the_best_and_among_which_plans(values, said):
    assert proven(values) == said


def test_a_search_that_was_done_says_so():
    values = values_of(0.0, search={"limit_seconds": 2.5, "stopped": False})
    ended = "the search was done within its limit of 2.50 s, so that a looser one buys nothing"
    assert search_lines(values) == [f"no plan without a pipeline takes less; {ended}"]
    assert sentences(values) == f"No plan without a pipeline takes less. T{ended[1:]}."
    assert search_section(values) == []
    assert search_lines(values_of(0.0)) == ["no plan without a pipeline takes less"]


def test_a_search_that_ended_at_its_limit_says_what_looser_limits_bought():
    values = values_of(search=found_within(None, 5.0, 4.001, 4.0))
    assert search_lines(values) == [
        "no plan without a pipeline takes less than 3.00 s, which is 25.00 % less; the search ended at its limit of 40 "
        "s",
        "within 5 s no plan yet, within 10 s 5.00 s, within 20 s 4.00 s, within 40 s 4.00 s",
    ]  # fmt: skip
    assert sentences(values).endswith(" less. The search ended at its limit of 40 s.")
    (section,) = search_section(values)
    rows = [["".join(cell.itertext()) for cell in row] for row in ElementTree.fromstring(section).iter("tr")]
    assert rows == [
        ["search of", "a step", "beside the plan"], ["5 s", "", "no plan yet"], ["10 s", "5.00 s", "25.0 % slower"],
        ["20 s", "4.00 s", "as fast"], ["40 s", "4.00 s", "as fast"],
    ]  # fmt: skip


def test_limits_are_written_as_they_are_given():
    assert [limited(value) for value in (40.0, 2.5, 0.5, 1048576.0)] == ["40 s", "2.50 s", "0.50 s", "1048576 s"]
