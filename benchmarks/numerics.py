"""Trains a small Llama in bf16 with several plans, and with plain PyTorch on one GPU, on the same samples.

    python benchmarks/numerics.py --model_id meta-llama/Meta-Llama-3-8B --dataset_path first_run/plays_512

The plain loop runs twice, with the step's sequences in one micro-batch and in several: what differs between the two is
rounding, the noise that the plans are held against. Writes numerics.json and numerics.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import RESULTS, ROOT, table, write
from nnscaler.command import ArgumentParser, run
from nnscaler.data.training import PackedDataset, SampleOrder
from nnscaler.models import load_config

SEQUENCES = 8  # a step
RATE, WEIGHT_DECAY, SEED = 1e-3, 0.1, 0
# What train.py is told beside what all plans share.
PLANS = {
    "2 copies": "--plan_ngpus 1 --micro_batch_size 4",
    "split over 2": "--plan_ngpus 2 --micro_batch_size 4 --grad_accumulation_steps 2 --enable-chunk-loss",
    "split, all recomputed": "--plan_ngpus 2 --micro_batch_size 8 --recompute_modules LlamaDecoderLayer",
    "split, little memory": "--plan_ngpus 2 --micro_batch_size 8 --enable-chunk-loss --gpu_mem_constraint {memory}",
}


def parser_of(description: str | None, name: str, steps: int, layers: int, hidden_size: int) -> ArgumentParser:
    """The flags of a small model that is trained, with their defaults. `name`: of the results"""
    parser = ArgumentParser(description=description)
    add = parser.add_argument
    add("--model_id", default="meta-llama/Meta-Llama-3-8B", help="whose configuration is made small")
    add("--dataset_path", type=Path, required=True, help="dataset that bookcorpus.py wrote")
    add("--steps", type=int, default=steps, help="optimizer steps")
    add("--layers", type=int, default=layers, help="decoder layers")
    add("--hidden_size", type=int, default=hidden_size, help="a multiple of 128, the size of a head")
    add("--output", type=Path, default=RESULTS, help=f"folder for {name}.json and {name}.png")
    return parser


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, "numerics", steps=200, layers=4, hidden_size=512)
    parser.add_argument("--memory", type=float, default=2.45, help="GB a device of the plan with little memory")
    return parser.parse_args()


def write_model(options: argparse.Namespace, folder: Path) -> None:
    """A model whose weights all runs start with."""
    config = load_config(options.model_id)
    width = options.hidden_size
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": options.layers}
    heads = {"num_attention_heads": width // 128, "num_key_value_heads": max(1, width // 256), "head_dim": 128}
    config.update({**sizes, **heads})
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def plain(options: argparse.Namespace, model_path: Path, micro_batches: int) -> list[float]:
    """Loss by step of a loop over transformers' own model: bf16, with fp32 masters and gradients."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.to(device).train()
    parameters = list(model.parameters())
    masters = [parameter.detach().float() for parameter in parameters]
    groups = [
        {"params": [m for m in masters if (m.dim() > 1) == decayed], "weight_decay": WEIGHT_DECAY * decayed}
        for decayed in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    rows = PackedDataset.open(options.dataset_path).rows
    order = SampleOrder(len(rows), SEED)
    losses = []
    for step in range(options.steps):
        samples = [rows[order.row(step * SEQUENCES + index)]["input_ids"] for index in range(SEQUENCES)]
        tokens = torch.stack([torch.as_tensor(sample).long() for sample in samples]).to(device)
        labels = SEQUENCES * (tokens.shape[1] - 1)
        for master in masters:
            master.grad = torch.zeros_like(master)
        total = 0.0
        for batch in tokens.chunk(micro_batches):
            logits = model(batch, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum") / labels
            loss.backward()
            total += loss.item()
            for master, parameter in zip(masters, parameters):
                assert master.grad is not None
                assert parameter.grad is not None
                master.grad += parameter.grad
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, parameters):
                parameter.copy_(master)
        losses.append(total)
    return losses


def planned(options: argparse.Namespace, name: str, model_path: Path, work: Path) -> list[float]:
    """Loss by step of train.py."""
    own = PLANS[name].format(memory=options.memory).split()
    shared = f"--name numerics --model_id {model_path} --dataset_path {options.dataset_path} --runtime_ngpus 2"
    rates = (
        f"--learning_rate {RATE} --weight_decay {WEIGHT_DECAY} --lr_schedule constant --seed {SEED} --log_interval 1"
    )
    places = f"--log_dir {work}/runs --gen_savedir {work}/code --checkpoint_dir {work}/checkpoints"
    command = ["torchrun", "--nproc_per_node=2", str(ROOT / "train.py"), "--max_train_steps", str(options.steps)]
    arguments = [*shared.split(), *rates.split(), *places.split(), *own]
    if "--grad_accumulation_steps" not in own:
        arguments += ["--grad_accumulation_steps", "1"]
    subprocess.run([*command, *arguments], check=True)
    return losses_of(work)


def losses_of(work: Path) -> list[float]:
    """Loss by step, as train.py has logged it of the run `numerics`."""
    lines = (work / "runs" / "numerics" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The curves, and how far each is from the plain loop's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    exact = curves["plain"]
    for index, (name, losses) in enumerate(curves.items()):
        steps = range(1, len(losses) + 1)
        is_plain = name.startswith("plain")
        colour = "black" if name == "plain" else "grey" if is_plain else f"C{index}"
        style = {"label": name, "color": colour, "linewidth": 2 if is_plain else 1}
        above.plot(steps, losses, **style)
        if name != "plain":
            below.plot(steps, [a - b for a, b in zip(losses, exact)], **style)
    above.set(
        ylabel="loss a token (nats)", title="A small Llama in bf16: plain PyTorch on one GPU, and four plans on two"
    )
    below.set(xlabel="optimizer step", ylabel="difference from plain")
    above.legend(fontsize=8)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        model_path = Path(folder) / "model"
        write_model(options, model_path)
        curves = {
            "plain": plain(options, model_path, 1),
            "plain, 4 micro-batches": plain(options, model_path, 4),
            **{name: planned(options, name, model_path, Path(folder) / f"run{i}") for i, name in enumerate(PLANS)},
        }
    half = options.steps // 2
    rows = []
    for name, losses in curves.items():
        differences = [abs(a - b) for a, b in zip(losses, curves["plain"])]
        rows.append(
            [name, losses[0], statistics.mean(losses[-20:]), statistics.mean(differences[half:]), max(differences)]
        )
    head = ["run", "first_loss", "last_loss", "mean_difference", "largest_difference"]
    print(table(head, rows))
    result = {"steps": options.steps, "rows": [dict(zip(head, row)) for row in rows], "curves": curves}
    write(options.output / "numerics.json", result)
    draw(curves, options.output / "numerics.png")


if __name__ == "__main__":
    run(main)
