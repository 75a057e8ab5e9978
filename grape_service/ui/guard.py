"""What stands between a request and the pages: who may ask, and what a browser is told to refuse."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from urllib.parse import urlencode

from fastapi import Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse

COOKIE = "grape_token"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
PAGE_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
"""A report is a file of the version: it has scripts of its own, and is shut off from these pages."""

Next = Callable[[Request], Awaitable[Response]]


class Guard:
    """Answers to this machine's own names alone, or, with a token, to whoever has it; reads alone."""

    def __init__(self, token: str | None):
        self.token = token

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = self._refusal(request) or await call_next(request)
        response.headers.setdefault("Content-Security-Policy", PAGE_POLICY)
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    def _refusal(self, request: Request) -> Response | None:
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("These pages are only read.\n", 405, {"Allow": "GET, HEAD"})
        if self.token is None:
            host = request.headers.get("host", "")
            name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
            if name not in LOOPBACK:
                return PlainTextResponse("This address is answered under 127.0.0.1 and localhost alone.\n", 421)
            return None
        given = request.query_params.get("token")
        if given is not None and self._is_right(given):
            rest = urlencode([item for item in request.query_params.multi_items() if item[0] != "token"])
            path = "/" + request.url.path.lstrip("/")
            answer = RedirectResponse(f"{path}?{rest}" if rest else path, 303)
            answer.set_cookie(COOKIE, given, httponly=True, samesite="lax", secure=request.url.scheme == "https")
            return answer
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._is_right(request.cookies.get(COOKIE) or bearer):
            return None
        return PlainTextResponse("A token is needed: open the address that `grape ui` printed, with ?token=...\n", 401)

    def _is_right(self, given: str) -> bool:
        assert self.token is not None
        return hmac.compare_digest(given.encode(), self.token.encode())
