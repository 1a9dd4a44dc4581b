"""For every operator in the tables: the Python text that generated code has for a call computes what the call does."""

from __future__ import annotations

import pytest
import torch

from nnscaler import UserError
from nnscaler.graph import Block, Node, Ref, TensorMeta
from nnscaler.operators import bind, operator_of, registered, spell
from nnscaler.operators.attention import attention
from nnscaler.operators.verify import gradients
from tests.operators.calls import forms, in_types, node_of, run, run_text
from tests.operators.samples import known, samples

SIZES = (4, 2, 6, 4)


def compare(op: str, args: tuple, kwargs: dict, closely: bool = True) -> None:
    node, block, tensors = node_of(op, args, kwargs)
    metas = [block.tensors[name] for name in node.outputs]
    wanted, found = run(node, tensors), run_text(node, tensors, metas)
    tolerance = {} if closely else {"rtol": 3e-2, "atol": 3e-2}  # a bfloat16 sum may go another way
    text = spell(node, [Ref(name) for name in node.inputs], metas) if op.startswith("aten.") else op

    def same(a, b):
        torch.testing.assert_close(a, b, **tolerance, equal_nan=True, msg=lambda why: f"{op} written {text}: {why}")

    assert len(wanted) == len(found)
    for a, b in zip(found, wanted):
        same(a, b)
    torch.manual_seed(1)
    given = [torch.randn_like(result) if result.requires_grad else result for result in wanted]
    for a, b in zip(gradients(found, tensors, given), gradients(wanted, tensors, given), strict=True):
        assert (a is None) == (b is None), text
        if a is not None:
            same(a, b)


@pytest.mark.parametrize("op", known())
def test_text_computes_what_the_operator_does(op):
    torch.manual_seed(0)
    for args, kwargs in samples(*SIZES)[op]:
        for form in forms(op, args, kwargs):
            compare(op, *form)
        for other in in_types(args, kwargs):
            try:
                node, _, tensors = node_of(op, *other)
                results = run(node, tensors)
                gradients(results, tensors, results)
            except (RuntimeError, NotImplementedError):
                continue  # torch has no such kernel, or wants equal types
            compare(op, *other, closely=False)


REFUSED = [
    ("to.dtype", (torch.zeros(2, 2, 2, 2), torch.float64, False, False, torch.channels_last), {}, "channels_last"),
    ("embedding.default", (torch.zeros(4, 2), torch.tensor([1]), -1, False, True), {}, "sparse=True"),
    ("gather.default", (torch.zeros(2), 0, torch.tensor([1])), {"sparse_grad": True}, "sparse_grad=True"),
    ("elu.default", (torch.zeros(2), 1.0, 2.0), {}, "scale=2.0"),
]


@pytest.mark.parametrize(("op", "args", "kwargs", "argument"), REFUSED)
def test_an_argument_that_the_text_does_not_know_is_refused_by_name(op, args, kwargs, argument):
    node, block, _ = node_of(f"aten.{op}", args, kwargs)
    node.source = "model.py:7"
    with pytest.raises(UserError, match=rf"aten\.{op} at model.py:7: the compiler does not support .*{argument}"):
        bind(node, block)


DRAWN = [
    ("alpha_dropout.default", (torch.zeros(2), 0.5, True), "p=0.5"),
    ("bernoulli.default", (torch.zeros(2),), ""),
    ("rand_like.default", (torch.zeros(2),), ""),
    ("scaled_dot_product_attention.default", (torch.zeros(1, 2, 2),) * 3 + (None, 0.25), "dropout_p=0.25"),
]


@pytest.mark.parametrize(("op", "args", "argument"), DRAWN)
def test_random_numbers_are_refused(op, args, argument):
    node = Node("out", f"aten.{op}", tuple(Ref("x") if isinstance(a, torch.Tensor) else a for a in args), {}, ("out",))
    node.source = "model.py:7"
    meta = TensorMeta(tuple(args[0].shape), torch.float32, True)
    with pytest.raises(UserError, match=rf"aten\.{op} at model.py:7 draws random numbers.*{argument}"):
        bind(node, Block("test", "Test", {"x": meta, "out": meta}))


def test_a_call_that_does_not_fit_the_schema_is_refused():
    with pytest.raises(UserError, match=r"aten.relu.default is aten::relu\(Tensor self\).*\['inplace'\]"):
        spell(Node("out", "aten.relu.default", (Ref("x"),), {"inplace": True}, ("out",)), [Ref("x")], [])


def test_what_is_not_known_is_told_with_its_line():
    x = (Ref("x"),)
    with pytest.raises(UserError, match=r"^torch .* has no operator aten\.nothing\.default$"):
        operator_of(Node("out", "aten.nothing.default", x, {}, ("out",)))
    for source, line in (("", "an unknown line"), ("model.py:7", r"model\.py:7")):
        with pytest.raises(
            UserError, match=rf"^operator aten\.linalg_qr\.default has no annotation \(called at {line}\)"
        ):
            operator_of(Node("out", "aten.linalg_qr.default", x, {}, ("out",), source=source))
        elu = Node("out", "aten.elu.default", (*x, 1.0, 2.0), {}, ("out",), source=source)
        with pytest.raises(
            UserError, match=rf"aten\.elu\.default at {line}: the compiler does not support scale=2\.0$"
        ):
            spell(elu, [Ref("x")], [])
        drawn = Node("out", "aten.bernoulli.default", x, {}, ("out",), source=source)
        with pytest.raises(UserError, match=rf"aten\.bernoulli\.default at {line} draws random numbers"):
            operator_of(drawn)
    for name in ("nothing", "aten.mm.default"):
        with pytest.raises(UserError, match=f"calls the registered operator '{name}', which this process has not reg"):
            registered(name)
    assert registered("attention") is attention.operator


@pytest.mark.parametrize(
    ("args", "kwargs", "called"),
    [
        ((), {}, r"0 arguments and \[\]"),
        (("x",) * 4, {}, r"4 arguments and \[\]"),
        (("x",), {"alpha": 2}, r"1 .*'alpha'"),
    ],
)
def test_too_few_and_too_many_arguments_are_refused(args, kwargs, called):
    node = Node("out", "aten.add.Tensor", tuple(map(Ref, args)), kwargs, ("out",))
    with pytest.raises(UserError, match=rf"^operator aten\.add\.Tensor is aten::add\.Tensor\(.*called with {called}"):
        spell(node, [Ref("x")] * len(args), [])
