"""model + example inputs -> Graph, by `torch.export` under fake tensors."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.export import ExportedProgram, export
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from nnscaler.errors import UserError
from nnscaler.graph import Block, Call, Graph, Node, TensorMeta
from nnscaler.trace.convert import CallTarget, Converter
from nnscaler.trace.execute import ROOT, Execution, execute
from nnscaler.trace.leaf import Leaf, Session, Structure, recording
from nnscaler.trace.repeated import as_leaves, find_repeated
from nnscaler.trace.source import line_of
from nnscaler.trace.strategies import STRATEGIES, find_strategy

logger = logging.getLogger(__name__)


def trace(
    model: nn.Module,
    example_inputs: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    strategy: str = "reuse_cache",
    seed: int = 0,
) -> Graph:
    """Traces `model`'s forward.

    model           on the meta device; no weight is needed
    example_inputs  tensors by parameter name of `forward`; only shapes and types matter, unless the model is executed
    buffers         values of the model's buffers by name, kept in the graph
    strategy        one of `STRATEGIES`
    seed            of the weights, where the model is executed

    Raises UserError where the model does something that cannot be compiled, or cannot be executed here.
    """
    chosen = find_strategy(strategy)
    example = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in example_inputs.items()
    }
    repeated = find_repeated(model)
    execution = None
    if chosen.device is not None:
        execution = Execution(torch.device(chosen.device), chosen.offload)
        execute(model, example_inputs, buffers, repeated, execution, seed)
    with recording(execution) as session:
        with as_leaves(model, repeated, session, chosen.reuse), _reads_values_of(execution, model):
            program = _export(model, (), example)
        traced = {
            token: _export(_FlatCall(leaf), tuple(leaf.example), {})
            for token, leaf in list(session.leaves.items())
            if leaf.operator is None
        }
    constants: dict[str, Tensor] = {}
    blocks, targets = _merge_equal(session, traced, constants)
    root = Converter(program, session, "", targets, constants).block("model", type(model).__name__)
    return _assemble(model, root, blocks, {**buffers, **constants})


class _FlatCall(nn.Module):
    """A repeated module as a function of a flat list of tensors."""

    def __init__(self, leaf: Leaf) -> None:
        super().__init__()
        self.module = leaf.function.__self__  # type: ignore[attr-defined]
        self.leaf = leaf

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        args, kwargs = self.leaf.arguments.put(tensors)
        with self.leaf.reads():
            return Structure.take(self.module(*args, **kwargs))[1]


@contextmanager
def _reads_values_of(execution: Execution | None, model: nn.Module) -> Iterator[None]:
    """Inside, the forward of `model` reads the values that it read in an execution."""
    if execution is None:
        yield
        return
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with execution.reads.replay(ROOT):
            return original(*args, **kwargs)

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    try:
        program = export(module, args, kwargs, strict=False)
    except (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException) as error:
        frames = re.findall(r'File "([^"]+)", line (\d+), in forward', str(error))
        where = f" (at {line_of(*frames[-1])})" if frames else ""
        raise UserError(
            f"the model reads a tensor's value while it is traced{where}; use a trace strategy that executes it "
            f"({', '.join(name for name, known in STRATEGIES.items() if known.executes)}), or remove the read"
        ) from error
    mutates = [
        node for node in program.graph.nodes if getattr(getattr(node.target, "_schema", None), "is_mutable", False)
    ]
    return program.run_decompositions({}) if mutates else program


def _merge_equal(
    session: Session, traced: dict[str, ExportedProgram], constants: dict[str, Tensor]
) -> tuple[dict[str, Block], dict[str, CallTarget]]:
    """The distinct blocks by name, and what a call of each leaf becomes. Equal blocks print the same."""
    blocks: dict[str, Block] = {}
    by_text: dict[str, str] = {}
    targets: dict[str, CallTarget] = {}
    for token, program in traced.items():
        module = session.leaves[token].function.__self__  # type: ignore[attr-defined]
        kind = type(module).__name__
        names_of_inputs = session.leaves[token].arguments.tensor_names(
            list(inspect.signature(module.forward).parameters)
        )
        block = Converter(program, session, "module.", {}, constants, names_of_inputs).block("block", kind)
        used = {name for node in block.nodes for name in node.inputs}.union(block.outputs)
        kept = [index for index, name in enumerate(block.inputs) if name in used]
        block.inputs = [block.inputs[index] for index in kept]
        text = str(block)
        if text not in by_text:
            base = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in kind).lstrip("_")
            count = sum(name.rstrip("0123456789").rstrip("_") == base for name in blocks)
            block.name = base if not count else f"{base}_{count + 1}"
            by_text[text] = block.name
            blocks[block.name] = block
        targets[token] = CallTarget(by_text[text], kept)
    return blocks, targets


def _assemble(model: nn.Module, root: Block, blocks: dict[str, Block], buffers: dict[str, Tensor]) -> Graph:
    """Binds each call to its module's parameters, ties equal ones, and finds what needs a gradient."""
    canonical: dict[int, str] = {}
    names: dict[str, str] = {}
    metas: dict[str, TensorMeta] = {}
    trained = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in [*trained.items(), *model.named_buffers(remove_duplicate=False)]:
        names[name] = canonical.setdefault(id(tensor), name)
        metas[name] = TensorMeta(tuple(tensor.shape), tensor.dtype, name in trained and tensor.requires_grad)
    for name, tensor in buffers.items():
        names.setdefault(name, name)
        metas.setdefault(name, TensorMeta(tuple(tensor.shape), tensor.dtype))
    root.parameters = {tensor: names[path] for tensor, path in root.parameters.items()}
    for node in root.nodes:
        if isinstance(node, Call):
            rest = blocks[node.block].parameters
            node.parameters = {tensor: names[f"{node.module}.{path}"] for tensor, path in rest.items()}
    graph = Graph(root, blocks, {}, {})
    used = {path for _, _, path in graph.parameter_uses()}
    graph.parameters = {path: meta for path, meta in metas.items() if path in used}
    graph.buffers = {path: tensor for path, tensor in buffers.items() if path in used}
    graph.tied = {name: path for name, path in names.items() if name != path and path in used}
    _mark_gradients(graph)
    return graph


def _mark_gradients(graph: Graph) -> None:
    """Sets `requires_grad` of every tensor from those of the parameters."""
    for block, tensor, path in graph.parameter_uses():
        block.tensors[tensor] = graph.parameters[path]
    for block in graph.all_blocks():
        for name in block.inputs:
            block.tensors[name] = replace(block.tensors[name], requires_grad=False)
    changed = True
    while changed:  # a block's input may need a gradient because of what a call of another block made
        changed = False
        for block in graph.all_blocks():
            for node in block.nodes:
                inputs = [block.tensors[name].requires_grad for name in node.inputs]
                if isinstance(node, Call):
                    changed |= _mark_call(graph, block, node, inputs)
                else:
                    _mark_outputs(block, node, [any(inputs)] * len(node.outputs))


def _mark_call(graph: Graph, caller: Block, node: Call, inputs: list[bool]) -> bool:
    block = graph.blocks[node.block]
    changed = False
    for name, needed in zip(block.inputs, inputs, strict=True):
        if needed and not block.tensors[name].requires_grad:
            block.tensors[name] = replace(block.tensors[name], requires_grad=True)
            changed = True
    before = [caller.tensors[name].requires_grad for name in node.outputs]
    after = [block.tensors[name].requires_grad for name in block.outputs]
    _mark_outputs(caller, node, after)
    return changed or before != after


def _mark_outputs(block: Block, node: Node, needed: list[bool]) -> None:
    for name, needs in zip(node.outputs, needed, strict=True):
        meta = block.tensors[name]
        block.tensors[name] = replace(meta, requires_grad=needs and not node.no_grad and meta.dtype.is_floating_point)
