"""Ways to train the tiny Llama: in parallel through the trainer, and as a plain loop."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from nnscaler import planner, planning, same_dropout
from nnscaler.cli.config import CheckpointConfig, DatasetConfig, LogConfig, LRSchedulerConfig, ModelConfig, TrainerArgs
from nnscaler.cli.trainer import Trainer
from nnscaler.compiler import ComputeConfig
from nnscaler.data.training import PackedDataset
from nnscaler.first_values import initial_parameters
from nnscaler.graph import Graph
from nnscaler.models.causal_lm import WEIGHT_PREFIX, CausalLM, prepare_config
from nnscaler.pieces import stretches, with_registered
from nnscaler.pipeline import stages
from nnscaler.placement import Shard
from nnscaler.plan import Key, Plan
from nnscaler.recompute import level_of
from nnscaler.reshard import only_gathers, reshards
from nnscaler.runtime import regions
from nnscaler.runtime.optimizer import OptimizerConfig
from nnscaler.trace import build_on_meta
from tests import tiny
from tests.traced import traced_once

STEPS = 7
SEED = 3
RATE = 1e-3
EPSILON = 1e-6  # of AdamW, which divides by a gradient's size: with 1e-8, the rounding of gradients near 0 shows
TOLERANCE = 1e-5
OF_FIRST_NORM = 1e-6  # and the weights that follow steps have drifted by as much as TOLERANCE allows


def norms_agree(found: Sequence[float], wanted: Sequence[float]) -> bool:
    """Whether gradients' norms are those of the plain loop: of the first step to rounding, of the others as far as the
    weights are."""
    allowed = [OF_FIRST_NORM] + [TOLERANCE] * (len(wanted) - 1)
    return all(isclose(*pair, rel_tol=rel) for *pair, rel in zip(found, wanted, allowed, strict=True))


@dataclass(frozen=True)
class Case:
    """One way to train."""

    plan: int
    runtime: int
    chunk_loss: bool = False
    recompute: tuple[str, ...] = ()
    accumulation: int = 1
    tied: bool = False
    micro_batch: int = 1
    key_value_heads: int = 4
    layers: int = 2
    levels: tuple[str, ...] = ()  # recompute level of each layer, in place of what the planner chose
    pieces: int = 0  # in how many each layer's regions are computed, in place of what the planner chose
    heads: int = 0  # in how many their attention is, likewise; among devices, heads are divided too, and else tokens
    master_only: bool = False  # whether weights that are gathered are stored as master weights alone, likewise
    precision: str = "fp32"
    in_bf16: bool = False  # whether weights of products in fp8 are gathered in bf16, in place of what the planner chose
    compiled: bool = False  # whether regions are compiled, as on an accelerator
    hardware: str = "hardware.json"
    schedule: str | None = None  # of a pipeline, and how many stages it has
    stages: int = 1
    documents: bool = False  # whether those of the dataset are kept apart
    batch: int = 0  # sequences of a step, where the planner divides them
    dropout: bool = False  # whether attention's weights, and elements inside each MLP, are dropped

    @property
    def name(self) -> str:
        flags = [f"{self.plan}x{self.runtime}", f"acc{self.accumulation}", f"batch{self.micro_batch}"]
        flags += ["chunk"] * self.chunk_loss + list(self.recompute) + ["tied"] * self.tied
        flags += ["compiled"] * self.compiled + [f"pieces{self.pieces}"] * bool(self.pieces)
        flags += [f"heads{self.heads}"] * bool(self.heads)
        flags += ["masters"] * self.master_only + [self.precision] * (self.precision != "fp32")
        flags += ["in-bf16"] * self.in_bf16
        flags += [f"kv{self.key_value_heads}"] * (self.key_value_heads != 4)
        flags += ["".join(word[0] for word in level.split()) for level in self.levels]
        flags += [f"{self.schedule}{self.stages}"] if self.schedule else []
        flags += [f"divided{self.batch}"] if self.batch else []
        flags += ["documents"] * self.documents + ["dropout"] * self.dropout
        return "-".join([*flags, self.hardware.removesuffix(".json")])

    @property
    def model(self) -> dict[str, object]:
        """What its model differs in from the tiny Llama."""
        return {
            "tie_word_embeddings": self.tied,
            "num_key_value_heads": self.key_value_heads,
            "num_hidden_layers": self.layers,
            "attention_dropout": 0.3 * self.dropout,
        }

    @property
    def sequences(self) -> int:
        """Sequences an optimizer step."""
        return self.batch or self.runtime // self.plan * self.accumulation * self.micro_batch


def arguments(case: Case, folder: Path) -> TrainerArgs:
    config = tiny.config(**case.model)
    dataset = DatasetConfig(PackedDataset.open(folder / "data"), document_mask=case.documents)
    prepare_config(config, dataset.positions, "auto", case.documents)
    loss = chunk_linear_cross_entropy if case.chunk_loss else None
    compute = ComputeConfig(
        case.plan,
        case.runtime,
        recompute_modules=case.recompute if not case.levels else None,
        micro_batches=case.accumulation,
        hardware=str(folder / case.hardware),
        explore_pipeline=case.schedule is not None or bool(case.batch),
        pas_policy=heads_in_attention_alone if case.heads and case.plan > 1 else "autodist",
        pipeline_schedule=case.schedule,
        pipeline_nstages=case.stages if case.schedule else None,
    )
    return TrainerArgs(
        name=case.name,
        model=ModelConfig(
            make=lambda: with_dropout(CausalLM(config, loss, dataset.mean_document)),
            weight_prefix=WEIGHT_PREFIX,
            vocabulary=tiny.VOCABULARY,
        ),
        compute=compute,
        dataset=dataset,
        optimizer=OptimizerConfig(lr=RATE, eps=EPSILON),
        lr_scheduler=LRSchedulerConfig("constant"),
        checkpoint=CheckpointConfig(folder / "checkpoints", interval=0),
        log=LogConfig(folder / "runs"),
        precision=case.precision,
        micro_batch_size=case.micro_batch,
        global_batch_size=case.batch or None,
        left_open=("plan_ngpus", "micro_batch_size", "micro_batches") if case.batch else (),
        max_train_steps=STEPS,
        seed=SEED,
        gen_savedir=folder / "code",
    )


def train_all(cases: list[Case], folder: Path) -> None:
    """On every rank: trains each case, one after the other."""
    for index, case in enumerate(cases):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(index)  # where they meet, each time anew
        with planned(case), compiled_regions() if case.compiled else nullcontext():
            Trainer(arguments(case, folder)).run()


@contextmanager
def compiled_regions() -> Iterator[None]:
    """Inside, regions are compiled: without generating kernels, which takes long, but with all that goes before."""
    compile_ = functools.partial(torch.compile, backend="aot_eager")
    with patch.object(regions, "_on_accelerator", lambda args: True), patch.object(torch, "compile", compile_):
        yield


@contextmanager
def planned(case: Case) -> Iterator[None]:
    """Inside, plans get the case's recompute levels for their layers (each stage of a pipeline the first of them), its
    pieces for the layers' regions, and weights without a copy beside their masters, if it has them. What a case before
    has traced is not traced anew."""

    def find_plan(*args: Any, **kwargs: Any) -> Plan:
        plan = planner.find_plan(*args, **kwargs)
        if case.levels:
            mine = case.levels[: len(plan.graph.calls("llama_decoder_layer"))]
            plan.levels["llama_decoder_layer"] = {level_of(name): mine.count(name) for name in mine}
        layer = plan.graph.blocks["llama_decoder_layer"]
        if case.pieces:
            plan.pieces = {(layer.name, one.name): case.pieces for one in stretches(layer)}
        if case.heads:
            plan.pieces |= {(layer.name, one.name): case.heads for one in with_registered(layer, stretches(layer))}
        if any(level.on_host for level in plan.levels["llama_decoder_layer"]):
            plan.host[Key("state")] = 1e9  # more than there is: all of the optimizer's state
            plan.host[Key("gradients")] = 1e9
        if case.master_only:
            plan.master_only = gathered(plan)
        if case.in_bf16:
            plan.gathered_in_fp8.clear()
        return plan

    with (
        patch.object(planning, "find_plan", find_plan),
        patch.object(stages, "find_plan", find_plan),
        patch.object(planning, "trace", traced_once),
    ):
        yield


def heads_in_attention_alone(graph: Graph) -> None:
    """The policy that splits a layer's attention by heads, and what is before and after it along the sequence."""
    layer = graph.blocks["llama_decoder_layer"]
    for node in layer.nodes:
        if node.op == "attention":
            node.pin("k")
        elif node.op == "aten.linear.default":
            node.pin("*1")  # of [batch, sequence, width]
        elif node.op == "aten.mul.Tensor" and all(len(layer.tensors[name].shape) == 4 for name in node.inputs):
            node.pin("d2")  # of [batch, head, sequence, width]


def with_dropout(model: CausalLM) -> CausalLM:
    """The model; where it drops attention's weights, each layer's MLP drops too, what is split as its weights are."""
    for module in model.modules() if model.model.config.attention_dropout else ():
        if isinstance(module, LlamaMLP):
            module.act_fn = nn.Sequential(module.act_fn, nn.Dropout(0.3))
    return model


def gathered(plan: Plan) -> set[str]:
    """The trained parameters that are stored in shards without a second owner, and gathered wherever they are used."""
    alone = {
        path
        for path, layout in plan.parameters.items()
        if plan.graph.parameters[path].requires_grad and all(isinstance(place, Shard) for place in layout)
    }
    for block, tensor, path in plan.graph.parameter_uses():
        used = [
            layout
            for node in block.nodes
            if tensor in node.inputs
            for name, layout in zip(node.inputs, plan.nodes[block.name, node.name].inputs)
            if name == tensor
        ]
        if not all(only_gathers(reshards(plan.parameters[path], layout), True) for layout in used):
            alone.discard(path)
    return alone if plan.mesh.replicas == 1 else set()


class Learned(NamedTuple):
    """What plain training gives: the loss of each step, the final parameters by name, and the norm of each step's
    gradient before it is clipped, added up in fp64."""

    losses: list[float]
    weights: dict[str, Tensor]
    norms: list[float]


def plain_loop(
    rows: np.ndarray, sequences: list[int], starts: Sequence[Sequence[int]] | None = None, **changes: object
) -> Learned:
    """The same training as anyone would write it: one process, one model, torch.optim.AdamW.

    sequences  how many sequences each step has
    starts     places in each row at which a document begins, each of which goes through the model alone; None: a row is
               one
    changes    what the model differs in from the tiny Llama
    """
    config = tiny.config(**changes)
    prepare_config(config, tiny.LENGTH, "eager")
    meta, _ = build_on_meta(lambda: CausalLM(config))
    model = with_dropout(CausalLM(config))
    with torch.no_grad():
        for name, value in initial_parameters(meta, SEED, torch.device("cpu")):
            model.get_parameter(name).copy_(value)
    return train_plainly(model, rows, sequences, starts)


def plain_loops(rows: np.ndarray, starts: Sequence[Sequence[int]] | None = None) -> Callable[[Case], Learned]:
    """`plain_loop`'s result for a case, in STEPS steps; computed once for cases that come to the same."""
    known: dict[object, Learned] = {}

    def get(case: Case) -> Learned:
        key = (case.sequences, *case.model.items())
        if key not in known:
            known[key] = plain_loop(rows, [case.sequences] * STEPS, starts, **case.model)
        return known[key]

    return get


def train_plainly(
    model: CausalLM, rows: np.ndarray, sequences: list[int], starts: Sequence[Sequence[int]] | None = None
) -> Learned:
    """Trains a model as `plain_loop` says. `rows` are the dataset's sequences [rows, length].

    Where the model drops at random, each sequence is a micro-batch.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=RATE, betas=(0.9, 0.95), eps=EPSILON,
    )  # fmt: skip
    order = np.concatenate([np.random.default_rng((SEED, epoch)).permutation(len(rows)) for epoch in range(10)])
    losses: list[float] = []
    norms: list[float] = []
    consumed = 0
    for step, count in enumerate(sequences):
        total, labels = 0.0, 0
        for micro_batch, number in enumerate(order[consumed : consumed + count]):
            tokens = torch.from_numpy(rows[number].astype(np.int64))
            for document in tokens.tensor_split([] if starts is None else list(starts[number][1:])):
                if len(document) > 1:
                    with same_dropout(model, SEED, step, micro_batch):
                        logits = model.model(input_ids=document.unsqueeze(0)).logits
                    loss = torch.nn.functional.cross_entropy(logits[0, :-1], document[1:], reduction="sum")
                    loss.backward()
                    total += loss.item()
                    labels += len(document) - 1
        consumed += count
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        for gradient in gradients:
            gradient /= labels
        norms.append(nn.utils.get_total_norm([gradient.double() for gradient in gradients]).item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / labels)
    return Learned(losses, {name: parameter.detach() for name, parameter in model.named_parameters()}, norms)
