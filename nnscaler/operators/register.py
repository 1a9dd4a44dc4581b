"""Registering functions of the user's own as operators."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from nnscaler.annotation import Annotation, Shape
from nnscaler.errors import UserError
from nnscaler.graph import Node, map_refs, refs
from nnscaler.operators.arguments import REQUIRED, signature_of, written_by_user
from nnscaler.operators.registry import (
    Annotate,
    BackwardRatio,
    Counted,
    Examples,
    Exchange,
    Flops,
    Operator,
    Saves,
    Workspace,
    add,
    arguments,
    find,
    leaf_tracer,
    never,
    no_examples,
    no_flops,
    no_workspace,
    operator_of,
    save_inputs,
)


def register_op(
    annotation: str | Callable[..., str],
    *,
    name: str | None = None,
    flops: Flops | None = None,
    unmasked: Flops | None = None,
    backward: float | BackwardRatio | None = None,
    saves: Saves = save_inputs,
    keeps: Workspace = no_workspace,
    workspace: Workspace = no_workspace,
    along: Mapping[str, Callable[..., Any] | str] | None = None,
    exchanges: Mapping[str, Exchange] | None = None,
    among_copies: Callable[..., Any] | str | None = None,
    examples: Examples | None = None,
    draws: Callable[[Node], bool] = never,
    counted: Counted | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function of tensors as one operator that the compiler may split as its annotation says.

        @register_op("b l d^, n^ d^, b l -> b l")
        def chunk_linear_cross_entropy(hidden_states, weight, labels, padding_idx, chunk_size=1024): ...

        scaled = register_op("* -> *")(Scaled.apply)  # of a torch.autograd.Function; the model calls `scaled`

    What it returns is to be called in place of the function. It becomes one node of the traced graph, whatever the
    function does inside, and generated code calls the function on each device's shards. Outside of the compiler it
    does what the function does. `nnscaler.verify_op` tries whether the annotation is true.

    *   The function may be compiled (`torch.compile`), or the `apply` of a `torch.autograd.Function`.
    *   Its tensor arguments, in the order of its signature, are the annotation's inputs. They may be given by place or
        by keyword, and stand in lists. One may be left out, or be None, where the function allows it: what the
        annotation says of it is then left out too.
    *   Other arguments are constants, and not annotated: numbers, texts, types of tensors, functions that can be
        imported, and lists, tuples and dicts of these. They are written into the generated code.
    *   It returns a tensor, or a tuple or list of tensors, the annotation's outputs.

    annotation  see `nnscaler.annotation`; or a function that is called with the operator's own arguments, and returns
                the text for them. It gets tensors without values (on the meta device), of which only shapes matter
    name        the operator's name in graphs and plans; the function's own by default
    flops       (local size of each annotated name, node) -> forward operations; 0 (memory-bound) by default
    unmasked    the same if no mask hid anything, for figures that count so; `flops` by default
    backward    backward operations as a multiple of forward's, or a function (node, inputs) of them; by default once
                for each input that has a gradient
    saves       which tensors backward keeps; the inputs by default
    keeps       (local size of each annotated name, node, local inputs) -> bytes that backward keeps beside these; none
                by default
    workspace   (local size of each annotated name, node, local inputs) -> bytes that a call holds inside itself, beside
                its tensors and their gradients; none by default
    along       for names along which shards need to know of each other: the function to call instead, with the mesh
                axis (`nnscaler.runtime.axis.Axis`; several for one, where all split the name) before the other
                arguments; or its name `module.function`
    exchanges   for names in `along`: (local size of each annotated name, devices, local inputs) -> bytes of a device
                that its function sends to others, and keeps where they arrive; as many come back. By default, what is
                sharded of inputs and outputs is sent
    among_copies  the function to call instead where several copies of the model train on different samples, with their
                group (an `Axis`) before the other arguments; or its name `module.function`
    examples    (node, local inputs) -> place of an input -> its values when a call is timed, where values decide how
                long it takes; by default random numbers, and zeros for integers
    draws       whether a call draws random numbers that depend on what was drawn before; never, by default
    counted     (node, input shapes, counters): changes such a call into one that draws by counting, whatever the plan,
                see `nnscaler.kernels.random`; by default it is refused

    Raises UserError where the annotation cannot be parsed, the function has no name, or the name belongs to another
    function.
    """
    if isinstance(annotation, str):
        Annotation.parse(annotation)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        written = written_by_user(function)
        own_name = name or getattr(written, "__name__", None)
        if own_name is None:
            raise UserError(f"register_op got a {type(function).__name__}, which has no name; give one as name=")
        operator = Operator(
            name=own_name,
            annotate=_of_given_tensors(annotation) if isinstance(annotation, str) else _of_arguments(annotation),
            flops=flops or no_flops,
            unmasked=unmasked,
            backward=backward,
            saves=saves,
            keeps=keeps,
            workspace=workspace,
            function=function,
            along=along or {},
            exchanges=exchanges or {},
            among_copies=among_copies,
            examples=examples or no_examples,
            draws=draws,
            counted=counted,
        )
        known = find(operator.name)
        if known is not None and (known.function is None or _full_name(known.function) != _full_name(function)):
            raise UserError(f"an operator named '{operator.name}' is already registered; choose another name=")
        add(operator)
        signature = signature_of(function)

        @functools.wraps(function, updated=())  # a compiled function's attributes are its own
        def call(*args: Any, **kwargs: Any) -> Any:
            tracer = leaf_tracer.get()
            if tracer is None:
                return function(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            return tracer(operator, bound.args, bound.kwargs)

        call.operator = operator  # type: ignore[attr-defined]
        return call

    return decorate


def _full_name(function: Callable[..., Any]) -> str:
    return str(getattr(written_by_user(function), "__qualname__", type(function).__qualname__))


def _of_given_tensors(annotation: str) -> Annotate:
    """The annotation without the inputs that a call leaves out.

    It describes the first parameters that are tensors in the call, or None and may be tensors, as many as it has
    inputs.
    """
    inputs, outputs = annotation.split("->")
    described = [text.strip() for text in inputs.split(",")]

    def annotate(node: Node, input_shapes: Sequence[Shape], output_shapes: Sequence[Shape]) -> str:
        if len(input_shapes) >= len(described):
            return annotation
        given = [text for text, is_given in zip(described, _slots(node)) if is_given]
        return f"{', '.join(given)} ->{outputs}" if len(given) == len(input_shapes) else annotation

    return annotate


def _slots(node: Node) -> list[bool]:
    """For each tensor that a call of a registered operator could have: whether it has it."""
    function = operator_of(node).function
    assert function is not None
    hints = {parameter.name: parameter.annotation for parameter in signature_of(function).parameters.values()}
    slots: list[bool] = []
    for name, value in arguments(node).items():
        tensors = refs(value)
        may_be_tensor = hints.get(name, REQUIRED) is REQUIRED or "Tensor" in str(hints[name])
        slots += [True] * len(tensors) or [False] * (value is None and may_be_tensor)
    return slots


def _of_arguments(annotation: Callable[..., str]) -> Annotate:
    """The annotation that a function of the operator's own arguments gives."""

    def annotate(node: Node, input_shapes: Sequence[Shape], output_shapes: Sequence[Shape]) -> str:
        shapes = iter(input_shapes)
        args, kwargs = map_refs((node.args, node.kwargs), lambda ref: torch.empty(next(shapes), device="meta"))
        try:
            inspect.signature(annotation).bind(*args, **kwargs)
        except TypeError as error:
            raise UserError(f"the annotation's function does not take the operator's arguments: {error}") from None
        text = annotation(*args, **kwargs)
        if not isinstance(text, str):
            raise UserError(f"the annotation's function gives {text!r}; it must give a text")
        return text

    return annotate
