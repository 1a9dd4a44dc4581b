"""Writing one block as Python functions: one for each region, and one that runs them with what comes between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from nnscaler import later
from nnscaler.codegen.divided import divided
from nnscaler.codegen.segments import Region, Segment, makes, segments, uses
from nnscaler.graph import Block, Node, Ref, TensorMeta, format_arguments, map_refs, short_dtype
from nnscaler.operators import Operator, operator_of, spell
from nnscaler.pieces import Stretch
from nnscaler.placement import Placement, Placements, Shard, format_placements, local_shape
from nnscaler.plan import Plan
from nnscaler.recompute import KEEPS_ALL, RECOMPUTES_ALL_BUT_ATTENTION
from nnscaler.reshard import Reshard, only_gathers, reshards
from nnscaler.units import Unit

INDENT = "    "


@dataclass
class Body:
    """Writes the statements of one block. A tensor becomes a Python variable, and another one for each layout it is
    brought to.

    names         (tensor, layout) -> the Python expression of the tensor in this layout
    made          tensor -> the layout in which it is made
    taken         names of variables that are in use
    functions     the lines of the regions' functions, as far as they are written
    rounded       expression of a tensor -> the variable with it in fp8
    in_fp8        variable of a weight of products in fp8 -> the fields of its `nnscaler.kernels.fp8.Weight`
    stretches     the stretches that are computed in pieces, while functions of their pieces are written
    needs_device  whether a region has a parameter `device`
    """

    plan: Plan
    block: Block
    names: dict[tuple[str, Placements], str] = field(default_factory=dict)
    made: dict[str, Placements] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    functions: list[list[str]] = field(default_factory=list)
    rounded: dict[str, str] = field(default_factory=dict)
    in_fp8: dict[str, list[str]] = field(default_factory=dict)
    stretches: list[Stretch] = field(default_factory=list)
    needs_device: bool = False

    def write(self) -> list[list[str]]:
        """The lines of each function, with the block's own function last."""
        block = self.block
        self.taken = {*block.tensors, "w", "axes", "keep", "ops", "device", "torch", "F", "collectives", "fp8", "later"}
        for tensor, layout in zip(block.inputs, self.plan.inputs[block.name]):
            self._define(tensor, layout, tensor)
        for tensor, path in block.parameters.items():
            self._define(tensor, self._stored(tensor), f'w["{path}"]')
        parts = segments(self.plan, block)
        lines: list[str] = []
        for index, segment in enumerate(parts):
            for region in segment.regions:
                lines += [] if region.around else self._region(region, index)
            for unit in segment.others:
                before = [one for one in segment.regions if one.around and one.around.name == unit.name]
                lines += self._around(unit, before, index) if before else self._other(unit)
            lines += self._release(parts[index + 1 :])
        results = [
            self._in_layout(tensor, layout, lines)
            for tensor, layout in zip(block.outputs, self.plan.outputs[block.name])
        ]
        head = [f"def {self._name()}({', '.join([*self._first_arguments(), *block.inputs])}):", *self._signature()]
        if self.needs_device or any("device=device" in line for line in lines):
            head.append("device = axes.device")
        return [*self.functions, _function([*head, *lines, f"return {', '.join(results)}"])]

    def _name(self) -> str:
        return self.block.name

    def _first_arguments(self) -> list[str]:
        return ["w", "axes", "keep"]

    def _signature(self) -> list[str]:
        """Comments on the inputs: the shape on this device, and the whole shape where that differs."""
        return [
            f"# {tensor}: {self._describe(self.block.tensors[tensor], layout)}"
            for tensor, layout in zip(self.block.inputs, self.plan.inputs[self.block.name])
        ]

    def _describe(self, meta: TensorMeta, layout: Placements) -> str:
        local = local_shape(meta.shape, layout, self.plan.mesh.sizes)
        text = f"{short_dtype(meta.dtype)}{list(local)}"
        return text if local == meta.shape else f"{text} of {list(meta.shape)}, {format_placements(layout)}"

    def _stored(self, tensor: str) -> Placements:
        return self.plan.parameters[self._path(tensor)]

    def _is_master(self, tensor: str) -> bool:
        """Whether a tensor is a parameter of which only the master weight is stored."""
        return tensor in self.block.parameters and self._path(tensor) in self.plan.master_only

    def _path(self, tensor: str) -> str:
        """The full name of a parameter of the block, in one of its calls."""
        for block, name, path in self.plan.graph.parameter_uses():
            if block is self.block and name == tensor:
                return path
        raise AssertionError(f"parameter {tensor} of block {self.block.name} is never bound")

    def _define(self, tensor: str, layout: Placements, expression: str) -> None:
        self.made[tensor] = layout
        self.names[tensor, layout] = expression

    def _region(self, region: Region, index: int) -> list[str]:
        """The lines that call a region; its function is added to `functions`. A single operator is written in place."""
        computing = [node for unit in region.units for node in unit.nodes if not operator_of(node).alias]
        composed = any(
            operator_of(node).composed or self.plan.nodes[self.block.name, node.name].in_fp8 for node in computing
        )
        if len(computing) < 2 and not (composed or region.recomputed) and region.stretch is None:
            return [line for unit in region.units for line in self._nodes(unit.nodes)]
        lines: list[str] = []
        given = self._given(region.units, lines)
        nodes = sorted((node for unit in region.units for node in unit.nodes), key=self.block.nodes.index)
        inside = {name for node in nodes for name in node.outputs}
        made = {name: unit for unit in region.units for name in unit.outputs if self._used_after(name, inside)}
        name = self._fresh(f"{self._name()}_{'again' if region.recomputed else 'region'}_{index}")
        self.stretches += [region.stretch] if region.stretch else []
        self._write_function(["@region"], name, [], given, lambda: self._by_module(nodes), list(made))
        if region.stretch is not None:
            call = self._in_pieces(self.stretches.pop(), region.units, name, given, made)
        else:
            keep = f'"{RECOMPUTES_ALL_BUT_ATTENTION}"' if region.recomputed else self._keep()
            call = f"{name}({', '.join([keep, *given])})"
        return [*lines, *self._results(made, call)]

    def _around(self, unit: Unit, before: list[Region], index: int) -> list[str]:
        """The lines that compute a registered operator in pieces, each of which runs the regions before it too."""
        lines: list[str] = []
        units = [*(one for region in before for one in region.units), unit]
        given = self._given(units, lines)
        stretch, name = before[0].around, self._fresh(f"{self._name()}_piece_{index}")
        assert stretch is not None

        def body() -> list[str]:
            return [*(line for region in before for line in self._region(region, index)), *self._other(unit)]

        self.stretches.append(stretch)
        self._write_function([], name, ["keep"], given, body, unit.outputs)
        self.stretches.pop()
        made = dict.fromkeys(unit.outputs, unit)
        return [*lines, *self._results(made, self._in_pieces(stretch, units, name, given, made))]

    def _given(self, units: list[Unit], lines: list[str]) -> dict[str, tuple[str, Placements]]:
        """What is passed to a function of some units -> the tensor that it is, and in which layout."""
        inside = {name for unit in units for node in unit.nodes for name in node.outputs}
        given: dict[str, tuple[str, Placements]] = {}
        for unit in units:
            for tensor in unit.inputs:
                if tensor not in inside:
                    layout = uses(self.plan, self.block, unit, tensor)
                    expression = self._in_layout(tensor, layout, lines)
                    given.setdefault(self._weight(unit.main, tensor, expression), (tensor, layout))
                    if self._is_stored_for_fp8(unit, tensor, expression):
                        expression = self._scaled(tensor, lines)
                    given.update(dict.fromkeys(self.in_fp8.get(expression, [])[1:], ("", ())))
        return given

    def _is_stored_for_fp8(self, unit: Unit, tensor: str, expression: str) -> bool:
        """Whether a tensor is a weight that products in fp8 of a unit use as it is stored."""
        taken = [node.inputs[1] for node in unit.nodes if self.plan.nodes[self.block.name, node.name].in_fp8]
        return tensor in taken and not expression.isidentifier()

    def _scaled(self, tensor: str, lines: list[str]) -> str:
        """The variable of such a weight inside a region. The first time, the line that finds its scale is added."""
        if tensor not in self.in_fp8:
            self.in_fp8[tensor] = [tensor, self._fresh(f"{tensor}_scale")]
            lines.append(f'{self.in_fp8[tensor][1]} = w.scale_of("{self.block.parameters[tensor]}")')
        return tensor

    def _weight(self, node: Node, tensor: str, expression: str) -> str:
        """The expression of a tensor that a node uses; of a weight whose gradient is computed later, as such."""
        if expression.isidentifier() or not later.is_later(self.plan, self.block, node):
            return expression
        x, weight = later.factors(node, self.block) or ("", "")
        way = self.plan.nodes[self.block.name, node.name]
        layouts = {**dict(zip(node.inputs, way.inputs)), node.name: way.outputs[0]}
        shapes = (str(list(self._local_meta(name, layouts[name]).shape)) for name in (x, node.name))
        return f"axes.later.weight({expression}, {', '.join(shapes)})" if tensor == weight else expression

    def _results(self, made: dict[str, Unit], call: str) -> list[str]:
        """The line of a call that gives some results of units."""
        for tensor, unit in made.items():
            self._define(tensor, makes(self.plan, self.block, unit, tensor), tensor)
        return [f"{', '.join(made)} = {call}"]

    def _in_pieces(
        self,
        stretch: Stretch,
        units: list[Unit],
        name: str,
        given: dict[str, tuple[str, Placements]],
        made: dict[str, Unit],
    ) -> str:
        """The call that runs a function of some units of a stretch in pieces. Backward runs each piece again, so that
        itself keeps all."""
        count, parts = self.plan.pieces[self.block.name, stretch.name], divided(self.plan, self.block, stretch, units)
        split = tuple("sum" if stretch.adds_up(t, self.block) else parts.along(t, p) for t, p in given.values())
        layouts = {tensor: makes(self.plan, self.block, unit, tensor) for tensor, unit in made.items()}
        joined = tuple(parts.along(tensor, layout) for tensor, layout in layouts.items())
        how = str((None, *split)).replace("'", '"')
        settle = "None" if self.stretches else "axes.gathers.settle"  # pieces around these have called it
        arguments = ", ".join([name, str(count), how, str(joined), settle, f'"{KEEPS_ALL}"', *given])
        return f"in_pieces({arguments})"

    def _keep(self) -> str:
        return "keep"

    def _parameter_names(self, given: dict[str, tuple[str, Placements]]) -> list[str]:
        """A name for each argument of a region's function: variables keep theirs, parameters get their tensor's."""
        return [expression if expression.isidentifier() else tensor for expression, (tensor, _) in given.items()]

    def _used_after(self, tensor: str, inside: set[str]) -> bool:
        makers = {name for node in self.block.nodes if inside & set(node.outputs) for name in node.outputs}
        users = [node for node in self.block.nodes if tensor in node.inputs and not makers.issuperset(node.outputs)]
        return bool(users) or tensor in self.block.outputs

    def _write_function(
        self,
        decorators: list[str],
        name: str,
        first: list[str],
        given: dict[str, tuple[str, Placements]],
        body: Callable[[], list[str]],
        outputs: Sequence[str],
    ) -> None:
        """Adds a function to `functions`, and to `given` what else is to be passed to it.

        first    its first parameters, before those for what is given
        body     gives its lines; called where names are those of the function
        outputs  what it returns
        """
        outer_names, outer_made, outer_device = self.names, self.made, self.needs_device
        outer_rounded, self.rounded = self.rounded, {}
        parameters = self._parameter_names(given)
        self.names = {given[expression]: own for expression, own in zip(given, parameters)}
        self.made, self.needs_device = dict(self.names.keys()), False
        lines = body()
        needs = {"axes": any("axes." in line for line in lines)}
        needs["device"] = self.needs_device or any("device=device" in line for line in lines)
        self.names, self.made, self.needs_device = outer_names, outer_made, outer_device or needs["device"]
        self.rounded = outer_rounded
        also = [what for what, needed in needs.items() if needed]
        given.update(dict.fromkeys(also, ("", ())))
        head = f"def {name}({', '.join([*first, *parameters, *also])}):"
        self.functions.append(_function([*decorators, head, *lines, f"return {', '.join(outputs)}"]))

    def _by_module(self, nodes: list[Node]) -> list[str]:
        """The statements of some nodes, under a comment for each module."""
        lines: list[str] = []
        for module, group in groupby(nodes, key=lambda node: node.module):
            members = list(group)
            lines.append(f"# {module or self.block.module_type}  {members[0].source}".rstrip())
            lines += self._nodes(members)
        return lines

    def _other(self, unit: Unit) -> list[str]:
        """The lines of a registered operator, and of the views of its results."""
        return [
            f"# {unit.main.module or self.block.module_type}  {unit.main.source}".rstrip(),
            *self._nodes(unit.nodes),
        ]

    def _nodes(self, nodes: Iterable[Node]) -> list[str]:
        """The statements of some nodes, with those that reshard their inputs."""
        lines: list[str] = []
        for node in nodes:
            lines += self._node(node, lines)
        return lines

    def _node(self, node: Node, before: list[str]) -> list[str]:
        """The statement of a node. Those that reshard its inputs are added to `before`."""
        plan = self.plan.nodes[self.block.name, node.name]
        operator = operator_of(node)
        inputs = [Ref(self._in_layout(name, layout, before)) for name, layout in zip(node.inputs, plan.inputs)]
        if operator.function is not None:
            expression = self._registered(operator, plan.split, node, inputs)
        else:
            outputs = [self._local_meta(name, layout) for name, layout in zip(node.outputs, plan.outputs)]
            if plan.in_fp8:
                inputs[0] = Ref(self._rounded(inputs[0].name, before))
                if inputs[1].name in self.in_fp8:
                    inputs[1] = Ref(f"fp8.Weight({', '.join(self.in_fp8[inputs[1].name])})")
            waits = later.is_later(self.plan, self.block, node)
            if waits:
                inputs = [Ref(self._weight(node, name, one.name)) for name, one in zip(node.inputs, inputs)]
            expression = spell(node, inputs, outputs, self._parts(plan.split), plan.in_fp8, waits)
        for name, layout in zip(node.outputs, plan.outputs):
            self._define(name, layout, name)
        target = ", ".join(node.outputs) + ("," if node.returns_tuple and len(node.outputs) == 1 else "")
        needs_no_grad = node.no_grad and any(self.block.tensors[name].requires_grad for name in node.inputs)
        statement = f"{target} = {expression}"
        return ["with torch.no_grad():", INDENT + statement] if needs_no_grad else [statement]

    def _rounded(self, expression: str, lines: list[str]) -> str:
        """The variable with a tensor in fp8. The first time, the line that rounds it is added to `lines`."""
        if expression not in self.rounded:
            self.rounded[expression] = self._fresh(f"{expression}_fp8")
            lines.append(f"{self.rounded[expression]} = fp8.rounded({expression})")
        return self.rounded[expression]

    def _registered(self, operator: Operator, split: str, node: Node, inputs: list[Ref]) -> str:
        names = iter(inputs)
        args, kwargs = map_refs((node.args, node.kwargs), lambda ref: next(names))
        name = operator.name
        sizes = self.plan.mesh.sizes
        along = {axis: one for axis, one in enumerate(split.split(",")) if one in operator.along and sizes[axis] > 1}
        if along:
            (way,) = set(along.values())
            group = self._axis(*along) if len(along) == 1 else "axes.devices"
            name, args = f"{name}_along_{way.replace(' ', '_')}", [Ref(group), *args]
        if operator.among_copies is not None and self.plan.mesh.replicas > 1:
            name, args = f"{name}_among_copies", [Ref("axes.copies"), *args]
        return f"ops.{name}({format_arguments(args, kwargs)})"

    def _axis(self, axis: int) -> str:
        """The expression of the group of devices along a mesh axis."""
        return f"axes.{self.plan.mesh.names[axis]}"

    def _parts(self, split: str) -> dict[str, int]:
        """Annotated name -> over how many devices it is split."""
        parts: dict[str, int] = {}
        for name, size in zip(split.split(","), self.plan.mesh.sizes, strict=True):
            parts[name] = parts.get(name, 1) * size
        return parts

    def _local_meta(self, tensor: str, layout: Placements) -> TensorMeta:
        meta = self.block.tensors[tensor]
        shape = list(local_shape(meta.shape, layout, self.plan.mesh.sizes))
        for stretch in self.stretches:
            if tensor in stretch.dims:
                shape[stretch.dims[tensor]] //= self.plan.pieces[self.block.name, stretch.name]
        return replace(meta, shape=tuple(shape))

    def _in_layout(self, tensor: str, layout: Placements, lines: list[str]) -> str:
        """The expression of a tensor in a layout. The first time, the lines that reshard it are added to `lines`."""
        if (tensor, layout) not in self.names:
            source = self.made[tensor]
            found = reshards(source, layout)
            assert found is not None, (tensor, source, layout)
            changes = [one for one in found if self._does_something(one, tensor)]
            expression = self.names[tensor, source]
            is_gathered = bool(changes) and self._is_gathered_weight(tensor, changes)
            assert is_gathered or not self._is_master(tensor), f"{tensor} is stored in fp32, and not gathered"
            if is_gathered:
                variable = self._fresh(f"{tensor}_{_tag(layout)}")
                shards = "".join(f", ({self._axis(one.axis)}, {_dim(one.source)})" for one in changes)
                how = f", dtype={self.block.tensors[tensor].dtype}" if self._is_master(tensor) else ""
                how += ", again=True" if (self.block.name, tensor) in self.plan.gathered_again else ""
                function, parts = "weight", [variable]
                if (self.block.name, tensor, layout) in self.plan.gathered_in_fp8:
                    parts += [self._fresh(f"{variable}_{part}") for part in ("scale", "fp8")]
                    function, self.in_fp8[variable] = "weight_in_fp8", parts
                lines.append(f"{', '.join(parts)} = axes.gathers.{function}({expression}{shards}{how})")
                expression = variable
            elif changes:
                variable = self._fresh(f"{tensor}_{_tag(layout)}")
                for one in changes:
                    lines.append(f"{variable} = {self._collective(expression, one, tensor)}")
                    expression = variable
            self.names[tensor, layout] = expression
        return self.names[tensor, layout]

    def _is_gathered_weight(self, tensor: str, changes: Sequence[Reshard]) -> bool:
        """Whether a tensor is a parameter that is gathered from shards, with its gradient, if any, reduce-scattered."""
        return tensor in self.block.parameters and only_gathers(changes, self.block.tensors[tensor].requires_grad)

    def _does_something(self, reshard: Reshard, tensor: str) -> bool:
        """Whether a reshard does anything: one that only concerns gradients does not where there are none."""
        forward, backward = reshard.collectives
        if self.plan.mesh.sizes[reshard.axis] == 1:
            return False
        return forward != "identity" or (self.block.tensors[tensor].requires_grad and backward != "identity")

    def _collective(self, x: str, reshard: Reshard, tensor: str) -> str:
        forward, backward = reshard.collectives
        axis = self._axis(reshard.axis)
        if not self.block.tensors[tensor].requires_grad:
            backward = _WITHOUT_GRADIENT.get(backward, backward)
        if forward == "identity":
            return f"collectives.{'share' if backward == 'all_reduce' else 'divide'}({x}, {axis})"
        if forward == "all_reduce":
            return f'collectives.all_reduce({x}, {axis}, backward="{backward}")'
        if forward == "all_to_all":
            return f"collectives.all_to_all({x}, {axis}, source={_dim(reshard.source)}, target={_dim(reshard.target)})"
        dim = _dim(reshard.source if isinstance(reshard.source, Shard) else reshard.target)
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

    def _release(self, following: list[Segment]) -> list[str]:
        """A `del` of the variables that no later segment uses, so that their memory is free."""
        needed = set(self.block.outputs)
        for segment in following:
            for unit in [*segment.others, *(unit for region in segment.regions for unit in region.units)]:
                needed.update(unit.inputs)
        dead: list[str] = []
        for (tensor, layout), name in list(self.names.items()):
            if tensor in needed or (tensor in self.block.parameters and not name.isidentifier()):
                continue
            if name.isidentifier() and not (tensor in self.block.inputs and name == tensor):
                dead += self.in_fp8.get(name, [name])
            del self.names[tensor, layout]
        dead = list(dict.fromkeys(dead))
        return [f"del {', '.join(dead)}"] if dead and following else []


_WITHOUT_GRADIENT = {"all_reduce": "identity", "reduce_scatter": "slice", "pad": "all_gather"}


def _function(lines: Sequence[str]) -> list[str]:
    """The lines of a function: its decorator and `def` line as they are, the rest indented."""
    start = next(index for index, line in enumerate(lines) if line.startswith("def ")) + 1
    return [*lines[:start], *(INDENT + line for line in lines[start:])]


def _tag(layout: Placements) -> str:
    """A suffix that tells the layouts of a tensor apart, such as `s1` or `whole`."""
    return "_".join(f"s{place.dim}" if isinstance(place, Shard) else "whole" for place in layout) or "whole"


def _dim(placement: Placement) -> int:
    assert isinstance(placement, Shard), placement
    return placement.dim
