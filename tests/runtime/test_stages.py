"""What a rank of a pipeline makes of its stages, where it has several, and who shares what; without other ranks."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import PipelineStage

from nnscaler.mesh import Mesh, PipelineMesh
from nnscaler.placement import REPLICATE
from nnscaler.runtime import pipeline, shared
from nnscaler.runtime.pipeline import PipelineModule, load_module
from nnscaler.runtime.shared import group_across
from nnscaler.schedules import KINDS, Schedule
from nnscaler.shards import Box, ParameterSpec


@pytest.mark.parametrize(
    ("kind", "ranks", "stages", "ranks_of_stages"),
    [
        ("1f1b", 3, 3, [0, 1, 2]),
        ("interleaved", 3, 6, [0, 1, 2, 0, 1, 2]),
        ("interleaved", 2, 8, [0, 1, 0, 1, 0, 1, 0, 1]),
        ("zb-v", 3, 6, [0, 1, 2, 2, 1, 0]),
        ("dualpipe-v", 5, 10, [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]),
    ],
)
def test_which_rank_has_which_stages(kind, ranks, stages, ranks_of_stages):
    schedule = Schedule(kind, ranks, stages, 12)
    assert [schedule.rank_of(stage) for stage in range(stages)] == ranks_of_stages
    for rank in range(ranks):
        assert schedule.stages_of(rank) == [stage for stage in range(stages) if ranks_of_stages[stage] == rank]
        assert len(schedule.stages_of(rank)) in KINDS[kind].stages_per_rank


def parameter(size: int, trained: bool = True) -> dict[str, Any]:
    ways = dict.fromkeys(("exchanged_once", "master_only", "gathered_in_fp8"), False)
    return {"shape": [size], "dtype": "float32", "layout": "R", "trained": trained, **ways}


STAGES = [
    {
        "mesh": {"sizes": [1], "replicas": 3}, "tied": {"again0": "p0"} if index == 0 else {},
        "parameters": {f"p{index}": parameter(index + 1), "shared": parameter(7)},
    }
    for index in range(8)
]  # fmt: skip
# Of each of a rank's stages: how many buckets it has, and of which the state lies on the host.
BUCKETS = {1: (2, [1]), 3: (3, [0, 2]), 5: (1, []), 7: (5, [4])}


class FakeStage:
    def __init__(self, index: int) -> None:
        count, self.state_on_host = BUCKETS[index]
        self.buckets = [
            SimpleNamespace(name=(index, number), slots=[SimpleNamespace(name="own")]) for number in range(count)
        ]
        self.predicted_seconds = {"compute": float(index), f"of {index}": 1.0}
        self.specs = {f"p{index}": parameter_spec(index), **({"both": parameter_spec(4)} if index > 3 else {})}
        self.loaded: list[tuple[str, list[float]]] = []
        self.held: dict[str, Any] = {}

    def tensors_called(self, name: str) -> list[str]:
        return [f"{name} of {min(self.specs)}"] if name in self.specs else []

    def parameters_to_load(self) -> dict[str, Any]:
        return dict(self.specs)

    def load_one(self, name: str, part: torch.Tensor) -> None:
        self.loaded.append((name, part.tolist()))

    def hold_unused(self, tensors: dict[str, torch.Tensor]) -> None:
        self.held |= tensors
        self.specs |= {name: parameter_spec(len(tensor)) for name, tensor in tensors.items()}


def parameter_spec(size: int) -> ParameterSpec:
    return ParameterSpec((size,), torch.float32, (REPLICATE,), True)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> tuple[PipelineModule, dict[str, Any]]:
    """Rank 1 of two, which has stages 1, 3, 5 and 7 of eight; and what it asked for."""
    asked: dict[str, Any] = {"stages": [], "torch": []}
    axes = SimpleNamespace(
        pipeline=SimpleNamespace(rank=1, group="group"), device=torch.device("cpu"), mesh=Mesh((1,), 3, 3), rank=4,
        place=(0,), replica=1,
    )  # fmt: skip

    def of_stage(directory: Any, plan: Any, index: int, axes: Any, shared: Any) -> FakeStage:
        asked["stages"].append((directory, plan is STAGES[index], index, shared))
        return FakeStage(index)

    monkeypatch.setattr(pipeline, "Axes", lambda mesh, device: asked.update(mesh=mesh, device=device) or axes)
    monkeypatch.setattr(pipeline.ParallelModule, "of_stage", of_stage)
    monkeypatch.setattr(pipeline, "_Stage", lambda *given: asked["torch"].append(given) or f"stage {given[2]}")
    monkeypatch.setattr(pipeline, "torch_schedule", lambda *given: asked.update(schedule=given) or "schedule")
    monkeypatch.setattr(pipeline, "ForwardOnly", lambda *given: asked.update(forward=given) or "forward")
    tensor = {"dtype": "float32", "gradient": True, "sent": "R", "received": "R"}
    crossing = [[{"name": f"x{n}", "whole": [n + 1], **tensor}] for n in range(7)]
    plan = {
        "stages": STAGES,
        "pipeline": {
            "schedule": {"kind": "interleaved", "ranks": 2, "stages": 8, "micro_batches": 4}, "shared": {},
            "crossing": crossing, "splits": [index == 5 for index in range(8)],
        },
    }  # fmt: skip
    return PipelineModule("folder", plan, torch.device("cpu")), asked  # type: ignore[arg-type]


def test_a_rank_puts_its_stages_together(module):
    made, asked = module
    assert asked["mesh"] == PipelineMesh.of([(1,), (1,)], 3)
    assert asked["stages"] == [("folder", True, index, {}) for index in (1, 3, 5, 7)]
    assert [bucket.name for bucket in made.buckets] == [
        (i, n) for i, (count, _) in BUCKETS.items() for n in range(count)
    ]
    assert [made.buckets[index].name for index in made.state_on_host] == [(1, 1), (3, 0), (3, 2), (7, 4)]
    assert made.predicted_seconds == Counter({"compute": 16.0, "of 1": 1, "of 3": 1, "of 5": 1, "of 7": 1})
    assert list(made.specs) == ["p0", "shared", *(f"p{index}" for index in range(1, 8))], "of all stages"
    assert made.tied == {"again0": "p0"}
    assert made.gives_loss
    for (stage, names, index, stages, received, sent, _, splits, between), wanted in zip(asked["torch"], (1, 3, 5, 7)):
        assert stage is made.stages[index]
        assert (names, index, stages, splits) == ([f"x{wanted - 1}"], wanted, 8, wanted == 5)
        assert [tuple(one.shape) for one in received] == [(wanted,)]
        assert [tuple(one.shape) for one in sent] == [(wanted + 1,) if wanted < 7 else ()]
        assert [one is not None for one in between] == [True, wanted < 7]
    schedule, stages, loss = asked["schedule"]
    assert (schedule, stages, loss) == (made.schedule, [f"stage {index}" for index in (1, 3, 5, 7)], made._loss)
    forward = asked["forward"]
    assert forward[:2] == (made.schedule, made.stages)
    assert {index: list(received) for index, received in forward[2].items()} == {n: [f"x{n - 1}"] for n in (1, 3, 5, 7)}
    assert list(forward[3]) == list(range(7)), "each is between this rank and the other"


def test_each_stage_that_has_a_parameter_gets_it(module):
    made, _ = module
    made.load_one("both", torch.tensor([1.0, 2.0]))
    made.load_one("p3", torch.tensor([3.0]))
    made.load_one("p0", torch.tensor([4.0]))  # which another rank has
    both = ("both", [1.0, 2.0])
    assert [stage.loaded for stage in made.stages.values()] == [[], [("p3", [3.0])], [both], [both]]
    assert made.tensors_called("both") == ["both of both"] * 2
    assert made.tensors_called("p0") == []
    assert list(made.parameters_to_load()) == ["p1", "p3", "p5", "both", "p7"]
    made.hold_unused({"unused": torch.zeros(9)})
    assert [list(stage.held) for stage in made.stages.values()] == [["unused"], [], [], []]
    assert made.specs["unused"].shape == (9,)
    assert made.box("unused") == Box((0,), (9,))
    assert made.box("p4") == Box((0,), (5,))


@pytest.mark.parametrize(("rank", "found"), [(6, [6, 18]), (11, [11, 23]), (20, [8, 20]), (2, None), (13, None)])
def test_devices_of_the_same_place_on_some_pipeline_ranks_are_a_group(rank, found, monkeypatch):
    """Four pipeline ranks of six devices each; every rank makes all groups."""
    made: list[list[int]] = []
    monkeypatch.setattr(shared.dist, "new_group", lambda ranks: made.append(ranks) or ranks)
    axes, mesh = SimpleNamespace(rank=rank), PipelineMesh.of([(3,)] * 4, 2)
    assert group_across(axes, mesh, (1, 3)) == found
    assert made == [[6 + place, 18 + place] for place in range(6)]
    assert group_across(axes, mesh, (2,)) is None
    assert len(made) == 6


def test_what_is_compiled_says_whether_it_is_a_pipeline(tmp_path, monkeypatch):
    for name in ("PipelineModule", "ParallelModule"):
        monkeypatch.setattr(pipeline, name, lambda *given, name=name: (name, *given))
    for plan, wanted in (
        ({"pipeline": {}}, ("PipelineModule", tmp_path, {"pipeline": {}}, "device")),
        ({"stages": []}, ("ParallelModule", tmp_path, "device")),
    ):
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        assert load_module(tmp_path, "device") == wanted


def test_a_stage_takes_what_came_by_place_and_the_rest_by_name():
    """torch gives the model's inputs in rows of one."""
    asked: dict[str, Any] = {}
    module = SimpleNamespace(forward=lambda **given: asked.update(given) or "made", input_names=["x", "h", "mask", "g"])
    stage = pipeline._StageModule(module, ["g", "h"])  # type: ignore[arg-type]
    given = {"x": torch.arange(6).view(1, 2, 3), "mask": torch.ones(1, 2), "unused": torch.zeros(1)}
    assert stage("first", "second", **given) == "made"
    assert (asked.pop("g"), asked.pop("h")) == ("first", "second")
    assert {name: tensor.tolist() for name, tensor in asked.items()} == {"x": [[0, 1, 2], [3, 4, 5]], "mask": [1, 1]}
    with pytest.raises(ValueError, match="zip"):
        stage("first", **given)


@pytest.mark.parametrize("splits", [True, False])
def test_a_micro_batch_ends_when_the_gradients_of_its_weights_are_there(splits, monkeypatch):
    """After backward; or, of one that is split, after its second part, for which the first leaves them."""
    done: list[Any] = []
    later = SimpleNamespace(waits=None)

    def backward(self: Any, *given: Any) -> None:
        done.append(("backward_one_chunk", *given, "for later" if later.waits else "at once"))

    def rest(self: Any, *given: Any) -> None:
        done.append(("backward_weight_one_chunk", *given))

    monkeypatch.setattr(PipelineStage, "backward_one_chunk", backward)
    monkeypatch.setattr(PipelineStage, "backward_weight_one_chunk", rest)
    stage = pipeline._Stage.__new__(pipeline._Stage)
    stage._host = SimpleNamespace(clear=lambda: done.append("clear"))
    stage._reducer = SimpleNamespace(end_micro_batch=lambda: done.append("end"))
    stage._later, stage._splits, stage._coming = later, splits, {}
    stage.backward_one_chunk(3, "loss", False, True)
    stage.backward_weight_one_chunk(3, True)
    first = ("backward_one_chunk", 3, "loss", False, True, "for later" if splits else "at once")
    second = ("backward_weight_one_chunk", 3, True)
    assert done == ([first, "clear", second, "end"] if splits else [first, "clear", "end", second])
    done.clear()
    stage.backward_one_chunk(4)
    assert done == [("backward_one_chunk", 4, None, True, False, "at once"), "clear", "end"]


def test_a_stage_is_only_connected_to_other_ranks(monkeypatch):
    every = [SimpleNamespace(group_peer=peer) for peer in (0, 2, 1, 2)]
    monkeypatch.setattr(PipelineStage, "_get_init_p2p_neighbors_ops", lambda self: every)
    stage = pipeline.PeerStage.__new__(pipeline.PeerStage)
    stage.group_rank = 2
    assert stage._get_init_p2p_neighbors_ops() == [every[0], every[2]]
    stage.greeted, stage.device = True, torch.device("cpu")
    assert stage._get_init_p2p_neighbors_ops() == []
    assert stage._warmup_forward_vote(True).item() == stage._warmup_backward_result().item() == 1, "shapes are known"
