"""What a rank loads of a compiled plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nnscaler.runtime import module as modules
from nnscaler.runtime.module import ParallelModule
from nnscaler.sums import IN_FP32, GradientSum

CODE = """
def forward(weights, axes, x):
    return (x @ weights["w"].float() @ weights["same"].float().t() + weights["fixed"] * weights["b"].float()).sum()
"""


WAYS = {"exchanged_once": False, "master_only": False, "gathered_in_fp8": False, "dtype": "bfloat16"}


def loaded(folder: Path, **changed) -> ParallelModule:
    """A plan of one device with a trained `w`, also called `same`, and `v`; a frozen `b`, and a buffer `fixed`."""
    one = {"layout": "R", "trained": True, **WAYS}
    plan = {
        "mesh": {"sizes": [1], "replicas": 1},
        "inputs": ["x"],
        "parameters": {
            "w": one | {"shape": [2, 3]},
            "v": one | {"shape": [4]},
            "b": one | {"shape": [2], "trained": False},
            "fixed": one | {"shape": [2], "trained": False, "dtype": "float32"},
        },
        "tied": {"same": "w"},
        "predicted": {"seconds_by_category": {"compute": 1.5}},
        "micro_batches": 2,
        "splits": False,
        "gradients_on_host": 0,
        "gradient_sum": {},
        "state_on_host": 0,
        "blocks": {"0": {"gathered_again": False}, "1": {"gathered_again": False}},
    } | changed
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "gencode_stage0.py").write_text(CODE)
    save_file({"fixed": torch.tensor([3.0, 4.0])}, folder / "buffers.safetensors")
    return ParallelModule(folder, torch.device("cpu"))


def test_a_rank_has_what_its_plan_says(tmp_path):
    module = loaded(tmp_path)
    assert module.predicted_seconds == {"compute": 1.5}
    assert module.gives_loss
    assert module._weights["same"] is module._weights["w"]
    assert module.buffer_names == {"fixed"}
    assert sorted(module.parameters_to_load()) == ["b", "v", "w"]
    assert [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(module._weights.items())] == [
        ("b", torch.bfloat16, (2,)),
        ("fixed", torch.float32, (2,)),
        ("same", torch.bfloat16, (2, 3)),
        ("v", torch.bfloat16, (4,)),
        ("w", torch.bfloat16, (2, 3)),
    ]
    read = {"w": torch.full((2, 3), 1 + 2**-10), "v": torch.zeros(4), "b": torch.tensor([1.0, 2.0])}
    module.load(lambda name, box: read[name][box.slices])
    assert module._weights["w"].eq(1).all(), "rounded"
    loss = module.accumulate([{"x": torch.ones(1, 2)}, {"x": torch.zeros(1, 2)}])
    assert loss == 2 * 2 * 3 + 2 * (3.0 + 8.0)
    (bucket,) = module.buckets
    assert bucket.gradient.dtype == torch.float32
    assert sorted(slot.name for slot in bucket.slots) == ["v", "w"]
    assert module._is_weight(module._weights["w"][1:])
    assert not module._is_weight(torch.ones(1))
    assert (module.axes.host._pack, module.axes.host._unpack) == (module.gathers.pack, module.gathers.unpack)
    assert module.axes.gathers is module.gathers
    assert (module.state_on_host, bucket.on_host, module._gathers_again) == ([], None, False)


def test_what_a_plan_puts_on_the_host_or_gathers_again(tmp_path):
    again = {"0": {"gathered_again": False}, "1": {"gathered_again": True}}
    module = loaded(tmp_path, state_on_host=1, gradients_on_host=1, micro_batches=3, blocks=again)
    assert module.state_on_host == [0]
    assert module.buckets[0].on_host is not None
    assert module._gathers_again
    assert module.reducer._micro_batches == 3


@pytest.mark.parametrize(
    ("ways", "wanted"),
    [({}, IN_FP32), ({"collective": "all_to_all", "travels_as": "bfloat16"}, GradientSum("all_to_all", "bfloat16"))],
)
def test_gradients_of_stored_and_of_gathered_weights_are_summed_as_the_plan_says(ways, wanted, tmp_path):
    module = loaded(tmp_path, gradient_sum=ways)
    assert module.reducer._sums == module.gathers.sums == wanted


def test_a_single_gradient_is_of_its_weights_type(tmp_path):
    assert loaded(tmp_path, micro_batches=1).buckets[0].gradient_dtype == torch.bfloat16


def test_a_weight_that_is_stored_wider_begins_as_its_own_type_has_it(tmp_path):
    """2**-12 is less than half of a step of bf16 at 1."""
    w = {"layout": "R", "trained": True, **WAYS, "master_only": True}
    module = loaded(tmp_path, parameters={"w": w | {"shape": [2]}}, tied={})
    module.load_one("w", torch.tensor([1 + 2.0**-12, 1 + 2.0**-7]))
    assert module._weights["w"].dtype == torch.float32
    assert module._weights["w"].tolist() == [1, 1 + 2.0**-7]


def test_a_stage_has_parameters_that_others_use_too_in_buckets_of_their_own(tmp_path):
    whole = loaded(tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    for shared, wanted in (((), [{"w", "v"}]), (("v",), [{"w"}, {"v"}])):
        stage = ParallelModule.of_stage(tmp_path, plan, 0, whole.axes, shared)
        assert [{slot.name for slot in bucket.slots} for bucket in stage.buckets] == wanted


def test_gathered_weights_are_weights(tmp_path, monkeypatch):
    module, other = loaded(tmp_path), torch.ones(3)
    monkeypatch.setattr(module.gathers, "holds", lambda tensor: tensor is other)
    assert module._is_weight(other)


@pytest.mark.parametrize("known", [True, False])
def test_tensors_that_forward_does_not_use_are_held(known, tmp_path):
    module, unused = loaded(tmp_path), torch.arange(3, device="cpu" if known else "meta")
    module.hold_unused({"more": unused})
    assert ("more" in module.parameters_to_load()) == (not known)
    assert module.specs["more"].shape == (3,)
    assert module._weights["more"].tolist() == ([0, 1, 2] if known else [0, 0, 0])


@pytest.mark.parametrize(("slow", "times"), [(torch.bfloat16, 1), (torch.float32, 1), (torch.float16, 0)])
def test_products_of_a_slow_type_are_widened_where_any_weight_has_it(slow, times, tmp_path, monkeypatch):
    widened = []
    monkeypatch.setattr(modules, "are_slow", lambda device, dtype: dtype == slow)
    monkeypatch.setattr(modules, "widen_slow_products", lambda: widened.append(slow))
    loaded(tmp_path)
    assert len(widened) == times
