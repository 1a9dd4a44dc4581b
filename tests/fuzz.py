"""Random small modules of the tables' operators and of registered ones with random annotations, split at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from nnscaler import register_op
from nnscaler.graph import Graph
from nnscaler.operators import bind
from nnscaler.operators.arguments import overload
from nnscaler.planner.policies import ways_of
from tests.operators.calls import is_fixed
from tests.operators.samples import known, samples

SIZES = (4, 2, 6, 4)
NAMES = "abcd"
DEVICES = 2
LEFT_OUT = ("empty", "empty_like", "new_empty")  # whose values are anything


@dataclass(frozen=True)
class Called:
    """One call in a random module.

    name      of the operator
    function  what is called
    args, kwargs  an example of its arguments. Float tensors become parameters, others buffers
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        shapes = [list(one.shape) if isinstance(one, Tensor) else one for one in self.args]
        return f"{self.name}({shapes}, {self.kwargs})"


class Random(nn.Module):
    """Calls operators one after the other. Each takes parameters; where an earlier result has the shape of one, the
    parameter is scaled a little by it. The loss is a weighted sum of all results."""

    def __init__(self, calls: list[Called]) -> None:
        super().__init__()
        self.calls, self.places = calls, []
        for call in calls:
            self.places.append(self._hold((call.args, call.kwargs)))

    def _hold(self, value: Any) -> Any:
        """The value, with tensors replaced by the names under which this module holds them."""
        if isinstance(value, Tensor):
            name = f"t{len(self._parameters) + len(self._buffers)}"
            if value.is_floating_point() and not is_fixed(value):
                self.register_parameter(name, nn.Parameter(value.detach().double()))
            else:
                self.register_buffer(name, value.detach().clone())
            return Held(name)
        if isinstance(value, dict):
            return {key: self._hold(one) for key, one in value.items()}
        return type(value)(map(self._hold, value)) if type(value) in (list, tuple) else value

    def forward(self, x: Tensor) -> Tensor:
        made, loss = [x], x.new_zeros(())
        for call, place in zip(self.calls, self.places):
            args, kwargs = self._given(place, made)
            results = call.function(*args, **kwargs)
            for result in results if isinstance(results, (list, tuple)) else [results]:
                result = torch.nan_to_num(result.double())
                weights = torch.arange(result.numel(), dtype=torch.float64).cos().reshape(result.shape)
                loss = loss + (result * weights).sum()
                made.append(result)
        return loss

    def _given(self, value: Any, made: list[Tensor]) -> Any:
        if isinstance(value, Held):
            tensor = getattr(self, value.name)
            alike = [one for one in made if one.shape == tensor.shape]
            return tensor * (1 + 0.1 * alike[-1].tanh()) if alike and isinstance(tensor, nn.Parameter) else tensor
        if isinstance(value, dict):
            return {key: self._given(one, made) for key, one in value.items()}
        return type(value)(self._given(one, made) for one in value) if type(value) in (list, tuple) else value


@dataclass(frozen=True)
class Held:
    name: str


def of_tables() -> st.SearchStrategy[Called]:
    """A call of any operator in the tables."""
    torch.manual_seed(0)  # the same values in all processes
    calls = [
        Called(op, overload(op), args, kwargs)
        for op in known()
        if op.startswith("aten.") and op.split(".")[1] not in LEFT_OUT
        for args, kwargs in samples(*SIZES)[op]
    ]
    return st.sampled_from(calls)


@st.composite
def registered(draw: st.DrawFn) -> Called:
    """A call of an operator with a random annotation that is true: a sum of products, and perhaps a softmax along a
    name that may not be split."""
    size = dict(zip(NAMES, SIZES))
    tensors = draw(st.lists(st.permutations(NAMES).map(lambda names: names[:2]), min_size=1, max_size=3))
    present = sorted({name for names in tensors for name in names})
    result = draw(st.permutations(present))[: draw(st.integers(0, len(present)))]
    frozen = [name for name in present if draw(st.booleans())]
    along = next((result.index(name) for name in result if name in frozen), None)
    if along is not None:  # and terms of a sum cannot be normalised each by itself
        frozen += [name for name in present if name not in result]
    spec = f"{','.join(map(''.join, tensors))}->{''.join(result)}"

    def written(names: list[str]) -> str:
        marks = {name: "^" if name in frozen else "" if name in result else "+" for name in names}
        return " ".join(f"{name}{mark}" for name, mark in marks.items()) or "()"

    annotation = f"{', '.join(map(written, tensors))} -> {written(result)}"

    def function(*given: Tensor) -> Tensor:
        made = torch.einsum(spec, *given)
        return made if along is None else made.softmax(along)

    name = "fuzz_" + "".join(letter if letter.isalnum() else "_" for letter in f"{annotation}_{along}")
    function.__qualname__ = function.__name__ = name
    shapes = [[size[letter] for letter in names] for names in tensors]
    values = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    args = tuple(torch.rand(shape, generator=values) for shape in shapes)
    return Called(annotation, register_op(annotation, name=name)(function), args)


def split_at_random(seed: int) -> Callable[[Graph], None]:
    """A policy that splits each operator in any of the ways that its annotation allows."""

    def policy(graph: Graph) -> None:
        choices = random.Random(seed)
        for block in graph.all_blocks():
            for unit, ways in ways_of(block):
                sizes = [bind(node, block).sizes for node in unit.nodes]
                able = [
                    way
                    for way in ways
                    if all(of[name] % DEVICES == 0 for of, split in zip(sizes, way) for name in split.names)
                ]
                for node, split in zip(unit.nodes, choices.choice(able)):
                    node.pin(split.name)

    return policy
