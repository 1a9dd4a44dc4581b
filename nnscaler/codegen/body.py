"""Writing one block as a Python function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from nnscaler.codegen.spelling import spell
from nnscaler.graph import Block, Call, Node, Ref, TensorMeta, format_argument, map_refs, short_dtype
from nnscaler.operators import operator_of
from nnscaler.placement import Placement, Placements, Shard, format_placements, local_shape
from nnscaler.plan import Plan
from nnscaler.reshard import Step, reshard_steps

INDENT = "    "


@dataclass
class Body:
    """The statements of one block. Each tensor is a Python variable, and one more for each layout it is brought to."""

    plan: Plan
    block: Block
    names: dict[tuple[str, Placements], str] = field(default_factory=dict)  # (tensor, layout) -> Python expression
    taken: set[str] = field(default_factory=set)
    made: dict[str, Placements] = field(default_factory=dict)  # tensor -> layout it is made in
    released: set[str] = field(default_factory=set)
    uses_device: bool = False

    def write(self) -> list[str]:
        """The function's lines."""
        block = self.block
        self.taken = {*block.tensors, "w", "axes", "ops", "device", "torch", "F", "collectives"}
        for tensor, layout in zip(block.inputs, self.plan.inputs[block.name]):
            self._define(tensor, layout, tensor)
        for tensor, path in block.parameters.items():
            self._define(tensor, self._stored(tensor), f'w["{path}"]')
        last_use = self._last_uses()
        lines = []
        for module_nodes in self._parts():
            lines += self._part(module_nodes, last_use)
        results = [
            self._in_layout(tensor, layout, lines)
            for tensor, layout in zip(block.outputs, self.plan.outputs[block.name])
        ]
        arguments = ", ".join(["w", "axes", *block.inputs])
        head = [f"def {block.name}({arguments}):", *self._signature()]
        if self.uses_device:
            head.append("device = axes.device")
        statements = [*head[1:], *lines, f"return {', '.join(results)}"]
        return [head[0], *(INDENT + line if line else "" for line in statements)]

    def _signature(self) -> list[str]:
        """Comments with each input's own shape, and the global one where it differs."""
        return [
            f"# {tensor}: {self._describe(self.block.tensors[tensor], layout)}"
            for tensor, layout in zip(self.block.inputs, self.plan.inputs[self.block.name])
        ]

    def _describe(self, meta: TensorMeta, layout: Placements) -> str:
        local = local_shape(meta.shape, layout, self.plan.mesh.sizes)
        text = f"{short_dtype(meta.dtype)}{list(local)}"
        return text if local == meta.shape else f"{text} of {list(meta.shape)}, {format_placements(layout)}"

    def _stored(self, tensor: str) -> Placements:
        for block, name, path in self.plan.graph.parameter_uses():
            if block is self.block and name == tensor:
                return self.plan.parameters[path]
        raise AssertionError(f"parameter {tensor} of block {self.block.name} is never bound")

    def _define(self, tensor: str, layout: Placements, expression: str) -> None:
        self.made[tensor] = layout
        self.names[tensor, layout] = expression

    def _parts(self) -> Iterator[list[Node]]:
        """Runs of nodes that are recomputed together, and single runs of those that are not."""
        again = self.plan.recomputed.get(self.block.name, set())
        if len(again) == len(self.block.nodes):
            again = set()  # the whole block: its callers recompute it
        for _, nodes in groupby(self.block.nodes, key=lambda node: node.name in again):
            yield list(nodes)

    def _part(self, nodes: list[Node], last_use: dict[str, int]) -> list[str]:
        again = self.plan.recomputed.get(self.block.name, set())
        if nodes[0].name not in again or len(again) == len(self.block.nodes):
            return self._statements(nodes, last_use)
        return self._recomputed(nodes, last_use)

    def _recomputed(self, nodes: list[Node], last_use: dict[str, int]) -> list[str]:
        """A nested function of what the nodes need from outside, and its call under `recompute`."""
        inside = {name for node in nodes for name in node.outputs}
        needed = [name for node in nodes for name in node.inputs if name not in inside | set(self.block.parameters)]
        arguments = ", ".join(dict.fromkeys(self.names[name, self.made[name]] for name in needed))
        end = self.block.nodes.index(nodes[-1])
        results = [name for node in nodes for name in node.outputs if last_use[name] > end]
        function = self._fresh(f"{_common_module(nodes) or self.block.name}_again")
        before = dict(self.names)
        body = self._statements(nodes, {**last_use, **dict.fromkeys(results, len(self.block.nodes))}, keep=set(needed))
        # What was resharded inside is not visible outside.
        self.names = before | {key: name for key, name in self.names.items() if key[0] in results}
        self.names = {
            key: name for key, name in self.names.items() if key[0] not in results or key[1] == self.made[key[0]]
        }
        joined = ", ".join(results)
        return [
            "",
            f"def {function}({arguments}):",
            *(INDENT + line for line in [*body, f"return {joined}"]),
            "",
            f"{joined} = recompute({', '.join(filter(None, [function, arguments]))})",
        ]

    def _statements(self, nodes: list[Node], last_use: dict[str, int], keep: set[str] | None = None) -> list[str]:
        """The nodes' lines, a comment for each module, and `del` for what is not needed after it."""
        lines: list[str] = []
        for module, group in groupby(nodes, key=lambda node: None if isinstance(node, Call) else node.module):
            members = list(group)
            if module is None:
                lines += self._calls(members)
            else:
                lines.append(f"# {module or self.block.module_type}  {members[0].source}".rstrip())
                lines += [line for node in members for line in self._node(node)]
            lines += self._release(members, last_use, keep or set())
        return lines

    def _calls(self, members: Sequence[Node]) -> list[str]:
        raise AssertionError("only the root calls blocks")

    def _node(self, node: Node) -> list[str]:
        plan = self.plan.nodes[self.block.name, node.name]
        lines: list[str] = []
        layouts = iter(plan.inputs)
        named = {"args": node.args, "kwargs": node.kwargs}
        operator = operator_of(node)
        if operator.localize is not None:
            shapes = [
                [self._local(name, layout) for name, layout in zip(names, side)]
                for names, side in ((node.inputs, plan.inputs), (node.outputs, plan.outputs))
            ]
            named["args"], named["kwargs"] = operator.localize(node, *shapes)
        named = map_refs(named, lambda ref: Ref(self._in_layout(ref.name, next(layouts), lines)))
        if operator.function is not None:
            arguments = [format_argument(arg) for arg in named["args"]]
            arguments += [f"{key}={format_argument(arg)}" for key, arg in named["kwargs"].items()]
            expression = f"ops.{operator.name}({', '.join(arguments)})"
        else:
            expression = spell(node.op, named["args"], named["kwargs"])
        self.uses_device |= "device=device" in expression
        for name, layout in zip(node.outputs, plan.outputs):
            self._define(name, layout, name)
        target = ", ".join(node.outputs) + ("," if node.returns_tuple and len(node.outputs) == 1 else "")
        needs_no_grad = node.no_grad and any(self.block.tensors[name].requires_grad for name in node.inputs)
        statement = f"{target} = {expression}"
        return [*lines, "with torch.no_grad():", INDENT + statement] if needs_no_grad else [*lines, statement]

    def _local(self, tensor: str, layout: Placements) -> tuple[int, ...]:
        return local_shape(self.block.tensors[tensor].shape, layout, self.plan.mesh.sizes)

    def _in_layout(self, tensor: str, layout: Placements, lines: list[str]) -> str:
        """The expression of a tensor in a layout; adds the lines that reshard it the first time."""
        if (tensor, layout) not in self.names:
            source = self.made[tensor]
            steps = reshard_steps(source, layout)
            assert steps is not None, (tensor, source, layout)
            steps = [step for step in steps if self._changes(step, tensor)]
            expression = self.names[tensor, source]
            if steps:
                variable = self._fresh(f"{tensor}_{_tag(layout)}")
                for step in steps:
                    lines.append(f"{variable} = {self._collective(expression, step, tensor)}")
                    expression = variable
            self.names[tensor, layout] = expression
        return self.names[tensor, layout]

    def _changes(self, step: Step, tensor: str) -> bool:
        """Whether a step does anything: one that only concerns gradients does not where there are none."""
        forward, backward = step.collectives
        if self.plan.mesh.sizes[step.axis] == 1:
            return False
        return forward != "identity" or (self.block.tensors[tensor].requires_grad and backward != "identity")

    def _collective(self, x: str, step: Step, tensor: str) -> str:
        forward, backward = step.collectives
        axis = f"axes[{step.axis}]"
        if not self.block.tensors[tensor].requires_grad:
            backward = _WITHOUT_GRADIENT.get(backward, backward)
        if forward == "identity":
            return f"collectives.{'share' if backward == 'all_reduce' else 'divide'}({x}, {axis})"
        if forward == "all_reduce":
            return f'collectives.all_reduce({x}, {axis}, backward="{backward}")'
        if forward == "all_to_all":
            return f"collectives.all_to_all({x}, {axis}, source={_dim(step.source)}, target={_dim(step.target)})"
        dim = _dim(step.source if isinstance(step.source, Shard) else step.target)
        if forward == "reduce_scatter":
            return f"collectives.reduce_scatter({x}, {axis}, dim={dim})"
        function = "slice_" if forward == "slice" else forward
        return f'collectives.{function}({x}, {axis}, dim={dim}, backward="{backward}")'

    def _fresh(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self.taken:
            count += 1
            candidate = f"{name}_{count}"
        self.taken.add(candidate)
        return candidate

    def _last_uses(self) -> dict[str, int]:
        """Index of the last node that uses each tensor; the number of nodes for the block's results."""
        last = {name: index for index, node in enumerate(self.block.nodes) for name in (*node.outputs, *node.inputs)}
        return {**last, **dict.fromkeys(self.block.outputs, len(self.block.nodes))}

    def _release(self, members: Sequence[Node], last_use: dict[str, int], keep: set[str]) -> list[str]:
        """`del` of the variables whose tensors nobody uses after these nodes, so that their memory is free."""
        end = self.block.nodes.index(members[-1])
        dead = []
        for (tensor, _), name in self.names.items():
            is_variable = name.isidentifier() and tensor not in self.block.parameters
            borrowed = tensor in self.block.inputs or tensor in keep
            if is_variable and not (borrowed and name == tensor) and last_use.get(tensor, -1) <= end:
                dead.append(name)
        dead = [name for name in dict.fromkeys(dead) if name not in self.released]
        self.released.update(dead)
        return [f"del {', '.join(dead)}"] if dead else []


_WITHOUT_GRADIENT = {"all_reduce": "identity", "reduce_scatter": "slice", "pad": "all_gather"}


def _common_module(nodes: Sequence[Node]) -> str:
    """The last name of the longest module path that all nodes are in."""
    paths = [node.module.split(".") for node in nodes]
    shared = [parts[0] for parts in zip(*paths) if len(set(parts)) == 1]
    return shared[-1] if shared else ""


def _tag(layout: Placements) -> str:
    """A suffix that tells a tensor's layouts apart: `s1`, `whole`."""
    return "_".join(f"s{place.dim}" if isinstance(place, Shard) else "whole" for place in layout) or "whole"


def _dim(placement: Placement) -> int:
    assert isinstance(placement, Shard), placement
    return placement.dim
