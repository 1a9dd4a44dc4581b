"""How far a plan's logits in bf16 are from those of plain transformers in bf16, of many architectures: two layers of a
real width, random weights, one process.

    python benchmarks/divergence.py [name ...]

For each: the mean over tokens of the Kullback-Leibler divergence of softmax(logits), in nats, of ours and of plain
transformers' in bf16, each from plain transformers' in fp32 with the same weights; and of ours from plain in bf16.
Writes benchmarks/results/divergence.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import RESULTS
from nnscaler import parallelize
from nnscaler.kernels import widen_slow_products
from nnscaler.models.causal_lm import prepare_config
from nnscaler.models.documents import rows_hold
from tests.models.architectures import EXPERTS, NO_DROPOUT

TOKENS = 256
# The vocabulary is no width, and hundreds of experts are no memory of this machine's.
SMALLER = {"num_hidden_layers": 2, "vocab_size": 8192, "max_position_embeddings": 2048, "pad_token_id": None,
           "bos_token_id": 0, "eos_token_id": 1, "sliding_window": 64}  # fmt: skip
EXPERTS_OF = {key: 8 for key in EXPERTS if key.endswith("experts")} | {"n_shared_experts": 1}
RESULT, KNOWN = RESULTS / "divergence.json", RESULTS / "models.json"


class Divergence(nn.Module):
    """The sum over tokens of KL(softmax(wanted) || softmax(logits)), in nats, of a model's logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, wanted: Tensor) -> Tensor:
        """input_ids [1, tokens]; wanted [1, tokens, vocabulary], logits in fp32"""
        with rows_hold(None):
            return divergence(self.model(input_ids=input_ids, use_cache=False).logits, wanted)


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """The sum over tokens of KL(softmax(wanted) || softmax(logits)), in nats."""
    right = F.log_softmax(wanted.float(), -1)
    return (right.exp() * (right - F.log_softmax(logits.float(), -1))).sum()


def real_width(name: str) -> PretrainedConfig:
    """An architecture's own configuration, with two layers."""
    known = AutoConfig.for_model(name)
    fields = {}
    for field, value in {**SMALLER, **NO_DROPOUT, **EXPERTS_OF}.items():
        spelled = known.attribute_map.get(field, field)
        if spelled in known.to_dict():
            fields[spelled] = value
    if "sliding_attention" in (getattr(known, "layer_types", None) or ()):
        fields["layer_types"] = ["sliding_attention", "full_attention"]
    # What a class leaves open, though the model needs it.
    if getattr(known, "head_dim", 0) is None:
        fields["head_dim"] = known.hidden_size // known.num_attention_heads
    if getattr(known, "num_key_value_heads", 0) is None:
        fields["num_key_value_heads"] = known.num_attention_heads
    if name == "gpt_neo":
        fields |= {"attention_types": [[["global", "local"], 1]], "num_layers": 2}
    return AutoConfig.for_model(name, **fields)


def measure(name: str) -> dict[str, Any]:
    """The three divergences, in nats a token, and the width."""
    config, ours_config = real_width(name), real_width(name)
    prepare_config(ours_config, TOKENS, "auto")
    if ours_config._attn_implementation == "eager":  # as the model writes it, which is then what is compared
        config._attn_implementation = "eager"
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tokens = torch.randint(2, config.vocab_size, (1, TOKENS))
    with torch.no_grad():
        rounded = plain(input_ids=tokens, use_cache=False).logits.float()
        exact = plain.float()(input_ids=tokens, use_cache=False).logits.float()
    plain.bfloat16()  # where they came from: nothing is rounded
    ours = AutoModelForCausalLM.from_config(ours_config, dtype=torch.bfloat16)
    ours.load_state_dict(plain.state_dict(), assign=True)
    del plain
    found = {"hidden_size": config.hidden_size, "plain_from_fp32": divergence(rounded, exact).item() / TOKENS}
    # One small parameter alone is trained, which leaves forward as it is and takes no memory for an optimizer.
    ours.requires_grad_(False)
    min(ours.parameters(), key=torch.numel).requires_grad_()
    with tempfile.TemporaryDirectory() as folder:
        inputs = {"input_ids": tokens, "wanted": exact}
        model = parallelize(Divergence(ours), inputs, folder=folder)
        del ours
        gc.collect()
        found["ours_from_fp32"] = model.evaluate([inputs]).item() / TOKENS
        found["ours_from_plain"] = model.evaluate([{"input_ids": tokens, "wanted": rounded}]).item() / TOKENS
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names",
        nargs="*",
        default=list(json.loads(KNOWN.read_text())),
        help="architectures (default: those of models.json)",
    )
    names = parser.parse_args().names
    widen_slow_products()  # of plain transformers' too: how this CPU multiplies is not what is compared
    logging.disable(logging.WARNING)
    for name in names:
        try:
            found = measure(name)
        except Exception as error:  # whatever it is, it is what is to be known of the architecture
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print(name, found, flush=True)
        known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        RESULT.write_text(json.dumps({**known, name: found}, indent=1, sort_keys=True) + "\n")
        gc.collect()


if __name__ == "__main__":
    main()
