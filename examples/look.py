"""Looks at what a run made: draws its loss curve, and lets the merged model write a line.

python examples/look.py --run runs/llama --model merged_model --prompt "KING HENRY" --plot loss.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nnscaler.command import ArgumentParser, run
from nnscaler.errors import UserError


def plot(folder: Path, output: Path) -> None:
    """Loss by step, out of the run's metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        raise UserError(f"'{folder}' has no metrics.jsonl; it is not the log folder of a run")
    entries = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for kind, label in (("loss", "training"), ("eval_loss", "validation")):
        found = [(entry["step"], entry[kind]) for entry in entries if entry.get(kind) is not None]
        if found:
            axes.plot(*zip(*found), marker="o", markersize=3, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss a token (nats)", title=f"Loss of {folder.name}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=150)


def write_line(model_path: Path, prompt: str) -> str:
    """A line that the model writes."""
    import torch
    from transformers import AutoModelForCausalLM

    from nnscaler import hub

    tokenizer = hub.load_tokenizer(str(model_path))
    try:
        model, report = AutoModelForCausalLM.from_pretrained(model_path, output_loading_info=True)
    except Exception as error:  # the loaders raise whatever a damaged file makes them raise
        raise UserError(f"cannot load a model from '{model_path}': {hub.first_line(error)}") from error
    problems = {kind: keys for kind, keys in report.items() if keys}
    if problems:
        raise UserError(f"'{model_path}' does not load cleanly: {problems}")
    tokens = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(0)
    with torch.no_grad():
        made = model.generate(
            **tokens, max_new_tokens=24, do_sample=True, top_k=40, pad_token_id=tokenizer.eos_token_id
        )
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="log folder of a run")
    parser.add_argument("--model", type=Path, required=True, help="directory of a merged model")
    parser.add_argument("--prompt", default="KING HENRY", help="how the line begins")
    parser.add_argument("--plot", type=Path, default=Path("loss.png"), help="picture to write")
    options = parser.parse_args()
    if not (options.model / "config.json").exists():
        raise UserError(f"'{options.model}' is not the directory of a model: it has no config.json")
    plot(options.run, options.plot)
    print(f"{options.plot}: the loss curve")
    print(f"{options.model} writes: {write_line(options.model, options.prompt)!r}")


if __name__ == "__main__":
    run(main)
