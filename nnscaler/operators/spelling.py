"""How a call of an operator is written in Python: `F.linear(x, w)` rather than `torch.ops.aten.linear.default(x, w)`.

The text of an operator's entry is a template; or a function of a `WrittenCall`, where a template cannot say it. In a
template,

    {name}   is an argument, by its name in ATen's schema; {op} is the operator's own name
    *        the arguments that are not written elsewhere and do not have their default values: by place as long as
             none is left out before them, then by keyword
    **       the same, all by keyword

An argument that is not written, and does not have its default value, is refused: nothing is dropped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from nnscaler.errors import UserError
from nnscaler.graph import Node, Ref, TensorMeta, format_argument
from nnscaler.operators.arguments import REQUIRED, by_name, parameters

# Values of arguments that say where or in which order of memory a result lies, or how to compute it, but not what it
# is. All of one model's tensors are on one device, and no operator of a traced graph changes a tensor in place.
_WITHOUT_EFFECT: Mapping[str, Sequence[Any] | None] = {  # None: any value
    "device": None,
    "pin_memory": (False,),
    "layout": (torch.strided,),
    "memory_format": (torch.preserve_format, torch.contiguous_format),
    "non_blocking": None,
    "copy": None,
    "cudnn_enable": None,
    "cudnn_enabled": None,
    "implicit": None,
    "output_size": None,
}
_PLACES = re.compile(r"\{(?P<name>\w+)\}|(?P<comma>, )?(?P<rest>\*{1,2})(?=\))")

METHOD = "{self}.{op}(*)"
FUNCTION = "torch.{op}(*)"
WHOLE_SIZE = 2**63 - 1  # the end of a slice that runs to the end


class WrittenCall:
    """A call that is being written.

    `call[name]` is the text of an argument, and `value(name)` the argument itself; both count it as written. Tensor
    arguments are `Ref`s with the names to write.

    results  shapes and types of what this device computes
    parts    annotated name -> over how many devices it is split; names that are whole may be missing
    """

    def __init__(
        self,
        node: Node,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        results: Sequence[TensorMeta],
        parts: Mapping[str, int],
    ) -> None:
        self.node = node
        self.op = node.op.split(".")[1]
        self.arguments = by_name(node.op, args, kwargs)
        self.results = results
        self.parts = parts
        self.unwritten = {
            parameter.name
            for parameter in parameters(node.op)
            if not _is_default(self.arguments[parameter.name], parameter.default)
        }

    def value(self, name: str) -> Any:
        self.unwritten.discard(name)
        return self.arguments[name]

    def __getitem__(self, name: str) -> str:
        return format_argument(self.value(name))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first result on this device."""
        return self.results[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.results[0].dtype

    def without_effect(self) -> None:
        """Counts arguments as written, because their values do not change the results."""
        for name in list(self.unwritten):
            values = _WITHOUT_EFFECT.get(name, ())
            if values is None or self.arguments[name] in values:
                self.unwritten.discard(name)

    def rest(self, by_place: bool) -> str:
        """The arguments that have not been written yet."""
        self.without_effect()
        texts = []
        for parameter in parameters(self.node.op):
            if parameter.name in self.unwritten:
                by_keyword = parameter.keyword_only or not by_place
                texts.append(f"{parameter.name}={self[parameter.name]}" if by_keyword else self[parameter.name])
            elif _is_default(self.arguments[parameter.name], parameter.default):
                by_place = False  # what comes after a gap is written by keyword
        return ", ".join(texts)

    def fill(self, template: str) -> str:
        # What the template names is written there, also where it comes after `*`.
        named = {match["name"]: "" for match in _PLACES.finditer(template) if match["name"]}
        texts = {name: self.op if name == "op" else self[name] for name in named}

        def place(match: re.Match[str]) -> str:
            if match["name"]:
                return texts[match["name"]]
            rest = self.rest(match["rest"] == "*")
            return f"{match['comma'] or ''}{rest}" if rest else ""

        return _PLACES.sub(place, template)


Text = str | Callable[[WrittenCall], str]


def write(text: Text, call: WrittenCall) -> str:
    """A call as its operator's entry writes it. Raises UserError for an argument that the text does not say."""
    written = call.fill(text) if isinstance(text, str) else text(call)
    call.without_effect()
    if call.unwritten:
        given = ", ".join(f"{name}={format_argument(call.arguments[name])}" for name in sorted(call.unwritten))
        raise UserError(
            f"operator {call.node.op} at {call.node.source or 'an unknown line'}: the compiler does not support {given}"
        )
    return written


def _is_default(value: Any, default: Any) -> bool:
    if default is REQUIRED or isinstance(value, Ref) or type(default) is not type(value):
        return default is value or (_is_number(default) and _is_number(value) and default == value)
    return bool(default == value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def infix(sign: str, swapped: bool = False) -> Callable[[WrittenCall], str]:
    """Text such as `a + b`; or a call of the function, where `alpha` scales the second operand."""

    def text(call: WrittenCall) -> str:
        if "alpha" in call.unwritten:
            return call.fill("torch.{op}({self}, {other}, **)")
        first, second = ("other", "self") if swapped else ("self", "other")
        return f"{call[first]} {sign} {call[second]}"

    return text


def sizes(method: str) -> Callable[[WrittenCall], str]:
    """A method that takes the sizes of the result, such as `x.reshape(2, 3)`: on a device, those of its own part."""

    def text(call: WrittenCall) -> str:
        source = call["self"]
        call.unwritten.clear()  # all other arguments say what the result's shape says
        return f"{source}.{method}({', '.join(map(str, call.shape)) or '()'})"

    return text
