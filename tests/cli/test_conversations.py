"""Training on packed conversations has the loss of TRL's `assistant_only_loss` on each conversation alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import bookcorpus
import train
from tests import tiny
from tests.data.test_conversations import MARKED, TEXT, make_tokenizer, turn, write
from tests.parity import TOLERANCE

LENGTH = 128
TALKS = [
    [turn("system", "Be short.")] * (number % 2)
    + [
        turn(role, TEXT[at : at + 1 + 5 * number % 11])
        for at in range(number % 3 + 1)
        for role in ("user", "assistant")
    ]
    for number in range(24)
]
NOT_LEARNED = [[turn("user", "who"), turn("assistant", TEXT * 6)], [turn("user", "nobody answers")]]


def plain_loss(model: LlamaForCausalLM) -> float:
    """What the trainers of transformers and TRL compute: the sum over the assistant's tokens, by their number."""
    tokenizer, losses, count = make_tokenizer(), 0.0, 0
    for messages in TALKS:
        found = tokenizer.apply_chat_template(
            messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = torch.tensor([found["input_ids"]]), torch.tensor([found["assistant_masks"]])
        assert ids.shape[1] <= LENGTH
        with torch.no_grad():
            losses += model(input_ids=ids, labels=ids.masked_fill(mask == 0, -100), num_items_in_batch=1).loss.item()
        count += int(mask[:, 1:].sum())
    return losses / count


@pytest.mark.parametrize("flags", [(), ("--enable-chunk-loss", "--micro_batch_size", "4")], ids=["plain", "chunked"])
def test_a_step_on_packed_conversations_has_the_loss_of_each_alone(monkeypatch, tmp_path, flags):
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer(MARKED)
    tokenizer.save_pretrained("tokenizer")
    write(Path("talks.jsonl"), [{"messages": messages} for messages in TALKS + NOT_LEARNED])
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny.config(vocab_size=len(tokenizer), attn_implementation="eager"))
    model.save_pretrained("model")
    tiny.write_hardware(Path())

    def call(main, *flags: str) -> None:
        monkeypatch.setattr(sys, "argv", ["script.py", *flags])
        main()

    call(
        bookcorpus.main, "--data_path_or_name", "talks.jsonl", "--tokenizer_path_or_name", "tokenizer",
        "--messages_column", "messages", "--save_path", "data", "--sequence_length", str(LENGTH),
    )  # fmt: skip
    packed = json.loads(Path("data", "packing.json").read_text())
    assert (packed["documents"], packed["dropped"], packed["unlearned"]) == (len(TALKS), 1, 1)
    rows = packed["sequences"]
    assert 4 < rows < len(TALKS), "several conversations are in a row, and the step has several micro-batches"
    steps = ("--grad_accumulation_steps", str(rows if not flags else -(-rows // 4)))  # one, of all rows
    call(
        train.main, "--model_id", "model", "--dataset_path", "data", "--eval_dataset_path", "data", "--document_mask",
        "--hardware", "hardware.json", "--precision", "fp32", "--plan_ngpus", "1", "--learning_rate", "1e-9",
        "--name", "run", *steps, *flags,
    )  # fmt: skip
    (line,) = (json.loads(line) for line in Path("runs", "run", "metrics.jsonl").read_text().splitlines())
    wanted = plain_loss(model)
    assert line["loss"] == pytest.approx(wanted, rel=TOLERANCE)
    assert line["eval_loss"] == pytest.approx(wanted, rel=TOLERANCE)
