"""What a model's Python reads of tensors, is given again in the same places; and what else is known of a run: values of
constants, attributes that it sets, and where it loops."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnscaler import UserError
from nnscaler.trace import loops
from nnscaler.trace.digest import digest
from nnscaler.trace.fake import Attributes
from nnscaler.trace.loops import Loops
from nnscaler.trace.reads import ValueReads

X, OTHER = torch.tensor([[2.5, -1.0, 9.0], [0.0, 4.0, 9.0]]), torch.ones(2, 3)
ROW = torch.tensor([3, 1])

# Each gives something else of OTHER (or of ones) than of X (or of ROW).
WAYS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "item": lambda x, row: x[0, 0].item(), "tolist": lambda x, row: x.tolist(), "bool": lambda x, row: bool(x[1, 0]),
    "int": lambda x, row: int(x[0, 0]), "float": lambda x, row: float(x[0, 1]),
    "complex": lambda x, row: complex(x[1, 1]), "index": lambda x, row: operator.index(row[0]),
    "in": lambda x, row: 4 in x, "nonzero": lambda x, row: x[1, 0].is_nonzero(),
    "torch.nonzero": lambda x, row: torch.is_nonzero(x[1, 0]), "equal": lambda x, row: x.equal(OTHER),
    "torch.equal": lambda x, row: torch.equal(x, OTHER), "allclose": lambda x, row: x.allclose(OTHER),
    "torch.allclose": lambda x, row: torch.allclose(x, OTHER), "if": lambda x, row: "a" if x.sum() > 6 else "b",
    "range": lambda x, row: list(range(row[0])),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_read_a_value_is_recorded_and_given_again(way: str) -> None:
    read, reads = WAYS[way], ValueReads()
    wanted = read(X, ROW)
    assert read(OTHER, torch.ones_like(ROW)) != wanted
    with reads.record("scope"):
        assert read(X, ROW) == wanted
    assert len(reads) == (6 if way == "tolist" else 1)
    assert reads.first.startswith("test_reads.py:")
    with reads.replay("scope"):
        assert read(OTHER, torch.ones_like(ROW)) == wanted


def several(x: Tensor) -> list[float]:
    found = [x[place, place].item() for place in range(2)]
    for one in x[0, :2]:
        found.append(one.item())
    return found


def test_values_are_those_of_the_line_and_of_how_often_it_has_read() -> None:
    reads = ValueReads()
    with reads.record("first"):
        assert several(X) == [2.5, 4.0, 2.5, -1.0]
    with reads.record("second"):
        several(2 * X)
    assert len(reads) == 8
    assert reads.first == f"test_reads.py:{several.__code__.co_firstlineno + 1}", "not of the last read"
    for scope, wanted in (("second", [5.0, 8.0, 5.0, -2.0]), ("first", [2.5, 4.0, 2.5, -1.0])):
        for _ in range(2):  # each time from the beginning
            with reads.replay(scope):
                assert several(OTHER) == wanted


def test_what_was_not_read_is_refused() -> None:
    reads = ValueReads()
    with reads.record("scope"):
        several(X)

    def again(x: Tensor, scope: str = "scope", times: int = 1) -> None:
        with reads.replay(scope):
            for _ in range(times):
                several(x)

    again(OTHER)
    for changed in ((OTHER, "another"), (OTHER, "scope", 2), (OTHER.double(),), (OTHER.unsqueeze(2),)):
        with pytest.raises(
            UserError, match=r"^the model reads a tensor's value at test_reads\.py:\d+ while it is traced"
        ):
            again(*changed)


def test_constants_are_told_apart_by_values_shapes_and_types() -> None:
    base = torch.arange(6.0)
    different = [base, base + 1, base.view(2, 3), base.int(), base.bfloat16(), base.view(torch.int32), base[:5]]
    assert len({digest(one) for one in different}) == len(different)
    assert digest(base.view(2, 3).t().contiguous().t()) == digest(base.view(2, 3)), "whatever their order in memory"
    assert digest(torch.tensor(1.0)) == digest(torch.ones(()))


def test_attributes_that_were_set_are_known_and_restored() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    weight, mean = model[0].weight, model[1].running_mean
    model.seen = [1]
    before = Attributes(model)
    assert before.changed() == []
    model.seen.append(2)
    assert before.changed() == [], "the same list"
    model.seen, model.count = [1], 1
    model[1].running_mean = torch.ones(2)
    model[0].weight = nn.Parameter(torch.ones(2, 2))
    del model[0].training
    model[0].register_buffer("made", torch.ones(1))
    assert before.changed() == ["count", "seen", "0._buffers", "0._parameters", "0.training", "1._buffers"]
    before.restore()
    assert model.seen == [1, 2]
    assert not hasattr(model, "count")
    assert model[0].weight is weight
    assert model[1].running_mean is mean
    assert model[0].training
    assert not hasattr(model[0], "made")


def test_a_loop_is_counted_in_the_module_that_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in those around it, nor in those that it calls; and in each call anew."""
    monkeypatch.setattr(loops, "MOST", 3)

    class Inner(nn.Module):
        def forward(self, lines: list[str]) -> None:
            for line in lines:
                counted.count(line)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, own: list[str], inner: list[str]) -> None:
            for line in own:
                counted.count(line)
                self.inner(inner)

    model = nn.ModuleDict({"a": Outer()})
    counted = Loops(model)
    with counted.watched():
        model["a"](["a:1"] * 3, ["b:1"] * 3)
        said = r"^forward of Inner 'a\.inner' calls torch more than 3 times, 3 of them at b:2: a loop"
        with pytest.raises(UserError, match=said):
            model["a"](["a:1"], ["b:2", "b:1", "b:2", "b:2"])
        with pytest.raises(UserError, match=r"^forward of Outer 'a' calls .* 4 of them at a:1: "):
            model["a"](["a:1"] * 4, [])
        for _ in range(5):
            counted.count("outside")
    assert counted._running == []
    model["a"](["a:1"] * 9, [])
