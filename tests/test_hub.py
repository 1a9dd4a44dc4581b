"""Asking the hub never takes long."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from nnscaler import hub


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def asked(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, float]:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.reachable.cache_clear()
    start = time.monotonic()
    try:
        return hub.reachable(), time.monotonic() - start
    finally:
        hub.reachable.cache_clear()


def test_a_silent_hub_is_given_up_on(silent_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PATIENCE", 0.5)
    reachable, took = asked(silent_server, monkeypatch)
    assert not reachable
    assert took < 3


def test_a_name_server_that_is_silent_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PATIENCE", 0.5)
    monkeypatch.setattr(hub, "get_session", lambda: time.sleep(5))
    reachable, took = asked("http://unasked", monkeypatch)
    assert not reachable
    assert took < 3


def test_a_hub_that_refuses_is_given_up_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    reachable, took = asked(f"http://127.0.0.1:{port}", monkeypatch)
    assert not reachable
    assert took < hub.PATIENCE


def test_a_hub_that_answers_is_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.handle_request)
    thread.start()
    reachable, _ = asked(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    thread.join()
    server.server_close()
    assert reachable
