"""Weights of a Hugging Face model: checking that its files fit the model, and reading each rank's own slices."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from nnscaler.counting import counted
from nnscaler.errors import UserError
from nnscaler.models.adapters import is_adapter, name_in_model
from nnscaler.models.conversion import to_model
from nnscaler.models.unread import Unread
from nnscaler.shards import Box, ParameterSpec

if TYPE_CHECKING:
    from nnscaler.runtime.pipeline import TrainedModule

logger = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OTHER_FORMATS = ("*.bin", "*.bin.index.json", "*.pth", "*.pt", "*.h5", "*.msgpack", "*.gguf")
_TYPES = {"F64", "F32", "F16", "BF16"}  # what is not quantised


def how_to_convert(model_id: str | Path) -> str:
    return (
        'convert its weights with transformers: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{model_id}', dtype='auto').save_pretrained('converted')\""
    )


class WeightFiles:
    """The tensors of a model directory: in `model.safetensors`, or in shards with an index, as transformers reads
    them. Types are as safetensors spells them."""

    def __init__(self, tensors: Mapping[str, Unread]) -> None:
        self.tensors = dict(tensors)

    @staticmethod
    def find(directory: Path) -> WeightFiles | None:
        """The tensors of a directory. None where it has no weights at all.

        Raises UserError where files are missing, cut short, damaged, or of another format: weights that a directory is
        meant to have must not be made up.
        """
        single, index = directory / SINGLE, directory / INDEX
        if single.exists():
            return WeightFiles(_header(single))
        if index.exists():
            return WeightFiles(_sharded(directory, index))
        shards = sorted(path.name for path in directory.glob("*.safetensors"))
        if shards:
            raise UserError(
                f"'{directory}' has {shards[0]}" + f" and {len(shards) - 1} other safetensors" * (len(shards) > 1)
                + f", but neither {SINGLE} nor {INDEX}: copy the model again, whole"
            )  # fmt: skip
        others = sorted(path.name for pattern in OTHER_FORMATS for path in directory.glob(pattern))
        others = [name for name in others if name not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
        if others:
            raise UserError(
                f"'{directory}' has weights as {others[0]}, not as safetensors; {how_to_convert(directory)}"
            )
        return None

    def for_model(self, model: nn.Module, prefix: str) -> WeightFiles:
        """The same, renamed and put together as the Hugging Face model below `prefix` has its tensors."""
        inner = model.get_submodule(prefix.rstrip("."))
        return WeightFiles(to_model(self.tensors, inner)) if isinstance(inner, PreTrainedModel) else self

    def tensor(self, name: str, wanted: Tensor | ParameterSpec) -> Unread:
        """A tensor, in the shape of the model's, where that has two dimensions for one."""
        stored = self.tensors[name]
        more = len(wanted.shape) > stored.ndim and stored.shape.numel() == prod(wanted.shape)
        return stored.shaped(wanted.shape) if more else stored

    def name_of(self, parameter: str, others: Iterable[str] = ()) -> str | None:
        """The name that the files have for a parameter: its own, or one of `others`, which are tied to it. None: they
        lack it.

        Files of a model that was saved without its last projection lack the first part of all names.
        """
        for name in (parameter, *others):
            if name in self.tensors:
                return name
            first, _, rest = name.partition(".")
            if rest in self.tensors and not any(stored.startswith(f"{first}.") for stored in self.tensors):
                return rest
        return None


def _sharded(directory: Path, index: Path) -> dict[str, Unread]:
    try:
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(files.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{index}' is not an index of safetensors: {error}") from error
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
        raise UserError(
            f"'{directory}' lacks {len(absent)} of the {len(names)} files that its index names: {_some(absent)}"
        )
    headers = {name: _header(directory / name) for name in names}
    lost = [name for name, file in files.items() if name not in headers[file]]
    if lost:
        raise UserError(f"'{directory}': {files[lost[0]]} lacks {lost[0]}, which the index says it holds")
    return {name: headers[file][name] for name, file in files.items()}


def _header(path: Path) -> dict[str, Unread]:
    """The tensors of a file, which is opened again, once, where one of them is read."""
    opened = functools.cache(partial(safe_open, path, "pt"))

    def read(name: str, box: Box) -> Tensor:
        part = opened().get_slice(name)
        return part[box.slices] if box.slices else opened().get_tensor(name)

    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
            return {
                name: Unread(part.get_shape(), part.get_dtype(), partial(read, name)) for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{path}' is cut short or damaged: {error}") from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_weights(directory: Path, model: nn.Module, prefix: str) -> None:
    """Compares a model, which is on the meta device, with the files of a directory.

    prefix  what stands before the files' names in the model's own names
    Raises UserError for parameters that the files lack, and for other shapes and types. Warns of tensors for which the
    model has no place, and of buffers that keep their first values.
    """
    files = _files(directory).for_model(model, prefix)
    tied = _tied(model)
    persistent = persistent_buffers(model)
    names = {
        name: files.name_of(name_in_model(name, prefix), _in_model(tied[name], prefix))
        for name in tied
        if not is_adapter(name)
    }
    missing = [name for name, stored in names.items() if stored is None]
    lost = [name_in_model(name, prefix) for name in missing if name not in persistent]
    if lost:
        raise UserError(f"'{directory}' lacks {len(lost)} of the model's {len(names)} tensors: {_some(lost)}")
    tensors = {**dict(model.named_parameters()), **persistent}
    for name, stored in names.items():
        if stored is not None:
            _check_tensor(directory, stored, files.tensor(stored, tensors[name]), tensors[name])
    known = {other for name in tied for other in _in_model([name, *tied[name]], prefix)}
    known.update(filter(None, names.values()))
    unexpected = sorted(set(files.tensors) - known)
    if unexpected:
        logger.warning(
            "%s has %s that the model has no place for: %s",
            directory,
            counted(len(unexpected), "tensor"),
            _some(unexpected),
        )
    if missing:
        as_new = [name_in_model(name, prefix) for name in missing]
        logger.warning("%s lacks %s, as new here: %s", directory, counted(len(missing), "buffer"), _some(as_new))


def load_weights(directory: Path, module: TrainedModule, model: nn.Module, prefix: str) -> None:
    """Reads this rank's slices of the parameters, and all persistent buffers, from the files. Adapters are not in them.

    model   what `module` was compiled from, on the meta device
    prefix  what stands before the files' names in the model's own names
    Raises UserError for parameters that the files lack, and for other shapes and types.
    """
    files = _files(directory).for_model(model, prefix)
    specs = {name: spec for name, spec in module.parameters_to_load().items() if not is_adapter(name)}
    tied: dict[str, list[str]] = {name: [] for name in specs}
    for name, target in module.tied.items():
        tied.setdefault(target, []).append(name)
    names = {name: files.name_of(name_in_model(name, prefix), _in_model(tied[name], prefix)) for name in specs}
    lost = [name_in_model(name, prefix) for name, stored in names.items() if stored is None]
    if lost:
        raise UserError(f"'{directory}' lacks {len(lost)} of the model's {len(specs)} tensors: {_some(lost)}")
    found = {}
    for name, stored in names.items():
        assert stored is not None
        found[name] = files.tensor(stored, specs[name])
        _check_tensor(directory, stored, found[name], specs[name])
    for name, tensor in found.items():
        module.load_one(name, tensor.read(module.box(name)))
    for name in persistent_buffers(model):
        kept = files.name_of(name_in_model(name, prefix))
        if kept is not None and name in module.specs:
            spec = module.specs[name]
            _check_tensor(directory, kept, files.tensors[kept], spec)
            module.load_one(name, files.tensors[kept].whole())


def fixed_tensors(model: nn.Module, trained: Collection[str]) -> dict[str, Tensor]:
    """Name -> tensor of what a model's files hold besides its `trained` parameters: frozen parameters and persistent
    buffers.

    Tied ones are there once.
    """
    tensors = {**dict(model.named_parameters()), **persistent_buffers(model)}
    return {name: tensors[name] for name in _tied(model) if name not in trained and tensors[name].numel()}


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer, for the buffers that a model's files hold; each is there once."""
    found = {}
    for path, part in model.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                found[f"{path}.{name}".lstrip(".")] = buffer
    return found


def _files(directory: Path) -> WeightFiles:
    files = WeightFiles.find(directory)
    if files is None:
        raise UserError(f"'{directory}' has no {SINGLE} or {INDEX}")
    return files


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """Name of each parameter and persistent buffer of a model -> the other names of the same tensor."""
    first: dict[int, str] = {}
    tied: dict[str, list[str]] = {}
    for name, parameter in [*model.named_parameters(remove_duplicate=False), *persistent_buffers(model).items()]:
        known = first.setdefault(id(parameter), name)
        tied.setdefault(known, [])
        if known != name:
            tied[known].append(name)
    return tied


def _in_model(names: Iterable[str], prefix: str) -> list[str]:
    return [name_in_model(name, prefix) for name in names]


def _check_tensor(directory: Path, name: str, stored: Unread, wanted: Tensor | ParameterSpec) -> None:
    if tuple(stored.shape) != tuple(wanted.shape):
        raise UserError(f"'{directory}' has {name} of shape {list(stored.shape)}, the model's is {list(wanted.shape)}")
    if not wanted.dtype.is_floating_point:
        if stored.dtype in _TYPES:
            raise UserError(f"'{directory}' has {name} as {stored.dtype}, the model's is {wanted.dtype}")
    elif stored.dtype not in _TYPES:
        raise UserError(
            f"'{directory}' has {name} as {stored.dtype}, which only quantised models have; training needs one of "
            f"{', '.join(sorted(_TYPES))}"
        )
