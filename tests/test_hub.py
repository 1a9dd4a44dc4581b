"""Asking the hub never takes long."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from threading import Event, Thread

import pytest
from huggingface_hub import constants

from nnscaler import hub


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
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(hub, "PATIENCE", 3600.0)
    assert not asked(f"http://127.0.0.1:{port}", monkeypatch)


def test_a_hub_that_answers_is_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

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
