"""Conversations as text: what a tokenizer's chat template makes of them, and which parts of that are learned."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from nnscaler.errors import UserError

ASSISTANT = "assistant"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # around what the assistant says, in templates that say it
_MISSING = re.compile(r"has no attribute '(\w+)'")  # in what jinja says

Message = Mapping[str, Any]


class Rendered(NamedTuple):
    """A conversation as text.

    spans  (from, to), ...: the characters that are learned
    """

    text: str
    spans: Sequence[tuple[int, int]]

    def weight(self) -> int:
        return len(self.text)


class ChatTemplate:
    """A chat template: that of the tokenizer, or another one.

    Raises UserError where there is none, and where it cannot be applied to a conversation.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self._variables = tokenizer.special_tokens_map
        try:
            self._template = tokenizer.get_chat_template(template)
        except ValueError as error:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template; give one with --chat_template"
            ) from error
        self._marks = bool(_MARKS.search(self._template))

    def assistants(self, messages: Any, place: str) -> Rendered:
        """A conversation of which only what the assistant says is learned.

        That is what the template marks with {% generation %}. Where it marks nothing, it is what each message of the
        assistant adds to the messages before it and to the prompt that lets the assistant speak.
        """
        messages = checked(messages, place)
        if self._marks:
            text, spans = self._render(messages, place, marks=True)
            return Rendered(text, spans)
        text = self.whole(messages, place).text
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            begin = self._render(messages[:index], place, prompt=True)[0] if index else ""
            last = index == len(messages) - 1
            end = text if last else self._render(messages[: index + 1], place)[0]
            if not (end.startswith(begin) and text.startswith(end)):
                raise UserError(
                    f"{place}: the chat template writes the beginning of this conversation otherwise than the whole: "
                    "where the assistant speaks cannot be seen; give a template with {% generation %} around what it "
                    "says (--chat_template), or --train_on all"
                )
            spans.append((len(begin), len(end)))
        return Rendered(text, spans)

    def whole(self, messages: Any, place: str) -> Rendered:
        """A conversation that is learned as a whole."""
        text, _ = self._render(checked(messages, place), place)
        return Rendered(text, [(0, len(text))])

    def completion(self, prompt: Any, completion: Any, place: str) -> Rendered:
        """Messages with those that answer them. The latter are learned, from where they differ from a prompt for
        them."""
        asked, answered = checked(prompt, place), checked(completion, place)
        text, _ = self._render([*asked, *answered], place)
        begin, _ = self._render(asked, place, prompt=True) if asked else ("", [])
        same = next((at for at, (a, b) in enumerate(zip(begin, text)) if a != b), min(len(begin), len(text)))
        return Rendered(text, [(same, len(text))])

    def _render(
        self, messages: Sequence[Message], place: str, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            texts, spans = _render_all(
                conversations=[messages], chat_template=self._template, add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks, **self._variables,
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            complaint = f"the chat template refuses the conversation: {_first_line(error)}"
            raise UserError(f"{place}: {complaint}{_who_lacks_it(error, messages)}") from error
        return texts[0], spans[0] if marks else []


# Annotated as a text alone, where it gives texts, and the marked places of each.
_render_all: Callable[..., tuple[list[str], list[list[tuple[int, int]]]]] = render_jinja_template  # type: ignore[assignment]


def checked(messages: Any, place: str) -> list[Message]:
    """A conversation, without fields that are empty. Raises UserError where it is no conversation."""
    if not isinstance(messages, list) or not all(isinstance(one, dict) and "role" in one for one in messages):
        raise UserError(f"{place}: a conversation is a list of messages, each with a role and a content")
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def _who_lacks_it(error: Exception, messages: Sequence[Message]) -> str:
    """Which message lacks what a template misses, in parentheses; empty: it is not known."""
    missing = _MISSING.search(str(error))
    lacking = [number for number, one in enumerate(messages) if missing and missing[1] not in one]
    return f" (message {lacking[0] + 1} has only {', '.join(messages[lacking[0]])})" if lacking else ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
