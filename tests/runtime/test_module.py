"""Parts of what a rank runs, each by itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nnscaler.errors import UserError
from nnscaler.kernels.random import DRAWS, draws_of, no_draws
from nnscaler.mesh import Mesh, PipelineMesh
from nnscaler.placement import REPLICATE
from nnscaler.runtime import pipeline
from nnscaler.runtime.draws import with_draws, without_draws
from nnscaler.runtime.generated import operators, scope
from nnscaler.runtime.module import ParallelModule, Weights, loss_of
from nnscaler.runtime.pipeline import _examples
from nnscaler.runtime.shared import SharedAlike
from nnscaler.schedules import Schedule
from nnscaler.shards import ParameterSpec


def test_reading_a_weight_waits_for_all_of_it():
    """One that a bucket's border cuts is in two."""
    waited, spec = [], SimpleNamespace(gathered_in_fp8=False)
    names = (["a"], ["a", "b"], ["c"])
    buckets = [
        SimpleNamespace(
            slots=[SimpleNamespace(name=name, spec=spec) for name in slots],
            wait=lambda slots=slots: waited.append(slots),
        )
        for slots in names
    ]
    flat = torch.zeros(8)
    weights = Weights(buckets, {"a": flat[:4], "b": flat[4:6], "c": torch.zeros(2)})
    assert weights["a"].data_ptr() == flat.data_ptr()
    assert waited == [["a"], ["a", "b"]]
    weights.wait(torch.zeros(1))
    assert len(waited) == 2, "what is no weight is not waited for"
    assert weights.hold(flat[5:])
    assert weights.hold(weights["c"].view(1, 2))
    assert not weights.hold(torch.zeros(8))


def test_each_micro_batch_of_each_copy_draws_numbers_of_its_own():
    axes = SimpleNamespace(mesh=SimpleNamespace(replicas=3), replica=1, device=torch.device("cpu"))
    found = list(with_draws([{"x": torch.ones(1)}] * 3, axes, 5, 7))
    assert [torch.equal(one[DRAWS], draws_of(5, 7, number)) for one, number in zip(found, (1, 4, 7))] == [True] * 3
    assert all(torch.equal(one["x"], torch.ones(1)) for one in found)
    (one,) = without_draws([{"x": torch.ones(1)}], axes)
    assert torch.equal(one[DRAWS], no_draws())
    axes.device = torch.device("meta")  # as if it were an accelerator
    for some in (with_draws([{}], axes, 5, 7), without_draws([{}], axes)):
        assert next(some)[DRAWS].device == axes.device


def module_that_gives(numbers) -> ParallelModule:
    """One whose forward gives this, for an input `x`."""
    module = ParallelModule.__new__(ParallelModule)
    torch.nn.Module.__init__(module)
    steps: list[str] = []
    host = SimpleNamespace(clear=lambda: steps.append("clear"))
    module.axes = SimpleNamespace(device=torch.device("cpu"), host=host, mesh=SimpleNamespace(replicas=3), replica=2)
    module.input_names, module._gathers_again, module._weights = ["x"], False, {}
    module.gathers = SimpleNamespace(begin=lambda: steps.append("begin"))
    module.reducer = SimpleNamespace(end_micro_batch=lambda: steps.append("end"), finish=lambda: steps.append("finish"))
    module._code = SimpleNamespace(forward=lambda weights, axes, x: numbers(x))
    module.steps = steps
    return module


def test_a_step_sums_what_its_micro_batches_give_and_trains_the_first_number():
    module, x = (
        module_that_gives(lambda x: torch.stack([x.square(), 10 * x])),
        torch.tensor(3.0, requires_grad=True),
    )
    total = module.accumulate([{"x": x}, {"x": 2 * x}])
    assert total.tolist() == [9.0 + 36.0, 30.0 + 60.0]
    assert (total.dtype, total.requires_grad) == (torch.float64, False)
    assert module.steps == [*["begin", "clear", "end", "clear"] * 2, "finish"]
    assert x.grad.item() == 2 * 3.0 + 8 * 3.0
    found = module.evaluate([{"x": x}, {"x": 2 * x}])
    assert torch.equal(found, total)
    assert x.grad.item() == 30.0
    assert not found.requires_grad
    assert loss_of(torch.tensor(4.0)).item() == loss_of(torch.tensor([4.0, 5.0])).item() == 4.0


def test_training_draws_by_seed_step_and_micro_batch_and_an_evaluation_does_not():
    """The last of three copies, of which each has two micro-batches."""
    module = module_that_gives(None)
    module.input_names, drawn = ["x", DRAWS], []
    module._code.forward = lambda weights, axes, x, draws: drawn.append(draws) or x
    given = [{"x": torch.ones((), requires_grad=True)}] * 2
    module.accumulate(given, 5, 7)
    assert all(map(torch.equal, drawn, (draws_of(5, 7, 2), draws_of(5, 7, 5))))
    assert len(drawn) == 2
    module.evaluate(given)
    assert all(torch.equal(draws, no_draws()) for draws in drawn[2:])


def test_numbers_of_micro_batches_are_summed_in_fp64():
    module = module_that_gives(lambda x: x)
    given = [{"x": torch.tensor(float(number), requires_grad=True)} for number in (2**24, 257)]
    for total in (module.accumulate(given), module.evaluate(given)):
        assert (total.item(), total.dtype) == (2**24 + 257, torch.float64)


def test_a_pipeline_sums_its_micro_batches_in_fp64():
    module, numbers = pipeline.PipelineModule.__new__(pipeline.PipelineModule), [torch.tensor(2.0**24), torch.ones(())]
    module.axes = SimpleNamespace(device=torch.device("cpu"), mesh=SimpleNamespace(replicas=1), replica=0)
    module.gives_loss = True
    module._numbers, module.schedule, module._shared = [torch.zeros(())], Schedule("1f1b", 2, 2, 2), []
    finished = []
    module.stages = {0: SimpleNamespace(reducer=SimpleNamespace(finish=lambda: finished.append(0)))}
    step = lambda target, return_outputs, **inputs: [module._loss(number, target) for number in numbers]  # noqa: E731
    module._schedule = SimpleNamespace(step=step)
    module._forward = SimpleNamespace(run=lambda some: numbers)
    given = [{"x": torch.zeros(1)}] * 2
    for total in (module.accumulate(given), module.evaluate(given)):
        assert (total.item(), total.dtype) == (2**24 + 1, torch.float64)
    assert finished == [0]


def test_an_evaluation_of_a_pipeline_runs_as_many_micro_batches_at_once_as_its_schedule_has():
    module, ran = pipeline.PipelineModule.__new__(pipeline.PipelineModule), []
    module.axes = SimpleNamespace(device=torch.device("cpu"), mesh=SimpleNamespace(replicas=1), replica=0)
    module.schedule = Schedule("1f1b", 2, 2, 3)
    module._forward = SimpleNamespace(run=lambda some: ran.append(len(some)) or [one["x"] for one in some])
    assert module.evaluate({"x": torch.tensor(2.0**place)} for place in range(8)).item() == 255
    assert ran == [3, 3, 2]


def test_what_a_module_cannot_take_or_train_is_one_line():
    module = module_that_gives(lambda x: x)
    for given, said in (({}, r"\[\]"), ({"x": 1, "y": 1}, r"\['x', 'y'\]"), ({"y": 1}, r"\['y'\]")):
        with pytest.raises(UserError, match=rf"forward got inputs {said}; the compiled model takes \['x'\]"):
            module(**given)
    for given, said in ((torch.zeros(2, 3), r"\[2, 3\]"), ((1, 2), "2 results")):
        with pytest.raises(UserError, match=rf"forward gives {said}; what is trained must give one number, the loss"):
            module.accumulate([{"x": given}])


def test_tensors_that_forward_does_not_use_are_held_whole_on_the_cpu():
    """Those without a value wait for one, and are no buffers."""
    module = module_that_gives(None)
    module.specs, module.buffer_names, module.axes.mesh = {}, set(), Mesh((2, 3))
    known = torch.ones(2)
    module.hold_unused({"known": known, "waits": torch.empty(3, 1, dtype=torch.bfloat16, device="meta")})
    whole = (REPLICATE, REPLICATE)
    assert module.specs == {
        "known": ParameterSpec((2,), torch.float32, whole, trained=False),
        "waits": ParameterSpec((3, 1), torch.bfloat16, whole, trained=False),
    }
    assert (module.buffer_names, list(module.parameters_to_load())) == ({"known"}, ["waits"])
    assert module.tensors_called("known")[0] is known
    (waits,) = module.tensors_called("waits")
    assert (waits.tolist(), waits.dtype, waits.device.type) == ([[0]] * 3, torch.bfloat16, "cpu")
    assert module.tensors_called("other") == []


def test_generated_code_finds_operators_and_parameters():
    found = operators("attention", "experts")
    assert {name for name in vars(found) if name.startswith("attention")} == {"attention", "attention_along_l"}
    assert all(map(callable, vars(found).values()))
    weights = {"model.layers.0.w": torch.ones(1)}
    assert scope(weights, "model.layers.0.")["w"] is weights["model.layers.0.w"]


def bucket(*names: str, gradient: float = 0.0) -> SimpleNamespace:
    slots = [SimpleNamespace(name=name) for name in names]
    return SimpleNamespace(slots=slots, is_copy=None, gradient=torch.full((2,), gradient))


def test_parts_of_a_parameter_of_several_stages_are_added_up(monkeypatch):
    """Rank 0 has stages 0 and 3 of four. `w` lies in two buckets of each, and `v` is also on rank 1."""
    asked = []
    monkeypatch.setattr(pipeline, "group_across", lambda axes, mesh, ranks: asked.append(ranks) or f"group {ranks}")
    module = pipeline.PipelineModule.__new__(pipeline.PipelineModule)
    module.schedule, module.axes = Schedule("zb-v", 2, 4, 4), None
    module.mesh = PipelineMesh.of([(1,), (1,)], 1)
    first = [bucket("a"), bucket("w", gradient=1.0), bucket("w", "b", gradient=2.0)]
    last = [bucket("w", gradient=10.0), bucket("w", gradient=20.0), bucket("v", gradient=5.0)]
    module.stages = {0: SimpleNamespace(buckets=first), 3: SimpleNamespace(buckets=last)}
    shared = list(module._share({"w": [0, 3], "v": [1, 3], "u": [1, 2], "t": [2, 3]}))
    assert asked == [(0,), (0, 1), (1,)], "every rank makes each group once, in the same order"
    assert [one.group for one in shared] == ["group (0,)"] * 2 + ["group (0, 1)"]
    assert [one.is_copy for one in (*first, *last)] == [None, False, False, True, True, True]
    monkeypatch.setattr(pipeline.dist, "all_reduce", lambda total, group: total.add_(100.0))
    for one in shared:
        one.add_gradients() if one.group == "group (0, 1)" else SharedAlike(one.buckets, None).add_gradients()
    assert [one.gradient.tolist() for one in first[1:]] == [[11.0] * 2, [22.0] * 2]
    assert [one.gradient.tolist() for one in last] == [[11.0] * 2, [22.0] * 2, [105.0] * 2]


def test_examples_of_what_crosses_have_its_shape_type_and_gradient():
    crossing = [
        {"name": "x", "whole": [2, 6], "dtype": "bfloat16", "gradient": True, "sent": "S(1)", "received": "R"},
        {"name": "y", "whole": [4], "dtype": "int64", "gradient": False, "sent": "R", "received": "S(0)"},
    ]
    for side, shapes in (("sent", [(2, 3), (4,)]), ("received", [(2, 6), (2,)])):
        made = _examples(crossing, side, Mesh((2,)))
        assert list(made) == ["x", "y"]
        assert [(tuple(one.shape), one.dtype, one.requires_grad, one.is_meta) for one in made.values()] == [
            (shapes[0], torch.bfloat16, True, True), (shapes[1], torch.int64, False, True)
        ]  # fmt: skip
