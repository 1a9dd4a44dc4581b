"""With the host and with pieces at once, the program's optimum is that of trying everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from nnscaler.graph import Graph
from nnscaler.mesh import Mesh
from nnscaler.planner import on_host
from nnscaler.planner import problem as stating
from nnscaler.planner.costs import CostModel
from nnscaler.planner.price import price
from nnscaler.planner.problem import Problem, Recomputing, build_problem
from nnscaler.planner.program import Program
from nnscaler.planner.solve import solve
from nnscaler.recompute import ON_DEVICE
from tests import tiny
from tests.planner.test_optimum import calls_of_a_mixer, everything, stack_of_linear_layers


@pytest.mark.parametrize(("make", "names"), [
    (lambda: stack_of_linear_layers(6), {"linear2"}), (lambda: calls_of_a_mixer(4), {"mixed", "v"}),
], ids=["linear layers", "around a registered operator"])  # fmt: skip
def test_what_fits_only_in_pieces_and_on_the_host_is_computed_so(
    make: Callable[[], Graph], names: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stating, "ON_DEVICE", ON_DEVICE[::3])  # the most and the least, or there are too many ways
    monkeypatch.setattr(stating, "IN_GROUPS", ())
    monkeypatch.setattr(on_host, "PARTS", 1)
    hardware, graph = tiny.hardware("h100"), make()
    hardware = replace(hardware, host=replace(hardware.host, to_host=1e12, to_device=8e11, both_ways=6e11))

    def stated(host: float) -> Problem:
        return build_problem(graph, CostModel(hardware, Mesh((1,)), True), Recomputing(), 2, host=host)

    plain = Program(stated(0.0))
    most = price(plain, solve(plain, 1e18, gap=0.0).solution).total_memory
    problem = stated(most / 2)
    problem.staging = problem.slots = 0.01 * most  # as large a part as in a model
    program = Program(problem)
    found = [(one, e) for one in everything(problem) if (e := price(program, one)) is not None]
    found = [(one, e) for one, e in found if sum(e.host.values()) <= problem.host]
    least = min(e.total_memory for _, e in found)
    assert least < 0.8 * min(e.total_memory for one, e in found if not (one.pieces and e.host))
    for fraction in (0.0, 0.02, 0.05, 0.1, 0.3, 0.6):
        memory = (least + fraction * (most - least)) * (1 + 1e-6)
        solution = solve(program, memory, gap=0.0).solution
        priced = price(program, solution)
        assert priced.total_memory <= memory * (1 + 1e-5)
        assert sum(priced.host.values()) <= problem.host * (1 + 1e-5)
        wanted = min(e.total_seconds for _, e in found if e.total_memory <= memory)
        assert priced.total_seconds == pytest.approx(wanted, rel=1e-5)
        assert any(calls for level, calls in solution.levels["layer"].items() if level.on_host)
        assert {name for _, name in solution.pieces} == (names if fraction < 0.2 else set()), "or there is room enough"
