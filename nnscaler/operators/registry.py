"""What the compiler knows about an operator, and the table of all operators.

An `Operator` is one entry of the table: its annotation, its Python text, and a few facts that these cannot say, such as
its arithmetic, what backward needs saved, and whether it draws random numbers. The planner and the code generator read
only the entry; they name no operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Protocol

import torch

from nnscaler.annotation import Annotation, Bound, Shape
from nnscaler.errors import UserError
from nnscaler.graph import Block, Node, Ref, TensorMeta, format_argument, map_refs, refs
from nnscaler.operators.arguments import by_name, overload, signature_of
from nnscaler.operators.spelling import METHOD, Text, WrittenCall, write

Annotate = Callable[[Node, Sequence[Shape], Sequence[Shape]], str]  # (node, input shapes, output shapes) -> annotation
Flops = Callable[[dict[str, int], Node], float]  # (local size of each annotated name, node) -> operations
Workspace = Callable[[dict[str, int], Node, Sequence[TensorMeta]], float]  # (the same, local inputs) -> bytes
BackwardRatio = Callable[[Node, Sequence[TensorMeta]], float]  # (node, inputs) -> a multiple of forward's operations
Exchange = Callable[[dict[str, int], int, Sequence[TensorMeta]], float]  # (local sizes, devices, inputs) -> bytes
Examples = Callable[[Node, Sequence[TensorMeta]], dict[int, torch.Tensor]]  # (node, inputs) -> values of some inputs
Saves = Callable[[Node, Sequence[TensorMeta], Sequence[TensorMeta]], list[str]]  # (node, inputs, outputs) -> tensors


class Counters(Protocol):
    """What a call needs that draws random numbers by counting (see `nnscaler.kernels.random`): tensors of its block."""

    @property
    def draws(self) -> Ref:
        """What the micro-batch draws."""

    def place(self) -> Ref:
        """The call's place in the model."""

    def numbers(self, shape: Shape, dim: int) -> Ref:
        """By how much each index along a dimension of a whole tensor raises an element's number."""


Counted = Callable[[Node, Sequence[Shape], Counters], None]  # (node, input shapes, counters): changes the node


def save_nothing(node: Node, inputs: Sequence[TensorMeta], outputs: Sequence[TensorMeta]) -> list[str]:
    """Backward reads no tensor, as for a sum."""
    return []


def save_inputs(node: Node, inputs: Sequence[TensorMeta], outputs: Sequence[TensorMeta]) -> list[str]:
    """Backward reads all inputs."""
    return node.inputs


def save_outputs(node: Node, inputs: Sequence[TensorMeta], outputs: Sequence[TensorMeta]) -> list[str]:
    """Backward reads all outputs, as for a sigmoid."""
    return list(node.outputs)


def save_both(node: Node, inputs: Sequence[TensorMeta], outputs: Sequence[TensorMeta]) -> list[str]:
    """Backward reads all inputs and outputs."""
    return [*node.inputs, *node.outputs]


def save_cofactors(node: Node, inputs: Sequence[TensorMeta], outputs: Sequence[TensorMeta]) -> list[str]:
    """For a product of any number of inputs: each input is saved where another one has a gradient."""
    return [
        name for i, name in enumerate(node.inputs) if any(meta.requires_grad for j, meta in enumerate(inputs) if j != i)
    ]


def backward_reads(**reads: str) -> Saves:
    """A `saves` function that names, for each argument, the arguments from which its gradient is computed.

    `result` stands for the operator's result, `result1` for its second one. For a product:
    `backward_reads(self="other", other="self")`.
    """

    def saves(node: Node, inputs: Sequence[TensorMeta], outputs: Sequence[TensorMeta]) -> list[str]:
        given = arguments(node)
        needs_gradient = {name for name, meta in zip(node.inputs, inputs) if meta.requires_grad}
        results = {"result": node.outputs[0], **{f"result{i}": name for i, name in enumerate(node.outputs)}}
        found: dict[str, None] = {}
        for argument_name, read in reads.items():
            if needs_gradient.intersection(refs(given.get(argument_name))):
                for name in read.split():
                    found.update(dict.fromkeys([results[name]] if name in results else refs(given.get(name))))
        return list(found)

    return saves


def never(node: Node) -> bool:
    return False


def no_workspace(sizes: dict[str, int], node: Node, inputs: Sequence[TensorMeta]) -> float:
    return 0.0


def no_examples(node: Node, inputs: Sequence[TensorMeta]) -> dict[int, torch.Tensor]:
    return {}


def no_flops(sizes: dict[str, int], node: Node) -> float:
    return 0.0


def contraction_flops(sizes: dict[str, int], node: Node) -> float:
    """One multiplication and one addition for each combination of all annotated dimensions."""
    return 2.0 * prod(sizes.values())


@dataclass(frozen=True)
class Operator:
    """Facts about one operator.

    annotate    annotation text for given input and output shapes
    text        the Python text of an ATen operator, see `nnscaler.operators.spelling`
    fp8_text    the same of a product in fp8 of two matrices, of which the first argument is written in its rounded
                form (see `nnscaler.kernels.fp8`); None: it has none
    later_text  the same of a product of which backward computes the gradient of the second of `factors`, a weight,
                later (see `nnscaler.kernels.later`)
    flops       forward floating-point operations from the local size of each annotated name
    unmasked    the same if no mask hid anything; None: there is none
    backward    backward operations as a multiple of forward's, or a function (node, inputs) of them; None: once for
                each of `factors` that has a gradient
    factors     the arguments that are multiplied; all tensors if none is named
    saves       names of the tensors that backward reads
    keeps       bytes that backward keeps of a call beside tensors that go in and come out
    workspace   bytes that a call holds inside itself, beside its tensors and their gradients
    draws       whether a call draws random numbers that depend on what was drawn before
    counted     makes such a call one that draws by counting; None: it is refused
    composed    it runs as many kernels where it is not compiled
    alias       the result is a view: no time, no memory
    function    the Python function that generated code calls; None for ATen operators
    along       annotated name -> the way to compute the shards of a split along it, where `function` on the shards does
                not: a function that takes the axis first, then `function`'s arguments, or its name `module.function`,
                which only generated code imports
    exchanges   of names in `along`: (local sizes, devices, local inputs) -> bytes that travel, and are kept where they
                arrive; as many come back. Without it, what is sharded of inputs and outputs travels
    among_copies  what is called instead of `function` where there are several copies of the model: with their group
                first
    examples    (node, local inputs) -> place of an input -> its values when a call is timed, where values decide how
                long it takes
    """

    name: str
    annotate: Annotate
    text: Text = METHOD
    fp8_text: Text | None = None
    later_text: Text | None = None
    flops: Flops = no_flops
    unmasked: Flops | None = None
    backward: float | BackwardRatio | None = None
    factors: tuple[str, ...] = ()
    saves: Saves = save_inputs
    keeps: Workspace = no_workspace
    workspace: Workspace = no_workspace
    draws: Callable[[Node], bool] = never
    counted: Counted | None = None
    composed: bool = False
    alias: bool = False
    function: Callable[..., Any] | None = None
    along: Mapping[str, Callable[..., Any] | str] = field(default_factory=dict)
    exchanges: Mapping[str, Exchange] = field(default_factory=dict)
    among_copies: Callable[..., Any] | str | None = None
    examples: Examples = no_examples

    def backward_ratio(self, node: Node, inputs: Sequence[TensorMeta]) -> float:
        """The operations of a call's backward, as a multiple of its forward's."""
        if self.backward is not None:
            return self.backward(node, inputs) if callable(self.backward) else self.backward
        factors = set(refs([arguments(node)[name] for name in self.factors])) if self.factors else set(node.inputs)
        return float(sum(meta.requires_grad for name, meta in zip(node.inputs, inputs) if name in factors))


_operators: dict[str, Operator] = {}


def add(operator: Operator) -> None:
    _operators[operator.name] = operator


def find(name: str) -> Operator | None:
    return _operators.get(name)


def names() -> list[str]:
    return sorted(_operators)


def operator_of(node: Node) -> Operator:
    """The operator of a node. Raises UserError where there is none, with the line of the call and how to register
    it."""
    operator = _operators.get(node.op)
    if operator is None:
        if node.op.startswith("aten.") and torch.Tag.nondeterministic_seeded in overload(node.op).tags:
            raise _draws_random_numbers(node)
        raise UserError(
            f"operator {node.op} has no annotation (called at {node.source or 'an unknown line'}); wrap the call in a "
            "function and register it: @nnscaler.register_op('<inputs> -> <outputs>'), for example 'b l d -> b l d'"
        )
    return operator


def arguments(node: Node) -> dict[str, Any]:
    """Every argument of a call, by the name of its parameter. Those that are not given have their defaults."""
    function = operator_of(node).function
    if function is None:
        return by_name(node.op, node.args, node.kwargs)
    bound = signature_of(function).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def bind(node: Node, block: Block) -> Bound:
    """The annotation of a node, matched to its shapes in `block`.

    Raises UserError, with the line of the model, for a call that the compiler does not support.
    """
    inputs = [block.tensors[name].shape for name in node.inputs]
    outputs = [block.tensors[name].shape for name in node.outputs]
    operator = operator_of(node)
    if operator.draws(node):
        raise _draws_random_numbers(node)
    if operator.function is None:  # what cannot be written is refused before it is planned
        spell(node, [Ref(name) for name in node.inputs], [block.tensors[name] for name in node.outputs])
    try:
        return Annotation.parse(operator.annotate(node, inputs, outputs)).bind(inputs, outputs)
    except UserError as error:
        place = f" at {node.source}" if node.source else ""
        raise UserError(f"operator {node.op}{place}: {error}") from None


def _draws_random_numbers(node: Node) -> UserError:
    known = arguments(node) if node.op in _operators else by_name(node.op, node.args, node.kwargs)
    given = ", ".join(f"{name}={format_argument(x)}" for name, x in known.items() if isinstance(x, (int, float)))
    return UserError(
        f"operator {node.op} at {node.source or 'an unknown line'} draws random numbers ({given}), which the compiler "
        "does not support; set dropout to 0 in the model's configuration, or call .eval() on the module"
    )


def spell(
    node: Node,
    inputs: Sequence[Ref],
    outputs: Sequence[TensorMeta],
    parts: Mapping[str, int] | None = None,
    in_fp8: bool = False,
    later: bool = False,
) -> str:
    """The Python expression of an ATen call.

    inputs   the tensor arguments, in order, with the names to write
    outputs  shapes and types of the results on this device
    parts    annotated name -> over how many devices it is split; None: nothing is split
    in_fp8   whether it is a product in fp8
    later    whether it is a product of which backward computes the gradient of the weight later

    Raises UserError for an argument that the operator's text does not say.
    """
    names = iter(inputs)
    args, kwargs = map_refs((node.args, node.kwargs), lambda ref: next(names))
    operator = operator_of(node)
    text = operator.fp8_text if in_fp8 else operator.later_text if later else operator.text
    assert text is not None, node.op
    return write(text, WrittenCall(node, args, kwargs, outputs, parts or {}))


LeafTracer = Callable[[Operator, tuple[Any, ...], dict[str, Any]], Any]
leaf_tracer: ContextVar[LeafTracer | None] = ContextVar("leaf_tracer", default=None)
"""Set while a model is traced: takes a registered operator's call instead of the function itself."""


def registered(name: str) -> Operator:
    """The operator registered under `name`, for generated code. Raises UserError where its module is not imported."""
    operator = _operators.get(name)
    if operator is None or operator.function is None:
        raise UserError(
            f"the generated code calls the registered operator '{name}', which this process has not registered; "
            "import the module that registers it first"
        )
    return operator


def all_registered() -> list[Operator]:
    """All operators that were registered with `register_op`, in the order of their names."""
    return [operator for _, operator in sorted(_operators.items()) if operator.function is not None]


def family(names: str, annotate: Annotate, text: Text = METHOD, *, saves: Saves = save_inputs, **facts: Any) -> None:
    """Adds one operator for each of the ATen overloads that are named in `names`, with spaces between them."""
    base = Operator("", annotate, text, saves=saves, **facts)
    for name in names.split():
        add(replace(base, name=f"aten.{name}"))
