"""A compiled model as a rank runs it: generated code, with this rank's shards of the parameters."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from copy import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nnscaler.errors import UserError
from nnscaler.kernels import are_slow, fp8, widen_slow_products
from nnscaler.kernels.random import DRAWS
from nnscaler.mesh import Mesh, PipelineMesh
from nnscaler.placement import Replicate
from nnscaler.runtime.axes import Axes
from nnscaler.runtime.axis import ALONE, Axis
from nnscaler.runtime.buckets import Bucket, GradientReducer, make_buckets
from nnscaler.runtime.draws import with_draws, without_draws
from nnscaler.runtime.gathering import Gathers
from nnscaler.runtime.host import HostMemory
from nnscaler.runtime.later import Later
from nnscaler.runtime.optimizer import buckets_of, decays
from nnscaler.runtime.scales import Scales, scale_of
from nnscaler.shards import Box, ParameterSpec
from nnscaler.sums import GradientSum

ReadPart = Callable[[str, Box], Tensor]


class Weights(dict[str, Tensor]):
    """A model's weights on this device, by name. Reading one waits for its update.

    every  all devices that own parts of them
    """

    def __init__(self, buckets: Iterable[Bucket], parameters: Mapping[str, Tensor], every: Axis = ALONE) -> None:
        super().__init__(parameters)
        self._memory: set[int] = set()  # addresses
        self._rounded: dict[int, tuple[list[int], Tensor]] = {}  # a master weight -> when, and its shard in fp8
        self._own_scales: dict[int, tuple[list[int], Tensor]] = {}  # a weight -> when, and the scale of its shard
        self._buckets: dict[int, list[Bucket]] = {id(parameter): [] for parameter in parameters.values()}
        for bucket in buckets:
            for slot in bucket.slots:
                self._buckets[id(parameters[slot.name])].append(bucket)
            narrow = [slot for slot in bucket.slots if slot.spec.gathered_in_fp8]
            if narrow:
                owned = {id(parameters[slot.name]): bucket.owned_of(slot) for slot in narrow}
                bucket.scales = Scales(owned, narrow[0].spec.dtype, every)

    def __getitem__(self, name: str) -> Tensor:
        weight = super().__getitem__(name)
        self.wait(weight)
        return weight

    @torch.no_grad()
    def scale_of(self, name: str) -> Tensor:
        """The scale [] of this device's shard of a weight, for products in fp8. It is found once an update; of one that
        is not trained, once something has written to it, as a loaded state does."""
        weight = self[name]
        # Torch counts what is written to one trained weight for all that lie in its buffer; an exchange, when it ends.
        versions = self._versions(weight) or [weight._version]
        known, scale = self._own_scales.get(id(weight), (None, weight))
        if known != versions:
            scale = fp8.scale_of(weight)
            self._own_scales[id(weight)] = versions, scale
        return scale

    def hold(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the memory of a weight."""
        if not self._memory:
            self._memory = {weight.untyped_storage().data_ptr() for weight in self.values()}
        return tensor.untyped_storage().data_ptr() in self._memory

    def wait(self, weight: Tensor) -> None:
        """Makes what is computed next come after the update of this weight."""
        for bucket in self._buckets.get(id(weight), ()):
            bucket.wait()

    def scale(self, weight: Tensor) -> Tensor:
        """The scale [] of a whole weight that is gathered in fp8."""
        return scale_of(weight, self._scales(weight))

    def rounded(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """This device's shard in fp8, of a weight in this type. That of a master weight is kept until the next
        update."""
        shard, scale = weight.detach(), self.scale(weight)
        if shard.dtype == dtype:
            return fp8.rounded_alone(shard, scale)
        versions = self._versions(weight)
        known, rounded = self._rounded.pop(id(weight), ([], shard))
        if known != versions:
            del rounded  # before there is another
            rounded = fp8.rounded_alone(shard.to(dtype), scale)
        self._rounded[id(weight)] = versions, rounded
        return rounded

    def _versions(self, weight: Tensor) -> list[int]:
        return [bucket.version for bucket in self._buckets.get(id(weight), ())]

    def _scales(self, weight: Tensor) -> list[Scales]:
        return [bucket.scales for bucket in self._buckets[id(weight)] if bucket.scales is not None]

    def changed(self, weight: Tensor) -> None:
        """To be called when a weight has changed in another way than by an update."""
        for bucket in self._buckets.get(id(weight), ()):
            bucket.changed()


class ParallelModule(nn.Module):
    """Loads a compiled plan, and runs it.

    `forward(**inputs)` takes the whole inputs of the traced model, on every rank of a copy, and returns its whole
    outputs. `accumulate` runs forward and backward of a step's micro-batches, and fills `Bucket.gradient`. To do this
    by hand: call `backward()` on the output, then `reducer.end_micro_batch()`, and at the end of the step
    `reducer.finish()`. `evaluate` runs forward alone.

    specs       name of a parameter or buffer -> its shape, type and layout
    tied        another name of a parameter -> its name in `specs`
    buckets     what trained parameters and their gradients lie in
    gives_loss  whether this rank gets the loss
    mesh        of all devices
    """

    gives_loss = True

    @property
    def mesh(self) -> Mesh | PipelineMesh:
        return self.axes.whole

    def __init__(self, directory: Path, device: torch.device) -> None:
        plan = json.loads((directory / "plan.json").read_text())
        mesh = Mesh(tuple(plan["mesh"]["sizes"]), plan["mesh"]["replicas"])
        self._load(directory, plan, Axes(mesh, device))

    @classmethod
    def of_stage(
        cls, directory: Path, plan: dict[str, Any], stage: int, axes: Axes, shared: Collection[str]
    ) -> ParallelModule:
        """One stage of a pipeline.

        plan    its part of plan.json
        shared  parameters that other stages use too; these get buckets of their own
        """
        module = cls.__new__(cls)
        module._load(directory, plan, copy(axes), stage, shared)  # each stage gathers its own weights
        return module

    def _load(
        self, directory: Path, plan: dict[str, Any], axes: Axes, stage: int = 0, shared: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.axes = axes
        self.input_names: list[str] = plan["inputs"]
        self.specs = {name: ParameterSpec.from_json(fields) for name, fields in plan["parameters"].items()}
        self.tied: dict[str, str] = plan["tied"]
        self.predicted_seconds: dict[str, float] = plan["predicted"]["seconds_by_category"]
        if any(are_slow(axes.device, spec.dtype) for spec in self.specs.values()):
            widen_slow_products()
        decayed = {name: decays(spec.shape) for name, spec in self.specs.items()}
        micro_batches = plan["micro_batches"]
        summed = axes.mesh.sums_gradients(micro_batches)
        self.buckets, parameters = make_buckets(
            self.specs, self.axes, decayed, alone=shared, summed=summed, gradients_on_host=plan["gradients_on_host"]
        )
        sums = GradientSum(**plan["gradient_sum"])
        self.reducer = GradientReducer(self.buckets, parameters, micro_batches, sums, overlaps=plan["splits"])
        in_fp8 = any(spec.gathered_in_fp8 for spec in self.specs.values())
        every = axes.owners(tuple(Replicate() for _ in axes.mesh.sizes)) if in_fp8 else ALONE
        self._weights = weights = Weights(self.buckets, parameters, every)
        settle = self.reducer.settle
        self.gathers = self.axes.gathers = Gathers(self.reducer.defer, weights.wait, sums, settle, weights)
        self.axes.host = HostMemory(self.axes.device, self._is_weight, self.gathers.pack, self.gathers.unpack)
        self.axes.later = Later(self.reducer.take)
        self.state_on_host = buckets_of(self.buckets, plan["state_on_host"])
        self._gathers_again = any(block["gathered_again"] for block in plan["blocks"].values())
        self._load_fixed(directory)
        self._weights.update({name: self._weights[target] for name, target in self.tied.items()})
        self._code = _load_source(directory / f"gencode_stage{stage}.py")

    def _load_fixed(self, directory: Path) -> None:
        """Loads buffers, which are whole on every device, and makes room for parameters that are not trained."""
        path = directory / "buffers.safetensors"
        values = load_file(path) if path.exists() else {}
        for name, spec in self.specs.items():
            if spec.trained:
                continue
            if name in values:
                self._weights[name] = values[name].to(self.axes.device)
            else:
                self._weights[name] = torch.zeros(self.box(name).sizes, dtype=spec.dtype, device=self.axes.device)
        self.buffer_names = set(values)

    def forward(self, **inputs: Tensor) -> Any:
        missing = set(self.input_names) ^ set(inputs)
        if missing:
            raise UserError(f"forward got inputs {sorted(inputs)}; the compiled model takes {sorted(self.input_names)}")
        self.gathers.begin()
        self.axes.host.clear()
        with self.gathers.hooks() if self._gathers_again else nullcontext():
            return self._code.forward(self._weights, self.axes, *(inputs[name] for name in self.input_names))

    @property
    def drops(self) -> bool:
        """Whether training draws random numbers."""
        return DRAWS in self.input_names

    def accumulate(self, micro_batches: Iterable[Mapping[str, Tensor]], seed: int = 0, step: int = 0) -> Tensor:
        """Runs forward and backward of a step's micro-batches, and fills `Bucket.gradient`.

        seed, step  on which it depends what is dropped at random; steps are counted from 0

        Returns the sum of their losses, fp64; where forward gives several numbers in a row, of which the first is the
        loss, the sums of each. Raises UserError where forward gives anything else.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.axes.device)
        for inputs in with_draws(micro_batches, self.axes, seed, step) if self.drops else micro_batches:
            numbers = self._numbers(inputs)
            loss_of(numbers).backward()
            self.reducer.end_micro_batch()
            self.axes.host.clear()
            total = total + numbers.detach().double()
        self.reducer.finish()
        return total

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
        """As `accumulate`, of any number of micro-batches, by forward alone, in which nothing is dropped."""
        total = torch.zeros((), dtype=torch.float64, device=self.axes.device)
        for inputs in without_draws(micro_batches, self.axes) if self.drops else micro_batches:
            total = total + self._numbers(inputs).double()
        return total

    def _numbers(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What forward gives: the loss, without dimensions; or a row of numbers."""
        numbers = self(**inputs)
        if not isinstance(numbers, Tensor) or numbers.dim() > 1:
            found = list(numbers.shape) if isinstance(numbers, Tensor) else f"{len(numbers)} results"
            raise UserError(f"forward gives {found}; what is trained must give one number, the loss")
        return numbers

    def hold_unused(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes tensors of the model that its forward does not use, on the CPU, so that they are loaded and saved like
        others.

        tensors  full name -> value; or a tensor on the meta device, where the value is still to be loaded
        """
        for name, tensor in tensors.items():
            everywhere = tuple(Replicate() for _ in self.axes.mesh.sizes)
            self.specs[name] = ParameterSpec(tuple(tensor.shape), tensor.dtype, everywhere, trained=False)
            if not tensor.is_meta:
                self.buffer_names.add(name)
            self._weights[name] = torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor

    def tensors_called(self, name: str) -> list[Tensor]:
        """This rank's shard of a parameter, or a buffer; nothing where the rank does not have it."""
        return [self._weights[name]] if name in self.specs else []

    def _is_weight(self, tensor: Tensor) -> bool:
        return self._weights.hold(tensor) or self.gathers.holds(tensor)

    def parameters_to_load(self) -> dict[str, ParameterSpec]:
        """The parameters that have no value yet, trained and frozen ones. Buffers have theirs."""
        return {name: spec for name, spec in self.specs.items() if name not in self.buffer_names}

    @torch.no_grad()
    def load(self, read: ReadPart) -> None:
        """Fills this rank's shards. `read(name, box)` gives this part of a whole parameter, in any float type."""
        for name, spec in self.parameters_to_load().items():
            self.load_one(name, read(name, spec.box(self.axes.mesh, self.axes.place)))

    @torch.no_grad()
    def load_one(self, name: str, part: Tensor) -> None:
        """Fills this rank's shard of one parameter, or a buffer."""
        self._weights[name].copy_(part.to(self.specs[name].dtype))  # rounded, whatever type it is stored in
        self._weights.changed(self._weights[name])

    def box(self, name: str) -> Box:
        """The part of a whole parameter that this rank computes with."""
        return self.specs[name].box(self.axes.mesh, self.axes.place)


def loss_of(numbers: Tensor) -> Tensor:
    """Of what a model's forward gives, what is trained."""
    return numbers.reshape(-1)[0] if numbers.dim() else numbers


def _load_source(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"nnscaler_generated_{abs(hash(path))}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the compiler of its regions looks for it
    spec.loader.exec_module(module)
    return module
