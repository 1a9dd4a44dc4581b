"""Conversations: labels where the assistant speaks, as TRL's trainers have them; whole ones, each once, in rows."""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import bookcorpus
from nnscaler.command import run
from nnscaler.data import readers
from nnscaler.data.chat import Rendered
from nnscaler.data.conversations import Columns, Fitting, Speech, pack_conversations
from nnscaler.data.fit import best_fit
from nnscaler.data.pack import Packing
from nnscaler.data.packed import PackedDataset
from nnscaler.data.sources import Corpus
from nnscaler.errors import UserError

# As Qwen's: no bos, and a turn ends with a token and a new line.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's: what an answer begins with depends on whether it is the last.
CHANGING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = "What is it? It was a dark night, 1,234 voices said: don't! 汉字 😀 äöü\n"


@cache
def make_tokenizer(template: str | None = CHATML, **marks: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT] * 4, trainer)
    marks = {"eos_token": "<|im_end|>", **marks}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **marks)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|im_start|>", special=True)]})
    tokenizer.chat_template = template
    return tokenizer


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


words = st.lists(st.sampled_from([*"abc .?!\n'1汉😀", "<|im_end|>"]), max_size=12).map("".join)


@st.composite
def talks(draw: Any) -> list[dict[str, str]]:
    messages = [turn("system", draw(words))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [turn("user", draw(words)), turn("assistant", draw(words))]
    return messages


def encoded(tokenizer: Any, row: dict[str, Any], columns: Columns, template: str | None = None, all_: bool = False):
    speech = Speech(tokenizer, columns, template, all_)
    return speech.encode([speech.render((row, "row 1"))])[0]


MESSAGES = Columns("messages")


@given(talks())
@settings(max_examples=60, deadline=None)
def test_marked_templates_learn_what_transformers_masks(messages):
    """As TRL's `assistant_only_loss` does: labels are the tokens in the mask that `apply_chat_template` gives."""
    tokenizer = make_tokenizer()
    wanted = tokenizer.apply_chat_template(
        messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    found = encoded(tokenizer, {"messages": messages}, MESSAGES, MARKED)
    assert found.ids.tolist() == wanted["input_ids"]
    masked = [id_ if mask else -100 for id_, mask in zip(wanted["input_ids"], wanted["assistant_masks"])]
    assert found.labels.tolist() == masked


def test_fields_of_a_message_that_are_empty_are_not_there():
    """Parquet has each field in each message. The conversation itself stays as it is."""
    template = (
        "{% for one in messages %}{{ one['content'] }}{% if 'tools' in one %}{{ one['tools'] }}{% endif %}{% endfor %}"
    )
    messages = [turn("user", "a") | {"tools": None}, turn("assistant", "b") | {"tools": "!"}]
    rendered = Speech(make_tokenizer(), MESSAGES, template, True).render(({"messages": messages}, "row 1"))
    assert rendered.text == "ab!"
    assert messages[0] == {"role": "user", "content": "a", "tools": None}


def test_marks_may_be_written_in_every_way_of_jinja_s():
    row = {"messages": [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]}
    for mark in ("{%- generation -%}", "{%generation%}", "{%  generation -%}"):
        found = encoded(make_tokenizer(), row, MESSAGES, MARKED.replace("{% generation %}", mark))
        assert make_tokenizer().decode(found.labels[found.labels != -100]) == "b<|im_end|>", "and no new line"


@given(talks())
@settings(max_examples=60, deadline=None)
def test_templates_without_marks_learn_what_follows_the_prompt_to_speak(messages):
    """What is learned is what the model is to write: everything between the generation prompt and the next turn."""
    tokenizer = make_tokenizer()
    found = encoded(tokenizer, {"messages": messages}, MESSAGES)
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert found.ids.tolist() == ids
    learned: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True, tokenize=False)
            upto = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
            learned += tokenizer(upto[len(before) :], add_special_tokens=False)["input_ids"]
    assert found.labels[found.labels != -100].tolist() == learned
    everything = encoded(tokenizer, {"messages": messages}, MESSAGES, all_=True)
    assert everything.labels.tolist() == [-100, *ids[1:]]


def common(a: list[int], b: list[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@given(words, words)
@settings(max_examples=60, deadline=None)
def test_completions_are_learned_from_where_they_begin(prompt, completion):
    """As TRL's `completion_only_loss`: what follows the longest common part of prompt and whole."""
    tokenizer = make_tokenizer(bos_token="<|im_start|>")
    texts = encoded(tokenizer, {"p": f"<{prompt}>", "c": f"<{completion}>"}, Columns(None, "p", "c"))
    asked = tokenizer(f"<|im_start|><{prompt}>")["input_ids"]
    whole = tokenizer(f"<|im_start|><{prompt}><{completion}><|im_end|>")["input_ids"]
    assert texts.ids.tolist() == whole
    assert (texts.labels != -100).tolist() == [at >= common(asked, whole) for at in range(len(whole))]

    row = {"p": [turn("user", prompt)], "c": [turn("assistant", completion)]}
    chat = encoded(tokenizer, row, Columns(None, "p", "c"))
    asked = tokenizer.apply_chat_template(row["p"], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template([*row["p"], *row["c"]], return_dict=True)["input_ids"]
    assert chat.ids.tolist() == whole
    assert (chat.labels != -100).tolist() == [at >= common(asked, whole) for at in range(len(whole))]


@pytest.mark.parametrize(
    ("prompt", "completion", "bos", "text"),
    [
        ("a", "b", None, "ab<|im_end|>"),
        ("a", "b<|im_end|>", None, "ab<|im_end|>"),
        ("<|im_start|>a", "b", "<|im_start|>", "<|im_start|>ab<|im_end|>"),
        ("a", "b", "<|im_start|>", "<|im_start|>ab<|im_end|>"),
    ],
)
def test_texts_get_the_marks_that_they_lack(prompt, completion, bos, text):
    tokenizer = make_tokenizer(**{"bos_token": bos} if bos else {})
    columns = Columns(None, "p", "c")
    rendered = Speech(tokenizer, columns, None, False).render(({"p": prompt, "c": completion}, "row 1"))
    assert rendered.text == text
    assert [text[begin:end] for begin, end in rendered.spans] == ["b<|im_end|>"]


def test_where_all_is_learned_prompts_are_too():
    columns = Columns(None, "p", "c")
    for row in ({"p": "ab", "c": "cd"}, {"p": [turn("user", "ab")], "c": [turn("assistant", "cd")]}):
        rendered = Speech(make_tokenizer(), columns, None, True).render((row, "row 1"))
        assert rendered.spans == [(0, len(rendered.text))]


def test_signs_without_a_token_are_passed_over():
    """What is learned begins and ends at the next token, or at the last."""
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "<e>": 3}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    speech = Speech(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>"), MESSAGES, None, False)
    spans = {(1, 9): [-100, 1, 2], (1, 5): [-100, 1, -100], (6, 9): [-100, -100, 2], (7, 10): [-100] * 3}
    found = speech.encode([Rendered("a   b c   ", [span]) for span in spans])
    assert [one.labels.tolist() for one in found] == list(spans.values())
    assert [one.ids.tolist() for one in found] == [[0, 1, 2]] * 4


def test_an_answer_may_come_first_or_without_a_prompt():
    """And a template may write the tokenizer's own marks."""
    tokenizer = make_tokenizer(bos_token="<|im_start|>")
    for template in (CHATML, "{{ bos_token }}" + CHATML):
        rendered = Speech(tokenizer, MESSAGES, template, False).render(
            ({"messages": [turn("assistant", "a"), turn("user", "b"), turn("assistant", "c")]}, "row 1")
        )
        assert rendered.text.count("<|im_start|>") == 3 + (template != CHATML)
        learned = [rendered.text[begin:end] for begin, end in rendered.spans]
        assert learned == [rendered.text.partition("<|im_end|>\n")[0] + "<|im_end|>\n", "c<|im_end|>\n"]
        row = {"p": [], "c": [turn("assistant", "a")]}
        rendered = Speech(tokenizer, Columns(None, "p", "c"), template, False).render((row, "row 1"))
        assert [list(span) for span in rendered.spans] == [[0, len(rendered.text)]]


@pytest.mark.parametrize("pad", ["first", "!", None])
def test_rows_are_filled_up_with_the_padding_token_or_the_last(tmp_path, pad):
    """Also where that is the token 0."""
    tokenizer = make_tokenizer(
        None,
        **{} if pad is None else {"pad_token": make_tokenizer().convert_ids_to_tokens(0) if pad == "first" else pad},
    )
    filler = {"first": 0, "!": tokenizer.convert_tokens_to_ids("!"), None: tokenizer.eos_token_id}[pad]
    corpus = write(tmp_path / "pairs.jsonl", [{"p": "ab", "c": "cd"}, {"p": "a", "c": "bcd"}, {"p": "a", "c": "b"}])
    speech = Speech(tokenizer, Columns(None, "p", "c"), None, True)
    pack_conversations(corpus, speech, tokenizer, tmp_path / "out", 7, 1, False, {"data": "x"})
    dataset = PackedDataset.open(tmp_path / "out")
    rows = [dataset.row(number) for number in range(len(dataset))]
    assert [int(row["document_starts"][-1]) for row in rows] == [5, 5, 3]
    for row in rows:
        begin = row["document_starts"][-1]
        assert row["input_ids"][begin:].tolist() == [filler] * (7 - begin)
    noted = json.loads((tmp_path / "out" / "packing.json").read_text())
    assert (noted["data"], noted["vocab_size"], noted["padding"]) == ("x", len(tokenizer), 8)
    assert (noted["smallest_id"], noted["largest_id"]) == (
        min(int(row["input_ids"].min()) for row in rows), max(int(row["input_ids"].max()) for row in rows),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("row", "template", "said"),
    [
        ({"text": "x"}, CHATML, "row 1: there is no 'messages'; the row has text"),
        ({"messages": None}, CHATML, "row 1: 'messages' is empty"),
        (
            {"messages": [turn("user", "x"), {"role": "assistant", "text": "y"}]},
            CHATML,
            r"no attribute 'content' \(message 2 has only role, text\)",
        ),
        ({}, CHATML, "row 1: there is no 'messages'; the row has nothing"),
        (["x"], CHATML, "row 1: a row must have columns by name, not be list"),
        ({"messages": "x"}, CHATML, "row 1: a conversation is a list of messages, each with a role and a content"),
        ({"messages": [{"content": "x"}]}, CHATML, "a conversation is a list of messages"),
        ({"messages": 5}, CHATML, "row 1: a conversation is a list of messages"),
        ({"messages": ["role"]}, CHATML, "row 1: a conversation is a list of messages"),
        (
            {"messages": [turn("user", "x"), turn("assistant", "y")]},
            CHATML.replace("|>assistant", "|>model"),  # which the prompt alone says
            "where the assistant speaks cannot be seen",
        ),
        ({"messages": [turn("user", "x")]}, "{{ raise_exception('not so') }}", "refuses the conversation: not so"),
        (
            {"messages": [turn("user", "x")] + [turn("assistant", "y")] * 2},
            CHANGING,
            "where the assistant speaks cannot",
        ),
        ({"messages": [turn("user", "x")]}, None, "has no chat template; give one with --chat_template"),
    ],
)
def test_rows_without_a_conversation(row, template, said):
    with pytest.raises(UserError, match=said):
        encoded(make_tokenizer(template), row, MESSAGES)


def test_one_answer_needs_no_marks_even_where_a_template_changes():
    tokenizer = make_tokenizer(CHANGING)
    found = encoded(tokenizer, {"messages": [turn("user", "a"), turn("assistant", "b")]}, MESSAGES)
    assert tokenizer.decode(found.labels[found.labels != -100]) == "<think></think>b<|im_end|>\n"
    messages = [turn("user", "a"), turn("assistant", "b"), turn("assistant", "c")]
    found = encoded(tokenizer, {"messages": messages}, MESSAGES, all_=True)
    assert found.labels.tolist() == [-100, *found.ids[1:]], "where all is learned, nobody asks who speaks"


@given(st.lists(st.integers(1, 20), min_size=1, max_size=200), st.integers(20, 40), st.integers(1, 400))
@settings(max_examples=80, deadline=None)
def test_each_item_is_once_in_a_row_that_holds_it(lengths, row, window):
    items = [f"{number:>{length}}"[-length:] for number, length in enumerate(lengths)]
    rows = list(best_fit(items, row, window))
    assert Counter(item for one in rows for item in one) == Counter(items)
    assert all(0 < sum(map(len, one)) <= row for one in rows)
    assert len(rows) <= 2 * sum(lengths) / row + 1 or window < sum(lengths)  # two rows in a row fill more than one


def write(path: Path, rows: list[dict[str, Any]]) -> Corpus:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Corpus([path])


@pytest.mark.parametrize("cut", [False, True])
def test_conversations_are_whole_in_rows_that_training_reads(tmp_path, cut):
    tokenizer = make_tokenizer()
    generator = np.random.default_rng(0)
    conversations = [
        [turn("user", "x" * int(size)), turn("assistant", f"{number} is it")]
        for number, size in enumerate(generator.integers(0, 60, size=60))
    ]
    conversations += [[turn("user", "nobody answers")]]
    corpus = write(tmp_path / "talk.jsonl", [{"messages": messages} for messages in conversations])
    speech = Speech(tokenizer, MESSAGES, None, False)
    found = {}
    for threads in (1, 3):
        out = tmp_path / f"out{threads}"
        fitting = pack_conversations(corpus, speech, tokenizer, out, 64, threads, cut, {"tokenizer": "x"})
        found[threads] = (out / "data-00000-of-00001.arrow").read_bytes()
    assert found[1] == found[3]
    whole = [encoded(tokenizer, {"messages": messages}, MESSAGES) for messages in conversations]
    wanted = Counter(
        (tuple(one.ids[:64]), tuple(one.labels[:64]))
        for one in whole
        if (len(one) <= 64 or cut) and (one.labels[:64] != -100).any()
    )
    dataset = PackedDataset.open(out)
    assert dataset.has_labels
    assert dataset.documents == "document_starts"
    parts: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    padding = 0
    for number in range(len(dataset)):
        row = dataset.row(number)
        starts = [*row["document_starts"], 64]
        assert starts[0] == 0
        for begin, end in pairwise(starts):
            part = tuple(row["input_ids"][begin:end]), tuple(row["labels"][begin:end])
            if set(part[1]) == {-100}:
                assert end == 64
                padding += end - begin
            else:
                parts[part] += 1
    assert parts == wanted
    long = sum(len(one) > 64 for one in whole)
    noted = json.loads((out / "packing.json").read_text())
    assert noted["documents"] == fitting.documents == wanted.total() == dataset.document_lengths.documents
    assert noted["padding"] == padding
    assert noted["tokens"] + padding == 64 * len(dataset) == 64 * noted["sequences"]
    assert noted["learned"] == sum(sum(label != -100 for label in labels) for _, labels in wanted.elements())
    assert (noted["dropped"], noted["unlearned"] >= 1) == (0 if cut else long, True)
    assert noted["cut"] + noted["unlearned"] + noted["dropped"] + noted["documents"] >= len(conversations)


@pytest.mark.parametrize("cut", [False, True])
def test_what_became_of_each_conversation_is_counted(tmp_path, cut):
    """Two fit, three are too long, of one of which nothing would be left to learn, and in four nobody answers."""
    tokenizer, length = make_tokenizer(), 24
    sizes = {"fit": [(0, 1), (2, 2)], "long": [(0, 30), (3, 40), (30, 1)]}
    talk = [
        [turn("user", "x" * asked), turn("assistant", "y" * said)] for kind in sizes.values() for asked, said in kind
    ]
    talk += [[turn("user", "z" * 2)]] * 3 + [[turn("user", "z" * 40)]]
    whole = [encoded(tokenizer, {"messages": messages}, MESSAGES) for messages in talk]
    assert [len(one) > length for one in whole] == [False] * 2 + [True] * 3 + [False] * 3 + [True]
    kept = whole[: 4 if cut else 2]
    corpus = write(tmp_path / "talk.jsonl", [{"messages": messages} for messages in talk])
    speech = Speech(tokenizer, MESSAGES, None, False)
    fitting = pack_conversations(corpus, speech, tokenizer, tmp_path / "out", length, 1, cut, {})
    tokens = sum(min(len(one), length) for one in kept)
    rows = len(PackedDataset.open(tmp_path / "out"))
    assert fitting.counts() | {"smallest_id": 0, "largest_id": 0} == {
        "sequence_length": length, "documents": 4 if cut else 2, "dropped": 0 if cut else 4, "cut": 2 if cut else 0,
        "unlearned": 5 if cut else 3, "tokens": tokens, "padding": rows * length - tokens, "sequences": rows,
        "learned": sum(int((one.labels[:length] != -100).sum()) for one in kept), "smallest_id": 0, "largest_id": 0,
    }  # fmt: skip


def test_rows_of_parquet_and_json_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK", 1)  # one row at a time
    rows = [{"messages": [turn("user", f"{n}"), {**turn("assistant", "yes"), "name": None}]} for n in range(5)]
    corpora = [write(tmp_path / "a.jsonl", rows)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    corpora += [Corpus([tmp_path / "a.json"]), Corpus([tmp_path / "a.parquet"])]
    speech = Speech(make_tokenizer(), MESSAGES, None, False)
    first, *others = [[speech.render(row) for row in corpus.rows()] for corpus in corpora]
    assert len(first) == 5
    assert others == [first, first]
    assert [place for _, place in corpora[2].rows()] == [f"{tmp_path}/a.parquet, row {n}" for n in range(1, 6)]
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"conversations are read from .jsonl, .json, .parquet"):
        list(Corpus([tmp_path / "a.txt"]).rows())


def test_nothing_that_is_left_is_said(tmp_path):
    corpus = write(tmp_path / "talk.jsonl", [{"messages": [turn("user", "x" * 90), turn("assistant", "y")]}])
    tokenizer = make_tokenizer()
    speech = Speech(tokenizer, MESSAGES, None, False)
    with pytest.raises(UserError, match="no conversation is left: 1 longer than 16 tokens, and 0 in which"):
        pack_conversations(corpus, speech, tokenizer, tmp_path / "out", 16, 1, False, {})
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, monkeypatch, capsys):
    make_tokenizer(None).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "template.jinja").write_text(MARKED)
    rows = [{"chat": [turn("user", "hello"), turn("assistant", "yes " * n)]} for n in range(12)]
    write(tmp_path / "talk.jsonl", rows)
    flags = {
        "data_path_or_name": tmp_path / "talk.jsonl", "tokenizer_path_or_name": tmp_path / "tokenizer",
        "save_path": tmp_path / "out", "sequence_length": 48, "messages_column": "chat", "num_proc": 1,
        "chat_template": tmp_path / "template.jinja", "too_long": "cut",
    }  # fmt: skip

    def called() -> None:
        monkeypatch.setattr(sys, "argv", ["bookcorpus.py", *(f"--{name}={value}" for name, value in flags.items())])
        run(bookcorpus.main)

    called()
    said = capsys.readouterr().out
    assert "packed     12 conversations" in said
    assert "% of them padding" in said
    assert len(datasets.load_from_disk(str(tmp_path / "out"))) >= 3
    flags["save_path"] = tmp_path / "other"
    (tmp_path / "template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(SystemExit):
        called()
    assert "template.jinja', which cannot be read: 'utf-8' codec" in capsys.readouterr().err
    del flags["messages_column"]
    with pytest.raises(SystemExit):
        called()
    assert "template.jinja', which needs messages_column or prompt_column" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("learned", ["assistant", "all"])
def test_every_flag_of_conversations_arrives_and_what_became_of_them_is_said(cut, learned, tmp_path, monkeypatch):
    asked: dict[str, tuple[Any, ...]] = {}
    fitting = Fitting(8, documents=3, dropped=4, cut=1, unlearned=5, tokens=60, learned=20, padding=4, sequences=8)
    fitting.seconds = 2.0

    def pack(*given: Any, provenance: dict[str, Any]) -> Fitting:
        asked["pack"] = (*given, provenance)
        return fitting

    monkeypatch.setattr("nnscaler.data.conversations.Speech", lambda *given: asked.update(speech=given) or "speech")
    monkeypatch.setattr("nnscaler.data.conversations.pack_conversations", pack)
    (tmp_path / "template").write_text("a template")
    options = bookcorpus.Options(
        "rows", "tokens", str(tmp_path / "out"), 8, prompt_column="p", completion_column="c", split="test",
        train_on=learned, too_long="cut" if cut else "drop", chat_template=tmp_path / "template",
    )  # fmt: skip
    lines = list(bookcorpus.pack_conversations(options, "corpus", "tokenizer", 5))
    columns = Columns(None, "p", "c")
    assert asked["speech"] == ("tokenizer", columns, "a template", learned == "all")
    *given, provenance = asked["pack"]
    assert given == ["corpus", "speech", "tokenizer", tmp_path / "out", 8, 5, cut]
    assert provenance == {
        "data": "rows", "messages": None, "prompt": "p", "completion": "c", "split": "test", "tokenizer": "tokens",
        "train_on": learned, "too_long": options.too_long, "chat_template": "a template",
    }  # fmt: skip
    assert lines == [
        ("packed", "3 conversations, 1 of them cut"),
        ("left out", "4 too long, and 5 in which nothing would be learned"),
        ("tokens", "60, of which 20 are learned, 30 tokens/s"),
        ("sequences", "8 of 8 tokens, 6.2 % of them padding"),
    ]


def test_every_flag_of_texts_arrives_and_what_became_of_them_is_said(tmp_path, monkeypatch):
    asked: list[Any] = []
    packing = Packing(8, documents=3, empty_documents=2, tokens=1234, sequences=7, continued=1, tail=2, seconds=2.0)

    def pack(*given: Any, provenance: dict[str, Any]) -> Packing:
        asked.extend([*given, provenance])
        return packing

    monkeypatch.setattr("nnscaler.data.pack.pack", pack)
    options = bookcorpus.Options("rows", "tokens", "s3://bucket/out", 8, text_column="body", split="test")
    lines = list(bookcorpus.pack_text(options, "corpus", "tokenizer", 5))
    made_of = {"data": "rows", "text_column": "body", "split": "test", "tokenizer": "tokens"}
    assert asked == ["corpus", "tokenizer", "s3://bucket/out", 8, 5, made_of]
    assert lines == [
        ("documents", "3; skipped because they are empty: 2"),
        ("tokens", "1,234 with bos and eos, 617 tokens/s"),
        ("sequences", "7 of 8 tokens"),
        ("continued", "1 sequence beginning within a document"),
        ("tail", "2 tokens left out"),
    ]
