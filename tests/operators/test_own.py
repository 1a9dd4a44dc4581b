"""Operators that a user registers: all kinds of functions, arguments and results, beside the plain functions."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from nnscaler import ComputeConfig, Source, UserError, compile_model, register_op, verify_op
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
    assert split >= {*(f"own_{kind}" for kind in KINDS), "Scaled", "Negated"}
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
