"""The page in a real browser: drawn, quiet, hovered, reached by keyboard, readable, unharmed by what it shows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from grape_service.report.page import render_comparison, render_page
from tests.chromium import BINARY, CONTRASTS, SIZES, Browser, running_browser
from tests.grape_service.report.made_report import HOSTILE, examples, facts, job

pytestmark = pytest.mark.skipif(BINARY is None, reason="Chromium is not installed: run apt-get install chromium")

SHOTS = os.environ.get("GRAPE_SCREENSHOTS")
DRAWN = ".cartesianlayer .trace, .cartesianlayer image"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(facts(better="teacher", collapse=True), examples(), job()))
    return path


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("comparison") / "comparison.html"
    sides = {"candidate_id": HOSTILE[0], "tokens": 7, "score": -1.0, "score_other": -1.5}
    sides = {"first": {**sides, "source": HOSTILE[1]}, "second": {**sides, "source": HOSTILE[5]}}
    entry = {"prompt_id": HOSTILE[0], "lost": 1.0, "rank_correlation": -1.0, **sides}
    ranking = {"prompts": 3, "rank_correlation": 0.5, "same_first": 0.5, "histogram": [1] * 20}
    ranking |= {"most_different": [entry], "score_difference": {"mean": 0.1, "largest": 1.0}}
    found = {
        "first": HOSTILE[5],
        "second": "b@v2",
        "prompts": {"first": 3, "second": 3, "both": 3},
        "same_choice": 2,
        "agreement": 2 / 3,
        "sources": {HOSTILE[0]: [3, 2], HOSTILE[4]: [0, 1]},
        "moves": [{"from": HOSTILE[5], "to": None, "prompts": 1}],
        "ranking": ranking,
        "settings": [{"key": "select.keep", "first": HOSTILE[0], "second": None}],
    }
    path.write_text(render_comparison(found))
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running_browser(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_page_is_drawn_quiet_and_readable(
    browser: Browser, page: Path, comparison: Path, name: str, size: str, dark: bool
) -> None:
    browser.errors.clear()
    browser.asked.clear()
    browser.open(page if name == "report" else comparison, *SIZES[size], dark)
    plots = browser.run("document.querySelectorAll('.plot').length")
    assert plots == (12 if name == "report" else 2)
    assert browser.run(f"[...document.querySelectorAll('.plot')].every((p) => p.querySelector({DRAWN!r}))")
    assert browser.run("[...document.querySelectorAll('.plot')].every((p) => p.clientHeight > 100)")
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth"), "the page is wider than the window"
    assert browser.run("window.hacked") is None
    for text in (HOSTILE[0], HOSTILE[5]) if name == "report" else ():
        assert browser.run(f"document.body.innerText.includes({text!r})")
    if SHOTS:
        browser.screenshot(Path(SHOTS) / f"{name}-{size}-{'dark' if dark else 'light'}.png")
    assert browser.axe() == []
    assert browser.run(CONTRASTS) == []
    assert browser.errors == []
    assert [url for url in browser.asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_hover_and_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page, 1280, 900, dark=False)
    x, y = browser.run(
        "(() => { const p = document.querySelector('#plot-wins .point path'); p.scrollIntoView({block: 'center'});"
        " const r = p.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    browser.mouse(x, y)
    browser.run("new Promise((done) => setTimeout(done, 500))")
    assert browser.run("document.querySelectorAll('#plot-wins .hoverlayer .hovertext').length") == 1
    assert "%" in browser.run("document.querySelector('#plot-wins .hoverlayer').textContent")

    x, y = browser.run(
        "(() => { const t = document.querySelector('.tokens span'); t.scrollIntoView({block: 'center'});"
        " const r = t.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    browser.mouse(x, y)
    assert "log-probability -0.1, ratio 0.1, weight 0.5" in browser.run("readout.textContent")

    before = browser.run("getComputedStyle(document.querySelectorAll('.tokens span')[1]).backgroundColor")
    browser.run("document.querySelector('input[value=\"2\"]').click()")
    after = browser.run("getComputedStyle(document.querySelectorAll('.tokens span')[1]).backgroundColor")
    assert before != after

    browser.run("document.querySelector('.tokens').focus()")
    browser.key("ArrowRight")
    browser.key("ArrowRight")
    assert "weight 1.5" in browser.run("readout.textContent")

    browser.open(page, 1280, 900, dark=False)
    reached = set()
    for _ in range(25):
        browser.key("Tab")
        reached.add(
            browser.run(
                "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
            )
        )
    assert {"skip", "A", "plot-flow"} <= {name.split(" ")[0] for name in reached}


def test_a_printed_report_cuts_no_plot(browser: Browser, page: Path) -> None:
    """Paper is narrower than the window: before it is printed, each plot is drawn at a width that fits, at once."""
    browser.open(page, 1280, 900, dark=False)
    widths = "[...document.querySelectorAll('.main-svg')].map((svg) => Number(svg.getAttribute('width')))"
    before = browser.run(widths)
    assert max(before) > 1000
    printed = browser.run(f"(() => {{ window.dispatchEvent(new Event('beforeprint')); return {widths}; }})()")
    assert max(printed) <= 680
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    browser.call("Emulation.setDeviceMetricsOverride", width=718, height=1000, deviceScaleFactor=1, mobile=False)
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth + 8")
    assert browser.run("getComputedStyle(document.querySelector('.pair')).display") == "block"
    browser.call("Emulation.setEmulatedMedia", media="", features=[])
    browser.open(page, 1280, 900, dark=False)
    assert len(browser.call("Page.printToPDF", printBackground=True)["data"]) > 50_000
    browser.run("new Promise((done) => setTimeout(done, 300))")
    assert browser.run(widths) == before
