"""Tracing: what the graph holds, that layers are traced once, and what is refused."""

import pytest
import torch
from torch import nn

from nnscaler import Source, UserError, register_op
from nnscaler.graph import Call
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.operators import operator_of
from nnscaler.trace import build_on_meta, trace
from tests import tiny


def llama(**changes):
    config = tiny.config(**changes)
    prepare_config(config, tiny.LENGTH, "auto")
    tokens = torch.zeros(1, tiny.LENGTH, dtype=torch.long)
    return Source(lambda: CausalLM(config), {"input_ids": tokens, "labels": tokens}, torch.float32)


def traced(source, strategy="reuse_cache"):
    model, buffers = source.build()
    return trace(model, source.inputs, buffers, strategy)


def test_a_repeated_layer_is_one_block_called_with_its_own_parameters():
    graph = traced(llama(num_hidden_layers=7))
    (block,) = graph.blocks.values()
    assert block.name == "llama_decoder_layer"
    calls = [node for node in graph.root.nodes if isinstance(node, Call)]
    assert len(calls) == 7
    weights = [call.parameters["self_attn_q_proj_weight"] for call in calls]
    assert weights == [f"model.model.layers.{i}.self_attn.q_proj.weight" for i in range(7)]
    assert calls[1].inputs[0] == calls[0].outputs[0]
    assert sum(node.op == "attention" for node in block.nodes) == 1


def test_an_attribute_that_happens_to_equal_a_layers_index_does_not_single_it_out():
    # num_key_value_groups is 2 in every layer, and equals the index of the third.
    assert len(traced(llama(num_hidden_layers=4)).blocks) == 1


def test_tracing_everything_gives_the_same_graph():
    assert str(traced(llama(num_hidden_layers=3))) == str(traced(llama(num_hidden_layers=3), "meta"))


def test_layers_that_differ_are_different_blocks():
    class Layer(nn.Module):
        def __init__(self, wide: bool) -> None:
            super().__init__()
            self.wide = wide
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x).relu() if self.wide else self.linear(x).sigmoid()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(False), Layer(True), Layer(False), Layer(True)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x.sum()

    graph = traced(Source(Model, {"x": torch.zeros(4, 8)}, torch.float32))
    assert sorted(graph.blocks) == ["layer", "layer_2"]
    assert [len(graph.calls(name)) for name in graph.blocks] == [2, 2]
    assert [node.block for node in graph.root.nodes if isinstance(node, Call)] == ["layer", "layer_2"] * 2


def test_gradients_are_known_from_the_parameters():
    graph = traced(llama())
    root = graph.root.tensors
    assert not root["rotary_emb"].requires_grad
    assert root["embed_tokens"].requires_grad
    block = graph.blocks["llama_decoder_layer"]
    assert block.tensors["hidden_states"].requires_grad
    assert not block.tensors["position_embeddings_0"].requires_grad


def test_tied_parameters_appear_once():
    graph = traced(llama(tie_word_embeddings=True))
    assert graph.tied == {"model.lm_head.weight": "model.model.embed_tokens.weight"}
    assert "model.lm_head.weight" not in graph.parameters


def test_frozen_parameters_need_no_gradient():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.first.requires_grad_(False)

        def forward(self, x):
            return self.second(self.first(x)).sum()

    graph = traced(Source(Model, {"x": torch.zeros(2, 4)}, torch.float32))
    assert not graph.parameters["first.weight"].requires_grad
    assert not graph.root.tensors["first"].requires_grad
    assert graph.root.tensors["second"].requires_grad


def test_no_weight_takes_memory_but_buffers_have_values():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.big = nn.Linear(10**6, 10**5)  # 400 GB
            self.register_buffer("steps", torch.arange(5.0))

        def forward(self, x):
            return self.big(x).sum()

    model, buffers = build_on_meta(Model)
    assert model.big.weight.is_meta
    assert buffers["steps"].tolist() == [0, 1, 2, 3, 4]


def test_parameters_with_values_stay_tied_and_frozen():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(4))
            self.linear = nn.Linear(4, 4)
            self.linear.bias = self.bias
            self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    model, _ = build_on_meta(Model)
    assert model.linear.bias is model.bias
    assert [model.frozen.requires_grad, model.bias.requires_grad] == [False, True]
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_registered_function_is_one_node_whatever_it_does():
    @register_op("b d^ -> b", name="test_row_norm")
    def row_norm(x, power: int = 2):
        total = 0
        for column in x.unbind(1):
            total = total + column.abs() ** power
        return total

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return row_norm(self.linear(x), power=3).sum()

    graph = traced(Source(Model, {"x": torch.zeros(6, 4)}, torch.float32))
    (node,) = [node for node in graph.root.nodes if node.op == "test_row_norm"]
    assert node.args[1] == 3
    assert graph.root.tensors[node.outputs[0]].shape == (6,)
    assert torch.equal(row_norm(torch.full((1, 2), 2.0)), torch.tensor([8.0]))  # outside tracing: the function itself


def test_results_of_a_registered_function_are_those_of_its_own_arguments():
    """Called with tensors of other shapes and types, nothing else being different."""

    @register_op("b d -> b d", name="doubled")
    def doubled(x):
        return x + x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            y = self.linear(x)
            return doubled(y).sum() + doubled(y[:2]).sum() + doubled(y.double()).sum()

    graph = traced(Source(Model, {"x": torch.zeros(4, 8)}, torch.float32))
    found = [graph.root.tensors[node.outputs[0]] for node in graph.root.nodes if node.op == "doubled"]
    assert [(meta.shape, meta.dtype) for meta in found] == [
        ((4, 8), torch.float32), ((2, 8), torch.float32), ((4, 8), torch.float64),
    ]  # fmt: skip


def test_a_name_can_be_registered_by_one_function_only():
    register_op("a -> a", name="test_taken")(lambda x: -x)
    with pytest.raises(UserError, match="'test_taken' is already registered"):
        register_op("a -> a", name="test_taken")(tiny.close)
    with pytest.raises(UserError, match="expected '->'"):
        register_op("a b")


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else x


def test_reading_a_value_is_refused_in_one_line():
    with pytest.raises(UserError, match="reads a tensor's value while it is traced"):
        traced(Source(Reads, {"x": torch.zeros(2, 4)}, torch.float32))


def test_an_operator_without_annotation_is_named_with_its_line_and_what_to_do():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return torch.linalg.qr(self.linear(x))[0].sum()

    graph = traced(Source(Model, {"x": torch.zeros(4, 4)}, torch.float32))
    (node,) = [node for node in graph.root.nodes if "qr" in node.op]
    with pytest.raises(UserError, match=r"linalg_qr.*called at test_trace.py:\d+.*@nnscaler.register_op"):
        operator_of(node)
