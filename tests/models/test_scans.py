"""What runs over tokens in state-space layers and linear attention is one operator, split over samples and channels."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nnscaler import verify_op
from nnscaler.graph import Node
from nnscaler.models import scans
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.models.scans import SCANS
from nnscaler.operators.registry import all_registered, leaf_tracer
from nnscaler.operators.scans import scan
from nnscaler.trace import build_on_meta, trace
from tests.models.architectures import batch, compare, config_of

SIZES = {"b": 2, "l": 6, "d": 4, "n": 4, "p": 4}
# Of each kernel: a model, its function, options, and whether heads share keys.
FUNCTIONS = {
    "selective_scan_fn": ("mamba", "mamba_selective_scan", {"delta_softplus": True}, False),
    "mamba_chunk_scan_combined": ("mamba2", "mamba2_chunk_scan", {"chunk_size": 4, "dt_softplus": True}, True),
    "chunk_gated_delta_rule": ("qwen3_next", "torch_chunk_gated_delta_rule", {"chunk_size": 4}, True),
    "chunk_kda": ("kimi_linear", "chunk_kimi_delta_attention", {"chunk_size": 4}, False),
}


@pytest.mark.parametrize("groups", [{"k": 2, "r": 2}, {"k": 1, "r": 4}, {"k": 4, "r": 1}], ids=str)
@pytest.mark.parametrize("kernel", SCANS)
def test_samples_and_channels_are_computed_apart(kernel, groups):
    model, name, options, heads = FUNCTIONS[kernel]
    module = f"transformers.models.{model}.modeling_{model}"
    if groups["r"] > 1 and not (heads and shares(getattr(importlib.import_module(module), name))):
        pytest.skip("its heads share nothing")
    sizes = SIZES | groups
    texts = SCANS[kernel]
    if groups["k"] == 1:  # which cannot be tried
        texts = {key: re.sub(r" k ", " 1 ", text.replace("(k r)", "r")) for key, text in texts.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(shape_of(text, sizes), generator=generator) for key, text in texts.items() if key}
    tensors |= {key: -tensors[key].abs() for key in {"A", "g"} & tensors.keys()}  # by which states decay
    split = "d" if "d" in texts[""].split() else "r" if groups["k"] == 1 else "k"
    annotation = f"{', '.join(texts[key] for key in tensors)} -> {texts['']}"
    assert verify_op(scan, (f"{module}:{name}", annotation, tensors, options)) == ["b", split]


def shares(function: Callable[..., Any]) -> bool:
    """Whether it takes keys of fewer heads than values have: with transformers 5.17, layers repeat them before some."""
    return "repeat_interleave" in inspect.getsource(function)


def shape_of(text: str, sizes: dict[str, int]) -> list[int]:
    """The shape of a tensor that is annotated so."""
    groups = re.findall(r"\(.*?\)|\w+", text)
    return [math.prod(sizes[name] for name in re.findall(r"[a-z]", group)) for group in groups]


@pytest.mark.parametrize("name", ["mamba", "mamba2", "qwen3_next"])
def test_layers_with_a_state_are_those_of_transformers(name, tmp_path):
    assert compare(name, False, tmp_path).startswith("SAME")


def test_a_graph_has_as_many_operators_for_any_number_of_tokens():
    config = config_of("mamba", num_hidden_layers=1)
    prepare_config(config, 65536, "auto")
    model, buffers = build_on_meta(lambda: CausalLM(config))
    tokens, labels = batch(65536)
    graph = trace(model, {"input_ids": tokens, "labels": labels}, buffers)
    nodes = [node.op for block in (graph.root, *graph.blocks.values()) for node in block.nodes]
    assert nodes.count("scan") == 1
    assert len(nodes) < 100


def test_arithmetic_of_a_state():
    """Each of 2 * 3 * 5 * 7 numbers is decayed, added to, and read: three multiplications with an addition."""
    (operator,) = (one for one in all_registered() if one.name == "scan")
    node = Node("y", "scan", (), {}, ("y",))
    assert operator.flops({"b": 2, "l": 3, "d": 5, "n": 7}, node) == 3 * 2 * 210


def test_a_call_is_an_operator_where_operators_are_traced_and_nothing_else_is_asked_for(monkeypatch):
    """Neither a last state, nor what a tensor without an annotation makes of it."""
    given = []
    monkeypatch.setattr(scans, "_kernel", lambda function: "selective_scan_fn")
    monkeypatch.setattr(scans, "scan", lambda *arguments: given.append(arguments) or "operator")

    def plain(hidden_states, dt, z=None, state=None, softplus=False, return_last_state=False, **kwargs):
        return "function"

    def with_state(hidden_states, dt, output_final_state=False):
        return "function"

    x, dt = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    call = scans._as_operator("module:plain", plain)
    assert call(x, dt) == "function"
    token = leaf_tracer.set(lambda *given: None)
    try:
        assert call(x, dt=dt, softplus=True, return_last_state=False) == "operator"
        assert call(x, dt, return_last_state=True) == "function"
        assert call(x, dt, state=x) == "function"
        assert scans._as_operator("module:with_state", with_state)(x, dt) == ("operator", None)
        assert scans._as_operator("module:with_state", with_state)(x, dt, True) == "function"
    finally:
        leaf_tracer.reset(token)
    tensors = {"hidden_states": x, "dt": dt}
    assert given == [
        ("module:plain", "b d l^, b d l^ -> b d l^", tensors, {"softplus": True}),
        ("module:with_state", "b d l^, b d l^ -> b d l^", tensors, {}),
    ]
