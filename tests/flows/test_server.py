"""What is asked of a Prefect server before a command uses it."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.server import is_open, refuse_other_server
from grape_service.errors import UserError


@contextmanager
def version_server(password: str | None) -> Iterator[str]:
    """Answers /api/admin/version as Prefect's server does, with 401 to those who lack the password."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = "Basic " + base64.b64encode((password or "").encode()).decode()
            refused = password is not None and self.headers.get("Authorization") != wanted
            assert self.path == "/api/admin/version"
            self.send_response(401 if refused else 200)
            self.end_headers()
            self.wfile.write(b'"3.7.7"')

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/api"
    server.shutdown()


def test_an_open_server_is_told_from_one_that_asks() -> None:
    with version_server(None) as api:
        assert is_open(api)
    with version_server("grape:pass:word") as api:
        assert not is_open(api)
        with temporary_settings({PREFECT_API_URL: api, PREFECT_API_AUTH_STRING: "grape:pass:word"}):
            refuse_other_server()
        with (
            temporary_settings({PREFECT_API_URL: api, PREFECT_API_AUTH_STRING: "grape:word"}),
            pytest.raises(UserError, match="refuses us: set PREFECT_API_AUTH_STRING"),
        ):
            refuse_other_server()
    assert not is_open(api)  # gone
