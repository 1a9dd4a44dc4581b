"""Operators that a user registers: all kinds of functions, arguments and results, beside the plain functions."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from nnscaler import ComputeConfig, Source, UserError, compile_model, register_op, verify_op
from nnscaler.operators.own_backward import annotation_of
from nnscaler.operators.registry import Operator
from tests import plainly, tiny
from tests.operators import own

KINDS = ["affine", "weighted", "added", "applied", "several", "compiled", "product"]


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(8, own.WIDTH, generator=generator), torch.randint(own.WIDTH, (8,), generator=generator)


def test_operators_of_all_kinds_split_over_two_processes_are_the_plain_functions(tmp_path):
    torch.manual_seed(0)
    plainly.check(tmp_path, {"own": plainly.Case(own.Net(), [batch(number) for number in range(3)])})
    split = {op for op, name in plainly.splits(tmp_path / "own") if name != "-"}
    assert split >= {*(f"own_{kind}" for kind in KINDS), "Scaled", "Negated", "own_backward"}
    code = (tmp_path / "own" / "gencode_stage0.py").read_text()
    assert "imported('tests.operators.own', 'squashed')" in code
    assert "imported('tests.operators.own', 'Side')['RIGHT']" in code


X, VECTOR, MATRIX = torch.randn(4, 6), torch.rand(6), torch.randn(6, 6)


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "names"),
    [
        (own.affine, (X, 1.0, None, VECTOR), {}, ["row", "column"]),
        (own.affine, (X,), {"shift": VECTOR}, ["row", "column"]),
        (own.weighted, (X,), {"columns": VECTOR}, ["row", "column"]),
        (own.added, ([X, X], VECTOR), {}, ["row", "column"]),
        (own.applied, (X, torch.sin, own.Side.LEFT), {}, ["row", "column"]),
        (own.scaled, (X, VECTOR, 0.5), {}, ["row", "column"]),
        (own.negated, (X,), {}, ["*0", "*1"]),
        (own.compiled, (X, VECTOR), {}, ["row", "column"]),
        (own.product, (X, MATRIX), {"transposed": True}, ["*0", "k", "n"]),
    ],
)
def test_annotations_of_all_kinds_can_be_tried(function, args, kwargs, names):
    assert verify_op(function, args, kwargs) == names


def test_several_results_do_not_depend_on_each_others_columns():
    with pytest.raises(UserError, match="split along 'column' over 2 devices: output 1 differs"):
        verify_op(register_op("row column+ -> row column, row", name="own_wrong")(lambda x: (x, x.argmax(1))), (X,))


class BySize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * len(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class ByType(BySize):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2 if x.dtype == torch.float64 else x * len(x)


class Dropped(BySize):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * torch.rand_like(x)


class InPlace(BySize):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.mark_dirty(x.mul_(2))
        return x


class Read(BySize):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * x.sum().item()


class Shifted(BySize):
    """By what has no gradient, and is the same along some dimensions."""

    @staticmethod
    def forward(ctx, x: Tensor, by: Tensor) -> Tensor:
        return x + by

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Both(Shifted):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, y + 1

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


@pytest.mark.parametrize(
    ("function", "args", "annotation"),
    [
        (Shifted, (X, VECTOR), "d0 d1, d1 -> d0 d1"),
        (Shifted, (X, X[:, :1]), "d0 d1, d0 1 -> d0 d1"),
        (Both, (X, X), "d0 d1, d0 d1 -> d0 d1, d0 d1"),
        (Both, (MATRIX, VECTOR), "6 6, 6 -> 6 6, 6"),
        (own.Rounded, (X, 0.5), "d0 d1 -> d0 d1"),
        (own.Rounded, (X[:1], 0.5), "1 d1 -> 1 d1"),
        (own.Rounded, (X.sum(), 0.5), "() -> ()"),
        (own.Centred, (X,), "4 6 -> 4 6"),
        (own.Scaled, (X, VECTOR), "4 6, 6 -> 4 6"),  # the weight's gradient is a sum
        (BySize, (X,), "4 6 -> 4 6"),
        (ByType, (X.double(),), "d0 d1 -> d0 d1"),
        (ByType, (X,), "4 6 -> 4 6"),
        (Shifted, (X[:2], VECTOR), "d0 d1, d1 -> d0 d1"),
    ],
)
def test_a_backward_of_its_own_is_split_where_all_is_elementwise(function, args, annotation):
    assert annotation_of(function, args) == annotation


@pytest.mark.parametrize(
    ("function", "wrong"),
    [(Dropped, "draws random numbers"), (InPlace, "writes into its arguments"), (Read, r"cannot be traced: .*item")],
)
def test_a_backward_of_its_own_that_cannot_be_an_operator_is_refused_by_name(function, wrong):
    with pytest.raises(UserError, match=f"{function.__name__} {wrong}"):
        annotation_of(function, (X,))


class Unwritable:
    def __repr__(self) -> str:
        return "<an object>"


@pytest.mark.parametrize(
    ("forward", "wrong"),
    [
        (lambda x: own.applied(x, lambda y: y + 1, own.Side.LEFT),
         r"operator 'own_applied' at test_own.py:\d+: a constant is .*<lambda>, which cannot be imported; define the"),
        (lambda x: own.affine(x, Unwritable()), r"'own_affine' at test_own.py:\d+: a constant is a Unwritable, which "),
        (lambda x: own.affine(x, [nn.GELU()]), "a constant is an object of class GELU, which cannot be imported"),
        (lambda x: pair(x)["a"], r"'own_pair' at test_own.py:\d+ returns a dict of Tensor, Tensor; it must return"),
        (lambda x: maybe(x)[0], r"'own_maybe' at test_own.py:\d+ returns a tuple of Tensor, NoneType; it must"),
    ],
)  # fmt: skip
def test_what_generated_code_cannot_have_is_refused_in_one_line(forward, wrong, tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return forward(self.linear(x)).sum()

    config = ComputeConfig(hardware=tiny.write_hardware(tmp_path))
    with pytest.raises(UserError, match=wrong):
        compile_model(Source(Net, {"x": X}, torch.float32), config, tmp_path / "code")


@register_op("row column -> row column, row column", name="own_pair")
def pair(x):
    return {"a": x, "b": x * 2}


@register_op("row column -> row column", name="own_maybe")
def maybe(x):
    return x * 2, None


def test_a_function_without_name_or_parameters_is_told_so():
    with pytest.raises(UserError, match="register_op got a partial, which has no name; give one as name="):
        register_op("row -> row")(functools.partial(torch.clamp, min=0))
    with pytest.raises(UserError, match=r"matmul .* are not known; wrap its call in a Python function"):
        register_op("m k+, k n -> m n")(torch.matmul)
    with pytest.raises(UserError, match="an operator named 'Scaled' is already registered"):
        register_op("row -> row", name="Scaled")(own.Negated.apply)


def unhinted(x, eps=1e-5, weight=None, bias=None, name=None):
    found = x + eps
    found = found if weight is None else found * weight
    return found if bias is None else found + bias


def test_tensors_that_are_left_out_are_known_without_hints():
    """A constant before them is none of them; nor is an argument that is None, where tensors are described no more."""
    function = register_op("row column, column, column -> row column", name="own_unhinted")(unhinted)
    for given in ({}, {"weight": VECTOR}, {"bias": VECTOR}, {"weight": VECTOR, "bias": VECTOR, "name": "x"}):
        assert verify_op(function, (X, 0.5), given) == ["row", "column"], given
    side = register_op("row column, row, column -> row column", name="own_side")
    function = side(lambda x, left=None, right=None: x + (0 if right is None else right) + left[:, None])
    assert verify_op(function, (X, X[:, 0], VECTOR)) == ["row", "column"]
    assert verify_op(function, (X, X[:, 0]), {}) == ["row", "column"]
    first = register_op("row column, row, column -> row column", name="own_second")
    function = first(lambda x, left=None, right=None: x * right)
    assert verify_op(function, (X,), {"right": VECTOR}) == ["row", "column"], (
        "the second alone, not taken for the first"
    )


def test_a_function_may_be_registered_again_and_another_of_its_name_may_not():
    """As where a module is imported once more."""

    def make(name: str = "twice"):
        def twice(x):
            return x * 2

        twice.__qualname__ = name
        return register_op("row column -> row column", name="own_twice")(twice)

    make()
    assert torch.equal(make()(X), 2 * X)
    with pytest.raises(UserError, match="an operator named 'own_twice' is already registered; choose another name="):
        make("thrice")
    with pytest.raises(UserError, match=r"an operator named 'aten\.silu\.default' is already registered"):
        register_op("* -> *", name="aten.silu.default")(lambda x: x)


def test_all_that_is_said_of_an_operator_is_known_of_it():
    names = "flops unmasked backward saves keeps workspace among_copies examples draws counted".split()
    said = {name: lambda *given, name=name: name for name in names}
    said |= {"along": {"row": X.add}, "exchanges": {"row": X.mul}}
    operator = register_op("row -> row", name="own_all", **said)(lambda x: x).operator
    assert {name: getattr(operator, name) for name in said} == said
    plain = register_op("row -> row", name="own_plain")(lambda x: x).operator
    assert plain == Operator("own_plain", plain.annotate, function=plain.function)
