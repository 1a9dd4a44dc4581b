"""The parts of tracing by themselves: which modules may repeat, nests of tensors, whose code a line is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from nnscaler import Source, UserError
from nnscaler.trace import trace
from nnscaler.trace.fake import as_if_exporting, fake_mode, fake_weights
from nnscaler.trace.own_code import is_own_code, line_of
from nnscaler.trace.repeated import find_repeated, intercepted
from nnscaler.trace.strategies import find_strategy
from nnscaler.trace.structure import Structure

X, Y = torch.zeros(2), torch.ones(3)


def layer(width: int = 4, kind: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), kind())


def test_modules_that_may_repeat_are_similar_ones_of_one_list() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([layer(), layer(), layer(5), layer(4, nn.Tanh), layer().half()])
    model.inner = nn.Module()
    model.inner.stack = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    model.nested = nn.ModuleList([nn.ModuleList([layer(), layer()]), nn.ModuleList([layer(), layer()])])
    model.by_name = nn.ModuleDict({"a": layer(), "b": layer()})
    model.plain = nn.ModuleList([nn.ReLU(), nn.ReLU()])
    model.single = nn.ModuleList([nn.ModuleList([layer(), layer()])])
    assert find_repeated(model) == [
        "layers.0", "layers.1", "inner.stack.0", "inner.stack.2", "nested.0", "nested.1", "single.0.0", "single.0.1",
    ]  # fmt: skip
    buffered = nn.ModuleList(
        [nn.BatchNorm1d(2, affine=True), nn.BatchNorm1d(2, affine=True, track_running_stats=False)]
    )
    assert find_repeated(buffered) == [], "buffers count"


def test_intercepted_modules_are_as_before() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    compiled = model[1]._compiled_call_impl = lambda x: "compiled"
    taken = []

    def fail() -> None:
        with intercepted(model, ["0", "1"], lambda path, *_: taken.append(path)):
            model[0](X), model[1](X)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert taken == ["0", "1"]
    assert "_compiled_call_impl" not in vars(model[0])
    assert model[1]._compiled_call_impl is compiled
    assert isinstance(model[0](X), Tensor)


def test_a_model_takes_the_path_of_export_only_inside() -> None:
    def fail() -> None:
        with as_if_exporting():
            assert torch.compiler.is_exporting()
            assert torch.compiler.is_compiling()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not torch.compiler.is_exporting()
    assert not torch.compiler.is_compiling()


def test_weights_are_fake_and_tied_ones_one_inside() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    before = dict(model.state_dict(keep_vars=True).items())
    with fake_weights(model, fake_mode()):
        assert model[0].weight is model[1].weight
        assert all(isinstance(tensor, FakeTensor) for tensor in model.state_dict().values())
        needs = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        assert needs == {"0.weight": True, "0.bias": True, "1.bias": False, "2.weight": True, "2.bias": True}
        model[0].extra = 1
    assert not hasattr(model[0], "extra")
    assert all(tensor is before[name] for name, tensor in model.state_dict(keep_vars=True).items())


def test_a_nest_is_taken_apart_and_put_together() -> None:
    call = ((X, [Y, 1]), {"mask": {"inner": X}, "flag": None})
    structure, tensors = Structure.take(call)
    assert [id(tensor) for tensor in tensors] == [id(X), id(Y), id(X)]
    again = structure.put(["a", "b", "c"])
    assert again == (("a", ["b", 1]), {"mask": {"inner": "c"}, "flag": None})
    assert structure.tensor_names(["first", "second"]) == ["first", "second_0", "mask_inner"]
    assert structure.holds(tensors, structure.put(tensors))
    assert not structure.holds(tensors, structure.put([X, X, X])), "another tensor"
    assert not structure.holds(tensors, ((X, [Y, 2]), call[1])), "another constant"
    assert not structure.holds(tensors, ((X, [Y]), call[1])), "one less"
    assert not structure.holds(tensors, ((X, (Y, 1)), call[1])), "a tuple for a list"


@pytest.mark.parametrize(
    ("value", "is_tensor", "is_flat", "described"),
    [
        (X, True, True, "Tensor"),
        ((X, Y), False, True, "a tuple of Tensor, Tensor"),
        ([X], False, True, "a list of Tensor"),
        ((X, None), False, False, "a tuple of Tensor, NoneType"),
        ({"a": X}, False, False, "a dict of Tensor"),
        ([[X], Y], False, False, "a list of Tensor, Tensor"),
    ],
)
def test_results_that_are_flat(value: object, is_tensor: bool, is_flat: bool, described: str) -> None:
    structure, _ = Structure.take(value)
    assert (structure.is_tensor, structure.is_flat, structure.described) == (is_tensor, is_flat, described)


def test_whose_code_a_line_is() -> None:
    assert is_own_code("/home/me/torch_models/model.py")
    assert not is_own_code("/site-packages/torch/nn/functional.py")
    assert not is_own_code("C:\\packages\\nnscaler\\graph.py")
    assert line_of("/a/b/model.py", 7) == line_of("C:\\a\\model.py", "7") == "model.py:7"


def test_a_strategy_that_there_is_not_is_told_those_that_there_are() -> None:
    with pytest.raises(UserError, match="trace strategy is 'fast'; allowed are reuse_cache, meta, cpu, cuda, cuda_run"):
        find_strategy("fast")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, unused: Tensor, x: Tensor, shared: nn.Linear | None = None) -> Tensor:
        x = self.linear(x)
        return x if shared is None else x @ shared.weight


class Stack(nn.Module):
    """The layers get a tensor that they do not use; and some use a weight that is not their own."""

    shares = False

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for one in self.layers:
            x = one(y, x, self.first if self.shares else None)
        return x.sum()


class Shares(Stack):
    shares = True


def test_what_a_layer_does_not_use_is_no_input_of_its_block() -> None:
    model, buffers = Source(Stack, {"x": torch.zeros(2, 4)}, torch.float32).build()
    graph = trace(model, {"x": torch.zeros(2, 4)}, buffers)
    assert graph.blocks["layer"].inputs == ["x"]
    assert len(graph.calls("layer")) == 3
    assert "first.weight" not in graph.parameters


def test_layers_with_a_weight_from_elsewhere_are_part_of_the_whole_in_every_strategy() -> None:
    model, buffers = Source(Shares, {"x": torch.zeros(2, 4)}, torch.float32).build()
    found = {name: trace(model, {"x": torch.zeros(2, 4)}, buffers, name) for name in ("reuse_cache", "meta", "cpu")}
    assert not found["cpu"].blocks
    assert str(found["cpu"]) == str(found["meta"]) == str(found["reuse_cache"])
    assert sum(path == "first.weight" for _, _, path in found["cpu"].parameter_uses()) == 1
