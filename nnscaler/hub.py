"""The Hugging Face hub, with little patience: its own clients retry for minutes where there is no network."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import get_session

from nnscaler.errors import UserError

PATIENCE = 4.0  # seconds

# For what loads with `transformers`, which otherwise asks at the terminal whether a model's own code is to run.
NO_CODE = {"trust_remote_code": False}

# One line a request would bury our own messages.
logging.getLogger("httpx").setLevel(logging.WARNING)
logging.getLogger("httpx2").setLevel(logging.WARNING)


@functools.cache
def reachable() -> bool:
    """Whether the hub answers within PATIENCE seconds. It is asked once in a process, and never under
    HF_HUB_OFFLINE."""
    if constants.HF_HUB_OFFLINE:
        return False
    answers = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            answers.append(get_session().head(constants.ENDPOINT, timeout=PATIENCE))

    # In a thread, because no timeout of an HTTP client covers a name server that does not answer.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(answers)


def load_tokenizer(path_or_name: str) -> Any:
    """The `transformers` tokenizer in a directory, or of a model on the hub or in the local cache.

    Raises:
        UserError: there is no tokenizer to load.
    """
    from transformers import AutoTokenizer

    local = Path(path_or_name).exists()
    online = not local and reachable()
    try:
        return AutoTokenizer.from_pretrained(path_or_name, local_files_only=not online, **NO_CODE)
    except Exception as error:  # the loaders raise whatever a damaged file makes them raise
        if not local and not online:
            reason = "no such directory, not in the local cache, and the Hugging Face hub cannot be reached"
        elif local and not os.access(path_or_name, os.R_OK):
            reason = "it may not be read"
        elif local and not any(Path(path_or_name).glob("*token*")):
            reason = "it holds no tokenizer.json"
        else:
            reason = why_not_loaded(error)
        raise UserError(f"cannot load a tokenizer from {path_or_name}: {reason}") from error


def why_not_loaded(error: BaseException) -> str:
    """What an error of `transformers` says of a model or tokenizer that it does not load with NO_CODE."""
    if "trust_remote_code" in str(error):
        return "it comes with code of its own, which is never run; what transformers has code for can be loaded"
    return first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; and the second, where the first only announces it."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
