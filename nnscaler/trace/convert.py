"""From an exported program, which consists of ATen operators before autograd, to a `Block`."""

from __future__ import annotations

import operator as python_operator
import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from nnscaler.errors import UserError
from nnscaler.graph import Block, Call, Node, Ref, TensorMeta, map_refs
from nnscaler.trace.decompose import WITHOUT_EFFECT
from nnscaler.trace.digest import digest
from nnscaler.trace.leaf import Session
from nnscaler.trace.own_code import source_of

_VALUE_READS = {"aten.item.default", "aten._local_scalar_dense.default", "aten.nonzero.default"}


@dataclass(frozen=True)
class CallTarget:
    """What the calls of a leaf (see `nnscaler.trace.leaf`) become.

    block   the name of the block that they run
    inputs  indices of the leaf's tensors that are the block's inputs
    """

    block: str
    inputs: list[int]


@dataclass
class Converter:
    """Converts one exported program.

    module       that the program does the same as
    prefix       with which the program's module paths begin, with its dot
    targets      leaf of a repeated module -> the block that it was traced to
    constants    collects the tensors that the program holds besides parameters and buffers, by path; one that is made
                 in forward is named after its value
    input_names  names for the inputs, in place of those that export gives
    """

    program: ExportedProgram
    session: Session
    module: nn.Module
    prefix: str = ""
    targets: dict[str, CallTarget] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    input_names: list[str] | None = None

    def block(self, name: str, module_type: str) -> Block:
        block = Block(name, module_type)
        signature = self.program.graph_signature
        env: dict[fx.Node, Any] = {}
        placeholders = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        for node, spec in zip(placeholders, signature.input_specs, strict=True):
            value = node.meta.get("val")
            if not isinstance(value, Tensor):
                env[node] = value
                continue
            path = (spec.target or "").removeprefix(self.prefix)
            if spec.kind == InputKind.CONSTANT_TENSOR:
                path = self._constant(path, self.program.constants[spec.target])
            if spec.kind == InputKind.USER_INPUT:
                tensor = self.input_names[len(block.inputs)] if self.input_names else node.name
            else:
                tensor = path.replace(".", "_")
            tensor = unused(_identifier(tensor), set(block.tensors))
            env[node] = Ref(tensor)
            block.tensors[tensor] = _meta(value)
            if spec.kind == InputKind.USER_INPUT:
                block.inputs.append(tensor)
            else:
                block.parameters[tensor] = path
        results = self._nodes(self.program.graph_module, env, block, no_grad=False)
        flat = results if isinstance(results, (list, tuple)) else [results]
        # What forward writes into its inputs comes back too; nobody reads a batch again.
        kinds = [spec.kind for spec in signature.output_specs]
        block.outputs = [
            item.name
            for item, kind in zip(flat, kinds, strict=True)
            if isinstance(item, Ref) and kind == OutputKind.USER_OUTPUT
        ]
        _drop_unused(block)
        self._keep_used_constants(block)
        _name_after_modules(block)
        return block

    def _constant(self, path: str, value: Tensor) -> str:
        """Adds a constant to `constants`, and returns its path."""
        if path.startswith("lifted_tensor_") and _has_values(value):
            path = f"constant_{digest(value)[:8]}"
        self.constants[path] = value.detach()
        return path

    def _keep_used_constants(self, block: Block) -> None:
        paths = set(block.parameters.values())
        self.constants = {path: value for path, value in self.constants.items() if path in paths}
        for path, value in self.constants.items():
            if not _has_values(value):
                raise UserError(
                    f"forward uses a tensor ({path}, {list(value.shape)}) that is neither a parameter nor a buffer, "
                    "and has no fixed value; register it with register_parameter or register_buffer"
                )

    def _nodes(self, module: fx.GraphModule, env: dict[fx.Node, Any], block: Block, no_grad: bool) -> Any:
        for node in module.graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], lambda item: env[item])
            if node.op == "call_function":
                env[node] = self._node(node, module, env, block, no_grad)
        raise AssertionError("a graph without output")

    def _node(self, node: fx.Node, module: fx.GraphModule, env: dict[fx.Node, Any], block: Block, no_grad: bool) -> Any:
        target = node.target
        if target is python_operator.getitem:
            return env[node.args[0]][node.args[1]]  # type: ignore[index]
        inner = self._region(node, module)
        if inner is not None:
            body, arguments, enabled = inner
            holders = [item for item in body.graph.nodes if item.op == "placeholder"]
            inside = {
                holder: env[argument] if isinstance(argument, fx.Node) else argument
                for holder, argument in zip(holders, arguments, strict=True)
            }
            return self._nodes(body, inside, block, no_grad if enabled is None else not enabled)
        op = str(target).replace("aten.detach_.", "aten.detach.")  # of a constant that `torch.tensor` made
        if op in WITHOUT_EFFECT:
            return None
        source = source_of(node.meta)
        if op in _VALUE_READS:
            raise UserError(f"the model reads a tensor's value while it is traced ({op} at {source}); remove the read")
        args = fx.map_arg(node.args, lambda item: env[item])
        kwargs = fx.map_arg(node.kwargs, lambda item: env[item])
        same = _identity(op, args, node.meta["val"], block)
        if same is not None:
            return same
        made, returns_tuple = self._made(node, op, tuple(args), dict(kwargs))
        path, made.module_types = _module_stack(node, self.prefix)
        made.module = _without_slices(path, self.module)
        made.source, made.no_grad, made.returns_tuple = source, no_grad, returns_tuple
        value = node.meta["val"]
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        names = [made.name] if len(values) == 1 else [f"{made.name}_{i}" for i in range(len(values))]
        names = [unused(name, set(block.tensors)) for name in names]
        for name, item in zip(names, values):
            if not isinstance(item, Tensor):
                raise UserError(f"operator {op} at {source} returns {type(item).__name__}; only tensors are supported")
            block.tensors[name] = _meta(item)
        made.outputs = tuple(names)
        block.nodes.append(made)
        refs = [Ref(name) for name in names]
        return refs if isinstance(value, (list, tuple)) else refs[0]

    def _made(self, node: fx.Node, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Node, bool]:
        """The node by itself, without outputs or module; and whether its operator returns a tuple."""
        if op != "nnscaler.leaf.default":
            return Node(node.name, op, args, kwargs, ()), isinstance(node.meta["val"], (list, tuple))
        token, tensors = args
        leaf = self.session.leaves[token]
        if leaf.operator is None:
            target = self.targets[token]
            arguments = tuple(tensors[index] for index in target.inputs)
            return Call("call", "call", arguments, {}, (), block=target.block), len(node.meta["val"]) > 1
        args, kwargs = leaf.arguments.put(tensors)
        if not leaf.result.is_flat:
            raise UserError(
                f"registered operator '{leaf.operator.name}' at {source_of(node.meta)} returns "
                f"{leaf.result.described}; it must return a tensor, or a tuple or list of tensors"
            )
        name = _identifier(leaf.operator.name)
        return Node(name, leaf.operator.name, tuple(args), kwargs, ()), not leaf.result.is_tensor

    @staticmethod
    def _region(node: fx.Node, module: fx.GraphModule) -> tuple[fx.GraphModule, Any, bool | None] | None:
        """(body, arguments, whether gradients are enabled) of a region that export wraps in an operator.

        The last is None where it is as outside.
        """
        op = str(node.target)
        if op == "wrap_with_set_grad_enabled":
            enabled, body, *arguments = node.args
            return getattr(module, str(body.target)), arguments, bool(enabled)  # type: ignore[union-attr]
        if op == "wrap_with_autocast":
            _, _, enabled, _, body, *arguments = node.args
            inside = getattr(module, str(body.target))  # type: ignore[union-attr]
            if enabled:
                line = next(filter(None, (source_of(item.meta) for item in inside.graph.nodes)), "an unknown line")
                raise UserError(
                    f"torch.autocast inside the model is not supported (it is on at {line}); cast explicitly"
                )
            return inside, arguments, None
        return None


def _has_values(tensor: Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) and not tensor.is_meta


def _meta(value: Tensor) -> TensorMeta:
    return TensorMeta(tuple(int(size) for size in value.shape), value.dtype, value.requires_grad)


def _identity(op: str, args: Any, result: Any, block: Block) -> Ref | None:
    """The input of a node, where the node does not change it; else None."""
    if not (args and isinstance(args[0], Ref) and isinstance(result, Tensor)):
        return None
    if block.tensors[args[0].name].dtype != result.dtype or block.tensors[args[0].name].shape != tuple(result.shape):
        return None
    if op in _IDENTITIES:
        return args[0]
    if op in ("aten.dropout.default", "aten.feature_dropout.default"):
        return args[0] if args[1] == 0.0 or not args[2] else None
    if op in _NEUTRAL:
        return args[0] if not isinstance(args[1], Ref) and args[1] == _NEUTRAL[op] else None
    return None


_IDENTITIES = {
    "aten.contiguous.default",
    "aten.alias.default",
    "aten.lift_fresh_copy.default",
    "aten.to.dtype",
    "aten.to.device",
    "aten._to_copy.default",
}
_SLICE = re.compile(r"(?:^|\.)slice\((\S+), (\S+), (\S+)\)\.(\d+)")
_NEUTRAL = {"aten.add.Tensor": 0, "aten.mul.Tensor": 1, "aten.div.Tensor": 1}


def _identifier(text: str) -> str:
    text = re.sub(r"\W", "_", text)
    return text if re.match(r"[A-Za-z]", text) else f"t_{text}"


def _module_stack(node: fx.Node, prefix: str) -> tuple[str, tuple[str, ...]]:
    """Path of the calling module below the traced one; and the class names from the traced module inwards."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    root = prefix.rstrip(".")
    inside = [(path, kind) for path, kind in stack if not root or path == root or path.startswith(prefix)]
    types = tuple((kind if isinstance(kind, str) else kind.__qualname__).rsplit(".", 1)[-1] for _, kind in inside)
    path = inside[-1][0] if inside else ""
    return re.sub(r"@\d+$", "", "" if path == root else path.removeprefix(prefix)), types


def _without_slices(path: str, module: nn.Module) -> str:
    """The path of a part of a module. Where some part has two names, export tells in which slice of a list it is:
    layers.slice(None, 3, None).0"""
    while found := _SLICE.search(path):
        before, after = path[: found.start()], path[found.end() :]
        bounds = slice(*(None if bound == "None" else int(bound) for bound in found.groups()[:3]))
        index = range(len(module.get_submodule(before)._modules))[bounds][int(found[4])]
        path = f"{before}.{index}{after}".removeprefix(".")
    return path


def _drop_unused(block: Block) -> None:
    """Removes nodes and parameters whose results nobody reads. Inputs stay."""
    used = set(block.outputs)
    kept = []
    for node in reversed(block.nodes):
        if used.intersection(node.outputs):
            used.update(node.inputs)
            kept.append(node)
    block.nodes = kept[::-1]
    block.parameters = {name: path for name, path in block.parameters.items() if name in used}
    alive = used.union(block.inputs, *(node.outputs for node in block.nodes))
    block.tensors = {name: meta for name, meta in block.tensors.items() if name in alive}


def _name_after_modules(block: Block) -> None:
    """Names the last result of each module call after the module: `q_proj` says more than `linear`."""
    taken = {*block.inputs, *block.parameters}
    renamed: dict[str, str] = {}
    for node, following in zip(block.nodes, [*block.nodes[1:], None]):
        leaves_module = following is None or following.module != node.module
        role = _role(node.module)
        deeper = following is not None and following.module.startswith(f"{node.module}.")
        if node.module and leaves_module and not deeper and len(node.outputs) == 1:
            renamed[node.outputs[0]] = unused(_identifier(role), taken)
        for name in node.outputs:
            if name not in renamed:
                renamed[name] = unused(name, taken)
    for node in block.nodes:
        node.args = map_refs(node.args, lambda ref: Ref(renamed.get(ref.name, ref.name)))
        node.kwargs = map_refs(node.kwargs, lambda ref: Ref(renamed.get(ref.name, ref.name)))
        node.outputs = tuple(renamed[name] for name in node.outputs)
        node.name = node.outputs[0]
    block.outputs = [renamed.get(name, name) for name in block.outputs]
    block.tensors = {renamed.get(name, name): meta for name, meta in block.tensors.items()}


def _role(module: str) -> str:
    """The last name of a module path; for a member of a list, the list's name and its index."""
    *_, before, last = ("", *module.split("."))
    return f"{before}_{last}" if last.isdigit() else last


def unused(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate
