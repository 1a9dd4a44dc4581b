"""Asking the hub never takes long."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from threading import Event, Thread
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from nnscaler import hub
from nnscaler.errors import UserError


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def asked(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.reachable.cache_clear()
    try:
        return hub.reachable()
    finally:
        hub.reachable.cache_clear()


def test_a_silent_hub_is_given_up_on(silent_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is silent for as long as the test lasts."""
    monkeypatch.setattr(hub, "PATIENCE", 0.5)
    assert not asked(silent_server, monkeypatch)


def test_a_name_server_that_is_silent_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timeout of the client's covers it: here it answers only after it has been given up on."""
    given_up, answered = Event(), Event()

    def ask() -> None:
        given_up.wait(300)
        answered.set()

    monkeypatch.setattr(hub, "PATIENCE", 0.5)
    monkeypatch.setattr(hub, "get_session", ask)
    assert not asked("http://unasked", monkeypatch)
    assert not answered.is_set()
    given_up.set()


def test_a_hub_that_refuses_is_given_up_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the patience, which would be longer than the test may last."""
    monkeypatch.setattr(hub, "PATIENCE", 3600.0)
    with socket.socket() as closed:  # nobody listens, and nobody else can
        closed.bind(("127.0.0.1", 0))
        assert not asked(f"http://127.0.0.1:{closed.getsockname()[1]}", monkeypatch)


def test_a_hub_that_answers_is_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    monkeypatch.setattr(hub, "PATIENCE", 300.0)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.handle_request)
    thread.start()
    reachable = asked(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    thread.join()
    server.server_close()
    assert reachable


def test_it_is_asked_once_and_not_at_all_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_of: list[tuple[str, float]] = []
    session = SimpleNamespace(head=lambda url, timeout: asked_of.append((url, timeout)) or "200")
    monkeypatch.setattr(hub, "get_session", lambda: session)
    monkeypatch.setattr(constants, "ENDPOINT", "http://here")
    for offline, wanted in ((True, False), (False, True)):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        hub.reachable.cache_clear()
        try:
            assert [hub.reachable() for _ in range(2)] == [wanted] * 2
        finally:
            hub.reachable.cache_clear()
        assert asked_of == [("http://here", hub.PATIENCE)][:wanted]


@pytest.mark.parametrize(
    ("name", "reaches", "local_only", "said"),
    [
        ("here", None, True, "it holds no tokenizer.json"),
        ("closed", None, True, "it may not be read"),
        ("damaged", None, True, "it is damaged"),
        ("org/x", False, True, "no such directory, not in the local cache, and the Hugging Face hub cannot be reached"),
        ("org/x", True, False, "it is damaged"),
    ],
)
def test_where_a_tokenizer_is_looked_for_and_why_there_is_none(name, reaches, local_only, said, tmp_path, monkeypatch):
    """What is here needs no hub."""
    monkeypatch.chdir(tmp_path)
    for folder, file in (("here", "config.json"), ("closed", "tokenizer.json"), ("damaged", "tokenizer_config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    monkeypatch.setattr(os, "access", lambda path, how: path != "closed")  # root may read all
    monkeypatch.setattr(hub, "reachable", lambda: reaches if reaches is not None else pytest.fail("nobody is to ask"))
    asked_for: list[tuple[str, bool]] = []

    def load(path: str, local_files_only: bool, trust_remote_code: bool) -> str:
        assert not trust_remote_code
        asked_for.append((path, local_files_only))
        if len(asked_for) > 1:
            raise RuntimeError("\n it is damaged\nmore of it")
        return "a tokenizer"

    library = SimpleNamespace(AutoTokenizer=SimpleNamespace(from_pretrained=load))
    monkeypatch.setitem(sys.modules, "transformers", library)
    assert hub.load_tokenizer(name) == "a tokenizer"
    with pytest.raises(UserError, match=f"^cannot load a tokenizer from {name}: {said}$"):
        hub.load_tokenizer(name)
    assert asked_for == [(name, local_only)] * 2


def test_the_first_line_of_an_error_is_what_it_says_or_is() -> None:
    assert hub.first_line(ValueError(" \n one\ntwo")) == "one"
    assert hub.first_line(KeyError()) == "KeyError"
    assert hub.first_line(ValueError("not valid:\n    too large\nthree")) == "not valid: too large"
    assert hub.first_line(ValueError("nothing follows:")) == "nothing follows:"
