"""Every page in a real browser: quiet, readable, accessible, unharmed by what it shows, and reached by keyboard."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from grape_service.ui.app import create_app
from grape_service.ui.folder import Folder
from tests.chromium import BINARY, CONTRASTS, SIZES, Browser, running_browser
from tests.grape_service.ui.made_folder import HOSTILE, make_folder

pytestmark = pytest.mark.skipif(BINARY is None, reason="Chromium is not installed: run apt-get install chromium")

SHOTS = os.environ.get("GRAPE_SCREENSHOTS")
PAGES = {
    "catalog": "/",
    "dataset": "/datasets/pool",
    "changes": "/compare/pool?a=v0001&b=v0002",
    "version": "/datasets/hostile/v0001",
    "report": "/datasets/hostile/v0001/report",
    "rows": "/datasets/hostile/v0001/rows",
    "row": "/datasets/pool/v0002/rows/4",
    "hostile row": "/datasets/hostile/v0001/rows/4",
    "left out": "/datasets/pool/v0001/left-out",
    "card": "/datasets/hostile/v0001/card",
    "files": "/datasets/hostile/v0001/files",
    "config": "/datasets/hostile/v0001/config",
    "runs": "/runs",
    "run": "/runs/20250101T000000-dddddddd",
    "problem": "/datasets/nothing",
}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    datasets = make_folder(tmp_path_factory.mktemp("ui"))
    app = create_app(Folder(str(datasets), workspace=str(datasets.parent / "workspace")))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running_browser(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PAGES)
def test_every_page_is_quiet_and_readable(browser: Browser, address: str, name: str, size: str, dark: bool) -> None:
    browser.errors.clear()
    browser.asked.clear()
    browser.open(address + PAGES[name], *SIZES[size], dark)
    assert browser.run("document.querySelector('h1').textContent.length > 0")
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth"), "the page is wider than the window"
    assert browser.run("window.hacked") is None
    if name in ("rows", "hostile row"):
        assert browser.run(f"document.body.innerText.includes({HOSTILE[:40]!r})")
    if SHOTS:
        browser.screenshot(Path(SHOTS) / f"ui-{name.replace(' ', '-')}-{size}-{'dark' if dark else 'light'}.png")
    assert browser.axe() == []
    assert browser.run(CONTRASTS) == []
    expected = ["Failed to load resource: the server responded with a status of 404 (Not Found)"]
    assert browser.errors == (expected if name == "problem" else [])
    assert [url for url in browser.asked if not url.startswith((address, "data:", "blob:"))] == []


def test_the_keyboard_alone_leads_from_the_list_to_a_token(browser: Browser, address: str) -> None:
    browser.open(f"{address}/", 1280, 900, dark=False)
    follow(browser, "pool", "/datasets/pool")
    follow(browser, "v0001", "/datasets/pool/v0001")
    follow(browser, "Rows", "/rows")
    for _ in range(20):
        browser.key("Tab")
        if browser.run("document.activeElement.name") == "text":
            break
    browser.write("question p004")
    browser.key("Enter")
    wait_for(browser, "location.search.includes('question')")
    assert browser.run("document.querySelectorAll('table.rows tbody tr').length") == 1
    follow(browser, "4", "/rows/4")
    for _ in range(40):
        browser.key("Tab")
        if browser.run("document.activeElement.className") == "tokens":
            break
    before = browser.run("getComputedStyle(document.activeElement.children[0]).backgroundColor")
    assert before != "rgba(0, 0, 0, 0)"
    browser.key("ArrowRight")
    assert "log-probability -1.04" in browser.run("readout.textContent")


def test_tokens_are_shaded_by_what_is_chosen(browser: Browser, address: str) -> None:
    browser.open(f"{address}/datasets/hostile/v0001/rows/4", 1280, 900, dark=False)
    shades = "[...document.querySelectorAll('.candidate.kept .tokens span')].map((t) => t.style.background).join()"
    before = browser.run(shades)
    assert browser.run("document.querySelectorAll('input[name=mode]').length") == 2
    browser.run("document.querySelector('input[data-name=weight]').click()")
    assert browser.run(shades) != before
    assert "weighs less than 1" in browser.run("scale.textContent")


def follow(browser: Browser, text: str, end: str) -> None:
    """Tab to the link with this text and press Enter."""
    for _ in range(60):
        browser.key("Tab")
        if browser.run("document.activeElement.tagName === 'A' && document.activeElement.textContent.trim()") == text:
            browser.key("Enter")
            wait_for(browser, f"location.pathname.endsWith({end!r})")
            return
    raise AssertionError(f"no link '{text}' is reached")


def wait_for(browser: Browser, condition: str) -> None:
    deadline = time.monotonic() + 20
    while not browser.run(f"document.readyState === 'complete' && {condition}"):
        assert time.monotonic() < deadline, condition
        time.sleep(0.05)
