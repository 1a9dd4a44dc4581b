"""What fp8 does to training: losses of a model of 300M parameters in bf16 and in fp8, and gradients of a layer.

    python benchmarks/fp8_numerics.py --model_id meta-llama/Meta-Llama-3-8B --dataset_path first_run/plays_512

All runs start with the same weights, and have the same samples in each step. In bf16 the model is trained three times,
with the step's sequences in one micro-batch, in two and in four: what differs between these is rounding, the noise that
fp8 is held against. How far a run is from bf16 is the mean over the runs in bf16 but itself: two runs alone are as far
apart as chance will have it. Every product of a layer that may be in fp8 is. Gradients of one layer are compared with
those in fp64, by what they are of. Writes fp8_numerics.json and fp8_numerics.png; runs of earlier calls stay there, so
that one call may do some of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import ROOT, table, write
from benchmarks.numerics import losses_of, parser_of, write_model
from nnscaler.command import run
from nnscaler.kernels import fp8

LAST = 200  # steps over which differences are averaged
ONE, TWO, FOUR = (f"--micro_batch_size {8 // count} --grad_accumulation_steps {count}" for count in (1, 2, 4))
BF16 = {
    "bf16": f"--precision bf16 {ONE}",
    "bf16, two micro-batches": f"--precision bf16 {TWO}",
    "bf16, four micro-batches": f"--precision bf16 {FOUR}",
}
RUNS = {
    **BF16,
    "fp8": f"--precision fp8 {ONE}",
    "fp8, two micro-batches": f"--precision fp8 {TWO}",
    "fp8, ends in bf16": f"--precision fp8 --fp8_keep_bf16 first,last {ONE}",
}


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, "fp8_numerics", steps=500, layers=20, hidden_size=1024)
    add = parser.add_argument
    add("--runs", nargs="*", choices=list(RUNS), default=list(RUNS), help="which are run (default: all)")
    add("--hardware", default="h100", help="the kind of device, as train.py knows it")
    return parser.parse_args()


def in_fp8_everywhere(name: str, folder: Path) -> Path:
    """The description of a device on which fp8 is always faster."""
    fields = json.loads((ROOT / "nnscaler" / "hardware" / "specs" / f"{name}.json").read_text())
    fields["flops"]["float8_e4m3fn"] = 1e20
    fields["launch"], fields["memory_bandwidth"] = 0.0, 1e16
    path = folder / "hardware.json"
    path.write_text(json.dumps(fields))
    return path


def trained(options: argparse.Namespace, name: str, model: Path, hardware: Path, work: Path) -> list[float]:
    """Loss by step of train.py."""
    fixed = (
        f"--name numerics --model_id {model} --dataset_path {options.dataset_path} --hardware {hardware} --seed 0 "
        f"--learning_rate 1e-3 --warmup_steps {options.steps // 10} --weight_decay 0.1 --enable-chunk-loss "
        f"--max_train_steps {options.steps} --log_interval 1 "
        f"--log_dir {work}/runs --gen_savedir {work}/code --checkpoint_dir {work}/checkpoints --checkpoint_interval 0"
    )
    subprocess.run([sys.executable, str(ROOT / "train.py"), *fixed.split(), *RUNS[name].split()], check=True)
    plan = json.loads((work / "code" / "numerics" / "plan.json").read_text())
    count = sum(node["in_fp8"] for block in plan["blocks"].values() for node in block["nodes"].values())
    assert (count > 0) == name.startswith("fp8"), "what is said to be in fp8 is"
    return losses_of(work)


def errors_of_gradients(model_path: Path) -> list[dict[str, Any]]:
    """For each parameter of one layer, and its input: the relative error in norm of its gradient, in bf16 and fp8."""
    model = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="sdpa").model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layer, generator = model.layers[0].to(device), torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(1, 512, model.config.hidden_size, generator=generator).to(device) for _ in range(2))
    where = model.rotary_emb.to(device)(x, torch.arange(512, device=device).unsqueeze(0))
    plain = nn.Linear.forward

    def product(self: nn.Linear, x: Tensor) -> Tensor:
        return fp8.linear(fp8.rounded(x), self.weight)

    def gradients(dtype: torch.dtype, linear: Any) -> dict[str, Tensor]:
        nn.Linear.forward = linear
        layer.to(dtype).zero_grad()
        given = x.to(dtype).requires_grad_()
        result = layer(given, position_embeddings=tuple(one.to(dtype) for one in where))
        (result[0] if isinstance(result, tuple) else result).backward(gradient.to(dtype))
        nn.Linear.forward = plain
        found = {"input": given.grad, **{name: one.grad for name, one in layer.named_parameters()}}
        return {name: one.double() for name, one in found.items() if one is not None}

    layer.to(torch.bfloat16)  # all compute with the same weights
    exact = gradients(torch.float64, plain)
    found = {"bf16": gradients(torch.bfloat16, plain), "fp8": gradients(torch.bfloat16, product)}
    return [
        {"gradient": name.removesuffix(".weight"),
         **{kind: float((each[name] - wanted).norm() / wanted.norm()) for kind, each in found.items()}}
        for name, wanted in exact.items()
    ]  # fmt: skip


def compared(curves: dict[str, list[float]]) -> list[list[Any]]:
    """Of each run: its first loss and its last ones, and its mean difference, and absolute one, from runs in bf16."""
    rows = []
    for name, losses in curves.items():
        others = [curves[other] for other in BF16 if other in curves and other != name]
        differences = [a - b for other in others for a, b in zip(losses[-LAST:], other[-LAST:], strict=True)]
        absolute = statistics.mean(map(abs, differences))
        rows.append([name, losses[0], statistics.mean(losses[-20:]), statistics.mean(differences), absolute])
    return rows


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The curves, and how far each is from that in bf16, in the mean of 20 steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for index, (name, losses) in enumerate(curves.items()):
        style = {"label": name, "color": "black" if name == "bf16" else f"C{index}", "linewidth": 1}
        above.plot(range(1, len(losses) + 1), losses, **style)
        differences = [a - b for a, b in zip(losses, curves["bf16"])]
        means = [statistics.mean(differences[max(0, i - 19) : i + 1]) for i in range(len(differences))]
        below.plot(range(1, len(losses) + 1), means, **style)
    above.set(ylabel="loss a token (nats)", title="A Llama of 300M parameters in bf16 and in fp8, on one GPU")
    below.set(xlabel="optimizer step", ylabel="difference from bf16, mean of 20 steps")
    above.legend(fontsize=8)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    options = parse()
    path = options.output / "fp8_numerics.json"
    curves = json.loads(path.read_text())["curves"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(options, model)
        hardware = in_fp8_everywhere(options.hardware, Path(folder))
        gradients = errors_of_gradients(model)
        for index, name in enumerate(options.runs):
            curves[name] = trained(options, name, model, hardware, Path(folder) / f"run{index}")
    curves = {name: curves[name] for name in RUNS if name in curves}
    print(table(list(gradients[0]), [list(row.values()) for row in gradients]))
    result = {"steps": options.steps, "gradients": gradients, "curves": curves}
    if sum(name in BF16 for name in curves) > 1:
        head = ["run", "first_loss", "last_loss", "mean_difference", "mean_absolute_difference"]
        rows = compared(curves)
        print(table(head, rows))
        result["rows"] = [dict(zip(head, row)) for row in rows]
        draw(curves, options.output / "fp8_numerics.png")
    write(path, result)


if __name__ == "__main__":
    run(main)
