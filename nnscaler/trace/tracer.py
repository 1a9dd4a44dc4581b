"""Tracing a model's forward with `torch.export`, on fake tensors."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.export import ExportedProgram, export
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from nnscaler.errors import UserError
from nnscaler.graph import Block, Call, Graph, TensorMeta
from nnscaler.operators.own_backward import functions_are_operators
from nnscaler.trace.convert import CallTarget, Converter
from nnscaler.trace.decompose import decompose, written
from nnscaler.trace.digest import digest
from nnscaler.trace.draws import count_draws
from nnscaler.trace.execute import Execution, execute
from nnscaler.trace.fake import fake, fake_mode, fake_weights
from nnscaler.trace.gradients import mark_gradients
from nnscaler.trace.leaf import Leaf, Session, recording
from nnscaler.trace.observe import ROOT, Observation, observe
from nnscaler.trace.own_code import is_own_code, line_of
from nnscaler.trace.recorder import Outline
from nnscaler.trace.repeated import find_repeated, intercepted
from nnscaler.trace.strategies import STRATEGIES, find_strategy
from nnscaler.trace.structure import Structure


def trace(
    model: nn.Module,
    example_inputs: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    strategy: str = "reuse_cache",
    seed: int = 0,
) -> Graph:
    """The graph of a model's forward.

    model           on the meta device; no weight is needed
    example_inputs  name of an argument of `forward` -> an example; only shapes and types matter, unless the strategy
                    executes
    buffers         name -> value of the model's buffers, which the graph keeps
    strategy        one of `nnscaler.trace.STRATEGIES`
    seed            of the weights, where the model is executed

    Raises UserError where the model does something that cannot be compiled, or cannot be executed here.
    """
    chosen = find_strategy(strategy)
    execution = None
    if chosen.device is not None:
        device = torch.device(chosen.device)
        with functions_are_operators():
            execution = execute(model, find_repeated(model), example_inputs, buffers, device, chosen.offload, seed)
    mode = fake_mode()
    with fake_weights(model, mode), _as_written(), functions_are_operators():
        inputs = {name: fake(mode, tensor) for name, tensor in example_inputs.items()}
        exporter = _Exporter(mode, execution or observe(model, find_repeated(model), inputs, mode))
        with recording(exporter.observation, chosen.reuse) as session:
            paths = dict.fromkeys(call.path for call in exporter.observation.calls)
            with intercepted(model, list(paths), session.call_module):
                program = exporter.whole(model, inputs)
            traced = {
                token: exporter.leaf(leaf) for token, leaf in list(session.leaves.items()) if leaf.module is not None
            }
    root = Converter(program, session, model, targets={})
    blocks, root.targets, constants = _merge_equal(session, traced)
    graph = _assemble(model, root.block("model", type(model).__name__), root.constants, blocks, constants, buffers)
    graph.record = "" if execution is not None else exporter.observation.key
    return graph


def observed(model: nn.Module, example_inputs: Mapping[str, Tensor]) -> str:
    """The `record` that a graph of the model would have, under strategies that do not execute it."""
    mode = fake_mode()
    with fake_weights(model, mode), _as_written(), functions_are_operators():
        inputs = {name: fake(mode, tensor) for name, tensor in example_inputs.items()}
        return observe(model, find_repeated(model), inputs, mode).key


@dataclass
class _Exporter:
    """Exports what was observed before, and checks that it still does the same."""

    mode: FakeTensorMode
    observation: Observation

    def whole(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> ExportedProgram:
        assert self.observation.whole is not None
        outline = self.observation.whole.outline.hexdigest()

        def run(path: str, module: nn.Module, function: Any, args: Any, kwargs: Any) -> Any:
            with self._watched("forward", outline), self._reads(ROOT):
                return function(*args, **kwargs)

        with intercepted(model, [""], run):
            return _export(model, (), dict(inputs))

    def leaf(self, leaf: Leaf) -> ExportedProgram:
        call = self.observation.calls[leaf.call]
        name = f"forward of '{call.path}'"

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.set_grad_enabled(call.grad), self._watched(name, call.outline), self._reads(str(leaf.call)):
                return nn.Module.__call__(leaf.module, *args, **kwargs)

        return _export(_Flat(leaf, run), tuple(fake(self.mode, given) for given in leaf.given), {})

    def _reads(self, scope: str) -> AbstractContextManager[Any]:
        """Inside, Python's reads of tensors get the values that they got in the execution."""
        if isinstance(self.observation, Execution):
            return self.observation.reads.replay(scope)
        return nullcontext()

    @contextmanager
    def _watched(self, name: str, outline: str) -> Iterator[None]:
        """Inside, what ran before runs again. Raises UserError where it does something else."""
        with Outline() as seen:
            yield
        if seen.digest != outline and not isinstance(self.observation, Execution):
            raise UserError(
                f"what {name} computes changes from one call to the next: it reads something that a call changes; a "
                "compiled model computes the same in each step"
            )


class _Flat(nn.Module):
    """A repeated module as a function of a flat list of tensors."""

    def __init__(self, leaf: Leaf, run: Callable[..., Any]) -> None:
        super().__init__()
        self.module = leaf.module
        self._leaf, self._run = leaf, run

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        args, kwargs = self._leaf.arguments.put(tensors)
        return Structure.take(self._run(*args, **kwargs))[1]


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    program = export(module, args, kwargs, strict=False)
    signature = program.graph_signature
    changed = [*signature.buffers_to_mutate.values(), *getattr(signature, "parameters_to_mutate", {}).values()]
    changed += written(program)
    if changed:
        raise UserError(f"forward changes {changed[0]}; what a step changes are trained parameters alone")
    return decompose(program)


@contextmanager
def _as_written() -> Iterator[None]:
    """Inside, compiled functions run as they are written, and a read that fake tensors cannot answer is a UserError
    that says where the read is."""
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    except (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException) as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if is_own_code(frame.filename)]
        where = f" (at {line_of(own[-1].filename, own[-1].lineno or 0)})" if own else ""
        raise UserError(
            f"the model reads a tensor's value while it is traced{where}; use a trace strategy that executes it "
            f"({', '.join(name for name, known in STRATEGIES.items() if known.executes)}), or remove the read"
        ) from error


def _merge_equal(
    session: Session, traced: dict[str, ExportedProgram]
) -> tuple[dict[str, Block], dict[str, CallTarget], dict[str, dict[str, Tensor]]]:
    """The distinct blocks by number; what a call of each leaf becomes; and the constants of each block."""
    blocks: dict[str, Block] = {}
    constants: dict[str, dict[str, Tensor]] = {}
    same: dict[str, str] = {}
    targets: dict[str, CallTarget] = {}
    for token, program in traced.items():
        leaf = session.leaves[token]
        assert leaf.module is not None
        kind = type(leaf.module).__name__
        names_of_inputs = leaf.arguments.tensor_names(list(inspect.signature(leaf.module.forward).parameters))
        converter = Converter(program, session, leaf.module, "module.", {}, input_names=names_of_inputs)
        block = converter.block("block", kind)
        used = {name for node in block.nodes for name in node.inputs}.union(block.outputs)
        kept = [index for index, name in enumerate(block.inputs) if name in used]
        block.inputs = [block.inputs[index] for index in kept]
        block.tensors = {name: replace(meta, requires_grad=False) for name, meta in block.tensors.items()}
        content = repr((block, {path: digest(value) for path, value in converter.constants.items()}))
        if content not in same:
            block.name = same[content] = str(len(blocks))
            blocks[same[content]], constants[same[content]] = block, converter.constants
        targets[token] = CallTarget(same[content], kept)
    return blocks, targets, constants


def _assemble(
    model: nn.Module,
    root: Block,
    root_constants: Mapping[str, Tensor],
    blocks: dict[str, Block],
    constants: Mapping[str, Mapping[str, Tensor]],
    buffers: Mapping[str, Tensor],
) -> Graph:
    """Puts the graph together from its blocks.

    Each call is bound to its module's parameters and its block's constants; equal constants are tied; and tensors that
    need a gradient are marked.
    """
    canonical: dict[int, str] = {}
    names: dict[str, str] = {}
    metas: dict[str, TensorMeta] = {}
    trained = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in [*trained.items(), *model.named_buffers(remove_duplicate=False)]:
        names[name] = canonical.setdefault(id(tensor), name)
        metas[name] = TensorMeta(tuple(tensor.shape), tensor.dtype, name in trained and tensor.requires_grad)
    fixed = {**buffers, **root_constants}
    calls = [node for node in root.nodes if isinstance(node, Call)]
    for call in calls:
        fixed.update({f"{call.module}.{path}": value.clone() for path, value in constants[call.block].items()})
    for name, tensor in fixed.items():
        names.setdefault(name, name)
        metas.setdefault(name, TensorMeta(tuple(tensor.shape), tensor.dtype))
    root.parameters = {tensor: names[path] for tensor, path in root.parameters.items()}
    for call in calls:
        rest = blocks[call.block].parameters
        call.parameters = {tensor: names[f"{call.module}.{path}"] for tensor, path in rest.items()}
    graph = Graph(root, blocks, {}, {})
    used = {path for _, _, path in graph.parameter_uses()}
    graph.parameters = {path: meta for path, meta in metas.items() if path in used}
    graph.buffers = {path: tensor for path, tensor in fixed.items() if path in used}
    graph.tied = {name: path for name, path in names.items() if name != path and path in used}
    count_draws(graph, model)
    mark_gradients(graph)
    return graph
