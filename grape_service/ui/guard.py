"""What stands between a request and the pages: who may ask, under which prefix, what a browser is told to refuse."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from contextvars import ContextVar
from urllib.parse import quote, unquote, urlencode

from fastapi import Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grape_service.display import visible
from grape_service.errors import UserError

log = logging.getLogger("grape_service.ui.access")

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
MIN_TOKEN = 16
"""Characters of a token that somebody has chosen; one that is made here has 32."""
WRONG_SECONDS = 0.5
"""How long the answer to a wrong token takes; such answers are given one after the other, whoever asks."""
MAX_WAITING = 20
"""Wrong tokens that wait for their answer; while there are so many, no token is looked at."""
PREFIX = re.compile(r"(/[A-Za-z0-9_.~%@:+=-]+)*")
READS = ("GET", "HEAD")
PAGE_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
"""A report is a file of the version: it has scripts of its own, and is shut off from these pages."""

_root: ContextVar[str] = ContextVar("root", default="")


def root() -> str:
    """The path below which a browser finds these pages, such as /user/ann/proxy/8765; "" where it is all of the host's.

    It stands before every link.
    """
    return _root.get()


def check_root_path(path: str) -> str:
    """A prefix without a slash at its end. Raises UserError for what is not a path."""
    path = path.rstrip("/")
    if not PREFIX.fullmatch(path):
        raise UserError(f"'{path}' is not a prefix: write a path such as /user/ann/grape")
    return path


def check_token(token: str) -> str:
    """A token that somebody has chosen. Raises UserError for one that is short, or that no address can hold."""
    if len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable():
        raise UserError(f"GRAPE_UI_TOKEN has to be at least {MIN_TOKEN} ASCII characters, so that nobody guesses it")
    return token


class Guard:
    """Answers whoever has the token, or without one this machine's own names alone; reads alone; logs who asked.

    A right token in the address becomes a cookie, which holds no token but the name of this server's session.
    """

    def __init__(self, app: ASGIApp, token: str | None = None, root_path: str = ""):
        self.app = app
        self.token = token
        self.root_path = root_path
        self.session = secrets.token_urlsafe(32)
        # Cookies are those of a host, whatever the port: each server's has a name of its own.
        self.cookie = f"grape_{hashlib.sha256(self.session.encode()).hexdigest()[:8]}"
        self.waiting = 0
        self.turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0
        prefix = self._prefix(scope)
        path, before = scope["path"], unquote(prefix)
        if path != before and not path.startswith(f"{before}/"):  # the proxy has taken it away
            scope["path"] = before + path
        scope["root_path"] = before

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", PAGE_POLICY)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Cross-Origin-Opener-Policy"] = "same-origin"
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        request = Request(scope)
        mark = _root.set(prefix)
        try:
            refusal = await self._refusal(request)
            await (refusal or self.app)(scope, receive, send_guarded)
        finally:
            _root.reset(mark)
            asked = path + (f"?{rest}" if (rest := _without_token(request)) else "")
            who = request.client.host if request.client else "-"
            milliseconds = 1000 * (time.monotonic() - begun)
            log.info("%s %s %s %d %.0f ms", who, request.method, visible(asked[:500]), status, milliseconds)

    def _prefix(self, scope: Scope) -> str:
        """The configured prefix, or that of the proxy in front, as far as it is a path and nothing else."""
        if self.root_path:
            return self.root_path
        sent = next((value for name, value in scope["headers"] if name == b"x-forwarded-prefix"), b"")
        prefix = sent.decode("latin-1").strip().rstrip("/")
        return prefix if PREFIX.fullmatch(prefix) else ""

    async def _refusal(self, request: Request) -> Response | None:
        if request.method not in READS:
            return PlainTextResponse("These pages are only read.\n", 405, {"Allow": ", ".join(READS)})
        if self.token is None:
            host = request.headers.get("host", "")
            name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
            if name not in LOOPBACK:
                return PlainTextResponse("This address is answered under 127.0.0.1 and localhost alone.\n", 421)
            return None
        if hmac.compare_digest(request.cookies.get(self.cookie, "").encode(), self.session.encode()):
            return self._without_token_in_address(request) if "token" in request.query_params else None
        in_address = request.query_params.get("token")
        given = in_address or request.headers.get("authorization", "").removeprefix("Bearer ")
        if not given:
            return _needs_token()
        if self.waiting >= MAX_WAITING:
            return PlainTextResponse("Too many wrong tokens: try again in a while.\n", 429, {"Retry-After": "10"})
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            self.waiting += 1
            try:
                async with self.turn:
                    await asyncio.sleep(WRONG_SECONDS)
            finally:
                self.waiting -= 1
            return _needs_token()
        return self._without_token_in_address(request) if in_address else None

    def _without_token_in_address(self, request: Request) -> Response:
        """The same page, and the cookie that opens it."""
        rest = _without_token(request)
        page = request.scope["path"][len(request.scope["root_path"]) :]
        path = root() + quote("/" + page.lstrip("/"))  # '//host' would lead elsewhere
        answer = RedirectResponse(f"{path}?{rest}" if rest else path, 303)
        is_secure = request.url.scheme == "https"
        answer.set_cookie(
            self.cookie, self.session, path=root() or "/", httponly=True, samesite="lax", secure=is_secure
        )
        return answer


def _needs_token() -> Response:
    return PlainTextResponse("A token is needed: open the address that `grape ui` printed, with ?token=...\n", 401)


def _without_token(request: Request) -> str:
    return urlencode([item for item in request.query_params.multi_items() if item[0] != "token"])
