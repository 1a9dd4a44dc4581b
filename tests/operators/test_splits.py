"""Along which names calls can be split, what is a view, and which operators there are: as few are as bad as wrong."""

from __future__ import annotations

import pytest
import torch

from nnscaler.graph import Node, Ref, TensorMeta
from nnscaler.operators import bind, operator_of
from nnscaler.operators.attention import attention
from nnscaler.operators.experts import experts
from nnscaler.operators.pointwise import broadcast
from nnscaler.operators.registry import no_flops
from tests.operators.calls import node_of, run
from tests.operators.samples import known, samples

SIZES = (4, 2, 6, 4)

# For each sample of an operator: the names along which two devices can divide it. "." is none.
SPLITS = {
    # What is summed may be; what else is combined along a dimension stays whole, and so do means, but for other dims.
    "sum.default": "d0 d1 d2|d0 d1 d2|d0", "sum.dim_IntList": "d0 d1 d2|d0 d1 d2|d0 d1 d2|d0 d1 d2|d0 d1 d2|d0 d1 d2",
    "mean.default": ".|.", "mean.dim": "d0 d1|d2|.|d0 d2", "prod.dim_int": "d0", "amax.default": "d0 d2|.|d1",
    "amin.default": "d0 d1", "argmax.default": ".|d0 d2|d0 d1", "any.dim": "d0|d0", "all.dim": "d1", "max.dim": "d0 d2",
    "min.dim": "d0 d1", "var.correction": "d0 d2|d0 d1|.|.", "std.correction": "d0 d2|d1 d2", "var.dim": "d0 d2|d0 d2",
    "std.dim": "d0 d1", "norm.ScalarOpt_dim": "d0 d2|d0 d1|d1 d2", "linalg_vector_norm.default": "d0 d1|.|d0 d2",
    "logsumexp.default": "d0 d2|d1", "histc.default": "d0 d1|.|d0 d1", "softmax.int": "d0 d1|d0 d2|d1 d2",
    "_softmax.default": "d0 d2", "cumsum.default": "d0 d2|d0|d0", "cumprod.default": "d0 d2|d0 d1",
    "sort.default": "d0 d2|d0 d1", "topk.default": "d0 d1|d1 d2|d0 d2", "argsort.default": "d0 d2|d0 d1",
    "diff.default": "d0 d1|d0 d1|d0 d1|d1 d2", "layer_norm.default": "d0 d1|d0|d0 d1|d0 d1|d0 d1",
    "rms_norm.default": "d0 d1|d0|d0 d1", "group_norm.default": "n|n",
    "cross_entropy_loss.default": ".|n|n|n d2|n|.|n|n|.|.", "mse_loss.default": ".|d0 d1 d2|d0 d1 d2",
    # Products: all that is combined, too.
    "linear.default": "*0 *1 k n|*0 k n|k n", "mm.default": "m k n", "bmm.default": "b m k n",
    "addmm.default": "n m k|n m k|n m k|n m k", "baddbmm.default": "b m n k|b m n k|b m n k",
    "matmul.default": "b0 m k n|b0 m k n|b0 b1 m k n|k|b0 m k|b0 k n|b0 b1 m k n",
    "einsum.default": "a b c d|b h l d s|a b|e0 e1 c d|i j k|a b|e0 e1 c",
    # Tables: their rows are whole, their columns and what is looked up are not.
    "embedding.default": "h d0 d1|h d0|h d0 d1|h", "one_hot.default": "d0 d1", "gather.default": "d0 d1|d0 d2|d2",
    "index_select.default": "d0 d2 i|d0 d1 i", "scatter.src": "d0 d2|d0 d1", "scatter_add.default": "d0 d2|d1",
    "index.Tensor": "d1 d2 i0|d0 d2 i0 i1|d2 i0 i1|d1 i0|i0 i1|d0 i0|d0 d2 i0",
    "index_put.default": "d0 d2|d1 d2|d0 d2|d1 d2|d2|d0 d1|d1|d1 d2|d0 d2",
    # Views, and what is put together.
    "view.default": "d0 d2|d0 d1|d0 d2|d0 d1 d2|d0|.|d0 d1 d2|.", "reshape.default": "d0 d1|d0 d1",
    "flatten.using_ints": "d0 d2|d0 d1|d0|d0 d1", "unflatten.int": "d0 d2|d0 d1", "expand_as.default": "d0 d1 d2",
    "expand.default": "d0 d2|d1|d0 d2|d1|d0 d2", "transpose.int": "d0 d1 d2|d0 d1 d2", "t.default": "d0 d1|d0",
    "permute.default": "d0 d1 d2|d0 d1 d2", "movedim.int": "d0 d1 d2|d0 d1 d2", "movedim.intlist": "d0 d1 d2",
    "unsqueeze.default": "d0 d1 d2|d0 d1 d2|d0 d1 d2", "squeeze.default": "d0 d2", "squeeze.dim": "d0 d2|d0 d2",
    "squeeze.dims": "d0 d2|d0 d2", "narrow.default": "d1 d2|d0 d1", "split.Tensor": "d0 d2|d1 d2|d0 d1",
    "chunk.default": "d0 d1|d1 d2", "select.int": "d0 d2|d0 d1|d1 d2", "unbind.int": "d0 d2|d1 d2|d0 d1",
    "cat.default": "d0|d1|d0 d1", "stack.default": "d0 d1|d0|d0 d1 d2",
    "constant_pad_nd.default": "d0 d1|d0|d0 d1|d0 d1",
    "pad.default": "d0 d1|d0 d2|d0 d1", "slice_scatter.default": "d0 d2|d0 d1|d1", "repeat.default": "d1|d0",
    "select_scatter.default": "d0 d2|d0 d1", "repeat_interleave.self_int": "d0 d1 d2|d0|d0 d1 d2",
    "flip.default": "d1|d0 d1", "roll.default": "d0 d2|d1|.", "tril.default": "d0|.", "triu.default": "d0|d0",
    # Images, and attention.
    "conv1d.default": "n o|n c|n c|o|n|n o", "conv2d.default": "n o", "avg_pool1d.default": "n0 n1|n0",
    "max_pool2d.default": "n0 n1|n0", "adaptive_avg_pool2d.default": "n0 n1|n0 n1|n0 n1",
    "pixel_shuffle.default": "n0 h w c|h w c",
    "upsample_nearest2d.vec": "n0 n1|n0 n1",
    "scaled_dot_product_attention.default": "b0 k|b0 k l|b0 k|b0 k l|b0 k l|b0 k l|b0 k|k l",
}  # fmt: skip


def names(op: str, args: tuple, kwargs: dict) -> set[str]:
    node, block, _ = node_of(op, args, kwargs)
    return {way.name for way in bind(node, block).splits(2) if way.name}


@pytest.mark.parametrize("op", SPLITS)
def test_a_call_can_be_split_along_all_that_allows_it(op):
    torch.manual_seed(0)
    wanted = [set() if one == "." else set(one.split()) for one in SPLITS[op].split("|")]
    assert [names(f"aten.{op}", *call) for call in samples(*SIZES)[f"aten.{op}"]] == wanted


def test_what_is_computed_element_by_element_can_be_split_along_every_dimension():
    torch.manual_seed(0)
    pointwise = [op for op in known() if operator_of(Node("", op, (), {}, ())).annotate is broadcast]
    pointwise = [op for op in pointwise if op.removeprefix("aten.") not in SPLITS]
    assert len(pointwise) > 100
    for op in pointwise:
        for args, kwargs in samples(*SIZES)[op]:
            node, block, _ = node_of(op, args, kwargs)
            shape = block.tensors[node.outputs[0]].shape
            assert names(op, args, kwargs) == {f"d{dim}" for dim, size in enumerate(shape) if size > 1}, op


def test_every_operator_that_has_a_sample_is_in_the_tables():
    assert set(samples(*SIZES)) == set(known())


MULTIPLY = {
    "addmm.default", "baddbmm.default", "bmm.default", "conv1d.default", "conv1d.padding", "conv2d.default",
    "conv2d.padding", "einsum.default", "linear.default", "matmul.default", "mm.default",
    "scaled_dot_product_attention.default",
}  # fmt: skip


def test_products_have_arithmetic():
    counted = {op for op in known() if operator_of(Node("", op, (), {}, ())).flops is not no_flops}
    assert counted == {*(f"aten.{op}" for op in MULTIPLY), "attention", "experts"}


# Sometimes they copy; or they are what does nothing, which a graph does not hold.
SOMETIMES_VIEWS = {"reshape.default", "contiguous.default", "einsum.default", "to.dtype_layout"}


def test_views_are_those_that_copy_nothing():
    torch.manual_seed(0)
    for op in known():
        if not op.startswith("aten.") or op.removeprefix("aten.") in SOMETIMES_VIEWS:
            continue
        for args, kwargs in samples(*SIZES)[op]:
            node, _, tensors = node_of(op, args, kwargs)
            given = {tensor.untyped_storage().data_ptr() for tensor in tensors}
            made = [one for one in run(node, tensors) if one.numel()]
            assert all(one.untyped_storage().data_ptr() in given for one in made) == operator_of(node).alias, op


def test_figures_of_experts_by_hand():
    """3 tokens of width 5 with 2 choices each, of 4 experts of inner size 7 with gate and rest, in 16 bits."""
    sizes, kinds = {"t": 3, "k": 2, "n": 4, "d": 5, "f": 7, "c": 2}, [(3, 5), (3, 2), (3, 2), (4, 2, 7, 5), (4, 5, 7)]
    inputs = [TensorMeta(shape, torch.bfloat16) for shape in kinds]
    operator, node = experts.operator, Node("", "experts", (), {}, ())
    assert operator.flops(sizes, node) == 6 * (2 * 5 * 14 + 2 * 7 * 5)
    assert operator.keeps(sizes, node, inputs) == 6 * (14 * 2 + 2 * 8)
    assert operator.workspace(sizes, node, inputs) == 6 * 2 * (2 * 5 + 2 * 14 + 2 * 7)
    # Of two devices, a token's two choices reach one and a half on average.
    assert operator.exchanges["t n"](sizes, 2, inputs) == 3 * 1.5 * 5 * 2


def test_figures_of_attention_by_hand():
    """2 sequences of 6 rows and 8 keys of size 5, values of size 3, 4 heads that share 2: backward sums in fp32."""
    sizes = {"b": 2, "k": 2, "g": 2, "l": 6, "s": 8, "d": 5, "e": 3}
    shapes = [(2, 4, 6, 5), (2, 2, 8, 5), (2, 2, 8, 3)]
    inputs = [TensorMeta(shape, torch.bfloat16) for shape in shapes]
    operator, given = attention.operator, tuple(map(Ref, "qkv"))
    node = Node("", "attention", given, {}, ())
    queries, keys, values = 2 * 4 * 6 * 5, 2 * 2 * 8 * 5, 2 * 2 * 8 * 3
    assert operator.workspace(sizes, node, inputs) == 4 * (queries + keys + values)
    assert operator.workspace({**sizes, "g": 1}, node, inputs) == 4 * queries, "each head has keys of its own"
    each = 2 * 2 * 4 * (5 + 3)  # of a row and a key
    assert operator.unmasked(sizes, node) == each * 6 * 8
    assert operator.flops(sizes, node) == each * (3 + 4 + 5 + 6 + 7 + 8), "the last row has the place of the last key"
    assert operator.backward_ratio(node, inputs) == (3 * 5 + 2 * 3) / (5 + 3)
    # Of documents of 4 tokens, a row sees two and a half on average; all of them, without a mask.
    node.kwargs["document_length"] = 4
    assert operator.flops(sizes, node) == each * 6 * 2.5
    assert operator.unmasked(sizes, node) == each * 6 * 4
    node.kwargs["document_length"] = 100
    assert operator.unmasked(sizes, node) == each * 6 * 8, "no more than there are"
    node.kwargs = {"window": (1, None)}
    assert operator.flops(sizes, node) == each * 6 * 2
    node.kwargs = {"window": (None, 1), "is_causal": False}
    assert operator.flops(sizes, node) == each * (4 + 5 + 6 + 7 + 8 + 8)


def test_a_mask_has_a_byte_for_what_may_be_dropped():
    numbers = [TensorMeta((size,), torch.int64) for size in (4, 6)]
    x, draws, place = (
        TensorMeta((4, 6, 5), torch.bfloat16),
        TensorMeta((1, 5), torch.int64),
        TensorMeta((), torch.int64),
    )
    keeps = operator_of(Node("", "nnscaler.dropout.default", (), {}, ())).keeps
    assert keeps({}, None, [x, draws, place, *numbers]) == 24, "features are dropped together"
    assert keeps({}, None, [x, draws, place, *numbers, TensorMeta((5,), torch.int64)]) == 120
