"""Rewriting an exported program so that it consists of operators that have an entry.

Operators that torch composes of others become these others, and writes in place become new tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._export.utils import _get_decomp_for_cia
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx.traceback import get_current_meta
from torch.utils._python_dispatch import TorchDispatchMode

from nnscaler.errors import UserError
from nnscaler.kernels import written_out  # noqa: F401  which defines nnscaler::attention_that_drops
from nnscaler.operators.arguments import by_name
from nnscaler.operators.registry import find
from nnscaler.trace.own_code import source_of

WITHOUT_EFFECT = {"aten._assert_tensor_metadata.default", "aten._assert_scalar.default"}
_ROUNDS = 4  # an operator may be composed of others that are composed in turn


def decompose(program: ExportedProgram) -> ExportedProgram:
    """The same program, in which operators without an entry are what torch composes them of, and nothing is written in
    place.

    An operator that is not composed of others stays. It is refused later, by its name.

    Raises UserError for one that is composed of others and a check of values, which torch 2.11 would leave out.
    """
    checks = _Checks()
    for module in _graphs(program.graph_module):
        _keep_dropout(module)
    for _ in range(_ROUNDS):
        targets = {node.target for module in _graphs(program.graph_module) for node in module.graph.nodes}
        composed = _compositions([target for target in targets if isinstance(target, OpOverload)], checks)
        if not composed and not any(_is_mutable(target) for target in targets):
            break
        _detach_results_without_gradient(program.graph_module)
        program = program.run_decompositions(composed)
        checks.refuse()
    return program


def written(program: ExportedProgram) -> Iterator[str]:
    """Parameters and buffers into which a program writes through an alias, such as a detached one: torch's signature of
    the program does not name these."""
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in program.graph.nodes:
        if _is_mutable(node.target):
            for argument, given in zip(node.target._schema.arguments, node.args):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    name = held.get(_base(given).name)
                    if name is not None:
                        yield f"'{name}' by {node.target}"


def _base(node: fx.Node) -> fx.Node:
    """The tensor that a node's result is a view of."""
    while node.op == "call_function" and isinstance(node.target, OpOverload):
        results = node.target._schema.returns
        if not results or results[0].alias_info is None:
            break
        node = node.args[0]  # type: ignore[assignment]
    return node


def _graphs(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    return (inner for inner in module.modules() if isinstance(inner, fx.GraphModule))


def _keep_dropout(module: fx.GraphModule) -> None:
    """Makes dropout one operator that is not decomposed, also where it writes into a tensor that is no view; and
    attention that drops its weights one that is."""
    by_element, by_feature = torch.ops.aten.dropout.default, torch.ops.aten.feature_dropout.default
    in_place = {torch.ops.aten.dropout_.default: by_element, torch.ops.aten.feature_dropout_.default: by_feature}
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            given = by_name(str(node.target), node.args, node.kwargs)
            if given["dropout_p"]:
                node.target, node.kwargs = torch.ops.nnscaler.attention_that_drops.default, {}
                node.args = tuple(given.values())
            continue
        target = in_place.get(node.target, node.target)
        if target not in in_place.values() or not (node.args[1] and node.args[2]):
            continue
        x = node.args[0]
        if target is not node.target:
            made_by = find(str(x.target))
            if made_by is None or made_by.alias:
                continue  # which is refused
            for user in [user for user in x.users if user > node]:
                user.replace_input_with(x, node)
        node.target, node.kwargs = torch.ops.nnscaler.drop.default, {}
        node.args = (x, node.args[1], target is by_feature)
    module.recompile()


def _is_mutable(target: Any) -> bool:
    """Whether an operator writes into its arguments. `detach_` of a constant, which `torch.tensor` makes, does not."""
    return getattr(getattr(target, "_schema", None), "is_mutable", False) and str(target) != "aten.detach_.default"


class _Checks(TorchDispatchMode):
    """Notes operators without a result inside of compositions, such as the check of an inverse."""

    def __init__(self) -> None:
        super().__init__()
        self._found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func._schema.returns and str(func) not in WITHOUT_EFFECT:
            self._found.append(f"{func} at {source_of(get_current_meta())}")
        return func(*args, **(kwargs or {}))

    def inside(self, composition: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self:
                return composition(*args, **kwargs)

        return watched

    def refuse(self) -> None:
        if self._found:
            raise UserError(f"operator {self._found[0]} does more than give its result: not supported")


def _compositions(operators: list[OpOverload], checks: _Checks) -> dict[OpOverload, Callable[..., Any]]:
    """For each operator without an entry that torch computes by calling others: the function that does so.

    An operator with a derivative of its own is left out: what torch would compose it of has another derivative at some
    points. So are random numbers, which are refused by their own name.
    """
    return {
        operator: checks.inside(_get_decomp_for_cia(operator))
        for operator in operators
        if operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
        and find(str(operator)) is None
        and not operator._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in operator.tags
    }


def _detach_results_without_gradient(module: fx.GraphModule) -> None:
    """Detaches what is computed under `torch.no_grad`.

    Decomposition removes such a region, and would let gradients through.
    """
    for node in list(module.graph.nodes):
        if str(node.target) == "wrap_with_set_grad_enabled" and not node.args[0]:
            for user in list(node.users):  # each takes one of its results
                with module.graph.inserting_after(user):
                    detached = module.graph.call_function(torch.ops.aten.detach.default, (user,))
                detached.meta = dict(user.meta)
                user.replace_all_uses_with(detached, lambda other, detached=detached: other is not detached)
    module.recompile()
