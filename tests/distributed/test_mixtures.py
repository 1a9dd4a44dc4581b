"""Mixtures of experts on several processes: losses and gradients are those of plain transformers, however split."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nnscaler.compiler import ComputeConfig, Source, compile_model
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.runtime.module import ParallelModule
from tests import tiny
from tests.launch import run
from tests.models.architectures import LENGTH, batch, config_of, plain, random_weights

TOLERANCE = 1e-5
# Links on which it pays to let weights travel, and tokens.
FAST, SLOW = ({"bandwidth": bandwidth, "latency": 0.0} for bandwidth in (1e12, 1e8))

FAMILIES: dict[str, dict[str, Any]] = {  # of two layers
    "mixtral": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 24, "sliding_window": None, "use_sliding_window": False},
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {},
    "granitemoe": {},
    "glm4_moe": {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "n_routed_experts": 8},
    "deepseek_v3": {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "n_routed_experts": 8},
    "gpt_oss": {"layer_types": ["full_attention"] * 2},
}
OWN_ATTENTION = ("gpt_oss", "qwen2_moe")


@dataclass(frozen=True)
class Case:
    """A family's model on `plan` of `runtime` devices; `split`: how its experts are divided then."""

    family: str
    plan: int
    runtime: int
    split: str
    link: dict[str, float]
    changes: dict[str, Any] = field(default_factory=dict)
    one_layer: bool = False  # of experts: a plan on two axes is found many times sooner

    @property
    def name(self) -> str:
        return f"{self.family}-{self.plan}x{self.runtime}-{self.split.replace(' ', '')}"

    def config(self) -> Any:
        fields = dict(FAMILIES[self.family])
        if self.one_layer:
            fewer = {"layer_types": ["full_attention"], "first_k_dense_replace": 0}
            fields |= {"num_hidden_layers": 1, **{name: fewer[name] for name in fewer.keys() & fields.keys()}}
        return config_of(self.family, **{**fields, **self.changes})


def compiled(case: Case, folder: Path) -> Path:
    config = case.config()
    prepare_config(config, LENGTH, "eager" if case.family in OWN_ATTENTION else "auto")
    tokens, labels = batch(LENGTH)
    hardware = tiny.write_hardware(folder, f"{case.name}.json", intra=case.link, inter=case.link)
    return compile_model(
        Source(lambda: CausalLM(config), {"input_ids": tokens[:1], "labels": labels[:1]}, torch.float32),
        ComputeConfig(case.plan, case.runtime, hardware=hardware), folder / case.name,
    )  # fmt: skip


def splits(code: Path) -> set[str]:
    """How experts are divided; on two axes, which are alike here, in the order of their names."""
    blocks = json.loads((code / "plan.json").read_text())["blocks"].values()
    found = [node["split"] for block in blocks for node in block["nodes"].values() if node["op"] == "experts"]
    return {",".join(sorted(split.split(","))) for split in found}


def rows(copy: int, copies: int) -> dict[str, Tensor]:
    """The sequence of one copy."""
    tokens, labels = batch(LENGTH)
    return {"input_ids": tokens[copy : copy + 1], "labels": labels[copy : copy + 1]}


def on_a_device(cases: list[Case], codes: list[Path]) -> list[tuple[float, list[tuple[str, Any, np.ndarray]]]]:
    """For each case this process' part of the loss, and of the gradients: (name, box, values)."""
    found = []
    for case, code in zip(cases, codes):
        weights = random_weights(case.config())
        module = ParallelModule(code, torch.device("cpu"))
        module.load(
            lambda name, box: weights[name.removeprefix("model.")].view(module.specs[name].shape)[box.slices]  # noqa: B023
        )
        copies = case.runtime // case.plan
        loss = module.accumulate([rows(module.axes.replica, copies)]).item() / case.plan
        parts = [
            (part.name.removeprefix("model."), part.box, bucket.gradient[part.start : part.stop].numpy())
            for bucket in module.buckets
            for part in bucket.owned_parts()
        ]
        found.append((loss, parts))
    return found


def wanted(case: Case) -> tuple[float, dict[str, Tensor]]:
    tokens, _ = batch(LENGTH)
    return plain(case.config(), random_weights(case.config()), tokens[: case.runtime // case.plan])


def check(cases: list[Case], folder: Path) -> None:
    codes = [compiled(case, folder) for case in cases]
    for case, code in zip(cases, codes):
        assert splits(code) == {case.split}, case.name
    devices = run(cases[0].runtime, on_a_device, cases, codes)
    for case, code, *parts in zip(cases, codes, *devices):
        loss, gradients = wanted(case)
        assert sum(part for part, _ in parts) == pytest.approx(loss, rel=TOLERANCE), case.name
        for name, found in together(code, [part for _, each in parts for part in each]):
            assert tiny.close(found.view_as(gradients[name]), gradients[name]) < TOLERANCE, (case.name, name)


def together(code: Path, parts: list[tuple[str, Any, np.ndarray]]) -> Iterator[tuple[str, Tensor]]:
    """The whole gradients by name."""
    shapes = json.loads((code / "plan.json").read_text())["parameters"]
    wholes: dict[str, Tensor] = {}
    for name, box, values in parts:
        whole = wholes.setdefault(name, torch.full(shapes[f"model.{name}"]["shape"], torch.nan))
        whole[box.slices] = torch.from_numpy(values).view(box.sizes)
    yield from wholes.items()


def test_each_way_to_split_on_two_devices(tmp_path):
    cases = [
        Case("mixtral", 2, 2, "t", FAST),
        Case("mixtral", 2, 2, "t n", SLOW),
        Case("mixtral", 2, 2, "f", SLOW, {"num_local_experts": 5}),
        Case("mixtral", 1, 2, "-", FAST),
    ]
    check(cases, tmp_path)


def test_two_axes_and_copies_on_four_devices(tmp_path):
    cases = [
        Case("mixtral", 4, 4, "t,t n", {**SLOW, "bandwidth": 1e9}, {"num_local_experts": 16}, one_layer=True),
        Case("mixtral", 4, 4, "f,f", SLOW, {"num_local_experts": 5}, one_layer=True),
        Case("qwen3_moe", 2, 4, "t", SLOW),
        Case("gpt_oss", 2, 4, "f", SLOW, {"num_local_experts": 5}),  # biases that are added once
    ]
    check(cases, tmp_path)


BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


def test_the_loss_that_keeps_loads_even_counts_over_all_devices_and_copies(tmp_path):
    check([Case("mixtral", 1, 2, "-", FAST, BALANCED), Case("qwen3_moe", 2, 2, "t", SLOW, BALANCED)], tmp_path)
    code = tmp_path / "mixtral-1x2--"
    assert "average_over_copies_among_copies(axes.copies" in (code / "gencode_stage0.py").read_text()
    blocks = json.loads((code / "plan.json").read_text())["blocks"]
    assert "mixtral_decoder_layer" in blocks, "a layer that reports its router's logits is still traced once"


@pytest.mark.parametrize(
    ("family", "split"),
    [
        ("qwen2_moe", "t n,t n"), ("qwen3_moe", "t n,t n"), ("olmoe", "t n,t n"), ("granitemoe", "t n,t n"),
        ("glm4_moe", "t n,t n"), ("deepseek_v3", "t n,t n"), ("gpt_oss", "t n,t n"),
    ],
)  # fmt: skip
def test_each_family_on_four_devices(family, split, tmp_path):
    check([Case(family, 4, 4, split, SLOW, one_layer=True)], tmp_path)


def test_experts_that_do_not_divide_on_four_devices(tmp_path):
    check([Case("glm4_moe", 4, 4, "f,t n", SLOW, {"n_routed_experts": 6}, one_layer=True)], tmp_path)
