"""Configurations that the engine itself reads: what to compile for, and how the optimizer updates.

They import no torch, so that a command can print its help, or refuse a flag, at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nnscaler.errors import UserError
from nnscaler.hardware import hardware_names
from nnscaler.options import check, described, names, number, switch, text, whole
from nnscaler.schedules import KINDS
from nnscaler.trace.strategies import STRATEGIES, find_strategy

if TYPE_CHECKING:
    from nnscaler.graph import Graph
    from nnscaler.hardware import Hardware
    from nnscaler.mesh import Mesh

MOST_DEVICES = 2**20


@described
@dataclass(frozen=True)
class ComputeConfig:
    """The devices that a module is compiled for, and what its plan may be.

    Raises UserError for a value that is not allowed, or that does not go with another.
    """

    plan_ngpus: int = whole(
        1, "devices that one copy of the model is split over; auto: as many as are fastest, which global_batch_size "
        "allows (default: 1, or auto with global_batch_size)", least=1, most=MOST_DEVICES, or_auto=True, shown="N|auto",
    )  # fmt: skip
    runtime_ngpus: int = whole(
        1, "devices in all; runtime_ngpus / plan_ngpus copies of the model train on different samples "
        "(default: the processes that torchrun started, or plan_ngpus)", least=1, most=MOST_DEVICES,
    )  # fmt: skip
    trace_strategy: str = text(
        "reuse_cache", "how the model is traced; "
        + "; ".join(f"{name}: {strategy.summary}" for name, strategy in STRATEGIES.items()), choices=tuple(STRATEGIES),
    )  # fmt: skip
    pas_policy: str | Callable[[Graph], object] = text(
        "autodist", "what is fixed of the plan before it is sought; autodist: nothing; dp: all that can be split along "
        "samples is, and weights are whole; tp: products with weights are split along a dimension of the weight, and "
        "nothing along samples. Or a function of the graph (`nnscaler.graph.Graph`), which pins what it wants by "
        "`Node.pin` and `Graph.store`", choices=("autodist", "dp", "tp"), or_function=True,
    )  # fmt: skip
    gpu_mem_constraint: float | None = number(
        None, "memory of a device that the plan may use, in GiB (default: 90 % of what the device has)",
        above=0, most=2**20, shown="GIB",
    )  # fmt: skip
    offload: str = text(
        "auto", "auto: what backward needs, and the optimizer's state, may lie in the host's memory, where that is "
        "faster or the device has no room; off: everything stays on the device", choices=("auto", "off"),
    )  # fmt: skip
    host_mem_constraint: float | None = number(
        None, "memory of the host that the plan may use for each device, in GiB (default: 80 % of the machine's, "
        "in equal parts)", least=0, most=2**20, shown="GIB",
    )  # fmt: skip
    recompute_modules: tuple[str, ...] | None = names(
        None, "classes of modules, with commas between them: what their modules compute, and nothing else, is computed "
        "again in backward (default: the planner chooses what is computed again)", shown="CLASS,...",
    )  # fmt: skip
    micro_batches: int = whole(
        1, "micro-batches that a copy of the model computes in a step, adding up their gradients (default: 4, or with "
        "global_batch_size as many as it takes)",
        flag="grad_accumulation_steps", least=1, most=2**20,
    )  # fmt: skip
    grad_reduce_dtype: str = text(
        "fp32", "type in which gradients travel between devices. bf16: half as much travels. Within a node they are "
        "added up in fp32: of a gradient that is in bf16, as that of a micro-batch is, nothing is lost; of one that "
        "was summed over micro-batches 0.17 %. Across nodes, sums are rounded at each device: 0.4 % with 8 devices, "
        "1 % with 64", choices=("fp32", "bf16"),
    )  # fmt: skip
    hardware: str | None = text(
        None, f"plan for this hardware: {', '.join(hardware_names())}, or a .json file like those in "
        "nnscaler/hardware/specs (default: this computer's)",
    )  # fmt: skip
    devices_per_node: int | None = whole(
        None, "devices in a node (default: as many as torchrun started processes on each, if there are several nodes; "
        "else as many as this computer has, or as the hardware file says)", least=1, most=MOST_DEVICES,
    )  # fmt: skip
    search_seconds: float = number(
        40.0, "seconds of one core for the search; after them, the best plan so far is taken, and the log says how far "
        "it may be from the best one; with global_batch_size, three times as many for all that is tried", above=0,
        most=2**20, shown="SECONDS",
    )  # fmt: skip
    explore_pipeline: bool = switch(
        "search pipelines too, and take one if it is faster (default: only with global_batch_size)"
    )
    pipeline_pivots: tuple[str, ...] = names(
        (), "classes of modules at which pipeline stages may begin, with commas between them (default: the class of "
        "which the model has most)", shown="CLASS,...",
    )  # fmt: skip
    pipeline_schedule: str | None = text(
        None, "take only pipelines with this schedule (default: the fastest)", choices=tuple(KINDS)
    )
    pipeline_nstages: int | None = whole(
        None, "take only pipelines with this number of stages (default: the fastest)", least=1, most=MOST_DEVICES
    )

    def __post_init__(self) -> None:
        check(self)
        if self.runtime_ngpus % self.plan_ngpus:
            raise UserError(
                f"runtime_ngpus is {self.runtime_ngpus}; it must be a multiple of plan_ngpus={self.plan_ngpus}"
            )
        find_strategy(self.trace_strategy)
        for name in ("pipeline_pivots", "pipeline_schedule", "pipeline_nstages"):
            value = getattr(self, name)
            if value and not self.explore_pipeline:
                shown = ",".join(value) if isinstance(value, tuple) else value
                raise UserError(f"{name} is '{shown}', but explore_pipeline is not given; it is allowed only with that")

    def meshes(self, hardware: Hardware) -> list[Mesh]:
        """The meshes that the planner tries."""
        from nnscaler.mesh import meshes

        return meshes(self.plan_ngpus, self.runtime_ngpus // self.plan_ngpus, hardware.devices_per_node)

    def host_bytes(self, hardware: Hardware) -> float:
        """Bytes of the host's memory that a plan may use for each device."""
        if self.offload == "off" or hardware.host is None:
            return 0.0
        given = self.host_mem_constraint
        return 0.8 * hardware.host.memory if given is None else given * 2**30

    def find_hardware(self) -> Hardware:
        """The hardware to plan for: of this computer's CPU, a device is a process, which has its part of the memory.

        Raises UserError where there is none of this name, or it has no host of which memory could be limited.
        """
        from nnscaler.hardware import find_hardware
        from nnscaler.hardware.spec import host_memory

        hardware = find_hardware(self.hardware, self.devices_per_node)
        if self.host_mem_constraint and hardware.host is None:
            raise UserError(
                f"host_mem_constraint is {self.host_mem_constraint:g}, but {hardware.name} has no host with memory "
                "beside the devices'; leave it out"
            )
        processes = min(self.runtime_ngpus, hardware.devices_per_node)
        if hardware.host is not None and processes == 1:
            hardware = replace(hardware, host=hardware.host.alone())
        allowed = processes * (self.host_mem_constraint or 0.0)
        if self.hardware is None and hardware.host is not None and allowed * 2**30 > host_memory():
            most = (
                f"host_mem_constraint is {self.host_mem_constraint:g}, which is {allowed:g} GiB for the devices of a "
                f"node, and this computer has {host_memory() / 2**30:.3g}: a plan that uses more cannot run here"
            )
            hardware = replace(hardware, remark="; ".join(filter(None, (hardware.remark, most))))
        if self.hardware is None and hardware.name == "CPU" and processes > 1:
            memory = hardware.memory / processes
            shared = f"{processes} processes share its memory, and each plans with {memory / 2**30:.3g} GiB of it"
            hardware = replace(hardware, memory=memory, remark="; ".join(filter(None, (hardware.remark, shared))))
        if self.hardware is None and self.devices_per_node is None and self.runtime_ngpus > hardware.devices_per_node:
            nodes = (
                f"planning for nodes of {hardware.devices_per_node} devices, as here; --devices_per_node says otherwise"
            )
            hardware = replace(hardware, remark="; ".join(filter(None, (hardware.remark, nodes))))
        return hardware


@described
@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. Weight decay is decoupled, and applies only to parameters of two or more dimensions."""

    lr: float = number(3e-4, "peak learning rate of AdamW", flag="learning_rate", least=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = number(0.1, "decoupled weight decay of matrices", least=0)
    clip_gnorm: float = number(1.0, "norm to which a larger gradient is scaled down; 0: it is never scaled", least=0)

    def __post_init__(self) -> None:
        check(self)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas is {self.betas}; it must be two numbers, at least 0 and less than 1")
        if not self.eps > 0:
            raise UserError(f"eps is {self.eps}; it must be more than 0")
