"""Writes the measured sections of README.rst and benchmarks/README.rst from the JSON files in benchmarks/results.

python benchmarks/readme.py            # writes them
python benchmarks/readme.py --check    # fails where a file differs
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import accuracy, divisions
from benchmarks.measure import RESULTS, ROOT
from benchmarks.tables import compared, read, rst_table, title
from nnscaler.counting import counted

README, TABLES = ROOT / "README.rst", ROOT / "benchmarks" / "README.rst"
DOCUMENT = "The document reports 1,594 tokens/s/GPU, 40.96 % MFU, for 8B at 131,072 tokens on 8 H100"


def trainings() -> list[dict[str, Any]]:
    """What was measured, whole models first, then by length, then by speed."""
    found = [read(f"train/{path.name}") for path in (RESULTS / "train").glob("*.json")]
    return sorted(found, key=lambda one: (not whole(one), -one["sequence_length"], -one["tokens_per_second_per_gpu"]))


def whole(one: dict[str, Any]) -> bool:
    return bool(one["name"].startswith("32layers"))


def peer(one: dict[str, Any]) -> float | None:
    """Tokens a second and GPU of torchtitan at the same work on the same devices."""
    peers = read("peers.json")
    found = {row["sequence_length"]: float(row["tokens_per_second_per_gpu"]) for row in peers["torchtitan"]}
    same = whole(one) and one["device"] == peers["device"] and "device_memory_gib" not in one
    same = same and not one["name"].endswith("-fp8")  # torchtitan's was in bf16
    return found.get(one["sequence_length"]) if same else None


def headline() -> str:
    """The few figures that matter, for the front page."""
    crash, rivals = read("crash.json"), read("crash_rivals.json")
    compiles = {row["case"]: row for row in read("compile_time.json")["rows"]}
    ours_8b, large = compiles["8B-128K"], compiles["405B-plan-128"]["seconds"]
    rows = [
        [
            describe(one),
            f"{one['tokens_per_second_per_gpu']:,.0f}",
            f"{one['mfu_causal']:.1%} / {one['mfu']:.1%}",
            f"{titan:,.0f}" if (titan := peer(one)) else "not measured",
        ]
        for one in trainings()
        if whole(one)
    ]
    mfu = (
        "Measured in whole training steps, beside torchtitan, a training framework of PyTorch. MFU is the part of a "
        "device's peak speed that the model's arithmetic reaches. The first MFU counts only what the causal mask "
        "leaves of attention; the second is by the document's formula, which counts attention in full."
    )
    compiling = (
        f"Planning 8B at 131,072 tokens and writing its code takes {ours_8b['seconds']} s on two cores, which is "
        f"{ours_8b['time / export']} times one ``torch.export``. Planning a model of the shape of Llama-3 405B for 128 "
        f"devices takes {large} s."
    )
    killing = (
        f"A training run was killed at {crash['kills']} random moments. Each time that it reached a step before the "
        f"next kill ({crash['resumed from the newest checkpoint']} times), it had gone on from its newest checkpoint; "
        f"no complete one was lost, and no incomplete one was ever loaded. {rivals['kills']} more kills hit two jobs "
        "that share one folder: neither ever continued the other's work."
    )
    points = [*accuracy.in_short(), *divisions.in_short(), compiling, killing]
    head = ["work", "tokens/s/GPU", "MFU causal / document", "torchtitan, tokens/s/GPU"]
    return "\n\n".join(
        [
            textwrap.fill(mfu, 120),
            rst_table(head, rows),
            "\n".join(textwrap.fill(text, 120, initial_indent="* ", subsequent_indent="  ") for text in points),
        ]
    )


def models() -> str:
    """Which architectures give in parallel what plain transformers gives, for the front page."""
    rows = [[f"``{name}``", *(found.get(str(n), found.get("model", "")) for n in (2, 4))] for name, found in tested()]
    equal = [row[0] for row in rows if row[1:] == ["equal", "equal"]]
    refused = [row for row in rows if row[1].startswith("refused: ") and row[1] == row[2]]
    others = [row for row in rows if row[1:] != ["equal", "equal"] and row not in refused]
    text = (
        f"{len(equal)} of {len(rows)} architectures, tiny and with random weights, give on two and on four processes "
        "what plain ``transformers`` gives in one (``benchmarks/models.py``): losses and weights of three steps to "
        "1e-5 in fp32, with the dropout that each has by default, and exported files with the model's own keys. "
        f"They are {', '.join(equal)}."
    )
    for name, why, _ in refused:
        flag = "--attn_implementation eager"
        text += f" {name} is refused: {why.removeprefix('refused: ').replace(flag, f'``{flag}``')}."
    from_plain = {name: one["ours_from_plain"] for name, one in sorted(read("divergence.json").items())}
    further = {name: found for name, found in from_plain.items() if found >= 1e-6}
    same = sum(found == 0 for found in from_plain.values())
    near = len(from_plain) - same - len(further)
    bf16 = (
        "In bf16, with two layers of the width that each has by default, in one process on a CPU, the logits of "
        f"{same} are those of plain ``transformers`` to the last bit, and those of {near} "
        "diverge from them by less than 1e-6 nats a token (``benchmarks/divergence.py``)."
    )
    if further:
        names = ", ".join(f"``{name}`` ({found:.0e})" for name, found in further.items())
        bf16 += f" The divergence is larger of {names}."
    return "\n\n".join(
        [
            textwrap.fill(text, 120, break_on_hyphens=False),
            textwrap.fill(bf16, 120, break_on_hyphens=False),
            *([rst_table(["model type", "two processes", "four processes"], others)] if others else []),
        ]
    )


def tested() -> list[tuple[str, dict[str, str]]]:
    return sorted(read("models.json").items())


def describe(one: dict[str, Any]) -> str:
    layers = re.search(r"(\d+)layers", one["name"])
    layers_text = f"{layers[1]} layers of " if layers and not whole(one) else ""
    limit = f", {one['device_memory_gib']} GiB used of each" if "device_memory_gib" in one else ""
    limit += ", in fp8" if one["name"].endswith("-fp8") else ""
    sequences = counted(one["sequences_per_step"], "sequence")
    device = one["device"].replace("NVIDIA ", "")
    return f"{layers_text}Llama-3 8B, {one['sequence_length']:,} tokens, {sequences} a step, on {device}{limit}"


def performance() -> str:
    """Every table, for benchmarks/README.rst."""
    rows = [
        [
            describe(one),
            f"{one['tokens_per_second_per_gpu']:,.0f}",
            f"{one['mfu_causal']:.1%} / {one['mfu']:.1%}",
            compared(one["predicted_seconds_per_step"], one["seconds_per_step"], "s", 2),
            compared(one["predicted_memory_gib"], one["peak_memory_gib"], "GiB", 1),
            f"{titan:,.0f}" if (titan := peer(one)) else "",
            one.get("note", ""),
        ]
        for one in trainings()
    ]
    head = [
        "work",
        "tokens/s/GPU",
        "MFU causal / document",
        "step, predicted / measured",
        "memory, predicted / measured",
        "torchtitan",
        "note",
    ]
    losses = [
        [row["loss"], *(f"{row[key]:.2f}" for key in ("milliseconds", "gib", "error_weight_percent"))]
        for row in sorted(read("loss.json")["rows"], key=lambda row: float(row["milliseconds"]))
    ]
    return "\n\n".join(
        [
            title("Training steps"),
            f"{DOCUMENT}. That is the document's own figure; it was not measured here.",
            "These are whole training steps by ``benchmarks/train_llama.py``, with the plan that the planner found.\n"
            "The memory measured is the most that PyTorch had given out at a time; that of rows whose file in\n"
            "``benchmarks/results/train`` has no ``peak_memory_of_steps_gib`` leaves out the first step:",
            rst_table(head, rows),
            *profiles(),
            beside_others(),
            *accuracy.section(),
            *divisions.section(),
            title("Predictions"),
            "These rows are predicted from the bundled figures of the devices, for 4 micro-batches a step\n"
            "(``benchmarks/predictions.py``). They were not measured:",
            predictions(),
            pipelines(),
            title("Longest sequences"),
            longest(),
            title("Attention"),
            attentions(),
            title("Documents"),
            documents(),
            title("Windows"),
            windows(),
            title("Mixtures of experts"),
            experts(),
            title("Text into tokens"),
            tokenising(),
            title("The chunked loss"),
            "The loss of 16,384 tokens with hidden size 4096 and 128,256 words, forward and backward on\n"
            f"{read('loss.json')['device']} (``benchmarks/loss.py``). The error is that of the weight's gradient\n"
            "against fp64. ``train.py --enable-chunk-loss`` takes chunks of 2048 tokens.",
            rst_table(["loss", "ms", "GiB above inputs", "error, %"], losses),
            title("Numerics"),
            numerics(),
            ".. image:: results/numerics.png\n   :alt: loss by step of plain PyTorch and of four plans",
            numerics_of_fp8(),
            rst_table(
                ["gradient of", "error in bf16", "in fp8"],
                [
                    [row["gradient"], f"{row['bf16']:.2%}", f"{row['fp8']:.1%}"]
                    for row in read("fp8_numerics.json")["gradients"]
                ],
            ),
            ".. image:: results/fp8_numerics.png\n   :alt: loss by step in bf16 and in fp8",
        ]
    )


def profiles() -> list[str]:
    """How much of a step a device waits, where that was measured."""
    texts = []
    for one in trainings():
        if "profile" not in one:
            continue
        times = one["profile"]["milliseconds"]
        exchanging, copying, idle = (
            f"{times[name] / times['whole']:.1%}"
            for name in ("communication exposed", "copies to the host exposed", "idle")
        )
        texts.append(
            f"{describe(one)}: in a step that ``--profile`` looked at, the first device waited for communication for "
            f"{exchanging} of the time and for copies to and from the host for {copying}, and was idle for {idle}."
        )
    return [textwrap.fill(text, 120) for text in texts]


def attentions() -> str:
    """How fast options of attention are beside plain causal attention."""
    result = read("attention.json")
    text = (
        f"Attention of {result['length']:,} tokens as models and data ask for it, forward and backward on "
        f"{result['device']} (``benchmarks/attention.py``). The rate counts the pairs of tokens that see each other; "
        "the last column divides it by that of plain causal attention with the same heads, timed just before."
    )
    rows = [
        [row["case"], row["kernel"], f"{row['milliseconds']:.1f}", f"{row['tflops']:.0f}", f"{row['of_causal']:.0%}"]
        for row in result["cases"]
    ]
    return textwrap.fill(text, 120) + "\n\n" + rst_table(["case", "kernel", "ms", "TFLOP/s", "of causal's"], rows)


def documents() -> str:
    """How fast rows of documents are that are kept apart, beside rows with the same work."""
    text = (
        "Whole steps of 4 layers of Llama-3 8B, 131,072 tokens a step, with ``--documents`` of "
        "``benchmarks/train_llama.py``, beside rows whose work is equal. Documents by Zipf's law (8,192 tokens on "
        "average, the longest fills the row) are split along the sequence there (with one key-value head, there is no "
        "other way); they are beside documents of one length that have as much attention to compute together."
    )
    pairs = [
        ("one-gpu-documents-4096", "one-gpu-rows-4096"),
        ("one-gpu-documents-131072", "one-gpu-sequence-131072"),
        ("two-gpus-documents-4096", "two-gpus-rows-4096"),
        ("two-gpus-documents-131072", "two-gpus-sequence-131072"),
        ("two-gpus-zipf", "two-gpus-even"),
    ]
    rows = []
    for names in pairs:
        one, other = (read(f"documents/{name}.json") for name in names)
        speeds = [found["tokens_per_second_per_gpu"] for found in (one, other)]
        device = one["device"].replace("NVIDIA ", "")
        rows.append(
            [
                one["name"],
                device,
                f"{speeds[0]:,.0f}",
                other["name"],
                f"{speeds[1]:,.0f}",
                f"{speeds[0] / speeds[1]:.1%}",
            ]
        )
    head = ["rows of", "devices", "tokens/s/GPU", "beside", "tokens/s/GPU", "of that"]
    return textwrap.fill(text, 120) + "\n\n" + rst_table(head, rows)


def experts() -> str:
    """How fast a mixture of experts trains, beside FSDP2 alone."""
    rows = []
    for end in ("", "-65536"):
        ours, plain = read(f"experts/planned{end}.json"), read(f"experts/fsdp{end}.json")
        step = compared(ours["predicted_seconds_per_step"], ours["seconds_per_step"], "s", 3)
        memory = compared(ours["predicted_memory_gib"], ours["peak_memory_gib"], "GiB", 1)
        again = ", layers recomputed" if plain["recompute"] else ""
        beside = f"{plain['tokens_per_second_per_gpu']:,.0f} ({plain['peak_memory_gib']:.1f} GiB{again})"
        work = f"{ours['sequences_per_step']} x {ours['sequence_length']:,}"
        rows.append([work, f"{ours['tokens_per_second_per_gpu']:,.0f}", step, memory, beside])
    text = (
        f"Four layers of Qwen3-30B-A3B's width on {ours['device'].replace('NVIDIA ', '')}, with the plan that the "
        "planner found, beside FSDP2 alone with transformers' grouped products and compiled layers "
        "(``benchmarks/plain_fsdp.py``), in tokens/s/GPU:"
    )
    head = ["tokens a step", "tokens/s/GPU", "step, predicted / measured", "memory, predicted / measured", "FSDP2"]
    return f"{textwrap.fill(text, 120)}\n\n{rst_table(head, rows)}"


def windows() -> str:
    """How near to its work's time a model with sliding windows trains."""
    rows = []
    for name in ("mistral", "gemma"):
        one = read(f"windows/{name}.json")
        step = compared(one["predicted_seconds_per_step"], one["seconds_per_step"], "s", 3)
        memory = compared(one["predicted_memory_gib"], one["peak_memory_gib"], "GiB", 1)
        reached = f"{one['floor_seconds'] / one['seconds_per_step']:.0%}"
        rows.append([one["name"], f"{one['tokens_per_second_per_gpu']:,.0f}", step, memory, reached])
    text = (
        f"{one['sequences_per_step']} sequences of {one['sequence_length']:,} tokens a step on "
        f"{one['device'].replace('NVIDIA ', '')}, with the plan that the planner found. The last column divides the "
        "time that the work allows by the step's: its products at 712 TFLOP/s, which they reach in training, and the "
        "pairs of tokens that see each other at the rate of plain causal attention with the same heads."
    )
    head = ["work", "tokens/s/GPU", "step, predicted / measured", "memory, predicted / measured", "of the speed"]
    return f"{textwrap.fill(text, 120)}\n\n{rst_table(head, rows)}"


def tokenising() -> str:
    """How fast bookcorpus.py is beside the tokenizer alone."""
    result = read("tokenize.json")
    text = (
        f"``bookcorpus.py``, from a file of text to a packed dataset, beside ``encode_batch`` of the tokenizer alone, "
        f"which has all texts in memory, on {result['cores']} cores (``benchmarks/tokenize_text.py``):"
    )
    rows = [
        [row["documents"], *(f"{row[key]:.2f}" for key in ("bookcorpus MB/s", "encode_batch MB/s", "ratio"))]
        for row in result["rows"]
    ]
    memory = [
        [row["documents"], f"{row['text GB']:.2f}", f"{row['peak memory GB']:.2f}"]
        for row in read("tokenize_memory.json")["rows"]
    ]
    return "\n\n".join(
        [
            textwrap.fill(text, 120),
            rst_table(["documents", "MB/s", "encode_batch, MB/s", "ratio"], rows),
            "Its most resident memory, libraries and tokenizer included, on the text repeated to so many GB:",
            rst_table(["documents", "text, GB", "memory, GB"], memory),
        ]
    )


def numerics() -> str:
    """How far the losses of plans are from plain PyTorch's, and how far those are from one another."""
    result = read("numerics.json")
    plain = [row["mean_difference"] for row in result["rows"] if row["run"].startswith("plain,")]
    plans = [row["mean_difference"] for row in result["rows"] if not row["run"].startswith("plain")]
    return textwrap.fill(
        f"A small Llama was trained in bf16 on real text for {result['steps']} steps, by four plans on "
        f"{result['device']} and by plain PyTorch on one GPU (``benchmarks/numerics.py``). Over the second half of the "
        f"steps, the loss of plain PyTorch with other micro-batches differs by {plain[0]:.3f} on average from that of "
        f"plain PyTorch; the losses of the four plans differ from it by {min(plans):.3f} to {max(plans):.3f}.",
        120,
    )


def numerics_of_fp8() -> str:
    """How far losses in fp8 are from those in bf16, and those in bf16 from one another."""
    result = read("fp8_numerics.json")
    apart = {row["run"]: row["mean_absolute_difference"] for row in result["rows"]}
    ends = apart.pop("fp8, ends in bf16")
    noise, narrow = (statistics.mean(apart[run] for run in apart if run.startswith(kind)) for kind in ("bf16", "fp8"))
    return textwrap.fill(
        f"A Llama of 300M parameters was trained on real text for {result['steps']} steps, with a step's sequences in "
        f"one, two and four micro-batches in bf16, and in one and two in fp8 (``benchmarks/fp8_numerics.py``). Over "
        f"the last 200 steps, losses of two runs in bf16 are {noise:.4f} from one another on average, and those in fp8 "
        f"{narrow:.4f} from those in bf16: {narrow / noise:.2f} times as far. With the first and last layer in bf16 "
        f"they are {ends:.4f} away, and lower. So a run alone says little. The table has relative errors of gradients "
        "of one layer against fp64.",
        120,
    )


def predictions() -> str:
    rows = [
        [
            f"{row['tokens']:,} tokens on {row['devices']}",
            row["plan"],
            f"{row['tokens_per_second_per_gpu']:,.0f}",
            f"{row['mfu_causal']:.1%} / {row['mfu']:.1%}",
            f"{row['memory_gib']:.1f} GiB",
        ]
        for row in read("predictions.json")["rows"]
    ]
    return rst_table(["Llama-3 8B", "plan", "tokens/s/GPU", "MFU causal / document", "memory"], rows)


def longest() -> str:
    """The longest sequences for which a plan fits."""
    found = read("longest.json")
    rows = [
        [
            f"{row['devices']}, {row['host']}",
            f"{row['tokens']:,}",
            f"{row['tokens_per_second_per_gpu']:,.0f}",
            f"{row['memory_gib']:.1f} GiB",
            f"{row['host_gib']:.0f} GiB",
            row["published"] or "nothing",
        ]
        for row in found["rows"]
    ]
    text = (
        "These are the longest sequences, in steps of 32,768 tokens, for which a plan of Llama-3 8B fits, one sequence "
        "a step (``benchmarks/longest.py``). They are planned from the bundled figures of the devices, not run. Plans "
        "use at most 80 % of the host's memory. What ALST and UPipe publish is for 1.9 TB a node."
    )
    head = ["devices and the host's memory", "tokens", "tokens/s/GPU", "memory", "of the host, a device", "published"]
    return f"{textwrap.fill(text, 120)}\n\n{rst_table(head, rows)}"


def pipelines() -> str:
    """The document's 70B setting."""
    plans = {plan["search"]: plan for plan in read("plan_70b.json")["plans"]}
    best, without = plans["every schedule"], plans["no pipeline"]
    return textwrap.fill(
        "For the document's 70B setting, 8,192 tokens on 16 MI300X with 64 micro-batches, ``benchmarks/plan_70b.py`` "
        f"predicts, with a pipeline ({best['plan']}), {figures(best)}; without one, {figures(without)}. The document "
        "measured 100.3 s and 24.2 %, by its formula.",
        120,
    )


def figures(plan: dict[str, Any]) -> str:
    return (
        f"{plan['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU, a causal MFU of {plan['mfu_causal']:.1%} "
        f"({plan['mfu']:.1%} by the document's formula) and {plan['step_seconds']:.1f} s a step"
    )


def beside_others() -> str:
    """What other programs did with the same work."""
    peers = read("peers.json")
    settings = "; ".join(row["setting"] for row in peers["torchtitan"])
    hand, ours = peers["by_hand"], read("train/4layers-131072-60GB.json")
    own = ours["seconds_per_step"] / ours["sequences_per_step"]
    return textwrap.fill(
        f"The versions are {peers['versions']}. torchtitan's figures are those of its own step reports "
        f"(``benchmarks/results/peers.json``): {settings}. The first was measured on the same machine in the same "
        "hour, the second on another machine of the same kind; two such machines differ by up to 2 %. A plan of 4 "
        f"layers at 131,072 tokens that was written by hand takes {hand['seconds_per_micro_batch']:.3f} s a "
        "micro-batch, without exchanging gradients, clipping them or updating weights. On the same machine, the "
        f"planner's plan in generated code takes {own:.3f} s with all of these.",
        120,
    )


def filled(text: str, name: str, content: str) -> str:
    """`text` with `content` between the marks of `name`."""
    pattern = re.compile(rf"(\.\. begin {name}\n).*?(\.\. end {name}\n)", re.DOTALL)
    text, count = pattern.subn(lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text)
    assert count == 1, name
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the files are up to date")
    options = parser.parse_args()
    for path, name, content in (
        (README, "headline", headline()),
        (README, "models", models()),
        (TABLES, "performance", performance()),
    ):
        text = path.read_text()
        wanted = filled(text, name, content)
        if options.check and wanted != text:
            sys.exit(f"{path.relative_to(ROOT)} differs from benchmarks/results: run benchmarks/readme.py")
        if not options.check:
            path.write_text(wanted)


if __name__ == "__main__":
    main()
