"""Makes the pictures of the README and of examples/gather: `make screenshots`, after `make quickstart`.

Two more datasets are made of the scores that are there, so that the catalogue has something to list, and what
examples/gather makes; then Chromium opens the catalogue, a row and the reports. Needs the packages of the tests, and
Chromium.
"""

from __future__ import annotations

import base64
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import grape_service  # noqa: E402
from grape_service.release.load import Release  # noqa: E402
from grape_service.ui.app import create_app  # noqa: E402
from grape_service.ui.folder import Folder  # noqa: E402
from tests.chromium import Browser, running_browser  # noqa: E402

IMAGES = ROOT / "docs" / "images"
CONFIG = "examples/quickstart/grape.yaml"
GATHER = ROOT / "examples" / "gather"
DATASETS = "examples/quickstart/out/datasets"
MAX_BYTES = 150_000
VARIANTS = (
    ("name=quickstart-two-each", "select.keep=2"),
    ("name=quickstart-longest", "select.method=longest", "weights=null", "output.tags=[baseline]"),
)


@contextmanager
def application() -> Iterator[str]:
    """The pages of the quickstart's datasets, and their address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(Folder(DATASETS)), log_level="error", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.05)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def picture(browser: Browser, path: Path, address: Path | str, width: int, height: int, top: str = "") -> None:
    """A PNG of what a window of this size shows, from the element `top` on. Where the repository lies is left out."""
    browser.open(address, width, height, dark=False)
    browser.call("Emulation.setScrollbarsHidden", hidden=True)
    browser.run(f"for (const where of document.querySelectorAll('.where bdi')) where.textContent = {DATASETS!r}")
    if top:
        browser.run(f"document.querySelector({top!r}).scrollIntoView()")
    browser.run("new Promise((done) => setTimeout(done, 800))")
    data = base64.b64decode(browser.call("Page.captureScreenshot", format="png")["data"])
    assert len(data) < MAX_BYTES, f"{path.name} has {len(data):,} bytes"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    print(f"{path.relative_to(ROOT)} {len(data):,} bytes")


def main() -> None:
    """Make the datasets and the pictures."""
    release = grape_service.run(CONFIG)
    for overrides in VARIANTS:
        grape_service.run(CONFIG, overrides=overrides)
    take_pictures(release)
    picture_of_gather(grape_service.run(str(GATHER / "grape.yaml")))


def picture_of_gather(release: Release) -> None:
    """The report of what examples/gather made."""
    with tempfile.TemporaryDirectory() as folder, running_browser(Path(folder)) as browser:
        picture(browser, GATHER / "report.png", Path(release.path) / "report.html", 1120, 760, "#scores")


def take_pictures(release: Release) -> None:
    """The catalogue, a row and the report."""
    report = Path(release.path) / "report.html"
    with tempfile.TemporaryDirectory() as folder, running_browser(Path(folder)) as browser, application() as address:
        picture(browser, IMAGES / "catalogue.png", f"{address}/", 1120, 400)
        picture(
            browser, IMAGES / "row.png", f"{address}/datasets/quickstart/{release.version}/rows/1", 1120, 720, ".modes"
        )
        picture(browser, IMAGES / "report.png", report, 1120, 760, "#scores")


if __name__ == "__main__":
    main()
