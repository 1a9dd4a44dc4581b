"""A layer whose attention is computed by groups of heads, and what is around it by some tokens, beside the plain model:
losses and gradients are equal within fp32's rounding."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nnscaler import Source
from nnscaler.codegen import generate
from nnscaler.codegen.segments import Region, _alike
from nnscaler.graph import Graph
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.pieces import stretches, with_registered
from nnscaler.placement import PARTIAL, REPLICATE
from nnscaler.plan import Plan
from nnscaler.planner import find_plan
from nnscaler.recompute import RECOMPUTES_ALL
from nnscaler.trace import trace
from tests import tiny
from tests.parity import heads_in_attention_alone

LAYER = "llama_decoder_layer"


def plain() -> CausalLM:
    config = tiny.config(num_key_value_heads=2)
    prepare_config(config, tiny.LENGTH, "auto")
    return CausalLM(config).float()


def biased() -> CausalLM:
    """A model with biases and tied weights, large enough that no gradient is what rounding leaves of a sum."""
    config = tiny.config(num_key_value_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    prepare_config(config, tiny.LENGTH, "auto")
    model = CausalLM(config).float()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "proj" in name and not weight.is_meta:
            nn.init.normal_(weight, std=0.4, generator=generator)
    return model


def shared() -> CausalLM:
    """The same, with weights that two products of a layer have in common: within attention, and around it."""
    model = biased()
    for layer in model.model.model.layers:
        layer.self_attn.v_proj.weight = layer.self_attn.k_proj.weight
        layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight
    return model


def planned(make: Callable[[], CausalLM]) -> Plan:
    tokens = {name: torch.zeros(1, tiny.LENGTH, dtype=torch.long) for name in ("input_ids", "labels")}
    made, buffers = Source(make, tokens, torch.float32).build()
    return find_plan(trace(made, tokens, buffers), [Mesh((1,))], load_hardware("h100"))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned(plain)


@pytest.fixture(scope="module")
def sample() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randint(tiny.VOCABULARY, (1, tiny.LENGTH), generator=generator) for n in ("input_ids", "labels")}


def names(graph: Graph) -> tuple[str, str, str]:
    """Of the layer's stretches: before attention, with attention, after it."""
    layer = graph.blocks[LAYER]
    before, after = stretches(layer)
    (heads,) = with_registered(layer, [before, after])
    return before.name, heads.name, after.name


@pytest.fixture(scope="module", params=[plain, biased, shared], ids=lambda make: make.__name__)
def made(request, plan) -> tuple[Callable[[], CausalLM], Plan]:
    return request.param, plan if request.param is plain else planned(request.param)


@pytest.mark.parametrize(("before", "heads", "after"), [(1, 2, 1), (4, 2, 1), (1, 2, 8), (4, 2, 4)])
def test_heads_at_a_time_are_those_of_the_plain_model(before, heads, after, made, sample):
    make, plan = made
    torch.manual_seed(0)
    model = make()
    counts = dict(zip(names(plan.graph), (before, heads, after)))
    plan.levels[LAYER] = {RECOMPUTES_ALL: 2}
    plan.pieces = {(LAYER, name): count for name, count in counts.items() if count > 1}
    code: dict[str, object] = {}
    exec(generate(plan), code)
    trained = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
    axes = SimpleNamespace(device=torch.device("cpu"), gathers=SimpleNamespace(settle=lambda: None))
    tied = {name: trained[path] for name, path in plan.graph.tied.items() if path in trained}
    loss = code["forward"]({**plan.graph.buffers, **trained, **tied}, axes, sample["input_ids"], sample["labels"])
    loss.backward()
    plain_loss = model(**sample)
    wanted = dict(zip(trained, torch.autograd.grad(plain_loss, list(model.parameters()))))
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
    for name, right in wanted.items():
        assert (trained[name].grad - right).norm() <= 1e-6 * right.norm(), name


def on_two_devices(key_value_heads: int, folder: Path) -> Plan:
    """The plan of a model whose heads are divided in attention, and tokens elsewhere, with two groups of heads."""
    config = tiny.config(num_key_value_heads=key_value_heads)
    prepare_config(config, tiny.LENGTH, "auto")
    tokens = {name: torch.zeros(1, tiny.LENGTH, dtype=torch.long) for name in ("input_ids", "labels")}
    model, buffers = Source(lambda: CausalLM(config).float(), tokens, torch.float32).build()
    graph = trace(model, tokens, buffers)
    heads_in_attention_alone(graph)
    plan = find_plan(graph, [Mesh((2,))], load_hardware(tiny.write_hardware(folder)))
    plan.levels[LAYER], plan.pieces = {RECOMPUTES_ALL: 2}, {(LAYER, names(graph)[1]): 2}
    return plan


def test_units_are_one_region_only_where_they_are_computed_alike(plan):
    """What is computed in pieces with an operator, say, is none with what is not."""
    before, after = stretches(plan.graph.blocks[LAYER])
    made = [{}, {"recomputed": True}]
    made += [{where: stretch} for where in ("stretch", "around") for stretch in (before, after)]
    for one, other in itertools.product(made, made):
        assert _alike(Region([], **one), Region([], **other)) == (one == other)


def test_a_piece_has_heads_of_each_device(tmp_path):
    assert ", (0, 2), (0, 2), None), (2,), " in generate(on_two_devices(4, tmp_path))


def test_what_cannot_be_divided_so_is_not_generated(tmp_path):
    plan = on_two_devices(2, tmp_path)
    with pytest.raises(AssertionError, match="cannot be divided into the 2 pieces of"):  # a head for each device
        generate(plan)
    for name, changes, reason in (
        ("input_layernorm", {"outputs": ((REPLICATE,),)}, "input_layernorm is resharded"),
        ("transpose_2", {"outputs": ((PARTIAL,),)}, "transpose_2 is a partial sum"),  # what makes values for attention
    ):
        plan = on_two_devices(4, tmp_path)
        plan.nodes[LAYER, name] = replace(plan.nodes[LAYER, name], **changes)
        with pytest.raises(AssertionError, match=f"{reason} inside the pieces of"):
            generate(plan)
