"""Trained in parallel, a model's losses and weights are those of the plain single-process loop."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nnscaler.checkpoint.folder import latest_checkpoint
from nnscaler.checkpoint.merge import Checkpoint
from nnscaler.recompute import IN_GROUPS, ON_DEVICE, ON_HOST
from tests import tiny
from tests.launch import run
from tests.parity import STEPS, TOLERANCE, Case, norms_agree, plain_loops, train_all

FOURS = {level.inner.name: level.name for level in IN_GROUPS if level.size == 4}
TWOS = {level.inner.name: level.name for level in IN_GROUPS if level.size == 2}
EACH = tuple(level.name for level in reversed(ON_DEVICE))
AWAY = tuple(level.name for level in reversed(ON_HOST))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def rows(folder):
    tiny.write_hardware(folder)
    return tiny.write_dataset(folder / "data")


@pytest.fixture(scope="module")
def reference(rows):
    return plain_loops(rows)


def compare(case: Case, folder: Path, reference) -> None:
    losses, weights, norms = reference(case)
    metrics = [json.loads(line) for line in (folder / "runs" / case.name / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in metrics] == list(range(1, STEPS + 1))
    assert norms_agree([entry["gradient_norm"] for entry in metrics], norms), case.name
    for found, wanted in zip(metrics, losses):
        assert found["loss"] == pytest.approx(wanted, rel=TOLERANCE), case.name
        tokens = found["tokens_per_second_per_gpu"] * found["seconds_per_step"]  # a step's, on each device
        assert tokens == pytest.approx(case.sequences * tiny.LENGTH / case.runtime)
    found = weights_of(case, folder)
    for name, wanted in weights.items():
        assert tiny.close(found[name], wanted) < TOLERANCE, (case.name, name)
    assert losses[-1] < losses[0] - 0.05, "the reference does not learn: the comparison would say little"


def weights_of(case: Case, folder: Path) -> dict[str, Tensor]:
    """The weights in the last checkpoint, by name."""
    checkpoint = Checkpoint.open(latest_checkpoint(folder / "checkpoints" / case.name))
    shapes = checkpoint.shapes()
    names = [name for name in shapes if name.startswith("model.")]
    return {name.removeprefix("model."): checkpoint.read(name, shapes[name]) for name in names}


def splits(case: Case, folder: Path) -> dict[str, set[str]]:
    """Operator -> the names it is split along anywhere in the compiled plan."""
    plan = json.loads((folder / "code" / case.name / "plan.json").read_text())
    found: dict[str, set[str]] = {}
    for block in plan["blocks"].values():
        for node in block["nodes"].values():
            found.setdefault(node["op"], set()).add(node["split"])
    return found


MATRIX = [(1, 2), (2, 2), (1, 4), (2, 4), (4, 4)]
RECOMPUTE = [(), ("LlamaDecoderLayer",)]
# Every pair of choices on two devices and on four; all three together on one of them.
CHOICES = {
    runtime: [
        (chunk_loss, recompute, accumulation)
        for chunk_loss, recompute, accumulation in product((False, True), RECOMPUTE, (1, 3))
        if (chunk_loss + bool(recompute) + (accumulation > 1)) % 2 == (runtime == 4)
    ]
    for runtime in (2, 4)
}


@pytest.mark.parametrize(("plan", "runtime"), MATRIX)
def test_plain_loop_and_parallel_training_agree(plan, runtime, folder, reference):
    cases = [Case(plan, runtime, *choice) for choice in CHOICES[runtime]]
    run(runtime, train_all, cases, folder, init=False)
    for case in cases:
        compare(case, folder, reference)
    if plan > 1:
        for case in cases:
            found = splits(case, folder)
            assert found["attention"] - {"-"}, "attention is split over heads or along the sequence"
            assert found["aten.linear.default"] - {"-"}, "linear layers are split"
        # Not in each: without a limit of memory, to gather a weight again or to keep it is the same to the planner.
        codes = [code_of(case, folder) for case in cases]
        assert any("again=True" in code for code in codes), "weights are gathered in forward, and again in backward"


EXTRA = [
    Case(2, 2, tied=True),
    Case(2, 2, chunk_loss=True, tied=True, micro_batch=2),
    Case(2, 2, recompute=("LlamaMLP",)),
    Case(2, 2, recompute=("LlamaMLP", "LlamaAttention"), micro_batch=2, accumulation=2),
    Case(1, 2, batch=6),
]


IN_FP8 = Case(1, 1, accumulation=2, precision="fp8", hardware="fp8.json")
COPIES, SPLIT = replace(IN_FP8, runtime=2, accumulation=1, compiled=True), replace(IN_FP8, plan=2, runtime=2)


def test_tied_weights_parts_recomputed_batches_and_fp8(folder, reference):
    tiny.write_hardware(folder, IN_FP8.hardware, flops={"float32": 1e9, "bfloat16": 1e9, "float8_e4m3fn": 4e9})
    run(2, train_all, [*EXTRA, COPIES, SPLIT], folder, init=False)
    for case in EXTRA:
        compare(case, folder, reference)
    train_all([IN_FP8], folder)
    wanted = losses_of(IN_FP8, folder)
    assert losses_of(COPIES, folder) == pytest.approx(wanted, rel=1e-6), "each sequence has its scales, as before"
    assert losses_of(SPLIT, folder) == pytest.approx(wanted, rel=3e-3), "each shard has its own"
    for case in (IN_FP8, COPIES, SPLIT):
        (layer,) = (block for name, block in plan_of(case, folder)["blocks"].items() if name != "model")
        assert sum(node["in_fp8"] for node in layer["nodes"].values()) >= 5, case.name
    assert wanted[-1] < wanted[0] - 0.05


def losses_of(case: Case, folder: Path) -> list[float]:
    lines = (folder / "runs" / case.name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def plan_of(case: Case, folder: Path) -> dict[str, Any]:
    return json.loads((folder / "code" / case.name / "plan.json").read_text())


def test_every_recompute_level(folder, reference):
    cases = [
        Case(2, 2, layers=4, levels=EACH),
        Case(2, 2, layers=4, levels=(*EACH[1:3], *EACH[1:3]), chunk_loss=True),
        Case(1, 2, levels=(EACH[0], EACH[0])),
        Case(2, 2, layers=4, levels=EACH, compiled=True),
    ]
    run(2, train_all, cases, folder, init=False)
    for case in cases:
        compare(case, folder, reference)


def test_host_memory_changes_no_bit(folder, reference):
    cases = [
        Case(2, 2, layers=4, levels=levels, compiled=compiled)
        for levels, compiled in product((EACH, AWAY), (False, True))
    ]
    for several in (cases[:2], cases[2:]):
        missing = [case for case in several if not (folder / "checkpoints" / case.name).exists()]  # by the test before
        if missing:
            run(2, train_all, missing, folder, init=False)
    for here, away in zip(cases, cases[2:]):
        compare(away, folder, reference)
        assert all(plan_of(away, folder)[what] for what in ("state_on_host", "gradients_on_host"))
        code = (folder / "code" / away.name / "gencode_stage0.py").read_text()
        assert code.count("axes.host.keeping(") == 4
        assert "keeping(layers" not in code, "what one call hands to the next is no tensor that all share"
        ours, theirs = (weights_of(case, folder) for case in (here, away))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_axes_and_attention_along_the_sequence(folder, reference):
    far = {"devices_per_node": 2, "inter": {"bandwidth": 5e7, "latency": 0.0}}
    tiny.write_hardware(folder, "far.json", **far)
    tiny.write_hardware(folder, "slow.json", **far, intra={"bandwidth": 1e9, "latency": 0.0})
    heads_too = Case(4, 4, hardware="slow.json", key_value_heads=2)  # too few for both axes
    one_head = Case(4, 4, key_value_heads=1, chunk_loss=True)
    both_axes = Case(4, 4, hardware="far.json", key_value_heads=1, levels=(EACH[0], EACH[-1]))
    cases = [heads_too, one_head, both_axes]
    run(4, train_all, cases, folder, init=False)
    for case in cases:
        compare(case, folder, reference)
    assert [len(plan_of(case, folder)["mesh"]["sizes"]) for case in cases] == [2, 1, 2]
    assert "l,k" in splits(heads_too, folder)["attention"], "attention is split over heads and along the sequence"
    assert "l" in splits(one_head, folder)["attention"]
    assert "l,l" in splits(both_axes, folder)["attention"]


def code_of(case: Case, folder: Path) -> str:
    return (folder / "code" / case.name / "gencode_stage0.py").read_text()


def test_one_process_without_torchrun(folder, reference):
    in_pieces = Case(1, 1, layers=4, pieces=4, heads=2, levels=(EACH[0], EACH[0], AWAY[0], AWAY[0]), compiled=True)
    cases = [Case(1, 1, chunk_loss=True), in_pieces]
    run(1, train_all, cases, folder, init=False)
    for case in cases:
        compare(case, folder, reference)
    assert "= in_pieces(llama_decoder_layer_piece_" in code_of(in_pieces, folder)


def test_attention_in_groups_of_heads_with_an_all_to_all_for_each(folder, reference):
    cases = [
        Case(2, 2, accumulation=2, heads=2, levels=(EACH[0],) * 2),
        Case(2, 2, layers=4, heads=2, pieces=4, levels=(EACH[0],) * 2 + (AWAY[0],) * 2, compiled=True),
    ]
    run(2, train_all, cases, folder, init=False)
    for case in cases:
        compare(case, folder, reference)
        piece = code_of(case, folder).split("def llama_decoder_layer_piece_")[1].split("\n\n")[0]
        assert piece.count("collectives.all_to_all(") == 3, "of queries, keys and values"
        assert "= in_pieces(llama_decoder_layer_piece_0, 2, (None," in code_of(case, folder)
        assert ", (0, 2), (0, 2), " in code_of(case, folder), "of a weight's rows, a part of each device's heads"


def test_regions_in_pieces(folder, reference):
    again = (*EACH[:2], *AWAY[:2])  # the levels at which regions keep their inputs alone
    case = Case(2, 2, layers=4, pieces=4, levels=again)
    run(2, train_all, [case], folder, init=False)
    compare(case, folder, reference)
    assert code_of(case, folder).count("= in_pieces(llama_decoder_layer_region_") >= 2


def in_groups(large: int, small: int, where: str = "") -> tuple[str, ...]:
    """Levels for seven layers: a group of four, one of two, and one layer alone. `large`, `small`: places in EACH of
    the levels inside the groups"""
    levels = (FOURS[EACH[large]],) * 4 + (TWOS[EACH[small]],) * 2 + (EACH[0],)
    return tuple(level + where for level in levels)


SOME_AWAY = (*in_groups(0, 1, ", on the host")[:4], *in_groups(0, 1)[4:])  # the large group
GROUPED = {
    1: [Case(1, 1, layers=7, levels=in_groups(0, 3))],
    2: [
        Case(2, 2, layers=7, levels=in_groups(1, 0)),
        Case(2, 2, layers=7, levels=in_groups(1, 0, ", on the host")),
        Case(2, 2, layers=7, levels=in_groups(0, 1), pieces=4),
        Case(2, 2, layers=7, levels=in_groups(1, 3), compiled=True, micro_batch=2, chunk_loss=True),
        Case(2, 2, layers=7, levels=SOME_AWAY, compiled=True, pieces=4),
    ],
    4: [Case(2, 4, layers=7, levels=in_groups(3, 1), accumulation=2)],
}


@pytest.mark.parametrize("world", GROUPED)
def test_groups_of_layers(world, folder, reference):
    cases = GROUPED[world]
    run(world, train_all, cases, folder, init=False)
    for case in cases:
        compare(case, folder, reference)
        code = (folder / "code" / case.name / "gencode_stage0.py").read_text()
        assert code.count("    def group") == 2
    if world == 2:
        here, away = (weights_of(case, folder) for case in cases[:2])
        assert all(torch.equal(here[name], away[name]) for name in here)
