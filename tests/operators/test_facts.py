"""What the tables say that backward keeps, and how much arithmetic there is, against what torch itself does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from nnscaler.graph import Block, Node, Ref, TensorMeta
from nnscaler.operators import arguments, bind, operator_of
from nnscaler.operators.registry import Operator, no_flops
from nnscaler.operators.verify import gradients, meta_of
from nnscaler.units import saved_by
from tests.operators.calls import node_of, run_text
from tests.operators.samples import known, samples

SIZES = (8, 6, 10, 12)
KEEPS_MORE = {
    "nnscaler.dropout.default": "a byte, not an element, for each element",
    "aten.cross_entropy_loss.default": "sums of weights, probabilities",
    "aten.group_norm.default": "a mean and a deviation for each group",
    "aten.log_sigmoid.default": "a buffer, on CPUs only",
    "aten.matmul.default": "copies of an input whose batch is broadcast",
    "aten.rms_norm.default": "what is normalised, where no kernel does it in one",
    "aten.scaled_dot_product_attention.default": "scores, where no kernel does it in one",
}


def saved(node: Node, block: Block, tensors: Sequence[Tensor]) -> tuple[set[str], int]:
    """(inputs and results that autograd keeps, elements of what else it keeps)."""
    kept: list[Tensor] = []
    metas = [block.tensors[name] for name in node.outputs]
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        results = run_text(node, tensors, metas)
    storage = {
        tensor.untyped_storage().data_ptr(): name
        for name, tensor in [*zip(node.outputs, results), *zip(node.inputs, tensors)]
    }
    names, other = set(), {}
    for tensor in kept:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in storage:
            names.add(storage[pointer])
        else:
            other[pointer] = tensor.untyped_storage().nbytes() // tensor.itemsize
    return names, sum(other.values())


def kept_inside(node: Node, block: Block, tensors: Sequence[Tensor]) -> int:
    """Elements that the table says backward keeps beside inputs and results."""
    kept = operator_of(node).keeps(bind(node, block).sizes, node, [meta_of(tensor) for tensor in tensors])
    return int(kept) // tensors[0].itemsize


def with_gradients(node: Node, block: Block, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The arguments with a gradient for all, and for each alone."""
    able = [i for i, tensor in enumerate(tensors) if tensor.requires_grad]
    for chosen in [able, *([i] for i in able if len(able) > 1)]:
        yield [tensor.detach().requires_grad_(i in chosen) for i, tensor in enumerate(tensors)]


@pytest.mark.parametrize("op", known())
def test_what_backward_keeps_is_what_autograd_keeps(op):
    torch.manual_seed(0)
    for args, kwargs in samples(*SIZES)[op]:
        node, block, tensors = node_of(op, args, kwargs)
        for chosen in with_gradients(node, block, tensors):
            block.tensors.update({name: meta_of(tensor) for name, tensor in zip(node.inputs, chosen)})
            needs = any(tensor.requires_grad for tensor in chosen)
            for name in node.outputs:
                meta = block.tensors[name]
                block.tensors[name] = replace(meta, requires_grad=needs and meta.dtype.is_floating_point)
            if not any(block.tensors[name].requires_grad for name in node.outputs):
                continue
            found, other = saved(node, block, chosen)
            wanted = set(saved_by(node, block))
            call = f"{op}({node.args}, {node.kwargs}) of {[(tuple(t.shape), t.requires_grad) for t in chosen]}"
            why = f"{call}: the table says {wanted}, autograd keeps {found} and {other} elements"
            assert found <= wanted, why
            if op not in KEEPS_MORE:
                instead = sum(block.tensors[name].numel for name in wanted - found)
                instead += kept_inside(node, block, chosen)
                last = max(block.tensors[node.outputs[0]].shape[-1:], default=1)
                rows = block.tensors[node.outputs[0]].numel // max(last, 1)
                assert instead <= other <= instead + 2 * rows, why  # a mean and a deviation for each row


@pytest.mark.parametrize("op", [op for op in known() if operator_of(Node("", op, (), {}, ())).flops is not no_flops])
def test_arithmetic_is_what_torch_counts(op):
    torch.manual_seed(0)
    for args, kwargs in samples(*SIZES)[op]:
        node, block, tensors = node_of(op, args, kwargs)
        operator, bound = operator_of(node), bind(node, block)
        for chosen in with_gradients(node, block, tensors):
            metas = [meta_of(tensor) for tensor in chosen]
            forward, backward = counted(node, block, chosen)
            if not forward:
                continue  # a product with a vector, of which torch does not count the arithmetic
            call = f"{node.op}({node.args}, {node.kwargs}) of {[(meta.shape, meta.requires_grad) for meta in metas]}"
            flops = operator.flops(bound.sizes, node)
            assert flops == pytest.approx(forward), f"{call}: {flops}, torch counts {forward}"
            if arguments(node).get("groups", 1) > 1:
                continue  # torch counts backward as if there were one group
            said = operator.backward_ratio(node, metas) * flops
            assert said == pytest.approx(backward), f"{call}: backward {said}, torch counts {backward}"


@pytest.mark.parametrize(
    ("given", "wanted"), [(None, 2.0), (0.0, 0.0), (2.5, 2.5), (lambda node, inputs: len(inputs) / 2, 1.5)]
)
def test_backward_is_as_large_as_an_operator_says(given, wanted):
    """Where it says nothing, once for each of the three inputs that has a gradient."""
    metas = [TensorMeta((4, 6), torch.float32, trained) for trained in (True, False, True)]
    operator = Operator("own", lambda *shapes: "", backward=given)
    assert operator.backward_ratio(Node("own", "own", tuple(map(Ref, "abc")), {}, ("own",)), metas) == wanted


def share_seen(rows: int, keys: int, is_causal: bool, window: tuple[int | None, int | None] | None) -> float:
    """The part of the scores that a mask leaves; torch counts all."""
    after = torch.arange(keys) - torch.arange(keys - rows, keys).unsqueeze(1)
    left, right = (rows + keys if side is None else side for side in window or (None, None))
    return ((after >= -left) & (after <= (0 if is_causal else right))).double().mean().item()


def counted(node: Node, block: Block, tensors: Sequence[Tensor]) -> tuple[float, float]:
    """Operations of forward and backward."""
    if "attention" in node.op:
        query, key, value = (list(tensor.shape) for tensor in tensors[:3])
        shapes = [[*query[:-2], *shape[-2:]] for shape in (query, key, value)]
        shapes = [[1] * (4 - len(shape)) + shape for shape in shapes]
        gradient = [*shapes[0][:-1], shapes[2][-1]]
        seen = share_seen(query[-2], key[-2], **{name: arguments(node).get(name) for name in ("is_causal", "window")})
        return seen * sdpa_flop_count(*shapes), seen * sdpa_backward_flop_count(gradient, *shapes)
    with FlopCounterMode(display=False) as counter:
        results = run_text(node, tensors, [block.tensors[name] for name in node.outputs])
        forward = counter.get_total_flops()
        gradients(results, tensors, [torch.ones_like(result) for result in results])
    return forward, counter.get_total_flops() - forward
