"""A loop of the user's own: that of docs/training-loop.rst beside plain PyTorch, and states that every plan loads."""

from __future__ import annotations

import os
import re
import runpy
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nnscaler import ComputeConfig, OptimizerConfig, UserError, parallelize
from nnscaler.parallel import ParallelizedModel
from tests import tiny
from tests.launch import run
from tests.plainly import SETTINGS, update_plainly

DOCUMENT = Path(__file__).parents[1] / "docs" / "training-loop.rst"
TOLERANCE = 1e-6


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tiny.close(found[name], tensor) < TOLERANCE, name


def run_the_document(folder: str) -> None:
    """On every rank: the lines of the document, one after the other."""
    os.chdir(folder)
    found = runpy.run_path("loop.py")
    reloaded = found["model"].state_dict()
    if int(os.environ["RANK"]) == 0:
        torch.save((found["losses"], found["weights"], reloaded), "found.pt")
    else:
        assert found["weights"] == {}


@pytest.mark.parametrize("world", [1, 2])
def test_the_loop_of_the_document_is_that_of_plain_pytorch(tmp_path, world):
    blocks = re.findall(r"code-block:: python\n\n((?:    .*\n|\n)+)", DOCUMENT.read_text())
    assert len([line for line in textwrap.dedent(blocks[1]).splitlines() if line]) <= 15
    code = "\n".join(map(textwrap.dedent, blocks))
    assert "# later" in code  # where one run ends and another begins
    code = code.replace("# later", "torch.distributed.barrier() if world > 1 else None  # later")
    (tmp_path / "loop.py").write_text(code)
    run(world, run_the_document, str(tmp_path), init=False)
    losses, weights, reloaded = torch.load(tmp_path / "found.pt")
    definitions: dict[str, object] = {"__name__": "document"}
    exec(textwrap.dedent(blocks[0]), definitions)
    torch.manual_seed(0)
    net = definitions["Net"]()
    adamw, update = update_plainly(net, OptimizerConfig(lr=0.01))
    schedule = torch.optim.lr_scheduler.LinearLR(adamw, total_iters=5)
    for found in losses:
        loss = net(definitions["samples"], definitions["labels"])
        loss.backward()
        update()
        schedule.step()
        assert found == pytest.approx(loss.item(), abs=TOLERANCE)
    assert_equal(weights, net.state_dict())
    assert_equal(reloaded, net.state_dict())


WIDTH, WORDS, IGNORED = 32, 12, -100


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 2 * WIDTH)
        self.outer = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(nn.functional.gelu(self.inner(x)))


class Words(nn.Module):
    """Sums losses over labels that are not ignored. Has a frozen weight, a tied one, and a buffer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.position = nn.Parameter(torch.empty(WIDTH), requires_grad=False)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("version", torch.tensor([3.0]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.position)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids) + self.position
        for block in self.blocks:
            x = block(x)
        scores = self.head(x).flatten(0, 1)
        return nn.functional.cross_entropy(scores, targets.flatten(), ignore_index=IGNORED, reduction="sum")


def batch(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(WORDS, (2, 8), generator=generator)
    targets = ids.roll(-1, 1)
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = IGNORED
    return {"ids": ids, "targets": targets}


def words(seed: int) -> Words:
    torch.manual_seed(seed)
    return Words()


PLANS = {
    "copies": ComputeConfig(1, 2, micro_batches=2),
    "split": ComputeConfig(2, 2, micro_batches=4),
    "pipeline": ComputeConfig(2, 2, micro_batches=4, explore_pipeline=True, pipeline_nstages=2),
    "alone": ComputeConfig(1, 1, micro_batches=4),
}


def model_of(name: str, folder: Path, seed: int) -> ParallelizedModel:
    fields = {**vars(PLANS[name]), "hardware": str(folder / "hardware.json")}
    rank = int(os.environ.get("RANK", 0))  # another one's weights are not taken
    return parallelize(words(seed + rank), batch(0), ComputeConfig(**fields), SETTINGS, folder=folder / name)


def steps(model: ParallelizedModel, numbers: range) -> list[float]:
    losses = []
    for step in numbers:
        mine = [batch(4 * step + index) for index in range(model.copy, 4, model.copies)]
        loss = model.step(mine, count=sum(int((one["targets"] != IGNORED).sum()) for one in mine))
        model.optimizer.step()
        losses.append(loss.item())
    return losses


def save(model: ParallelizedModel, file: Path, losses: list[float]) -> None:
    state = model.state_dict(), model.optimizer.state_dict(), losses
    if state[0]:
        torch.save(state, file)


def go_on(folder: Path, name: str, state_of: str) -> None:
    """Another plan, with other first weights, goes on from a state."""
    weights, moments, _ = torch.load(folder / f"{state_of}.pt", mmap=True)
    model = model_of(name, folder, seed=9)
    model.load_state_dict(weights)
    model.optimizer.load_state_dict(moments)
    save(model, folder / f"{state_of}-{name}.pt", steps(model, range(3, 5)))


def by_all_plans(folder: Path) -> bool:
    names = [name for name in PLANS if name != "alone"]
    is_split = False
    for name in names:
        model = model_of(name, folder, seed=1)
        seven = [batch(index) for index in range(7)]  # more than a pipeline's schedule has at a time, and fewer
        before = model.evaluate(seven, "sum").item()
        save(model, folder / f"{name}.pt", steps(model, range(3)))
        assert model.evaluate(seven, "sum").item() < before
        torch.save(before / model.copies, folder / f"{name}-evaluated.pt")
        if name == "split":
            is_split = any(model._module.box(one).sizes != spec.shape for one, spec in model._module.specs.items())
            is_split = is_split or "reduce" in (folder / name / "gencode_stage0.py").read_text()
    for name, state_of in zip(names, [*names[1:], names[0]]):
        go_on(folder, name, state_of)
    return is_split


def test_every_plan_is_the_plain_loop_and_loads_what_any_saved(tmp_path):
    tiny.write_hardware(tmp_path)
    assert run(2, by_all_plans, tmp_path, init=False) == [True, True]
    go_on(tmp_path, "alone", "split")
    net = words(1)
    wanted = sum(net(**batch(index)) for index in range(7)).item()
    for name in PLANS:
        assert name == "alone" or torch.load(tmp_path / f"{name}-evaluated.pt") == pytest.approx(wanted, rel=TOLERANCE)
    _, update = update_plainly(net, SETTINGS)
    losses, states = [], {}
    for step in range(5):
        batches = [batch(4 * step + index) for index in range(4)]
        loss = sum(net(**one) for one in batches) / sum(int((one["targets"] != IGNORED).sum()) for one in batches)
        loss.backward()
        update()
        losses.append(loss.item())
        states[step] = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for file, first, last in [
        *((name, 0, 2) for name in PLANS if name != "alone"),
        *((name, 3, 4) for name in ("split-copies", "pipeline-split", "copies-pipeline", "split-alone")),
    ]:
        weights, _, found = torch.load(tmp_path / f"{file}.pt")
        assert found == pytest.approx(losses[first : last + 1], rel=TOLERANCE), file
        assert_equal(weights, states[last])


@pytest.fixture
def model(tmp_path):
    return parallelize(Words, batch(0), ComputeConfig(micro_batches=2), folder=tmp_path / "words", seed=5)


def test_a_sum_an_evaluation_and_weights_from_a_seed(model):
    plain = words(0)
    plain.load_state_dict(model.state_dict())
    batches = [batch(1), batch(2)]
    wanted = sum(plain(**one) for one in batches)
    assert model.evaluate(batches, "sum").item() == pytest.approx(wanted.item(), rel=TOLERANCE)
    assert model.step([tuple(one.values()) for one in batches], "sum").item() == pytest.approx(wanted.item(), rel=1e-6)
    wanted.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    assert model.optimizer.step().item() == pytest.approx(norm.item(), rel=1e-5)


def test_what_a_loop_may_get_wrong_is_one_line(model, tmp_path):
    with pytest.raises(UserError, match=r"optimizer.step\(\) without a step of the model before it"):
        model.optimizer.step()
    with pytest.raises(UserError, match="step got 1 micro-batches; the plan is for micro_batches=2 of them"):
        model.step([batch(1)])
    short = {name: tensor[:, :4] for name, tensor in batch(1).items()}
    with pytest.raises(
        UserError, match=r"input 'ids' of a micro-batch is \[2, 4\] torch.int64; the example was \[2, 8\]"
    ):
        model.step([short, short])
    with pytest.raises(UserError, match=r"forward of Words takes .*; of a micro-batch: .* 'mask'"):
        model.step([{**batch(1), "mask": batch(1)["ids"]}] * 2)
    with pytest.raises(UserError, match="reduction is 'max'; it must be mean or sum"):
        model.step([batch(1)] * 2, "max")
    with pytest.raises(UserError, match="count goes with reduction mean"):
        model.step([batch(1)] * 2, "sum", count=3)
    state = model.state_dict()
    with pytest.raises(UserError, match="the state has 'other', which the model has not"):
        model.load_state_dict({**state, "other": torch.zeros(1)})
    del state["position"]
    with pytest.raises(UserError, match="the state has no 'position'"):
        model.load_state_dict(state)
    with pytest.raises(UserError, match="runtime_ngpus is 2, but 1 process runs"):
        parallelize(Words, batch(0), ComputeConfig(1, 2), folder=tmp_path / "two")
    with pytest.raises(UserError, match=r"forward gives \[3, 2\]; what is trained must give one number"):
        parallelize(nn.Linear(4, 2), (torch.zeros(3, 4),), folder=tmp_path / "scores")


class Dropping(Words):
    """Drops some of what it embeds."""

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return super().forward(ids, targets) + nn.functional.dropout(self.embed(ids), 0.5).square().sum()


def test_all_of_an_optimizer_s_state_is_taken(tmp_path):
    """Counts that differ, as a step has changed nothing; a rate that a scheduler has changed; and what is dropped."""
    make = lambda seed: parallelize(  # noqa: E731
        Dropping, batch(0), ComputeConfig(), OptimizerConfig(lr=0.01), folder=tmp_path / "words", seed=seed
    )
    model, other = make(5), make(5)
    model.optimizer.param_groups[0]["lr"] = 0.003
    for number in range(3):
        loss = model.step([batch(number)])
        model.optimizer._pending = (1.0, loss * (float("nan") if number == 1 else 1.0))
        model.optimizer.step()
    weights, state = model.state_dict(), model.optimizer.state_dict()
    assert (state["steps"], state["taken"], state["lr"]) == (2, 3, 0.003)
    other.load_state_dict(weights)
    other.optimizer.load_state_dict(state)
    found = other.optimizer.state_dict()
    assert found.keys() == state.keys()
    for name, value in state.items():
        same = torch.equal(value, found[name]) if isinstance(value, Tensor) else value == found[name]
        assert same, name
        assert not isinstance(value, Tensor) or value.any(), name
    assert other.optimizer._sharded.steps == 2
    assert other.step([batch(3)]).item() == model.step([batch(3)]).item(), "what is dropped depends on all steps"
    for each in (model, other):
        each.optimizer.step()
    assert_equal(other.state_dict(), model.state_dict())
    del state["taken"]
    other.optimizer.load_state_dict(state)
    assert other.optimizer._taken == 2, "older ones do not say"
