"""What models' configurations say, and what of their experts and routers is not known: refused by name."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, masking_utils
from transformers.activations import ACT2FN

from nnscaler import UserError, hub, models
from nnscaler.kernels import gate_named
from nnscaler.models import load_config, marks_of
from nnscaler.models.attention import IMPLEMENTATIONS
from nnscaler.models.balance import balancing_loss, report_routers, routers_met
from nnscaler.models.causal_lm import prepare_config
from nnscaler.models.documents import Documents, in_rows, rows_hold
from nnscaler.models.experts import _activation, _constant, _gate, _mixture, divide_gates
from nnscaler.models.exported import write_older_tokenizer
from nnscaler.models.unread import Unread
from nnscaler.shards import Box
from tests import tiny


@pytest.mark.parametrize(
    ("bos", "eos", "found"),
    [(0, 1, {"bos": [0], "eos": [1]}), (None, [2, 3], {"eos": [2, 3]}), (5, None, {"bos": [5]}), (None, None, {})],
)
def test_marks_that_a_configuration_gives(bos: Any, eos: Any, found: dict[str, list[int]]) -> None:
    assert marks_of(tiny.config(bos_token_id=bos, eos_token_id=eos)) == found


def test_a_directory_without_a_configuration_is_no_model(tmp_path) -> None:
    with pytest.raises(UserError, match="is not a model: it has no config"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=f"cannot load the configuration of {tmp_path}"):
        load_config(str(tmp_path))


def test_code_that_comes_with_a_model_is_not_run_nor_asked_about(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    described = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / "own.py").write_text("raise SystemExit('it has run')")
    with pytest.raises(UserError, match=r"it comes with code of its own, which is never run; what transformers has"):
        load_config(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}})
    )
    with pytest.raises(UserError, match=rf"^cannot load a tokenizer from {tmp_path}: it comes with code of its own"):
        hub.load_tokenizer(str(tmp_path))


def test_the_hub_is_asked_for_names_alone_and_bundled_ones_stand_in(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("a directory is here"))
    assert load_config(str(tiny.write_model(tmp_path / "model"))).hidden_size == tiny.config().hidden_size
    asked: list[tuple[str, bool]] = []

    def gated(name: str, online: bool) -> None:
        asked.append((name, online))
        raise UserError("it is gated")

    monkeypatch.setattr(models, "_load", gated)
    for online, why in ((True, "the hub does not give it to us"), (False, "the hub cannot be reached")):
        monkeypatch.setattr(hub, "reachable", lambda online=online: online)
        assert load_config("meta-llama/Meta-Llama-3-8B").hidden_size == 4096
        assert caplog.messages.pop().endswith(f"using the bundled configuration, because {why}")
    monkeypatch.setattr(hub, "reachable", lambda: True)
    with pytest.raises(UserError, match=r"^it is gated; the configurations that come with this package are meta-"):
        load_config("org/x")
    assert asked == [("meta-llama/Meta-Llama-3-8B", True), ("meta-llama/Meta-Llama-3-8B", False), ("org/x", True)]


def test_a_model_beside_a_wrong_name_is_suggested(tmp_path, monkeypatch) -> None:
    """In this folder or in the one that is named; of folders that are no models, none is."""
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "llama3_min").mkdir(parents=True)
    tiny.write_model(tmp_path / "runs" / "llama3_mini")
    tiny.write_model(tmp_path / "first")
    for wrong, meant in (
        ("runs/lama3_min", "runs/llama3_mini"),
        ("frist", "first"),
        (f"{tmp_path}/firs", tmp_path / "first"),
    ):
        with pytest.raises(UserError, match=f"no such directory: {wrong}; .*; did you mean {meant}\\?; the config"):
            load_config(wrong)
    for wrong in ("other", "nowhere/first"):
        with pytest.raises(UserError, match="cannot be reached; the configurations"):
            load_config(wrong)


@pytest.mark.parametrize("held", [None, Documents(torch.zeros(1, 4), None)])
def test_models_are_told_of_documents_only_inside(held: Documents | None) -> None:
    """Also where one raises. transformers looks for none by itself there."""
    before, positions = masking_utils.find_packed_sequence_indices, torch.tensor([[0, 1, 0, 1]])

    def within() -> None:
        with rows_hold(held):
            assert in_rows.get() is held
            assert masking_utils.find_packed_sequence_indices(positions) is None
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        within()
    assert in_rows.get() is None
    assert masking_utils.find_packed_sequence_indices is before
    assert before(positions) is not None


@pytest.mark.parametrize(
    ("asked_for", "attention"), [("auto", "nnscaler_auto"), ("sdpa", "nnscaler_sdpa"), ("eager", "eager")]
)
def test_what_a_configuration_is_prepared_with(asked_for: str, attention: str) -> None:
    config = tiny.config(use_cache=True)
    prepare_config(config, tiny.LENGTH, asked_for)
    assert (config.use_cache, config._attn_implementation, config._experts_implementation) == (
        False, attention, "nnscaler"
    )  # fmt: skip


@pytest.mark.parametrize("asked_for", IMPLEMENTATIONS)
def test_each_attention_can_be_had_without_its_library(asked_for: str) -> None:
    """A plan for GPUs is made where there are none; transformers looks for a library where a name is like its own."""
    config = tiny.config()
    prepare_config(config, tiny.LENGTH, asked_for)
    with torch.device("meta"):
        attention = AutoModelForCausalLM.from_config(config).model.layers[0].self_attn
    assert attention.config._attn_implementation == config._attn_implementation


def test_an_older_tokenizer_keeps_what_it_says_itself(tmp_path) -> None:
    path = tmp_path / "tokenizer_config.json"
    write_older_tokenizer(tmp_path)
    assert not path.exists(), "a model without a tokenizer gets none"
    for given, wanted in [
        ({"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "LlamaTokenizer"}),
        ({"tokenizer_class": "TokenizersBackend"}, {"tokenizer_class": "TokenizersBackend"}),  # no tokenizer.json
        (
            {"tokenizer_class": "X", "extra_special_tokens": ["<a>"]},
            {"tokenizer_class": "X", "additional_special_tokens": ["<a>"]},
        ),
        (
            {"tokenizer_class": "X", "extra_special_tokens": {"a": "<a>"}},
            {"tokenizer_class": "X", "extra_special_tokens": {"a": "<a>"}},
        ),
    ]:
        path.write_text(json.dumps(given))
        write_older_tokenizer(tmp_path)
        assert json.loads(path.read_text()) == wanted
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("new")
    path.write_text(json.dumps({"chat_template": "own"}))
    write_older_tokenizer(tmp_path)
    assert json.loads(path.read_text()) == {"chat_template": "own", "tokenizer_class": "PreTrainedTokenizerFast"}


class Experts(nn.Module):
    """What transformers says of a class of experts."""

    _is_expert_parallel = is_concatenated = has_gate = True
    is_transposed = has_bias = False

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.arange(2 * 6 * 4.0).view(2, 6, 4), requires_grad=False)
        self.gate_up_proj_bias = nn.Parameter(torch.arange(12.0).view(2, 6))
        self.limit, self.act_fn, self.other = 7.5, ACT2FN["silu"], nn.Linear(1, 1)


def test_gates_are_divided_once_and_stay_frozen() -> None:
    model = nn.Sequential(Experts(), nn.Linear(4, 6))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        divide_gates(model)  # type: ignore[arg-type]
    weight, bias = model[0].gate_up_proj, model[0].gate_up_proj_bias
    assert (weight.shape, bias.shape) == ((2, 2, 3, 4), (2, 2, 3))
    assert (weight.requires_grad, bias.requires_grad) == (False, True)
    assert all(torch.equal(value.flatten(), before[name].flatten()) for name, value in model.named_parameters())
    turned = Experts()
    turned.is_transposed, turned.gate_up_proj = True, nn.Parameter(torch.zeros(2, 4, 6))
    divide_gates(turned)  # type: ignore[arg-type]
    assert turned.gate_up_proj.shape == (2, 4, 2, 3)
    mixed = Experts()
    mixed.is_concatenated = False
    divide_gates(mixed)  # type: ignore[arg-type]
    assert mixed.gate_up_proj.shape == (2, 6, 4), "gate and rest lie in turn"


def test_what_gates_read_is_a_number_or_a_known_activation() -> None:
    module = Experts()
    assert [_constant(module, name) for name in ("limit", "act_fn", "has_bias")] == [7.5, "silu", False]
    assert [_activation(ACT2FN[name]) for name in ("gelu", "gelu_pytorch_tanh", "relu2")] == [
        "gelu", "gelu_pytorch_tanh", "relu2",
    ]  # fmt: skip
    for other, name in ((nn.Linear(1, 1), "Linear"), (torch.tanh, "builtin_function_or_method")):
        del module.act_fn
        module.act_fn = other
        with pytest.raises(UserError, match=f"Experts computes with a {name}, which is neither a number nor an act"):
            _constant(module, "act_fn")
    module.has_post_expert_norm = True
    with pytest.raises(UserError, match="Experts normalises what each expert gives, which is not supported"):
        _mixture(module, *[torch.zeros(1, 1)] * 3)


class Capped(nn.Module):
    """An activation made of others and of numbers."""

    def __init__(self, inner: nn.Module, cap: float) -> None:
        super().__init__()
        self.inner, self.cap = inner, cap

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).clamp(max=self.cap)


def test_an_activation_is_known_by_its_class_and_one_of_a_function_is_not_found_again() -> None:
    known = ACT2FN["silu"]

    class Inner(nn.Module):
        pass

    assert _activation(type(type(known).__name__, (nn.Module,), {"__repr__": lambda self: repr(known)})()) is None
    module = Experts()
    module.act_fn = Inner()
    with pytest.raises(UserError, match="Experts computes with a Inner, which is neither a number nor an activation"):
        _constant(module, "act_fn")


def test_experts_without_a_gate_have_an_activation() -> None:
    module = Experts()
    module.has_gate = False
    assert _gate(module) == ("nnscaler.models.experts:activate", {"act_fn": "silu"})


def test_a_gate_may_read_a_module_without_weights() -> None:
    module, x = Experts(), torch.randn(4, 3) * 3
    module.act_fn = Capped(Capped(ACT2FN["silu"], 1.5), 0.5)
    held = _constant(module, "act_fn")
    kind = f"{__name__}:Capped"
    assert held == {"class": kind, "cap": 0.5, "inner": {"class": kind, "cap": 1.5, "inner": "silu"}}
    gate = gate_named("nnscaler.models.experts:activate", {"act_fn": held})
    assert torch.equal(gate(x), torch.nn.functional.silu(x).clamp(max=0.5))
    assert gate_named("nnscaler.models.experts:activate", {"act_fn": {**held, "cap": 0.1}})(x).max() <= 0.1


class Router(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, 10 * x


class Layer(nn.Module):
    def __init__(self, routers: int = 1) -> None:
        super().__init__()
        for number in range(routers):
            self.add_module(f"router_{number}", Router())

    def forward(self, x: Tensor) -> Tensor:
        for router in self.children():
            x, _ = router(x)
        return x


def load_balancing_loss_func(logits: tuple[Tensor, ...], experts: int, choices: int) -> Tensor:
    """As in modules of transformers."""
    return torch.histc(torch.cat(logits), experts, 0, experts).sum() * choices


class Balanced(nn.Module):
    num_experts, num_experts_per_tok, router_aux_loss_coef = 4, 2, 0.5
    _can_record_outputs = {"router_logits": SimpleNamespace(target_class=Router, index=1)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer(0), Layer(2), Layer()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_each_layer_with_one_router_reports_its_logits() -> None:
    model = Balanced()
    report_routers(model)  # type: ignore[arg-type]
    for _ in range(2):
        with routers_met() as met:
            assert model(torch.tensor([0.0])).tolist() == [4]
        assert [logits.tolist() for logits in met] == [[0], [30]]
    assert [type(layer).__name__ for layer in model.layers] == ["Layer"] * 4
    assert not any(module._forward_hooks for module in model.modules()), "none is left"
    with routers_met() as outer:
        with routers_met():
            model(torch.tensor([0.0]))
        assert outer == []
        model.layers[0](torch.tensor([5.0]))
    assert [each.tolist() for each in outer] == [[50]]
    logits = [torch.tensor([0.5, 1.5]), torch.tensor([2.5])]
    assert balancing_loss(model, logits, torch.tensor(6)).item() == 0.5 * 6 * 3 * 2  # type: ignore[arg-type]


def test_choices_are_counted_as_either_version_does_and_otherwise_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the four experts the last is chosen by nobody; counts become averages, which are no whole numbers."""
    chosen = torch.tensor([0, 2, 2, 1, 2])
    for count in (lambda x: torch.bincount(x, minlength=4), lambda x: torch.histc(x.float(), bins=4, min=0, max=4)):
        monkeypatch.setattr(sys.modules[__name__], "load_balancing_loss_func", lambda *_, count=count: count(chosen))
        found = balancing_loss(Balanced(), [], torch.tensor(6))  # type: ignore[arg-type]
        assert (found.tolist(), found.dtype) == ([3, 3, 9, 0], torch.float32)
    monkeypatch.setattr(sys.modules[__name__], "load_balancing_loss_func", lambda *_: torch.ones(4))
    with pytest.raises(UserError, match="counts the choices of experts in another way: update transformers"):
        balancing_loss(Balanced(), [], torch.tensor(6))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "missing",
    [
        "num_experts", "num_experts_per_tok", "router_aux_loss_coef", "_can_record_outputs", "load_balancing_loss_func",
    ],
)  # fmt: skip
def test_a_loss_of_routers_that_is_not_known_is_refused(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Balanced if hasattr(Balanced, missing) else sys.modules[__name__], missing)
    with pytest.raises(UserError, match="Balanced has no loss from the experts' router that is known here; train with"):
        report_routers(Balanced())  # type: ignore[arg-type]


def test_joined_tensors_are_read_across_their_border() -> None:
    parts = [torch.arange(6).view(2, 3), 10 + torch.arange(4).view(2, 2)]
    unread: list[Any] = [Unread(part.shape, part.dtype, lambda box, part=part: part[box.slices]) for part in parts]
    for begin in range(5):
        for size in range(1, 6 - begin):
            box = Box((1, begin), (1, size))
            assert torch.equal(torch.cat(unread, 1).read(box), torch.cat(parts, 1)[box.slices])  # type: ignore[attr-defined]
    assert torch.cat(unread, 1).dtype == torch.int64
    assert (unread[0].size(), unread[0].size(1), unread[0][...]) == ((2, 3), 3, unread[0])
    assert torch.equal(unread[0].transpose(0, 1).sum(0).whole(), parts[0].sum(1)), (
        "what is not known is computed of the whole"
    )
    assert [part.tolist() for part in (one.whole() for one in unread[0].max(1))] == [[2, 5], [2, 2]]


# What transformers does with tensors of files: here of [4, 6, 5], and of [4, 1, 5] as the second one.
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "stack": lambda a, b: torch.stack([a, a.contiguous()]),
    "stack before the last": lambda a, b: torch.stack([a, a, a], dim=2),
    "stack behind the last": lambda a, b: torch.stack([b, b], -1),
    "cat": lambda a, b: torch.cat([a, a]),
    "cat of other sizes": lambda a, b: torch.cat([b, a, b], dim=1),
    "cat along the last": lambda a, b: torch.cat((a, a), dim=-1),
    "chunk": lambda a, b: a.chunk(2),
    "chunks of other sizes": lambda a, b: torch.chunk(a, 3, dim=-1),
    "split": lambda a, b: a.split(3),
    "split of other sizes": lambda a, b: torch.split(a, [1, 3, 2], dim=1),
    "transpose": lambda a, b: a.transpose(0, 1),
    "transpose by keywords": lambda a, b: torch.transpose(a, dim0=-1, dim1=0),
    "squeeze": lambda a, b: b.squeeze(1),
    "squeeze of what is no 1": lambda a, b: a.squeeze(dim=-2),
    "one dimension as two": lambda a, b: a.shaped((4, 2, 3, 5)),
    "the last as two": lambda a, b: a.shaped((4, 6, 5, 1)),
    "two dimensions as one": lambda a, b: b.shaped((4, 5)),
    "all dimensions otherwise": lambda a, b: b.shaped((2, 2, 5, 1)),
    "the same shape": lambda a, b: a.shaped((4, 6, 5)),
    "one after the other": lambda a, b: torch.stack([one.transpose(0, 1) for one in torch.cat([a, b], 1).chunk(7, 1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_of_a_box_no_more_is_read_than_what_it_is_made_of(name: str) -> None:
    wholes = [torch.arange(120).view(4, 6, 5), 1000 + torch.arange(20).view(4, 1, 5)]
    read = [0]

    def unread(whole: Tensor) -> Any:
        def part(box: Box) -> Tensor:
            found = whole[box.slices]
            assert tuple(found.shape) == box.sizes, "inside the tensor"
            read[0] += found.numel()
            return found

        return Unread(whole.shape, whole.dtype, part)

    class Shaped(Tensor):
        def shaped(self, shape: tuple[int, ...]) -> Tensor:
            return self.reshape(shape)

    given, wanted = (CALLS[name](*map(make, wholes)) for make in (unread, lambda one: one.as_subclass(Shaped)))
    given, wanted = (list(one) if isinstance(one, (tuple, list)) else [one] for one in (given, wanted))
    assert [tuple(one.shape) for one in given] == [tuple(one.shape) for one in wanted]
    draw = random.Random(0)
    for one, right in zip(given, wanted):
        assert torch.equal(one.whole(), right)
        for _ in range(40):
            sizes = tuple(draw.randint(1, size) for size in right.shape)
            box = Box(tuple(draw.randint(0, all_ - size) for all_, size in zip(right.shape, sizes)), sizes)
            read[0] = 0
            assert torch.equal(one.read(box), right[box.slices]), box
            assert (
                name in ("two dimensions as one", "all dimensions otherwise") or read[0] == right[box.slices].numel()
            ), box
