"""The rows and words of plan.html, on values written by hand."""

from __future__ import annotations

from xml.etree import ElementTree

from nnscaler.plan import GIB
from nnscaler.report.page import plan_page
from tests.report.test_figures import collective, unit, values_of


def page_values() -> dict:
    """Those of `values_of`, with what only the page says: two operators, a call, and three parameters."""
    values = values_of()
    product = {
        "name": "up", "module": "mlp.up", "source": "model.py:3",
        "operators": ["aten.linear.default", "aten.view.default"], "splits": ["n"], "inputs": {"h": "R", "w": "S(0)"},
        "outputs": {"u": "S(1)", "x": "S(0)"}, **unit("matmul", "measured", 20.0, 30.0, 9.0), "saved_bytes": 2 * GIB,
    }  # fmt: skip
    cluster = {
        **product, "name": "y", "operators": [f"aten.{name}.Tensor" for name in ("a", "b", "c", "d", "e", "f", "e")],
        "splits": ["b", "l"], "inputs": {"u": "S(1)"}, "outputs": {"y": "S(1)"},
        **unit("memory-bound", "roofline", 3.0, 0.0, 0.0), "saved_bytes": 0.0,
    }  # fmt: skip
    parameter = {
        "tensor": "w", "count": 8, "layout": "S(0)", "owners": 1, "exchanged_once": False, "master_only": True,
        "trained": True, "bytes": {"parameters": 4 * GIB, "moments": 8 * GIB}, "update_seconds": 2.0,
    }  # fmt: skip
    norm = {**parameter, "tensor": "norm", "layout": "R*", "owners": 4, "exchanged_once": True, "master_only": False}
    table = {
        **norm,
        "tensor": "table",
        "layout": "R",
        "trained": False,
        "bytes": {"parameters": 2**20},
        "update_seconds": 0.0,
    }
    layer = values["costs"]["layer"]
    layer |= {
        "units": [product, {"calls_block": "inner"}, cluster], "parameters": [parameter, norm, table],
        "given_saved_bytes": {"h": 3 * GIB},
    }  # fmt: skip
    values["costs"] = {
        "layer": layer, "model": {**layer, "calls": 1, "units": [product], "parameters": [], "given_saved_bytes": {}}
    }  # fmt: skip
    values["blocks"]["model"] = {"pieces": {}}
    values["predicted"] |= {"device_memory_bytes": 80 * GIB}
    values["collectives"] += [
        collective("all_to_all", "again", 7.0, what="h", block="layer"),
        collective("slice", "forward", 2.0, local=True),
        collective("all_gather", "forward", 1.0, block="model", what="u"),
        collective("all_reduce", "forward", 4.0, move="S(0) -> S(1)"),
        collective("all_gather", "update", 1.5, what="weights", move="", hidden=0.5, calls=1, size=GIB),
        collective("reduce_scatter", "backward", 0.5, what="w", devices=2),
    ]
    values["limits"] = [{"limit": "memory", "share": 0.5, "text": "a reason"}]
    values["origins"] = [{"what": "matmul", "origin": "measured", "seconds": 59.0, "share": 0.59}]
    values["advice"] = [
        {"change": "profile attention", "text": "where it is", "helps": True},
        {"change": "+20 GiB a device", "text": "no plan fits", "helps": False},
    ]
    values["sources"] = {"hardware": "a data sheet", "profile": "", "measured": "here"}
    return values


def rows_of(page: ElementTree.Element) -> list[list[str]]:
    return [["".join(cell.itertext()) for cell in row] for row in page.iter("tr")]


def test_the_page_has_a_row_for_each_operator_move_and_parameter():
    page = ElementTree.fromstring(plan_page(page_values()).removeprefix("<!DOCTYPE html>"))
    rows = rows_of(page)
    begin = next(index for index, row in enumerate(rows) if row[0] == "operator")
    assert rows[begin + 1 : begin + 11] == [
        ["↳ h: all_to_all", "", "S(0) → R", "", "", "7.00 s", "7.0 %", ""],
        ["↳ w: reduce_scatter", "", "S(0) → R", "", "500 ms", "", "0.5 %", ""],
        ["h, from outside", "", "", "", "", "", "", "3.00 GiB"],
        ["up linear, view", "n", "R, S(0) → S(1), S(0)", "20.0 s", "30.0 s", "9.00 s", "59.0 %", "2.00 GiB"],
        ["↳ x: all_gather, reduce_scatter, slice", "", "S(0) → R", "12.0 s", "5.00 s", "3.00 s", "20.0 %", ""],
        ["↳ x: all_reduce", "", "S(0) → S(1)", "4.00 s", "", "", "4.0 %", ""],
        ["calls of inner", "", "", "", "", "", "", ""],
        ["y a, b, c, d and 2 more", "", "S(1) → S(1)", "3.00 s", "", "", "3.0 %", ""],
        ["parameter", "how many", "layout", "ranks with the same shard", "gradient exchanged", "parameters", "moments",
         "update"],
        ["w", "8", "S(0), fp32", "1", "each micro-batch, above", "4.00 GiB", "8.00 GiB", "2.00 s"],
    ]  # fmt: skip
    assert rows[begin + 11 : begin + 13] == [
        ["norm", "8", "R*", "4", "once a step", "4.00 GiB", "8.00 GiB", "2.00 s"],
        ["table (not trained)", "8", "R", "4", "", "1 MiB", "", ""],
    ]
    update = ["all_gather", "layer.weights", "update", "", "4", "1", "1.00 GiB", "1.50 s", "500 ms", "profile"]
    assert update in rows
    assert not any(row[0] == "slice" for row in rows), "which is no communication"
    head = ["collective", "of", "when", "layouts", "devices", "calls a step", "bytes a call", "time a step",
            "hidden of it", "origin"]  # fmt: skip
    assert head in rows
    assert ["matmul", "measured", "59.0 s", "59.0 %"] in rows
    for row in (
        ["what limits", "of the step", "why"], ["memory", "50.0 %", "a reason"], ["what would help", "by how much"],
        ["profile attention", "where it is"], ["what would not help", "why"], ["+20 GiB a device", "no plan fits"],
    ):  # fmt: skip
        assert row in rows, row
    text = " ".join("".join(page.itertext()).split())
    for said in (
        "layer called 8 times", "model called once", "3 calls",
        "Operators run piece by piece: those up to y in 8 pieces.",
        "fp32: only the master weight is stored",
        "Below the bar: 6.00 s of communication behind backward, and 9.50 s of copies to the host and back beside",
        "30.0 GiB of the 40.0 GiB that the plan may use; a device has 80.0 GiB. Shares are of the limit.",
        "2.00 GiB a device of the 8.00 GiB that the plan may use. Tables of parameters",
        "optimizer's state wherever they lie", "Compile with --explain", "roofline: a data sheet", "measured: here",
        "No plan without a pipeline takes less than 98.8 s, which is 1.23 % less.",
    ):  # fmt: skip
        assert said in text, said
    assert "profile: " not in text
    assert "A tensor has one placement for each axis" not in text
    marks = [each.get("style") for each in page.iter("div") if each.get("class") == "mark"]
    assert marks == ["left:50.000%"], "40 GiB of the 80 that a device has"
    memory = next(each for each in page.iter("div") if each.get("class") == "marked")
    shares = [each.get("style").partition(";")[0] for each in memory.iter("span") if each.get("style")]
    assert shares == ["width:12.500%", "width:25.000%"]


def test_the_page_leaves_out_what_there_is_not():
    values = page_values()
    values["predicted"] |= {"hidden_seconds": {"communication hidden": 0.0}, "host_bytes": 0.0,
                            "hidden_copies_seconds": 0.0}  # fmt: skip
    values["mesh"] = {"sizes": [2, 4], "names": ["outer", "inner"], "replicas": 1}
    values["collectives"] = []
    values["advice"] = [{"change": "+20 GiB a device", "text": "1.1 x", "helps": True, "speed": 1.1}]
    for one in values["costs"]["layer"]["parameters"]:
        one |= {"owners": 1, "master_only": False}
    page = ElementTree.fromstring(plan_page(values).removeprefix("<!DOCTYPE html>"))
    text = " ".join("".join(page.itertext()).split())
    assert "A tensor has one placement for each axis of the mesh: outer, inner." in text
    assert "There is none." in text
    assert ["what would not help", "why"] not in rows_of(page)
    for absent in ("Below the bar", "Memory of the host", "fp32: only", "gradient exchanged", "Compile with --explain"):
        assert absent not in text, absent
    assert ["+20 GiB a device", "1.1 x"] in rows_of(page)
