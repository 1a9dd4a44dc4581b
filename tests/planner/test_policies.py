"""Policies: what is pinned is what the plan does, and the model learns as the plain one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from nnscaler import ComputeConfig, Source, UserError, compile_model
from nnscaler.compiler import differences, identity
from nnscaler.graph import Call, Graph
from tests import tiny
from tests.plainly import Case, check, splits
from tests.test_modules import Vision, bert, images, labels, loss_of, total, words

LINEAR = "aten.linear.default"


def own(graph: Graph) -> None:
    """The MLP by columns and not at all; and where some parameters lie."""
    for block in graph.all_blocks():
        for node in block.nodes:
            if node.module.endswith("linear1"):
                node.pin("n")
            if node.module.endswith("linear2"):
                node.pin(None)
            if node.module == "head":
                node.pin("*0", "k")
    graph.store("head.weight", 1)
    graph.store("blocks.0.linear2.weight", None)


def parameters(code: Path) -> dict[str, str]:
    """Name -> layout of each parameter of a compiled plan."""
    plan = json.loads((code / "plan.json").read_text())
    return {name: one["layout"] for name, one in plan["parameters"].items()}


def test_plans_do_what_is_pinned_and_learn_as_plain_modules(tmp_path):
    torch.manual_seed(0)
    asked = [words(seed, labels=labels(seed, 4) % 2) for seed in range(2)]
    cases = {
        "dp": Case(bert(0), asked, loss_of, options={"pas_policy": "dp"}),
        "tp": Case(bert(0), asked, loss_of, compute={"pas_policy": "tp"}),
        "own": Case(Vision(), images(2), total, options={"pas_policy": own}),
    }
    check(tmp_path, cases)
    assert {split for op, split in splits(tmp_path / "dp") if op == LINEAR} == {"*0"}
    assert set(parameters(tmp_path / "dp").values()) <= {"R", "R*"}
    assert "gathers.weight" not in (tmp_path / "dp" / "gencode_stage0.py").read_text()

    assert {split for op, split in splits(tmp_path / "tp") if op == LINEAR} == {"k", "n"}
    for block in json.loads((tmp_path / "tp" / "plan.json").read_text())["blocks"].values():
        for node in block["nodes"].values():  # the weight is sharded, and the rows of no input are
            assert node["op"] != LINEAR or (node["inputs"][1][0] == "S" and node["inputs"][0] != "S(0)")

    of_block = json.loads((tmp_path / "own" / "plan.json").read_text())["blocks"]["transformer_encoder_layer"]["nodes"]
    assert of_block["linear1"]["split"] == "n"
    assert of_block["linear2"]["split"] == "-"
    assert parameters(tmp_path / "own")["head.weight"] == "S(1)"
    assert {parameters(tmp_path / "own")[f"blocks.{index}.linear2.weight"] for index in range(2)} == {"R*"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


def compiled(folder: Path, policy: object, rows: int = 4, devices: int = 2) -> Path:
    config = ComputeConfig(devices, devices, hardware=tiny.write_hardware(folder), pas_policy=policy)
    return compile_model(Source(Net, {"x": torch.zeros(rows, 8)}, torch.float32), config, folder / "code")


def pin_first(*names: str | None):
    def policy(graph: Graph) -> None:
        graph.root.nodes[0].pin(*names)

    return policy


@pytest.mark.parametrize(
    ("policy", "wrong"),
    [
        ("zero", "pas_policy is 'zero'; allowed are autodist, dp, tp"),
        (pin_first("rows"), r"the policy pins aten.linear.default 'first' at test_policies.py:\d+ to 'rows'; it can "),
        (pin_first(), r"'first' at test_policies.py:\d+ to nothing; it can be split along '\*0', 'k', 'n', and"),
        (lambda graph: [one.pin(None) for one in graph.root.nodes if isinstance(one, Call)], "pin the nodes of that"),
        (lambda graph: graph.store("last.weight", 0), "the model uses no parameter 'last.weight'; it has"),
        (lambda graph: graph.store("first.weight", 2), r"cannot store 'first.weight' \[8, 8\] along 2"),
    ],
)  # fmt: skip
def test_what_no_plan_can_do_is_one_line(policy, wrong, tmp_path):
    with pytest.raises(UserError, match=wrong):
        compiled(tmp_path, policy)


def test_sizes_that_do_not_divide_are_one_line(tmp_path):
    with pytest.raises(UserError, match="the first dimension of 'x', is 3; it must be a multiple of 2"):
        compiled(tmp_path, "dp", rows=3)
    with pytest.raises(UserError, match=r"on 1 copy x 2 devices the policy cannot pin .* 'first' to \*0 \(its sizes"):
        compiled(tmp_path, pin_first("*0"), rows=3)
    assert [split for op, split in splits(compiled(tmp_path, pin_first("*0"), devices=4)) if "*0" in split]


def test_another_policy_is_another_plan(tmp_path):
    hardware = tiny.write_hardware(tmp_path)
    source = Source(Net, {"x": torch.zeros(4, 8)}, torch.float32)

    def changed(policy: object) -> list[str] | None:
        config = ComputeConfig(2, 2, hardware=hardware, pas_policy=policy)
        return differences(tmp_path / "code", identity(source, source.build(), config))

    compiled(tmp_path, pin_first("k"))
    assert changed(pin_first("k")) == []
    assert [text.split(":")[0] for text in changed(pin_first("n"))] == ["config.pas_policy"]
    assert "config.pas_policy" in [text.split(":")[0] for text in changed("dp")]
