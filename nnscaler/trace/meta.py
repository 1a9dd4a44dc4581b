"""Building a model without its weights, but with the values of its buffers."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from nnscaler.errors import UserError
from nnscaler.trace.own_code import line_of

# Factories whose results have no particular value: what a parameter is made of before it is initialised.
_EMPTY = {torch.empty, torch.empty_strided}
_VALUELESS = {*_EMPTY, torch.rand, torch.randn, torch.normal}


# Functions, of torch.nn.init, of Tensor, or that stand in for them, that give a tensor its first values. On the meta
# device they do nothing, and take a millisecond a tensor for that.
_FILLS = {"normal_", "uniform_", "zero_", "zeros_", "ones_", "fill_", "constant_", "kaiming_uniform_", "trunc_normal_"}
_KEEPING = {"requires_grad_", "detach_", "share_memory_"}  # what ends in "_" and gives no values
_OF_CLASS, _OF_MODEL = "reset_parameters", "_init_weights"
_TOO_EARLY = "the weights have no values when the model is made"


@dataclass
class FirstValues:
    """What making a model says of its parameters' first values, beside what its `_init_weights` and its modules'
    `reset_parameters` say, which can be called again.

    known  name of a parameter -> its value, which took no random numbers of a weight's size
    lost   name of a parameter -> `file.py:line` at which making the model gives it another value
    """

    known: dict[str, Tensor] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


class _ValuelessOnMeta(TorchFunctionMode):
    """Puts tensors without values, and with random ones, on the meta device.

    Computed tensors, such as rotary frequencies and masks, stay real. `given` says where parameters and tensors on the
    meta device get their values, by their memory: a line; `_AGAIN`, what is called again; or nowhere yet.
    """

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[int, str] = {}
        self._kept: list[Tensor] = []  # so that no other memory gets the same name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        tensor = _written(func, name, args, kwargs)
        if isinstance(tensor, Tensor) and (tensor.is_meta or isinstance(tensor, nn.Parameter)):
            self._note(tensor, _writer(tensor))
            if name in _FILLS and tensor.is_meta:
                return tensor
        if func in _VALUELESS:
            kwargs["device"] = "meta"
        result = func(*args, **kwargs)
        if _is_on_meta(result) and _memory(result) not in self.given:
            made_of = [one for one in pytree.tree_leaves((args, kwargs)) if _is_on_meta(one)]
            if not made_of:
                self._note(result, _NOWHERE if func in _EMPTY else _writer(result))
            elif (place := self.given.get(_memory(made_of[0]))) is not None:
                self._note(result, place)
        return result

    def _note(self, tensor: Tensor, place: str) -> None:
        self.given[_memory(tensor)] = place
        self._kept.append(tensor)


_AGAIN, _NOWHERE = "again", ""


def _written(func: Any, name: str, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What a call gives values, if anything."""
    if name in _FILLS or name == "__setitem__" or (name.endswith("_") and name not in _KEEPING and name[0] != "_"):
        return args[0] if args else kwargs.get("tensor")
    if func == _ASKS_FOR_META and sys._getframe(2).f_code.co_filename == init.__file__:
        return args[0]  # some of torch.nn.init do nothing on the meta device
    return kwargs.get("out")


_ASKS_FOR_META = Tensor.is_meta.__get__  # type: ignore[attr-defined]


def _is_on_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _writer(tensor: Tensor) -> str:
    """`file.py:line` of the code that gives a tensor its values now, or `_AGAIN`."""
    frame: FrameType | None = sys._getframe(1)
    place = ""
    while frame is not None:
        file, owner = frame.f_code.co_filename, frame.f_locals.get("".join(frame.f_code.co_varnames[:1]))
        if isinstance(owner, nn.Module) and (
            _is(frame, owner, _OF_MODEL) or (_is(frame, owner, _OF_CLASS) and _has(owner, tensor))
        ):
            return _AGAIN
        if not place and not file.startswith(_TORCH) and file != __file__:
            place = line_of(file, frame.f_lineno)
        frame = frame.f_back
    return place


_TORCH = torch.__path__[0]


def _is(frame: FrameType, module: nn.Module, name: str) -> bool:
    """Whether a frame is that of a module's method."""
    method = getattr(type(module), name, None)
    return method is not None and getattr(inspect.unwrap(method), "__code__", None) is frame.f_code


def _has(module: nn.Module, tensor: Tensor) -> bool:
    held = [one for one in module._parameters.values() if one is not None]
    return any(_memory(one) == _memory(tensor) for one in held)


def build_on_meta(make: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Calls `make` so that no weight takes memory or time.

    Returns the model, all of it on the meta device, and name -> value of its buffers. A buffer that `make` leaves
    uninitialised has no value, and is left out.

    Raises UserError where the values of weights are needed to make the model, or a buffer.
    """
    model, buffers, _ = build_with_first_values(make)
    return model, buffers


def build_with_first_values(
    make: Callable[[], nn.Module], seed: int = 0
) -> tuple[nn.Module, dict[str, Tensor], FirstValues]:
    """The same, and what making the model says of its parameters' first values. `seed`: of the random numbers in it"""
    mode = _ValuelessOnMeta()
    try:
        with torch.random.fork_rng(devices=[]), mode:
            torch.default_generator.manual_seed(seed)
            model = make()
    except (RuntimeError, TypeError) as error:
        if "meta" not in str(error) and "incompatible tensor type" not in str(error):
            raise
        raise UserError(f"{_TOO_EARLY} ({str(error).splitlines()[0]}); give the module itself") from error
    buffers = {}
    for name, tensor in model.named_buffers():
        if not tensor.is_meta:
            buffers[name] = tensor.detach().clone()
        elif mode.given.get(_memory(tensor)) != _NOWHERE:
            raise UserError(
                f"buffer '{name}' has no value that is known: it is made of random numbers, of weights, or on the meta "
                "device; make it of fixed numbers, with torch.full for example, or give the module itself"
            )
    first = _first_values(model, mode.given)
    _leave_values(model)
    return model, buffers, first


def _first_values(model: nn.Module, given: Mapping[int, str]) -> FirstValues:
    first = FirstValues()
    for name, parameter in model.named_parameters():
        place = given.get(_memory(parameter), _AGAIN if parameter.is_meta else _NOWHERE)
        if place == _AGAIN:
            continue
        if not parameter.is_meta:
            first.known[name] = parameter.detach()
        elif place != _NOWHERE:
            first.lost[name] = place
    return first


def _leave_values(model: nn.Module) -> None:
    """Puts all of a model on the meta device. Unlike `Module.to`, this leaves tied parameters tied."""
    known: dict[int, tuple[Tensor, Tensor]] = {}  # keeps the tensors, so that no other one gets their id
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or tensor.is_meta:
                    continue
                if id(tensor) not in known:
                    made = tensor.detach().to("meta")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    known[id(tensor)] = tensor, nn.Parameter(made, tensor.requires_grad) if is_parameter else made
                held[name] = known[id(tensor)][1]  # type: ignore[assignment]
