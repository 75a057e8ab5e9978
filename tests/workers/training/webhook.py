"""A training service behind a webhook."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Webhook:
    """A training service: takes jobs and tells their state."""

    def __init__(self, statuses: list[dict[str, Any]], follow: bool = True, made: str | None = None):
        """`statuses`: its answers, the last one for ever; a number in "http" is an answer's status. `made`: the model
        that a job copies to its output."""
        self.posts: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.statuses = statuses
        self.made = made
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.posts.append((body, dict(self.headers)))
                if service.made:
                    shutil.copytree(service.made, body["output"] + "/model")
                self._answer({"status_url": f"{service.url}/status"} if follow else {})

            def do_GET(self) -> None:
                self._answer(service.statuses.pop(0) if len(service.statuses) > 1 else service.statuses[0])

            def _answer(self, value: dict[str, Any]) -> None:
                data = json.dumps(value).encode()
                self.send_response(value.get("http", 200))
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Webhook]:
        thread = threading.Thread(target=self._server.serve_forever)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join(10)
