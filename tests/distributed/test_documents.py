"""Documents that are kept apart are trained on as if each were alone, under every plan, and none knows of another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import chunk_linear_cross_entropy as chunks
from nnscaler import kernels
from nnscaler.cli.trainer import Trainer
from nnscaler.data.documents import document_inputs
from nnscaler.loaded import LoadedModel, compiled
from nnscaler.models.causal_lm import IGNORED
from nnscaler.processes import from_all
from tests import tiny
from tests.distributed.test_parity import AWAY, EACH, RECOMPUTE, plan_of, weights_of
from tests.launch import run
from tests.parity import TOLERANCE, Case, arguments, plain_loops, planned, train_all

# Lengths of documents in a row of 32 tokens, of which 2 devices have 16 each, and 4 have 8.
LAYOUTS = [
    [32], [*[1] * 29, 3], [16, 16], [8, 8, 8, 8], [1, 15, 1, 15], [5, 27], [31, 1], [3, 1, 9, 19], [24, 8],
    [7, 11, 13, 1],
]  # fmt: skip


def starts_of(layout: list[int]) -> list[int]:
    return np.cumsum([0, *layout[:-1]]).tolist()


STARTS = [starts_of(LAYOUTS[row % len(LAYOUTS)]) for row in range(80)]

SPLITS = [  # of attention: along heads, the sequence (where one key-value head cannot be split), both, and on two axes
    Case(2, 2, hardware="slow.json"),
    Case(2, 2, key_value_heads=1),
    Case(2, 2, key_value_heads=1, chunk_loss=True, recompute=("LlamaDecoderLayer",), micro_batch=2),
    Case(4, 4, key_value_heads=1),
    Case(4, 4, key_value_heads=2, hardware="slow_nodes.json"),
    Case(4, 4, key_value_heads=1, hardware="nodes.json"),
]
OTHERS = [
    Case(2, 2, layers=4, levels=EACH),
    Case(2, 2, layers=4, levels=AWAY),
    Case(2, 2, pieces=2, recompute=("LlamaDecoderLayer",), tied=True),
    Case(2, 2, schedule="1f1b", stages=2, accumulation=4),
    Case(2, 2, schedule="zb-v", stages=4, layers=4, accumulation=4, chunk_loss=True),
]


def apart(cases: list[Case]) -> list[Case]:
    return [replace(case, documents=True) for case in cases]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    tiny.write_hardware(folder)
    slow, nodes = (
        {"bandwidth": 1e9, "latency": 0.0},
        {"devices_per_node": 2, "inter": {"bandwidth": 5e7, "latency": 0.0}},
    )
    tiny.write_hardware(folder, "slow.json", intra=slow)
    tiny.write_hardware(folder, "nodes.json", **nodes)
    tiny.write_hardware(folder, "slow_nodes.json", intra=slow, **nodes)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return tiny.write_dataset(folder / "data", starts=STARTS)


@pytest.fixture(scope="module")
def reference(rows):
    return plain_loops(rows, STARTS)


TRAINED = {
    2: [
        Case(1, 2, chunk_loss=True, micro_batch=2),
        SPLITS[0],
        SPLITS[2],
        Case(2, 2, layers=4, levels=EACH, compiled=True),
        OTHERS[2],
        OTHERS[4],
    ],
    4: [Case(2, 4, recompute=("LlamaDecoderLayer",)), SPLITS[4]],
}


@pytest.mark.parametrize("world", TRAINED)
def test_documents_are_trained_on_as_if_alone(world, folder, reference):
    cases = apart(TRAINED[world])
    run(world, train_all, cases, folder, init=False)
    for case in cases:
        losses, weights, _ = reference(case)
        lines = (folder / "runs" / case.name / "metrics.jsonl").read_text().splitlines()
        for line, wanted in zip(lines, losses, strict=True):
            assert json.loads(line)["loss"] == pytest.approx(wanted, rel=TOLERANCE), case.name
        found = weights_of(case, folder)
        for name, wanted in weights.items():
            assert tiny.close(found[name], wanted) < TOLERANCE, (case.name, name)
        if not case.schedule:
            around = np.mean([np.sum(np.square(layout)) / tiny.LENGTH for layout in LAYOUTS])
            assert plan_of(case, folder)["about"]["document_length"] == pytest.approx(around, abs=0.5)


# Of a row, lengths of documents, and the one that others must not notice.
UNNOTICED = [
    ([1] * 32, 0), ([1] * 32, 17), ([16, 16], 0), ([16, 16], 1), ([8, 8, 8, 8], 2), ([1, 15, 1, 15], 2), ([5, 27], 0),
    ([5, 27], 1), ([31, 1], 0), ([3, 1, 9, 19], 1), ([24, 8], 0), ([7, 11, 13, 1], 2),
]  # fmt: skip


@contextmanager
def logits_noted() -> Iterator[list[Tensor]]:
    """Inside, this rank's logits [t, n] of tokens with labels are noted, as the loss gets them: call by call."""
    noted = []

    def noting(loss: Any) -> Any:
        def note(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Any:
            noted.append(logits.detach()[labels != IGNORED])
            return loss(logits, labels, *args, **kwargs)

        return note

    plain, chunked = noting(F.cross_entropy), noting(chunks.softmax_loss)
    with patch.object(F, "cross_entropy", plain), patch.object(chunks, "softmax_loss", chunked):
        yield noted


def learned(module: Any, case: Case, first: int, changed: bool, mask: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """Of a step that learns nothing from documents that others must not notice: its loss and this rank's gradients, and
    the logits of the other documents' tokens.

    first    of the step's rows among `UNNOTICED`
    changed  whether the tokens of such documents are others than they were
    mask     whether documents are kept apart
    """
    batches = []
    for start in range(first, first + case.accumulation * case.micro_batch, case.micro_batch):
        chosen = [UNNOTICED[row % len(UNNOTICED)] for row in range(start, start + case.micro_batch)]
        apart = document_inputs([np.array(starts_of(layout)) for layout, _ in chosen], tiny.LENGTH)
        hidden = apart["documents"] == torch.tensor([[document] for _, document in chosen])
        generator = torch.Generator().manual_seed(start)
        old, new, labels = (torch.randint(tiny.VOCABULARY, hidden.shape, generator=generator) for _ in range(3))
        if not mask:
            apart["documents"] = torch.zeros_like(old)
        ids = torch.where(hidden & changed, new, old)
        batches.append({"input_ids": ids, "labels": labels.masked_fill(hidden, IGNORED), **apart})
    with (
        patch.object(kernels.documents, "_Memory", wraps=kernels.documents._Memory) as memory,
        logits_noted() as logits,
    ):
        loss = module.accumulate(batches)
    # All layers, their backward and what is computed again know the documents from the first that asked.
    assert memory.call_count <= len(batches), case.name
    assert bool(logits) == module.gives_loss, case.name
    return [loss.clone(), *(bucket.gradient.clone() for bucket in module.buckets)], logits


def are_equal(before: list[Tensor], after: list[Tensor]) -> bool:
    """Whether they are, to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def check_that_none_is_noticed(cases: list[Case], folder: Path) -> None:
    """On every rank: a document's tokens change no bit of other documents' logits, and of the loss and gradients of
    what is learned from them. Of each case, all of `UNNOTICED` are tried, some rows at a time."""
    for case in cases:
        args, device = arguments(case, folder), torch.device("cpu")
        source, code = Trainer(args)._source(), folder / "code" / case.name
        with planned(case):
            with compiled(source, args.compute, code, device):
                loaded = LoadedModel(code, source, args.optimizer, device)
            loaded.initialise(0)
            for first in range(0, len(UNNOTICED), case.accumulation * case.micro_batch):
                for before, after in zip(*(learned(loaded.module, case, first, changed) for changed in (False, True))):
                    assert are_equal(before, after), (case.name, first)
            found = zip(*(learned(loaded.module, case, 2, changed, mask=False) for changed in (False, True)))
            gradients, logits = (not are_equal(before, after) for before, after in found)
            assert gradients, "without a mask it is noticed"
            assert any(from_all(logits)), "and where a rank computes logits of others, they are other ones"


EVERY = [Case(*devices, *choice) for devices, choice in product(((1, 2), (2, 2)), zip((False, True), RECOMPUTE))]


@pytest.mark.parametrize("world", [2, 4])
def test_no_document_is_noticed_by_another(world, folder, rows):
    cases = [replace(case, micro_batch=3) for case in apart([*EVERY, *SPLITS, *OTHERS]) if case.runtime == world]
    run(world, check_that_none_is_noticed, cases, folder)
    plans = [json.loads((folder / "code" / case.name / "plan.json").read_text()) for case in cases if not case.schedule]
    nodes = [node for plan in plans for block in plan["blocks"].values() for node in block["nodes"].values()]
    assert {2: {"k", "l"}, 4: {"l", "l,k", "l,l"}}[world] <= {
        node["split"] for node in nodes if node["op"] == "attention"
    }
