"""What a plan's seconds and bytes become in a report, for a plan of a few figures: each is worked out here."""

from __future__ import annotations

from types import SimpleNamespace

from nnscaler.graph import Call, Ref
from nnscaler.mesh import Mesh
from nnscaler.placement import PARTIAL, REPLICATE, SHARED, Shard
from nnscaler.plan import Key, NodePlan
from nnscaler.planner.costs import CostModel
from nnscaler.profiler.operators import OperatorTimes
from nnscaler.recompute import KEEPS_ALL, RECOMPUTES_ALL, SAME_ON_HOST
from nnscaler.report import categories, charts
from nnscaler.report.blocks import block_costs
from nnscaler.report.categories import bytes_by_category, host_bytes_by_category, seconds_by_category
from nnscaler.report.charts import colours
from nnscaler.report.chrome import chrome_trace
from tests import tiny
from tests.test_units import block

ALL, AGAIN, AWAY = KEEPS_ALL.name, RECOMPUTES_ALL.name, SAME_ON_HOST[KEEPS_ALL].name


def layer():
    """Attention, a product of it, an activation and a sum; and then another block is called twice, and another once."""
    found = block(
        ("attention", "o", "q k v"), ("linear", "h", "o w"), ("silu", "s", "h"), ("add", "g", "s h"),
        outputs=("c",), inputs=("q", "k", "v"),
    )  # fmt: skip
    for name, taken, called in (("a", "g", "inner"), ("b", "a", "inner"), ("c", "b", "last")):
        found.nodes.append(Call(name, "call", (Ref(taken),), {}, (name,), block=called))
        found.tensors[name] = found.tensors["g"]
    for node in found.nodes:
        node.module, node.source = f"mlp.{node.name}", f"model.py:{len(node.name)}"
    return found


def plan_of(**figures: object) -> SimpleNamespace:
    """Three micro-batches on two devices."""
    given = layer()
    everything = {"seconds": {}, "memory": {}, "host": {}, "state_on_host": 0.0, "gradients_on_host": 0.0, **figures}
    graph = SimpleNamespace(all_blocks=lambda: [given], count=lambda block: 5)
    return SimpleNamespace(graph=graph, micro_batches=3, mesh=Mesh((2,)), **everything)


def test_seconds_of_a_step_by_what_they_are_for():
    seconds = {
        Key("forward", "layer", "o"): 0.5, Key("backward", "layer", "o"): 1.5, Key("forward", "layer", "h"): 1.0,
        Key("backward", "layer", "h"): 2.0, Key("forward", "layer", "g"): 0.25, Key("backward", "layer", "g"): 0.125,
        Key("again", "layer", "h", AGAIN): 4.0, Key("again", "layer", "g", ALL): 0.5, Key("cast", "layer", "w"): 0.25,
        Key("cast again", "layer", "w"): 0.75, Key("copies"): 0.375, Key("exchange", "", "backward"): 100.0,
        Key("reshard", "layer", "x", "R -> S(0)"): 100.0, Key("update", "layer", "w"): 100.0,
    }  # fmt: skip
    collectives = [
        SimpleNamespace(local=local, seconds=time, hidden=hidden)
        for local, time, hidden in ((False, 10.0, 4.0), (True, 2.0, 0.5), (False, 3.0, 0.0))
    ]
    groups = [SimpleNamespace(update_seconds=time) for time in (0.5, 0.75)]
    found, hidden = seconds_by_category(plan_of(seconds=seconds), collectives, groups)
    assert list(found.items()) == [
        ("matmul", 9.0), ("attention", 6.0), ("memory-bound", 3 * 0.375 + 1.5), ("recompute", 13.5),
        ("communication exposed", 9.0), ("optimizer", 1.25), ("casts of master weights", 3.0),
        ("copies to the host exposed", 1.125),
    ]  # fmt: skip
    assert hidden == 4.5
    plain, _ = seconds_by_category(plan_of(seconds={Key("forward", "layer", "o"): 0.5}), [], [])
    assert list(plain.items()) == [
        ("attention", 1.5), ("memory-bound", 0.0), ("recompute", 0.0), ("communication exposed", 0.0),
        ("optimizer", 0.0),
    ]  # fmt: skip


def test_bytes_of_the_device_and_of_the_host_by_what_they_are_for():
    """A half of the optimizer's state lies on the host, and 5 of 8 bytes of gradients."""
    memory = {
        Key("parameter", "layer", "w", "parameters"): 100.0, Key("saved", "layer", "x", ALL): 7.0,
        Key("inside", "layer", "g", ALL): 1.0, Key("saved", "layer", "x", AGAIN): 4.0, Key("working", "layer"): 11.0,
        Key("buffers", "layer", "a"): 13.0, Key("buffers", "layer", "b"): 2.0,
    }  # fmt: skip
    host = {
        Key("state"): 9.0, Key("gradients"): 5.0, Key("saved", "layer", "x", AWAY): 2.0,
        Key("inside", "layer", "g", AWAY): 3.0,
    }  # fmt: skip
    groups = [
        SimpleNamespace(memory={"parameters": 10.0, "gradients": 8.0, "master weights": 6.0, "moments": 12.0}),
        SimpleNamespace(memory={"parameters": 2.0}),
    ]
    kept = [("activations, keeps all", 8.0), ("activations, recomputes all", 4.0)]
    working = [("working memory", 11.0), ("communication buffers", 15.0)]
    away = plan_of(memory=memory, host=host, state_on_host=9.0, gradients_on_host=5.0)
    assert list(bytes_by_category(away, groups).items()) == [
        ("parameters", 12.0), ("gradients", 3.0), ("master weights", 3.0), ("moments", 6.0), *kept, *working
    ]  # fmt: skip
    assert list(host_bytes_by_category(away).items()) == [
        ("optimizer state", 9.0), ("gradients", 5.0), ("activations, keeps all, on the host", 5.0)
    ]  # fmt: skip
    assert list(bytes_by_category(plan_of(memory=memory), groups[1:]).items()) == [
        ("parameters", 2.0), *kept, *working
    ]  # fmt: skip


def test_what_a_block_costs():
    """All seconds are of three micro-batches. Two levels compute the product again."""
    seconds = {
        Key("forward", "layer", "h"): 1.0, Key("backward", "layer", "h"): 2.0, Key("forward", "other", "h"): 100.0,
        Key("again", "layer", "h", ALL): 0.5, Key("again", "layer", "h", AGAIN): 4.0,
        Key("forward", "layer", "g"): 0.25, Key("again", "other", "h", AGAIN): 100.0,
        Key("again", "layer", "g", AGAIN): 0.125,
    }  # fmt: skip
    memory = {
        Key("saved", "layer", "q", ALL): 7.0, Key("saved", "layer", "h", ALL): 3.0,
        Key("inside", "layer", "g", ALL): 1.0, Key("saved", "layer", "h", AGAIN): 4.0,
        Key("saved", "other", "h", ALL): 100.0, Key("working", "layer", "h"): 100.0,
        Key("saved", "layer", "a", AGAIN): 16.0,
    }  # fmt: skip
    plan = plan_of(seconds=seconds, memory=memory, host={Key("saved", "layer", "h", AWAY): 32.0})
    plan.levels = {"layer": {KEEPS_ALL: 2, RECOMPUTES_ALL: 3, SAME_ON_HOST[KEEPS_ALL]: 1}}
    columns, whole = (Shard(1),), (REPLICATE,)
    plan.nodes = {
        ("layer", "o"): NodePlan("h", (columns,) * 3, (columns,)),
        ("layer", "h"): NodePlan("k", (columns, (Shard(0),)), ((PARTIAL,),)),
        ("layer", "s"): NodePlan("-", ((SHARED,),), (whole,)),
        ("layer", "g"): NodePlan("-", (whole, (SHARED,)), (whole,)),
    }  # fmt: skip
    plan.costs = CostModel(tiny.hardware("h100"), plan.mesh)
    group = SimpleNamespace(
        block="layer", tensor="w", count=5, layout=columns, owners=2, exchanged_once=True, master_only=False,
        trained=True, memory={"parameters": 8.0}, update_seconds=0.5, elements=4,
    )  # fmt: skip
    (given,) = plan.graph.all_blocks()
    found = block_costs(plan, given, [group, SimpleNamespace(block="other")])
    attention, product, cluster, *calls = found["units"]
    assert calls == [{"calls_block": "inner"}, {"calls_block": "last"}]
    where = {"module": "mlp.h", "source": "model.py:1"}
    assert product == {
        "name": "h", "category": "matmul", "operators": ["aten.linear.default"], **where, "splits": ["k"],
        "inputs": {"o": "S(1)", "w": "S(0)"}, "outputs": {"h": "P"}, "saved_bytes": 7.0, "origin": "roofline",
        "seconds": {"forward": 3.0, "backward": 6.0, "again": 13.5},
    }  # fmt: skip
    assert attention["seconds"] == {"forward": 0.0, "backward": 0.0, "again": 0.0}
    assert (attention["name"], attention["category"], attention["saved_bytes"]) == ("o", "attention", 0)
    assert (cluster["name"], cluster["category"], cluster["splits"]) == ("g", "memory-bound", ["-"])
    assert (cluster["inputs"], cluster["outputs"], cluster["saved_bytes"]) == ({"h": "R*"}, {"g": "R"}, 1.0)
    assert cluster["seconds"] == {"forward": 0.75, "backward": 0.0, "again": 0.375}
    assert {name: value for name, value in found.items() if name != "units"} == {
        "calls": 5,
        "levels": {
            ALL: {"calls": 2, "again_seconds": 1.5, "saved_bytes": 11.0},
            AGAIN: {"calls": 3, "again_seconds": 12.375, "saved_bytes": 20.0},
            AWAY: {"calls": 1, "again_seconds": 0.0, "saved_bytes": 32.0},
        },
        "given_saved_bytes": {"q": 7.0, "a": 16.0},
        "parameters": [
            {
                "tensor": "w", "count": 5, "layout": "S(1)", "owners": 2, "exchanged_once": True, "master_only": False,
                "trained": True, "bytes": {"parameters": 8.0}, "update_seconds": 0.5,
            }
        ],
    }  # fmt: skip


def test_a_time_is_measured_where_what_a_device_has_was_timed(monkeypatch):
    """Rather than what all have together; and what multiplies in fp8 was not."""
    plan = plan_of(levels={"layer": {}})
    whole = (REPLICATE,)
    ways = {name: NodePlan("-", (whole,) * count, (whole,)) for name, count in (("o", 3), ("s", 1), ("g", 2))}
    plan.costs = CostModel(tiny.hardware("h100"), plan.mesh, times=OperatorTimes.__new__(OperatorTimes))
    asked = []

    def timed(self, node, inputs):
        asked.append((node.name, [meta.shape for meta in inputs]))
        return 1.0 if node.name == "h" else None

    monkeypatch.setattr(OperatorTimes, "seconds", timed)
    for in_fp8, origin in ((False, "measured"), (True, "roofline")):
        way = NodePlan("k", ((Shard(1),), (Shard(0),)), ((PARTIAL,),), in_fp8)
        plan.nodes = {("layer", name): one for name, one in {**ways, "h": way}.items()}
        (given,) = plan.graph.all_blocks()
        units = block_costs(plan, given, [])["units"]
        assert [unit["origin"] for unit in units if "origin" in unit] == ["roofline", origin, "roofline"]
    assert asked[1] == ("h", [(2, 2, 8, 8), (1, 4, 8, 8)])
    assert [name for name, _ in asked] == ["o", "h", "o"]


def test_a_trace_has_each_work_and_each_rank_s_update():
    """In microseconds. What takes no time is not drawn; a backward that is not split is all of it."""
    pipeline = {
        "schedule": {"ranks": 2}, "splits": [True, False],
        "timeline": [
            [0, "F", 0, 7, 0.0, 2.0], [1, "I", 1, 7, 2.0, 2.5], [0, "W", 0, 7, 3.0, 3.0], [0, "I", 0, 7, 3.0, 4.25],
        ],
    }  # fmt: skip
    found = chrome_trace({"predicted": {"step_seconds": 10.0, "update_seconds": 2.5}, "pipeline": pipeline})
    each = {"pid": 0}
    names = [{"ph": "M", **each, "name": "process_name", "args": {"name": "simulated step"}}]
    for rank in range(2):
        names.append({"ph": "M", **each, "tid": rank, "name": "thread_name", "args": {"name": f"rank {rank}"}})
        names.append({"ph": "M", **each, "tid": rank, "name": "thread_sort_index", "args": {"sort_index": rank}})
    works = [
        (0, "forward 7", 0.0, 2e6, {"stage": 0, "micro-batch": 7}),
        (1, "backward 7", 2e6, 0.5e6, {"stage": 1, "micro-batch": 7}),
        (0, "backward, for the stage's input 7", 3e6, 1.25e6, {"stage": 0, "micro-batch": 7}),
        *((rank, "update of parameters", 7.5e6, 2.5e6, {}) for rank in range(2)),
    ]
    spans = [
        {"ph": "X", **each, "tid": rank, "name": name, "ts": start, "dur": time, "args": facts}
        for rank, name, start, time, facts in works
    ]
    assert found == {"displayTimeUnit": "ms", "traceEvents": [*names, *spans]}


def test_categories_have_colours_of_their_own_and_others_the_next_free_ones():
    """Also where there are more of them than colours."""
    of_time = ("matmul", "memory-bound", "recompute", "communication exposed", "communication hidden", "optimizer")
    of_memory = ("parameters", "gradients", "master weights", "moments", "working memory", "communication buffers")
    others = [f"level {number}" for number in range(13)]
    for known in (of_time, of_memory):
        found = colours(dict.fromkeys([*others, *known], 1.0))
        assert len({found[name] for name in (*known, *others[:6])}) == 12
        assert [found[name] for name in others] == [found[others[number % 6]] for number in range(13)]
        assert {name: found[name] for name in known} == colours(dict.fromkeys(known, 1.0))
    assert len(charts._OTHERS) == 6
    assert {getattr(categories, name) for name in ("MATMUL", "RECOMPUTE", "HIDDEN")} <= set(of_time)
