"""Who may read the pages of `grape ui`, under which names and prefixes."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from grape_service.errors import UserError
from grape_service.ui import guard
from grape_service.ui.app import create_app
from grape_service.ui.folder import Folder
from tests.grape_service.ui.made_folder import POOL, TABS, client_of

TOKEN = "a token of its own"


def test_without_a_token_this_machines_names_alone(datasets: Path) -> None:
    folder = Folder(str(datasets))
    assert client_of(folder, host="evil.example:8765").get("/").status_code == 421
    for host in ("localhost:8765", "[::1]:8765", "127.0.0.1"):
        assert client_of(folder, host=host).get("/").status_code == 200


def test_with_a_token_whoever_has_it(
    datasets: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guard, "WRONG_SECONDS", 0.0)
    caplog.set_level("INFO", guard.log.name)
    client = client_of(Folder(str(datasets)), token=TOKEN, host="ui.example")
    for path in ("/", "/static/ui.css", "/datasets/pool/v0001/rows", "/?token=wrong"):
        assert client.get(path).status_code == 401
    assert client.get("/", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.get("/", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    answer = client.get(f"/datasets/pool?token={TOKEN}&start=0", follow_redirects=False)
    assert answer.headers["location"] == "/datasets/pool?start=0"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert TOKEN not in cookie
    assert client.get("/datasets/pool").status_code == 200
    hostile = client.get(f"http://ui.example//evil.example/?token={TOKEN}", follow_redirects=False)
    assert hostile.headers["location"] == "/evil.example/"
    name = cookie.partition("=")[0]
    assert client_of(Folder(str(datasets)), token=TOKEN).get("/", cookies={name: "x"}).status_code == 401
    lines = [record.getMessage() for record in caplog.records if record.name == guard.log.name]
    assert any(line.startswith("testclient GET /datasets/pool?start=0 303") for line in lines), lines
    assert not any(TOKEN in line or "wrong" in line for line in lines)


def test_guesses_are_slowed_down(datasets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "WRONG_SECONDS", 0.2)
    monkeypatch.setattr(guard, "MAX_WAITING", 3)
    app = create_app(Folder(str(datasets)), TOKEN)

    async def guess() -> tuple[list[int], float, int, int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            await client.get("/", params={"token": TOKEN})  # has the cookie from here on
            begun = time.monotonic()
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as other:
                guesses = [other.get("/", params={"token": f"guess {n}"}) for n in range(3)]
                waiting = [asyncio.ensure_future(guess) for guess in guesses]
                await asyncio.sleep(0.05)
                late = (await other.get("/", params={"token": TOKEN})).status_code
                known = (await client.get("/")).status_code
                answers = [(await answer).status_code for answer in waiting]
            return answers, time.monotonic() - begun, late, known

    answers, seconds, late, known = asyncio.run(guess())
    assert answers == [401] * 3
    assert seconds >= 0.6  # one after the other
    assert (late, known) == (429, 200)


@pytest.mark.parametrize("token", ["short", "x" * 15, "ünïcödé-is-not-in-addresses"])
def test_a_token_that_can_be_guessed_is_refused(token: str) -> None:
    with pytest.raises(UserError, match="at least 16 ASCII characters"):
        guard.check_token(token)


PREFIX = "/user/ann/proxy/8765"


@pytest.mark.parametrize("told", ["header", "option", "option, not taken away"])
def test_behind_a_prefix_every_link_has_it(datasets: Path, told: str) -> None:
    workspace = str(datasets.parent / "workspace")
    app = create_app(Folder(str(datasets), workspace=workspace), TOKEN, PREFIX if "option" in told else "")
    client = TestClient(app, base_url="http://127.0.0.1", headers={"Authorization": f"Bearer {TOKEN}"})
    if told == "header":
        client.headers["X-Forwarded-Prefix"] = PREFIX + "/"
    before = PREFIX if "taken" in told else ""
    pages = ["/", "/runs", "/datasets/pool", "/compare/pool?a=v0001&b=v0002", "/no/such/page", "/datasets/pool?start=x"]
    for path in [*pages, *(f"{POOL}{tab}" for tab in TABS if "report" not in tab)]:
        answer = client.get(f"{before}{path}")
        links = re.findall(r'(?:href|src|action)="(/[^"]*)"', answer.text)
        assert len(links) > 3, path
        assert all(link.startswith(f"{PREFIX}/") for link in links), links
    assert client.get(f"{before}/static/ui.css").status_code == 200
    answer = client.get(f"{before}/datasets/pool/latest?token={TOKEN}", follow_redirects=False)
    assert answer.headers["location"] == f"{PREFIX}/datasets/pool/latest"
    assert f"Path={PREFIX};" in answer.headers["set-cookie"]
    moved = client.get(f"{before}{POOL}/prompt?id=p004", follow_redirects=False)
    assert moved.headers["location"] == f"{PREFIX}{POOL}/rows/4"


@pytest.mark.parametrize("sent", ["//evil.example", "/a//b", "https://evil.example", '/"><script>', "/a b", "/b?x"])
def test_a_prefix_that_is_not_a_path_counts_for_nothing(client: TestClient, sent: str) -> None:
    answer = client.get("/", headers={"X-Forwarded-Prefix": sent})
    assert answer.status_code == 200
    assert 'href="/runs"' in answer.text
    with pytest.raises(UserError, match="is not a prefix"):
        guard.check_root_path(sent)


@pytest.mark.parametrize("path", ["", "/user/ann@x.org"])
def test_a_prefix_with_escaped_characters(datasets: Path, path: str) -> None:
    sent = "/user/ann%40x.org"
    client = TestClient(create_app(Folder(str(datasets)), TOKEN), base_url="http://127.0.0.1")
    client.headers["X-Forwarded-Prefix"] = sent
    answer = client.get(f"{path}/datasets/pool?token={TOKEN}", follow_redirects=False)
    assert answer.headers["location"] == f"{sent}/datasets/pool"
    assert f"Path={sent};" in answer.headers["set-cookie"]
    page = client.get(f"{path}/datasets/pool", headers={"Authorization": f"Bearer {TOKEN}"})
    assert (page.status_code, f'href="{sent}/runs"' in page.text) == (200, True)
