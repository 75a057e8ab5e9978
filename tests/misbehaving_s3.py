"""A proxy in front of a real S3 server that misbehaves as servers and networks do."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate

from aiohttp import ClientSession, web


@dataclass
class Proxy:
    """Passes requests on, unless `answer` gives another answer; `drop` names headers that are lost on the way."""

    address: str = ""
    answer: Callable[[web.Request], web.Response | None] = lambda request: None
    drop: tuple[str, ...] = ()
    seen: list[str] = field(default_factory=list)


def refusal(request: web.Request, status: int, code: str, **headers: str) -> web.Response:
    """An S3 server's answer with an error's code; HEAD has no body, and so no code."""
    body = "" if request.method == "HEAD" else f"<Error><Code>{code}</Code><Message>said so</Message></Error>"
    return web.Response(status=status, text=body, content_type="application/xml", headers=headers)


def skewed(request: web.Request, seconds: float) -> web.Response:
    """What a server says whose clock differs."""
    date = formatdate(time.time() + seconds, usegmt=True)
    return refusal(request, 403, "RequestTimeTooSkewed", Date=date)


@contextlib.contextmanager
def proxy_before(endpoint: str) -> Iterator[Proxy]:
    """A proxy before the server at `endpoint`, in a thread of its own."""
    proxy, loop, ready = Proxy(), asyncio.new_event_loop(), threading.Event()

    async def serve() -> None:
        ended = asyncio.Event()
        stop.append(lambda: loop.call_soon_threadsafe(ended.set))
        async with ClientSession(auto_decompress=False) as session:

            async def handle(request: web.Request) -> web.Response:
                body = await request.read()
                proxy.seen.append(f"{request.method} {request.path_qs}")
                instead = proxy.answer(request)
                if instead is not None:
                    return instead
                left = {"content-length", "transfer-encoding", "expect", *proxy.drop}
                headers = {name: value for name, value in request.headers.items() if name.lower() not in left}
                address = endpoint + request.raw_path
                async with session.request(request.method, address, data=body or None, headers=headers) as answer:
                    left = {"transfer-encoding", "content-encoding", "connection", "date", "server"}
                    if request.method != "HEAD":
                        left.add("content-length")
                    found = {name: value for name, value in answer.headers.items() if name.lower() not in left}
                    return web.Response(status=answer.status, headers=found, body=await answer.read())

            app = web.Application(client_max_size=2**26)
            app.router.add_route("*", "/{path:.*}", handle)
            runner = web.AppRunner(app)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            proxy.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
            ready.set()
            await ended.wait()
            await runner.cleanup()

    stop: list[Callable[[], object]] = []
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield proxy
    finally:
        stop[0]()
        thread.join(10)
        loop.close()
