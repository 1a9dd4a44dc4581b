"""Modules of all kinds, with any arguments and results, split over two processes, beside plain PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from nnscaler import UserError, parallelize
from tests.plainly import Case, check, splits

WIDTH, HEADS, CLASSES = 16, 4, 8


def layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True, **options)


class Encoder(nn.Module):
    """Layers of PyTorch's own, with a mask that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, labels: Tensor, padding: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
        x = self.layers(x, src_key_padding_mask=padding)
        return F.cross_entropy(self.head(x.mean(1)), labels, label_smoothing=smoothing)


class Scores(NamedTuple):
    hidden: Tensor
    extra: dict[str, Any]


class Vision(nn.Module):
    """Patches of images by a convolution, blocks that give tuples, and several losses in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, kernel_size=4, stride=4)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.blocks = nn.ModuleList(layer(norm_first=True, activation="gelu") for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, *, images: Tensor, labels: Tensor, factor: Tensor) -> dict[str, Tensor]:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1) + self.places
        for block in self.blocks:
            x = block(x)
        scores = self.head(x[:, 0])
        return {"class": F.cross_entropy(scores, labels), "size": factor * scores.square().mean()}


class Convolutions(nn.Module):
    """Pools, groups of channels, and a change of size."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, WIDTH, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Upsample(scale_factor=2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, CLASSES))

    def forward(self, images: Tensor, labels: Tensor, factor: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.down(images)), labels) * factor


@dataclass
class Output:
    loss: Tensor
    logits: Tensor
    right: Tensor
    nothing: None = None


class Step(nn.Module):
    """A repeated layer with nested arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, state: dict[str, Any], *, scale: float, gate: Tensor | None = None) -> Scores:
        hidden = self.linear(state["hidden"]).tanh() * scale
        return Scores(hidden if gate is None else hidden * gate, {"sums": [state["sums"] + hidden.mean(), None]})


class Nested(nn.Module):
    """Arguments in a dict of tuples, more of them by place and by keyword, and a result that is a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Step() for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, batch: dict[str, Any], *rest: Tensor, mode: str = "mean", **more: Tensor) -> Output:
        x, (labels, _) = batch["x"], batch["target"]
        sums = rest[0].mean() if rest else x.mean()
        for index, step in enumerate(self.steps):
            given = step({"hidden": x, "sums": sums}, scale=0.5, gate=more.get("gate") if index == 1 else None)
            x, sums = given.hidden, given.extra["sums"][0]
        logits = self.head(x)
        loss = F.cross_entropy(logits, labels, reduction=mode) + sums
        return Output(loss, logits, (logits.argmax(-1) == labels).sum())


def second(output: tuple[Tensor, Tensor]) -> Tensor:
    return output[1].mean() * 2


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.linear(x)
        return x, x.square()


def randoms(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels(seed: int, *shape: int) -> Tensor:
    return torch.randint(CLASSES, shape, generator=randoms(seed))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=randoms(seed))


def encoder_batch(seed: int) -> dict[str, Any]:
    padding = torch.arange(6).expand(8, 6) > torch.arange(8)[:, None] + 1
    return {"x": normal(seed, 8, 6, WIDTH), "labels": labels(seed, 8), "padding": padding, "smoothing": 0.1}


def images(count: int) -> list[dict[str, Tensor]]:
    return [
        {"images": normal(seed, 8, 3, 8, 8), "labels": labels(seed, 8), "factor": torch.tensor(0.1 * seed)}
        for seed in range(count)
    ]


def nested_batch(seed: int) -> tuple[Any, ...]:
    return {"x": normal(seed, 8, WIDTH), "target": (labels(seed, 8), None)}, normal(seed, 8)


def bert(seed: int) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 32}
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(**sizes, vocab_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )


def t5(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"d_model": WIDTH, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": HEADS, "vocab_size": 32}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))


def words(seed: int, **more: Tensor) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(32, (4, 8), generator=randoms(seed)), **more}


def total(output: dict[str, Tensor]) -> Tensor:
    return output["class"] + output["size"]


def loss_of(output: Any) -> Tensor:
    return output.loss


PIPELINE = {"micro_batches": 2, "explore_pipeline": True, "pipeline_nstages": 2}


def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    by_name = [{"batch": nested_batch(seed)[0], "gate": normal(seed, 8, 1), "mode": "sum"} for seed in range(2)]
    mask = torch.arange(8).expand(4, 8) < torch.arange(4)[:, None] + 4
    asked = [words(seed, attention_mask=mask.long(), labels=labels(seed, 4) % 2) for seed in range(2)]
    return {
        "encoder": Case(Encoder(), [encoder_batch(seed) for seed in range(3)]),
        "vision": Case(Vision(), images(3), total),
        "pipeline": Case(Vision(), images(3), total, compute=PIPELINE),
        "copies": Case(Vision(), images(2), total, compute={"plan_ngpus": 1, "micro_batches": 2}),
        "convolutions": Case(Convolutions(), images(3)),
        "nested": Case(Nested(), [nested_batch(seed) for seed in range(3)], loss_of),
        "keywords": Case(Nested(), by_name, loss_of),
        "pair": Case(Pair(), [(normal(seed, 8, WIDTH),) for seed in range(3)], second, options={"loss": second}),
        "bert": Case(bert(0), asked, loss_of),
        "t5": Case(t5(0), [words(seed, labels=labels(seed, 4, 6)) for seed in range(2)], loss_of),
    }


def test_modules_of_all_kinds_learn_as_the_plain_ones(tmp_path):
    given = cases()
    numbers = check(tmp_path, given)
    for name in given.keys() - {"pipeline", "copies"}:
        assert any(split != "-" for _, split in splits(tmp_path / name)), name
    assert (tmp_path / "pipeline" / "gencode_stage1.py").exists()
    for name in ("vision", "pipeline", "copies"):
        wanted = given[name].net(**given[name].batches[0])
        assert numbers[name][0] == pytest.approx({key: one.item() for key, one in wanted.items()}, abs=1e-5)
    for name in ("nested", "keywords"):
        batch = given[name].batches[0]
        wanted = given[name].net(**batch) if isinstance(batch, dict) else given[name].net(*batch)
        assert numbers[name][0] == {"right": wanted.right.item()}
    assert numbers["bert"] == [{}, {}]
    for name in ("nested", "bert"):  # scores are not given, nor computed where nothing else needs them
        plan = json.loads((tmp_path / name / "plan.json").read_text())
        assert len(plan["blocks"]["model"]["outputs"]) == 1


UNLIKE = {
    "a constant": ({"smoothing": 0.2}, "input 'smoothing' of a micro-batch is 0.2; the example was 0.1, which is a"),
    "no constant": ({"smoothing": ...}, "input 'smoothing' of a micro-batch is 0.0; the example was 0.1, which is a"),
    "no tensor": ({"padding": ...}, r"input 'padding' of a micro-batch is None; the example was \[8, 6\] torch.bool"),
    "a shape": ({"x": torch.zeros(8)}, r"input 'x' of a micro-batch is \[8\] torch.float32; the example was"),
    "a nest": ({"x": [torch.zeros(8)]}, "a micro-batch has 'x_0'; the example has x, labels, padding, smoothing"),
    "too much": ({"y": 1}, r"forward of Encoder takes \(x: .*\) -> .*; of a micro-batch: got an unexpected keyword"),
    "too little": ({"labels": ...}, r"forward of Encoder takes .*; of a micro-batch: missing a required .* 'labels'"),
}  # fmt: skip


def test_a_micro_batch_that_is_not_like_the_example_is_one_line(tmp_path):
    model = parallelize(Encoder(), encoder_batch(0), folder=tmp_path / "code")
    for changes, wrong in UNLIKE.values():
        batch = {name: value for name, value in {**encoder_batch(1), **changes}.items() if value is not ...}
        with pytest.raises(UserError, match=wrong):
            model.step([batch])
    x, y, padding, smoothing = encoder_batch(1).values()
    assert torch.isfinite(model.step([(x, y, padding, smoothing)]))  # by place is the same


class Returns(nn.Module):
    def __init__(self, results: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.results = nn.Linear(WIDTH, CLASSES), results

    def forward(self, x: Tensor) -> Any:
        return self.results(self.linear(x))


@pytest.mark.parametrize(
    ("results", "loss", "wrong"),
    [
        (lambda x: x, None, r"forward gives \[8, 8\]; what is trained must give one number, the loss: name it by "),
        (lambda x: {"a": x, "b": x.sum()}, None, r"forward gives a \[8, 8\], b \[\]; what is trained must give one "),
        (lambda x: None, None, "forward gives NoneType; what is trained must give one number"),
        (lambda x: x, lambda x: x.square(), r"what loss= makes of what forward gives is \[8, 8\]; it must be one numb"),
        (lambda x: x, lambda x: 3.0, "what loss= makes of what forward gives is float; it must be one number"),
        (lambda x: x.sum().detach(), None, "gives no parameter a gradient: there is nothing to train"),
    ],
)  # fmt: skip
def test_what_has_no_loss_is_told_so_in_one_line(results, loss, wrong, tmp_path):
    with pytest.raises(UserError, match=wrong):
        parallelize(Returns(results), torch.randn(8, WIDTH), loss=loss, folder=tmp_path / "code")


def test_errors_come_without_the_way_through_the_package(tmp_path):
    with pytest.raises(UserError) as found:
        parallelize(Returns(lambda x: x), torch.randn(8, WIDTH), folder=tmp_path / "code")
    assert [frame.name for frame in found.traceback][1:] == ["called"]
    assert found.value.__suppress_context__


def test_what_is_the_loss_by_itself(tmp_path):
    x = torch.randn(8, WIDTH)
    for index, (results, wanted) in enumerate([
        (lambda x: (x.sum(), x.square().mean()), lambda x: x.sum() + x.square().mean()),
        (lambda x: {"loss": x.sum(), "aux": x.mean()}, lambda x: x.sum()),
        (lambda x: SimpleNamespace(loss=x.sum()), lambda x: x.sum()),
        (lambda x: x.sum().reshape(1, 1), lambda x: x.sum()),
    ]):  # fmt: skip
        net = Returns(results)
        model = parallelize(net, x, folder=tmp_path / str(index))
        assert model.evaluate([x]).item() == pytest.approx(wanted(net.linear(x)).item(), rel=1e-5)
        assert model.step([x]).item() == pytest.approx(wanted(net.linear(x)).item(), rel=1e-5)
        assert all(number.shape == () for number in model.numbers.values())
