"""Running a model once before it is traced, to learn which of its layers are the same.

Every strategy begins with this: on fake tensors, or, where Python needs values, on real ones
(`nnscaler.trace.execute`). Each call of a module that may repeat gets a record of its own. The records tell

* which calls can be traced as one;
* which modules depend on more than their arguments, and so are traced as a part of the whole;
* whether a second run would give the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from nnscaler.errors import UserError
from nnscaler.operators.registry import Operator
from nnscaler.trace.fake import Attributes, as_if_exporting
from nnscaler.trace.recorder import Record, Recorder
from nnscaler.trace.repeated import intercepted
from nnscaler.trace.structure import EmptyTensor, Structure, call_key, empty, operators_call

ROOT = "root"


@dataclass
class ModuleCall:
    """One call of a module.

    path       of the module
    key        equal for calls that trace to the same graph
    outline    see `nnscaler.trace.recorder.Record`
    grad       whether gradients were recorded where it was made
    arguments  how its arguments are nested; `given`: the shapes and types of the tensors in them
    """

    path: str
    key: str
    outline: str
    grad: bool
    arguments: Structure
    given: list[EmptyTensor]
    nest: Structure
    results: list[EmptyTensor]


@dataclass
class Observation:
    """What one run of a model tells. While the model runs, it takes the calls of modules and registered operators.

    calls     calls of the modules that may repeat, in order
    results   for each distinct call of a registered operator: how its results are nested, and their shapes and types
    entwined  path of a module that depends on more than its arguments and its own tensors -> why
    whole     the record of everything else
    """

    recorder: Recorder
    calls: list[ModuleCall] = field(default_factory=list)
    results: dict[Any, tuple[Structure, list[EmptyTensor]]] = field(default_factory=dict)
    entwined: dict[str, str] = field(default_factory=dict)
    whole: Record | None = None
    _records: list[tuple[str, Record]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """A text that is equal for models that trace to the same graph."""
        assert self.whole is not None
        return str(self.whole.ops.hexdigest())

    def run(self, model: nn.Module, paths: Sequence[str], inputs: Mapping[str, Tensor]) -> None:
        """Runs `model`. The modules at `paths` may repeat."""

        def whole(path: str, module: nn.Module, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            with self.recorder, self.recorder.record(module, kwargs) as self.whole, self.scope(ROOT):
                results = function(*args, **kwargs)
                with torch._C.DisableTorchFunction():
                    self.recorder.close(results)

        def take(path: str, *call: Any) -> Any:
            return self.call_module(path, *call) if path else whole(path, *call)

        with intercepted(model, [*paths, ""], take), operators_call(self.call_operator), self.recorder.loops.watched():
            model(**inputs)
        for path, record in self._records:
            if record.outside:
                self.entwined.setdefault(path, record.outside)

    def call_module(self, path: str, module: nn.Module, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.recorder.depth > 1:  # one that calls another: the other's tensors are from elsewhere
            return function(*args, **kwargs)
        grad = torch.is_grad_enabled()
        with torch._C.DisableTorchFunction():
            arguments, tensors = Structure.take((args, kwargs))
            inside = [_another(tensor) for tensor in tensors]
            versions = [tensor._version for tensor in inside]
            given = [empty(tensor) for tensor in tensors]
            args, kwargs = arguments.put(inside)
        scope = str(len(self._records))
        with self.recorder.record(module, {f"argument {i}": tensor for i, tensor in enumerate(inside)}) as record:
            self._records.append((path, record))
            self.recorder.write(f"{arguments.spec} {given}")
            with self.scope(scope):
                value = function(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                nest, results = Structure.take(value)
                self.recorder.close(results)
        with torch._C.DisableTorchFunction():
            if versions != [tensor._version for tensor in inside] or not arguments.holds(inside, (args, kwargs)):
                record.outside = record.outside or "it writes into its arguments"
            call = ModuleCall(
                path, record.ops.hexdigest(), record.outline.hexdigest(), grad,
                arguments, given, nest, [empty(tensor) for tensor in results],
            )  # fmt: skip
            self.calls.append(call)
            self.recorder.write(f"call {call.key}", tuple(tensors))
            results = [_another(tensor) for tensor in results]
            self.recorder.results(results)
            return nest.put(results)

    def call_operator(self, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records the call of a registered operator, but not what it does inside."""
        with operators_call(None), torch._C.DisableTorchFunction():
            arguments, tensors = Structure.take((args, kwargs))
            try:
                key = call_key(operator.name, arguments, tensors)
            except UserError as error:
                line = self.recorder.line()
                raise UserError(f"registered operator '{operator.name}' at {line}: {error}") from None
            self.recorder.write(f"{operator.name} {self.recorder.line()} {torch.is_grad_enabled()}", (args, kwargs))
            value = self.compute(operator, key, args, kwargs)
            if key not in self.results:
                nest, results = Structure.take(value)
                self.results[key] = nest, [empty(result) for result in results]
            self.recorder.results(value)
            return value

    def compute(self, operator: Operator, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The results of a registered operator.

        All its tensors are arguments, so it can run on meta tensors. They are several times as fast as fake ones, which
        matters where it loops over a long sequence.
        """
        assert operator.function is not None
        if key not in self.results:
            arguments, tensors = Structure.take((args, kwargs))
            try:
                # A compiled function runs as it is written.
                with _disable_current_modes(), torch.compiler.set_stance("force_eager"):
                    on_meta = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors]
                    args, kwargs = arguments.put(on_meta)
                    value = operator.function(*args, **kwargs)
            except (NotImplementedError, RuntimeError):  # fake tensors know more operators, and say what is wrong
                return operator.function(*args, **kwargs)
            nest, results = Structure.take(value)
            self.results[key] = nest, [empty(result) for result in results]
        nest, shapes = self.results[key]
        return nest.put([torch.empty(one.shape, dtype=one.dtype, device="cpu") for one in shapes])

    def scope(self, name: str) -> AbstractContextManager[Any]:
        """A context for one call of a module, or of the whole model."""
        return nullcontext()


def observe(model: nn.Module, paths: Sequence[str], inputs: Mapping[str, Tensor], mode: FakeTensorMode) -> Observation:
    """Runs a model whose tensors are all fake, and leaves it as it was.

    paths  of the modules that may repeat

    Raises UserError where a second run of the model would compute something else.
    """
    before = Attributes(model)
    while True:
        found = _run(model, paths, inputs, mode)
        changed = before.changed()
        if changed and _run(model, paths, inputs, mode).key != found.key:
            raise UserError(
                f"forward sets {', '.join(changed[:3])}, and what it computes changes from one call to the next; "
                "a compiled model computes the same in each step"
            )
        before.restore()
        if not found.entwined:
            return found
        paths = [path for path in paths if path not in found.entwined]


def _run(model: nn.Module, paths: Sequence[str], inputs: Mapping[str, Tensor], mode: FakeTensorMode) -> Observation:
    found = Observation(Recorder(model))
    with mode, as_if_exporting():
        found.run(model, paths, inputs)
    return found


def _another(tensor: Tensor) -> Tensor:
    """The same tensor as another object, so that one sees who uses which."""
    other = tensor.detach()
    return other.requires_grad_().clone() if tensor.requires_grad else other  # no leaf: those cannot be written into
